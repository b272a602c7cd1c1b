"""Files on the disk or on the Hub (hf://datasets/...). `datasets` does the remote reading.

Its `xopen` reads remote files by byte ranges and goes on after broken connections and overloaded servers.
"""

import codecs
import glob
import json
import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ..hub.access import retried
from ..import_utils import require_package
from ..models.video_errors import VideoAccessError


# Bytes that one request asks for at least: small for looking at headers and footers, large for reading on.
PEEK_BYTES = 1 << 16
READ_BYTES = 1 << 23


def parsed_json(text: str | bytes) -> Any:
    """What a text of JSON says.

    Raises:
        ValueError: if it is none, or is nested more deeply than Python goes.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def is_remote(path: str) -> bool:
    return "://" in path


def open_file(path: str, block_size: int = READ_BYTES) -> BinaryIO:
    """A seekable binary file. Remote ones are read in ranges of at least `block_size` bytes, and only where asked."""
    if not is_remote(path):
        return open(path, "rb")
    from .compat import xopen

    return xopen(path, "rb", block_size=block_size)


def check_encoding(head: bytes) -> None:
    """Raises ValueError if a text file, of which this is the beginning, says that it is something else than UTF-8."""
    for mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        if head.startswith(mark):
            raise ValueError(f"it is encoded in UTF-{'32' if len(mark) == 4 else '16'}: save it as UTF-8")


def unicode_reason(error: BaseException) -> str | None:
    """What to say where a text file is not UTF-8; None for other errors."""
    if not isinstance(error, UnicodeDecodeError):
        return None
    return f"it is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}): save it as UTF-8"


def file_size(file: BinaryIO) -> int:
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(place)
    return size


def join(root: str | None, path: str, within: Sequence[str] | None = None) -> str:
    """`path`, as a row of a table names it, seen from `root`; absolute paths and URLs stay as they are.

    Args:
        within: folders on the disk or on the Hub that the path may lie in, for tables that somebody else wrote;
            http(s) addresses are free for all, and no token goes there. None: it may lie anywhere.

    Raises:
        VideoAccessError: it lies elsewhere, or it is an address of another kind.
    """
    if path.startswith(("http://", "https://")):
        return path
    if path.startswith("file://"):
        path = url2pathname(urlsplit(path).path)
    if "::" in path or (is_remote(path) and not path.startswith("hf://")):
        raise VideoAccessError(f"{path} is neither a path nor an address that begins with http(s):// or hf://.")
    if root is None or is_remote(path) or os.path.isabs(path):
        found = path
    elif is_remote(root):
        found = f"{root.rstrip('/')}/{path}"
    else:
        found = str(Path(root) / path)
    if within is None:
        return found
    for folder in within:
        if (inside := _inside(found, folder)) is not None:
            return inside
    raise VideoAccessError(
        f"{path} lies outside of {' and '.join(within)}: the rows of a table on the Hub may name what is in its "
        "repository, or below the media root that you give. Download the table to use it with other files."
    )


def _inside(path: str, folder: str) -> str | None:
    """The path without detours where it lies in the folder, in the same commit of a repository; else None."""
    if path.startswith("hf://") and folder.startswith("hf://"):
        try:
            (repo, revision, inside), (own, commit, below) = split_hub_path(path), split_hub_path(folder)
        except ValueError:
            return None  # a model, a space
        inside = posixpath.normpath(inside)
        if repo != own or inside.startswith("..") or not f"{inside}/".startswith(f"{below}/".lstrip("/")):
            return None
        return f"hf://datasets/{repo}@{(revision or commit).replace('/', '%2F')}/{inside}"
    if is_remote(path) != is_remote(folder):
        return None
    if is_remote(path):  # below an http(s) address
        return path if path.startswith(f"{folder.rstrip('/')}/") and "/../" not in path else None
    path = os.path.normpath(path)
    return path if path.startswith(os.path.join(folder, "")) else None


def identity(path: str) -> str:
    """What changes when the file's content does; a path on the Hub names a commit, which says it."""
    if is_remote(path):
        return path
    status = os.stat(path)
    return f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}"


@dataclass
class FoundFiles:
    """The files of a table.

    Attributes:
        paths: all of one kind, in order.
        suffix: their kind: ".parquet", ".tar", ".csv", ...
        root: where relative video paths start.
        revision: commit of a dataset on the Hub.
        repo: "hf://datasets/owner/name@commit" of a dataset on the Hub.
    """

    paths: list[str]
    suffix: str
    root: str
    revision: str | None = None
    repo: str | None = None


def find_files(
    source: str, suffixes: tuple[str, ...], split: str, config_name: str | None, revision: str | None
) -> FoundFiles:
    """The files that `source` means; a dataset on the Hub is pinned to its present commit.

    Raises:
        ValueError, OSError, DatasetsError: nothing there, or nothing that can be read as a table.
    """
    path = Path(source).expanduser()
    if not is_remote(source):
        if path.is_dir():
            metadata = [path / f"metadata{suffix}" for suffix in suffixes]
            path = next((file for file in metadata if file.is_file()), path)
        if path.is_file():
            return _one_kind([str(path)], suffixes)
        if glob.has_magic(source):
            return _one_kind(
                sorted(file for file in glob.glob(str(path), recursive=True) if os.path.isfile(file)), suffixes
            )
        if path.is_absolute() and not path.exists():
            raise FileNotFoundError("no such file or folder")
        if path.is_dir():
            return _by_builder(str(path), suffixes, split, config_name, None)
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or path.suffix in suffixes:
            raise FileNotFoundError("no such file or folder, and not the id of a Hub dataset")
        return _by_builder(source, suffixes, split, config_name, _commit(source, revision))
    if source.startswith("hf://"):
        repo, written, inside = split_hub_path(source)
        commit = _commit(repo, written or revision)
        if not inside:
            return _by_builder(repo, suffixes, split, config_name, commit)
        base = f"hf://datasets/{repo}@{commit}"
        paths = [f"{base}/{inside}"]
        if glob.has_magic(inside):
            from huggingface_hub import HfFileSystem

            paths = sorted(f"hf://{file}" for file in HfFileSystem().glob(paths[0]))
        found = _one_kind(paths, suffixes)
        found.revision, found.repo = commit, base
        return found
    raise ValueError(
        "tables and archives are read from the disk or from the Hub (hf://datasets/...): download it. The videos that "
        "a table names may have any http(s) address"
    )


def repository(source: str) -> str:
    """A dataset by id or hf:// path as in addresses of the Hub, "datasets/owner/name"; others as they are."""
    match = re.match(r"(?:hf://datasets/)?([^/@:]+/[^/@:]+)", source)
    return source if match is None or Path(source).exists() else f"datasets/{match[1]}"


def pin(path: str) -> str:
    """An hf:// path with the commit that its branch stands at; other paths as they are."""
    if not path.startswith("hf://datasets/"):
        return path
    repo, revision, inside = split_hub_path(path)
    return f"hf://datasets/{repo}@{_commit(repo, revision)}/{inside}"


def split_hub_path(path: str) -> tuple[str, str | None, str]:
    """(repository, revision, path inside, maybe empty) of `hf://datasets/owner/name[@revision]/path`.

    Raises:
        ValueError: for an address of another kind.
    """
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/?(.*)", path)
    if match is None:
        raise ValueError("a table is a file on the disk or on the Hub, hf://datasets/owner/name/path: download it")
    repo, revision, inside = match.groups()
    return repo, revision and revision.replace("%2F", "/"), inside


def _commit(repo: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    return retried(lambda: HfApi().dataset_info(repo, revision=revision).sha, f"Looking up the dataset {repo}")


def _one_kind(paths: list[str], suffixes: tuple[str, ...]) -> FoundFiles:
    if not paths:
        raise FileNotFoundError("no file matches")
    found = {os.path.splitext(path.split("?")[0])[1] for path in paths}
    if len(found) > 1 or not found <= set(suffixes):
        raise ValueError(f"a file must end in one of {', '.join(suffixes)}, all of them in the same one")
    folders = {os.path.dirname(path) for path in paths}
    root = folders.pop() if len(folders) == 1 else os.path.commonpath([*folders, os.path.dirname(paths[0])])
    return FoundFiles(paths, found.pop(), root)


def _by_builder(
    source: str, suffixes: tuple[str, ...], split: str, config_name: str | None, commit: str | None
) -> FoundFiles:
    """As `datasets` understands a folder or a repository: its card, splits, configurations and naming patterns."""
    require_package("datasets", "train")
    import datasets

    from .compat import VideoFolder

    builder = retried(
        lambda: datasets.load_dataset_builder(source, config_name, revision=commit), f"Listing the files of {source}"
    )
    by_split = builder.config.data_files or {}
    if split not in by_split:
        raise ValueError(f"there is no split {split!r}, only {', '.join(map(repr, by_split)) or 'none'}")
    paths = [str(path) for path in by_split[split]]
    if isinstance(builder, VideoFolder):
        paths = [path for path in paths if path.rpartition("/")[2] in builder.METADATA_FILENAMES]
        if len(paths) != 1:
            raise ValueError(
                f"a folder of videos needs one metadata.jsonl, metadata.csv or metadata.parquet with the captions; "
                f"found {len(paths)}. Name a table file instead"
            )
    found = _one_kind(paths, suffixes)
    found.revision, found.repo = commit, f"hf://datasets/{source}@{commit}" if commit else None
    return found
