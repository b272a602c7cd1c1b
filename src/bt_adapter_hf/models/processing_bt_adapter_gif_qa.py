"""Processor of GIF question answering."""

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from .configuration_bt_adapter_gif_qa import BTAdapterGifQAConfig, XCLIPFramesConfig
from .processing_bt_adapter_chat import SAMPLING, BTAdapterChatProcessorMixin
from .processing_bt_adapter_llava import LLAVA_CHAT_TEMPLATE
from .video_processing_bt_adapter import BTAdapterVideoProcessor


class BTAdapterGifQAProcessor(BTAdapterChatProcessorMixin):
    __doc__ = f"""Processor of [`BTAdapterGifQAForConditionalGeneration`].

    A prompt asks about at least one GIF (or video); images are no GIFs, but `[image]`, a video of one frame, is one.

    Args:
        video_processor, tokenizer:
            The parts: a [`BTAdapterVideoProcessor`] and the tokenizer of the language model.
        frames_per_group (`int`, *optional*), tokens_per_group (`int`, *optional*): as in the model's config.
        num_clips (`int`): clips that a video is cut into, see below.
        chat_template (`str`, *optional*): by default LLaVA's.

    {BTAdapterChatProcessorMixin.__doc__}"""

    default_chat_template = LLAVA_CHAT_TEMPLATE

    def __init__(
        self,
        video_processor=None,
        tokenizer=None,
        frames_per_group: int | None = None,
        tokens_per_group: int | None = None,
        num_clips: int = 1,
        image_token: str = "<image>",
        video_token: str = "<video>",
        chat_template: str | None = None,
        **kwargs,
    ):
        self.frames_per_group, self.tokens_per_group = frames_per_group, tokens_per_group
        self.image_token, self.video_token = image_token, video_token
        self._add_placeholders(tokenizer, num_clips)
        super().__init__(video_processor, tokenizer, chat_template=chat_template or self.default_chat_template)

    @classmethod
    def from_components(
        cls, config: BTAdapterGifQAConfig, *, tower: str | os.PathLike, language_model: str | os.PathLike, **hub: Any
    ) -> "BTAdapterGifQAProcessor":
        """The processor for a model of [`BTAdapterGifQAForConditionalGeneration.from_components`].

        Args:
            config: of the model.
            tower, language_model: the same pieces.
            hub: `cache_dir`, `token`, `local_files_only`.
        """
        tokenizer = AutoTokenizer.from_pretrained(language_model, **hub)
        if tokenizer.pad_token is None:  # what is padded is masked, whatever it is
            tokenizer.pad_token = tokenizer.eos_token
        if AutoConfig.from_pretrained(tower, **hub).model_type in ("bt_adapter", "bt_adapter_vision"):
            videos = BTAdapterVideoProcessor.from_pretrained(tower, **hub)
        else:
            videos = xclip_video_processor(config.vision_config)
        return cls(
            videos, tokenizer, frames_per_group=config.frames_per_group, tokens_per_group=config.tokens_per_group
        )

    @classmethod
    def _from_native(cls, source: str, hub: dict[str, Any]) -> "BTAdapterGifQAProcessor":
        raise ValueError(
            f"{source} holds no processor of GIF question answering: make one with {cls.__name__}.from_components, "
            "and save it beside the model."
        )

    def __call__(self, images=None, text=None, videos=None, *, shown=None, **kwargs):
        """See the class.

        Raises:
            ValueError: images are passed; a prompt shows no GIF; and as in the other processors.
        """
        if images is not None or (shown or {}).get("images"):
            raise ValueError("This model is asked about GIFs and videos, and an image was passed: pass it as [image].")
        return super().__call__(images, text, videos, shown=shown, **kwargs)

    def _placeholders(self, text: list[str], *args) -> list[str]:
        for index, sample in enumerate(text):
            if self.video_token not in sample:
                raise ValueError(f"text[{index}] asks about no GIF: each prompt needs a video, {self.video_token}.")
        return super()._placeholders(text, *args)

    @property
    def blank_frames(self) -> int:
        return self.num_clips * self.video_processor.num_frames

    def _video_tokens(self, data: dict[str, Any], videos: int, num_clips: int) -> list[int]:
        """Tokens of each video, of all its clips."""
        pixels, mask = data["pixel_values_videos"], data.get("frame_mask")
        lengths = [len(clip) for clip in pixels] if mask is None else torch.as_tensor(mask).sum(dim=1).tolist()
        counts = [self._clip_tokens(T) for T in lengths]
        return [sum(counts[start : start + num_clips]) for start in range(0, len(counts), num_clips)]

    def _clip_tokens(self, T: int) -> int:
        if self.frames_per_group is None:
            return self.tokens_per_group
        if self.tokens_per_group is None:
            return T
        return -(-T // self.frames_per_group) * self.tokens_per_group


def xclip_video_processor(config: XCLIPFramesConfig) -> BTAdapterVideoProcessor:
    """What X-CLIP's checkpoints were trained with: their own file asks for bilinear resizing and ImageNet's
    statistics."""
    side = config.image_size
    return BTAdapterVideoProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=PILImageResampling.BILINEAR,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        num_frames=config.num_frames,
        sampling=SAMPLING,
    )


AutoProcessor.register(BTAdapterGifQAConfig, BTAdapterGifQAProcessor, exist_ok=True)
