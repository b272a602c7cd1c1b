"""The chunk store: a bounded folder with the shards that training is about to read.

A process of its own fetches the shards of the next chunk while one chunk is trained, and deletes what has been passed
when it needs the room. Each shard is an Arrow file with one record batch per row; readers map it into memory and copy
nothing but the row they want. A shard gets its name when it is whole, so a file that can be seen can be read.

    table.use_store(folder, max_disk, order, position, local_main_process)   # before training, on every rank
    table.store.advance(position)                                            # after each step
    table.store.close()                                                      # at the end
"""

import errno
import json
import logging
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..hub.access import explain, http_cause, is_transient
from .files import repository
from .order import Chunk


if TYPE_CHECKING:
    from .readers import Record, ShardReader

logger = logging.getLogger(__name__)

MARKER = "store.json"
LOCK = "fetcher.lock"
ERROR = "error.txt"
POLL_SECONDS = 0.02
LOCK_SECONDS = 3.0  # until the fetching process of a run that was just killed has ended too
RETRY_AFTER = (2.0, 10.0)  # seconds before a shard that could not be read is tried again


class ChunkStoreError(RuntimeError):
    """Rows could not be fetched, or the folder has no room for them."""

    def __init__(self, message: str):
        # A data loader worker hands its exceptions over with their traceback written into the message.
        worker = re.match(r"Caught ChunkStoreError in .*ChunkStoreError: (.*)", message, flags=re.DOTALL)
        super().__init__(worker.group(1).strip() if worker else message)


class ChunkOrder(Protocol):
    """What the store asks of an order. It is pickled and sent to the fetching process."""

    chunk_rows: int

    def chunks(self, start: int) -> Iterator[Chunk]:
        """The chunks from the one that holds position `start`, without end."""
        ...


class RowOrder:
    """Rows 0 to n - 1 in order, again and again, in chunks of at least `chunk_rows` rows; the order of evaluation."""

    def __init__(self, shard_rows: Sequence[int], chunk_rows: int = 1000):
        self.shard_rows, self.chunk_rows = list(shard_rows), chunk_rows

    def chunks(self, start: int) -> Iterator[Chunk]:
        rows = sum(self.shard_rows)
        epoch = start // rows
        while True:
            first = stop = epoch * rows
            shards = []
            for shard, count in enumerate(self.shard_rows):
                shards.append(shard)
                stop += count
                if stop - first >= self.chunk_rows or shard == len(self.shard_rows) - 1:
                    if stop > start:
                        yield Chunk(epoch, first, stop, shards)
                    first, shards = stop, []
            epoch += 1


class ChunkStore:
    """Reads rows from the folder; on the local main process it also starts the process that fills it.

    The folder holds the chunk of the position and the chunks of the `order.chunk_rows` positions after it, so one step
    may take up to `chunk_rows` rows (of all ranks, accumulation included). What has been passed stays as long as there
    is room. Rows elsewhere may be read too, and are fetched when asked for.

    A run that is killed leaves at most what the bound allows. The next one keeps the shards that are whole and of the
    same table, and deletes the rest.

    Args:
        folder: empty, absent, or a store of an earlier run; one per table and machine.
        reader: reads shards.
        source: what the table was opened from, for messages.
        fingerprint: of the table.
        max_disk: bytes that the shards may take; None: no bound.
        order: in which rows are read; rows 0 to n - 1 by default.
        position: first one that is not consumed yet.
        stop: position where reading ends, so that nothing is fetched for what comes after it; None: it does not end.
        local_main_process: whether this process fetches. It must come first, the others of the machine after it:
            `with accelerator.local_main_process_first(): table.use_store(...)`.

    Raises:
        ValueError: the folder holds other files, or `max_disk` is no size.
        ChunkStoreError: another run uses the folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        reader: "ShardReader",
        source: str,
        fingerprint: str,
        max_disk: int | None = None,
        order: ChunkOrder | None = None,
        position: int = 0,
        stop: int | None = None,
        local_main_process: bool = True,
    ):
        if max_disk is not None and max_disk < 1:
            raise ValueError(f"max_disk={max_disk} must be a number of bytes, or None for no bound.")
        self.folder, self.source = Path(folder).expanduser().resolve(), source
        self._process: subprocess.Popen | None = None
        if local_main_process:
            order = order if order is not None else RowOrder(reader.shard_rows)
            lock = self._take_folder()
            try:
                _clean(self.folder, fingerprint, reader.shard_rows)
                job = _Job(str(self.folder), reader, source, max_disk, order, position, stop, os.getpid())
                self._process = _start_fetcher(job, lock)
            finally:
                os.close(lock)  # the fetching process holds it now, for as long as it lives

    def _take_folder(self) -> int:
        """Lock the folder for one run; the lock ends with the last process that holds the descriptor."""
        try:
            import fcntl
        except ImportError:
            raise ChunkStoreError(f"{self.source} has to be fetched, which works on Linux and macOS only.") from None
        if self.folder.is_dir():
            names = {path.name for path in self.folder.iterdir()}
            if names and MARKER not in names and names != {LOCK}:
                raise ValueError(
                    f"{self.folder} holds other files ({', '.join(sorted(names)[:3])}): fetched videos need an empty "
                    "folder of their own."
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except OSError as error:
                if time.monotonic() > deadline:
                    os.close(lock)
                    raise ChunkStoreError(
                        f"{self.folder} is in use by another run: wait for it, or choose another folder."
                    ) from error
            time.sleep(POLL_SECONDS)

    def wait(self, shard: int) -> None:
        """Return when the shard is there.

        Raises:
            ChunkStoreError: it will not come.
        """
        path, asked = _shard_path(self.folder, shard), 0.0
        while not path.exists():
            if time.monotonic() - asked > 1:
                self._check_fetcher()
                (self.folder / f"wanted-{shard}").touch()
                asked = time.monotonic()
            time.sleep(POLL_SECONDS)

    def read(self, shard: int, index: int) -> "Record":
        """Row `index` of a shard; waits for it.

        Raises:
            ChunkStoreError: it will not come.
        """
        import pyarrow as pa

        from .readers import Record

        while True:
            self.wait(shard)
            try:
                # Opened for every row: a mapping that is kept would keep the space of a deleted file occupied.
                with pa.memory_map(str(_shard_path(self.folder, shard))) as file, pa.ipc.open_file(file) as rows:
                    row = rows.get_batch(index).to_pylist()[0]
                    path = row.pop("path")
                    return Record(**row) if path is None else Record(**{**row, "video": path})
            except FileNotFoundError:  # deleted since; ask again
                continue

    def advance(self, position: int) -> None:
        """Say that everything before `position` is consumed; of effect on the local main process only.

        Raises:
            ChunkStoreError: fetching has failed.
        """
        if self._process is None:
            return
        if (self.folder / ERROR).exists():
            raise self._failure()
        try:
            os.write(self._process.stdin.fileno(), position.to_bytes(8, "little"))
        except BrokenPipeError:
            raise self._failure() from None

    def close(self, keep: bool = False) -> None:
        """End the fetching process and delete what it fetched; of effect on the local main process only.

        Args:
            keep: leave the shards for the next store in this folder; `discard` deletes them.
        """
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process = None
        if not keep:
            discard(self.folder)

    def _check_fetcher(self) -> None:
        if (self.folder / ERROR).exists():
            raise self._failure()
        try:
            if _in_use(self.folder):
                return
        except FileNotFoundError:
            raise ChunkStoreError(f"The store of {self.source} in {self.folder} is closed.") from None
        raise self._failure()

    def _failure(self) -> ChunkStoreError:
        try:
            reason = (self.folder / ERROR).read_text(encoding="utf-8")
        except FileNotFoundError:
            reason = "the process that fetches was killed; is the memory sufficient?"
        return ChunkStoreError(f"Fetching {self.source} to {self.folder} failed: {reason}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None}


def _in_use(folder: Path) -> bool:
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
    if not (folder / LOCK).exists() or _in_use(folder):
        return
    for path in _own_files(folder):
        path.unlink(missing_ok=True)
    (folder / MARKER).unlink(missing_ok=True)
    (folder / LOCK).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:06d}.arrow"


def _own_files(folder: Path) -> list[Path]:
    names = re.compile(rf"shard-\d+\.arrow(\.part)?|wanted-\d+|{re.escape(ERROR)}")
    return [path for path in folder.iterdir() if names.fullmatch(path.name)]


def _clean(folder: Path, fingerprint: str, shard_rows: list[int]) -> None:
    """Keep the whole shards of this table; delete what else a run has left."""
    marker = folder / MARKER
    keep = set()
    if marker.exists():
        try:
            same = json.loads(marker.read_text(encoding="utf-8")).get("fingerprint") == fingerprint
        except (json.JSONDecodeError, AttributeError):
            same = False  # cut while it was written
        if same:
            shards = ((_shard_path(folder, shard), rows) for shard, rows in enumerate(shard_rows))
            keep = {path for path, rows in shards if path.exists() and _rows_in(path) == rows}
    for path in _own_files(folder):
        if path not in keep:
            path.unlink()
    marker.write_text(json.dumps({"fingerprint": fingerprint}), encoding="utf-8")


def _rows_in(path: Path) -> int | None:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as rows:
            return rows.num_record_batches
    except pa.ArrowInvalid:
        return None


# The fetching process


class _Job(NamedTuple):
    folder: str
    reader: "ShardReader"
    source: str
    max_disk: int | None
    order: ChunkOrder
    position: int
    stop: int | None
    parent: int


def _start_fetcher(job: _Job, lock: int) -> subprocess.Popen:
    """A fresh interpreter rather than a fork: this process may hold threads and an accelerator.

    Not through `multiprocessing`, which would run the user's script again.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, "-c", "from bt_adapter_hf.data.chunk_store import fetch; fetch()"],
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
    job = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with, args=(job.parent,), daemon=True).start()
    fetcher = _Fetcher(job)
    threading.Thread(target=fetcher.follow, args=(sys.stdin.buffer,), daemon=True).start()
    try:
        fetcher.run()
    except Exception as error:
        logger.debug("fetching failed", exc_info=True)
        reason = str(error) if isinstance(error, ChunkStoreError) else _reason(error, job.source)
        part = Path(job.folder, f"{ERROR}.part")
        part.write_text(reason, encoding="utf-8")
        part.rename(Path(job.folder, ERROR))
        logging.shutdown()
        os._exit(1)  # without waiting for the thread that reads the standard input


def _reason(error: Exception, source: str) -> str:
    """What went wrong; without addresses of the storage, which are signed."""
    return explain(error, repository(source)) if http_cause(error) else f"{type(error).__name__}: {error}"


def _end_with(parent: int) -> None:
    # The end of the standard input does not tell: forked loader workers hold its other end too.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class _Fetcher:
    """Keeps the shards around a position in the folder."""

    def __init__(self, job: _Job):
        self.folder, self.reader, self.source = Path(job.folder), job.reader, job.source
        self.max_disk, self.order, self.position = job.max_disk, job.order, job.position
        self.stop = math.inf if job.stop is None else job.stop
        self.moved = threading.Event()
        self._planned: tuple[range, list[int]] | None = None
        # bytes of each shard in the folder, the one that was needed longest ago first
        self.sizes: dict[int, int] = {}
        for shard in range(len(self.reader.shard_rows)):
            path = _shard_path(self.folder, shard)
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
            plan, wanted = self._plan(), self._wanted()
            needed = [*wanted, *(shard for shard in plan if shard not in wanted)]
            for shard in needed:
                if shard in self.sizes:
                    self.sizes[shard] = self.sizes.pop(shard)
            for shard in wanted:
                if shard in self.sizes:
                    (self.folder / f"wanted-{shard}").unlink(missing_ok=True)
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

    def _wanted(self) -> list[int]:
        """Shards that a reader waits for."""
        names = (re.fullmatch(r"wanted-(\d+)", name) for name in os.listdir(self.folder))
        return [int(name[1]) for name in names if name]

    def _fetch(self, shard: int, keep: set[int]) -> None:
        path = _shard_path(self.folder, shard)
        part = path.with_name(f"{path.name}.part")
        for wait in (*RETRY_AFTER, None):
            try:
                self._write(shard, part, keep)
                break
            except (ChunkStoreError, ValueError):
                part.unlink(missing_ok=True)
                raise
            except OSError as error:
                part.unlink(missing_ok=True)
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    free = shutil.disk_usage(self.folder).free
                    raise ChunkStoreError(
                        f"there is no disk space left: {_readable(free)} are free, the fetched videos take "
                        f"{_readable(sum(self.sizes.values()))}. Free some, then resume; checkpoints are not touched."
                    ) from error
                if wait is None or (http_cause(error) and not is_transient(error)):
                    raise
                logger.warning("Reading shard %d of %s again: %s", shard, self.source, _reason(error, self.source))
                time.sleep(wait)
        self.sizes[shard] = part.stat().st_size
        part.rename(path)

    def _write(self, shard: int, part: Path, keep: set[int]) -> None:
        import pyarrow as pa

        schema = pa.schema(
            {
                "video": pa.large_binary(),
                "path": pa.string(),
                "name": pa.string(),
                "texts": pa.list_(pa.string()),
                "problem": pa.string(),
            }
        )
        expected, found = self.reader.shard_rows[shard], 0
        footer = 4096 + 64 * expected
        with pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for record in self.reader.read_shard(shard):
                columns = record._asdict()
                if isinstance(record.video, str):
                    columns |= {"video": None, "path": record.video}
                row = pa.RecordBatch.from_pylist([columns], schema)
                self._make_room(file.tell() + row.nbytes + 2048 + footer, shard, keep)
                writer.write_batch(row)
                found += 1
        if found != expected:
            raise ChunkStoreError(f"shard {shard} has {found} rows, {expected} were counted. Has the source changed?")

    def _make_room(self, size: int, shard: int, keep: set[int]) -> None:
        """Delete shards that are not needed until there is room for a file of `size` bytes."""
        while self.max_disk is not None and sum(self.sizes.values()) + size > self.max_disk:
            passed = next((other for other in self.sizes if other not in keep), None)
            if passed is None:
                raise ChunkStoreError(self._too_small(size, shard, keep))
            _shard_path(self.folder, passed).unlink()
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
