"""Parquet files that hold the bytes of the videos."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .files import PEEK_BYTES, READ_BYTES, FoundFiles, open_file
from .media import Media
from .readers import (
    TEXT_COLUMNS,
    VIDEO_COLUMNS,
    WEBVID_COLUMNS,
    ColumnError,
    Record,
    ShardReader,
    clean_texts,
    digest,
    in_threads,
    is_bytes,
    pick_column,
)


if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)


class ParquetShards(ShardReader):
    """Row groups of parquet files that hold the bytes of the videos. Only the two columns are read."""

    @staticmethod
    def fits(files: FoundFiles, video_column: str | None) -> bool:
        """Whether the video column holds bytes rather than paths."""
        import pyarrow.types as types

        schema = _parquet_footer(files.paths[0]).schema.to_arrow_schema()
        if video_column is None and WEBVID_COLUMNS <= set(schema.names):
            return False
        kind = schema.field(pick_column(schema.names, video_column, VIDEO_COLUMNS, "video")).type
        return types.is_struct(kind) or is_bytes(kind)

    @classmethod
    def of(cls, files: FoundFiles, video_column: str | None, text_column: str | None, media: Media) -> "ParquetShards":
        """Count the rows, from the footers of the files."""
        shards, facts = [], []
        video = text = None
        for path, metadata in zip(files.paths, in_threads(_parquet_footer, files.paths), strict=True):
            names = metadata.schema.to_arrow_schema().names
            try:
                video = pick_column(names, video_column, VIDEO_COLUMNS, "video")
                text = pick_column(names, text_column, TEXT_COLUMNS, "text")
            except ColumnError as error:
                raise ColumnError(f"(file {path}) {error}") from error
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group)
                if rows.num_rows:
                    shards.append((path, group, rows.num_rows))
                    facts.append([rows.num_rows, rows.total_byte_size])
            video_column, text_column = video, text  # the same in every file
        logger.info("%d rows in %d row groups of %d files", sum(s[2] for s in shards), len(shards), len(files.paths))
        return cls(shards, video, text, media, digest(video, text, facts))

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
                mean = data.metadata.row_group(group).total_byte_size // expected
                rows = max(1, min(8, READ_BYTES // max(mean, 1)))
                for batch in data.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                    found += batch.num_rows
                    yield from batch.to_pylist()
        except pa.ArrowInvalid as error:
            raise ValueError(f"Row group {group} of {path} cannot be read: {error}") from error
        if found != expected:
            raise ValueError(f"Row group {group} of {path} has {found} rows, {expected} were counted.")

    def read_shard(self, shard: int, item_timeout: float | None = None) -> Iterator[tuple[int, Record]]:
        named: list[tuple[int, Record]] = []
        for index, row in enumerate(self._rows(shard, [self.video_column, self.text_column])):
            record = self._record(row)
            if record.video is None and record.problem is None:
                named.append((index, record))
            else:
                yield index, record
        yield from self.media.fetch(named, item_timeout)

    def _record(self, row: dict[str, Any]) -> Record:
        """The row; without its video where it only names it."""
        video, texts = row[self.video_column], clean_texts(row[self.text_column])
        name = None
        if isinstance(video, dict):  # the struct of a `Video` feature
            name, video = video.get("path"), video.get("bytes")
        if video is not None:
            return Record(video, name or "", texts)
        if not name:
            return Record(None, "", texts, "The row holds no video.")
        return Record(None, name, texts)

    def texts(self) -> Iterator[list[str]]:
        for shard in range(len(self.shards)):
            for row in self._rows(shard, [self.text_column]):
                yield clean_texts(row[self.text_column])


def _parquet_footer(path: str) -> "pyarrow.parquet.FileMetaData":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_file(path, PEEK_BYTES) as file:
            return pq.read_metadata(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error
