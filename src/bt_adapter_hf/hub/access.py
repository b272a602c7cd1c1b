"""Talking to the Hub: another try where it did not answer, and a clear sentence where it said no."""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants, get_session, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..adapters.damage import check_whole


logger = logging.getLogger(__name__)

RETRY_WAITS = [1.0, 2.0, 4.0]  # seconds before each further try
_GIVE_UP_AFTER = 30.0  # seconds; the client has tried for longer itself by then
_TRANSIENT = (429, 500, 502, 503, 504)

# How hf_xet, which moves large files (the Hub's default transport), words what went wrong: in errors of Python's own
# classes, so that its text is all there is to know it by.
_XET = re.compile(r"(Authentication|Data integrity|IO|Network|Server|Task) error: |(Timeout|Not found): ")
_XET_CLASSES = (RuntimeError, ConnectionError, TimeoutError, PermissionError, FileNotFoundError, ValueError, OSError)

Result = TypeVar("Result")


class StorageError(OSError):
    """The storage of the Hub's large files did not give or take one.

    Args:
        text: what the client of the storage said.
    """

    def __init__(self, text: str):
        super().__init__(text)
        status = re.search(r"\((\d{3}) [^()]*\)", text)
        self.status = int(status[1]) if status else None
        self.unreachable = "error sending request" in text or text.startswith("Timeout")
        self.in_short = status[0].strip("()") if status else text.rpartition(": ")[2] if ": " in text else text


def retried(
    call: Callable[[], Result],
    what: str,
    *,
    waits: Sequence[float] | None = None,
    give_up_after: float = _GIVE_UP_AFTER,
    again: Callable[[BaseException], bool] | None = None,
) -> Result:
    """What `call` returns, tried again where the Hub was busy or the connection broke.

    Args:
        call: may be called several times.
        what: for the log, such as "Creating org/model".
        waits: seconds before each further try; `RETRY_WAITS` by default.
        give_up_after: seconds after which there is no further try.
        again: whether an error may be over soon; `is_transient` by default.
    """
    started = time.monotonic()
    for wait in [*(RETRY_WAITS if waits is None else waits), None]:
        try:
            return _call(call)
        except Exception as error:
            if wait is None or not (again or is_transient)(error) or time.monotonic() - started > give_up_after:
                raise
            wait = max(wait, _asked_wait(error))
            logger.warning("%s: %s. Next try in %g s.", what, _in_short(error), wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _call(call: Callable[[], Result]) -> Result:
    """What `call` returns; an error of hf_xet in it comes out as a `StorageError`."""
    try:
        return call()
    except Exception as error:
        if http_cause(error) is None:
            for link in _chain(error):
                if (type(link) in _XET_CLASSES or type(link).__module__ == "hf_xet") and _XET.match(str(link)):
                    raise StorageError(str(link)) from error
        raise


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    cause = http_cause(error)
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in _TRANSIENT
    if isinstance(cause, StorageError):
        return cause.unreachable or cause.status in _TRANSIENT
    return isinstance(cause, HTTPError) and type(cause).__name__ != "LocalProtocolError"


def http_cause(error: BaseException) -> BaseException | None:
    """The first error in the chain that the Hub's client raised; libraries wrap it, and some hide what it said.

    That a file is not in the cache is said by an error of its own: what kept it from being fetched tells more.
    """
    links = list(_chain(error))
    telling = [link for link in links if isinstance(link, HTTPError | OfflineModeIsEnabled | StorageError)]
    return next(iter(telling or [link for link in links if isinstance(link, LocalEntryNotFoundError)]), None)


def explain(error: BaseException, repo_id: str, revision: str | None = None) -> str:
    """One sentence: why the Hub did not do what was asked with a repository, and what to do."""
    cause = http_cause(error)
    at = f" at revision {revision}" if revision else ""
    if isinstance(cause, GatedRepoError):
        return (
            f"{repo_id} is gated: accept its conditions at {constants.ENDPOINT}/{repo_id} with your account, and log "
            "in with that account (`hf auth login`, or token=...)"
        )
    if isinstance(cause, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}: name a branch, tag or commit that it has"
    if isinstance(cause, RepositoryNotFoundError):
        return (
            f"{repo_id} does not exist on the Hub, or it is private: check the name, or log in with an account that "
            "has access (`hf auth login`, or token=...)"
        )
    if isinstance(cause, OfflineModeIsEnabled | LocalEntryNotFoundError):
        missing = f"{repo_id}{at} is not in the local cache, and"
        if is_offline_mode():
            return f"{missing} HF_HUB_OFFLINE is set: unset it, or load it once online"
        behind = cause.__cause__
        if behind is not None and not isinstance(behind, OfflineModeIsEnabled | LocalEntryNotFoundError):
            why = str(behind).strip().partition("\n")[0].rstrip(".") or type(behind).__name__
            return f"{missing} could not be fetched ({why}): try later"
        return f"{missing} was not to be fetched: load it once online"
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        if status == 401:
            return (
                f"the Hub refused the token (401), or wants one, for {repo_id}: log in (`hf auth login`), or unset an "
                "HF_TOKEN that is not valid"
            )
        if status == 403:
            return f"the Hub refused access to {repo_id} (403): the token lacks the permission that this needs"
        if status in _TRANSIENT:
            return f"the Hub did not serve {repo_id} ({_in_short(cause)}), also when asked again: try later"
        detail = f": {cause.server_message}" if cause.server_message else ""
        return f"the Hub refused what was asked of {repo_id} ({_in_short(cause)}){detail}"
    if isinstance(cause, StorageError):
        return _explain_storage(cause, repo_id)
    if cause is not None:
        return f"{constants.ENDPOINT} could not be reached for {repo_id} ({_in_short(cause)}): check the connection"
    return str(error)


def _explain_storage(cause: StorageError, repo_id: str) -> str:
    what = f"the Hub's storage of large files (Xet) {{}} {repo_id} ({cause.in_short})"
    if cause.status in _TRANSIENT:
        return what.format("did not serve") + ", also when asked again: try later"
    if cause.status in (401, 403):
        return (
            what.format("refused access to") + ": log in again, with a token that has the permission that this needs"
        )
    if cause.status is not None:
        return what.format("refused what was asked of")
    if cause.unreachable:
        return what.format("could not be reached for") + (
            ": check the connection, or take the older transport with HF_HUB_DISABLE_XET=1"
        )
    if "bytes" in cause.in_short:
        return what.format("gave another size than it has of a file of") + ": try later"
    return what.format("failed for")


def check_folder(name: str) -> None:
    """Refuses what is neither a folder nor an id: a path to nothing, which the Hub's client would ask for, or a file.

    Raises:
        OSError: if the name can only be a path, and there is no such folder.
        ValueError: if it can be neither; if a file in the folder is damaged.
    """
    if not name.strip():
        raise ValueError("the name is empty; expected a folder, or an id on the Hub (namespace/name).")
    if os.path.isdir(name):
        check_whole(Path(name))
        return
    if os.path.isfile(name):
        raise NotADirectoryError(f"'{name}' is a file; expected a folder, or an id on the Hub.")
    # an id without a namespace, as a few old ones are, names nothing that is loaded here
    is_path = name.count("/") != 1 or name.startswith((".", "~", "/")) or os.path.isabs(name) or "\\" in name
    if is_path:
        raise FileNotFoundError(f"there is no folder '{name}': it does not exist.")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"there is no folder '{name}', and it is no id on the Hub (namespace/name).") from error


def check_reachable(name: str) -> None:
    """[`check_folder`], and for an id that the cache does not have one question whether the Hub can be reached.

    Its client alone asks for minutes where there is no network, again for every file.

    Raises:
        OSError: if there is no connection.
    """
    check_folder(name)
    if os.path.isdir(name) or is_offline_mode():
        return
    known = ("config.json", "bt_adapter_config.json", "adapter_config.json")
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in known):
        return
    try:
        retried(lambda: get_session().head(constants.ENDPOINT, timeout=10), "Asking the Hub", waits=[1.0])
    except HTTPError as error:
        raise OSError(f"there is no folder '{name}', and {explain(error, name)}.") from error


def check_token(token: str | bool | None) -> None:
    """Refuses what no request can carry; the HTTP library's own error would print it.

    Raises:
        ValueError: if the token has characters that no token has. It is not in the text.
    """
    if isinstance(token, str) and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError("The token holds a line break, a space or a letter that no token has: copy it again.")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()  # an error may be raised again while its consequence is handled, and so be its own cause
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _in_short(error: BaseException) -> str:
    cause = http_cause(error) or error
    if isinstance(cause, StorageError):
        return cause.in_short
    if isinstance(cause, HfHubHTTPError):
        return f"{cause.response.status_code} {cause.response.reason_phrase}".strip()
    # what the client says names an address of the storage, which is signed
    return type(cause).__name__ if isinstance(cause, HTTPError) else str(cause).rstrip(".") or type(cause).__name__


def _asked_wait(error: BaseException) -> float:
    """Seconds that a 429 or 503 asks to wait, at most a minute."""
    cause = http_cause(error)
    asked = cause.response.headers.get("Retry-After", "") if isinstance(cause, HfHubHTTPError) else ""
    return min(float(asked), 60.0) if asked.isdigit() else 0.0
