"""Processor of LLaVA with a BT-Adapter."""

from typing import Any

from transformers import AutoProcessor, LlavaProcessor

from .chat_templates_bt_adapter import LLAVA_CHAT_TEMPLATE
from .configuration_bt_adapter_chat import BTAdapterLlavaConfig
from .processing_bt_adapter_chat import BTAdapterChatProcessorMixin, video_processor_like


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
