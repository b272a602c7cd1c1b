"""The rows of an evaluation, of a table or of a list, and what of model and data goes into its protocol."""

import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .. import __version__
from ..data.broken import BrokenItem, broken_item
from ..data.files import identity
from ..data.media import Media
from ..data.readers import Record, digest
from ..data.sources import PairTable
from ..search.encoding import VideoEncoder
from .features import Clip, ClipFeatures


Values = TypeVar("Values")


class TableClips:
    """The rows of a (video, text) table."""

    def __init__(self, table: PairTable):
        self.table, self.source = table, table.source

    def __len__(self) -> int:
        return len(self.table)

    def shards(self, item_timeout: float | None) -> list[Iterable[Clip]]:
        """The rows, shard by shard."""
        return [_TableShard(self.table, shard, item_timeout) for shard in range(len(self.table.shard_rows))]

    def describe(self) -> dict[str, Any]:
        """Which rows, at which state."""
        return {
            "data": self.source,
            "data_fingerprint": self.table.fingerprint,
            "data_revision": self.table.revision,
        }


class _TableShard:
    """The clips of one shard of a table, read anew each time that it is iterated over."""

    def __init__(self, table: PairTable, shard: int, item_timeout: float | None):
        self.table, self.shard, self.item_timeout = table, shard, item_timeout
        self.first_row = sum(table.shard_rows[:shard])

    def __iter__(self) -> Iterator[Clip]:
        for index, record in self.table.records(self.shard, self.item_timeout):
            row = self.first_row + index
            name, info = record.name or f"row {row}", {"texts": record.texts}
            yield Clip(row, name, record.video, info, record.problem, _state_of(record.video))


@dataclass(frozen=True)
class ListedClip:
    """One clip of a benchmark.

    Attributes:
        media: where its file lies.
        paths: of the file in there; the first one that exists is taken.
        texts: what it shows, where the benchmark has captions.
        backwards: the clip is the file played backwards.
        span: the clip is this part of the file, in seconds.
    """

    media: Media
    paths: tuple[str, ...]
    texts: tuple[str, ...] = ()
    backwards: bool = False
    span: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """Of the clip, which the same file may show in several ways."""
        span = "" if self.span is None else f" from {self.span[0]:g} to {self.span[1]:g} s"
        return self.paths[0] + span + (" backwards" if self.backwards else "")


class ListedClips:
    """Clips that a benchmark lists, in the place of a table.

    Args:
        source: for messages and results.
        clips: row by row.
        revision: commit of a dataset on the Hub.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, source: str, clips: Sequence[ListedClip], revision: str | None = None):
        if not clips:
            raise ValueError(f"{source} lists no clips.")
        self.source, self.clips, self.revision = source, list(clips), revision

    def __len__(self) -> int:
        return len(self.clips)

    def __iter__(self) -> Iterator[Clip]:
        for row, clip in enumerate(self.clips):
            record = _open(clip)
            state = _state_of(record.video)
            info = {"texts": list(clip.texts)}
            yield Clip(row, clip.name, record.video, info, record.problem, state, clip.backwards, clip.span)

    def shards(self, item_timeout: float | None) -> list[Iterable[Clip]]:
        """All rows, as one shard."""
        return [self]

    def describe(self) -> dict[str, Any]:
        """Which rows, at which state."""
        rows = digest(*([clip.name, clip.texts] for clip in self.clips))
        return {"data": self.source, "data_fingerprint": rows, "data_revision": self.revision}


Clips = TableClips | ListedClips


def as_clips(rows: PairTable | Clips) -> Clips:
    """Rows of any kind as clips."""
    return TableClips(rows) if isinstance(rows, PairTable) else rows


def _open(clip: ListedClip) -> Record:
    """The file under the first of its names that exists."""
    first = None
    for path in clip.paths:
        record = clip.media.record(Record(None, path, []))
        if isinstance(record.video, str) and not os.path.exists(record.video):
            record = record._replace(problem=f"{record.video} does not exist.", video=None)
        if record.problem is None:
            return record
        first = first or record
    return first


def _state_of(video: str | bytes | None) -> str | None:
    return identity(video) if isinstance(video, str) and os.path.isfile(video) else None


def describe_encoder(encoder: VideoEncoder) -> dict[str, Any]:
    """Which model makes the features, from how many frames, and how they are prepared."""
    return {
        "model": encoder.name,
        "model_fingerprint": encoder.fingerprint(),
        "video_processor": encoder.settings,
        "bt_adapter_hf": __version__,
    }


def broken_rows(source: str, features: ClipFeatures) -> list[BrokenItem]:
    """The rows without features."""
    return [broken_item(source, row, name, reason) for row, (name, reason) in sorted(features.failed.items())]


def repeated(rows: Sequence[Hashable]) -> dict[str, int]:
    """How many rows say again what another one says, for the items of a result; nothing where none does."""
    count = len(rows) - len(set(rows))
    return {"rows that are there again": count} if count else {}


def draws_of(values: dict[str, Values], condition: str) -> list[Values]:
    """The values under a condition of `encode_clips`; of the control "shuffled" those of every draw."""
    if condition != "shuffled":
        return [values[condition]]
    return [value for name, value in values.items() if name.startswith("shuffled_")]
