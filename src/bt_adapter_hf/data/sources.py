"""(video, text) tables: one description for local files, packed shards, archives, URLs and datasets on the Hub."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..hub.access import explain, http_cause
from ..import_utils import require_package
from ..models.video_errors import VideoError
from .files import find_files, repository, unicode_reason
from .media import open_media
from .parquet_shards import ParquetShards
from .path_rows import READERS, table_of_paths
from .readers import ColumnError, Reader, Record, RowReader
from .tar_shards import TarShards


if TYPE_CHECKING:
    from .chunk_store import ChunkStore
    from .order import ChunkOrder

SUFFIXES = (*READERS, ".tar")


class BrokenRowError(VideoError):
    """A row has no video that could be read; `name` says which."""

    def __init__(self, reason: str, name: str):
        super().__init__(reason)
        self.name = name

    def __reduce__(self):
        return type(self), (str(self), self.name)


def usable(record: Record, row: int) -> Record:
    """The record, where it can be used in training as far as can be told before its video is decoded.

    Raises:
        BrokenRowError: it has no video, or no text.
    """
    problem = record.problem or (None if record.texts else "it has no text")
    if problem is not None:
        raise BrokenRowError(problem, record.name or f"row {row}")
    return record


class NothingToFetch:
    """In the place of a `ChunkStore` for a table whose rows are read where they are."""

    def advance(self, position: int) -> None:
        pass

    def close(self, keep: bool = False) -> None:
        pass


class PairTable:
    """Rows of (video, text) in shards, nothing decoded. `load_table` makes it.

    Attributes:
        source: what was given to `load_table`.
        shard_rows: number of rows of each shard; row numbers run through the shards in order.
        fingerprint: hex digest; the same for the same rows, wherever they lie.
        revision: commit of a dataset on the Hub, else None.
        needs_store: whether the rows have to be fetched: they are remote, or packed so that no single row can be read.
        store: where fetched rows are read from, after `use_store`.
    """

    def __init__(self, source: str, reader: Reader, revision: str | None):
        self.source, self.revision = source, revision
        self.shard_rows, self.fingerprint = reader.shard_rows, reader.fingerprint
        self.needs_store = not isinstance(reader, RowReader)
        self.store: ChunkStore | None = None
        self._reader = reader
        self._first_rows = np.cumsum([0, *self.shard_rows])

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def place(self, row: int) -> tuple[int, int]:
        """The shard of a row, and its number in there."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self.source}, which has {len(self)} rows")
        shard = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return shard, row - int(self._first_rows[shard])

    def shard_range(self, row: int) -> range:
        """All rows of the shard that holds `row`."""
        shard, _ = self.place(row)
        return range(int(self._first_rows[shard]), int(self._first_rows[shard + 1]))

    def pair(self, row: int) -> tuple[str | bytes, str, list[str]]:
        """Video (path or bytes of the file), its name for messages, and the texts of one row, maybe none.

        Waits for rows that are still being fetched.

        Raises:
            BrokenRowError: the row has no video that can be read.
            RuntimeError: a table that needs a store, before `use_store`.
            ChunkStoreError: the rows could not be fetched.
        """
        record = self.record(row)
        name = record.name or f"row {row}"
        if record.problem is not None:
            raise BrokenRowError(record.problem, name)
        return record.video, name, record.texts

    def record(self, row: int) -> Record:
        """All of one row, the problem that it may have included; else as `pair`."""
        reader = self._reader if isinstance(self._reader, RowReader) else self._open_store()
        return reader.read(*self.place(row))

    def name(self, row: int) -> str:
        """The name of a row's video, without reading the video from where it lies."""
        shard, index = self.place(row)
        in_place = isinstance(self._reader, RowReader)
        name = self._reader.name(shard, index) if in_place else self._open_store().read(shard, index).name
        return name or f"row {row}"

    def _open_store(self) -> "ChunkStore":
        if self.store is None:
            raise RuntimeError(
                f"The rows of {self.source} have to be fetched: call use_store() first (the trainers do), with a "
                "folder and the bytes that it may take."
            )
        return self.store

    def records(self, shard: int, item_timeout: float | None = 60.0) -> Iterator[tuple[int, Record]]:
        """The rows of one shard with their numbers in it, as they come from the source, without a store.

        A row whose video is not fetched in `item_timeout` seconds has a problem.

        Raises:
            OSError, ValueError: the shard cannot be read.
        """
        if isinstance(self._reader, RowReader):
            return ((index, self._reader.read(shard, index)) for index in range(self.shard_rows[shard]))
        return self._reader.read_shard(shard, item_timeout)

    def wait(self, row: int) -> None:
        """Return when the row can be read without waiting; raises what `pair` raises for a store."""
        if self.store is not None:
            self.store.wait(*self.place(row))

    def texts(self) -> Iterator[list[str]]:
        """The texts of all rows, in order; of packed shards only these are read."""
        return self._reader.texts()

    def use_store(
        self,
        folder: str | os.PathLike,
        max_disk: int | None = None,
        order: "ChunkOrder | None" = None,
        position: int = 0,
        stop: int | None = None,
        local_main_process: bool = True,
        item_timeout: float | None = 60.0,
    ) -> "ChunkStore | NothingToFetch":
        """Fetch the rows to a bounded folder, in the order in which they will be read; see `ChunkStore`.

        Where all rows are in place this does nothing, and what is returned does nothing either.
        """
        if not self.needs_store:
            return NothingToFetch()
        from .chunk_store import ChunkStore

        self.store = ChunkStore(
            folder,
            self._reader,
            self.source,
            self.fingerprint,
            max_disk,
            order,
            position,
            stop,
            local_main_process,
            item_timeout,
        )
        return self.store


def load_table(
    source: str | Path,
    *,
    media_root: str | Path | None = None,
    video_column: str | None = None,
    text_column: str | None = None,
    split: str = "train",
    config_name: str | None = None,
    revision: str | None = None,
) -> PairTable:
    """Open a (video, text) table. No video is read, and the number of rows is exact.

    Args:
        source: files, by path or glob pattern, local or hf://datasets/...: a table (`.jsonl`, `.json`,
            `.csv`, `.tsv`, `.parquet`) that names its videos, `.parquet` that holds them, or WebDataset `.tar`;
            a folder of videos with `metadata.jsonl`, `metadata.csv` or `metadata.parquet` (the video folder layout
            of `datasets`); any other folder in which `datasets` finds such files; or the id of a Hub dataset.
        media_root: where relative video paths start: a folder, local or remote, or a `.zip` or `.tar` with the videos
            (or a pattern that fits several). For a dataset on the Hub also a path inside it. The folder of the table
            by default.
        video_column: paths, URLs, bytes or `Video` features; by default the first of `VIDEO_COLUMNS` that exists.
            Of tars the ending of the members, by default the first of `VIDEO_MEMBERS`.
            Tables with the header of WebVid name page_dir/videoid.mp4 by default.
        text_column: captions, or lists of captions; by default the first of `TEXT_COLUMNS` that exists. Of tars the
            ending of the members, or a key inside the `.json` members; by default the first of `TEXT_MEMBERS`, then
            of `TEXT_COLUMNS` in the json.
        split, config_name: of a Hub dataset or a folder without metadata file.
        revision: branch, tag or commit of a Hub dataset; it is pinned to the commit.

    Raises:
        ImportError: without the `datasets` library.
        ValueError: for a table that cannot be read, has no rows, or lacks the columns (naming those it has).
    """
    require_package("datasets", "train")
    import datasets
    import pyarrow
    from huggingface_hub.errors import HTTPError

    source = str(source)
    try:
        files = find_files(source, SUFFIXES, split, config_name, revision)
        if files.suffix == ".tar":
            reader = TarShards.of(files, video_column, text_column)
        elif files.suffix == ".parquet" and ParquetShards.fits(files, video_column):
            reader = ParquetShards.of(files, video_column, text_column, open_media(files, media_root))
        else:
            reader = table_of_paths(files, video_column, text_column, media_root)
    except (OSError, ValueError, pyarrow.ArrowException, HTTPError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, ColumnError):
            raise ValueError(f"The table {source} {error}") from error
        if "corresponds to no data" in str(error):  # how `datasets` calls a file without rows
            raise ValueError(f"The table {source} has no rows.") from error
        # `datasets` hides what happened in the cause; our own errors say it themselves
        cause = isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__ or error
        said = explain(error, repository(source), revision) if http_cause(error) else str(cause) or repr(cause)
        reason = unicode_reason(cause) or said
        raise ValueError(f"Cannot read the table {source}: {reason}") from error
    if sum(reader.shard_rows) == 0:
        raise ValueError(f"The table {source} has no rows.")
    return PairTable(source, reader, files.revision)
