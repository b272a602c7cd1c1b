"""The dataset over a (video, text) table that decodes lazily, and the batches of it. `load_table` opens tables."""

import json
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import default_collate

from ..models.video_errors import VideoError
from ..models.video_io import load_video
from ..models.video_processing_bt_adapter import FITTED
from .broken import BrokenItem, broken_item, none_usable
from .chunk_store import ChunkStore
from .decoding_process import DecodingProcess
from .sources import PairTable, load_table, usable


if TYPE_CHECKING:
    from ..models.processing_bt_adapter import BTAdapterProcessor
    from ..models.video_processing_bt_adapter import BTAdapterVideoProcessor


__all__ = ["PairCollator", "PairDataset", "PairTable", "load_opposites", "load_table", "random_crop_box"]

# Attempts to replace a broken item before a table is declared unusable.
REPLACEMENTS = 100


def random_crop_box(
    height: int, width: int, scale: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """`(top, left, height, width)` of a random crop: area a share of the frame drawn from `scale`, aspect 3/4 to 4/3.

    As released: ten tries, then the centre square.
    """
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        aspect = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        box_height, box_width = round(np.sqrt(area / aspect)), round(np.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = generator.integers(height - box_height, endpoint=True)
            left = generator.integers(width - box_width, endpoint=True)
            return int(top), int(left), int(box_height), int(box_width)
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def decoding_options(video_processor: "BTAdapterVideoProcessor") -> dict[str, Any]:
    """What of a video processor decides whether `load_video` can use a video."""
    return {
        "backend": video_processor.video_backend,
        "on_damage": video_processor.on_damage,
        "background": video_processor.background,
    }


class PairDataset(torch.utils.data.Dataset):
    """Map-style dataset over a `PairTable`: decodes, samples and preprocesses one video when it is asked for.

    `dataset[epoch, row]` is the item of a row in an epoch; `dataset[row]` is that of epoch 0. All chance (which
    frames, which caption, which crop, what replaces a broken item) is a function of `(seed, epoch, row)`, so it does
    not depend on workers, processes or where a run was resumed.

    An item whose video or text cannot be used is replaced by another one, and reported in the item that replaces it.
    The other one is of the same shard if it has a usable one, so that no further shard has to be fetched.

    Args:
        table: the rows. Call its `use_store` first where it needs one.
        processor: its video processor gives size, normalisation and, outside training, the rule for sampling frames.
        training: jittered frames and a random caption of each row, as released; otherwise the processor's sampling
            rule and the first caption.
        num_frames: frames per clip, T; the video processor's by default.
        seed: of all chance above.
        crop_scale: range of the area of a random resized crop, one box for all frames of a clip (released pretraining:
            0.08 to 1); none by default, which leaves the crop to the video processor. Training only.
        group_by_caption: rows with the same (first) caption are right answers for each other in retrieval. Otherwise
            every row is its own only right answer, as in the usual benchmarks. Reads all texts at once (of packed
            shards, these only).
        item_timeout: seconds that reading, decoding and preprocessing one video may take; a video that takes longer
            is a broken item. For this the work is done in a child process, see `DecodingProcess`. None: no limit, no
            child.

    Items: `pixel_values_videos` float (T, 3, H, W), `text` str, `pair_id` int (what belongs together in retrieval; -1
    where the item replaces a broken one), `broken` list of `BrokenItem`.

    Raises:
        ValueError: bad options.
        BrokenItemsError: (from an item) neither the row nor any that could replace it can be used.
        ChunkStoreError: (from an item) the rows could not be fetched.
    """

    def __init__(
        self,
        table: PairTable,
        processor: "BTAdapterProcessor",
        *,
        training: bool,
        num_frames: int | None = None,
        seed: int = 0,
        crop_scale: tuple[float, float] | None = None,
        group_by_caption: bool = False,
        item_timeout: float | None = 60.0,
    ):
        self.table, self.training, self.seed, self.item_timeout = table, training, seed, item_timeout
        self.video_processor = processor.video_processor
        self.num_frames = num_frames if num_frames is not None else self.video_processor.num_frames
        if self.num_frames < 1:
            raise ValueError(f"num_frames={self.num_frames} must be at least 1.")
        if crop_scale is not None:
            if not training:
                raise ValueError("crop_scale is an augmentation: it can be used in training only.")
            if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
                raise ValueError(f"crop_scale={crop_scale} must be two areas, 0 < smallest <= largest <= 1.")
        self.crop_scale = crop_scale
        self._first_row_of: dict[str, int] | None = None
        if group_by_caption:
            self._first_row_of = {}
            for row, texts in enumerate(table.texts()):
                for text in texts[:1]:
                    self._first_row_of.setdefault(text, row)
        self._attempt = self._load_row
        if item_timeout is not None:
            self._attempt = DecodingProcess(self._load_row, item_timeout)

    @property
    def shard_rows(self) -> list[int]:
        """Number of rows of each shard; row numbers run through the shards in order."""
        return self.table.shard_rows

    @property
    def fingerprint(self) -> str:
        """Hex digest of the rows."""
        return self.table.fingerprint

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        epoch, row = (int(number) for number in index) if isinstance(index, tuple) else (0, int(index))
        broken: list[BrokenItem] = []
        for attempt, candidate in enumerate(self._candidates(epoch, row)):
            self.table.wait(candidate)  # outside the time limit
            # As many numbers as are needed: further zeros at the end would give the same chance.
            key = [self.seed, epoch, row] + ([attempt] if attempt else [])
            try:
                pixel_values, text, texts = self._attempt(self.table.store, candidate, key)
            except VideoError as error:
                broken.append(broken_item(self.table.source, candidate, self.table.name(candidate), str(error)))
                continue
            pair_id = candidate if self._first_row_of is None else self._first_row_of[texts[0]]
            return {
                "pixel_values_videos": torch.from_numpy(pixel_values),
                "text": text,
                "pair_id": -1 if broken else pair_id,
                "broken": broken,
            }
        raise none_usable(self.table.source, broken)

    def _candidates(self, epoch: int, row: int) -> Iterator[int]:
        """The item itself, then replacements: every other item of its shard, in a walk, and then those of others."""
        shard = self.table.shard_range(row)
        others = len(shard) - 1
        start = int(np.random.default_rng([self.seed, epoch, row, REPLACEMENTS + 1]).integers(max(others, 1)))
        inside = (shard[(row - shard.start + 1 + (start + step) % others) % len(shard)] for step in range(others))
        outside = ((shard.stop + step) % len(self) for step in range(len(self) - len(shard)))
        yield row
        yield from islice(chain(inside, outside), REPLACEMENTS)

    def _load_row(self, store: ChunkStore | None, row: int, key: list[int]) -> tuple[np.ndarray, str, list[str]]:
        """Clip, chosen text and all texts of a row; `key` seeds its chance.

        The store comes along because a child process knows the table as it was when the child was started.
        """
        self.table.store = store
        generator = np.random.default_rng(key)
        record = usable(self.table.record(row), row)
        texts = record.texts
        text = texts[generator.integers(len(texts))] if self.training else texts[0]
        return self._load(record.video, generator).numpy(), text, texts

    def _load(self, video: str | bytes, generator: np.random.Generator) -> torch.Tensor:
        whole = self.crop_scale is None
        frames, _ = load_video(
            video,
            num_frames=self.num_frames,
            sampling="jitter" if self.training else self.video_processor.sampling,
            generator=generator,
            shrink=self.video_processor.shrinker() if whole else None,
            **decoding_options(self.video_processor),
        )
        frames = torch.from_numpy(frames).movedim(-1, 1)  # (T, H, W, 3) -> (T, 3, H, W)
        if not whole:
            top, left, height, width = random_crop_box(*frames.shape[-2:], self.crop_scale, generator)
            size = self.video_processor.crop_size
            frames = torch.nn.functional.interpolate(
                frames[..., top : top + height, left : left + width],
                size=(size["height"], size["width"]),
                mode="bicubic",
                antialias=True,
            )
        options = FITTED if whole else {}
        batch = self.video_processor(videos=[frames], do_sample_frames=False, return_tensors="pt", **options)
        return batch["pixel_values_videos"][0]


class PairCollator:
    """Batches items of a `PairDataset` and tokenises their texts, cut at `max_text_length` tokens.

    Args:
        processor: its tokenizer is used.
        max_text_length: longest text in tokens, start and end tokens included; the tokenizer's limit by default.
        opposites: of captions, what their clips show when they are played backwards (the caption itself where that is
            the same), for a model that trains with `order_negatives`; see `load_opposites`.

    Batches: `pixel_values_videos` float (B, T, 3, H, W), `input_ids` and `attention_mask` int64 (B, longest text),
    `pair_ids` int64 (B), and `broken`, the list of `BrokenItem` met on the way; with `opposites` also
    `opposite_input_ids` and `opposite_attention_mask` and `has_opposite` bool (B).

    Raises:
        ValueError: if `max_text_length` exceeds the tokenizer's limit, or the tokenizer has none and none is given.
    """

    def __init__(
        self,
        processor: "BTAdapterProcessor",
        max_text_length: int | None = None,
        opposites: Mapping[str, str] | None = None,
    ):
        self.opposites = opposites
        self.tokenizer = processor.tokenizer
        limit = self.tokenizer.model_max_length
        if max_text_length is None and limit > 10**6:
            raise ValueError("The tokenizer states no limit (model_max_length): give max_text_length.")
        if max_text_length is not None and not 0 < max_text_length <= limit:
            raise ValueError(
                f"max_text_length={max_text_length} must be between 1 and the tokenizer's limit of {limit}."
            )
        self.max_text_length = max_text_length or limit

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        B, texts = len(items), [item["text"] for item in items]
        opposites = [] if self.opposites is None else [self.opposites.get(text, text) for text in texts]
        tokens = self.tokenizer(
            texts + opposites,
            padding=True,
            truncation=True,
            max_length=self.max_text_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        batch = {
            # in a loader worker it stacks into shared memory at once, which spares a copy
            "pixel_values_videos": default_collate([item["pixel_values_videos"] for item in items]),
            "input_ids": tokens["input_ids"][:B],
            "attention_mask": tokens["attention_mask"][:B],
            "pair_ids": torch.tensor([item["pair_id"] for item in items]),
            "broken": [record for item in items for record in item["broken"]],
        }
        if self.opposites is not None:
            batch |= {
                "opposite_input_ids": tokens["input_ids"][B:],
                "opposite_attention_mask": tokens["attention_mask"][B:],
                "has_opposite": torch.tensor([text in self.opposites for text in texts]),
            }
        return batch


def load_opposites(path: str | Path) -> dict[str, str]:
    """Captions and what their clips show when they are played backwards, from rows of json with `text` and `opposite`.

    A row whose opposite is missing, null or empty says nothing; one whose opposite is its own text says that the clip
    looks the same both ways.

    Raises:
        ValueError: if the file cannot be read, has no such rows, or gives one caption two opposites.
    """
    opposites: dict[str, str] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    for number, line in enumerate(filter(str.strip, lines), 1):
        try:
            row = json.loads(line)
            text, opposite = row["text"], row.get("opposite")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f'{path}, row {number}: expected an object with "text" and "opposite".') from None
        if not isinstance(text, str) or not isinstance(opposite, str | None):
            raise ValueError(f"{path}, row {number}: text and opposite must be strings, found {text!r}, {opposite!r}.")
        if opposite and opposites.setdefault(text, opposite) != opposite:
            raise ValueError(
                f"{path}, row {number}: {text!r} has two opposites, {opposites[text]!r} and {opposite!r}."
            )
    if not opposites:
        raise ValueError(f'{path} has no row with an "opposite".')
    return opposites
