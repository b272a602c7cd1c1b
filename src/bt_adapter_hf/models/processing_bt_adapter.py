"""Processor of BT-Adapter: text, images and videos to the inputs of `BTAdapterModel`."""

from typing import Any

from transformers import AutoProcessor
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .configuration_bt_adapter import BTAdapterConfig

# AutoProcessor loads the video processor by the name in the saved config: this import registers it
from .video_processing_bt_adapter import BTAdapterVideoProcessor  # noqa: F401


class BTAdapterProcessor(ProcessorMixin):
    """Wraps an image processor (CLIP's), a [`BTAdapterVideoProcessor`] and a tokenizer.

    `processor(images=None, text=None, videos=None, **kwargs)` returns what was asked for among `input_ids` and
    `attention_mask` `(texts, length)`, `pixel_values` `(images, 3, H, W)`, `pixel_values_videos` `(B, T, 3, H, W)`
    and, where the videos differ in length, `frame_mask` `(B, T)`. Options go to the part that knows them
    (`padding=True`, `num_frames=16`, `sampling="centers"`) or in `text_kwargs`, `images_kwargs`, `videos_kwargs`.
    """

    def __init__(self, image_processor=None, video_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, video_processor, tokenizer, **kwargs)

    def __call__(self, images=None, text=None, videos=None, **kwargs) -> BatchFeature:
        """See the class.

        Raises:
            ValueError: a text is longer than the tokenizer's limit and `truncation=True` was not given; nothing given.
            VideoError: a video that cannot be used.
        """
        output = super().__call__(images=images, text=text, videos=videos, **kwargs)
        if "input_ids" in output:
            # padding fills short texts up to the length of a long one
            self._check_text_length(
                output.get("attention_mask", output["input_ids"]), padded="attention_mask" in output
            )
        return output

    def _check_text_length(self, rows: Any, padded: bool) -> None:
        # a single text comes back as a flat list
        rows = rows if hasattr(rows[0], "__len__") else [rows]
        limit = self.tokenizer.model_max_length
        for index, row in enumerate(rows):
            length = int(sum(row)) if padded else len(row)
            if length > limit:
                raise ValueError(
                    f"Text {index} has {length} tokens, the limit is {limit}: pass `truncation=True` to cut it, or "
                    "shorten it."
                )


AutoProcessor.register(BTAdapterConfig, BTAdapterProcessor, exist_ok=True)
