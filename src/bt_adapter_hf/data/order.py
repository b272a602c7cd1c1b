"""The order of training: a function of (seed, epoch, position), so that a run continues from one number."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Chunk(NamedTuple):
    """Positions `start` to `stop - 1`, all in one epoch, whose rows come from `shards`."""

    epoch: int
    start: int
    stop: int
    shards: list[int]


class ChunkOrder(Protocol):
    """What a `ChunkStore` asks of an order. It is pickled and sent to the fetching process."""

    chunk_rows: int

    def chunks(self, start: int) -> Iterator[Chunk]:
        """The chunks from the one that holds position `start`, without end."""
        ...


def _shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of `range(count)`, int64. numpy keeps raw bits the same in all versions, but not its shuffles."""
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(bits, kind="stable")


class EpochOrder:
    """An endless sequence over the rows of a table that is stored in shards.

    Position p is place `p % rows` of epoch `p // rows`, and every row has one place in each epoch. In each epoch the
    shards are shuffled, consecutive ones are joined to chunks of at least `chunk_rows` rows (the last chunk may be
    smaller), and the rows are shuffled inside each chunk. So only the shards of one chunk are needed at a time. A
    shard is never split: a table of one shard is shuffled as a whole.

    Args:
        shard_rows: number of rows of each shard; row numbers run through the shards in order.
        seed: of the shuffling, at least 0.
        chunk_rows: rows that are shuffled among each other, at least.

    Raises:
        ValueError: for a table without rows, or a bad `chunk_rows` or `seed`.
    """

    def __init__(self, shard_rows: Sequence[int], seed: int, chunk_rows: int = 10_000):
        if chunk_rows < 1 or seed < 0:
            raise ValueError(f"chunk_rows={chunk_rows} must be at least 1, and seed={seed} at least 0.")
        self.shard_rows, self.seed, self.chunk_rows = list(shard_rows), seed, chunk_rows
        self.rows = sum(self.shard_rows)
        if self.rows == 0:
            raise ValueError(f"The table has no rows in its {len(self.shard_rows)} shards: there is no order of them.")
        self._first_rows = np.cumsum([0, *self.shard_rows])
        self._chunks: list[Chunk] = []  # of the epoch asked for last
        self._chunk_rows: tuple[Chunk, np.ndarray] | None = None  # the chunk asked for last, its rows in order

    def __len__(self) -> int:
        """Rows of the table, which is the length of an epoch."""
        return self.rows

    def row(self, position: int) -> tuple[int, int]:
        """The epoch and the row at a position."""
        chunk, rows = self._chunk_at(position)
        return chunk.epoch, int(rows[position - chunk.start])

    def iterate(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """`row(start)`, `row(start + 1)`, ... without end."""
        while True:
            chunk, rows = self._chunk_at(start)
            for row in rows[start - chunk.start :]:
                yield chunk.epoch, int(row)
            start = chunk.stop

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """The chunks from the one that holds position `start`, without end."""
        while True:
            chunk = self._find_chunk(start)
            yield chunk
            start = chunk.stop

    def _find_chunk(self, position: int) -> Chunk:
        if position < 0:
            raise ValueError(f"position={position} must be at least 0.")
        epoch = position // self.rows
        if not self._chunks or self._chunks[0].epoch != epoch:
            self._chunks = self._chunks_of(epoch)
        return self._chunks[bisect_right(self._chunks, position, key=lambda chunk: chunk.start) - 1]

    def _chunks_of(self, epoch: int) -> list[Chunk]:
        chunks, shards = [], []
        start = stop = epoch * self.rows
        for shard in _shuffled(len(self.shard_rows), self.seed, epoch).tolist():
            if self.shard_rows[shard] == 0:
                continue
            shards.append(shard)
            stop += self.shard_rows[shard]
            if stop - start >= self.chunk_rows or stop == (epoch + 1) * self.rows:
                chunks.append(Chunk(epoch, start, stop, shards))
                start, shards = stop, []
        return chunks

    def _chunk_at(self, position: int) -> tuple[Chunk, np.ndarray]:
        if self._chunk_rows is None or not self._chunk_rows[0].start <= position < self._chunk_rows[0].stop:
            chunk = self._find_chunk(position)
            rows = np.concatenate([np.arange(*self._first_rows[shard : shard + 2]) for shard in chunk.shards])
            # 1 + the first shard: another key in every chunk, and none that a permutation of shards has
            self._chunk_rows = chunk, rows[_shuffled(len(rows), self.seed, chunk.epoch, 1 + chunk.shards[0])]
        return self._chunk_rows


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


class OrderSampler:
    """`count` pairs (epoch, row) of an `EpochOrder` from position `start`."""

    def __init__(self, order: EpochOrder, start: int, count: int):
        self.order, self.start, self.count = order, start, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        pairs = self.order.iterate(self.start)
        return (next(pairs) for _ in range(self.count))
