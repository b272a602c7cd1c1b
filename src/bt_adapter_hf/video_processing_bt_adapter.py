"""Video processor of BT-Adapter: any video in, normalised frames `(B, T, 3, H, W)` out."""

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, Optional, Union

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
    SizeDict,
    is_valid_image,
    validate_kwargs,
)
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.utils import TensorType
from transformers.video_processing_utils import BaseVideoProcessor

from .video_io import (
    DAMAGE_POLICIES,
    SAMPLING_RULES,
    VIDEO_BACKENDS,
    BTAdapterVideoMetadata,
    EmptyVideoError,
    VideoError,
    VideoSource,
    load_video,
)


_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


class BTAdapterVideoProcessorKwargs(VideosKwargs, total=False):
    """
    sampling (`str`, *optional*):
        Rule that picks the frames: `"uniform"` (released test rule), `"jitter"` (released training rule) or
        `"centers"` (rule of the released video-LLM).
    video_backend (`str`, *optional*):
        Decoder of video files: `"pyav"`, `"decord"` or `"torchcodec"`.
    on_damage (`str`, *optional*):
        `"raise"` for truncated and damaged videos, or `"salvage"` to use the frames before the damage.
    background (`list[int]`, *optional*):
        RGB colour put behind transparent pixels.
    seed (`int`, *optional*):
        Seed of `"jitter"` for this call. None draws from numpy's global state.
    """

    sampling: Optional[str]
    video_backend: Optional[str]
    on_damage: Optional[str]
    background: Optional[Union[list[int], tuple[int, ...]]]
    seed: Optional[int]


class BTAdapterVideoProcessor(BaseVideoProcessor):
    """Decodes, samples, resizes (bicubic, antialiased, on uint8), centre-crops and normalises videos.

    The defaults are the protocol of the released retrieval and recognition models at 224 pixels: 8 frames by the
    released test rule, short side to 224, centre crop 224, CLIP statistics. The released DiDeMo, LSMDC and ActivityNet
    configs use `size={"shortest_edge": 256}` with the same crop. Every field below is saved in the config and can be
    overridden per call.

    A video is whatever [`load_video`] takes; give one, a list of them, or a list of lists (flattened). A list of PIL
    images, of `(H, W, 3)` arrays or of image file paths inside a list is one video given as its frames. An array or a
    list of frames that has exactly `num_frames` frames counts as already sampled and is used as it is, and
    `do_sample_frames=False` uses all frames of every video.

    Output (`BatchFeature`):
        pixel_values_videos: float32 `(B, T, 3, H, W)`. Videos with fewer frames are padded with zeros on the right.
        frame_mask: bool `(B, T)`, True for real frames; only where the videos differ in length.
        video_metadata: list of [`BTAdapterVideoMetadata`], with `return_metadata=True`.

    Raises [`VideoError`] subclasses for a video that cannot be used; in a batch the message starts with
    `videos[index]`.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 224}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = True
    num_frames = 8
    sampling = "uniform"
    video_backend = "pyav"
    on_damage = "raise"
    background = (255, 255, 255)
    valid_kwargs = BTAdapterVideoProcessorKwargs
    model_input_names = ["pixel_values_videos", "frame_mask"]

    def __init__(self, **kwargs: Unpack[BTAdapterVideoProcessorKwargs]) -> None:
        super().__init__(**kwargs)
        self._check_options(self.num_frames, self.sampling, self.video_backend, self.on_damage, self.fps)

    @staticmethod
    def _check_options(num_frames: int, sampling: str, video_backend: str, on_damage: str, fps: Any) -> None:
        if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
            raise ValueError(f"`num_frames` must be an integer of at least 1, got {num_frames!r}.")
        for name, value, choices in (
            ("sampling", sampling, SAMPLING_RULES),
            ("video_backend", video_backend, VIDEO_BACKENDS),
            ("on_damage", on_damage, DAMAGE_POLICIES),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
        if fps is not None:
            raise ValueError(
                "BT-Adapter samples a fixed number of frames: set `num_frames` instead of `fps`, or sample the frames "
                "yourself and pass them with `do_sample_frames=False`."
            )

    def preprocess(self, videos: VideoSource | list, **kwargs: Unpack[BTAdapterVideoProcessorKwargs]) -> BatchFeature:
        """See the class for what `videos` may be and for what comes back; `kwargs` override the saved fields."""
        known = list(self.valid_kwargs.__annotations__)
        validate_kwargs(captured_kwargs=kwargs.keys(), valid_processor_keys=known)
        for name in known:
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self, name, None)
        self._check_options(*(kwargs[name] for name in ("num_frames", "sampling", "video_backend", "on_damage", "fps")))
        validate_typed_dict(self.valid_kwargs, kwargs)

        videos = flatten_videos(videos)
        frames, metadata = self._load(videos, **kwargs)
        frames = self._prepare_input_videos(
            frames, kwargs["do_convert_rgb"], input_data_format="channels_last", device=kwargs["device"]
        )
        return_metadata = kwargs["return_metadata"]
        kwargs = self._standardize_kwargs(**kwargs)
        self._validate_preprocess_kwargs(**kwargs)
        output = self._preprocess(frames, **kwargs)
        if return_metadata:
            output["video_metadata"] = metadata
        return output
