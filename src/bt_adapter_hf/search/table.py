"""The table of an index: LanceDB, a row for each moment of a video, in a folder that holds nothing else.

    videos.lance/     the table; the metadata of its schema say what made the vectors
    skipped.jsonl     the files of the last run that could not be read: {"path", "reason"}

A write is a transaction: whatever ends a process, the table is as after its last write. One process writes at a time
(index.lock), any number read.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..adapters.writing import PARTIAL
from ..import_utils import require_package


if TYPE_CHECKING:
    import lancedb
    import pyarrow as pa


FORMAT = 2  # 1 was a folder of safetensors, see format1.py
TABLE = "videos"
LOCK_NAME = "index.lock"
SKIPPED_NAME = "skipped.jsonl"
_KEY = b"bt_adapter"  # of the metadata
_FIELDS = {
    "model": str | None,
    "revision": str | None,
    "fingerprint": str,
    "dtype": str,
    "dim": int,
    "settings": dict,
    "moments": dict | None,
}
COLUMNS = (
    "path", "start", "end", "size", "mtime_ns", "duration", "fps", "width", "height", "total_num_frames", "timestamps",
)  # fmt: skip


def describe_model(source: str | None, revision: str | None, dtype: str) -> str:
    """One line for messages."""
    details = ", ".join(filter(None, (revision and revision[:12], dtype.removeprefix("torch."))))
    return f"{source or 'moving-digits, the model inside the package'} ({details})"


def check_writable(folder: str | os.PathLike) -> None:
    """Make sure, before hours of work, that an index can be written to `folder`. Leaves nothing behind.

    Raises:
        ValueError: the folder holds files of something else, or an index of format 1.
        OSError: it cannot be created or written.
    """
    require_package("lancedb", "search")
    if not os.fspath(folder):
        raise ValueError("the name of the index (-o) is empty.")
    folder = Path(folder).absolute()
    try:
        os.fspath(folder).encode()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if existing.is_dir() or existing != folder:
            with tempfile.TemporaryFile(dir=existing):
                pass
    except UnicodeEncodeError as error:
        raise ValueError(f"the index cannot be written to '{shown(str(folder))}': the name is no text.") from error
    except OSError as error:
        raise OSError(f"the index cannot be written to '{folder}': {error.strerror or error}.") from error
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"'{folder}' is a file; an index is a folder: name another with -o.")
    refuse_inside(folder)
    if folder.is_dir() and not has_table(folder):
        refuse_format1(folder)
        foreign = sorted(path.name for path in folder.iterdir() if not _is_ours(path.name))
        if foreign:
            raise ValueError(f"'{folder}' holds other files ('{foreign[0]}') and no index: name a new folder with -o.")


def refuse_inside(output: str | os.PathLike) -> None:
    """Raise `ValueError` where `output` lies in the folder of an index, which holds its table and nothing else."""
    for parent in Path(output).absolute().parents:
        if has_table(parent):
            raise ValueError(f"'{output}' lies in the index '{parent}', which holds nothing else: name another place.")


def has_table(folder: str | os.PathLike) -> bool:
    """Whether a table has been committed there: one that was being created when its process was killed has none."""
    return any((Path(folder) / f"{TABLE}.lance" / "_versions").glob("*.manifest"))


def refuse_format1(folder: Path) -> None:
    if (Path(folder) / "index.json").is_file():
        raise ValueError(
            f"the index '{folder}' has the format of an older version: `bt-adapter index convert {folder}` makes a "
            "table of it, without encoding anything again."
        )


def open_table(folder: str | os.PathLike) -> tuple["lancedb.table.Table", dict[str, Any]]:
    """The table of an index and what its metadata say.

    Raises:
        FileNotFoundError: there is no index at `folder`.
        ValueError: it is damaged, of another format, or not ours.
    """
    require_package("lancedb", "search")
    import lancedb

    folder = Path(folder)
    if not has_table(folder):
        refuse_format1(folder)
        raise FileNotFoundError(f"'{folder}' holds no index: make one with `bt-adapter index VIDEOS -o {folder}`.")
    with reading(folder):
        table = lancedb.connect(folder).open_table(TABLE)
        metadata = table.schema.metadata or {}
    return table, read_info(folder, metadata)


def read_info(folder: Path, metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    if _KEY not in metadata:
        raise ValueError(
            f"the table in '{folder}' does not say which model made it, so nothing can be compared with it or added "
            "to it: make a new index with -o."
        )
    try:
        info = json.loads(metadata[_KEY])
        version = int(info["format"])
        wrong = [name for name, kind in _FIELDS.items() if name not in info or not isinstance(info[name], kind)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the table in '{folder}' is not a video index ({type(error).__name__} in its metadata)."
        ) from error
    if version > FORMAT:
        raise ValueError(
            f"the index '{folder}' was written by a newer version (format {version}, this one reads {FORMAT}): "
            "upgrade bt_adapter_hf."
        )
    if wrong:
        raise ValueError(f"the index '{folder}' is damaged, it does not say {', '.join(wrong)}: make a new index.")
    return info


def create_table(folder: str | os.PathLike, data: "pa.Table") -> "lancedb.table.Table":
    """A new table with its first rows, all at once."""
    import lancedb

    try:
        with writing(folder):
            return lancedb.connect(Path(folder)).create_table(TABLE, data)
    except OSError:
        if not has_table(Path(folder)):
            shutil.rmtree(Path(folder) / f"{TABLE}.lance", ignore_errors=True)
        raise


def schema(info: Mapping[str, Any]) -> "pa.Schema":
    """Columns of a table for vectors of `info["dim"]` numbers; seconds and bytes, None where a file does not say."""
    import pyarrow as pa

    fields = [
        ("vector", pa.list_(pa.float32(), info["dim"])),
        ("path", pa.string()),
        ("path_bytes", pa.binary()),  # of a name that is no text, which `path` shows escaped
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("duration", pa.float64()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("total_num_frames", pa.int64()),
        ("timestamps", pa.list_(pa.float64())),
    ]
    return pa.schema(fields, metadata={_KEY: json.dumps(dict(info))})


def to_arrow(info: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], vectors: np.ndarray) -> "pa.Table":
    """Rows as the table has them."""
    import pyarrow as pa

    form = schema(info)
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    columns = [pa.FixedSizeListArray.from_arrays(flat, info["dim"])]
    for field in list(form)[1:]:
        if field.name == "path":
            values = [shown(row["path"]) for row in rows]
        elif field.name == "path_bytes":
            values = [None if is_text(row["path"]) else os.fsencode(row["path"]) for row in rows]
        else:
            values = [row.get(field.name) for row in rows]
        columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=form)


def row_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the table says of a moment, as Python has it."""
    return {"path": path_of(found["path"], found.get("path_bytes")), **{name: found[name] for name in COLUMNS[1:]}}


def path_of(text: str, raw: bytes | None) -> str:
    """A path of the table, from its two columns, as Python's `os` has it."""
    return text if raw is None else os.fsdecode(raw)


def is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(path: str) -> str:
    """A path as text: bytes that are none become "\\xe9"."""
    return path if is_text(path) else os.fsencode(path).decode(errors="backslashreplace")


def paths_condition(paths: Sequence[str]) -> str:
    """SQL that holds for the rows of these files."""
    conditions = []
    for state, texts in (("null", True), ("not null", False)):  # a name that is no text may be shown as one that is
        quoted = ", ".join("'" + shown(path).replace("'", "''") + "'" for path in paths if is_text(path) is texts)
        if quoted:
            conditions.append(f"(path in ({quoted}) and path_bytes is {state})")
    return " or ".join(conditions)


@contextmanager
def reading(folder: str | os.PathLike) -> Iterator[None]:
    """What LanceDB says of a table that it cannot read, a panic too, is an error that names the index."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # of several kinds, one of which no module of LanceDB exports
        raise _unusable(folder, "read", error) from error


@contextmanager
def writing(folder: str | os.PathLike) -> Iterator[None]:
    """An error of the disk is an `OSError` that names the index; the table is as it was before."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise _unusable(folder, "written", error) from error


def _unusable(folder: str | os.PathLike, done: str, error: Exception) -> Exception:
    """A disk that fails says so, with the system's number; all else is a file of the table that is damaged or gone."""
    reason = what_lance_says(error)
    if isinstance(error, OSError) or "os error" in str(error):
        return OSError(f"the index '{folder}' could not be {done}: {reason}")
    return ValueError(
        f"the index '{folder}' is damaged ({reason}): put its folder back from a copy, or delete it and index again."
    )


def what_lance_says(error: Exception) -> str:
    """One line, without the places in its source."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r",? (?:/[\w.@-]+)+/[\w.@-]+\.rs:\d+(?::\d+)?", "", text)
    text = re.sub(r"\bLanceError\(\w+\): ", "", text)
    return text.removeprefix("lance error: ").removeprefix("External error: ").removeprefix("Invalid input, ")[:300]


def _is_ours(name: str) -> bool:
    return name in (f"{TABLE}.lance", LOCK_NAME, SKIPPED_NAME) or name.endswith(PARTIAL)
