"""Bringing an index up to date: what is new is added, what has changed is replaced, what is gone is taken out."""

import importlib.metadata
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from ..adapters.writing import PARTIAL, printable, without_name, written_whole
from ..models.video_errors import VideoNotFoundError
from .encoding import EncodedVideo, VideoEncoder
from .files import file_identity, first_names, roots
from .index import check_model, check_same
from .moments import Windows
from .ranks import encode_together
from .table import (
    FORMAT,
    LOCK_NAME,
    SKIPPED_NAME,
    check_writable,
    create_table,
    has_table,
    open_table,
    path_of,
    paths_condition,
    reading,
    to_arrow,
    writing,
)
from .windows import EncodedMoments, encode_moments


FLUSH_SECONDS = 20.0
FLUSH_ROWS = 4096
_RECORDED_PACKAGES = ("bt_adapter_hf", "transformers", "torch", "torchvision", "av", "lancedb")


class Update(NamedTuple):
    """What a run did: numbers of videos, and of those that could not be read a line {"path", "reason"} each.

    Attributes:
        gone: files of the index that are no longer there.
        pruned: how many of these were taken out.
    """

    added: int
    present: int
    gone: int
    pruned: int
    skipped: list[dict[str, str]]


@contextmanager
def locked(folder: str | os.PathLike):
    """The folder of an index, made where there is none, for one writer at a time.

    Raises:
        OSError: another process writes it.
    """
    folder = Path(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OSError(
            f"another process is writing the index '{folder}': wait until it has ended, or name another folder with "
            "-o."
        ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: FileLock sees that it is gone
        lock.release()
        if made and not any(folder.iterdir()):
            folder.rmdir()


class IndexWriter:
    """Brings an index folder, new or existing, up to date.

    A context manager: what has been added is written every 20 seconds and on leaving, errors and Ctrl-C included. Only
    one at a time has a folder.

    Args:
        windows: cut videos into moments; None for one row per video.

    Raises:
        IndexMismatchError: the folder holds an index of another model or other settings.
        ValueError: the folder holds something else, or a damaged index.
        OSError: it cannot be written, or another process writes it.
    """

    def __init__(self, folder: str | os.PathLike, encoder: VideoEncoder, windows: Windows | None = None):
        self.folder, self.encoder, self.windows = Path(folder), encoder, windows
        self.skipped: list[dict[str, str]] = []
        self.table = None
        self._known: dict[str, tuple[int, int]] = {}
        self._seen: dict[str, tuple[int, int] | None] = {}  # before decoding, so that a later change is noticed
        self._rows: list[dict[str, Any]] = []  # not yet written
        self._features: list[np.ndarray] = []
        self._replaced: set[str] = set()  # of files whose old rows go with the next write
        self._flushed_at = time.monotonic()
        check_writable(self.folder)

    def __enter__(self) -> "IndexWriter":
        self._lock = locked(self.folder)
        self._lock.__enter__()
        try:
            self._open()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            with self.encoder.stopwatch("write"):
                self._flush()
                write_skipped(self.folder, self.skipped)
        finally:
            self._lock.__exit__(None, None, None)

    def update(
        self,
        paths: Sequence[str],
        inputs: Sequence[str | os.PathLike] = (),
        *,
        prune: bool = False,
        force: bool = False,
        together: bool = False,
        batch_size: int = 8,
        workers: int | None = None,
        progress: Callable[[Iterable, int], Iterable] = lambda videos, total: videos,
    ) -> Update:
        """Adds the videos that the index lacks and replaces those that have changed.

        Args:
            paths: of [`find_videos`].
            inputs: of [`find_videos`]; None of them means everywhere for `prune`.
            prune: take out what lay there and is no longer on the disk. Until then a search marks it.
            force: of [`prune`].
            together: the other processes of torchrun call [`encode_together`], too, and encode their parts.
            batch_size, workers: of [`VideoEncoder.encode_videos`].
            progress: what goes over the videos, given them and their number, such as a progress bar.
        """
        folders = roots(inputs)
        gone = {path for path in self._known if not os.path.exists(path) and _is_under(path, folders)}
        if prune:
            if not force:
                refuse_unmounted(gone, self._known.keys() - gone)
            self.take_out(gone)
        missing = self.missing(paths)
        before = len(self.skipped)
        spread = encode_together if together else lambda paths, encode: encode(paths)
        videos = spread(missing, lambda part: encode_by(self.windows, self.encoder, part, batch_size, workers))
        for video in progress(videos, len(missing)):
            self.add(video)
        skipped = self.skipped[before:]
        present = len(self._seen) - len(missing)
        return Update(len(missing) - len(skipped), present, len(gone), len(gone) if prune else 0, skipped)

    def missing(self, paths: Iterable[str]) -> list[str]:
        """Those of `paths` that are not in the index, or have changed in size or time of modification since.

        A file that the index knows by another name is not missing.
        """
        known = first_names(self._known)
        names = (known.get(file_identity(path), path) for path in paths)
        self._seen = {path: file_state(path) for path in names}
        return [path for path, state in self._seen.items() if state is None or self._known.get(path) != state]

    def add(self, video: EncodedVideo | EncodedMoments) -> None:
        """Add one video, all its moments at once, or note its error. Either takes the place of what was there."""
        if video.error is not None:
            self.skip(video.path, str(video.error), gone=isinstance(video.error, VideoNotFoundError))
            return
        state = self._seen.get(video.path) or file_state(video.path)
        if state is None:
            raise FileNotFoundError(f"'{video.path}' does not exist.")
        rows, features = rows_of(video)
        self.add_rows([{**row, "size": state[0], "mtime_ns": state[1]} for row in rows], features)

    def add_rows(self, rows: Sequence[dict[str, Any]], features: np.ndarray) -> None:
        """Add rows that are as the table has them, all those of a file in one call."""
        again = {row["path"] for row in rows} & self._known.keys()
        if again:
            self._replaced |= again
            kept = [i for i, row in enumerate(self._rows) if row["path"] not in again]  # of those not yet written
            self._rows, self._features = [self._rows[i] for i in kept], [self._features[i] for i in kept]
        self._known.update((row["path"], (row["size"], row["mtime_ns"])) for row in rows)
        self._rows += rows
        self._features += list(features)
        self._flush_in_time()

    def skip(self, path: str, reason: str, gone: bool = False) -> None:
        """Note why a file has no rows. If it had some they go, for they are of what it was; not if only it is gone."""
        self.skipped.append({"path": path, "reason": without_name(" ".join(reason.split()), path)})
        if not gone and path in self._known:
            self._replaced.add(path)
            del self._known[path]
        self._flush_in_time()

    def take_out(self, gone: Iterable[str]) -> None:
        """Take out all rows of these files."""
        gone = sorted(gone)
        if gone:
            self._flush()
            delete_files(self.table, self.folder, gone)
            for path in gone:
                del self._known[path]

    def _open(self) -> None:
        for left in self.folder.glob(f".*{PARTIAL}"):  # by a process that was killed
            left.unlink()
        self.info = new_info(self.encoder, self.windows)
        if not has_table(self.folder):
            return
        self.table, found = open_table(self.folder)
        check_model(self.folder, found, self.encoder)
        check_same(self.folder, found, json.loads(json.dumps(self.info)))
        self.info = found
        self._known = known_files(self.table, self.folder)

    def _flush_in_time(self) -> None:
        if len(self._rows) >= FLUSH_ROWS or time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            with self.encoder.stopwatch("write"):
                self._flush()
                write_skipped(self.folder, self.skipped)

    def _flush(self) -> None:
        """One transaction: of a file that has changed the new rows come as the old ones go."""
        self._flushed_at = time.monotonic()
        rows, replaced = self._rows, sorted(self._replaced)
        if rows:
            data = to_arrow(self.info, rows, np.stack(self._features))
            if self.table is None:
                self.table = create_table(self.folder, data)
            else:
                replace_rows(self.table, self.folder, data, replaced)
        elif replaced and self.table is not None:
            with writing(self.folder):
                self.table.delete(paths_condition(replaced))
        self._rows, self._features, self._replaced = [], [], set()


def encode_by(
    windows: Windows | None,
    encoder: VideoEncoder,
    paths: Sequence[str],
    batch_size: int = 8,
    workers: int | None = None,
) -> Iterable[EncodedVideo | EncodedMoments]:
    """Videos as an index of these windows takes them, in order; None for one row per video."""
    if windows is None:
        return encoder.encode_videos(paths, batch_size=batch_size, workers=workers)
    return encode_moments(encoder, paths, windows, batch_size=batch_size, workers=workers)


def replace_rows(table, folder: str | os.PathLike, data, replaced: Sequence[str]) -> None:
    """Adds rows, and takes out the other ones of the files `replaced`."""
    with writing(folder):
        if not replaced:
            table.add(data)
            return
        merge = table.merge_insert(["path", "start"]).when_matched_update_all().when_not_matched_insert_all()
        merge.when_not_matched_by_source_delete(paths_condition(replaced)).execute(data)


def prune(folder: str | os.PathLike, force: bool = False) -> int:
    """Takes the files that are gone out of an index; returns how many.

    Args:
        force: also where nothing at all is left of what the index knows of a folder.

    Raises:
        ValueError: nothing is left in a folder, which may only be away.
    """
    with locked(folder):
        table, _ = open_table(folder)
        known = known_files(table, folder).keys()
        gone = {path for path in known if not os.path.exists(path)}
        if not force:
            refuse_unmounted(gone, known - gone)
        delete_files(table, folder, sorted(gone))
        return len(gone)


def refuse_unmounted(gone: Iterable[str], there: Iterable[str]) -> None:
    """Raise `ValueError` where no file of the index is left in a folder: a disk that is not mounted looks so, too."""
    alive = {str(parent) for path in there for parent in Path(path).parents}
    folders = Counter(existing_parent(path) for path in gone)
    for folder, count in sorted(folders.items()):
        if folder not in alive:
            missing = sorted(path for path in gone if existing_parent(path) == folder)[0]
            raise ValueError(
                f"nothing that the index knows is left under '{printable(folder)}' ({count} gone, the first is "
                f"'{printable(missing)}'): if a disk is not mounted, mount it; if they are gone for good, add --force."
            )


def existing_parent(path: str) -> str:
    """The nearest folder above a path that is there."""
    return next(str(parent) for parent in Path(path).parents if parent.is_dir())


def delete_files(table, folder: str | os.PathLike, gone: Sequence[str]) -> None:
    for start in range(0, len(gone), 1000):  # a condition of bounded length
        with writing(folder):
            table.delete(paths_condition(gone[start : start + 1000]))


def known_files(table, folder: str | os.PathLike) -> dict[str, tuple[int, int]]:
    """Size and time of modification of each file in a table."""
    names = ["path", "path_bytes", "size", "mtime_ns"]
    known = {}
    with reading(folder):
        for batch in table.search().select(names).limit(max(1, table.count_rows())).to_batches():
            for path, raw, size, mtime_ns in zip(*(batch[name].to_pylist() for name in names), strict=True):
                known[path_of(path, raw)] = (size, mtime_ns)
    return known


def rows_of(video: EncodedVideo | EncodedMoments) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Rows of one video, without the state of its file, and their vectors; a whole video is one moment."""
    if isinstance(video, EncodedVideo):
        row = {"path": video.path, "start": 0.0, "end": video.facts["duration"], **video.facts}
        return [row], video.feature[None]
    rows = [{"path": video.path, **video.facts, **moment._asdict()} for moment in video.moments]
    return rows, video.features


def new_info(encoder: VideoEncoder, windows: Windows | None) -> dict[str, Any]:
    """What the metadata of a new table say."""
    return {
        "format": FORMAT,
        "model": encoder.source,
        "revision": encoder.revision,
        **encoder.fingerprints(),
        "dtype": str(encoder.model.dtype).removeprefix("torch."),
        "dim": encoder.model.config.projection_dim,
        "settings": encoder.settings,
        "moments": None if windows is None else {"window": windows.window, "stride": windows.stride},
        "packages": {name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_skipped(folder: Path, skipped: Sequence[dict[str, str]]) -> None:
    path = folder / SKIPPED_NAME
    if skipped:
        with written_whole(path) as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in skipped), encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


def file_state(path: str) -> tuple[int, int] | None:
    """Size and time of modification; None where there is no file."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _is_under(path: str, folders: list[str]) -> bool:
    return not folders or any(Path(path).is_relative_to(folder) for folder in folders)
