"""Every check for an optional package, in one place.

A package counts as available when it really imports: decoders in particular are often installed and yet unable to
load their shared libraries.
"""

import importlib
import logging
from functools import cache


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
            f"this needs the package '{name}', which is not installed: pip install 'bt_adapter_hf[{extra}]'"
        ) from error
    raise ImportError(
        f"this needs the package '{name}', which is installed but does not import "
        f"({type(error).__name__}: {error}). Reinstall it (pip install --force-reinstall 'bt_adapter_hf[{extra}]') "
        "and run `bt-adapter env` to see what is broken."
    ) from error


def is_missing(error: Exception, name: str) -> bool:
    """Not installed at all, as against installed and broken (or missing something that it needs itself)."""
    return isinstance(error, ModuleNotFoundError) and error.name in (name, name.partition(".")[0])


@cache
def _warn_broken(name: str) -> None:
    error = import_error(name)
    logger.warning("'%s' is installed but does not import (%s: %s)", name, type(error).__name__, error)
