"""Tables in and out: several indices made one, an index as a Parquet file, and an index of an older version."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.writing import written_whole
from ..import_utils import require_package
from .index import IndexMismatchError, VideoIndex, check_same, same_model
from .table import (
    FORMAT,
    check_writable,
    create_table,
    describe_model,
    has_table,
    path_of,
    read_info,
    reading,
    refuse_inside,
    to_arrow,
)
from .writer import known_files, locked, replace_rows


_AT_ONCE = 8192  # rows in memory


def merge(sources: Sequence[str | os.PathLike], output: str | os.PathLike) -> int:
    """Makes one index of several: folders of indices, and Parquet files of [`export`] or of Ray. Returns its rows.

    Of a file that several have, the rows of the last one count, as if it had been indexed again. `output` may be an
    index: what the sources have is put into it. A source is put in as a whole or not at all.

    Raises:
        IndexMismatchError: the sources are of several models or settings.
        ValueError: a source is no index.
        OSError: a source is not there, or `output` cannot be written.
    """
    require_package("lancedb", "search")
    check_writable(output)
    for source in sources:
        if Path(source).absolute() == Path(output).absolute():
            raise ValueError(f"'{output}' is to be merged into itself: name another index with -o.")
    with locked(output):
        index = VideoIndex.load(output) if has_table(Path(output)) else None
        info = None if index is None else index.info
        opened = []
        for source in sources:
            found, data = _open(source)
            if info is not None:
                _check_fits(source, found, output if index is not None else sources[0], info)
            info = info or found
            opened.append(data)
        table = None if index is None else index.table
        for source, data in zip(sources, opened, strict=True):
            rows = _checked(source, data())
            if table is None:
                table = create_table(output, rows)
            else:
                replace_rows(table, output, rows, sorted(_paths(rows) & known_files(table, output).keys()))
        return table.count_rows()


def _paths(rows) -> set[str]:
    raws = rows["path_bytes"].to_pylist() if "path_bytes" in rows.schema.names else [None] * len(rows)
    return set(map(path_of, rows["path"].to_pylist(), raws))


def _checked(source: str | os.PathLike, rows):
    """Rows of a source that a table can take.

    Raises:
        ValueError: columns, names or vectors are missing, a moment stands there twice, or there are no rows.
    """
    import pyarrow as pa

    missing = {"path", "start", "vector"} - set(rows.schema.names)
    if missing:
        raise ValueError(f"'{source}' has no column {' and '.join(sorted(missing))}: it is no index, nor exported.")
    if len(rows) == 0:
        raise ValueError(f"'{source}' is empty.")
    if rows["path"].null_count or rows["vector"].null_count:
        raise ValueError(f"'{source}' has rows without a path or a vector.")
    keys = [name for name in ("path", "path_bytes", "start") if name in rows.schema.names]
    moments = rows.select(keys).group_by(keys).aggregate([])
    if len(moments) < len(rows):
        raise ValueError(
            f"'{source}' has {len(rows)} rows of {len(moments)} moments, each may stand there once: put parts "
            "together by naming them one by one."
        )
    vectors = pa.concat_arrays([chunk.flatten() for chunk in rows["vector"].chunks]).to_numpy(zero_copy_only=False)
    if not np.isfinite(vectors).all():
        raise ValueError(f"'{source}' has vectors that are not finite: make it again.")
    return rows


def _open(source: str | os.PathLike):
    """What made the vectors of a source, and what reads its rows."""
    if os.path.isfile(source):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            info = read_info(source, pq.read_schema(source).metadata or {})
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"'{source}' is no Parquet file: {_reason(error)}.") from error
        return info, lambda: _read_parquet(source)
    index = VideoIndex.load(source)
    return index.info, lambda: _read_all(index)


def _read_parquet(source: str | os.PathLike):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(source)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"'{source}' is damaged ({_reason(error)}): export it again.") from error


def _read_all(index: VideoIndex):
    with reading(index.folder):
        return index.table.to_arrow()


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0].rstrip(".")


def _check_fits(source: str | os.PathLike, found: dict[str, Any], other: str | os.PathLike, info: dict) -> None:
    if not same_model(found, info):
        now, before = (describe_model(made["model"], made["revision"], made["dtype"]) for made in (found, info))
        raise IndexMismatchError(
            f"'{source}' was made with another model than '{other}' ({now}; {before}), or with other weights or "
            "settings of it: their vectors do not compare."
        )
    check_same(other, info, found)


def export(folder: str | os.PathLike, output: str | os.PathLike) -> int:
    """Writes all rows of an index, vectors too, to a Parquet file, for other vector databases. Returns their number.

    The metadata of its schema say what made the vectors, so that [`merge`] takes the file.
    """
    import pyarrow.parquet as pq

    if Path(output).suffix.lower() != ".parquet":
        raise ValueError(f"'{output}' is to be a Parquet file: give it a name that ends in .parquet.")
    refuse_inside(output)
    index = VideoIndex.load(folder)
    rows = 0
    try:
        with written_whole(output) as file, pq.ParquetWriter(file, index.table.schema) as writer:
            for batch in _batches(index):
                writer.write_batch(batch.select(index.table.schema.names))
                rows += len(batch)
    except OSError as error:
        if error.errno is None:  # of the index
            raise
        raise type(error)(f"'{output}' cannot be written: {error.strerror}.") from error
    return rows


def _batches(index: VideoIndex) -> Iterator:
    with reading(index.folder):
        yield from index.table.search().limit(len(index)).to_batches(batch_size=_AT_ONCE)


def convert(folder: str | os.PathLike, output: str | os.PathLike | None = None) -> int:
    """Makes a table of an index of format 1, in place or in another folder, and encodes nothing. Returns its rows.

    In place, the old files go when the table is complete: whatever interrupts it, the same call ends it.
    """
    require_package("lancedb", "search")
    folder = Path(folder)
    output = folder if output is None else Path(output)
    if not (folder / "index.json").is_file():
        raise FileNotFoundError(f"'{folder}' holds no index of an older version (there is no index.json).")
    if output != folder:
        check_writable(output)
    with locked(output):
        if has_table(output):
            if output != folder:
                raise FileExistsError(f"'{output}' holds an index already: name a new folder with -o.")
        else:
            info, rows, features = _read_format1(folder)
            create_table(output, to_arrow({**info, "format": FORMAT, "moments": None}, rows, features))
        rows = len(VideoIndex.load(output))  # the old files go when the new ones are known to open
        if output == folder:
            for path in [*_parts(folder), folder / "index.json"]:
                path.unlink()
        return rows


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-" + "[0-9]" * 5 + ".safetensors"))


def _read_format1(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], np.ndarray]:
    """Description, rows and features of index.json and its parts; of two rows with one path the later counts."""
    from safetensors import SafetensorError, safe_open

    path = folder / "index.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if info["format"] != 1:
            raise ValueError(f"it has format {info['format']}")
        if not isinstance(info["settings"], dict) or not isinstance(info["fingerprint"], str):
            raise ValueError("its settings or its fingerprint are not what they were written as")
        latest: dict[str, tuple[dict[str, Any], np.ndarray]] = {}
        for path in _parts(folder):
            with safe_open(path, framework="numpy") as file:
                rows, features = json.loads(file.metadata()["rows"]), file.get_tensor("features")
            if features.shape != (len(rows), info["dim"]):
                raise ValueError(f"{len(rows)} rows, features {features.shape}, {info['dim']} wide expected")
            latest.update((row["path"], (row, feature)) for row, feature in zip(rows, features, strict=True))
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"'{path}' is damaged ({error}): make a new index.") from error
    if not latest:
        raise ValueError(f"the index '{folder}' is empty: make a new one.")
    rows = [{**row, "start": 0.0, "end": row.get("duration")} for row, _ in latest.values()]
    return info, rows, np.stack([feature for _, feature in latest.values()])
