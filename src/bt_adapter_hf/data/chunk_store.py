"""The chunk store: a bounded folder with the shards that training is about to read.

A process of its own fetches the shards of the next chunk while one chunk is trained, and deletes what has been passed
when it needs the room. Rows appear as they come; readers copy nothing but the row that they want.

    table.use_store(folder, max_disk, order, position, local_main_process)   # before training, on every rank
    table.store.advance(position)                                            # after each step
    table.store.close()                                                      # at the end
"""

import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chunk_fetching import POLL_SECONDS, Job, start_fetching
from .chunk_folder import (
    ERROR,
    LOCK,
    MARKER,
    ChunkStoreError,
    discard,
    has_row,
    in_use,
    keep_whole_shards,
    read_row,
    request_path,
    shard_path,
)
from .order import ChunkOrder, RowOrder


if TYPE_CHECKING:
    from .readers import Record, ShardReader

__all__ = ["ChunkStore", "ChunkStoreError", "discard"]

LOCK_SECONDS = 3.0  # until the fetching process of a run that was just killed has ended too


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
        item_timeout: seconds that fetching one video may take; the row is broken then. None: no limit.
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
        item_timeout: float | None = 60.0,
    ):
        if max_disk is not None and max_disk < 1:
            raise ValueError(f"max_disk={max_disk} must be a number of bytes, or None for no bound.")
        self.folder, self.source = Path(folder).expanduser().resolve(), source
        self._process: subprocess.Popen | None = None
        if local_main_process:
            order = order if order is not None else RowOrder(reader.shard_rows)
            lock = self._take_folder()
            try:
                keep_whole_shards(self.folder, fingerprint, reader.shard_rows)
                job = Job(str(self.folder), reader, source, max_disk, order, position, stop, item_timeout, os.getpid())
                self._process = start_fetching(job, lock)
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

    def wait(self, shard: int, index: int) -> None:
        """Return when row `index` of the shard is there.

        Raises:
            ChunkStoreError: it will not come.
        """
        path, asked = shard_path(self.folder, shard), 0.0
        while not has_row(path, index):
            if time.monotonic() - asked > 1:
                self._check_fetcher()
                request_path(self.folder, shard).touch()
                asked = time.monotonic()
            time.sleep(POLL_SECONDS)

    def read(self, shard: int, index: int) -> "Record":
        """Row `index` of a shard; waits for it.

        Raises:
            ChunkStoreError: it will not come.
        """
        while True:
            self.wait(shard, index)
            try:
                if (record := read_row(shard_path(self.folder, shard), index)) is not None:
                    return record
            except FileNotFoundError:  # deleted since; ask again
                pass

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
            if in_use(self.folder):
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
