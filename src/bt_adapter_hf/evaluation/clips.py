"""Rows of tables as clips of an evaluation, and what of model and table goes into its protocol."""

import os
from collections.abc import Iterator
from typing import Any, TypeVar

from .. import __version__
from ..data.broken import BrokenItem
from ..data.files import identity
from ..data.sources import PairTable
from ..search.encoding import VideoEncoder
from .features import Clip, ClipFeatures


Values = TypeVar("Values")


class TableShard:
    """The clips of one shard of a table, read anew each time that it is iterated over."""

    def __init__(self, table: PairTable, shard: int, item_timeout: float | None):
        self.table, self.shard, self.item_timeout = table, shard, item_timeout
        self.first_row = sum(table.shard_rows[:shard])

    def __iter__(self) -> Iterator[Clip]:
        for index, record in self.table.records(self.shard, self.item_timeout):
            row = self.first_row + index
            name, info = record.name or f"row {row}", {"texts": record.texts}
            state = identity(record.video) if isinstance(record.video, str) and os.path.isfile(record.video) else None
            yield Clip(row, name, record.video, info, record.problem, state)


def describe_encoder(encoder: VideoEncoder) -> dict[str, Any]:
    """Which model makes the features, from how many frames, and how they are prepared."""
    return {
        "model": encoder.name,
        "model_fingerprint": encoder.fingerprint(),
        "video_processor": encoder.settings,
        "bt_adapter_hf": __version__,
    }


def describe_table(table: PairTable) -> dict[str, Any]:
    """Which rows, at which state."""
    return {"data": table.source, "data_fingerprint": table.fingerprint, "data_revision": table.revision}


def broken_rows(source: str, features: ClipFeatures) -> list[BrokenItem]:
    """The rows without features."""
    return [
        BrokenItem(source=source, index=row, video=name, reason=reason)
        for row, (name, reason) in sorted(features.failed.items())
    ]


def draws_of(values: dict[str, Values], condition: str) -> list[Values]:
    """The values under a condition of `encode_clips`; of the control "shuffled" those of every draw."""
    if condition != "shuffled":
        return [values[condition]]
    return [value for name, value in values.items() if name.startswith("shuffled_")]
