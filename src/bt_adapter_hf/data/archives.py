"""Reading members of tar and zip archives where they lie, local or remote, without unpacking the archive."""

import logging
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from ..adapters.writing import printable
from ..models.video_errors import MAX_BYTES, VideoAccessError, VideoNotFoundError, sentence
from .files import PEEK_BYTES, file_size, open_file


logger = logging.getLogger(__name__)

ARCHIVE_SUFFIXES = (".tar", ".zip")


class TarMember(NamedTuple):
    """Name, place of the first byte of content, and number of bytes."""

    name: str
    offset: int
    size: int


def scan_tar(path: str) -> Iterator[TarMember]:
    """The regular files of a tar, from its headers only.

    Raises:
        ValueError: not a tar, or one that is cut or damaged. A tar cut between two members reads like a shorter one
            except that its end marker is missing, so the marker is asked for.
    """
    with open_file(path, PEEK_BYTES) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # tarfile keeps every header it has seen
                    if member.isreg() and not member.issparse():  # the bytes of a sparse one are not its content
                        yield TarMember(member.name, member.offset_data, member.size)
                end = tar.offset
        except tarfile.TarError as error:
            raise ValueError(f"{path} is not an uncompressed tar, or it is cut or damaged: {error}") from error
        # tarfile stops at the first block that is no header, whatever it is; a block of zeros ends an archive
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or any(block):
            raise ValueError(
                f"{path} is cut or damaged: after byte {end} of {file_size(file)} there is neither another member nor "
                "the end marker of a tar. Write or upload it again."
            )


def read_range(file: BinaryIO, offset: int, size: int) -> bytes:
    """Exactly these bytes.

    Raises:
        OSError: if there are fewer.
    """
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise OSError(f"{len(data)} of {size} bytes at {offset} could be read: the file has changed or is cut")
    return data


def too_large(size: int) -> str:
    return f"It has {size} bytes, and the limit of what is read into memory is {MAX_BYTES}."


class MediaArchives:
    """The videos inside one or several archives, by the path that a table gives.

    A path means the member of that name, or the only member whose name ends in it after a slash: archives often hold
    one top folder that the table does not mention.

    Args:
        paths: `.tar` and `.zip` files, local or remote.

    Raises:
        ValueError: for an archive that cannot be read, or when none holds a file.
    """

    def __init__(self, paths: list[str]):
        self.paths = paths
        # last part of the name -> (archive, whole name, place in a tar)
        self._members: dict[str, list[tuple[int, str, int, int]]] = {}
        for number, path in enumerate(paths):
            for name, offset, size in self._list(path):
                self._members.setdefault(name.rpartition("/")[2], []).append((number, name, offset, size))
        if not self._members:
            raise ValueError(f"There is no file in {', '.join(paths)}.")
        self._opened = threading.local()

    @staticmethod
    def _list(path: str) -> Iterator[tuple[str, int, int]]:
        if path.endswith(".tar"):
            yield from scan_tar(path)
            return
        try:
            with open_file(path, PEEK_BYTES) as file, zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    if not member.is_dir():
                        yield member.filename, 0, member.file_size
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is not a readable zip archive: {error}") from error

    def read(self, path: str) -> bytes:
        """The bytes of one video.

        Raises:
            VideoNotFoundError: no such member.
            VideoAccessError: several members fit, or the member cannot be read.
        """
        path = os.path.normpath(path).lstrip("/")
        members = self._members.get(path.rpartition("/")[2], [])
        fitting = [member for member in members if member[1] == path] or [
            member for member in members if member[1].endswith(f"/{path}")
        ]
        if not fitting:
            raise VideoNotFoundError(f"{printable(path)} is not in {', '.join(self.paths)}.")
        if len(fitting) > 1:
            names = ", ".join(f"{self.paths[member[0]]}: {member[1]}" for member in fitting[:3])
            raise VideoAccessError(
                f"{printable(path)} may mean {len(fitting)} members of the archives ({printable(names)})."
            )
        number, name, offset, size = fitting[0]
        try:
            if size > MAX_BYTES:
                raise OSError(too_large(size))
            archive = self._open(number)
            if isinstance(archive, zipfile.ZipFile):
                return archive.read(name)  # no more than its header claims; a checksum tells that there is more
            return read_range(archive, offset, size)
        except Exception as error:  # of a password, an unknown or broken compression, a checksum, the disk
            raise VideoAccessError(
                f"{printable(name)} in {self.paths[number]} cannot be read: {sentence(error)}"
            ) from error

    def _open(self, number: int) -> "zipfile.ZipFile | BinaryIO":
        """The open archive, one per process and thread: a shared file position would mix up their reads."""
        if getattr(self._opened, "process", None) != os.getpid():
            self._opened.process, self._opened.files = os.getpid(), {}
        files = self._opened.files
        if number not in files:
            file = open_file(self.paths[number])
            files[number] = zipfile.ZipFile(file) if self.paths[number].endswith(".zip") else file
        return files[number]

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._opened = threading.local()
