"""What the processors of the chat models share: prompts with the model's own number of visual tokens."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import AddedToken, PreTrainedTokenizerBase
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin
from transformers.utils import logging

from .chat_messages_bt_adapter import (
    END,
    KINDS,
    START,
    hide,
    is_batch,
    parts_of,
    plain_messages,
    show,
    sources_of,
    texts,
)
from .image_io import load_image, read_image, read_source
from .video_errors import VideoInputError
from .video_processing_bt_adapter import (
    BTAdapterVideoProcessor,
    BTAdapterVideoProcessorKwargs,
    _collate,
    flatten_videos,
)


logger = logging.get_logger(__name__)

# As the released video-LLM: 64 frames, from the centres of 64 equal segments.
NUM_FRAMES, SAMPLING = 64, "centers"
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_VIDEO_FIELDS = ("num_frames", "sampling", "video_backend", "on_damage", "background")


class BTAdapterClipsKwargs(BTAdapterVideoProcessorKwargs, total=False):
    """
    num_clips (`int`, *optional*):
        Consecutive clips that each video is cut into.
    """

    num_clips: int | None


class BTAdapterChatProcessorKwargs(ProcessingKwargs, total=False):
    videos_kwargs: BTAdapterClipsKwargs


class BTAdapterChatProcessorMixin(ProcessorMixin):
    """What the three processors share: videos, clips, checks, native checkpoints.

    `processor(images=None, text=None, videos=None, num_clips=None, **kwargs)` returns `input_ids` and
    `attention_mask` (texts, S), padded on the left as generation needs it, `pixel_values` (images, 3, H, W),
    `pixel_values_videos` (videos, T, 3, H, W) and, where the videos differ in length, `frame_mask` (videos, T). Images
    and videos belong, in order, to the placeholders `<image>` and `<video>` in the texts.

    With `num_clips=k` each video is cut into k consecutive clips, which stand for k videos: k times the frames and
    k times the tokens. `return_metadata=True` adds `video_metadata`, with the indices and times of the frames of each
    video; take it out before `model.generate`.

    `apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt",
    add_generation_prompt=True, processor_kwargs={...})` does the same from messages, in which a part
    `{"type": "video", "path" | "url" | "video": ...}` is a video. The template is the checkpoint's own, whether it
    knows videos or not: they stand where its images would stand. What is written in a message is text, also
    `<video>`.
    """

    valid_processor_kwargs = BTAdapterChatProcessorKwargs
    text_kwargs = {"padding": True}
    default_chat_template: str

    def _add_placeholders(self, tokenizer: PreTrainedTokenizerBase, num_clips: int) -> None:
        """Makes `<image>` and `<video>` tokens of the tokenizer, where they are not yet."""
        _check_num_clips(num_clips)
        self.num_clips = num_clips
        for token in (self.image_token, self.video_token):
            if token not in tokenizer.get_vocab():
                tokenizer.add_tokens([AddedToken(token, normalized=False, special=True)], special_tokens=True)
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
            [self.image_token, self.video_token]
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """From a checkpoint of ours, or from the native host's, whose tokenizer then gets a video token.

        Fields of the video processor (`num_frames`, `sampling`, ...) and `num_clips` replace the saved ones.
        """
        fields = {name: kwargs.pop(name) for name in _VIDEO_FIELDS if name in kwargs}
        num_clips = kwargs.pop("num_clips", None)
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **hub)
        if saved.get("processor_class") == cls.__name__:
            processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        else:
            processor = cls._from_native(pretrained_model_name_or_path, hub)
        if fields:
            processor.video_processor = BTAdapterVideoProcessor(**{**processor.video_processor.to_dict(), **fields})
        if num_clips is not None:
            processor._add_placeholders(processor.tokenizer, num_clips)
        return processor

    @classmethod
    def _from_native(cls, source: str, hub: dict[str, Any]):
        raise NotImplementedError

    def __call__(self, images=None, text=None, videos=None, *, shown=None, **kwargs) -> BatchFeature:
        """See the class. `shown` is for `apply_chat_template`.

        Raises:
            ValueError: placeholders and visuals differ in number; a text is empty; truncation would cut visual tokens.
            VideoError: an image or video cannot be used, or a video has fewer frames than clips.
        """
        if shown is not None:
            images, videos = shown["images"], shown["videos"]
        if images is None and text is None and videos is None:
            raise ValueError(f"{type(self).__name__} needs text, images or videos.")
        images, videos = _flat_images(images), _flat_videos(videos)
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
            if not all(isinstance(sample, str) for sample in text):
                raise ValueError("`text` must be a string or a list of strings.")
            text = self._with_placeholders(text, images, videos)
            kinds = self._placeholders(text, images, videos, (shown or {}).get("image_tokens", ()))
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        num_clips = merged["videos_kwargs"].pop("num_clips", None)
        num_clips = self.num_clips if num_clips is None else num_clips
        data, runs = {}, {"image": [], "video": []}  # runs: the ids that stand for each of them in a prompt
        if images:
            data.update(self.image_processor(images, **merged["images_kwargs"]))
            runs["image"] = [[self.image_token_id] * self._num_tokens(pixels) for pixels in data["pixel_values"]]
        if videos:
            data.update(self._process_videos(videos, num_clips, **merged["videos_kwargs"]))
            counts = self._video_tokens(data, len(videos), num_clips)
            runs["video"] = [[self.video_token_id] * count for count in counts]
            if num_clips > 1:
                logger.warning_once(f"Videos of {num_clips} clips each have {max(counts)} tokens per video.")
        if text is not None:
            data.update(self._encode(text, kinds, runs, merged["text_kwargs"]))
            if merged.get("return_mm_token_type_ids"):
                data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        return BatchFeature(
            data,
            tensor_type=merged["text_kwargs"].get("return_tensors"),
            skip_tensor_conversion=self.skip_tensor_conversion,
        )

    def _num_tokens(self, pixels: Any) -> int:
        """How many tokens an image (3, H, W) or a clip (T, 3, H, W) has."""
        raise NotImplementedError

    def _video_tokens(self, data: Mapping[str, Any], videos: int, num_clips: int) -> list[int]:
        """How many tokens each video has, with all its clips."""
        return [num_clips * self._num_tokens(data["pixel_values_videos"][0])] * videos

    @property
    def blank_frames(self) -> int:
        """Frames of a video that has as many tokens as any."""
        return self.num_clips

    def _with_placeholders(self, text: list[str], images: list, videos: list) -> list[str]:
        return text

    def _placeholders(self, text: list[str], images: list, videos: list, image_tokens: Sequence[str]) -> list[str]:
        """What each placeholder of all texts stands for, in order: "image" or "video".

        Args:
            image_tokens: what the image tokens stand for, where a template writes them for videos too.

        Raises:
            ValueError: they are not as many as the images and videos; a text has nothing else.
        """
        shown, kinds, counts = iter(image_tokens), [], {"image": [], "video": []}
        for index, sample in enumerate(text):
            found = re.findall(self._pattern, sample)
            own = [next(shown, "image") if token == self.image_token else "video" for token in found]
            for kind in KINDS:
                counts[kind].append(own.count(kind))
            kinds += own
            if not re.sub(self._pattern, "", sample).strip():
                raise ValueError(f"text[{index}] is empty but for placeholders: ask a question.")
        for kind, given in (("image", images), ("video", videos)):
            if sum(counts[kind]) != len(given):
                raise ValueError(
                    f"The texts have {sum(counts[kind])} {self._tokens[kind]} placeholders ({counts[kind]} per "
                    f"text) and {len(given)} {kind}s were passed: give one {kind} per placeholder, in the order of "
                    "the texts."
                )
        return kinds

    @property
    def _tokens(self) -> dict[str, str]:
        return {"image": self.image_token, "video": self.video_token}

    @property
    def _pattern(self) -> str:
        """Placeholders, and none that are words of a message."""
        return f"(?<!{START})(?:{'|'.join(map(re.escape, self._tokens.values()))})"

    def _process_videos(self, videos: list, num_clips: int, **options: Any) -> BatchFeature:
        _check_num_clips(num_clips)
        if num_clips > 1:
            options["num_frames"] = num_clips * (options.get("num_frames") or self.video_processor.num_frames)
        processed = self.video_processor(videos, **options)
        if num_clips > 1:
            self._cut(processed, num_clips)
        return processed

    @staticmethod
    def _cut(processed: BatchFeature, num_clips: int) -> None:
        """Cuts each video (T, 3, H, W) into consecutive clips, as equal in length as can be, which become rows."""
        masks = processed.pop("frame_mask", None)
        clips = []
        for index, video in enumerate(processed["pixel_values_videos"]):
            video = torch.as_tensor(video)
            video = video if masks is None else video[torch.as_tensor(masks[index])]
            if len(video) < num_clips:
                raise VideoInputError(f"videos[{index}] has {len(video)} frames, too few for {num_clips} clips.")
            clips.extend(video.tensor_split(num_clips))
        processed.update(_collate(clips, "pt"))

    def _segments(self, text: str) -> Iterator[tuple[str, int]]:
        """Pieces of a prompt that are tokenized apart, each with the place where it starts."""
        yield text, 0

    def _encode(
        self, text: list[str], kinds: list[str], runs: Mapping[str, list[list[int]]], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Prompts to padded ids; visual tokens are never cut.

        With `return_offsets_mapping`, as `apply_chat_template` asks for to find answers, also `offset_mapping`: from
        where to where in its prompt each token stands; (0, 0) for visual tokens and padding.

        Args:
            kinds: what each placeholder stands for.
            runs: the ids that stand for each image and each video.

        Raises:
            ValueError: if they would be.
        """
        kinds, runs = iter(kinds), {kind: iter(ids) for kind, ids in runs.items()}
        rows, offsets, with_offsets = [], [], options.get("return_offsets_mapping", False)
        limit = options.get("max_length") or self.tokenizer.model_max_length
        for index, prompt in enumerate(text):
            ids, places, special = [], [], options.get("add_special_tokens", True)
            for part, start in self._segments(prompt):
                is_visual = part in self._tokens.values()
                for token, place in self._tokenize(part, start, special and not is_visual, with_offsets):
                    is_run = token in (self.image_token_id, self.video_token_id)
                    run = next(runs[next(kinds)]) if is_run else [token]
                    ids += run
                    places += [(0, 0)] * len(run) if is_run else [place]
                special = special and is_visual  # the start token stands once
            if options.get("truncation") and len(ids) > limit:
                if {self.image_token_id, self.video_token_id} & set(ids[limit:]):
                    raise ValueError(
                        f"text[{index}] has {len(ids)} tokens, and cutting it to {limit} would cut visual tokens: "
                        "raise max_length, or use fewer images, videos or clips."
                    )
                ids, places = ids[:limit], places[:limit]
            rows.append(ids)
            offsets.append(places)
        return self._pad(rows, offsets if with_offsets else None, options, limit)

    def _tokenize(
        self, text: str, start: int, special: bool, with_offsets: bool
    ) -> Iterator[tuple[int, tuple[int, int]]]:
        """Ids of a piece of a prompt, each with its place; marked ones are words like others."""
        for number, piece in enumerate(re.split(f"({START}.*?{END})", text, flags=re.DOTALL)):
            options = {"split_special_tokens": True} if piece.startswith(START) else {}
            words = show(piece)
            # Within a text a newline goes before and its ids away: some tokenizers put a blank before what they get.
            for head in ("\n", "") if number else ("",):
                tokens = self.tokenizer(
                    head + words, add_special_tokens=special, return_offsets_mapping=with_offsets, **options
                )
                lead = self.tokenizer(head, add_special_tokens=False)["input_ids"] if head else []
                if tokens["input_ids"][: len(lead)] == lead:
                    break
            places = tokens["offset_mapping"] if with_offsets else [(0, 0)] * len(tokens["input_ids"])
            for token, (a, b) in list(zip(tokens["input_ids"], places, strict=True))[len(lead) :]:
                # the start token stands nowhere
                yield token, (a + start - len(head), b + start - len(head)) if b > a else (0, 0)
            start, special = start + len(piece), False

    def _pad(
        self, rows: list[list[int]], offsets: list | None, options: Mapping[str, Any], limit: int
    ) -> dict[str, Any]:
        side, padding = options.get("padding_side") or "left", options.get("padding")
        multiple = options.get("pad_to_multiple_of")
        if len({len(row) for row in rows}) == 1 and padding != "max_length" and not multiple:
            data = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}  # needs no padding token
        else:
            length = {"max_length": limit} if padding == "max_length" else {}
            data = dict(
                self.tokenizer.pad(
                    {"input_ids": rows}, padding=padding, padding_side=side, pad_to_multiple_of=multiple, **length
                )
            )
        if offsets is not None:
            gaps = [[(0, 0)] * (len(ids) - len(row)) for ids, row in zip(data["input_ids"], offsets, strict=True)]
            pairs = zip(gaps, offsets, strict=True)
            data["offset_mapping"] = [gap + places if side == "left" else places + gap for gap, places in pairs]
        return data

    def apply_chat_template(
        self, conversation, chat_template=None, *, tokenize: bool = False, processor_kwargs=None, **kwargs
    ):
        """As in transformers; a user's message without a word, and a part of unknown type, are errors."""
        is_one, options = not is_batch(conversation), dict(processor_kwargs or {})
        batch = [
            plain_messages(messages, f"conversation[{index}]")
            for index, messages in enumerate([conversation] if is_one else conversation)
        ]
        if not tokenize:
            prompts = [show(prompt) for prompt in self._prompts(batch, chat_template, **kwargs)]
            return prompts[0] if is_one else prompts
        template, given = (
            self._template(chat_template),
            {name: options.pop(name, None) for name in ("images", "videos")},
        )
        elsewhere = any(value is not None for value in given.values())
        batch, shown = self._fitted(batch, template, hidden=not elsewhere)  # else texts may hold placeholders
        options["shown"] = {**shown, **given} if elsewhere else shown
        return super().apply_chat_template(
            batch[0] if is_one else batch, template, tokenize=True, processor_kwargs=options, **kwargs
        )

    def _template(self, chosen: str | None) -> str | None:
        """A template by its name or text; the processor's own by default."""
        named = self.chat_template if isinstance(self.chat_template, Mapping) else {"default": self.chat_template}
        return named.get("default" if chosen is None else chosen, chosen)

    def _prompts(self, batch: list[list[dict[str, Any]]], chat_template: str | None, **kwargs) -> list[str]:
        """Conversations to prompts, in which placeholders that a caller wrote are marked as words."""
        template = self._template(chat_template)
        batch, shown = self._fitted(batch, template)
        prompts, kinds = super().apply_chat_template(batch, template, **kwargs), iter(shown["image_tokens"])

        def named(match: re.Match) -> str:
            return self._tokens[next(kinds, "image")] if match.group() == self.image_token else match.group()

        return [re.sub(self._pattern, named, prompt) for prompt in prompts]

    def _fitted(
        self, batch: list[list[dict[str, Any]]], template: str | None, hidden: bool = True
    ) -> tuple[list[list[dict[str, Any]]], dict[str, list]]:
        """Conversations as a template reads them, and what they show.

        A template that knows no videos shows them where it shows images; one that reads plain text alone gets the
        placeholders in front of it, as in LLaVA's own data.

        Raises:
            ValueError: the template can show no videos.
        """
        text = {"type": "text", "text": "w0rd", "other": "dump3d"}
        takes_text, takes_parts = self._writes(template, "w0rd", "w0rd"), self._writes(template, [text], "w0rd")
        shows = [kind for kind in KINDS if self._writes(template, [{"type": kind}, text], self._tokens[kind])]
        as_images = shows == ["image"]
        shown, fitted = {"images": [], "videos": [], "image_tokens": []}, []

        def fit(message: dict[str, Any]) -> dict[str, Any]:
            if hidden:
                message = hide(message, self._pattern)
            content = message.get("content")
            if not content or not (takes_text or takes_parts):
                return message
            if isinstance(content, str):
                return message if takes_text else {**message, "content": [{"type": "text", "text": content}]}
            kinds = [part["type"] for part in content if part["type"] in KINDS]
            if takes_parts and (as_images or set(kinds) <= set(shows)):
                parts = [
                    {**part, "type": "image"} if as_images and part["type"] == "video" else part for part in content
                ]
                return {**message, "content": parts}
            if takes_text:
                before = "".join(f"{self._tokens[kind]}\n" for kind in kinds)
                return {**message, "content": before + " ".join(texts(message))}
            if "video" in kinds:
                raise ValueError(
                    "The chat template of this processor shows no videos: pass another as chat_template, for example "
                    f"{type(self).__name__}.default_chat_template."
                )
            return message

        for messages in batch:
            for part in (part for message in messages for part in parts_of(message)):
                kind = part["type"]
                shown[f"{kind}s"] += sources_of(part)
                shown["image_tokens"] += [kind] if as_images else []
            fitted.append([fit(message) for message in messages])
        return fitted, shown

    def _writes(self, template: str | None, content: str | list, expected: str) -> bool:
        """Whether a template writes what it should of a user's message, and not the message as it is kept."""
        try:
            prompt = super().apply_chat_template([{"role": "user", "content": content}], template)
        except (TemplateError, TypeError):  # "takes no parts", or text + list
            return False
        return expected in prompt and "dump3d" not in prompt

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs) -> list[str]:
        """Token ids (B, S) -> texts. Pass the new ids only: `output[:, inputs["input_ids"].shape[1]:]`."""
        texts = self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return [text.strip() for text in texts]

    @property
    def model_input_names(self) -> list[str]:
        names = [*self.tokenizer.model_input_names, "pixel_values", "pixel_values_videos", "frame_mask"]
        return [name for name in names if name != "token_type_ids"]


def _check_num_clips(num_clips: Any) -> None:
    if isinstance(num_clips, bool) or not isinstance(num_clips, int) or num_clips < 1:
        raise ValueError(f"`num_clips` must be an integer of at least 1, got {num_clips!r}.")


def _flat_images(images: Any) -> list:
    images = _without_empty_rows(images)
    return [] if images is None else make_flat_list_of_images(_loaded(images))


def _loaded(images: Any) -> Any:
    if isinstance(images, (list, tuple)):
        return [_loaded(image) for image in images]
    if isinstance(images, Image.Image):
        return read_image(images)
    return load_image(images) if isinstance(images, (str, bytes, os.PathLike)) else images


def _flat_videos(videos: Any) -> list:
    videos = _without_empty_rows(videos)
    return [] if videos is None else [read_source(video) for video in flatten_videos(videos)]


def _without_empty_rows(visuals: Any) -> Any:
    """Text-only rows of a batch come with empty lists; None if nothing is left."""
    if isinstance(visuals, (list, tuple)):
        visuals = [item for item in visuals if not (isinstance(item, (list, tuple)) and not item)]
        return visuals or None
    return visuals


def video_processor_like(image_processor: Any) -> BTAdapterVideoProcessor:
    """A video processor for the size and the statistics of a host's image processor."""
    size = getattr(image_processor, "crop_size", None) or image_processor.size
    side = size["height"]
    return BTAdapterVideoProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(image_processor.image_mean),
        image_std=list(image_processor.image_std),
        num_frames=NUM_FRAMES,
        sampling=SAMPLING,
    )
