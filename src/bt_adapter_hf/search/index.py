"""A searchable index of video files: what it finds, and how it is brought up to date."""

import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from ..adapters.writing import PARTIAL
from .encoding import EncodedVideo, VideoEncoder, describe_model
from .files import file_identity, first_names, roots
from .store import (
    FORMAT,
    LOCK_NAME,
    check_writable,
    part_path,
    part_paths,
    read_info,
    read_part,
    write_file,
    write_part,
)


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
        for path in part_paths(folder):
            part_rows, part_features = read_part(path, info["dim"])
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
        scores = queries @ self.features.T  # (queries, rows)
        nearest = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return [
            [Hit(rank, float(of_query[i]), self.rows[i]) for rank, i in enumerate(found, start=1)]
            for of_query, found in zip(scores, nearest, strict=True)
        ]

    def median_score(self, query: np.ndarray) -> float:
        """Median over all videos of the cosine with `query` (P,): what a video scores that has nothing to do with it,
        as long as most of them have not."""
        return float(np.median(self.features @ query))


class Update(NamedTuple):
    """What a run did: numbers of videos, and of those that could not be read a line {"path", "reason"} each."""

    added: int
    present: int
    gone: int
    skipped: list[dict[str, str]]


class IndexWriter:
    """Brings an index folder, new or existing, up to date.

    A context manager: what has been added is written every 20 seconds and on leaving, errors and Ctrl-C included. Only
    one at a time has a folder.

    Raises:
        IndexMismatchError: the folder holds an index of another model or other settings.
        ValueError: the folder holds something else, or a damaged index.
        OSError: it cannot be written, or another process writes it.
    """

    def __init__(self, folder: str | os.PathLike, encoder: VideoEncoder):
        self.folder, self.encoder = Path(folder), encoder
        self.skipped: list[dict[str, str]] = []
        self._known: dict[str, tuple[int, int]] = {}
        self._seen: dict[str, tuple[int, int] | None] = {}  # before decoding, so that a later change is noticed
        self._rows: list[dict[str, Any]] = []  # of the part that is being filled
        self._features: list[np.ndarray] = []
        self._part = 0
        self._flushed_at = time.monotonic()
        self._changed = False
        check_writable(self.folder)

    def __enter__(self) -> "IndexWriter":
        self._made_folder = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / LOCK_NAME, timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise OSError(
                f"another process is writing the index '{self.folder}': wait until it has ended, or name another "
                "folder with -o."
            ) from error
        try:
            self._read()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            with self.encoder.stopwatch("write"):
                self._flush()
                self._write_skipped()
        finally:
            self._unlock()

    def update(
        self,
        paths: Sequence[str],
        inputs: Sequence[str | os.PathLike] = (),
        *,
        batch_size: int = 8,
        workers: int | None = None,
        progress: Callable[[Iterable, int], Iterable] = lambda videos, total: videos,
    ) -> Update:
        """Adds the videos that the index lacks, and takes out those that are gone.

        Args:
            paths: of [`find_videos`].
            inputs: of [`find_videos`]; what is in the index and lay there, and is no longer on the disk, is taken out.
            batch_size, workers: of [`VideoEncoder.encode_videos`].
            progress: what goes over the videos, given them and their number, such as a progress bar.
        """
        folders = roots(inputs)
        gone = {path for path in self._known if not os.path.exists(path) and _is_under(path, folders)}
        self._take_out(gone)
        missing = self.missing(paths)
        videos = self.encoder.encode_videos(missing, batch_size=batch_size, workers=workers)
        before = len(self.skipped)
        for video in progress(videos, len(missing)):
            self.add(video)
        skipped = self.skipped[before:]
        return Update(len(missing) - len(skipped), len(self._seen) - len(missing), len(gone), skipped)

    def missing(self, paths: Iterable[str]) -> list[str]:
        """Those of `paths` that are not in the index, or have changed in size or time of modification since.

        A file that the index knows by another name is not missing.
        """
        known = first_names(self._known)
        names = (known.get(file_identity(path), path) for path in paths)
        self._seen = {path: _file_state(path) for path in names}
        return [path for path, state in self._seen.items() if state is None or self._known.get(path) != state]

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
            self.skipped.append({"path": video.path, "reason": " ".join(str(video.error).split())})
        if len(self._rows) >= PART_ROWS or time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            with self.encoder.stopwatch("write"):
                self._flush()
                self._write_skipped()

    def _read(self) -> None:
        for left in self.folder.glob(f".*{PARTIAL}"):  # by a process that was killed
            left.unlink()
        self.info = read_info(self.folder)
        if self.info is None:
            self.info = _new_info(self.encoder)
        else:
            _check_model(self.folder, self.info, self.encoder)
            _check_settings(self.folder, self.info, self.encoder)
        for path in part_paths(self.folder):
            rows, features = read_part(path, self.info["dim"])
            self._known.update((row["path"], (row["size"], row["mtime_ns"])) for row in rows)
            full = len(rows) >= PART_ROWS
            self._part = int(path.stem.removeprefix("part-")) + full
            self._rows, self._features = ([], []) if full else (rows, list(features))

    def _take_out(self, gone: set[str]) -> None:
        """Rewrites the parts with rows of these paths; the one that is being filled follows with the next flush."""
        if not gone:
            return
        current = part_path(self.folder, self._part)
        for path in part_paths(self.folder):
            rows, features = read_part(path, self.info["dim"])
            kept = [i for i, row in enumerate(rows) if row["path"] not in gone]
            if len(kept) == len(rows):
                continue
            rows, features = [rows[i] for i in kept], [features[i] for i in kept]
            if path == current:
                self._rows, self._features, self._changed = rows, features, True
            else:
                write_part(path, rows, features)
        for path in gone:
            del self._known[path]

    def _flush(self) -> None:
        self._flushed_at = time.monotonic()
        if not self._changed:
            return
        self.info["updated"] = _now()
        # First of all: parts without index.json would be nobody's.
        write_file(self.folder / "index.json", (json.dumps(self.info, indent=2) + "\n").encode())
        write_part(part_path(self.folder, self._part), self._rows, self._features)
        self._changed = False
        if len(self._rows) >= PART_ROWS:
            self._rows, self._features = [], []
            self._part += 1

    def _write_skipped(self) -> None:
        path = self.folder / "skipped.jsonl"
        if self.skipped:
            write_file(path, "".join(json.dumps(line) + "\n" for line in self.skipped).encode())
        else:
            path.unlink(missing_ok=True)

    def _unlock(self) -> None:
        Path(self._lock.lock_file).unlink(missing_ok=True)  # while it is held: FileLock sees that it is gone
        self._lock.release()
        if self._made_folder and not any(self.folder.iterdir()):
            self.folder.rmdir()


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


def _is_under(path: str, folders: list[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _file_state(path: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
