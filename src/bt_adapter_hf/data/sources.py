"""(video, text) tables: one description for local files, packed shards, archives, URLs and datasets on the Hub."""

import csv
import hashlib
import io
import json
import logging
import os
import threading
import time
import urllib.error
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from glob import has_magic
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from ..hub_access import explain, http_cause
from ..import_utils import require_package
from ..video_download import download
from ..video_errors import VideoAccessError, VideoDownloadError, VideoError, VideoNotFoundError
from .archives import ARCHIVE_SUFFIXES, MediaArchives, TarMember, read_range, scan_tar
from .files import PEEK_BYTES, READ_BYTES, FoundFiles, find_files, identity, is_remote, join, open_file, pin


if TYPE_CHECKING:
    import datasets
    import pyarrow

    from .chunk_store import ChunkOrder, ChunkStore

logger = logging.getLogger(__name__)

VIDEO_COLUMNS = ("video", "file_name", "path", "video_path")
TEXT_COLUMNS = ("text", "caption", "captions", "sentence", "sentences")
# Reader of `datasets` and its options for each kind of table file that names its videos.
READERS = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    # Captions and file names are text: "None", "NA" and "null" are words here.
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".parquet": ("parquet", {}),
}
SUFFIXES = (*READERS, ".tar")
# Both layouts in which WebVid was published; the video is page_dir/videoid.mp4, the text is name.
WEBVID_COLUMNS = {"videoid", "page_dir", "name"}
VIDEO_MEMBERS = ("mp4", "webm", "mkv", "avi", "mov", "m4v", "gif")
TEXT_MEMBERS = ("txt", "text", "caption")

ROWS_PER_SHARD = 1000  # of a table that has no shards of its own
THREADS = 16  # that wait for a network at the same time
RETRY_AFTER = (1.0, 4.0)  # seconds before a download is tried again

Item = TypeVar("Item")
Result = TypeVar("Result")


class Record(NamedTuple):
    """One row: the video (bytes, or path of a local file), its name, its texts; or the problem that it has."""

    video: bytes | str | None
    name: str
    texts: list[str]
    problem: str | None = None


class BrokenRowError(VideoError):
    """A row has no video that could be read; `name` says which."""

    def __init__(self, reason: str, name: str):
        super().__init__(reason)
        self.name = name

    def __reduce__(self):
        return type(self), (str(self), self.name)


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

    def __init__(self, source: str, reader: "Reader", revision: str | None):
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
        shard, index = self.place(row)
        reader = self._reader if isinstance(self._reader, RowReader) else self._open_store()
        record = reader.read(shard, index)
        name = record.name or f"row {row}"
        if record.problem is not None:
            raise BrokenRowError(record.problem, name)
        return record.video, name, record.texts

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

    def records(self, shard: int) -> Iterator[Record]:
        """The rows of one shard in order, read from the source, without a store.

        Raises:
            OSError, ValueError: the shard cannot be read.
        """
        if isinstance(self._reader, RowReader):
            return (self._reader.read(shard, index) for index in range(self.shard_rows[shard]))
        return self._reader.read_shard(shard)

    def wait(self, row: int) -> None:
        """Return when the row can be read without waiting; raises what `pair` raises for a store."""
        if self.store is not None:
            self.store.wait(self.place(row)[0])

    def texts(self) -> Iterator[list[str]]:
        """The texts of all rows, in order; of packed shards only these are read."""
        return self._reader.texts()

    def use_store(
        self,
        folder: str | os.PathLike,
        max_disk: int | None = None,
        order: "ChunkOrder | None" = None,
        position: int = 0,
        local_main_process: bool = True,
    ) -> "ChunkStore":
        """Fetch the rows to a bounded folder, in the order in which they will be read; see `ChunkStore`."""
        from .chunk_store import ChunkStore

        self.store = ChunkStore(
            folder, self._reader, self.source, self.fingerprint, max_disk, order, position, local_main_process
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
            reader = ParquetShards.of(files, video_column, text_column, _media(files, media_root))
        else:
            reader = _table_of_paths(files, video_column, text_column, media_root)
    except (OSError, ValueError, pyarrow.ArrowException, HTTPError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, _ColumnError):
            raise ValueError(f"The table {source} {error}") from error
        if "corresponds to no data" in str(error):  # how `datasets` calls a file without rows
            raise ValueError(f"The table {source} has no rows.") from error
        # `datasets` hides what happened in the cause; our own errors say it themselves
        cause = isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__ or error
        reason = explain(error, source, revision) if http_cause(error) else str(cause) or repr(cause)
        raise ValueError(f"Cannot read the table {source}: {reason}") from error
    if sum(reader.shard_rows) == 0:
        raise ValueError(f"The table {source} has no rows.")
    return PairTable(source, reader, files.revision)


# Columns


class _ColumnError(ValueError):
    """The table lacks a column."""


def _pick_column(found: Iterable[str], wanted: str | None, defaults: tuple[str, ...], kind: str) -> str:
    found = list(found)
    for name in (wanted,) if wanted is not None else defaults:
        if name in found:
            return name
    looked_for = repr(wanted) if wanted is not None else f"any of {', '.join(defaults)}"
    raise _ColumnError(
        f"has no {kind} column: looked for {looked_for}, found {', '.join(found)}. Name it with {kind}_column."
    )


def _clean_texts(value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    return [str(text) for text in texts if text is not None and str(text).strip()]


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, ensure_ascii=False, default=str).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
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


# Videos that a table names


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


def _media(files: FoundFiles, media_root: str | Path | None) -> Media:
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


def _table_of_paths(
    files: FoundFiles, video_column: str | None, text_column: str | None, media_root: str | Path | None
) -> "Reader":
    """A table whose rows name their videos. `datasets` keeps it as a memory-mapped file."""
    import datasets
    import pyarrow.compute as pc

    reader, options = READERS[files.suffix]
    if reader == "csv":
        options = {**options, "features": _all_strings(files.paths[0], options.get("sep", ","))}
    rows = datasets.load_dataset(reader, data_files=files.paths, split="train", **options)
    if len(rows) == 0:
        raise ValueError("it has no rows")
    columns = rows.column_names
    webvid = video_column is None and WEBVID_COLUMNS <= set(columns)
    if webvid:
        video_columns = ["page_dir", "videoid"]
        text_column = text_column or "name"
    else:
        video_columns = [_pick_column(columns, video_column, VIDEO_COLUMNS, "video")]
    text_column = _pick_column(columns, text_column, TEXT_COLUMNS, "text")
    rows = rows.select_columns([*video_columns, text_column])
    media = _media(files, media_root)
    paths = rows.data.column(video_columns[0])
    if not webvid and str(paths.type) not in ("string", "large_string"):
        raise _ColumnError(f"has {paths.type} in its video column {video_columns[0]!r}, expected paths or URLs.")
    reader = PathRows(rows, video_columns, text_column, media)
    if media.is_local("") and not pc.any(pc.match_substring(paths, "://")).as_py():
        return reader
    return FetchedRows(reader)


def _all_strings(path: str, separator: str) -> "datasets.Features | None":
    """Features of a csv: every column is text, so that "007" and a folder 001 stay what they are."""
    import datasets

    with open_file(path, PEEK_BYTES) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        header = next(csv.reader(text, delimiter=separator), [])
    if not header:
        raise ValueError("it has no header line")
    if len(set(header)) < len(header):
        raise ValueError(f"its header names a column twice: {', '.join(header)}")
    return datasets.Features({name: datasets.Value("string") for name in header})


# Readers: of single rows in place, or of whole shards


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
    def read_shard(self, shard: int) -> Iterator[Record]:
        """The rows of a shard in order, as many as counted. Broken rows are records with a problem.

        Raises:
            OSError, ValueError: the shard cannot be read, or has changed since it was counted.
        """


class PathRows(RowReader):
    """Rows of a table in a memory-mapped file; the videos are local files or members of local archives."""

    def __init__(self, rows: "datasets.Dataset", video_columns: list[str], text_column: str, media: Media):
        self.rows, self.video_columns, self.text_column, self.media = rows, video_columns, text_column, media
        self.shard_rows = [len(rows)]
        self.fingerprint = _digest(self.video_columns, text_column, *(batch for batch in rows.iter(10_000)))

    def name(self, shard: int, index: int) -> str | None:
        return self._name(self.rows[index])

    def _name(self, row: dict[str, Any]) -> str | None:
        parts = [row[column] for column in self.video_columns]
        if None in parts:
            return None
        return parts[0] if len(parts) == 1 else f"{parts[0]}/{parts[1]}.mp4"

    def read(self, shard: int, index: int) -> Record:
        return self.load(self.rows[index])

    def load(self, row: dict[str, Any]) -> Record:
        name, texts = self._name(row), _clean_texts(row[self.text_column])
        if not name:
            return Record(None, "", texts, "The row names no video.")
        return self.media.record(name, texts)

    def texts(self) -> Iterator[list[str]]:
        for row in self.rows.select_columns(self.text_column):
            yield _clean_texts(row[self.text_column])


class FetchedRows(ShardReader):
    """Slices of a table whose videos are fetched one by one."""

    def __init__(self, table: PathRows):
        self.table = table
        total = len(table.rows)
        self.starts = range(0, total, ROWS_PER_SHARD)
        self.shard_rows = [min(ROWS_PER_SHARD, total - start) for start in self.starts]
        self.fingerprint = table.fingerprint

    def read_shard(self, shard: int) -> Iterator[Record]:
        start = self.starts[shard]
        rows = self.table.rows.select(range(start, start + self.shard_rows[shard]))
        yield from _in_threads(self.table.load, rows)

    def texts(self) -> Iterator[list[str]]:
        return self.table.texts()


class ParquetShards(ShardReader):
    """Row groups of parquet files that hold the bytes of the videos. Only the two columns are read."""

    @staticmethod
    def fits(files: FoundFiles, video_column: str | None) -> bool:
        """Whether the video column holds bytes rather than paths."""
        import pyarrow.types as types

        schema = _parquet_footer(files.paths[0]).schema.to_arrow_schema()
        if video_column is None and WEBVID_COLUMNS <= set(schema.names):
            return False
        kind = schema.field(_pick_column(schema.names, video_column, VIDEO_COLUMNS, "video")).type
        return types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind)

    @classmethod
    def of(cls, files: FoundFiles, video_column: str | None, text_column: str | None, media: Media) -> "ParquetShards":
        """Count the rows, from the footers of the files."""
        shards, facts = [], []
        video = text = None
        for path, metadata in zip(files.paths, _in_threads(_parquet_footer, files.paths), strict=True):
            names = metadata.schema.to_arrow_schema().names
            try:
                video = _pick_column(names, video_column, VIDEO_COLUMNS, "video")
                text = _pick_column(names, text_column, TEXT_COLUMNS, "text")
            except _ColumnError as error:
                raise _ColumnError(f"(file {path}) {error}") from error
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group)
                if rows.num_rows:
                    shards.append((path, group, rows.num_rows))
                    facts.append([rows.num_rows, rows.total_byte_size])
            video_column, text_column = video, text  # the same in every file
        logger.info("%d rows in %d row groups of %d files", sum(s[2] for s in shards), len(shards), len(files.paths))
        return cls(shards, video, text, media, _digest(video, text, facts))

    def __init__(self, shards: list[tuple[str, int, int]], video: str, text: str, media: Media, fingerprint: str):
        self.shards, self.video_column, self.text_column, self.media = shards, video, text, media
        self.shard_rows = [rows for _, _, rows in shards]
        self.fingerprint = fingerprint

    def _rows(self, shard: int, columns: list[str]) -> Iterator[dict[str, Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path, group, expected = self.shards[shard]
        found = 0
        # Piece by piece, because a row group may be larger than memory. Parquet knows where a column ends: it asks
        # for pieces of READ_BYTES, and nothing is read ahead of that.
        try:
            with (
                open_file(path, PEEK_BYTES) as file,
                pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES) as data,
            ):
                for batch in data.iter_batches(8, row_groups=[group], columns=columns, use_threads=False):
                    found += batch.num_rows
                    yield from batch.to_pylist()
        except pa.ArrowInvalid as error:
            raise ValueError(f"Row group {group} of {path} cannot be read: {error}") from error
        if found != expected:
            raise ValueError(f"Row group {group} of {path} has {found} rows, {expected} were counted.")

    def read_shard(self, shard: int) -> Iterator[Record]:
        for row in self._rows(shard, [self.video_column, self.text_column]):
            yield self._record(row)

    def _record(self, row: dict[str, Any]) -> Record:
        video, texts = row[self.video_column], _clean_texts(row[self.text_column])
        name = None
        if isinstance(video, dict):  # the struct of a `Video` feature
            name, video = video.get("path"), video.get("bytes")
        if video is not None:
            return Record(video, name or "", texts)
        if not name:
            return Record(None, "", texts, "The row holds no video.")
        return self.media.record(name, texts)

    def texts(self) -> Iterator[list[str]]:
        for shard in range(len(self.shards)):
            for row in self._rows(shard, [self.text_column]):
                yield _clean_texts(row[self.text_column])


def _parquet_footer(path: str) -> "pyarrow.parquet.FileMetaData":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_file(path, PEEK_BYTES) as file:
            return pq.read_metadata(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


class TarShards(Reader):
    """Slices of WebDataset tars: consecutive members with the same name up to the first dot are one sample.

    Where a sample's video and text lie is known from the headers, so that only these are read.
    """

    @staticmethod
    def of(files: FoundFiles, video_column: str | None, text_column: str | None) -> "TarShards":
        """Count the samples."""
        import pyarrow as pa

        started = time.monotonic()
        tars, endings = [], set()
        for number, members in enumerate(_in_threads(_tar_members, files.paths)):
            samples = [_TarSample.of(group, video_column, text_column) for group in _samples(members)]
            endings.update(_ending(name) for name, _, _ in members)
            tar = pa.table({"tar": pa.array([number] * len(samples), pa.int32()), **_columns(_TarSample, samples)})
            tars += [tar.slice(start, ROWS_PER_SHARD) for start in range(0, len(tar), ROWS_PER_SHARD)]
            if time.monotonic() - started > 10:
                logger.warning("Counted the samples of %d of %d tar files", number + 1, len(files.paths))
                started = time.monotonic()
        if not tars:
            raise ValueError("its tars hold no files")
        samples, shard_rows = pa.concat_tables(tars).combine_chunks(), [len(tar) for tar in tars]
        for kind, sizes, wanted, defaults in (
            ("video", "video_size", video_column, VIDEO_MEMBERS),
            ("text", "text_size", text_column, (*TEXT_MEMBERS, "json")),
        ):
            if not (samples[sizes].to_numpy() >= 0).any():
                raise _ColumnError(
                    f"has no {kind} members: looked for {repr(wanted) if wanted else ', '.join(defaults)}, found "
                    f"members ending in {', '.join(sorted(endings))}. Name one with {kind}_column."
                )
        tar_class = RemoteTars if any(is_remote(path) for path in files.paths) else LocalTars
        return tar_class(files.paths, samples, shard_rows, text_column)

    def __init__(self, paths: list[str], samples: "pyarrow.Table", shard_rows: list[int], text_column: str | None):
        self.paths, self.samples, self.shard_rows, self.text_column = paths, samples, shard_rows, text_column
        self.starts = np.cumsum([0, *shard_rows])
        self.fingerprint = _digest(text_column, *(batch.to_pydict() for batch in samples.to_batches(10_000)))

    def _sample(self, shard: int, index: int) -> tuple[str, "_TarSample"]:
        tar, *sample = self.samples.slice(int(self.starts[shard]) + index, 1).to_pylist()[0].values()
        return self.paths[tar], _TarSample(*sample)

    def _record(self, file: BinaryIO, sample: "_TarSample") -> Record:
        # in the order in which they lie in the file, for the sake of reading ahead
        parts = {"video": (sample.video_offset, sample.video_size), "text": (sample.text_offset, sample.text_size)}
        data = {
            part: read_range(file, offset, size) if size >= 0 else None
            for part, (offset, size) in sorted(parts.items(), key=lambda item: item[1])
        }
        texts = self._texts(data["text"], sample)
        if data["video"] is None:
            return Record(None, sample.name, texts, "The sample has no video.")
        return Record(data["video"], sample.name, texts)

    def _texts(self, data: bytes | None, sample: "_TarSample") -> list[str]:
        if data is None:
            return []
        text = data.decode("utf-8", errors="replace")
        if not sample.text_is_json:
            return _clean_texts(text.strip())
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            logger.warning("%s: its json member cannot be read (%s).", sample.name, error)
            return []
        keys = TEXT_COLUMNS if self.text_column in (None, "json") else (self.text_column,)
        values = values if isinstance(values, dict) else {}
        return next((_clean_texts(values[key]) for key in keys if key in values), [])

    def texts(self) -> Iterator[list[str]]:
        for shard, rows in enumerate(self.shard_rows):
            path, _ = self._sample(shard, 0)
            with open_file(path, PEEK_BYTES) as file:
                for index in range(rows):
                    _, sample = self._sample(shard, index)
                    size = sample.text_size
                    yield self._texts(read_range(file, sample.text_offset, size) if size >= 0 else None, sample)


class LocalTars(TarShards, RowReader):
    def name(self, shard: int, index: int) -> str:
        return self._sample(shard, index)[1].name

    def read(self, shard: int, index: int) -> Record:
        path, sample = self._sample(shard, index)
        with open(path, "rb") as file:
            return self._record(file, sample)


class RemoteTars(TarShards, ShardReader):
    def read_shard(self, shard: int) -> Iterator[Record]:
        path, _ = self._sample(shard, 0)
        with open_file(path) as file:
            for index in range(self.shard_rows[shard]):
                yield self._record(file, self._sample(shard, index)[1])


class _TarSample(NamedTuple):
    """Where the video and the text of a sample lie; a size of -1: it has none."""

    name: str
    video_offset: int
    video_size: int
    text_offset: int
    text_size: int
    text_is_json: bool

    @classmethod
    def of(cls, members: list[TarMember], video_column: str | None, text_column: str | None) -> "_TarSample":
        by_ending = {_ending(member.name): member for member in members}
        if len(by_ending) < len(members):
            raise ValueError(f"two members of one sample have the same ending, near {members[0].name}")
        none = TarMember(members[0].name, 0, -1)
        videos = (video_column,) if video_column else VIDEO_MEMBERS
        video = next((by_ending[ending] for ending in videos if ending in by_ending), none)
        plain = (text_column,) if text_column else TEXT_MEMBERS
        ending = next((ending for ending in plain if ending in by_ending), "json")
        text = by_ending.get(ending, none)
        return cls(video.name, video.offset, video.size, text.offset, text.size, ending == "json")


def _columns(kind: type, rows: list[tuple]) -> dict[str, list]:
    return {name: [row[i] for row in rows] for i, name in enumerate(kind._fields)}


def _split_member(name: str) -> tuple[str, str]:
    """Key and ending of a member: the last part of its path is cut at the first dot."""
    folder, slash, last = name.rpartition("/")
    key, _, ending = last.partition(".")
    return folder + slash + key, ending.lower()


def _ending(name: str) -> str:
    return _split_member(name)[1]


def _samples(members: list[TarMember]) -> Iterator[list[TarMember]]:
    for _, group in groupby(members, key=lambda member: _split_member(member.name)[0]):
        yield list(group)


def _tar_members(path: str) -> list[TarMember]:
    """The members of a tar; kept in the cache of `datasets`, because counting a remote tar takes many requests."""
    import datasets

    cached = Path(datasets.config.HF_DATASETS_CACHE) / "bt_adapter_tars" / f"{_digest(identity(path))}.json"
    if cached.is_file():
        return [TarMember(*member) for member in json.loads(cached.read_text(encoding="utf-8"))]
    # without hidden files, such as those that macOS adds
    members = [member for member in scan_tar(path) if not member.name.rpartition("/")[2].startswith(".")]
    cached.parent.mkdir(parents=True, exist_ok=True)
    written = cached.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    written.write_text(json.dumps(members), encoding="utf-8")
    written.replace(cached)
    return members
