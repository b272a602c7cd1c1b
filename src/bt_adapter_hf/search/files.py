"""The video files that a command means: found under folders and patterns, each once, and named in print."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..adapters.writing import printable


logger = logging.getLogger(__name__)

VIDEO_EXTENSIONS = frozenset(".3gp .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .webm .wmv".split())


def find_videos(inputs: Sequence[str | os.PathLike]) -> list[str]:
    """Absolute paths of the videos that `inputs` name, each file once, sorted within each input.

    A folder stands for the files with a video's extension under it, a glob pattern for its matches (folders among
    them included), a file for itself, whatever its extension. Hidden files and folders are left out of folders and of
    what a wildcard matches, and links to folders are not followed below them. Of a file with several names (links)
    the first counts. A folder below that cannot be read is left out with a warning.

    Raises:
        FileNotFoundError: an input does not exist or a pattern matches nothing.
        OSError: a named folder cannot be read.
        ValueError: no input has a video in it.
    """
    found: dict[str, None] = {}
    for item in map(os.fspath, inputs):
        if not item:
            raise ValueError("one of the names of videos is empty.")
        path = _absolute(item)
        if os.path.exists(path):
            matches = [path]
        elif os.path.islink(path):
            raise FileNotFoundError(f"'{item}' is a link to a file that does not exist, or to itself.")
        else:
            matches = _matches(path, item)
            if not matches:
                raise FileNotFoundError(f"'{item}' is not a file, a folder or a pattern that matches any.")
        for match in matches:
            if os.path.isdir(match):
                found.update(dict.fromkeys(_videos_under(match)))
            elif match == path or _is_video(match):
                found[match] = None
    if not found:
        raise ValueError(
            f"no video under {', '.join(map(repr, map(os.fspath, inputs)))}: "
            f"looked for files that end in {' '.join(sorted(VIDEO_EXTENSIONS))}."
        )
    return list(first_names(found).values())


def first_names(paths: Iterable[str]) -> dict[tuple[int, int] | str, str]:
    """The first name of each file, by what the file is, whatever it is called; by the path where there is none."""
    names: dict[tuple[int, int] | str, str] = {}
    for path in paths:
        names.setdefault(file_identity(path), path)
    return names


def file_identity(path: str) -> tuple[int, int] | str:
    """What all names of a file have in common; the path where there is no file."""
    try:
        stat = os.stat(path)
    except OSError:
        return path
    return stat.st_dev, stat.st_ino


def roots(inputs: Sequence[str | os.PathLike]) -> list[str]:
    """The folders and files where [`find_videos`] looks: of a pattern its part without wildcards."""
    return [_root(_absolute(os.fspath(item))) for item in inputs]


def _absolute(item: str) -> str:
    return os.path.abspath(os.path.expanduser(item))


def _root(path: str) -> str:
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def _matches(pattern: str, item: str) -> list[str]:
    """Of a pattern; pathlib's `**` goes round no circles of links, unlike that of the glob module."""
    root = Path(_root(pattern))
    rest = Path(pattern).relative_to(root)
    try:
        found = list(root.glob(str(rest)))
    except ValueError as error:
        raise ValueError(f"'{item}' is no pattern: {str(error).rstrip('.')}.") from error
    if not _has_hidden(rest):
        found = [path for path in found if not _has_hidden(path.relative_to(root))]
    return sorted(map(str, found))


def _has_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_video(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in VIDEO_EXTENSIONS


def _videos_under(folder: str) -> list[str]:
    def unreadable(error: OSError) -> None:
        if error.filename == folder:
            raise OSError(f"the folder '{folder}' cannot be read: {error.strerror}.") from error
        logger.warning("%s cannot be read, and is left out: %s", printable(str(error.filename)), error.strerror)

    return sorted(_walk(folder, unreadable))


def _walk(folder: str, unreadable) -> Iterator[str]:
    for parent, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and _is_video(name):
                yield os.path.join(parent, name)
