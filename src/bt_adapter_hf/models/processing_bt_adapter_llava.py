"""Processor of LLaVA with a BT-Adapter."""

from typing import Any

from transformers import AutoProcessor, LlavaProcessor

from .configuration_bt_adapter_chat import BTAdapterLlavaConfig
from .processing_bt_adapter_chat import BTAdapterChatProcessorMixin, video_processor_like


# Vicuna 1.1, in which LLaVA is tuned: user turns end with a blank, answers with the end-of-sequence token. A video
# stands before or after the words, as in the message (the released video-LLM is tuned with both); images in front.
LLAVA_CHAT_TEMPLATE = """
{%- macro words(message) -%}
  {%- if message['content'] is string %}{{ message['content'] }}{% else -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}
      {{ part['text'] }}{% if not loop.last %}{{ ' ' }}{% endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro around(message, wanted) -%}
  {%- if message['content'] is not string -%}
    {%- set past = namespace(words=false) -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'text' %}{% set past.words = true %}
      {%- elif part['type'] == 'video' and past.words -%}
        {%- if wanted == 'after' %}{{ '\n<video>' }}{% endif -%}
      {%- elif wanted == 'before' %}{{ '<' + part['type'] + '>\n' }}{% endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' %}{{ words(message) + ' ' }}
  {%- elif message['role'] == 'assistant' -%}
    {{ 'ASSISTANT: ' }}{% generation %}{{ words(message) + eos_token }}{% endgeneration -%}
  {%- else %}{{ 'USER: ' + around(message, 'before') + words(message) + around(message, 'after') + ' ' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif -%}
"""


class BTAdapterLlavaProcessor(BTAdapterChatProcessorMixin):
    __doc__ = f"""Processor of [`BTAdapterLlavaForConditionalGeneration`].

    Args:
        image_processor, video_processor, tokenizer:
            The parts: LLaVA's own, and a [`BTAdapterVideoProcessor`].
        patch_size (`int`): of the image tower.
        vision_feature_select_strategy (`"default"` or `"full"`): as in the model's config.
        num_additional_image_tokens (`int`): CLS tokens of the image tower, 1 for CLIP and 0 for SigLIP.
        num_clips (`int`): clips that a video is cut into, see below.
        chat_template (`str`, *optional*): by default Vicuna's; a native checkpoint's own is kept.

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
        chat_template = chat_template or self.default_chat_template
        super().__init__(image_processor, video_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def _from_native(cls, source: str, hub: dict[str, Any]) -> "BTAdapterLlavaProcessor":
        native = LlavaProcessor.from_pretrained(source, **hub)
        # The model decides how many tokens an image has; old processors do not say.
        config = BTAdapterLlavaConfig.from_pretrained(source, **hub)
        tower = config.vision_config
        return cls(
            native.image_processor,
            video_processor_like(native.image_processor),
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


AutoProcessor.register(BTAdapterLlavaConfig, BTAdapterLlavaProcessor, exist_ok=True)
