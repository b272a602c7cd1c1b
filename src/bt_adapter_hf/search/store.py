"""The files of an index: a folder that is complete after every write, whatever interrupts it.

    index.json                provenance: model, revision, fingerprint of the weights, dtype, sampling, preprocessing
    part-00000.safetensors    "features" float32 (n, P), L2-normalised; its metadata holds the n rows as JSON
    skipped.jsonl             the files of the last run that could not be read: {"path", "reason"}

Every file is written under another name and moved into place, by one process at a time (index.lock). A video that has
changed since (size or time of modification) is indexed again: of two rows with one path the later counts.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..adapters.writing import PARTIAL, written_whole


FORMAT = 1
LOCK_NAME = "index.lock"
_FIELDS = {
    "model": str | None,
    "revision": str | None,
    "fingerprint": str,
    "dtype": str,
    "dim": int,
    "settings": dict,
}


def check_writable(folder: str | os.PathLike) -> None:
    """Make sure, before hours of work, that an index can be written to `folder`. Leaves nothing behind.

    Raises:
        ValueError: the folder holds files of something else.
        OSError: it cannot be created or written.
    """
    if not os.fspath(folder):
        raise ValueError("the name of the index (-o) is empty.")
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"'{folder}' is a file; an index is a folder: name another with -o.")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"the index cannot be written to '{folder}': {error.strerror or error}.") from error
    if folder.is_dir() and not (folder / "index.json").is_file():
        foreign = sorted(path.name for path in folder.iterdir() if not _is_ours(path.name))
        if foreign:
            raise ValueError(f"'{folder}' holds other files ('{foreign[0]}') and no index: name a new folder with -o.")


def read_info(folder: Path) -> dict[str, Any] | None:
    """The content of index.json, or None where there is none."""
    path = Path(folder) / "index.json"
    if not path.is_file():
        return None
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        version = info["format"]
        wrong = [name for name, kind in _FIELDS.items() if name not in info or not isinstance(info[name], kind)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' is not the description of a video index: {error}.") from error
    if version != FORMAT:
        raise ValueError(f"the index '{folder}' has format {version}; this version reads {FORMAT}: upgrade.")
    if wrong:
        raise ValueError(f"'{path}' is damaged, it does not say {', '.join(wrong)}: make a new index.")
    return info


def part_path(folder: Path, number: int) -> Path:
    """Where a part is, or will be."""
    return folder / f"part-{number:05d}.safetensors"


def part_paths(folder: Path) -> list[Path]:
    """Those that are there, in order."""
    return sorted(Path(folder).glob("part-" + "[0-9]" * 5 + ".safetensors"))


def read_part(path: Path, dim: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Rows and features (n, dim) of a part; ValueError if it is damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            rows, features = json.loads(file.metadata()["rows"]), file.get_tensor("features")
        _ = [(row["path"], row["size"], row["mtime_ns"]) for row in rows]
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"'{path}' is damaged ({error}): delete it and run `bt-adapter index` again.") from error
    if features.shape != (len(rows), dim):
        raise ValueError(
            f"'{path}' is damaged ({len(rows)} rows, features {features.shape}, {dim} wide expected): delete it and "
            "run `bt-adapter index` again."
        )
    return rows, features


def write_part(path: Path, rows: list[dict[str, Any]], features: Sequence[np.ndarray]) -> None:
    """Writes a part at once; one without rows is deleted."""
    if rows:
        write_file(path, save({"features": np.stack(features)}, metadata={"rows": json.dumps(rows)}))
    else:
        path.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file at once or not at all."""
    with written_whole(path) as file:
        file.write_bytes(content)


def _is_ours(name: str) -> bool:
    ours = name in ("index.json", LOCK_NAME, "skipped.jsonl") or name.startswith("part-")
    return ours or name.endswith((PARTIAL, ".tmp"))
