"""Tables that name their videos: csv, jsonl and parquet files of paths and addresses."""

import codecs
import csv
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import PEEK_BYTES, FoundFiles, check_encoding, open_file
from .json_rows import PROBLEM, fields_of, is_list_with_surrogates, read_rows
from .media import Media, open_media
from .readers import (
    TEXT_COLUMNS,
    VIDEO_COLUMNS,
    WEBVID_COLUMNS,
    ColumnError,
    Reader,
    Record,
    RowReader,
    ShardReader,
    clean_texts,
    digest,
    in_threads,
    is_text,
    pick_column,
    slices,
)


if TYPE_CHECKING:
    import datasets

# Reader of `datasets` and its options for each kind of table file that names its videos.
READERS = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    # Captions and file names are text: "None", "NA" and "null" are words here.
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".parquet": ("parquet", {}),
}


def table_of_paths(
    files: FoundFiles, video_column: str | None, text_column: str | None, media_root: str | Path | None
) -> Reader:
    """A table whose rows name their videos. `datasets` keeps it as a memory-mapped file."""
    import datasets
    import pyarrow.compute as pc

    reader, options = READERS[files.suffix]
    if reader != "parquet":
        for _ in in_threads(_check_beginning, files.paths):
            pass
    if reader == "csv":
        options = {**options, "features": _all_strings(files.paths[0], options.get("sep", ","))}
    one_by_one = reader == "json" and any(map(is_list_with_surrogates, files.paths))
    try:
        if not one_by_one:
            with _quiet(logging.getLogger("datasets.packaged_modules")):  # it is in the error that they raise
                rows = datasets.load_dataset(reader, data_files=files.paths, split="train", **options)
            columns = rows.column_names
    except datasets.exceptions.DatasetsError:
        one_by_one = reader == "json" and bool(fields_of(files.paths))
        if not one_by_one:
            raise
    except StopIteration:  # how its reader of json meets a file without rows
        raise ValueError("it has no rows") from None
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"it is no table of rows with the same fields ({type(error).__name__}: {error})") from error
    if one_by_one:
        columns = fields_of(files.paths)
    elif len(rows) == 0:
        raise ValueError("it has no rows")
    webvid = video_column is None and WEBVID_COLUMNS <= set(columns)
    if webvid:
        video_columns = ["page_dir", "videoid"]
        text_column = text_column or "name"
    else:
        video_columns = [pick_column(columns, video_column, VIDEO_COLUMNS, "video")]
    text_column = pick_column(columns, text_column, TEXT_COLUMNS, "text")
    if one_by_one:
        rows = read_rows(files.paths, video_columns, text_column)
    else:
        rows = rows.select_columns([*video_columns, text_column])
    media = open_media(files, media_root)
    paths = rows.data.column(video_columns[0])
    if not webvid and not is_text(paths.type):
        raise ColumnError(f"has {paths.type} in its video column {video_columns[0]!r}, expected paths or URLs.")
    reader = PathRows(rows, video_columns, text_column, media)
    if media.is_local("") and not pc.any(pc.match_substring(paths.cast("large_string"), "://")).as_py():
        return reader
    return FetchedRows(reader)


def _check_beginning(path: str) -> None:
    with open_file(path, PEEK_BYTES) as file:
        head = file.read(PEEK_BYTES)
    check_encoding(head)
    # Of a file that begins with `null` the reader of Arrow crashes.
    first = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if path.endswith((".json", ".jsonl")) and first not in (b"{", b"[", b""):
        raise ValueError(f"{path} begins with {first!r} and not with an object of fields in braces")


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


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


class PathRows(RowReader):
    """Rows of a table in a memory-mapped file; the videos are local files or members of local archives."""

    def __init__(self, rows: "datasets.Dataset", video_columns: list[str], text_column: str, media: Media):
        self.rows, self.video_columns, self.text_column, self.media = rows, video_columns, text_column, media
        self.shard_rows = [len(rows)]
        self.fingerprint = digest(self.video_columns, text_column, *(batch for batch in rows.iter(10_000)))

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
        named = self.named(row)
        return named if named.problem else self.media.record(named)

    def named(self, row: dict[str, Any]) -> Record:
        """The row without its video."""
        name, texts = self._name(row), clean_texts(row[self.text_column])
        problem = row.get(PROBLEM) or (None if name else "The row names no video.")
        return Record(None, name or "", texts, problem)

    def texts(self) -> Iterator[list[str]]:
        for row in self.rows.select_columns(self.text_column):
            yield clean_texts(row[self.text_column])


class FetchedRows(ShardReader):
    """Slices of a table whose videos are fetched one by one."""

    def __init__(self, table: PathRows):
        self.table = table
        self.slices = slices(len(table.rows))
        self.shard_rows = [len(rows) for rows in self.slices]
        self.fingerprint = table.fingerprint

    def read_shard(self, shard: int, item_timeout: float | None = None) -> Iterator[tuple[int, Record]]:
        rows = map(self.table.named, self.table.rows.select(self.slices[shard]))
        yield from self.table.media.fetch(enumerate(rows), item_timeout)

    def texts(self) -> Iterator[list[str]]:
        return self.table.texts()
