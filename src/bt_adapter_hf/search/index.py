"""Searching an index: exact, or by its index of neighbours where it is large."""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .moments import suppress
from .table import COLUMNS, describe_model, open_table, reading, row_of, what_lance_says, writing


if TYPE_CHECKING:
    import lancedb

    from .encoding import VideoEncoder

EXACT_ROWS = 30_000  # comparing with all of them takes less than 0.2 s, see benchmarks/RESULTS.md
# With the index of neighbours: the part of its cells that is looked at, and how many rows are then compared exactly.
# They make the recall and the milliseconds of benchmarks/RESULTS.md.
_PROBED, _COMPARED = 0.15, 300
_SAMPLE = 1000  # rows that stand for all in a median
_FACTS = [*COLUMNS, "path_bytes"]


class IndexMismatchError(ValueError):
    """The index was made with another model, or with other settings, than it is now used with."""


class Hit(NamedTuple):
    """One result. `score` is the cosine of query and moment, `row` what the index knows about it."""

    rank: int
    score: float
    row: dict[str, Any]


class Optimized(NamedTuple):
    """How many rows there are; which part of the ten nearest rows the index of neighbours finds, and in how many
    seconds it was built; None where none was called for."""

    rows: int
    at_10: float | None = None
    seconds: float | None = None


@dataclass
class VideoIndex:
    """An index on the disk, open for searching.

    Attributes:
        info: what made the vectors: model, revision, fingerprint, dtype, settings, moments.
        table: the LanceDB table.
    """

    folder: Path
    info: dict[str, Any]
    table: "lancedb.table.Table"

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "VideoIndex":
        """Open an index.

        Raises:
            FileNotFoundError: there is no index at `folder`.
            ValueError: it is empty, damaged, or of another format.
        """
        table, info = open_table(folder)
        if table.count_rows() == 0:
            raise ValueError(f"the index '{folder}' is empty: run `bt-adapter index` again.")
        return cls(Path(folder), info, table)

    def __len__(self) -> int:
        """Number of rows: of moments, or of videos where the index has no moments."""
        return self.table.count_rows()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, without their vectors: path, start and end (seconds), size (bytes), duration, timestamps, ..."""
        return [row_of(row) for batch in self._batches(_FACTS) for row in batch.to_pylist()]

    @property
    def features(self) -> np.ndarray:
        """All vectors, float32 (rows, P), in the order of `rows`."""
        dim = self.info["dim"]
        parts = [batch["vector"].flatten().to_numpy().reshape(-1, dim) for batch in self._batches(["vector"])]
        return np.concatenate([np.empty((0, dim), np.float32), *parts])

    def check_model(self, encoder: "VideoEncoder") -> None:
        """Raise `IndexMismatchError` unless `encoder` has the weights that made this index."""
        check_model(self.folder, self.info, encoder)

    def search(
        self,
        queries: np.ndarray,
        k: int = 5,
        *,
        where: str | None = None,
        per_video: bool = False,
        overlap: float = 0.0,
        exact: bool = False,
    ) -> list[list[Hit]]:
        """The k nearest moments by cosine, best first, for each query.

        Args:
            queries: float32 (queries, P), L2-normalised, from `VideoEncoder.encode_texts` or `encode_videos`.
            k: number of hits; fewer come back from a smaller index.
            where: SQL condition over the columns of the index, such as "duration > 60 and path like '%holiday%'".
            per_video: only the best moment of each file.
            overlap: moments of one file are left out that share more than this part of their time with a better one.
            exact: compare with all rows, also where there is an index of neighbours.

        Raises:
            ValueError: queries of another width, or a condition that is none.
        """
        if k < 1:
            raise ValueError(f"k={k}: expected at least 1.")
        if not 0 <= overlap <= 1:
            raise ValueError(f"overlap={overlap}: expected a number from 0 to 1.")
        if queries.ndim != 2 or queries.shape[1] != self.info["dim"]:
            raise ValueError(
                f"queries have shape {queries.shape}; expected (queries, {self.info['dim']}), the width of the "
                "index: they must come from the same model."
            )
        with reading(self.folder):
            neighbours = not exact and any("vector" in found.columns for found in self.table.list_indices())
        return [self._search(query, k, where, per_video, overlap, neighbours) for query in queries]

    def _search(
        self, query: np.ndarray, k: int, where: str | None, per_video: bool, overlap: float, neighbours: bool
    ) -> list[Hit]:
        """Asks for four times as many until k are left of them."""
        moments, rows = per_video or self.info["moments"] is not None, max(1, len(self))
        limit = 4 * k if moments else k
        while True:
            limit = min(limit, rows)
            found = self._nearest(query, limit, where, neighbours)
            hits = [(1 - row["_distance"], row_of(row)) for row in found]
            if moments:
                hits = suppress(hits, overlap, per_video)
            if len(hits) >= k or len(found) < limit or limit == rows:
                return [Hit(rank, score, row) for rank, (score, row) in enumerate(hits[:k], start=1)]
            limit *= 4

    def _nearest(self, query: np.ndarray, limit: int, where: str | None, neighbours: bool) -> list[dict[str, Any]]:
        search = self.table.search(query, vector_column_name="vector").distance_type("dot").limit(limit)
        search = search.select([*_FACTS, "_distance"])
        if neighbours:
            search = search.nprobes(max(20, math.ceil(_PROBED * _cells(len(self))))).refine_factor(
                max(2, _COMPARED // limit)
            )
        else:
            search = search.bypass_vector_index()
        if where is None:
            with reading(self.folder):
                return search.to_list()
        try:
            # In brackets, or what follows a whole condition, "; drop ..." or "limit 3", would go unnoticed.
            return search.where(f"({where}\n)", prefilter=True).to_list()
        except Exception as error:
            self._nearest(query, 1, None, neighbours)  # a damaged table is not the fault of the condition
            reason = what_lance_says(error).split(" Valid fields")[0].rstrip(".")
            raise ValueError(
                f"the condition '{where}' cannot be used: {reason}. It is SQL over the columns {', '.join(COLUMNS)}, "
                "such as \"duration > 60 and path like '%holiday%'\"."
            ) from error

    def median_score(self, query: np.ndarray) -> float:
        """Median over the videos of the cosine with `query` (P,): what a video scores that has nothing to do with it,
        as long as most of them have not. Of a large index a thousand rows stand for all."""
        return float(np.median(self._sample(_SAMPLE) @ query))

    def _sample(self, count: int) -> np.ndarray:
        rows = len(self)
        offsets = np.unique(np.linspace(0, rows - 1, min(count, rows)).astype(int)).tolist()
        with reading(self.folder):
            found = self.table.take_offsets(offsets).select(["vector"]).to_arrow()
        return found["vector"].combine_chunks().flatten().to_numpy().reshape(-1, self.info["dim"])

    def _batches(self, columns: list[str]) -> Iterator[Any]:
        with reading(self.folder):
            yield from self.table.search().select(columns).limit(max(1, len(self))).to_batches()

    def optimize(self, exact_rows: int = EXACT_ROWS) -> Optimized:
        """Puts small parts together, and builds an index of neighbours for more than `exact_rows` rows.

        Returns:
            The recall of that index against comparing with all rows, over 100 rows of the table as queries.
        """
        from lancedb.index import IvfRq

        rows = len(self)
        with writing(self.folder):
            # The lock of the writer is held: what no version names is left from one that was killed.
            self.table.optimize(cleanup_older_than=timedelta(hours=1), delete_unverified=True)
            if rows <= exact_rows:
                return Optimized(rows)
            started = time.monotonic()
            config = IvfRq(distance_type="dot", num_partitions=_cells(rows))
            self.table.create_index("vector", config=config, replace=True)
        seconds, queries, found = time.monotonic() - started, self._sample(100), 0.0
        for query in queries:
            exact, fast = (
                {(row["path"], row["start"]) for row in self._nearest(query, 10, None, neighbours)}
                for neighbours in (False, True)
            )
            found += len(exact & fast) / len(exact)
        return Optimized(rows, found / len(queries), seconds)


def _cells(rows: int) -> int:
    """Of the index of neighbours."""
    return max(1, round(math.sqrt(rows)))


def check_model(folder: str | os.PathLike, info: dict[str, Any], encoder: "VideoEncoder") -> None:
    """Raise `IndexMismatchError` unless `encoder` has the weights, and uses them, as what made an index."""
    # one form is enough, and each reads all weights
    newest = "features_fingerprint" in info
    ours = {"features_fingerprint": encoder.fingerprint()} if newest else encoder.fingerprints()
    if same_model(info, ours):
        return
    made_with = describe_model(info["model"], info["revision"], info["dtype"])
    raise IndexMismatchError(
        f"the index '{folder}' was made with {made_with}; the model now used, {encoder.name}, has other weights "
        "or settings, so the features do not compare. Use the same model, or make a new index."
    )


def same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """By the newest form of the fingerprint that both have."""
    names = ("features_fingerprint", "fingerprint")
    return next(one[name] == other[name] for name in names if name in one and name in other)


def check_same(folder: str | os.PathLike, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise `IndexMismatchError` unless videos are sampled and preprocessed, and cut into moments, in the same way."""
    differing = []
    for name, before, now in _settings(old, new):
        if before != now:
            differing.append(f"{name}={before!r}, now {now!r}")
    if differing:
        raise IndexMismatchError(
            f"the index '{folder}' was made with other settings ({', '.join(differing)}). Use the same, or make a new "
            "index."
        )


def _settings(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(old["settings"].keys() | new["settings"].keys()):
        yield name, old["settings"].get(name), new["settings"].get(name)
    for name in ("window", "stride"):
        yield name, (old["moments"] or {}).get(name), (new["moments"] or {}).get(name)


def combined(queries: Sequence[np.ndarray], against: np.ndarray | None) -> np.ndarray:
    """(queries, P) unit queries, turned away from what is not wanted.

    The score is the cosine with the query less half of that with `against` (P,), scaled so that the query is a unit.
    """
    queries = np.stack(queries)
    if against is None:
        return queries
    turned = queries - 0.5 * against
    return (turned / np.linalg.norm(turned, axis=1, keepdims=True)).astype(np.float32)
