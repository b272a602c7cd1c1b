"""Processors of the chat models: text, images and videos to prompts with the model's own number of visual tokens."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    AddedToken,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    Blip2Config,
    Blip2Processor,
    InstructBlipProcessor,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin
from transformers.utils import logging

from .chat_templates_bt_adapter import (
    INSTRUCTBLIP_CHAT_TEMPLATE,
    LLAVA_CHAT_TEMPLATE,
    MINIGPT4_CHAT_TEMPLATE,
    MINIGPT4_STOP,
)
from .configuration_bt_adapter_chat import (
    BTAdapterInstructBlipConfig,
    BTAdapterLlavaConfig,
    BTAdapterMiniGPT4Config,
)
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
    `{"type": "video", "path" | "url" | "video": ...}` is a video.
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

    def _chat_template(self, given: str | Mapping[str, str] | None) -> str | Mapping[str, str]:
        """The template of a native checkpoint knows no videos."""
        text = given.get("default", "") if isinstance(given, Mapping) else given
        return given if text and "video" in text else self.default_chat_template

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

    def __call__(self, images=None, text=None, videos=None, num_clips: int | None = None, **kwargs) -> BatchFeature:
        """See the class.

        Raises:
            ValueError: placeholders and visuals differ in number; a text is empty; truncation would cut visual tokens.
            VideoError: a video cannot be used, or has fewer frames than clips.
        """
        if "padding_side" not in kwargs and "padding_side" not in kwargs.get("text_kwargs", {}):
            kwargs["padding_side"] = "left"
        num_clips = self.num_clips if num_clips is None else num_clips
        kwargs["videos_kwargs"] = {**kwargs.get("videos_kwargs", {}), "num_clips": num_clips}
        return super().__call__(images=images, text=text, videos=videos, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        images, text, videos, audio = super().prepare_inputs_layout(images, text, videos, audio, **kwargs)
        images, videos = _without_empty_rows(images), _without_empty_rows(videos)
        images = None if images is None else make_flat_list_of_images(images)
        videos = None if videos is None else flatten_videos(videos)
        return images, text, videos, audio

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs) -> None:
        if text is None and images is None and videos is None:
            raise ValueError(f"{type(self).__name__} needs text, images or videos.")
        if text is None:
            return
        if not all(isinstance(sample, str) for sample in text):
            raise ValueError("`text` must be a string or a list of strings.")
        for kind, token, given in (("image", self.image_token, images), ("video", self.video_token, videos)):
            counts = [sample.count(token) for sample in text]
            given = 0 if given is None else len(given)
            if sum(counts) != given:
                raise ValueError(
                    f"The texts have {sum(counts)} {token} placeholders ({counts} per text) and {given} {kind}s were "
                    f"passed: give one {kind} per placeholder, in the order of the texts."
                )
        for index, sample in enumerate(text):
            if not re.sub(f"{re.escape(self.image_token)}|{re.escape(self.video_token)}", "", sample).strip():
                raise ValueError(f"text[{index}] is empty but for placeholders: ask a question.")

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As in transformers; a user's message without a word, and a part of unknown type, are errors."""
        batch = [conversation] if conversation and isinstance(conversation[0], Mapping) else conversation
        for index, messages in enumerate(batch):
            self._check_messages(messages, index)
        return super().apply_chat_template(conversation, *args, **kwargs)

    @staticmethod
    def _check_messages(messages: Sequence[Mapping[str, Any]], index: int) -> None:
        where = f"conversation[{index}]"
        if not messages:
            raise ValueError(f"{where} has no messages.")
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                if part.get("type") not in ("text", "image", "video"):
                    raise ValueError(
                        f"{where} has a part of type {part.get('type')!r}; expected text, image or video."
                    )
            words = "".join(part["text"] for part in parts if part["type"] == "text")
            if message["role"] == "user" and not words.strip():
                raise ValueError(f"{where} has a user's message without text: ask a question.")

    def _process_videos(self, videos, num_clips: int = 1, **kwargs) -> tuple[BatchFeature, list[str]]:
        _check_num_clips(num_clips)
        if num_clips > 1:
            kwargs["num_frames"] = num_clips * (kwargs.get("num_frames") or self.video_processor.num_frames)
        processed = self.video_processor(videos, **kwargs)
        if num_clips > 1:
            self._cut(processed, num_clips)
        replacement = self.replace_video_token(processed, 0) * num_clips
        if num_clips > 1:
            tokens = replacement.count(self.video_token)
            logger.warning_once(f"Videos of {num_clips} clips each have {tokens} tokens per video.")
        return processed, [replacement] * len(videos)

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


def _without_empty_rows(visuals: Any) -> Any:
    """Text-only rows of a batch come with empty lists; None if nothing is left."""
    if isinstance(visuals, (list, tuple)):
        visuals = [item for item in visuals if not (isinstance(item, (list, tuple)) and not item)]
        return visuals or None
    return visuals


def _video_processor(image_processor: Any) -> BTAdapterVideoProcessor:
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


class BTAdapterLlavaProcessor(BTAdapterChatProcessorMixin):
    __doc__ = f"""Processor of [`BTAdapterLlavaForConditionalGeneration`].

    Args:
        image_processor, video_processor, tokenizer:
            The parts: LLaVA's own, and a [`BTAdapterVideoProcessor`].
        patch_size (`int`): of the image tower.
        vision_feature_select_strategy (`"default"` or `"full"`): as in the model's config.
        num_additional_image_tokens (`int`): CLS tokens of the image tower, 1 for CLIP and 0 for SigLIP.
        num_clips (`int`): clips that a video is cut into, see below.
        chat_template (`str`, *optional*): by default Vicuna's, for images and videos.

    {BTAdapterChatProcessorMixin.__doc__}"""

    default_chat_template = LLAVA_CHAT_TEMPLATE

    def __init__(
        self,
        image_processor=None,
        video_processor=None,
        tokenizer=None,
        patch_size: int = 14,
        vision_feature_select_strategy: str = "default",
        num_additional_image_tokens: int = 1,
        num_clips: int = 1,
        image_token: str = "<image>",
        video_token: str = "<video>",
        chat_template: str | None = None,
        **kwargs,
    ):
        self.patch_size = patch_size
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.num_additional_image_tokens = num_additional_image_tokens
        self.image_token, self.video_token = image_token, video_token
        self._add_placeholders(tokenizer, num_clips)
        super().__init__(image_processor, video_processor, tokenizer, chat_template=self._chat_template(chat_template))

    @classmethod
    def _from_native(cls, source: str, hub: dict[str, Any]) -> "BTAdapterLlavaProcessor":
        native = LlavaProcessor.from_pretrained(source, **hub)
        # The model decides how many tokens an image has; old processors do not say.
        config = BTAdapterLlavaConfig.from_pretrained(source, **hub)
        tower = config.vision_config
        return cls(
            native.image_processor,
            _video_processor(native.image_processor),
            native.tokenizer,
            patch_size=tower.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=0 if tower.backbone.model_type == "siglip_vision_model" else 1,
            image_token=native.image_token,
            chat_template=native.chat_template,
        )

    def _num_tokens(self, pixels: Any) -> int:
        height, width = pixels.shape[-2:]
        count = (height // self.patch_size) * (width // self.patch_size) + self.num_additional_image_tokens
        return count - (self.vision_feature_select_strategy == "default")

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs) -> str:
        return self.image_token * self._num_tokens(image_inputs["pixel_values"][image_idx])

    def replace_video_token(self, video_inputs: Mapping[str, Any], video_idx: int, **kwargs) -> str:
        return self.video_token * self._num_tokens(video_inputs["pixel_values_videos"][video_idx])


class BTAdapterQFormerProcessorMixin(BTAdapterChatProcessorMixin):
    """Prompts of the hosts with a Q-Former: text is tokenized in the segments between the visuals."""

    def __call__(self, images=None, text=None, videos=None, num_clips: int | None = None, **kwargs) -> BatchFeature:
        """See [`BTAdapterChatProcessorMixin`]."""
        images, text, videos, _ = self.prepare_inputs_layout(images, text, videos)
        if text is not None and all(isinstance(sample, str) for sample in text):
            text = self._with_placeholders(text, images or [], videos or [])
        self.validate_inputs(images=images, text=text, videos=videos)
        num_clips = self.num_clips if num_clips is None else num_clips
        kwargs["videos_kwargs"] = {**kwargs.get("videos_kwargs", {}), "num_clips": num_clips}
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        data = {}
        if images is not None:
            data.update(self.image_processor(images, **merged["images_kwargs"]))
        if videos is not None:
            data.update(self._process_videos(videos, **merged["videos_kwargs"])[0])
        if text is not None:
            data.update(self._encode(text, merged["videos_kwargs"]["num_clips"], merged["text_kwargs"]))
        return BatchFeature(
            data,
            tensor_type=merged["text_kwargs"].get("return_tensors"),
            skip_tensor_conversion=self.skip_tensor_conversion,
        )

    def _with_placeholders(self, text: list[str], images: list, videos: list) -> list[str]:
        return text

    def _split(self, text: str) -> list[tuple[str, int]]:
        """Segments of a prompt and, between them, its placeholders; each with the place where it starts."""
        pattern = f"{re.escape(self.image_token)}|{re.escape(self.video_token)}"
        parts, end = [], 0
        for match in re.finditer(pattern, text):
            parts += [(text[end : match.start()], end), (match.group(), match.start())]
            end = match.end()
        return [(part, start) for part, start in [*parts, (text[end:], end)] if part]

    def _encode(self, text: list[str], num_clips: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """Prompts to padded ids; visual tokens are never cut.

        With `return_offsets_mapping`, as `apply_chat_template` asks for to find answers, also `offset_mapping`: from
        where to where in its prompt each token stands; (0, 0) for visual tokens and padding.

        Raises:
            ValueError: if they would be.
        """
        visual = {
            self.image_token: [self.image_token_id] * self.num_query_tokens,
            self.video_token: [self.video_token_id] * self.num_query_tokens * num_clips,
        }
        with_offsets = options.get("return_offsets_mapping", False)
        rows, offsets = [], []
        for index, prompt in enumerate(text):
            ids, places, special = [], [], options.get("add_special_tokens", True)
            for part, start in self._split(prompt):
                if part in visual:
                    ids += visual[part]
                    places += [(0, 0)] * len(visual[part])
                    continue
                tokens = self.tokenizer(part, add_special_tokens=special, return_offsets_mapping=with_offsets)
                ids += tokens["input_ids"]
                # the start token stands nowhere
                places += [(a + start, b + start) if b > a else (0, 0) for a, b in tokens.get("offset_mapping", ())]
                special = False  # the start token stands once
            if options.get("truncation") and len(ids) > self._limit(options):
                cut = ids[self._limit(options) :]
                if {self.image_token_id, self.video_token_id} & set(cut):
                    raise ValueError(
                        f"text[{index}] has {len(ids)} tokens, and cutting it to {self._limit(options)} would cut "
                        "visual tokens: raise max_length, or use fewer images, videos or clips."
                    )
                ids, places = ids[: self._limit(options)], places[: self._limit(options)]
            rows.append(ids)
            offsets.append(places)
        padding = {key: options[key] for key in ("padding", "pad_to_multiple_of") if key in options}
        if options.get("padding") == "max_length":
            padding["max_length"] = self._limit(options)
        side = options.get("padding_side") or "left"
        data = dict(self.tokenizer.pad({"input_ids": rows}, padding_side=side, **padding))
        if with_offsets:
            empty = [
                [(0, 0)] * (len(ids) - len(places)) for ids, places in zip(data["input_ids"], offsets, strict=True)
            ]
            pairs = zip(empty, offsets, strict=True)
            data["offset_mapping"] = [gap + places if side == "left" else places + gap for gap, places in pairs]
        return data

    def _limit(self, options: Mapping[str, Any]) -> int:
        return options.get("max_length") or self.tokenizer.model_max_length

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs) -> str:
        return self.image_token * self.num_query_tokens

    def replace_video_token(self, video_inputs: Mapping[str, Any], video_idx: int, **kwargs) -> str:
        return self.video_token * self.num_query_tokens


class BTAdapterInstructBlipProcessor(BTAdapterQFormerProcessorMixin):
    __doc__ = f"""Processor of [`BTAdapterInstructBlipForConditionalGeneration`].

    Visual tokens stand in front, before the start token, as in InstructBLIP. Texts without any placeholder, as many
    as images and videos, get one each. The Q-Former reads the words: `qformer_input_ids`, `qformer_attention_mask`.

    Args:
        image_processor, video_processor, tokenizer, qformer_tokenizer:
            The parts: InstructBLIP's own, and a [`BTAdapterVideoProcessor`].
        num_query_tokens (`int`): tokens per image or video, as in the model's config.
        num_clips (`int`): clips that a video is cut into, see below.
        chat_template (`str`, *optional*): by default what is seen, then the words.

    {BTAdapterChatProcessorMixin.__doc__}"""

    default_chat_template = INSTRUCTBLIP_CHAT_TEMPLATE

    def __init__(
        self,
        image_processor=None,
        video_processor=None,
        tokenizer=None,
        qformer_tokenizer=None,
        num_query_tokens: int = 32,
        num_clips: int = 1,
        image_token: str = "<image>",
        video_token: str = "<video>",
        chat_template: str | None = None,
        **kwargs,
    ):
        self.num_query_tokens = num_query_tokens
        self.image_token, self.video_token = image_token, video_token
        self._add_placeholders(tokenizer, num_clips)
        super().__init__(
            image_processor,
            video_processor,
            tokenizer,
            qformer_tokenizer,
            chat_template=self._chat_template(chat_template),
        )

    @classmethod
    def _from_native(cls, source: str, hub: dict[str, Any]) -> "BTAdapterInstructBlipProcessor":
        native = InstructBlipProcessor.from_pretrained(source, **hub)
        return cls(
            native.image_processor,
            _video_processor(native.image_processor),
            native.tokenizer,
            native.qformer_tokenizer,
            num_query_tokens=BTAdapterInstructBlipConfig.from_pretrained(source, **hub).num_query_tokens,
        )

    def _with_placeholders(self, text: list[str], images: list, videos: list) -> list[str]:
        if any(token in sample for sample in text for token in (self.image_token, self.video_token)):
            return text
        for token, given, other in ((self.image_token, images, videos), (self.video_token, videos, images)):
            if len(given) == len(text) and not other:
                return [token + sample for sample in text]
        return text

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As in transformers. With `return_assistant_tokens_mask=True`, that is for learning, the Q-Former reads what
        stands before the first answer: what it reads reaches every answer, so it must hold none of them."""
        data = super().apply_chat_template(conversation, *args, **kwargs)
        if kwargs.get("return_assistant_tokens_mask") and isinstance(data, Mapping):
            batch = [conversation] if isinstance(conversation[0], Mapping) else conversation
            asked = [list(itertools.takewhile(lambda m: m["role"] != "assistant", messages)) for messages in batch]
            data.update(self._read_words(super().apply_chat_template(asked)))
            data.convert_to_tensors(kwargs.get("return_tensors"))
        return data

    def _split(self, text: str) -> list[tuple[str, int]]:
        parts = [(part, start + len(part) - len(part.lstrip())) for part, start in super()._split(text)]
        return [(part.strip(), start) for part, start in parts if part.strip()]

    def _encode(self, text: list[str], num_clips: int, options: Mapping[str, Any]) -> dict[str, Any]:
        data = super()._encode(text, num_clips, options)
        if not options.get("return_offsets_mapping"):  # else `apply_chat_template` knows what is to be read
            data |= self._read_words(text)
        return data

    def _read_words(self, text: list[str]) -> dict[str, Any]:
        """What the Q-Former reads of prompts: their words.

        Raises:
            ValueError: if they are too long for it.
        """
        visual = (self.image_token, self.video_token)
        words = [" ".join(part for part, _ in self._split(prompt) if part not in visual) for prompt in text]
        encoded = self.qformer_tokenizer(words, padding=True, return_token_type_ids=False)
        limit, longest = self.qformer_tokenizer.model_max_length, max(map(len, encoded["input_ids"]))
        if longest > limit:
            raise ValueError(f"The Q-Former reads {limit} tokens of text and got {longest}: shorten the question.")
        return {"qformer_input_ids": encoded["input_ids"], "qformer_attention_mask": encoded["attention_mask"]}

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "qformer_input_ids", "qformer_attention_mask"]


class BTAdapterMiniGPT4Processor(BTAdapterQFormerProcessorMixin):
    __doc__ = f"""Processor of [`BTAdapterMiniGPT4ForConditionalGeneration`].

    Prompts as in MiniGPT-4's demo: "###Human: <Img>" + visual tokens + "</Img> question###Assistant:". The text
    before, between and after visuals is tokenized in separate pieces, and only the first has the start token.

    Args:
        image_processor, video_processor, tokenizer:
            The parts: BLIP-2's image processor, a [`BTAdapterVideoProcessor`] and the tokenizer of Vicuna.
        num_query_tokens (`int`): tokens per image or video, as in the model's config.
        num_clips (`int`): clips that a video is cut into, see below.
        chat_template (`str`, *optional*): by default MiniGPT-4's.

    {BTAdapterChatProcessorMixin.__doc__}"""

    default_chat_template = MINIGPT4_CHAT_TEMPLATE

    def __init__(
        self,
        image_processor=None,
        video_processor=None,
        tokenizer=None,
        num_query_tokens: int = 32,
        num_clips: int = 1,
        image_token: str = "<image>",
        video_token: str = "<video>",
        chat_template: str | None = None,
        **kwargs,
    ):
        self.num_query_tokens = num_query_tokens
        self.image_token, self.video_token = image_token, video_token
        self._add_placeholders(tokenizer, num_clips)
        super().__init__(image_processor, video_processor, tokenizer, chat_template=self._chat_template(chat_template))

    @classmethod
    def _from_native(cls, source: str, hub: dict[str, Any]) -> "BTAdapterMiniGPT4Processor":
        native = Blip2Processor.from_pretrained(source, **hub)
        return cls(
            native.image_processor,
            _video_processor(native.image_processor),
            native.tokenizer,
            num_query_tokens=BTAdapterMiniGPT4Config.from_pretrained(source, **hub).num_query_tokens,
        )

    @classmethod
    def from_components(cls, *, vision_qformer: str, language_model: str, **hub) -> "BTAdapterMiniGPT4Processor":
        """The processor for [`BTAdapterMiniGPT4ForConditionalGeneration.from_components`] of the same pieces."""
        image_processor = AutoImageProcessor.from_pretrained(vision_qformer, **hub)
        return cls(
            image_processor,
            _video_processor(image_processor),
            AutoTokenizer.from_pretrained(language_model, **hub),
            num_query_tokens=Blip2Config.from_pretrained(vision_qformer, **hub).num_query_tokens,
        )

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs) -> list[str]:
        """Token ids (B, S) of answers -> texts, up to the "###" that ends them."""
        texts = super().post_process_image_text_to_text(generated_outputs, skip_special_tokens, **kwargs)
        return [text.split(MINIGPT4_STOP)[0].split("Assistant:")[-1].strip() for text in texts]


AutoProcessor.register(BTAdapterLlavaConfig, BTAdapterLlavaProcessor, exist_ok=True)
AutoProcessor.register(BTAdapterInstructBlipConfig, BTAdapterInstructBlipProcessor, exist_ok=True)
AutoProcessor.register(BTAdapterMiniGPT4Config, BTAdapterMiniGPT4Processor, exist_ok=True)
