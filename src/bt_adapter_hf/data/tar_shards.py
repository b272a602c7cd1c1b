"""WebDataset tars."""

import json
import logging
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from ..adapters.writing import no_character, printable, written_whole
from ..models.video_errors import MAX_BYTES, sentence
from .archives import TarMember, read_range, scan_tar, too_large
from .files import PEEK_BYTES, FoundFiles, identity, is_remote, open_file, parsed_json
from .readers import (
    TEXT_COLUMNS,
    ColumnError,
    Reader,
    Record,
    RowReader,
    ShardReader,
    clean_texts,
    digest,
    in_threads,
    slices,
)


if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

VIDEO_MEMBERS = ("mp4", "webm", "mkv", "avi", "mov", "m4v", "gif")
TEXT_MEMBERS = ("txt", "text", "caption")


class TarShards(Reader):
    """Slices of WebDataset tars: consecutive members with the same name up to the first dot are one sample.

    Where that finds no video, as with `abc_12.500_20.250.mp4`, names are cut at the last dot, if all have one then.

    Where a sample's video and text lie is known from the headers, so that only these are read.
    """

    @staticmethod
    def of(files: FoundFiles, video_column: str | None, text_column: str | None) -> "TarShards":
        """Count the samples."""
        import pyarrow as pa

        started = time.monotonic()
        tars, endings = [], set()
        for number, members in enumerate(in_threads(_tar_members, files.paths)):
            samples = list(_samples(members, video_column, text_column))
            endings.update(_split_member(name)[1] for name, _, _ in members)
            tar = pa.table({"tar": pa.array([number] * len(samples), pa.int32()), **_columns(_TarSample, samples)})
            tars += [tar.slice(rows.start, len(rows)) for rows in slices(len(tar))]
            if time.monotonic() - started > 10:
                logger.warning("Counted the samples of %d of %d tar files", number + 1, len(files.paths))
                started = time.monotonic()
        if not tars:
            raise ValueError("its tars hold no files")
        samples, shard_rows = pa.concat_tables(tars).combine_chunks(), [len(tar) for tar in tars]
        for kind, sizes, wanted, defaults in (
            ("video", "video_size", video_column, VIDEO_MEMBERS),
            ("text", "text_size", text_column, (*TEXT_MEMBERS, "json")),
        ):
            if not (samples[sizes].to_numpy() >= 0).any():
                raise ColumnError(
                    f"has no {kind} members: looked for {repr(wanted) if wanted else ', '.join(defaults)}, found "
                    f"members ending in {_some(sorted(endings))} (what follows the first dot). Name one with "
                    f"{kind}_column."
                )
        tar_class = RemoteTars if any(is_remote(path) for path in files.paths) else LocalTars
        return tar_class(files.paths, samples, shard_rows, text_column)

    def __init__(self, paths: list[str], samples: "pyarrow.Table", shard_rows: list[int], text_column: str | None):
        self.paths, self.samples, self.shard_rows, self.text_column = paths, samples, shard_rows, text_column
        self.starts = np.cumsum([0, *shard_rows])
        self.fingerprint = digest(text_column, *(batch.to_pydict() for batch in samples.to_batches(10_000)))

    def _sample(self, shard: int, index: int) -> tuple[str, "_TarSample"]:
        tar, *sample = self.samples.slice(int(self.starts[shard]) + index, 1).to_pylist()[0].values()
        return self.paths[tar], _TarSample(*sample)

    def _record(self, file: BinaryIO, sample: "_TarSample") -> Record:
        # in the order in which they lie in the file, for the sake of reading ahead
        parts = {"video": (sample.video_offset, sample.video_size), "text": (sample.text_offset, sample.text_size)}
        data = {
            part: read_range(file, offset, size) if 0 <= size <= MAX_BYTES else None
            for part, (offset, size) in sorted(parts.items(), key=lambda item: item[1])
        }
        texts = self._texts(data["text"], sample)
        if data["video"] is None:
            problem = "The sample has no video." if sample.video_size < 0 else too_large(sample.video_size)
            return Record(None, sample.name, texts, problem)
        return Record(data["video"], sample.name, texts)

    def _texts(self, data: bytes | None, sample: "_TarSample") -> list[str]:
        if data is None:
            return []
        text = data.decode("utf-8-sig", errors="replace")
        if not sample.text_is_json:
            return clean_texts(text.strip())
        try:
            values = parsed_json(text)
        except ValueError as error:
            logger.warning("%s: its json member cannot be read (%s).", sample.name, error)
            return []
        keys = TEXT_COLUMNS if self.text_column in (None, "json") else (self.text_column,)
        values = values if isinstance(values, dict) else {}
        texts = next((clean_texts(values[key]) for key in keys if key in values), [])
        if problem := next(filter(None, map(no_character, texts)), None):
            logger.warning("%s: its text %s.", sample.name, problem)
            return []
        return texts

    def texts(self) -> Iterator[list[str]]:
        for shard, rows in enumerate(self.shard_rows):
            path, _ = self._sample(shard, 0)
            with open_file(path, PEEK_BYTES) as file:
                for index in range(rows):
                    _, sample = self._sample(shard, index)
                    size = sample.text_size
                    yield self._texts(read_range(file, sample.text_offset, size) if size >= 0 else None, sample)


class LocalTars(TarShards, RowReader):
    def name(self, shard: int, index: int) -> str:
        return self._sample(shard, index)[1].name

    def read(self, shard: int, index: int) -> Record:
        path, sample = self._sample(shard, index)
        try:
            with open(path, "rb") as file:
                return self._record(file, sample)
        except OSError as error:  # it was cut or deleted since it was counted, or its disk fails
            return Record(None, sample.name, [], f"{path} cannot be read: {sentence(error)}")


class RemoteTars(TarShards, ShardReader):
    def read_shard(self, shard: int, item_timeout: float | None = None) -> Iterator[tuple[int, Record]]:
        path, _ = self._sample(shard, 0)
        with open_file(path) as file:
            for index in range(self.shard_rows[shard]):
                yield index, self._record(file, self._sample(shard, index)[1])


class _TarSample(NamedTuple):
    """Where the video and the text of a sample lie; a size of -1: it has none."""

    name: str
    video_offset: int
    video_size: int
    text_offset: int
    text_size: int
    text_is_json: bool

    @classmethod
    def of(cls, by_ending: dict[str, TarMember], video_column: str | None, text_column: str | None) -> "_TarSample":
        none = TarMember(next(iter(by_ending.values())).name, 0, -1)
        videos = (video_column,) if video_column else VIDEO_MEMBERS
        video = next((by_ending[ending] for ending in videos if ending in by_ending), none)
        plain = (text_column,) if text_column else TEXT_MEMBERS
        ending = next((ending for ending in plain if ending in by_ending), "json")
        text = by_ending.get(ending, none)
        return cls(printable(video.name), video.offset, video.size, text.offset, text.size, ending == "json")


def _columns(kind: type, rows: list[tuple]) -> dict[str, list]:
    return {name: [row[i] for row in rows] for i, name in enumerate(kind._fields)}


def _split_member(name: str, at_last_dot: bool = False) -> tuple[str, str]:
    """Key and ending of a member: the last part of its path is cut at the first dot, or at the last."""
    folder, slash, last = name.rpartition("/")
    key, _, ending = last.rpartition(".") if at_last_dot else last.partition(".")
    return folder + slash + key, ending.lower()


def _samples(members: list[TarMember], video_column: str | None, text_column: str | None) -> Iterator["_TarSample"]:
    for _, group in groupby(members, key=lambda member: _split_member(member.name)[0]):
        group = list(group)
        sample = _TarSample.of(_by_ending(group), video_column, text_column)
        if sample.video_size < 0 and any(_split_member(name)[1].count(".") for name, _, _ in group):
            cut = groupby(group, key=lambda member: _split_member(member.name, at_last_dot=True)[0])
            others = [_by_ending(list(part), at_last_dot=True) for _, part in cut]
            samples = [_TarSample.of(other, video_column, text_column) for other in others]
            if all(sample.video_size >= 0 for sample in samples):
                yield from samples
                continue
        yield sample


def _by_ending(members: list[TarMember], at_last_dot: bool = False) -> dict[str, TarMember]:
    by_ending = {_split_member(member.name, at_last_dot)[1]: member for member in members}
    if len(by_ending) < len(members):
        raise ValueError(f"two members of one sample have the same ending, near {printable(members[0].name)}")
    return by_ending


def _some(endings: list[str]) -> str:
    return ", ".join(map(printable, endings[:8])) + (f" and {len(endings) - 8} others" if len(endings) > 8 else "")


def _tar_members(path: str) -> list[TarMember]:
    """The members of a tar; kept in the cache of `datasets`, because counting a remote tar takes many requests."""
    import datasets

    cached = Path(datasets.config.HF_DATASETS_CACHE) / "bt_adapter_tars" / f"{digest(identity(path))}.json"
    if cached.is_file():
        return [TarMember(*member) for member in json.loads(cached.read_text(encoding="utf-8"))]
    # without hidden files, such as those that macOS adds
    members = [member for member in scan_tar(path) if not member.name.rpartition("/")[2].startswith(".")]
    cached.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(cached) as file:
        file.write_text(json.dumps(members), encoding="utf-8")
    return members
