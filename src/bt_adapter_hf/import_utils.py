"""Every check for an optional package, in one place.

A package counts as available when it really imports: decoders in particular are often installed and yet unable to
load their shared libraries.
"""

import importlib
import importlib.metadata
import json
import logging
from functools import cache
from urllib.parse import urlsplit
from urllib.request import url2pathname


logger = logging.getLogger(__name__)


@cache
def import_error(name: str) -> Exception | None:
    """Import module `name` and return what went wrong, or None. The answer is cached for the life of the process."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken shared library raises OSError or RuntimeError, not ImportError
        return error
    return None


def is_available(name: str) -> bool:
    """Whether module `name` imports. One that is installed but cannot load is logged with its cause, once."""
    error = import_error(name)
    if error is not None and not is_missing(error, name):
        _warn_broken(name)
    return error is None


def require_package(name: str, extra: str) -> None:
    """Raise `ImportError` naming our extra when module `name` does not import.

    Args:
        name: the module's import name, for instance "sklearn".
        extra: the extra of this package (see setup.py) that installs it.
    """
    error = import_error(name)
    if error is None:
        return
    if is_missing(error, name):
        raise ImportError(
            f"this needs the package '{name}', which is not installed: {install_command(extra)}"
        ) from error
    raise ImportError(
        f"this needs the package '{name}', which is installed but does not import "
        f"({type(error).__name__}: {error}). Uninstall it (pip uninstall {name}), install it again "
        f"({install_command(extra)}), and run `bt-adapter env` to see what is broken."
    ) from error


def install_command(extra: str) -> str:
    """What installs one of our extras, from where this package itself came from: it is not on PyPI.

    pip notes where that was (PEP 610); what it has noted nothing about lies in a clone.
    """
    try:
        noted = importlib.metadata.distribution("bt_adapter_hf").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:  # a folder on sys.path
        noted = None
    origin = json.loads(noted) if noted else {"dir_info": {"editable": True}}
    url = origin.get("url", "")
    if "dir_info" in origin:
        option = "-e " if origin["dir_info"].get("editable") else ""
        folder = f" ({url2pathname(urlsplit(url).path)})" if url else ""
        return f"pip install {option}'.[{extra}]' in the clone of bt_adapter_hf{folder}"
    if "vcs_info" in origin:
        url = f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    return f"pip install 'bt_adapter_hf[{extra}] @ {url}'"


def is_missing(error: Exception, name: str) -> bool:
    """Not installed at all, as against installed and broken (or missing something that it needs itself)."""
    return isinstance(error, ModuleNotFoundError) and error.name in (name, name.partition(".")[0])


@cache
def _warn_broken(name: str) -> None:
    error = import_error(name)
    logger.warning("'%s' is installed but does not import (%s: %s)", name, type(error).__name__, error)
