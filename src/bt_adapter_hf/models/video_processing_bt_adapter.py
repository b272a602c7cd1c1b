"""Video processor of BT-Adapter: any video in, normalised frames `(B, T, 3, H, W)` out."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import AutoVideoProcessor, BaseVideoProcessor
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, validate_kwargs
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.utils import TensorType, requires_backends

from .compat_bt_adapter import validate_typed_dict
from .configuration_bt_adapter import BTAdapterConfig
from .video_errors import EmptyVideoError, VideoError
from .video_io import DAMAGE_POLICIES, SAMPLING_RULES, VIDEO_BACKENDS, BTAdapterVideoMetadata, VideoSource, load_video


_MAYBE_ANIMATED = (".png", ".webp", ".tif", ".tiff")
FITTED = {"do_resize": False, "do_center_crop": False}  # options for frames that `shrinker` has been at
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".bmp", ".ppm", *_MAYBE_ANIMATED)


class BTAdapterVideoProcessorKwargs(VideosKwargs, total=False):
    """
    sampling (`str`, *optional*):
        Rule that picks the frames: `"uniform"` (released test rule), `"jitter"` (released training rule) or
        `"centers"` (rule of the released video-LLM).
    video_backend (`str`, *optional*):
        Decoder of video files: `"pyav"`, `"decord"` or `"torchcodec"`.
    on_damage (`str`, *optional*):
        `"raise"` for truncated and damaged videos, `"salvage"` to use the frames before the damage, or `"check"` to
        raise for damage in frames that are not used too.
    background (`list[int]`, *optional*):
        RGB colour put behind transparent pixels.
    seed (`int`, *optional*):
        Seed of `"jitter"` for this call. None draws from numpy's global state.
    """

    sampling: str | None
    video_backend: str | None
    on_damage: str | None
    background: list[int] | tuple[int, ...] | None
    seed: int | None


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
    background = [255, 255, 255]
    valid_kwargs = BTAdapterVideoProcessorKwargs
    model_input_names = ["pixel_values_videos", "frame_mask"]

    def __init__(self, **kwargs: Unpack[BTAdapterVideoProcessorKwargs]) -> None:
        requires_backends(self, ["torchvision"])
        super().__init__(**kwargs)
        self.background = list(self.background)  # as JSON gives it back
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
        """See the class for what `videos` may be and what comes back; `kwargs` override the saved fields."""
        options = self._options(kwargs)
        videos = flatten_videos(videos)
        known_metadata = _batch_metadata(options["video_metadata"], len(videos))
        generator = None if options["seed"] is None else np.random.default_rng(options["seed"])
        shrink = self.shrinker(options) if options["device"] is None else None  # all at once there
        pixels, metadata = [], []
        for index, video in enumerate(videos):
            decoded = _is_decoded(video)
            sampled = not options["do_sample_frames"] or (decoded and len(video) == options["num_frames"])
            try:
                frames, details = load_video(
                    video,
                    num_frames=None if sampled else options["num_frames"],
                    sampling=options["sampling"],
                    backend=options["video_backend"],
                    generator=generator,
                    on_damage=options["on_damage"],
                    background=options["background"],
                    keep_floats=not options["do_rescale"],  # the caller has scaled them
                    shrink=shrink,
                )
            except VideoError as error:
                if len(videos) == 1:
                    raise
                raise type(error)(f"videos[{index}]: {error}") from error
            if known_metadata is not None and decoded:
                details = _merge_metadata(details, known_metadata[index])
            # a view: resizing reads this layout as it is, and large frames are not copied
            frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
            frames = self._fit(frames, options) if decoded or shrink is None else frames
            pixels.append(self._normalize(frames, options))
            metadata.append(details)
        output = _collate(pixels, options["return_tensors"])
        if options["return_metadata"]:
            output["video_metadata"] = metadata
        return output

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Those of a call, or the saved fields."""
        known = list(self.valid_kwargs.__annotations__)
        validate_kwargs(captured_kwargs=given.keys(), valid_processor_keys=known)
        given = {name: value for name, value in given.items() if name in known and value is not None}
        options = {name: given.get(name, getattr(self, name, None)) for name in known}
        checked = ("num_frames", "sampling", "video_backend", "on_damage", "fps")
        self._check_options(*(options[name] for name in checked))
        try:
            validate_typed_dict(self.valid_kwargs, given)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error
        options = self._standardize_kwargs(**options)
        self._validate_preprocess_kwargs(**options)
        return options

    def shrinker(self, options: dict[str, Any] | None = None) -> Callable[[np.ndarray], np.ndarray]:
        """`shrink` of [`load_video`]: a uint8 frame resized and cropped, by options of a call or the saved fields."""
        options = options or self._options({})

        def shrink(frame: np.ndarray) -> np.ndarray:
            frame = torch.from_numpy(np.require(frame, requirements="CW")).permute(2, 0, 1)
            return self._fit(frame, options).permute(1, 2, 0).cpu().numpy()

        shrink(np.zeros((8, 8, 3), np.uint8))  # a size that cannot be used is no fault of a video
        return shrink

    def _fit(self, frames: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """uint8 or, as a caller has scaled them, float `(..., 3, H, W)`, resized and cropped."""
        if options["device"] is not None:
            frames = frames.to(options["device"])
        if options["do_resize"]:
            low, high = frames.aminmax() if frames.is_floating_point() else (-1, 0)
            frames = self.resize(frames, size=options["size"], resample=options["resample"])
            if low >= 0:  # bicubic goes beyond what it is given; uint8 is cut off at 0 and 255
                frames = frames.clamp(0, 1 if high <= 1 else 255)
        return self.center_crop(frames, options["crop_size"]) if options["do_center_crop"] else frames

    def _normalize(self, video: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        rules = [options[f"do_{name}"] for name in ("rescale", "normalize")]
        if video.dtype != torch.uint8 or not all(rules):
            scaled = (rules[0], options["rescale_factor"], rules[1], options["image_mean"], options["image_std"])
            return self.rescale_and_normalize(video, *scaled).contiguous()
        # The same numbers, written once, where they end: frames are read with their colours inside, in place
        statistics = torch.tensor([options["image_mean"], options["image_std"]], device=video.device)
        mean, std = (statistics * (1.0 / options["rescale_factor"]))[..., None, None]
        return torch.sub(video, mean, out=torch.empty(video.shape, dtype=torch.float32, device=video.device)).div_(std)


def flatten_videos(videos: VideoSource | list) -> list[VideoSource]:
    """The videos in order, whatever the nesting: one video, a list, a list of lists, a 5-D array.

    A list of frames (PIL images, 3-D arrays, paths of image files) is one video; an animated image is one by itself.
    """
    if isinstance(videos, (np.ndarray, torch.Tensor)) and videos.ndim == 5:
        return list(videos)
    if _is_frame(videos):
        return flatten_videos([videos])
    if not isinstance(videos, (list, tuple)):
        return [videos]
    if not videos:
        raise EmptyVideoError("`videos` is, or contains, an empty list: give at least one video with one frame.")
    if all(_is_frame(item) for item in videos):
        return [videos[0]] if len(videos) == 1 and _may_move(videos[0]) else [list(videos)]
    return [video for item in videos for video in flatten_videos(item)]


def _is_frame(item: Any) -> bool:
    if isinstance(item, (np.ndarray, torch.Tensor)):
        return item.ndim == 3
    if isinstance(item, (str, os.PathLike)):
        return os.fsdecode(item).lower().endswith(_IMAGE_SUFFIXES)
    return isinstance(item, Image.Image)


def _may_move(frame: Any) -> bool:
    """Whether one frame may be an animation, which is a video by itself."""
    if isinstance(frame, (str, os.PathLike)):
        return os.fsdecode(frame).lower().endswith(_MAYBE_ANIMATED)
    return getattr(frame, "n_frames", 1) > 1  # an image that PIL has opened


def _is_decoded(video: VideoSource) -> bool:
    return isinstance(video, (np.ndarray, torch.Tensor, list, tuple))


def _batch_metadata(metadata: Any, count: int) -> list[Mapping] | None:
    """`video_metadata` of the caller, one mapping per video."""
    if metadata is None:
        return None
    if isinstance(metadata, Mapping):
        metadata = [metadata]
    flat = [entry for item in metadata for entry in (item if isinstance(item, (list, tuple)) else [item])]
    if len(flat) != count:
        raise ValueError(f"Got {count} videos but {len(flat)} entries of `video_metadata`: give one per video.")
    return flat


def _merge_metadata(found: BTAdapterVideoMetadata, known: Mapping) -> BTAdapterVideoMetadata:
    """What the caller knows about frames that were decoded elsewhere, restricted to the frames that are used."""
    used = found.frames_indices
    known, merged = dict(known), dict(found)
    for name in ("fps", "duration", "video_backend"):
        if known.get(name) is not None:
            merged[name] = known[name]
    for name in ("frames_indices", "frame_timestamps"):
        values = known.get(name)
        if values is None:
            continue
        if len(values) != found.total_num_frames:
            raise ValueError(
                f"`video_metadata` has {len(values)} {name} for a video of {found.total_num_frames} frames."
            )
        merged[name] = [values[index] for index in used]
    if known.get("frames_indices") is not None and known.get("total_num_frames") is not None:
        merged["total_num_frames"] = known["total_num_frames"]
    return BTAdapterVideoMetadata(**merged)


def _collate(videos: list[torch.Tensor], return_tensors: str | TensorType | None) -> BatchFeature:
    """Pad the videos on the right to one length; `frame_mask` tells the real frames where lengths differ."""
    lengths = [len(video) for video in videos]
    longest = max(lengths)
    videos = [
        torch.cat([video, video.new_zeros(longest - len(video), *video.shape[1:])]) if len(video) < longest else video
        for video in videos
    ]
    if return_tensors is not None:
        sizes = {tuple(video.shape[2:]) for video in videos}
        if len(sizes) > 1:
            raise ValueError(
                f"The videos have different sizes after preprocessing (height, width): {sorted(sizes)}. Set "
                "do_resize=True and do_center_crop=True, or process them one by one."
            )
        videos = torch.stack(videos) if len(videos) > 1 else videos[0][None]  # one is not copied
    data = {"pixel_values_videos": videos}
    if min(lengths) < longest:
        data["frame_mask"] = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    return BatchFeature(data=data, tensor_type=return_tensors)


AutoVideoProcessor.register(BTAdapterConfig, BTAdapterVideoProcessor, exist_ok=True)
