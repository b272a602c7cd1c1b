"""The encoder for data pipelines: batches of paths in, rows of an index out, wherever it is called."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .encoding import VideoEncoder
from .moments import Windows
from .table import COLUMNS
from .windows import encode_moments
from .writer import IndexWriter, file_state, rows_of


class EncodeVideos:
    """A callable class for Ray Data's `map_batches`, `datasets.map` and the like.

    It loads its model when it is first called, on the worker, and gives one row per moment, or per video without
    `windows`; a file that cannot be read gives one row with its `reason` and no vector. A call stands for itself:
    called twice for one batch, as after a worker was lost, it gives the same rows.

        rows = ray.data.from_items([{"path": path} for path in paths]).map_batches(
            EncodeVideos, fn_constructor_kwargs={"model": "org/my-model"}, num_gpus=1, batch_size=16,
            compute=ray.data.ActorPoolStrategy(size=4),
        )

    Args:
        model: as of `VideoEncoder.from_pretrained`, and so are `options`.
        windows: window and stride in seconds, for moments.
        column: of the batch, which holds the paths.

    Raises:
        OSError: when it is called, on a worker that cannot read the model.
    """

    def __init__(
        self,
        model: str | None = None,
        windows: tuple[float, float] | None = None,
        column: str = "path",
        workers: int | None = None,
        **options: Any,
    ):
        self.model, self.options, self.column, self.workers = model, options, column, workers
        self.windows = None if windows is None else Windows(*windows)
        self._encoder: VideoEncoder | None = None

    @property
    def encoder(self) -> VideoEncoder:
        if self._encoder is None:
            try:
                self._encoder = VideoEncoder.from_pretrained(self.model, **self.options)
            except OSError as error:
                raise OSError(
                    f"the worker on {platform.node()} has no model '{self.model}': a folder has to be on a disk that "
                    f"every worker sees, a name on the Hub has to be within its reach. ({error})"
                ) from error
        return self._encoder

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_encoder": None}  # a worker loads its own

    def __call__(self, batch: Mapping[str, Sequence]) -> dict[str, list]:
        paths = [str(path) for path in batch[self.column]]
        states = {path: file_state(path) for path in paths}  # before decoding, so that a later change is noticed
        if self.windows is None:
            encoded = self.encoder.encode_videos(paths, batch_size=max(1, len(paths)), workers=self.workers)
        else:
            encoded = encode_moments(self.encoder, paths, self.windows, workers=self.workers)
        columns: dict[str, list] = {name: [] for name in ("vector", *COLUMNS, "reason")}
        for video in encoded:
            if video.error is not None or states[video.path] is None:
                reason = " ".join(str(video.error or "it vanished").split())
                rows, features = [{"path": video.path, "reason": reason}], [None]
            else:
                rows, features = rows_of(video)
            size, mtime_ns = states[video.path] or (None, None)
            for row, feature in zip(rows, features, strict=True):
                row = {**row, "vector": feature, "size": size, "mtime_ns": mtime_ns}
                for name, values in columns.items():
                    values.append(row.get(name))
        return columns


def write_rows(writer: IndexWriter, batch: Mapping[str, Sequence]) -> None:
    """Puts what `EncodeVideos` gave, in the process that holds the index open: one writer, whatever encoded it."""
    names = list(batch)
    by_path: dict[str, list[dict[str, Any]]] = {}
    for values in zip(*(batch[name] for name in names), strict=True):
        row = {name: _plain(value) for name, value in zip(names, values, strict=True)}
        by_path.setdefault(row["path"], []).append(row)
    for path, rows in by_path.items():
        if rows[0].get("reason"):
            writer.skip(path, rows[0]["reason"], gone=rows[0].get("size") is None)
        else:
            writer.add_rows(rows, np.stack([np.asarray(row.pop("vector"), np.float32) for row in rows]))


def _plain(value: Any) -> Any:
    """A number of Python for one of numpy, None for what a table has no number for."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and value != value else value
