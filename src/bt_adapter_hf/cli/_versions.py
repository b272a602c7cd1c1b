"""Installed versions, beside those that the tests ran on and those that setup.py allows."""

import importlib.metadata
import re
from importlib.resources import files

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


CONSTRAINTS = files("bt_adapter_hf.assets") / "constraints.txt"


def tested_versions() -> dict[str, str]:
    """What the tests ran on, direct and indirect packages, by canonical name."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins}


def allowed_versions() -> dict[str, Requirement]:
    """Our own requirements with those of all extras, by canonical name. Empty where the package is not installed."""
    try:
        lines = importlib.metadata.requires("bt_adapter_hf") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def installed_versions() -> dict[str, str]:
    return {
        canonicalize_name(distribution.name): distribution.version
        for distribution in importlib.metadata.distributions()
        if distribution.name and distribution.version  # a half-removed one has neither
    }


def compare_versions() -> dict[str, dict[str, str | None]]:
    """Of each installed package that the tests ran on, or that we name: `installed`, `tested`, `range`, `state`.

    `state`: "as tested", "older than tested", "newer than tested", "not tested", "out of range".
    """
    tested, allowed = tested_versions(), allowed_versions()
    compared = {}
    for name, version in sorted(installed_versions().items()):
        if name not in tested and name not in allowed:
            continue
        # of "2.14.1+cpu" 2.14.1: the tests are about versions, not builds
        found, pin = Version(Version(version).public), tested.get(name)
        specifier = allowed[name].specifier if name in allowed else None
        if specifier is not None and not specifier.contains(found, prereleases=True):
            state = "out of range"
        elif pin is None:
            state = "not tested"
        elif found == Version(pin):
            state = "as tested"
        else:
            state = "older than tested" if found < Version(pin) else "newer than tested"
        compared[name] = {
            "installed": version,
            "tested": pin,
            "range": None if specifier is None else _in_order(str(specifier)),
            "state": state,
        }
    return compared


def _in_order(specifier: str) -> str:
    """ ">=5.23,<6" for "<6,>=5.23"."""
    return ",".join(sorted(specifier.split(","), key=lambda part: re.match("[<!]", part) is not None))
