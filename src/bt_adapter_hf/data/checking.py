"""What a table of videos is worth before a run: each row read, decoded and tokenised once, and summed up."""

import json
import signal
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from glob import has_magic
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..models.video_decoding import BTAdapterVideoMetadata
from ..models.video_errors import VideoError
from ..models.video_io import load_video
from .broken import BrokenItem, broken_item, count_reasons
from .conversations import InstructionTable, UnusableRow, name_of, open_image, visuals_of
from .decoding_process import DecodingProcess
from .files import PEEK_BYTES, is_remote, open_file, split_hub_path
from .instructions import InstructionDataset, check_length
from .sources import PairTable, Record, usable
from .tgif_qa import TABLE_SUFFIXES, is_tgif_qa


# Of a table whose rows have to be fetched, a sample takes this many from each shard that it opens.
SAMPLED_PER_SHARD = 50

_STILL = "It is a still: all its frames are one picture."
# Rows that one worker checks in a stretch: rows about the same video are often neighbours.
BLOCK_ROWS = 100


@dataclass
class CheckedRow:
    """What was found in one row.

    Attributes:
        name: of its video, for messages.
        reason: why it cannot be used; None where it can.
        videos: metadata of the videos that decode, by name.
        stills: names of the videos among them that show one picture only, as GIFs that were taken down often do.
        images: names of the images of a conversation that decode.
        texts: captions; None for a conversation.
        tokens: number of tokens of each caption, or of the whole conversation with its visual tokens.
    """

    row: int
    name: str
    reason: str | None = None
    videos: dict[str, BTAdapterVideoMetadata] = field(default_factory=dict)
    stills: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    texts: list[str] | None = None
    tokens: list[int] = field(default_factory=list)


class PairCheck:
    """Checks rows of (video, text).

    Args:
        num_frames: frames that are decoded of each video, spread over it.
        tokenizer: for token counts; none without it.
        decoding: further arguments of `load_video`, see `decoding_options`.
        item_timeout: seconds that fetching one video may take.
    """

    def __init__(
        self,
        table: PairTable,
        *,
        num_frames: int = 8,
        tokenizer: PreTrainedTokenizerBase | None = None,
        decoding: Mapping[str, Any] | None = None,
        item_timeout: float | None = 60.0,
    ):
        self.table, self.num_frames, self.tokenizer = table, num_frames, tokenizer
        self.decoding, self.item_timeout = decoding or {}, item_timeout

    def parts(self, sample: int | None, seed: int) -> list[Any]:
        """What `rows` takes, for all rows or `sample` of them: blocks of row numbers, or (shard, rows of it).

        The sample is random where any row can be read; where rows have to be fetched, the first ones of random shards.
        """
        if not self.table.needs_store:
            return blocks(len(self.table), sample, seed)
        shard_rows = self.table.shard_rows
        if sample is None:
            return list(enumerate(shard_rows))
        order, taken = np.random.default_rng(seed).permutation(len(shard_rows)), Counter[int]()
        missing = min(sample, len(self.table))
        while missing:
            for shard in order.tolist():
                more = min(SAMPLED_PER_SHARD, shard_rows[shard] - taken[shard], missing)
                taken[shard] += more
                missing -= more
        return [(shard, rows) for shard, rows in taken.items() if rows]

    def rows(self, part: Any) -> Iterator[tuple[int, Record | None]]:
        """Row numbers, with what was fetched where rows have to be fetched; one row is held at a time."""
        if not self.table.needs_store:
            yield from ((row, None) for row in part)
            return
        shard, wanted = part
        first, missing = sum(self.table.shard_rows[:shard]), list(range(self.table.shard_rows[shard]))
        try:
            for index, record in islice(self.table.records(shard, self.item_timeout), wanted):
                missing.remove(index)
                yield first + index, record
        except (OSError, ValueError) as error:
            lost = Record(None, f"shard {shard}", [], f"The shard cannot be read: {error}")
            came = self.table.shard_rows[shard] - len(missing)
            yield from ((first + index, lost) for index in missing[: wanted - came])

    def check(self, row: int, record: Record | None) -> CheckedRow:
        record = record or self.table.record(row)
        checked = CheckedRow(row, record.name or f"row {row}", texts=record.texts)
        if self.tokenizer is not None and record.texts:
            checked.tokens = [len(ids) for ids in self.tokenizer(record.texts)["input_ids"]]
        try:
            if record.video is not None:
                checked.videos[checked.name], still = _decoded(record.video, self.num_frames, self.decoding)
                checked.stills += [checked.name] if still else []
            usable(record, row)
        except VideoError as error:
            checked.reason = str(error)
        return checked


class InstructionCheck:
    """Checks conversations about videos; a worker decodes a video once, however many rows name it.

    Args:
        num_frames: frames that are decoded of each video, spread over it.
        dataset: over the table, without `item_timeout`; its processor counts tokens, visual ones included. None
            without counts.
        max_length: tokens that the model takes; a longer conversation is unusable.
        decoding: further arguments of `load_video`, see `decoding_options`.
    """

    def __init__(
        self,
        table: InstructionTable,
        *,
        num_frames: int = 8,
        dataset: InstructionDataset | None = None,
        max_length: int | None = None,
        decoding: Mapping[str, Any] | None = None,
    ):
        self.table, self.num_frames, self.dataset, self.max_length = table, num_frames, dataset, max_length
        self.decoding = decoding or {}
        self._decoded: dict[str, tuple[BTAdapterVideoMetadata, bool] | str] = {}  # or why it cannot be used

    def parts(self, sample: int | None, seed: int) -> list[Any]:
        return blocks(len(self.table), sample, seed)

    def rows(self, part: Any) -> Iterator[tuple[int, None]]:
        return ((row, None) for row in part)

    def check(self, row: int, _: None) -> CheckedRow:
        checked = CheckedRow(row, f"row {row}")
        try:
            messages = self.table.messages(row)
            checked.name = name_of(messages, row)
            if self.dataset is not None:  # which opens the images
                checked.tokens = [len(self.dataset.tokenize(messages)["input_ids"])]
                check_length(checked.tokens[0], self.max_length)
            else:
                for image in visuals_of(messages, "image"):
                    open_image(self.table, image)
            for video in visuals_of(messages, "video"):
                checked.videos[video], still = self._decode(video)
                checked.stills += [video] if still else []
            checked.images = visuals_of(messages, "image")
        except (UnusableRow, VideoError) as error:
            checked.reason = str(error)
        return checked

    def _decode(self, video: str) -> tuple[BTAdapterVideoMetadata, bool]:
        if video not in self._decoded:
            try:
                self._decoded[video] = _decoded(self.table.read(video), self.num_frames, self.decoding)
            except VideoError as error:
                self._decoded[video] = str(error)
        found = self._decoded[video]
        if isinstance(found, str):
            raise VideoError(found)
        return found


def _decoded(video: str | bytes, num_frames: int, decoding: Mapping[str, Any]) -> tuple[BTAdapterVideoMetadata, bool]:
    """Metadata of a video, and whether it is a still.

    All its frames are decoded, wanted or not, where training would not use a damaged one.
    """
    options = {"on_damage": "raise", "backend": "pyav", **decoding}
    if options["on_damage"] == "raise" and options["backend"] == "pyav":
        options["on_damage"] = "check"
    frames, metadata = load_video(video, num_frames=num_frames, **options)
    return metadata, bool((frames == frames[:1]).all()) and (num_frames > 1 or metadata.total_num_frames == 1)


def blocks(rows: int, sample: int | None, seed: int) -> list[list[int]]:
    """All row numbers, or `sample` random ones, in blocks."""
    chosen = np.arange(rows)
    if sample is not None and sample < rows:
        chosen = np.sort(np.random.default_rng(seed).choice(rows, sample, replace=False))
    return [block.tolist() for block in np.split(chosen, range(BLOCK_ROWS, len(chosen), BLOCK_ROWS))]


class _CheckedRows(torch.utils.data.IterableDataset):
    """Each loader worker takes its share of the parts."""

    def __init__(self, check: PairCheck | InstructionCheck, parts: list[Any], timeout: float | None):
        self.check, self.parts, self.timeout = check, parts, timeout

    def __iter__(self) -> Iterator[CheckedRow]:
        info = torch.utils.data.get_worker_info()
        check = self.check.check if self.timeout is None else DecodingProcess(self.check.check, self.timeout)
        for part in self.parts[info.id :: info.num_workers] if info else self.parts:
            for row, record in self.check.rows(part):
                try:
                    yield check(row, record)
                except VideoError as error:  # it took too long, or its decoder crashed
                    name = record.name if record is not None else self._name(row)
                    yield CheckedRow(row, name, str(error))

    def _name(self, row: int) -> str:
        if isinstance(self.check, InstructionCheck):
            return f"row {row}"
        return self.check.table.name(row)


def check_rows(
    check: PairCheck | InstructionCheck,
    sample: int | None = None,
    *,
    workers: int = 0,
    timeout: float | None = 60.0,
    seed: int = 0,
) -> Iterator[CheckedRow]:
    """Checks all rows, or `sample` of them.

    Args:
        workers: processes that decode; 0 for this one.
        timeout: seconds that a row may take; one that takes longer is unusable. None for no limit.
        seed: of the sample.

    Returns:
        Iterator over the results, in no certain order.
    """
    rows = _CheckedRows(check, check.parts(sample, seed), timeout)
    loader = torch.utils.data.DataLoader(
        rows, batch_size=None, num_workers=workers, collate_fn=_as_it_is, worker_init_fn=_leave_interrupts
    )
    return iter(loader)


def _as_it_is(checked: CheckedRow) -> CheckedRow:
    return checked


def _leave_interrupts(_: int) -> None:
    """Ctrl-C reaches the workers too: the main process reports and ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class DataReport:
    """Sums up checked rows. Holds a few numbers per row, and the rows that cannot be used.

    Args:
        source: of the table.
        rows: of the table.
        max_tokens: the limit that token counts are compared with; None without counts.
    """

    def __init__(self, source: str, rows: int, max_tokens: int | None = None):
        self.source, self.rows, self.max_tokens = source, rows, max_tokens
        self.checked = 0
        self.broken: list[BrokenItem] = []
        self._texts, self._rows_without_text = Counter[int](), 0  # by hash
        self._tokens = array("l")
        self._names = set[str]()  # of videos
        self._images = set[str]()
        self.stills = dict[str, int]()  # and the first row of each
        self._videos = {name: array("d") for name in ("seconds", "frames", "fps", "width", "height")}

    def add(self, checked: CheckedRow) -> None:
        self.checked += 1
        if checked.reason is not None:
            self.broken.append(broken_item(self.source, checked.row, checked.name, checked.reason))
        for name, video in checked.videos.items():
            if name in self._names:
                continue
            self._names.add(name)
            values = (video.duration, video.total_num_frames, video.fps, video.width, video.height)
            for measured, value in zip(self._videos.values(), values, strict=True):
                if value is not None:
                    measured.append(value)
        self._images.update(checked.images)
        for name in checked.stills:
            self.stills.setdefault(name, checked.row)
        if checked.texts is not None:
            self._texts.update(map(hash, checked.texts))
            self._rows_without_text += not checked.texts
        self._tokens.extend(checked.tokens)

    @property
    def share_broken(self) -> float:
        return len(self.broken) / self.checked if self.checked else 0.0

    def to_dict(self) -> dict[str, Any]:
        """`source`, `rows`, `checked`, `usable`, `broken`, `reasons`; under `videos` the `count`, how many are
        `stills`, and [min, median, max] of seconds, frames, fps, width and height; `images`, how many; `texts` (None
        for conversations) with their `count`, how many are `repeated` (an earlier row has them too), and
        `rows_without`; `tokens` (None without counts) with the `length` as [min, median, max], the `limit`, and how
        many are `over_limit`.
        """
        texts = tokens = None
        if self._texts or self._rows_without_text:
            count = self._texts.total()
            texts = {
                "count": count,
                "repeated": count - len(self._texts),
                "rows_without": self._rows_without_text,
            }
        if self.max_tokens is not None:
            over = int(np.count_nonzero(np.asarray(self._tokens) > self.max_tokens))
            tokens = {"length": spread(self._tokens), "limit": self.max_tokens, "over_limit": over}
        return {
            "source": self.source,
            "rows": self.rows,
            "checked": self.checked,
            "usable": self.checked - len(self.broken),
            "broken": len(self.broken),
            "reasons": count_reasons(self.broken),
            "videos": {
                "count": len(self._videos["frames"]),
                "stills": len(self.stills),
                **{name: spread(values) for name, values in self._videos.items()},
            },
            "images": len(self._images),
            "texts": texts,
            "tokens": tokens,
        }

    def write_broken(self, path: Path) -> None:
        """One `BrokenItem` per line, by row; stills too, which can be used and have nothing to show."""
        stills = [broken_item(self.source, row, name, _STILL) for name, row in self.stills.items()]
        with path.open("w", encoding="utf-8") as file:
            for record in sorted([*self.broken, *stills], key=lambda record: record["index"]):
                file.write(json.dumps(record) + "\n")


def spread(values: array) -> list[float] | None:
    """[min, median, max]; None of nothing."""
    return [min(values), float(np.median(values)), max(values)] if values else None


def holds_conversations(source: str, revision: str | None = None) -> bool:
    """Whether a `.json` or `.jsonl` file is a table for `load_instructions`, by the fields of its first row."""
    if not source.endswith((".json", ".jsonl", *TABLE_SUFFIXES)) or has_magic(source):
        return False
    try:
        if is_remote(source):
            repo, written, path = split_hub_path(source)
            at = (written or revision or "main").replace("/", "%2F")
            source = f"hf://datasets/{repo}@{at}/{path}"
        with open_file(str(Path(source).expanduser()) if not is_remote(source) else source, PEEK_BYTES) as file:
            head = file.read(1 << 20).decode(errors="replace")
    except (OSError, ValueError):
        return False  # the reader of the table will say what is wrong with it
    if source.endswith(TABLE_SUFFIXES):
        return is_tgif_qa(head)
    try:
        first, _ = json.JSONDecoder().raw_decode(head, head.index("{"))
    except ValueError:
        return False  # the reader of the table will say what is wrong with it
    return "messages" in first or {"q", "a", "video_id"} <= first.keys()
