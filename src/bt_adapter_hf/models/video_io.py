"""Decode a video of any kind to exactly the frames a model asks for.

[`load_video`] is the only entry. What it promises, whatever the backend:

- the frames are the ones the sampling rule names, as a player shows them, or an error says why not: never others;
- exactly `num_frames` of them; a clip that is shorter repeats frames, as the released sampler does;
- only the selected frames are converted to RGB and kept.

PyAV is the default because it is the only backend that returned the right frames on every intact file we have. Image
files always go through PIL. decord and torchcodec can be named instead; files on which they are known to return wrong
frames raise [`VideoBackendError`]. There is no silent change of backend.
"""

import functools
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .video_decoding import (
    VIDEO_BACKENDS,
    BTAdapterVideoMetadata,
    FrameCollector,
    Source,
    fetch,
    flatten_image,
    load_animation,
    load_picture_file,
    load_pyav,
    package_part,
    picture_kind,
)
from .video_errors import (
    MAX_BYTES,
    MAX_SECONDS,
    EmptyVideoError,
    VideoAccessError,
    VideoDecodeError,
    VideoError,
    VideoInputError,
    VideoNotFoundError,
    item_errors,
)


SAMPLING_RULES = ("uniform", "jitter", "centers")
DAMAGE_POLICIES = ("raise", "salvage", "check")

VideoSource = str | os.PathLike | bytes | BinaryIO | np.ndarray | torch.Tensor | Image.Image | Sequence | Mapping


def sample_frame_indices(
    total: int, num_frames: int | None, sampling: str = "uniform", generator: np.random.Generator | None = None
) -> np.ndarray:
    """Indices of the frames to use, in order; always `num_frames` of them, so that short videos repeat frames.

    With `seg = (total - 1) / num_frames` and `s_i = round(seg * i)` (half to even, as released):

    - `"uniform"`: `s_i + floor(seg / 2)`, the released test rule.
    - `"jitter"`: uniform integer in `[s_i, s_{i+1}]`, both ends included, the released training rule.
    - `"centers"`: `floor((s_i + s_{i+1}) / 2)`, the rule of the released video-LLM. The released function returns
      only `total` frames for shorter videos; this one repeats frames instead.

    Args:
        total: number of frames of the video, at least 1.
        num_frames: number of indices, at least 1; None for all frames.
        generator: source of `"jitter"`. None draws from numpy's global state, as the released code does, which
            `transformers.set_seed` and data loader workers seed.

    Returns:
        int64 array `(num_frames,)`, values in `[0, total)`, not decreasing.

    Raises:
        ValueError: unknown rule, or a count below 1.
    """
    _check_sampling(num_frames, sampling)
    if total < 1:
        raise ValueError(f"`total` must be at least 1 frame, got {total}.")
    if num_frames is None:
        return np.arange(total, dtype=np.int64)
    segment = (total - 1) / num_frames
    starts = np.round(segment * np.arange(num_frames + 1)).astype(np.int64)
    if sampling == "uniform":
        return starts[:-1] + int(segment / 2)
    if sampling == "centers":
        return (starts[:-1] + starts[1:]) // 2
    draw = np.random.randint if generator is None else generator.integers
    return np.array([draw(low, high + 1) for low, high in zip(starts[:-1], starts[1:], strict=True)], dtype=np.int64)


def load_video(
    video: VideoSource,
    *,
    num_frames: int | None = 8,
    sampling: str = "uniform",
    backend: str = "pyav",
    generator: np.random.Generator | None = None,
    on_damage: str = "raise",
    background: tuple[int, int, int] = (255, 255, 255),
    max_download_bytes: int = MAX_BYTES,
    timeout: float = MAX_SECONDS,
    keep_floats: bool = False,
    shrink: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, BTAdapterVideoMetadata]:
    """Load `num_frames` frames of a video.

    Args:
        video: path, http(s) URL, bytes, binary file object (read from its current position), a
            `{"bytes": ..., "path": ...}` row of an undecoded `datasets` video column, an array or tensor
            `(T, H, W, 3)` or `(T, 3, H, W)`, or a list of frames (PIL images, arrays or tensors `(H, W, 3)` or
            `(3, H, W)`, paths of image files). Arrays are integers in 0..255, or floats in 0..1 or 0..255. A GIF,
            animated WebP, PNG or AVIF, a TIFF of several pages, or an image that PIL has opened is all its frames.
        num_frames: exactly this many frames come back (short videos repeat frames); None returns all frames once.
        sampling: `"uniform"`, `"jitter"` or `"centers"`, see [`sample_frame_indices`].
        backend: `"pyav"`, `"decord"` or `"torchcodec"` for files, URLs and bytes. Image files are read by PIL always.
        generator: random source of `"jitter"`.
        on_damage: `"raise"`; `"salvage"` to sample among the frames that decode before the damage, with a warning
            logged; `"check"` to raise for damage in frames that nobody asked for too (both `"pyav"` and images only).
        background: RGB colour 0..255 put behind transparent pixels.
        max_download_bytes: a URL with more than this raises instead of filling the disk.
        timeout: seconds that a download may take in all.
        keep_floats: floats of arrays and tensors come back as they are, float32 of any range, and not as uint8.
        shrink: of files and animations: what is kept of each frame (H, W, 3), so that only one is whole in memory.

    Returns:
        uint8 RGB frames `(T, H, W, 3)` as displayed (rotated, with square pixels), and their metadata:
        `frames_indices`, `timestamps` (seconds), `total_num_frames`, `fps`, `duration` (seconds), `width`, `height`,
        `video_backend`.

    Raises:
        VideoError: one subclass per kind of bad video, see the classes of this module.
        ValueError: a wrong option.
        ImportError: the named backend cannot be imported.
    """
    _check_sampling(num_frames, sampling)
    _check_choice("on_damage", on_damage, DAMAGE_POLICIES)
    _check_choice("backend", backend, VIDEO_BACKENDS)
    if on_damage != "raise" and backend != "pyav":
        raise ValueError(f"on_damage={on_damage!r} works with backend='pyav' only, got backend={backend!r}.")
    background = _check_background(background)

    @functools.cache  # a second way to decode takes the same frames
    def choose(total: int) -> np.ndarray:
        return sample_frame_indices(total, num_frames, sampling, generator)

    collect = functools.partial(FrameCollector, choose, shrink)
    if isinstance(video, (np.ndarray, torch.Tensor)):
        return _load_array(video, choose, keep_floats)
    if isinstance(video, (list, tuple)):
        return _load_frame_list(video, choose, background, keep_floats)
    if isinstance(video, Image.Image):
        name = getattr(video, "filename", None) or "The image"
        with item_errors(name):
            return load_animation(video, name, collect, on_damage, background)
    if backend != "pyav":
        others = package_part("video_backends")
        if others is None:
            raise ImportError(f"The video backend {backend!r} needs the package bt_adapter_hf.")
        decode = others.loader(backend)
    name = _name_of(video)
    with item_errors(name), _local_source(video, name, max_download_bytes, timeout) as source:
        if picture_kind(source):
            return load_picture_file(source, collect, on_damage, background)
        if backend == "pyav":
            return load_pyav(source, collect, on_damage, background)
        return decode(source, collect)


# Options


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _check_sampling(num_frames: int | None, sampling: str) -> None:
    _check_choice("sampling", sampling, SAMPLING_RULES)
    if num_frames is None:
        return
    if isinstance(num_frames, bool) or not isinstance(num_frames, (int, np.integer)) or num_frames < 1:
        raise ValueError(f"`num_frames` must be an integer of at least 1, or None for all frames, got {num_frames!r}.")


def _check_background(background: Sequence[int]) -> tuple[int, int, int]:
    if len(background) != 3 or not all(0 <= value <= 255 for value in background):
        raise ValueError(f"`background` must be three RGB values in 0..255, got {background!r}.")
    red, green, blue = (int(value) for value in background)
    return red, green, blue


# Sources


def _name_of(video: Any) -> str:
    if isinstance(video, Mapping):
        video = video.get("path") or video.get("bytes")
    if isinstance(video, (str, os.PathLike)):
        return os.fsdecode(video)
    if isinstance(video, (bytes, bytearray, memoryview)):
        return f"<{len(video)} bytes>"
    return str(getattr(video, "name", f"<{type(video).__name__}>"))


@contextmanager
def _local_source(video: Any, name: str, max_download_bytes: int, timeout: float) -> Iterator[Source]:
    if isinstance(video, Mapping):
        if video.get("bytes") is not None:
            video = video["bytes"]
        elif video.get("path") is not None:
            video = video["path"]
        else:
            raise VideoInputError(f"A video row needs 'bytes' or 'path', got the keys {sorted(video)}.")
    if isinstance(video, str) and video.startswith(("http://", "https://")):
        with tempfile.TemporaryDirectory(prefix="bt_adapter_video_") as folder:
            path = os.path.join(folder, "video")
            with open(path, "wb") as file:
                fetch(video, file, max_download_bytes, timeout)
            yield Source(path, video)
        return
    if isinstance(video, (str, os.PathLike)):
        yield file_source(os.fsdecode(video))
        return
    if isinstance(video, (bytearray, memoryview)):
        video = bytes(video)
    elif callable(getattr(video, "read", None)):
        video = video.read()
        if isinstance(video, str):
            raise VideoInputError("The file object is in text mode: open it with mode 'rb'.")
    if not isinstance(video, bytes):
        raise VideoInputError(
            "A video is a path, an http(s) URL, bytes, a binary file object, an array or tensor (T, H, W, 3) or "
            f"(T, 3, H, W), or a list of frames; got {type(video).__name__}."
        )
    if not video:
        raise EmptyVideoError(f"{name} has no bytes (if it was a file object: is it already read to its end?).")
    yield Source(video, name)


def file_source(name: str) -> Source:
    path = os.path.abspath(os.path.expanduser(name))
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise VideoAccessError(f"{name} is a folder: give the path of one video file.")
        if not stat.S_ISREG(mode):
            raise VideoAccessError(f"{name} is not a regular file.")
        with open(path, "rb") as file:
            empty = not file.read(1)
    except VideoError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoNotFoundError(f"{name} does not exist.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL inside the path
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoAccessError(f"{name} cannot be read: {reason}.") from error
    if empty:
        raise EmptyVideoError(f"{name} is empty (0 bytes).")
    return Source(path, name)


# Arrays and lists of frames


def _to_numpy(array: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        # numpy has no bfloat16
        return array.float().numpy() if array.is_floating_point() else array.numpy()
    return array


def _checked(pixels: np.ndarray, what: str, keep_floats: bool) -> np.ndarray:
    """As uint8, or floats as they are."""
    if pixels.dtype == np.uint8:
        return pixels
    if np.issubdtype(pixels.dtype, np.floating):
        if not np.isfinite(pixels).all():
            count = int((~np.isfinite(pixels)).sum())
            raise VideoInputError(f"{what} holds {count} values that are NaN or infinite.")
        if keep_floats:
            return pixels.astype(np.float32)
    elif not np.issubdtype(pixels.dtype, np.integer):
        raise VideoInputError(f"{what} has dtype {pixels.dtype}, expected integers or floats.")
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > 255:
        raise VideoInputError(
            f"{what} has values from {low:g} to {high:g}, expected 0..255 or 0..1: give pixels before normalisation."
        )
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = np.round(pixels * 255.0 if high <= 1 else pixels)
    return pixels.astype(np.uint8)


def _array_metadata(total: int, indices: np.ndarray, frames: np.ndarray) -> BTAdapterVideoMetadata:
    H, W = frames.shape[1:3]
    return BTAdapterVideoMetadata(total_num_frames=total, height=H, width=W, frames_indices=indices.tolist())


def _load_array(
    video: np.ndarray | torch.Tensor, choose: Callable[[int], np.ndarray], keep_floats: bool
) -> tuple[np.ndarray, BTAdapterVideoMetadata]:
    shape = tuple(video.shape)
    if len(shape) != 4 or 3 not in (shape[3], shape[1]):
        raise VideoInputError(f"A video array is (T, H, W, 3) or (T, 3, H, W), got the shape {shape}.")
    if 0 in shape:
        raise VideoInputError(f"The video array is empty: its shape is {shape}.")
    indices = choose(shape[0])
    # the range decides how floats are read (0..1 or 0..255), so look at the whole clip, not at the sampled frames
    frames = _checked(_to_numpy(video), "The video array", keep_floats)
    if shape[3] != 3:
        frames = frames.transpose(0, 2, 3, 1)
    frames = np.ascontiguousarray(frames[indices])
    return frames, _array_metadata(shape[0], indices, frames)


def _load_frame_list(
    video: Sequence[Any],
    choose: Callable[[int], np.ndarray],
    background: tuple[int, int, int],
    keep_floats: bool,
) -> tuple[np.ndarray, BTAdapterVideoMetadata]:
    if not video:
        raise EmptyVideoError("The list of frames is empty.")
    if all(isinstance(frame, (np.ndarray, torch.Tensor)) for frame in video):
        _check_one_size({index: tuple(frame.shape) for index, frame in enumerate(video)})
        return _load_array(np.stack([_to_numpy(frame) for frame in video]), choose, keep_floats)
    for index, frame in enumerate(video):
        if not isinstance(frame, (Image.Image, str, os.PathLike)):
            raise VideoInputError(
                f"Frame {index} is a {type(frame).__name__}: a list of frames holds PIL images and paths of images, "
                "or only 3-D arrays and tensors. To load several videos, call `load_video` once per video."
            )
    indices = choose(len(video))
    # files that are not sampled are not opened
    pictures = {index: _load_picture(video[index], index, background) for index in np.unique(indices).tolist()}
    sizes = {index: frame.size for index, frame in enumerate(video) if isinstance(frame, Image.Image)}
    _check_one_size(sizes | {index: picture.shape[1::-1] for index, picture in pictures.items()})
    frames = np.stack([pictures[index] for index in indices.tolist()])
    return frames, _array_metadata(len(video), indices, frames)


def _check_one_size(sizes: dict[int, tuple[int, ...]]) -> None:
    first = min(sizes)
    for index, size in sizes.items():
        if size != sizes[first]:
            raise VideoInputError(
                f"The frames differ in size: frame {first} has {sizes[first]}, frame {index} has {size}. Resize them "
                "to one size first."
            )


def _load_picture(
    picture: Image.Image | str | os.PathLike, index: int, background: tuple[int, int, int]
) -> np.ndarray:
    """One frame of a list as uint8 `(H, W, 3)`."""
    if isinstance(picture, Image.Image):
        return _still(picture, f"Frame {index}", background)
    source = file_source(os.fsdecode(picture))
    name = f"Frame {index}, {source.name},"
    with item_errors(name), source.opened() as file:
        try:
            image = Image.open(file)
        except UnidentifiedImageError as error:
            raise VideoDecodeError(f"{name} is not a readable image.") from error
        if image.format == "EPS":  # a program
            raise VideoDecodeError(f"{name} is PostScript, and no image of pixels.")
        return _still(image, name, background)


def _still(image: Image.Image, name: str, background: tuple[int, int, int]) -> np.ndarray:
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise VideoInputError(
            f"{name} is an animation of {image.n_frames} frames among the frames of a video: give it alone, or a copy "
            "of each of its frames (`image.copy()`)."
        )
    return flatten_image(ImageOps.exif_transpose(image), background)
