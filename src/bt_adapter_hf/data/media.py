"""The videos that a table names by path or address: local, remote, or members of archives."""

import errno
import math
import os
import urllib.error
from collections.abc import Iterable, Iterator, Sequence
from glob import has_magic
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import BinaryIO

from ..hub.access import retried
from ..models.video_download import download
from ..models.video_errors import (
    MAX_BYTES,
    MAX_SECONDS,
    VideoAccessError,
    VideoDownloadError,
    VideoError,
    VideoNotFoundError,
)
from .archives import ARCHIVE_SUFFIXES, MediaArchives
from .files import READ_BYTES, FoundFiles, find_files, is_remote, join, open_file, pin
from .readers import Record, as_they_come


RETRY_WAITS = (1.0, 4.0)  # seconds before a download is tried again
MEMORY_BYTES = 1 << 22  # of a video that is being fetched; what is more goes to a temporary file
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class Media:
    """Finds and reads the videos that rows name by path or URL.

    Args:
        root: folder, local or remote, that relative paths start from.
        archives: hold the relative paths instead of `root`.
        within: where the paths may lie at all, see `join`.
    """

    def __init__(self, root: str | None, archives: MediaArchives | None = None, within: Sequence[str] | None = None):
        self.root, self.archives, self.within = root, archives, within

    def is_local(self, path: str) -> bool:
        """Whether the video can be read in place."""
        if self.archives is not None and not is_remote(path):
            return not any(is_remote(archive) for archive in self.archives.paths)
        return not is_remote(path) and not is_remote(self.root or "")

    def record(self, named: Record) -> Record:
        """A row that only names its video, with the video; with a problem where it cannot be had."""
        return _with_content(self._open(named))

    def fetch(self, rows: Iterable[tuple[int, Record]], timeout: float | None) -> Iterator[tuple[int, Record]]:
        """Numbered rows that only name their videos, with their videos, as they come.

        What waits here is held on the disk, and one video at a time in memory.

        Args:
            timeout: seconds that one video may take, further tries included.
        """
        named: dict[int, Record] = {}

        def remembered() -> Iterator[tuple[int, Record]]:
            for number, record in rows:
                named[number] = record
                yield number, record

        def opened(record: Record) -> Record:
            return self._open(record, timeout)

        for number, record in as_they_come(opened, remembered(), timeout):
            if record is None:
                problem = f"Fetching it took longer than {timeout:g} s and was given up."
                record = named[number]._replace(problem=problem)
            del named[number]
            yield number, _with_content(record)

    def _open(self, named: Record, timeout: float | None = None) -> Record:
        if named.problem is not None:
            return named
        try:
            return named._replace(video=self.open(named.name, timeout))
        except VideoError as error:
            return named._replace(problem=str(error))

    def open(self, path: str, timeout: float | None = None) -> BinaryIO | bytes | str:
        """What holds a video: a local file by its path, a temporary file, or the bytes of a member of archives.

        Raises:
            VideoError: this video cannot be had.
            OSError: the Hub does not answer, or the disk is full.
        """
        if self.archives is not None and not is_remote(path):
            return self.archives.read(path)
        path = join(self.root, path, self.within)
        if not is_remote(path):
            return path
        content = SpooledTemporaryFile(MEMORY_BYTES)
        if path.startswith(("http://", "https://")):
            _download(path, content, timeout or MAX_SECONDS)
        else:
            _read_from_hub(path, content)
        content.seek(0)
        return content


def _with_content(record: Record) -> Record:
    if record.video is None or isinstance(record.video, (bytes, str)):
        return record
    with record.video as file:
        return record._replace(video=file.read())


def _download(url: str, content: BinaryIO, timeout: float) -> None:
    """Fetch a URL, again where the trouble may be over soon.

    Raises:
        VideoError: it is gone, or still fails.
    """

    def attempt() -> None:
        content.seek(0)
        content.truncate()
        try:
            download(url, content, timeout=timeout)
        except VideoDownloadError as error:
            cause = error.__cause__
            if getattr(cause, "errno", None) not in FULL_DISK:
                raise
        else:
            return
        raise OSError(cause.errno, os.strerror(cause.errno))  # not the fault of the video

    retried(attempt, f"Fetching {url}", waits=RETRY_WAITS, give_up_after=math.inf, again=_may_come_back)


def _may_come_back(error: BaseException) -> bool:
    answer = error.__cause__
    gone = isinstance(answer, urllib.error.HTTPError) and answer.code < 500 and answer.code != 429
    return isinstance(error, VideoDownloadError) and not gone


def _read_from_hub(path: str, content: BinaryIO) -> None:
    try:
        with open_file(path) as file:
            if file.size > MAX_BYTES:
                raise VideoAccessError(f"{path} has {file.size} bytes, the limit is {MAX_BYTES}.")
            while piece := file.read(READ_BYTES):
                content.write(piece)
    except FileNotFoundError as error:
        raise VideoNotFoundError(f"{path} does not exist.") from error
    if content.tell() != file.size:
        raise VideoAccessError(f"{path} broke off after {content.tell()} of {file.size} bytes.")


def open_media(files: FoundFiles, media_root: str | Path | None) -> Media:
    """The videos of a table, under `media_root` or beside the table."""
    within = None if files.repo is None else [files.repo]  # what somebody else wrote must not lead elsewhere
    if media_root is None:
        return Media(files.root if is_remote(files.root) else str(Path(files.root).resolve()), within=within)
    root = str(media_root)
    local = Path(root).expanduser()
    if files.repo is not None and not is_remote(root) and not local.is_absolute() and not local.exists():
        root = f"{files.repo}/{root}"
    if (root.endswith(ARCHIVE_SUFFIXES) or has_magic(root)) and not local.is_dir():
        found = find_files(root, ARCHIVE_SUFFIXES, "", None, None)
        return Media(None, MediaArchives(found.paths), within)
    if is_remote(root):
        root = pin(root).rstrip("/")
        return Media(root, within=within and [*within, root])
    if not local.is_dir():
        raise FileNotFoundError(f"media_root {root} is neither a folder nor a .zip or .tar file")
    root = str(local.resolve())
    return Media(root, within=within and [*within, root])
