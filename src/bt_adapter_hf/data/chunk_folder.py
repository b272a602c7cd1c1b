"""What the processes of a `ChunkStore` share: the folder, its lock, and files of which each row can be read at once.

A shard is a file that begins with the place of each of its rows (8 bytes each, 0 where the row is not there yet). The
rows follow in the order in which they came, each an Arrow message. It is whole when every row has a place.
"""

import json
import mmap
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .readers import Record


if TYPE_CHECKING:
    import pyarrow

MARKER = "store.json"
LOCK = "fetcher.lock"
ERROR = "error.txt"
_PLACE_BYTES, _ALIGNMENT = 8, 64


class ChunkStoreError(RuntimeError):
    """Rows could not be fetched, or the folder has no room for them."""

    def __init__(self, message: str):
        # A data loader worker hands its exceptions over with their traceback written into the message.
        worker = re.match(r"Caught ChunkStoreError in .*ChunkStoreError: (.*)", message, flags=re.DOTALL)
        super().__init__(worker.group(1).strip() if worker else message)


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:06d}.rows"


def request_path(folder: Path, shard: int) -> Path:
    """There while a reader waits for a row of the shard."""
    return folder / f"wanted-{shard}"


def requested(folder: Path) -> list[int]:
    names = (re.fullmatch(r"wanted-(\d+)", name) for name in os.listdir(folder))
    return [int(name[1]) for name in names if name]


def in_use(folder: Path) -> bool:
    """Whether the fetching process of a store in this folder lives.

    Raises:
        FileNotFoundError: there is no store.
    """
    import fcntl

    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def discard(folder: Path) -> None:
    """Delete what a closed store has left in its folder; nothing of one that another run uses."""
    if not (folder / LOCK).exists() or in_use(folder):
        return
    for path in _own_files(folder):
        path.unlink(missing_ok=True)
    (folder / MARKER).unlink(missing_ok=True)
    (folder / LOCK).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def keep_whole_shards(folder: Path, fingerprint: str, shard_rows: list[int]) -> None:
    """Keep the whole shards of this table; delete what else a run has left."""
    marker = folder / MARKER
    keep = set()
    if marker.exists():
        try:
            same = json.loads(marker.read_text(encoding="utf-8")).get("fingerprint") == fingerprint
        except (json.JSONDecodeError, AttributeError):
            same = False  # cut while it was written
        if same:
            shards = ((shard_path(folder, shard), rows) for shard, rows in enumerate(shard_rows))
            keep = {path for path, rows in shards if path.exists() and _is_whole(path, rows)}
    for path in _own_files(folder):
        if path not in keep:
            path.unlink()
    marker.write_text(json.dumps({"fingerprint": fingerprint}), encoding="utf-8")


def _own_files(folder: Path) -> list[Path]:
    names = re.compile(rf"shard-\d+\.rows|wanted-\d+|{re.escape(ERROR)}|\..*\.partial")
    return [path for path in folder.iterdir() if names.fullmatch(path.name)]


@cache
def _schema() -> "pyarrow.Schema":
    import pyarrow as pa

    return pa.schema(
        {
            "video": pa.large_binary(),
            "path": pa.string(),
            "name": pa.string(),
            "texts": pa.list_(pa.string()),
            "problem": pa.string(),
        }
    )


class ShardWriter:
    """Writes a shard; each row can be read as soon as it is added.

    Args:
        make_room: called with the size that the file is about to have.
    """

    def __init__(self, path: Path, rows: int, make_room: Callable[[int], None]):
        self.path, self.rows, self.make_room, self.added = path, rows, make_room, set[int]()

    def __enter__(self) -> "ShardWriter":
        self._end = self.rows * _PLACE_BYTES
        self.make_room(self._end)
        self._file = open(self.path, "xb", buffering=0)
        self._file.truncate(self._end)
        return self

    def add(self, index: int, record: Record) -> None:
        import pyarrow as pa

        columns = record._asdict()
        if isinstance(record.video, str):
            columns |= {"video": None, "path": record.video}
        message = memoryview(pa.RecordBatch.from_pylist([columns], _schema()).serialize())
        place = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        self.make_room(place + len(message))
        self._write(message, place)
        self._end = place + len(message)
        self._write(place.to_bytes(_PLACE_BYTES, "little"), index * _PLACE_BYTES)  # now it can be seen
        self.added.add(index)

    def _write(self, data: bytes | memoryview, place: int) -> None:
        while len(data):  # a system call takes 2 GiB at most
            written = os.pwrite(self._file.fileno(), data, place)
            data, place = data[written:], place + written

    def __exit__(self, kind, error, traceback) -> None:
        self._file.close()
        if error is not None:
            self.path.unlink()


def read_row(path: Path, index: int) -> Record | None:
    """A row of a shard; None if it is not there yet. Nothing else of the file is copied.

    Raises:
        FileNotFoundError: the shard is not there.
    """
    import pyarrow as pa

    with open(path, "rb") as file:  # for every row: a mapping that is kept would keep the space of a deleted file
        file.seek(index * _PLACE_BYTES)
        place = int.from_bytes(file.read(_PLACE_BYTES), "little")
        if not place:
            return None
        content = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    message = pa.ipc.read_message(content.slice(place))
    row = pa.ipc.read_record_batch(message, _schema()).to_pylist()[0]
    path = row.pop("path")
    return Record(**row) if path is None else Record(**{**row, "video": path})


def has_row(path: Path, index: int) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(index * _PLACE_BYTES)
            return any(file.read(_PLACE_BYTES))
    except FileNotFoundError:
        return False


def _is_whole(path: Path, rows: int) -> bool:
    """Whether all rows are there, after a run that may have been killed."""
    import numpy as np
    import pyarrow as pa

    places = np.fromfile(path, dtype="<i8", count=rows)
    if len(places) < rows or not (places > 0).all() or places.max() >= path.stat().st_size:
        return False
    try:
        return read_row(path, int(places.argmax())) is not None
    except (pa.ArrowException, OSError):
        return False
