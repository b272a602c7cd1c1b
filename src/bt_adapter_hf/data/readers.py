"""What the readers of all kinds of tables share: rows, columns, and the interface that tables and stores ask for."""

import hashlib
import json
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar


if TYPE_CHECKING:
    import pyarrow


VIDEO_COLUMNS = ("video", "file_name", "path", "video_path")
TEXT_COLUMNS = ("text", "caption", "captions", "sentence", "sentences")
# Both layouts in which WebVid was published; the video is page_dir/videoid.mp4, the text is name.
WEBVID_COLUMNS = {"videoid", "page_dir", "name"}

ROWS_PER_SHARD = 1000  # of a table that has no shards of its own
THREADS = 16  # that wait for a network at the same time

Item = TypeVar("Item")
Result = TypeVar("Result")


class Record(NamedTuple):
    """One row: the video (bytes, or path of a local file), its name, its texts; or the problem that it has."""

    video: bytes | str | None
    name: str
    texts: list[str]
    problem: str | None = None


class Reader(ABC):
    """What is behind a table.

    Attributes:
        shard_rows: number of rows of each shard.
        fingerprint: hex digest of the rows.
    """

    shard_rows: list[int]
    fingerprint: str

    @abstractmethod
    def texts(self) -> Iterator[list[str]]:
        """The texts of all rows."""


class RowReader(Reader):
    """Reads any row where it is."""

    @abstractmethod
    def read(self, shard: int, index: int) -> Record: ...

    @abstractmethod
    def name(self, shard: int, index: int) -> str | None: ...


class ShardReader(Reader):
    """Reads one shard after the other, for a `ChunkStore`."""

    @abstractmethod
    def read_shard(self, shard: int, item_timeout: float | None = None) -> Iterator[tuple[int, Record]]:
        """The rows of a shard with their numbers in it, as they come, as many as counted.

        Broken rows are records with a problem, and so are those whose video does not come in `item_timeout` seconds.

        Raises:
            OSError, ValueError: the shard cannot be read, or has changed since it was counted.
        """


class ColumnError(ValueError):
    """The table lacks a column."""


def pick_column(found: Iterable[str], wanted: str | None, defaults: tuple[str, ...], kind: str) -> str:
    found = list(found)
    for name in (wanted,) if wanted is not None else defaults:
        if name in found:
            return name
    looked_for = repr(wanted) if wanted is not None else f"any of {', '.join(defaults)}"
    raise ColumnError(
        f"has no {kind} column: looked for {looked_for}, found {', '.join(found)}. Name it with {kind}_column."
    )


def is_text(kind: "pyarrow.DataType") -> bool:
    """Whether a column holds text, in any of the ways in which Arrow writes it."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def is_bytes(kind: "pyarrow.DataType") -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def clean_texts(value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    return [str(text) for text in texts if text is not None and str(text).strip()]


def slices(rows: int) -> list[range]:
    """So many rows, cut into shards."""
    return [range(start, min(start + ROWS_PER_SHARD, rows)) for start in range(0, rows, ROWS_PER_SHARD)]


def digest(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(json.dumps(part, ensure_ascii=False, default=str).encode())
        found.update(b"\n")
    return found.hexdigest()


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map` in threads, in order, holding no more than twice as many results as there are threads."""
    pending = deque()
    executor = ThreadPoolExecutor(THREADS)
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) == 2 * THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def as_they_come(
    function: Callable[[Item], Result], items: Iterable[tuple[int, Item]], timeout: float | None
) -> Iterator[tuple[int, Result | None]]:
    """`function` of numbered items, in threads; what is ready first comes first.

    None for an item that took longer than `timeout` seconds. Nothing can end its thread, which is left to itself.
    """
    results: SimpleQueue[tuple[int, Result | None, BaseException | None]] = SimpleQueue()
    started: dict[int, float] = {}  # the longest ago first
    items = iter(items)

    def call(number: int, item: Item) -> None:
        try:
            results.put((number, function(item), None))
        except BaseException as error:
            results.put((number, None, error))

    while True:
        for number, item in islice(items, THREADS - len(started)):
            started[number] = time.monotonic()
            threading.Thread(target=call, args=(number, item), daemon=True).start()
        if not started:
            return
        first = next(iter(started))
        try:
            left = None if timeout is None else max(0.0, started[first] + timeout - time.monotonic())
            number, result, error = results.get(timeout=left)
        except Empty:
            number, result, error = first, None, None
        if started.pop(number, None) is None:
            continue  # given up before
        if error is not None:
            raise error
        yield number, result
