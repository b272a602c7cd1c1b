"""The data set that makes ids, labels and pixels of conversations. `load_instructions` opens tables of them."""

import logging
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedConfig

from ..models.video_errors import VideoError, item_errors
from ..models.video_io import load_video
from .augmentation import ClipAugmentation
from .broken import BrokenItem, broken_item, none_usable
from .conversations import (
    InstructionTable,
    Messages,
    UnusableRow,
    load_instructions,
    name_of,
    open_image,
    visuals_of,
)
from .decoding_process import DecodingProcess
from .pairs import decoding_options


if TYPE_CHECKING:
    from ..models.processing_bt_adapter_chat import BTAdapterChatProcessorMixin


__all__ = [
    "InstructionCollator",
    "InstructionDataset",
    "InstructionTable",
    "UnusableRow",
    "load_instructions",
    "longest_conversation",
    "visuals_of",
]

logger = logging.getLogger(__name__)

# Attempts to replace a broken item before a table is declared unusable.
REPLACEMENTS = 100


class StoredStates(Protocol):
    """Where the frozen backbone's states of videos lie, computed before."""

    def load(self, videos: Sequence[str]) -> dict[int, torch.Tensor]:
        """{index of the state: (clips, T, N, D)}"""


def longest_conversation(config: PreTrainedConfig, processor: "BTAdapterChatProcessorMixin") -> int:
    """The number of tokens, visual ones included, that the model and its tokenizer take."""
    limits = [processor.tokenizer.model_max_length]
    limits.append(getattr(config.get_text_config(), "max_position_embeddings", None) or limits[0])
    return min(limits)


def check_length(tokens: int, limit: int) -> None:
    """Raises UnusableRow if a conversation has more tokens than the limit. None is ever cut."""
    if tokens > limit:
        raise UnusableRow(f"The conversation has {tokens} tokens, visual ones included, and the model takes {limit}.")


class InstructionDataset(torch.utils.data.Dataset):
    """Map-style data set over an `InstructionTable`: tokens, labels and pixels of one conversation when asked for.

    The model's own processor and chat template make the ids. `labels` are the ids of the answers, including what ends
    each of them ("</s>", "###"), and -100 for all else.

    An item that cannot be used (not a conversation, a missing or broken video, too long) is replaced by another one,
    and reported in the item that replaces it. Conversations are never cut: a half answer teaches to stop nowhere.

    All chance (which frames where the processor's rule is "jitter", what replaces a broken item) is a function of
    `(seed, epoch, row)`.

    Args:
        table: the rows.
        processor: of the chat model.
        max_length: most tokens of a conversation, visual ones included; see [`longest_conversation`].
        seed: of all chance above.
        states: the frozen backbone's states, computed before; videos are then neither decoded nor encoded.
        augment: changes the frames of videos, for training; see [`ClipAugmentation`].
        item_timeout: seconds that reading and decoding the images of one conversation may take, and as many its
            videos; one that takes longer is a broken item. The work is done in a child process, see
            `DecodingProcess`. None: no limit, no child.

    Indices: `(epoch, row)`; a number is a row in epoch 0.

    Items: `input_ids` and `labels` int64 (S); `pixel_values` float (images, 3, H, W) where there are images;
    `pixel_values_videos` float (clips, T, 3, H, W) where there are videos, or with `states` `backbone_states`, a dict
    of float (clips, T, N, D); for clips of unequal length `frame_mask` bool (clips, T); for InstructBLIP
    `qformer_input_ids` int64 (W); `broken`, a list of `BrokenItem`.

    Raises:
        ValueError: if the processor's template does not mark answers.
    """

    def __init__(
        self,
        table: InstructionTable,
        processor: "BTAdapterChatProcessorMixin",
        *,
        max_length: int,
        seed: int = 0,
        states: "StoredStates | None" = None,
        augment: ClipAugmentation | None = None,
        item_timeout: float | None = 60.0,
    ):
        if states is not None and augment is not None:
            raise ValueError("States that were computed before are of the videos as they are: not with augment.")
        self.table, self.processor, self.states, self.augment = table, processor, states, augment
        self.max_length, self.seed, self.item_timeout = max_length, seed, item_timeout
        self._decode = self._arrays if item_timeout is None else DecodingProcess(self._arrays, item_timeout)
        template = (
            processor.chat_template if isinstance(processor.chat_template, str) else processor.chat_template["default"]
        )
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            raise ValueError(
                "The chat template of the processor does not mark the answers: put {% generation %} before and "
                "{% endgeneration %} behind what the model is to say."
            )
        said = [{"role": role, "content": [{"type": "text", "text": "word"}]} for role in ("user", "assistant")]
        if processor.apply_chat_template(said).rstrip().endswith("word"):
            logger.warning(
                "The chat template of the processor writes nothing after an answer, so that a model cannot learn "
                "where to stop. Train with %s.default_chat_template, or with one that ends answers.",
                type(processor).__name__,
            )

    @property
    def num_frames(self) -> int:
        """Frames of a clip."""
        return self.processor.video_processor.num_frames

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        epoch, row = index if isinstance(index, tuple) else (0, index)
        generator = np.random.default_rng([self.seed, epoch, row])
        broken: list[BrokenItem] = []
        for candidate in self._candidates(row, generator):
            name = f"row {candidate}"
            try:
                messages = self.table.messages(candidate)
                name = name_of(messages, candidate)
                return {**self._item(messages, candidate, generator), "broken": broken}
            except (VideoError, UnusableRow) as error:
                broken.append(broken_item(self.table.source, candidate, name, str(error)))
        raise none_usable(self.table.source, broken)

    def _candidates(self, row: int, generator: np.random.Generator) -> Iterator[int]:
        """The item itself, then replacements: a walk that meets every other item once."""
        others = len(self) - 1
        start = int(generator.integers(max(others, 1)))  # before the pixels' chance, which frozen states do not need
        yield row
        for step in range(min(others, REPLACEMENTS)):
            yield (row + 1 + (start + step) % others) % len(self)

    def _item(self, messages: Messages, row: int, generator: np.random.Generator) -> dict[str, Any]:
        item = self.tokenize(messages)  # before any video is decoded
        check_length(len(item["input_ids"]), self.max_length)
        videos = visuals_of(messages, "video")
        if videos and self.states is not None:
            item["backbone_states"] = self.states.load(videos)
        elif videos:
            found = [self.table.fetched(row, path) for path in videos]  # outside the time limit
            said = " ".join(part.get("text", "") for message in messages for part in message["content"])
            pixels = self._decode("video", found, int(generator.integers(2**31)), videos, said)
            item.update({name: torch.from_numpy(values) for name, values in pixels.items()})
        return item

    def _arrays(
        self, kind: str, paths: list[str | bytes], seed: int = 0, names: Sequence[str] = (), said: str = ""
    ) -> Any:
        """Images as uint8 (H, W, 3) each; videos, by path or fetched, as the processor's tensors."""
        if kind == "image":
            return [np.asarray(open_image(self.table, path)) for path in paths]
        with item_errors(", ".join(names)):
            found = [path if isinstance(path, bytes) else self.table.read(path) for path in paths]
            if self.augment is not None:
                found = [self._augmented(video, seed + place, said) for place, video in enumerate(found)]
            encoded = self.processor(videos=found, seed=seed, return_tensors="pt")
        return {name: values.numpy() for name, values in encoded.items()}

    def _augmented(self, video: str | bytes, seed: int, said: str) -> np.ndarray:
        rules = self.processor.video_processor
        frames, _ = load_video(
            video,
            num_frames=rules.num_frames * self.processor.num_clips,
            sampling=rules.sampling,
            generator=np.random.default_rng(seed),
            **decoding_options(rules),
        )
        return self.augment(frames, said, seed)

    def tokenize(self, messages: Messages) -> dict[str, torch.Tensor]:
        """Ids and labels, and the pixels of images. How many tokens a video has does not depend on what it shows."""
        images = visuals_of(messages, "image")
        pictures = iter([Image.fromarray(array) for array in self._decode("image", images)] if images else [])
        seen = []
        for message in messages:
            parts = []
            for part in message["content"]:
                if part["type"] == "video":
                    part = {"type": "video", "video": self._blank}
                elif part["type"] == "image":
                    part = {"type": "image", "image": next(pictures)}
                parts.append(part)
            seen.append({"role": message["role"], "content": parts})
        try:
            encoded = self.processor.apply_chat_template(
                [seen],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                return_assistant_tokens_mask=True,
                processor_kwargs={"do_sample_frames": False},
            )
        except ValueError as error:  # placeholders in its text, or too much of it for the Q-Former
            raise UnusableRow(str(error)) from error
        ids, is_answer = encoded["input_ids"][0], torch.as_tensor(encoded["assistant_masks"])[0].bool()
        item = {"input_ids": ids, "labels": ids.masked_fill(~is_answer, -100)}
        if "pixel_values" in encoded:
            item["pixel_values"] = encoded["pixel_values"]
        if "qformer_input_ids" in encoded:
            item["qformer_input_ids"] = encoded["qformer_input_ids"][0]
        return item

    @cached_property
    def _blank(self) -> np.ndarray:
        size = self.processor.video_processor.crop_size
        return np.zeros((self.processor.blank_frames, size["height"], size["width"], 3), np.uint8)


class InstructionCollator:
    """Batches items of an `InstructionDataset`, padded on one side.

    Args:
        processor: its tokenizers' padding ids are used.
        padding_side: "right", as released, or "left".

    Batches: `input_ids`, `attention_mask` and `labels` int64 (B, S); the pixels of all images and videos one after the
    other, `pixel_values` (images, 3, H, W), `pixel_values_videos` (clips, T, 3, H, W) or `backbone_states`
    {index: (clips, T, N, D)}, `frame_mask` bool (clips, T) where the clips differ in length; for InstructBLIP
    `qformer_input_ids` and `qformer_attention_mask` (B, W); and `broken`, the list of `BrokenItem` met on the way.
    """

    def __init__(self, processor: "BTAdapterChatProcessorMixin", padding_side: str = "right"):
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={padding_side!r} must be 'left' or 'right'.")
        self.padding_side = padding_side
        self.pad_ids = {"labels": -100}
        for name, tokenizer in (
            ("input_ids", processor.tokenizer),
            ("qformer_input_ids", getattr(processor, "qformer_tokenizer", None)),
        ):
            if tokenizer is not None and tokenizer.pad_token_id is None:
                raise ValueError(f"The tokenizer of {name} has no padding token: set its pad_token.")
            self.pad_ids[name] = None if tokenizer is None else tokenizer.pad_token_id

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {"broken": [record for item in items for record in item["broken"]]}
        for name in ("input_ids", "labels", "qformer_input_ids"):
            if name in items[0]:
                batch[name], mask = self._pad([item[name] for item in items], self.pad_ids[name])
                if name != "labels":
                    batch[name.replace("input_ids", "attention_mask")] = mask
        if images := [item["pixel_values"] for item in items if "pixel_values" in item]:
            batch["pixel_values"] = torch.cat(images)
        seen = [item for item in items if "pixel_values_videos" in item or "backbone_states" in item]
        if seen:
            batch.update(_join_videos(seen))
        return batch

    def _pad(self, rows: Sequence[torch.Tensor], value: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and the mask of what is no padding."""
        side = {"batch_first": True, "padding_side": self.padding_side}
        ones = [torch.ones_like(row) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(rows, padding_value=value, **side), pad(ones, padding_value=0, **side)


def _join_videos(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Clips of all items (clips, T, ...), padded to the longest, and which of their frames are real."""
    by_name = [item.get("backbone_states") or {None: item["pixel_values_videos"]} for item in items]
    lengths = []
    for item, videos in zip(items, by_name, strict=True):
        clips, T = next(iter(videos.values())).shape[:2]
        lengths += item["frame_mask"].sum(dim=1).tolist() if "frame_mask" in item else [T] * clips
    longest = max(lengths)
    joined = {name: torch.cat([_to_length(videos[name], longest) for videos in by_name]) for name in by_name[0]}
    data = {"pixel_values_videos": joined[None]} if None in joined else {"backbone_states": joined}
    if min(lengths) < longest:
        data["frame_mask"] = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    return data


def _to_length(videos: torch.Tensor, length: int) -> torch.Tensor:
    """(clips, T, ...) -> (clips, length, ...)"""
    missing = length - videos.shape[1]
    return torch.cat([videos, videos.new_zeros(len(videos), missing, *videos.shape[2:])], dim=1) if missing else videos
