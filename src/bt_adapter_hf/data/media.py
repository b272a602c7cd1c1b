"""The videos that a table names by path or address: local, remote, or members of archives."""

import io
import time
import urllib.error
from glob import has_magic
from pathlib import Path

from ..models.video_download import download
from ..models.video_errors import VideoAccessError, VideoDownloadError, VideoError, VideoNotFoundError
from .archives import ARCHIVE_SUFFIXES, MediaArchives
from .files import FoundFiles, find_files, is_remote, join, open_file, pin
from .readers import Record


RETRY_AFTER = (1.0, 4.0)  # seconds before a download is tried again


class Media:
    """Finds and reads the videos that rows name by path or URL.

    Args:
        root: folder, local or remote, that relative paths start from.
        archives: hold the relative paths instead of `root`.
    """

    def __init__(self, root: str | None, archives: MediaArchives | None = None):
        self.root, self.archives = root, archives

    def is_local(self, path: str) -> bool:
        """Whether the video can be read in place."""
        if self.archives is not None and not is_remote(path):
            return not any(is_remote(archive) for archive in self.archives.paths)
        return not is_remote(join(self.root, path))

    def record(self, path: str, texts: list[str]) -> Record:
        """The row with this video; one with a problem where it cannot be had."""
        try:
            return Record(self.read(path), path, texts)
        except VideoError as error:
            return Record(None, path, texts, str(error))

    def read(self, path: str) -> bytes | str:
        """The bytes of a video, or the path of a local file.

        Raises:
            VideoError: this video cannot be had.
            OSError: the Hub does not answer.
        """
        if self.archives is not None and not is_remote(path):
            return self.archives.read(path)
        path = join(self.root, path)
        if not is_remote(path):
            return path
        if path.startswith(("http://", "https://")):
            return _download(path)
        try:
            with open_file(path) as file:
                data = file.read(file.size)
        except FileNotFoundError as error:
            raise VideoNotFoundError(f"{path} does not exist.") from error
        if len(data) != file.size:
            raise VideoAccessError(f"{path} broke off after {len(data)} of {file.size} bytes.")
        return data


def _download(url: str) -> bytes:
    """Fetch a URL, again where the trouble may be over soon.

    Raises:
        VideoError: it is gone, or still fails.
    """
    for wait in (*RETRY_AFTER, None):
        content = io.BytesIO()
        try:
            download(url, content)
            return content.getvalue()
        except VideoDownloadError as error:
            answer = error.__cause__
            gone = isinstance(answer, urllib.error.HTTPError) and answer.code < 500 and answer.code != 429
            if wait is None or gone:
                raise
        time.sleep(wait)
    raise AssertionError("unreachable")


def open_media(files: FoundFiles, media_root: str | Path | None) -> Media:
    """The videos of a table, under `media_root` or beside the table."""
    if media_root is None:
        return Media(files.root if is_remote(files.root) else str(Path(files.root).resolve()))
    root = str(media_root)
    local = Path(root).expanduser()
    if files.repo is not None and not is_remote(root) and not local.is_absolute() and not local.exists():
        root = f"{files.repo}/{root}"
    if (root.endswith(ARCHIVE_SUFFIXES) or has_magic(root)) and not local.is_dir():
        found = find_files(root, ARCHIVE_SUFFIXES, "", None, None)
        return Media(None, MediaArchives(found.paths))
    if is_remote(root):
        return Media(pin(root))
    if not local.is_dir():
        raise FileNotFoundError(f"media_root {root} is neither a folder nor a .zip or .tar file")
    return Media(str(local.resolve()))
