"""A searchable index of video files: a folder that is complete after every write, whatever interrupts it.

    index.json                provenance: model, revision, fingerprint of the weights, dtype, sampling, preprocessing
    part-00000.safetensors    "features" float32 (n, P), L2-normalised; its metadata holds the n rows as JSON
    skipped.jsonl             the files of the last run that could not be read: {"path", "reason"}

Every file is written under another name and moved into place. A video that has changed since (size or time of
modification) is indexed again: of two rows with one path the later counts.
"""

import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..adapters.writing import PARTIAL, written_whole
from ..import_utils import is_available
from .encoding import EncodedVideo, VideoEncoder, describe_model


FORMAT = 1
PART_ROWS = 1024
FLUSH_SECONDS = 20.0
_RECORDED_PACKAGES = ("bt_adapter_hf", "transformers", "torch", "torchvision", "av")


class IndexMismatchError(ValueError):
    """The index was made with another model, or with other settings, than it is now used with."""


class Hit(NamedTuple):
    """One result. `score` is the cosine of text and video, `row` what the index knows about the file."""

    rank: int
    score: float
    row: dict[str, Any]


@dataclass
class VideoIndex:
    """An index in memory.

    Attributes:
        info: the content of index.json.
        rows: one dict per video: path, size (bytes), mtime_ns, duration (seconds), timestamps (seconds), ...
        features: float32 (rows, P), L2-normalised.
    """

    folder: Path
    info: dict[str, Any]
    rows: list[dict[str, Any]]
    features: np.ndarray

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "VideoIndex":
        """Read an index.

        Raises:
            FileNotFoundError: there is no index at `folder`.
            ValueError: it is empty, damaged, or of a newer format.
        """
        folder = Path(folder)
        info = read_info(folder)
        if info is None:
            raise FileNotFoundError(f"'{folder}' holds no index: make one with `bt-adapter index VIDEOS -o {folder}`.")
        rows, parts = [], []
        for path in _part_paths(folder):
            part_rows, part_features = _read_part(path)
            rows += part_rows
            parts.append(part_features)
        latest = {row["path"]: i for i, row in enumerate(rows)}
        if not latest:
            raise ValueError(f"the index '{folder}' is empty: run `bt-adapter index` again.")
        keep = list(latest.values())
        return cls(folder, info, [rows[i] for i in keep], np.concatenate(parts)[keep])

    def check_model(self, encoder: VideoEncoder) -> None:
        """Raise `IndexMismatchError` unless `encoder` has the weights that made this index."""
        _check_model(self.folder, self.info, encoder)

    def search(self, queries: np.ndarray, k: int = 5) -> list[list[Hit]]:
        """The k nearest videos by cosine, best first, for each query.

        Uses FAISS through `datasets` when both are installed, otherwise a matrix product; the results are the same.

        Args:
            queries: float32 (queries, P), L2-normalised, from `VideoEncoder.encode_texts` or `encode_videos`.
            k: number of hits; fewer come back from a smaller index.
        """
        if k < 1:
            raise ValueError(f"k={k}: expected at least 1.")
        if queries.ndim != 2 or queries.shape[1] != self.features.shape[1]:
            raise ValueError(
                f"queries have shape {queries.shape}; expected (queries, {self.features.shape[1]}), the width of the "
                "index: they must come from the same model."
            )
        k = min(k, len(self.rows))
        nearest = self._nearest_by_faiss if is_available("datasets") and is_available("faiss") else self._nearest
        return [
            [Hit(rank, float(score), self.rows[i]) for rank, (score, i) in enumerate(found, start=1)]
            for found in nearest(np.ascontiguousarray(queries, dtype=np.float32), k)
        ]

    def median_score(self, query: np.ndarray) -> float:
        """Median over all videos of the cosine with `query` (P,): what a video scores that has nothing to do with it,
        as long as most of them have not."""
        return float(np.median(self.features @ query))

    def _nearest(self, queries: np.ndarray, k: int) -> list[list[tuple[float, int]]]:
        scores = queries @ self.features.T  # (queries, rows)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return [[(scores[q, i], i) for i in order[q]] for q in range(len(queries))]

    def _nearest_by_faiss(self, queries: np.ndarray, k: int) -> list[list[tuple[float, int]]]:
        scores, indices = self._faiss_dataset.search_batch("features", queries, k=k)
        return [
            sorted(zip(s, i, strict=True), key=lambda x: (-x[0], x[1])) for s, i in zip(scores, indices, strict=True)
        ]

    @cached_property
    def _faiss_dataset(self):
        import datasets
        import faiss

        dataset = datasets.Dataset.from_dict({"path": [row["path"] for row in self.rows]})
        with _quiet_progress(datasets):
            dataset.add_faiss_index_from_external_arrays(
                self.features, index_name="features", metric_type=faiss.METRIC_INNER_PRODUCT
            )
        return dataset


class IndexWriter:
    """Adds videos to an index folder, new or existing.

    Use as a context manager: what has been added is written every 20 seconds and on leaving, errors and Ctrl-C
    included.

    Raises:
        IndexMismatchError: the folder holds an index of another model or other settings.
        ValueError: the folder holds something else, or a damaged index.
        OSError: it cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, encoder: VideoEncoder):
        self.folder = Path(folder)
        check_writable(self.folder)
        self.info = read_info(self.folder)
        if self.info is None:
            self.info = _new_info(encoder)
        else:
            _check_model(self.folder, self.info, encoder)
            _check_settings(self.folder, self.info, encoder)
        self._known: dict[str, tuple[int, int]] = {}
        self._seen: dict[str, tuple[int, int] | None] = {}  # before decoding, so that a later change is noticed
        self._rows: list[dict[str, Any]] = []  # of the part that is being filled
        self._features: list[np.ndarray] = []
        self._part = 0
        self._skipped: list[dict[str, str]] = []
        self._flushed_at = time.monotonic()
        self._changed = False
        for path in _part_paths(self.folder):
            rows, features = _read_part(path)
            self._known.update((row["path"], (row["size"], row["mtime_ns"])) for row in rows)
            full = len(rows) >= PART_ROWS
            self._part = int(path.stem.removeprefix("part-")) + full
            self._rows, self._features = ([], []) if full else (rows, list(features))

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._flush()
        self._write_skipped()

    @property
    def skipped(self) -> int:
        """Number of files that could not be read."""
        return len(self._skipped)

    def missing(self, paths: Iterable[str]) -> list[str]:
        """Those of `paths` that are not in the index, or have changed in size or time of modification since."""
        states = {path: _file_state(path) for path in paths}
        self._seen.update(states)
        return [path for path, state in states.items() if state is None or self._known.get(path) != state]

    def add(self, video: EncodedVideo) -> None:
        """Add one video, or note its error."""
        if video.error is None:
            state = self._seen.get(video.path) or _file_state(video.path)
            if state is None:
                raise FileNotFoundError(f"'{video.path}' does not exist.")
            size, mtime_ns = state
            self._rows.append({"path": video.path, "size": size, "mtime_ns": mtime_ns, **video.facts})
            self._features.append(video.feature)
            self._known[video.path] = state
            self._changed = True
        else:
            self._skipped.append({"path": video.path, "reason": " ".join(str(video.error).split())})
        if len(self._rows) >= PART_ROWS or time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self._flush()
            self._write_skipped()

    def _flush(self) -> None:
        self._flushed_at = time.monotonic()
        if not self._changed:
            return
        self.info["updated"] = _now()
        # First of all: parts without index.json would be nobody's.
        _write(self.folder / "index.json", (json.dumps(self.info, indent=2) + "\n").encode())
        content = save({"features": np.stack(self._features)}, metadata={"rows": json.dumps(self._rows)})
        _write(self.folder / f"part-{self._part:05d}.safetensors", content)
        self._changed = False
        if len(self._rows) >= PART_ROWS:
            self._rows, self._features = [], []
            self._part += 1

    def _write_skipped(self) -> None:
        path = self.folder / "skipped.jsonl"
        if self._skipped:
            _write(path, "".join(json.dumps(line) + "\n" for line in self._skipped).encode())
        else:
            path.unlink(missing_ok=True)


def check_writable(folder: str | os.PathLike) -> None:
    """Make sure, before hours of work, that an index can be written to `folder`. Leaves nothing behind.

    Raises:
        ValueError: the folder holds files of something else.
        OSError: it cannot be created or written.
    """
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
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' is not the description of a video index: {error}.") from error
    if version != FORMAT:
        raise ValueError(f"the index '{folder}' has format {version}; this version reads {FORMAT}: upgrade.")
    return info


def _new_info(encoder: VideoEncoder) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": encoder.source,
        "revision": encoder.revision,
        "fingerprint": encoder.fingerprint(),
        "dtype": str(encoder.model.dtype).removeprefix("torch."),
        "dim": encoder.model.config.projection_dim,
        "settings": encoder.settings,
        "packages": {name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES},
        "created": _now(),
        "updated": _now(),
    }


def _check_model(folder: Path, info: dict[str, Any], encoder: VideoEncoder) -> None:
    if info["fingerprint"] == encoder.fingerprint():
        return
    made_with = describe_model(info["model"], info["revision"], info["dtype"])
    raise IndexMismatchError(
        f"the index '{folder}' was made with {made_with}; the model now used, {encoder.name}, has other weights, so "
        "the features do not compare. Use the same model, or make a new index."
    )


def _check_settings(folder: Path, info: dict[str, Any], encoder: VideoEncoder) -> None:
    old, new = info["settings"], json.loads(json.dumps(encoder.settings))
    differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if differing:
        values = ", ".join(f"{name}={old.get(name)!r}, now {new.get(name)!r}" for name in differing)
        raise IndexMismatchError(
            f"the index '{folder}' was made with other settings ({values}). Use the same, or make a new index."
        )


def _part_paths(folder: Path) -> list[Path]:
    return sorted(Path(folder).glob("part-*.safetensors"))


def _read_part(path: Path) -> tuple[list[dict[str, Any]], np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            rows, features = json.loads(file.metadata()["rows"]), file.get_tensor("features")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{path}' is damaged ({error}): delete it and run `bt-adapter index` again.") from error
    if len(rows) != len(features):
        raise ValueError(
            f"'{path}' is damaged ({len(rows)} rows, {len(features)} features): delete it and index again."
        )
    return rows, features


def _is_ours(name: str) -> bool:
    return name in ("index.json", "skipped.jsonl") or name.startswith("part-") or name.endswith((PARTIAL, ".tmp"))


def _file_state(path: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write_bytes(content)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _quiet_progress(datasets: Any):
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
