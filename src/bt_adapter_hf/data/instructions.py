"""Tables of conversations about videos, and the data set that makes ids, labels and pixels of them."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError
from PIL import Image
from transformers import PreTrainedConfig

from ..hub.access import explain, http_cause, retried
from ..models.image_io import load_image
from ..models.video_errors import VideoError, VideoNotFoundError
from .archives import ARCHIVE_SUFFIXES, MediaArchives
from .broken import BrokenItem, BrokenItemsError
from .decoding_process import DecodingProcess
from .files import find_files, is_remote, repository, split_hub_path


if TYPE_CHECKING:
    from ..models.processing_bt_adapter_chat import BTAdapterChatProcessorMixin


# Where a VideoChatGPT row names a video without its ending.
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi")
# Attempts to replace a broken item before a table is declared unusable.
REPLACEMENTS = 100

Messages = list[dict[str, Any]]


class StoredStates(Protocol):
    """Where the frozen backbone's states of videos lie, computed before."""

    def load(self, videos: Sequence[str]) -> dict[int, torch.Tensor]:
        """{index of the state: (clips, T, N, D)}"""


class UnusableRow(ValueError):
    """The row is no conversation that can be learned."""


@dataclass
class InstructionTable:
    """Rows of conversations, nothing decoded.

    Attributes:
        source: the file.
        rows: one JSON text per row, not parsed yet.
        media: folder that relative paths start from, or the archives that hold them.
        fingerprint: of the file's content.
        revision: commit of a file on the Hub, else None.
        needs_store: all is on the local disk; see `PairTable`.
    """

    needs_store: ClassVar[bool] = False

    source: str
    rows: list[str]
    media: Path | MediaArchives
    fingerprint: str
    revision: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shard_rows(self) -> list[int]:
        return [len(self.rows)]

    def messages(self, row: int) -> Messages:
        """The conversation of a row, ending with an answer.

        What it shows is under "path", for `read`: a path from the root of the file system, a URL, or the name in the
        archives.

        Raises:
            UnusableRow: if it is none, in words.
        """
        try:
            content = json.loads(self.rows[row])
        except ValueError as error:
            raise UnusableRow(f"it is no JSON: {error}") from error
        if not isinstance(content, dict):
            raise UnusableRow(f"it is a {type(content).__name__}, and no object with fields.")
        if "messages" in content:
            messages = content["messages"]
        elif {"q", "a", "video_id"} <= content.keys():
            messages = self._video_chatgpt(content, row)
        else:
            raise UnusableRow(
                f"it has the fields {', '.join(content) or 'none'}; expected messages, or q, a and video_id."
            )
        return self._checked(messages)

    def videos(self) -> Iterator[str]:
        """Paths and URLs of the videos of all usable rows, each once."""
        seen = set()
        for row in range(len(self)):
            try:
                messages = self.messages(row)
            except UnusableRow:
                continue  # reported when it is its turn
            for video in visuals_of(messages, "video"):
                if video not in seen:
                    seen.add(video)
                    yield video

    @property
    def archives(self) -> MediaArchives | None:
        """The archives that hold the videos, if any do."""
        return self.media if isinstance(self.media, MediaArchives) else None

    def read(self, path: str) -> str | bytes:
        """What `load_video` takes for a path of `messages`; see `read_media`."""
        return read_media(path, self.archives)

    def _place(self, path: str) -> str:
        return str(self.media / path) if isinstance(self.media, Path) and not is_remote(path) else path

    def _video_chatgpt(self, content: Mapping[str, Any], row: int) -> Messages:
        """As released, the video stands behind the question in even rows and before it in odd ones."""
        path = self._place(str(content["video_id"]))
        if self.archives is None:
            # without a file: the usual name, for the report
            names = [path + suffix for suffix in VIDEO_SUFFIXES]
            path = next((name for name in names if Path(name).is_file()), names[0])
        video = {"type": "video", "path": path}
        question = {"type": "text", "text": str(content["q"])}
        return [
            {"role": "user", "content": [question, video] if row % 2 == 0 else [video, question]},
            {"role": "assistant", "content": str(content["a"])},
        ]

    def _checked(self, messages: Any) -> Messages:
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise UnusableRow("messages is no list of objects with role and content.")
        roles = [message.get("role") for message in messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
            raise UnusableRow(
                f"its roles are {', '.join(map(str, roles)) or 'none'}; expected user and assistant by turns, from a "
                "user to an assistant, after at most one system message."
            )
        return [{"role": m["role"], "content": self._parts(m["role"], m.get("content"))} for m in messages]

    def _parts(self, role: str, content: Any) -> list[dict[str, str]]:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise UnusableRow(f"the content of a message is {content!r}; expected text, or a list of parts.")
        checked = []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                checked.append({"type": "text", "text": part["text"]})
            elif kind in ("image", "video") and role == "user":
                where = [part[key] for key in ("path", "url") if isinstance(part.get(key), str) and part[key]]
                if len(where) != 1:
                    raise UnusableRow(f"a part of type {kind} needs a path or a url, and has {', '.join(part)}.")
                checked.append({"type": kind, "path": self._place(where[0])})
            else:
                raise UnusableRow(
                    f"a message of the {role} has the part {json.dumps(part)}; expected text, and of the user images "
                    "and videos."
                )
        if not "".join(part.get("text", "") for part in checked).strip():
            raise UnusableRow(f"a message of the {role} has no text.")
        return checked


def read_media(path: str, archives: MediaArchives | None = None) -> str | bytes:
    """The bytes of a member of archives; paths of files and URLs as they are.

    Raises:
        VideoError: if no archive holds it, also with one of the usual endings of videos, or it cannot be read.
    """
    if archives is None or is_remote(path):
        return path
    for name in (path, *(path + suffix for suffix in VIDEO_SUFFIXES)):
        with contextlib.suppress(VideoNotFoundError):
            return archives.read(name)
    raise VideoNotFoundError(f"{path} is not in {', '.join(archives.paths)}.")


def load_instructions(
    source: str | Path, *, media_root: str | Path | None = None, revision: str | None = None
) -> InstructionTable:
    """Open a table of conversations; rows are parsed when they are asked for.

    Two kinds of rows, in a `.jsonl` file (one per line) or a `.json` file (a list of them):

    - `{"messages": [{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text":
      "What happens?"}]}, {"role": "assistant", "content": "A dog jumps."}]}`: any number of turns, images too, with or
      without a system message; `"url"` in place of `"path"`;
    - `{"q": ..., "a": ..., "video_id": ...}`, VideoChatGPT-100K's: the video is `<media_root>/<video_id>` with one of
      the endings .mp4, .webm, .mkv, .avi.

    Args:
        source: the file: a path, or `hf://datasets/owner/name[@revision]/path`, which is downloaded.
        media_root: where relative paths start: a folder on the disk, or a `.zip` or `.tar` with the videos (or a
            pattern that fits several), which are read where they are. The folder of the file by default.
        revision: branch, tag or commit of a file on the Hub.

    Raises:
        ValueError: for a file of another kind, one that cannot be read, or one without rows; for a `media_root` that
            is not there.
    """
    source, commit = str(source), None
    if not source.endswith((".json", ".jsonl")):
        raise ValueError(f"Cannot read the table {source}: a table of conversations is a .jsonl or a .json file.")
    try:
        path = Path(source).expanduser()
        if is_remote(source):
            path, commit = _download(source, revision)
        media = _open_media(path.parent if media_root is None and commit is None else media_root)
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [line for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
            if not isinstance(rows, list):
                raise ValueError(f"it holds a {type(rows).__name__}, and no list of rows")
            rows = [json.dumps(row) for row in rows]
    except (OSError, ValueError, HTTPError) as error:
        reason = explain(error, repository(source), revision) if http_cause(error) else error
        raise ValueError(f"Cannot read the table {source}: {reason}") from error
    if not rows:
        raise ValueError(f"The table {source} has no rows.")
    return InstructionTable(
        source=source,
        rows=rows,
        media=media,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        revision=commit,
    )


def _download(source: str, revision: str | None) -> tuple[Path, str]:
    """A table on the Hub: the local copy, and its commit."""
    repo, written, path = split_hub_path(source)
    if not path:
        raise ValueError(f"it is a repository; name a file in it, hf://datasets/{repo}/path")
    file = retried(
        lambda: hf_hub_download(repo, path, repo_type="dataset", revision=written or revision), f"Downloading {source}"
    )
    return Path(file), re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", file)[1]


def _open_media(root: str | Path | None) -> Path | MediaArchives:
    if root is None:
        raise ValueError("it is on the Hub: name the folder or the archives of its videos on the disk with media_root")
    if is_remote(str(root)):
        raise ValueError(
            f"the videos of conversations are read from the disk, again and again: download {root}, and name the "
            "folder or the archives with media_root"
        )
    folder = Path(root).expanduser()
    if not folder.is_dir() and (folder.suffix in ARCHIVE_SUFFIXES or has_magic(str(root))):
        return MediaArchives(find_files(str(root), ARCHIVE_SUFFIXES, "", None, None).paths)
    if not folder.is_dir():
        raise ValueError(f"media_root {root} is neither a folder nor a .zip or .tar file")
    return folder.resolve()


def visuals_of(messages: Messages, kind: str) -> list[str]:
    """Paths and URLs of the images or videos of a conversation, in order."""
    return [part["path"] for message in messages for part in message["content"] if part["type"] == kind]


def longest_conversation(config: PreTrainedConfig, processor: "BTAdapterChatProcessorMixin") -> int:
    """The number of tokens, visual ones included, that the model and its tokenizer take."""
    limits = [processor.tokenizer.model_max_length]
    limits.append(getattr(config.get_text_config(), "max_position_embeddings", None) or limits[0])
    return min(limits)


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
        item_timeout: seconds that reading the images, and decoding and preprocessing the videos, of one conversation
            may take; one that takes longer is a broken item. The work is done in a child process, see
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
        item_timeout: float | None = 60.0,
    ):
        self.table, self.processor, self.states = table, processor, states
        self.max_length, self.seed = max_length, seed
        self._read = self._visuals if item_timeout is None else DecodingProcess(self._visuals, item_timeout)
        if not re.search(r"\{%-?\s*generation\s*-?%\}", processor.chat_template):
            raise ValueError(
                "The chat template of the processor does not mark the answers: put {% generation %} before and "
                "{% endgeneration %} behind what the model is to say."
            )

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        epoch, row = index if isinstance(index, tuple) else (0, index)
        generator = np.random.default_rng([self.seed, epoch, row])
        broken: list[BrokenItem] = []
        for candidate in self._candidates(row, generator):
            visuals: list[str] = []
            try:
                messages = self.table.messages(candidate)
                visuals = visuals_of(messages, "video") + visuals_of(messages, "image")
                return {**self._item(messages, generator), "broken": broken}
            except (VideoError, UnusableRow) as error:
                name = ", ".join(visuals) or f"row {candidate}"
                broken.append(BrokenItem(source=self.table.source, index=candidate, video=name, reason=str(error)))
        raise BrokenItemsError(
            f"None of {len(broken)} items tried in a row of {self.table.source} can be used. The first: "
            f"{broken[0]['video']}: {broken[0]['reason']}"
        )

    def _candidates(self, row: int, generator: np.random.Generator) -> Iterator[int]:
        """The item itself, then replacements: a walk that meets every other item once."""
        others = len(self) - 1
        start = int(generator.integers(max(others, 1)))  # before the pixels' chance, which frozen states do not need
        yield row
        for step in range(min(others, REPLACEMENTS)):
            yield (row + 1 + (start + step) % others) % len(self)

    def _item(self, messages: Messages, generator: np.random.Generator) -> dict[str, Any]:
        item = self.tokenize(messages)  # before any video is decoded
        videos = visuals_of(messages, "video")
        if videos and self.states is not None:
            item["backbone_states"] = self.states.load(videos)
        elif videos:
            pixels = self._read("video", videos, int(generator.integers(2**31)))
            item.update({name: torch.from_numpy(values) for name, values in pixels.items()})
        return item

    def _visuals(self, kind: str, paths: list[str], seed: int) -> dict[str, np.ndarray]:
        """The pixels of videos, or images as they are, by path."""
        found = [self.table.read(path) for path in paths]
        if kind == "image":
            return {
                path: np.asarray(load_image(image, f"The image {path}"))
                for path, image in zip(paths, found, strict=True)
            }
        return {
            name: values.numpy()
            for name, values in self.processor(videos=found, seed=seed, return_tensors="pt").items()
        }

    def tokenize(self, messages: Messages) -> dict[str, torch.Tensor]:
        """Ids and labels, and the pixels of images. How many tokens a video has does not depend on what it shows."""
        images = visuals_of(messages, "image")
        pictures = self._read("image", images, 0) if images else {}
        seen = []
        for message in messages:
            parts = []
            for part in message["content"]:
                if part["type"] == "video":
                    part = {"type": "video", "video": self._blank}
                elif part["type"] == "image":
                    part = {"type": "image", "image": Image.fromarray(pictures[part["path"]])}
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
        if len(ids) > self.max_length:
            raise UnusableRow(
                f"the conversation has {len(ids)} tokens, visual ones included, and the model takes {self.max_length}."
            )
        item = {"input_ids": ids, "labels": ids.masked_fill(~is_answer, -100)}
        if "pixel_values" in encoded:
            item["pixel_values"] = encoded["pixel_values"]
        if "qformer_input_ids" in encoded:
            item["qformer_input_ids"] = encoded["qformer_input_ids"][0]
        return item

    @cached_property
    def _blank(self) -> np.ndarray:
        size = self.processor.video_processor.crop_size
        return np.zeros((self.processor.num_clips, size["height"], size["width"], 3), np.uint8)


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
