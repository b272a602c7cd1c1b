"""The process that fills the folder of a `ChunkStore`: it fetches the shards which training is about to read."""

import logging
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..adapters.writing import written_whole
from ..hub.access import explain, http_cause, is_transient, retried
from .chunk_folder import ERROR, ChunkStoreError, ShardWriter, request_path, requested, shard_path
from .files import repository
from .media import FULL_DISK
from .order import ChunkOrder


if TYPE_CHECKING:
    from .readers import ShardReader

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.02
RETRY_WAITS = (2.0, 10.0)  # seconds before a shard that could not be read is tried again


class Job(NamedTuple):
    folder: str
    reader: "ShardReader"
    source: str
    max_disk: int | None
    order: ChunkOrder
    position: int
    stop: int | None
    item_timeout: float | None
    parent: int


def start_fetching(job: Job, lock: int) -> subprocess.Popen:
    """A fresh interpreter rather than a fork: this process may hold threads and an accelerator.

    Not through `multiprocessing`, which would run the user's script again.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, "-c", "from bt_adapter_hf.data.chunk_fetching import fetch; fetch()"],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
        pass_fds=[lock],
    )
    pickle.dump(job, process.stdin)
    process.stdin.flush()
    return process


def fetch() -> None:
    """What the fetching process does: it reads its job and then positions from its standard input."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the keyboard is the parent's to handle
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("datasets").propagate = False  # it prints its lines itself
    job = pickle.load(sys.stdin.buffer)
    tempfile.tempdir = job.folder  # what is downloaded passes through the disk that is to have the room
    threading.Thread(target=_end_with, args=(job.parent,), daemon=True).start()
    fetcher = _Fetcher(job)
    threading.Thread(target=fetcher.follow, args=(sys.stdin.buffer,), daemon=True).start()
    try:
        fetcher.run()
    except Exception as error:
        logger.debug("fetching failed", exc_info=True)
        reason = str(error) if isinstance(error, ChunkStoreError) else _reason(error, job.source)
        with written_whole(Path(job.folder, ERROR)) as file:
            file.write_text(reason, encoding="utf-8")
        logging.shutdown()
        os._exit(1)  # without waiting for the thread that reads the standard input


def _reason(error: Exception, source: str) -> str:
    """What went wrong; without addresses of the storage, which are signed."""
    return explain(error, repository(source)) if http_cause(error) else f"{type(error).__name__}: {error}"


def _may_come_back(error: BaseException) -> bool:
    if not isinstance(error, OSError) or isinstance(error, ValueError) or error.errno in FULL_DISK:
        return False
    return http_cause(error) is None or is_transient(error)


def _end_with(parent: int) -> None:
    # The end of the standard input does not tell: forked loader workers hold its other end too.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class _Fetcher:
    """Keeps the shards around a position in the folder."""

    def __init__(self, job: Job):
        self.folder, self.reader, self.source = Path(job.folder), job.reader, job.source
        self.max_disk, self.order, self.position = job.max_disk, job.order, job.position
        self.stop = math.inf if job.stop is None else job.stop
        self.item_timeout = job.item_timeout
        self.moved = threading.Event()
        self._planned: tuple[range, list[int]] | None = None
        # bytes of each shard in the folder, the one that was needed longest ago first
        self.sizes: dict[int, int] = {}
        for shard in range(len(self.reader.shard_rows)):
            path = shard_path(self.folder, shard)
            if path.exists():
                self.sizes[shard] = path.stat().st_size

    def follow(self, stream: Any) -> None:
        while len(message := stream.read(8)) == 8:
            self.position = int.from_bytes(message, "little")
            self.moved.set()
        os._exit(0)

    def run(self) -> None:
        while True:
            self.moved.clear()
            plan, wanted = self._plan(), requested(self.folder)
            needed = [*wanted, *(shard for shard in plan if shard not in wanted)]
            for shard in needed:
                if shard in self.sizes:
                    self.sizes[shard] = self.sizes.pop(shard)
            for shard in wanted:
                if shard in self.sizes:
                    request_path(self.folder, shard).unlink(missing_ok=True)
            missing = next((shard for shard in needed if shard not in self.sizes), None)
            if missing is None:
                self.moved.wait(POLL_SECONDS)
            else:
                self._fetch(missing, set(needed))

    def _plan(self) -> list[int]:
        """The shards of the chunk of the position and of the `chunk_rows` positions after it, in order.

        None of a chunk that begins where reading has ended.
        """
        if self._planned is None or self.position not in self._planned[0]:
            first, shards = None, {}
            for chunk in self.order.chunks(self.position):
                first = first or chunk
                if chunk.start >= min(first.stop + self.order.chunk_rows, self.stop):
                    break
                shards.update(dict.fromkeys(chunk.shards))
            self._planned = range(first.start, first.stop), list(shards)
        return self._planned[1]

    def _fetch(self, shard: int, keep: set[int]) -> None:
        try:
            retried(
                lambda: self._write(shard, keep),
                f"Reading shard {shard} of {self.source}",
                waits=RETRY_WAITS,
                give_up_after=math.inf,
                again=_may_come_back,
            )
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            free = shutil.disk_usage(self.folder).free
            raise ChunkStoreError(
                f"there is no disk space left: {_readable(free)} are free, the fetched videos take "
                f"{_readable(sum(self.sizes.values()))}. Free some, then resume; checkpoints are not touched."
            ) from error
        self.sizes[shard] = shard_path(self.folder, shard).stat().st_size

    def _write(self, shard: int, keep: set[int]) -> None:
        expected = self.reader.shard_rows[shard]

        def make_room(size: int) -> None:
            self._make_room(size, shard, keep)

        with ShardWriter(shard_path(self.folder, shard), expected, make_room) as writer:
            for index, record in self.reader.read_shard(shard, self.item_timeout):
                writer.add(index, record)
            if len(writer.added) != expected:
                raise ChunkStoreError(
                    f"shard {shard} has {len(writer.added)} rows, {expected} were counted. Has the source changed?"
                )

    def _make_room(self, size: int, shard: int, keep: set[int]) -> None:
        """Delete shards that are not needed until there is room for a file of `size` bytes."""
        while self.max_disk is not None and sum(self.sizes.values()) + size > self.max_disk:
            passed = next((other for other in self.sizes if other not in keep), None)
            if passed is None:
                raise ChunkStoreError(self._too_small(size, shard, keep))
            shard_path(self.folder, passed).unlink()
            del self.sizes[passed]

    def _too_small(self, size: int, shard: int, keep: set[int]) -> str:
        rows, allowed = (
            self.reader.shard_rows[shard],
            f"and only {_readable(self.max_disk)} are allowed. Raise max_disk",
        )
        if not self.sizes:
            return (
                f"a shard with {rows} rows takes {_readable(size)} or more, {allowed}, or write the table with "
                "smaller shards: of parquet files a row group is one."
            )
        return (
            f"{len(keep)} shards are needed at a time, with {sum(self.reader.shard_rows[s] for s in keep)} rows; "
            f"{len(self.sizes)} of them take {_readable(sum(self.sizes.values()))}, the next {_readable(size)} or "
            f"more, {allowed}, or lower chunk_rows (now {self.order.chunk_rows}) if a shard has fewer rows than that."
        )


def _readable(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size:,} bytes"
