"""Processors of the hosts with a Q-Former: InstructBLIP and MiniGPT-4."""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    Blip2Config,
    Blip2Processor,
    InstructBlipProcessor,
)

from .chat_messages_bt_adapter import is_batch, plain_messages, show
from .chat_templates_bt_adapter import INSTRUCTBLIP_CHAT_TEMPLATE, MINIGPT4_CHAT_TEMPLATE, MINIGPT4_STOP
from .configuration_bt_adapter_chat import BTAdapterInstructBlipConfig, BTAdapterMiniGPT4Config
from .processing_bt_adapter_chat import BTAdapterChatProcessorMixin, video_processor_like


class BTAdapterQFormerProcessorMixin(BTAdapterChatProcessorMixin):
    """Prompts of the hosts with a Q-Former: text is tokenized in the segments between the visuals."""

    def _num_tokens(self, pixels: Any) -> int:
        return self.num_query_tokens

    def _segments(self, text: str) -> Iterator[tuple[str, int]]:
        start = 0
        for part in re.split(f"({self._pattern})", text):
            if part:
                yield part, start
            start += len(part)


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
        chat_template = chat_template or self.default_chat_template
        super().__init__(image_processor, video_processor, tokenizer, qformer_tokenizer, chat_template=chat_template)

    @classmethod
    def _from_native(cls, source: str, hub: dict[str, Any]) -> "BTAdapterInstructBlipProcessor":
        native = InstructBlipProcessor.from_pretrained(source, **hub)
        return cls(
            native.image_processor,
            video_processor_like(native.image_processor),
            native.tokenizer,
            native.qformer_tokenizer,
            image_token=str(native.image_token),
            num_query_tokens=BTAdapterInstructBlipConfig.from_pretrained(source, **hub).num_query_tokens,
        )

    def _with_placeholders(self, text: list[str], images: list, videos: list) -> list[str]:
        if any(token in sample for sample in text for token in (self.image_token, self.video_token)):
            return text
        for token, given, other in ((self.image_token, images, videos), (self.video_token, videos, images)):
            if len(given) == len(text) and not other:
                return [token + sample for sample in text]
        return text

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """As in transformers. With `return_assistant_tokens_mask=True`, that is for learning, the Q-Former reads what
        stands before the first answer: what it reads reaches every answer, so it must hold none of them."""
        data = super().apply_chat_template(conversation, chat_template, **kwargs)
        if kwargs.get("return_assistant_tokens_mask") and isinstance(data, Mapping):
            batch = [
                list(itertools.takewhile(lambda m: m["role"] != "assistant", plain_messages(messages, "conversation")))
                for messages in (conversation if is_batch(conversation) else [conversation])
            ]
            data.update(self._read_words(self._prompts(batch, chat_template)))
            data.convert_to_tensors(kwargs.get("return_tensors"))
        return data

    def _segments(self, text: str) -> Iterator[tuple[str, int]]:
        for part, start in super()._segments(text):
            if part.strip():
                yield part.strip(), start + len(part) - len(part.lstrip())

    def _encode(self, text: list[str], kinds, runs, options: Mapping[str, Any]) -> dict[str, Any]:
        data = super()._encode(text, kinds, runs, options)
        if not options.get("return_offsets_mapping"):  # else `apply_chat_template` knows what is to be read
            data |= self._read_words(text)
        return data

    def _read_words(self, text: list[str]) -> dict[str, Any]:
        """What the Q-Former reads of prompts: their words.

        Raises:
            ValueError: if they are too long for it.
        """
        visual = self._tokens.values()
        words = [show(" ".join(part for part, _ in self._segments(prompt) if part not in visual)) for prompt in text]
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
        chat_template = chat_template or self.default_chat_template
        super().__init__(image_processor, video_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def _from_native(cls, source: str, hub: dict[str, Any]) -> "BTAdapterMiniGPT4Processor":
        native = Blip2Processor.from_pretrained(source, **hub)
        return cls(
            native.image_processor,
            video_processor_like(native.image_processor),
            native.tokenizer,
            image_token=str(native.image_token),
            num_query_tokens=BTAdapterMiniGPT4Config.from_pretrained(source, **hub).num_query_tokens,
        )

    @classmethod
    def from_components(cls, *, vision_qformer: str, language_model: str, **hub) -> "BTAdapterMiniGPT4Processor":
        """The processor for [`BTAdapterMiniGPT4ForConditionalGeneration.from_components`] of the same pieces."""
        image_processor = AutoImageProcessor.from_pretrained(vision_qformer, **hub)
        return cls(
            image_processor,
            video_processor_like(image_processor),
            AutoTokenizer.from_pretrained(language_model, **hub),
            num_query_tokens=Blip2Config.from_pretrained(vision_qformer, **hub).num_query_tokens,
        )

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs) -> list[str]:
        """Token ids (B, S) of answers -> texts, up to the "###" that ends them."""
        texts = super().post_process_image_text_to_text(generated_outputs, skip_special_tokens, **kwargs)
        return [text.split(MINIGPT4_STOP)[0].split("Assistant:")[-1].strip() for text in texts]


AutoProcessor.register(BTAdapterInstructBlipConfig, BTAdapterInstructBlipProcessor, exist_ok=True)
AutoProcessor.register(BTAdapterMiniGPT4Config, BTAdapterMiniGPT4Processor, exist_ok=True)
