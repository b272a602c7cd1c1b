"""Files and folders that appear whole or not at all: written beside their place, then renamed. And names in print."""

import os
import re
import shutil
import stat
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


PARTIAL = ".partial"  # how the hidden names end under which something is written; a killed process may leave one


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A hidden path beside `path`, to write a file or a folder to; it takes the place of `path` when the block ends.

    After an error, a full disk for one, `path` is as it was and nothing is left beside it. Of two processes that write
    the same, one wins.
    """
    path = Path(os.path.abspath(path))  # "." has a name too
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL}")
    try:
        # What is written gets the rights that any new file has: safetensors lets nobody but the owner read.
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        temporary.unlink()
        yield temporary
        if temporary.is_dir():
            if path.is_dir():
                shutil.rmtree(path)
        else:
            temporary.chmod(mode)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())  # or the name may outlive a power failure, and the content not
        temporary.replace(path)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):
            # A full disk names no file, others the hidden one.
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    except Exception as error:
        if code := _system_error(error):
            raise OSError(code, os.strerror(code), str(path)) from error
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def _system_error(error: Exception) -> int | None:
    """The number of the operating system's error, where a library tells of it in words of its own."""
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
        return int(found[1])
    while error is not None:  # torch hides it behind an error of its own
        if isinstance(error, OSError) and error.errno:
            return error.errno
        error = error.__context__
    return None


def without_name(reason: str, name: str) -> str:
    """What is wrong with a file, to stand behind its name: most reasons begin with it."""
    return reason.removeprefix(f"{name} ")


def printable(text: str) -> str:
    """A name as a terminal, a table and a picture can show it: on one line, with what is no text escaped."""
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:  # how Python carries a byte of a name that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return character.encode("unicode_escape").decode()
    return character


def no_character(text: str) -> str | None:
    """What in a text is no character and no tokenizer takes, half of a surrogate pair (`\\ud800`), in words; or None.

    JSON may carry one, and so may what is typed in a terminal that does not speak UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start : error.start + 1]
        return f"holds {printable(found)}, which is no character but half of one: write the text in UTF-8"
    return None
