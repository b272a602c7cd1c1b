"""Decode a video of any kind to exactly the frames a model asks for.

[`load_video`] is the only entry: path, URL, bytes, file object, array, tensor or list of frames in, uint8 RGB frames
and their metadata out. What it promises, whatever the backend:

- the frames are the ones the sampling rule names, or an error says why not: never silently others;
- exactly `num_frames` of them; a clip that is shorter repeats frames, as the released sampler does;
- rotation metadata is applied, transparency is composited on an explicit background;
- only the selected frames are converted to RGB and kept.

PyAV, read from start to end, is the default because it is the only backend that returned the right frames on every
intact file we have. GIFs always go through PIL. decord and torchcodec can be named instead; files on which they are
known to return wrong frames raise [`VideoBackendError`]. There is no silent change of backend.
"""

import importlib
import io
import itertools
import logging
import os
import stat
import struct
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.video_utils import VideoMetadata


logger = logging.getLogger(__name__)

VIDEO_BACKENDS = ("pyav", "decord", "torchcodec")
SAMPLING_RULES = ("uniform", "jitter", "centers")
DAMAGE_POLICIES = ("raise", "salvage")

_BACKEND_MODULES = {"pyav": "av", "decord": "decord", "torchcodec": "torchcodec.decoders"}
_BACKEND_FIXES = {
    "pyav": "Install it with `pip install av`.",
    "decord": "Install it with `pip install decord` (it has no wheels for ARM and for newer macOS), or use "
    "backend='pyav'.",
    "torchcodec": "Install the torchcodec release that matches your torch and FFmpeg's shared libraries "
    "(`apt-get install ffmpeg`), or use backend='pyav'.",
}
_OTHER_BACKEND = "Try backend='pyav', with on_damage='salvage' if the file is damaged."
_GIF_SIGNATURES = (b"GIF87a", b"GIF89a")
_CHUNK_BYTES = 1 << 20


class VideoError(ValueError):
    """Base of every error that says something about one video (as opposed to a wrong option)."""


class VideoInputError(VideoError):
    """The object is not a video that can be used: wrong type or shape, no frames, mixed sizes, NaN, bad range."""


class VideoNotFoundError(VideoError, FileNotFoundError):
    """There is no file under this path."""


class VideoAccessError(VideoError, OSError):
    """The path exists but cannot be read: a folder, a device, no permission, an input/output error."""


class VideoDownloadError(VideoError, OSError):
    """The URL could not be downloaded completely, or is larger than allowed."""


class VideoDecodeError(VideoError):
    """The bytes are not a video that can be decoded."""


class EmptyVideoError(VideoDecodeError):
    """The source holds no bytes or no frames."""


class NoVideoStreamError(VideoDecodeError):
    """The file is readable media without a video stream (audio only)."""


class TruncatedVideoError(VideoDecodeError):
    """The video is cut or damaged: fewer frames decode than it declares. `on_damage="salvage"` keeps those."""


class VideoBackendError(VideoError):
    """The named backend is known not to read this file correctly."""


VideoSource = str | os.PathLike | bytes | BinaryIO | np.ndarray | torch.Tensor | Sequence | Mapping


@dataclass
class BTAdapterVideoMetadata(VideoMetadata):
    """`VideoMetadata` of transformers with the real time of each returned frame.

    `frame_timestamps` are seconds from the first frame of the video, as the file stores them, so they are right for
    variable frame rates, where index / fps is not. None where the source knows no time (arrays, lists of frames).
    """

    frame_timestamps: list[float] | None = None

    @property
    def timestamps(self) -> list[float]:
        """Seconds from the first frame of the video, one per returned frame."""
        if self.frame_timestamps is not None:
            return self.frame_timestamps
        return super().timestamps


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


def available_video_backends() -> dict[str, str | None]:
    """Each backend name with None where it can be used, else the reason (each one is really imported)."""
    return {name: _backend_problem(name) for name in VIDEO_BACKENDS}


def load_video(
    video: VideoSource,
    *,
    num_frames: int | None = 8,
    sampling: str = "uniform",
    backend: str = "pyav",
    generator: np.random.Generator | None = None,
    on_damage: str = "raise",
    background: tuple[int, int, int] = (255, 255, 255),
    max_download_bytes: int = 1 << 30,
    timeout: float = 30.0,
) -> tuple[np.ndarray, BTAdapterVideoMetadata]:
    """Load `num_frames` frames of a video.

    Args:
        video: path, http(s) URL, bytes, binary file object (read from its current position), a
            `{"bytes": ..., "path": ...}` row of an undecoded `datasets` video column, an array or tensor
            `(T, H, W, 3)` or `(T, 3, H, W)`, or a list of frames (PIL images, arrays or tensors `(H, W, 3)` or
            `(3, H, W)`, paths of image files). Arrays are integers in 0..255, or floats in 0..1 or 0..255.
        num_frames: exactly this many frames come back (short videos repeat frames); None returns all frames once.
        sampling: `"uniform"`, `"jitter"` or `"centers"`, see [`sample_frame_indices`].
        backend: `"pyav"`, `"decord"` or `"torchcodec"` for files, URLs and bytes. GIFs are read by PIL always.
        generator: random source of `"jitter"`.
        on_damage: `"raise"`, or `"salvage"` to sample among the frames that decode before the damage, with a warning
            logged (`"pyav"` and GIFs only).
        background: RGB colour 0..255 put behind transparent pixels.
        max_download_bytes: a URL with more than this raises instead of filling the disk.
        timeout: seconds without an answer after which a download fails.

    Returns:
        uint8 RGB frames `(T, H, W, 3)` as displayed (rotation applied), and their metadata: `frames_indices`,
        `timestamps` (seconds), `total_num_frames`, `fps`, `duration` (seconds), `width`, `height`, `video_backend`.

    Raises:
        VideoError: one subclass per kind of bad video, see the classes of this module.
        ValueError: a wrong option.
        ImportError: the named backend cannot be imported.
    """
    _check_sampling(num_frames, sampling)
    _check_choice("on_damage", on_damage, DAMAGE_POLICIES)
    _check_choice("backend", backend, VIDEO_BACKENDS)
    if on_damage == "salvage" and backend != "pyav":
        raise ValueError(f"on_damage='salvage' works with backend='pyav' only, got backend={backend!r}.")
    background = _check_background(background)

    def choose(total: int) -> np.ndarray:
        return sample_frame_indices(total, num_frames, sampling, generator)

    if isinstance(video, (np.ndarray, torch.Tensor)):
        return _load_array(video, choose)
    if isinstance(video, (list, tuple)):
        return _load_frame_list(video, choose, background)
    if problem := _backend_problem(backend):
        raise ImportError(f"The video backend {backend!r} cannot be used: {problem}. {_BACKEND_FIXES[backend]}")
    with _local_source(video, max_download_bytes, timeout) as source:
        if source.read_at(0, 6) in _GIF_SIGNATURES:
            return _load_gif(source, choose, on_damage, background)
        if backend == "pyav":
            return _load_pyav(source, choose, on_damage, background)
        if backend == "decord":
            return _load_decord(source, choose)
        return _load_torchcodec(source, choose)


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


def _import_backend(name: str) -> Any:
    # not an import statement: `trust_remote_code` would demand every package that one of its files imports
    return importlib.import_module(_BACKEND_MODULES[name])


def _backend_problem(name: str) -> str | None:
    try:
        _import_backend(name)
    except Exception as error:  # a broken binary raises OSError, RuntimeError and others, not only ImportError
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return None


# Sources


@dataclass
class _Source:
    """A video on this machine: a path to a regular, readable, non-empty file, or its bytes."""

    data: str | bytes
    name: str

    def read(self) -> bytes:
        if isinstance(self.data, bytes):
            return self.data
        with open(self.data, "rb") as file:
            return file.read()

    def read_at(self, offset: int, count: int) -> bytes:
        if isinstance(self.data, bytes):
            return self.data[offset : offset + count]
        with open(self.data, "rb") as file:
            file.seek(offset)
            return file.read(count)

    def size(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else os.path.getsize(self.data)

    def opened(self) -> str | io.BytesIO:
        """What a decoder takes: an absolute path, which FFmpeg cannot mistake for a protocol, or a stream."""
        return io.BytesIO(self.data) if isinstance(self.data, bytes) else self.data


@contextmanager
def _local_source(video: Any, max_download_bytes: int, timeout: float) -> Iterator[_Source]:
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
            _download(video, path, max_download_bytes, timeout)
            yield _Source(path, video)
        return
    if isinstance(video, (str, os.PathLike)):
        yield _file_source(os.fsdecode(video))
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
        raise EmptyVideoError("The video has no bytes (if it was a file object: is it already read to its end?).")
    yield _Source(video, f"<{len(video)} bytes>")


def _file_source(name: str) -> _Source:
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
    return _Source(path, name)


def _download(url: str, path: str, max_bytes: int, timeout: float) -> None:
    received = 0
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "bt_adapter_hf"})
        with urllib.request.urlopen(request, timeout=timeout) as answer, open(path, "wb") as file:
            declared = answer.headers.get("Content-Length")
            expected = int(declared) if declared is not None and declared.isdigit() else None
            if expected is not None and expected > max_bytes:
                raise VideoDownloadError(_too_large(url, f"{expected} bytes", max_bytes))
            while chunk := answer.read(_CHUNK_BYTES):
                received += len(chunk)
                if received > max_bytes:
                    raise VideoDownloadError(_too_large(url, f"more than {max_bytes} bytes", max_bytes))
                file.write(chunk)
    except VideoError:
        raise
    except urllib.error.HTTPError as error:
        raise VideoDownloadError(f"{url} could not be downloaded: HTTP {error.code} {error.reason}.") from error
    except (OSError, ValueError) as error:  # URLError and timeouts are OSError; ValueError is a malformed URL
        raise VideoDownloadError(f"{url} could not be downloaded: {getattr(error, 'reason', error)}.") from error
    if expected is not None and received < expected:
        raise VideoDownloadError(f"{url} broke off after {received} of {expected} bytes: download it again.")
    if received == 0:
        raise EmptyVideoError(f"{url} is empty (0 bytes).")


def _too_large(url: str, found: str, max_bytes: int) -> str:
    return f"{url} has {found}, the limit is {max_bytes}: raise `max_download_bytes` if that is intended."


# Arrays and lists of frames


def _to_numpy(array: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        # numpy has no bfloat16
        return array.float().numpy() if array.is_floating_point() else array.numpy()
    return array


def _to_uint8(pixels: np.ndarray, what: str) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if np.issubdtype(pixels.dtype, np.floating):
        if not np.isfinite(pixels).all():
            count = int((~np.isfinite(pixels)).sum())
            raise VideoInputError(f"{what} holds {count} values that are NaN or infinite.")
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
    return BTAdapterVideoMetadata(
        total_num_frames=total,
        height=frames.shape[1],
        width=frames.shape[2],
        frames_indices=indices.tolist(),
    )


def _load_array(
    video: np.ndarray | torch.Tensor, choose: Callable[[int], np.ndarray]
) -> tuple[np.ndarray, BTAdapterVideoMetadata]:
    shape = tuple(video.shape)
    if len(shape) != 4 or 3 not in (shape[3], shape[1]):
        raise VideoInputError(f"A video array is (T, H, W, 3) or (T, 3, H, W), got the shape {shape}.")
    if 0 in shape:
        raise VideoInputError(f"The video array is empty: its shape is {shape}.")
    indices = choose(shape[0])
    # the range decides how floats are read (0..1 or 0..255), so look at the whole clip, not at the sampled frames
    frames = _to_uint8(_to_numpy(video), "The video array")
    if shape[3] != 3:
        frames = frames.transpose(0, 2, 3, 1)
    frames = np.ascontiguousarray(frames[indices])
    return frames, _array_metadata(shape[0], indices, frames)


def _load_frame_list(
    video: Sequence[Any], choose: Callable[[int], np.ndarray], background: tuple[int, int, int]
) -> tuple[np.ndarray, BTAdapterVideoMetadata]:
    if not video:
        raise EmptyVideoError("The list of frames is empty.")
    if all(isinstance(frame, (np.ndarray, torch.Tensor)) for frame in video):
        _check_one_size({index: tuple(frame.shape) for index, frame in enumerate(video)})
        return _load_array(np.stack([_to_numpy(frame) for frame in video]), choose)
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
        return _flatten_image(picture, background)
    source = _file_source(os.fsdecode(picture))
    try:
        with Image.open(source.data) as image:
            return _flatten_image(ImageOps.exif_transpose(image), background)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoDecodeError(f"Frame {index}, {source.name}, is not a readable image: {error}.") from error


def _flatten_image(image: Image.Image, background: tuple[int, int, int]) -> np.ndarray:
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, (*background, 255))
    return np.asarray(Image.alpha_composite(canvas, image).convert("RGB"))


# GIF


def _load_gif(
    source: _Source, choose: Callable[[int], np.ndarray], on_damage: str, background: tuple[int, int, int]
) -> tuple[np.ndarray, BTAdapterVideoMetadata]:
    data = source.read()
    delays, complete = _scan_gif(data)
    if not delays:
        raise EmptyVideoError(f"{source.name} is a GIF without a complete frame.")
    if not complete:
        _damaged(source, "the file ends inside a frame", len(delays), on_damage)
    indices = choose(len(delays))
    collector = _FrameCollector(indices)
    try:
        with Image.open(io.BytesIO(data)) as image:
            for index in range(int(indices.max()) + 1):
                image.seek(index)  # PIL applies each frame on the ones before it, so every frame is visited
                if collector.wants(index):
                    collector.add(index, _flatten_image(image, background), source)
    except (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoDecodeError(f"{source.name} is a GIF that cannot be decoded: {error}.") from error
    *times, duration = (end / 100 for end in itertools.accumulate(delays, initial=0))
    return collector.result(len(delays), times, len(delays) / duration, "pil", duration)


def _scan_gif(data: bytes) -> tuple[list[int], bool]:
    """Duration of each complete frame in 1/100 s, and whether the file ends where a GIF may end."""
    delays: list[int] = []
    delay = 10

    def after_sub_blocks(position: int) -> int:
        while size := data[position]:
            position += 1 + size
        return position + 1

    def after_colour_table(position: int, flags: int) -> int:
        return position + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)

    try:
        position = after_colour_table(13, data[10])
        while position < len(data):
            block = data[position]
            if block == 0x3B:  # trailer
                break
            if block == 0x21:  # extension
                if data[position + 1] == 0xF9:  # graphic control: the delay of the next frame
                    hundredths = data[position + 4] | data[position + 5] << 8
                    # browsers and FFmpeg show a delay below 2/100 s as 1/10 s
                    delay = hundredths if hundredths >= 2 else 10
                position = after_sub_blocks(position + 2)
            elif block == 0x2C:  # image
                position = after_sub_blocks(after_colour_table(position + 10, data[position + 9]) + 1)
                if position > len(data):
                    return delays, False
                delays.append(delay)
                delay = 10
            else:  # a stray byte between blocks, which PIL skips too
                position += 1
    except IndexError:
        return delays, False
    return delays, True


# Files through PyAV


class _FrameCollector:
    """The output array, allocated at the first wanted frame and filled in place: no second copy of the frames."""

    def __init__(self, indices: np.ndarray):
        self.indices = indices
        self.frames: np.ndarray | None = None

    def wants(self, index: int) -> bool:
        position = np.searchsorted(self.indices, index)
        return bool(position < len(self.indices) and self.indices[position] == index)

    def add(self, index: int, picture: np.ndarray, source: _Source) -> None:
        if self.frames is None:
            self.frames = np.empty((len(self.indices), *picture.shape), dtype=np.uint8)
        elif self.frames.shape[1:] != picture.shape:
            raise VideoDecodeError(
                f"{source.name} changes its frame size from {self.frames.shape[2]}x{self.frames.shape[1]} to "
                f"{picture.shape[1]}x{picture.shape[0]} at frame {index}: re-encode it at one size."
            )
        self.frames[self.indices == index] = picture

    def result(
        self, total: int, times: Sequence[float], fps: float | None, backend: str, duration: float | None = None
    ) -> tuple[np.ndarray, BTAdapterVideoMetadata]:
        """`times`: seconds of all frames of the video, the first one at 0."""
        if duration is None and fps is not None:
            duration = times[-1] + 1 / fps
        metadata = BTAdapterVideoMetadata(
            total_num_frames=total,
            fps=fps,
            width=self.frames.shape[2],
            height=self.frames.shape[1],
            duration=duration,
            video_backend=backend,
            frames_indices=self.indices.tolist(),
            frame_timestamps=[times[index] for index in self.indices],
        )
        return self.frames, metadata


@dataclass
class _Scan:
    """What a container says about its video stream, found by reading all packets without decoding them."""

    format: str
    codec: str
    frames: int  # packets that will be shown
    hidden: int  # packets that an edit list hides
    fps: float | None
    times: list[float]  # seconds of each frame from the first one
    timed: bool  # whether these come from the file; else they are index / fps
    damage: str | None


@dataclass
class _Decoded:
    collector: _FrameCollector
    times: list[float] = field(default_factory=list)
    error: str | None = None


def _damaged(source: _Source, reason: str, frames: int, on_damage: str) -> None:
    message = f"{source.name} is truncated or damaged: {reason}"
    if on_damage == "raise" or frames == 0:
        hint = "use on_damage='salvage' with backend='pyav' to sample among these" if frames else "nothing to salvage"
        raise TruncatedVideoError(f"{message}; {frames} frames are readable ({hint}).")
    logger.warning("%s; salvaged %d frames, sampling among these.", message, frames)


@contextmanager
def _open_container(source: _Source) -> Iterator[tuple[Any, Any]]:
    """The PyAV container and its video stream; closed on every way out."""
    av = _import_backend("pyav")
    try:
        # some real files carry tags that are not UTF-8; they must not stop the video
        container = av.open(source.opened(), metadata_errors="ignore")
    except av.error.FFmpegError as error:
        raise VideoDecodeError(
            f"{source.name} is not a readable video ({error.strerror}): the file is cut, damaged or something else."
        ) from error
    with container:
        stream = container.streams.best("video")  # as FFmpeg, decord and torchcodec choose among several
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
            raise NoVideoStreamError(f"{source.name} has no video stream (streams found: {kinds}).")
        if stream.codec_context is None:
            raise VideoDecodeError(f"{source.name} uses a video codec that PyAV has no decoder for.")
        yield container, stream


def _scan(source: _Source) -> _Scan:
    """Count the frames exactly: headers are 0 for mkv and webm, and too high where an edit list hides frames."""
    av = _import_backend("pyav")
    hidden = packets = 0
    shown: list[int | None] = []  # presentation times, in units of the stream's time base
    error = None
    reached = 0.0  # seconds
    with _open_container(source) as (container, stream):
        try:
            for packet in container.demux():
                if packet.dts is None and packet.size == 0:
                    continue  # the flush packet that PyAV adds at the end
                if packet.pts is not None:
                    reached = max(reached, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream_index != stream.index:
                    continue
                packets += 1
                if packet.size > 0:
                    if packet.is_discard:
                        hidden += 1
                    else:
                        shown.append(packet.pts)
        except av.error.FFmpegError as demux_error:
            error = f"reading stops with '{demux_error.strerror}'"
        formats = container.format.name
        if error is None:
            error = _missing_part(source, formats, stream.frames, packets, container, reached)
        fps = _frame_rate(stream)
        timed = formats != "avi" and None not in shown  # AVI stores none; what FFmpeg makes up is uneven
        times = _packet_times(shown, float(stream.time_base)) if timed else _even_times(len(shown), fps)
        return _Scan(formats, stream.codec_context.name, len(shown), hidden, fps, times, timed, error)


def _frame_rate(stream: Any) -> float | None:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


def _packet_times(stamps: list[int], time_base: float) -> list[float]:
    stamps = sorted(stamps)  # packets come in decoding order
    return [(stamp - stamps[0]) * time_base for stamp in stamps]


def _even_times(count: int, fps: float | None) -> list[float]:
    return [index / fps if fps else 0.0 for index in range(count)]


def _missing_part(
    source: _Source, formats: str, declared: int, packets: int, container: Any, reached: float
) -> str | None:
    """FFmpeg reads many cut files to their end without an error, so compare with what the container declares."""
    if "mp4" in formats and packets < declared:
        return f"{packets} of {declared} declared frames are in the file"
    if formats == "avi" and packets < declared:
        # writers get this count wrong in intact files too, so ask for a second sign: the RIFF size
        missing = 8 + int.from_bytes(source.read_at(4, 4), "little") - source.size()
        if missing > 0:
            return f"{packets} of {declared} declared frames are in the file, {missing} bytes are missing"
    if "matroska" in formats and container.duration is not None:
        end = ((container.start_time or 0) + container.duration) / 1e6
        if reached < end - max(0.5, 0.05 * end):
            return f"it ends at {reached:.2f} s of {end:.2f} s"
    return None


def _load_pyav(
    source: _Source, choose: Callable[[int], np.ndarray], on_damage: str, background: tuple[int, int, int]
) -> tuple[np.ndarray, BTAdapterVideoMetadata]:
    scan = _scan(source)
    if scan.frames == 0:
        if scan.damage:
            _damaged(source, scan.damage, 0, on_damage)
        raise EmptyVideoError(f"{source.name} has a video stream without frames.")
    decoded = _decode(source, choose(scan.frames), background)
    total = len(decoded.times)
    damage = scan.damage or decoded.error
    if damage:
        _damaged(source, damage, total, on_damage)
    if total == 0:
        raise EmptyVideoError(f"{source.name}: none of {scan.frames} packets decodes to a frame.")
    if total != scan.frames:
        # a cut file, or one whose packets are not one frame each (field pairs, invisible frames)
        logger.info("%s: %d packets, %d frames; sampling again.", source.name, scan.frames, total)
        decoded = _decode(source, choose(total), background)
    times = decoded.times if scan.timed else _even_times(total, scan.fps)
    return decoded.collector.result(total, times, scan.fps, "pyav")


def _decode(source: _Source, indices: np.ndarray, background: tuple[int, int, int]) -> _Decoded:
    """Decode from the first frame to the last, so that the count of frames and their order are certain."""
    av = _import_backend("pyav")
    decoded = _Decoded(_FrameCollector(indices))
    broken: list[int] = []
    first_time = None
    with _open_container(source) as (container, stream):
        try:
            for index, frame in enumerate(container.decode(stream)):
                time = frame.time or 0.0
                first_time = time if first_time is None else first_time
                decoded.times.append(time - first_time)
                if decoded.collector.wants(index):
                    if frame.is_corrupt:
                        broken.append(index)
                    decoded.collector.add(index, _to_rgb(frame, background, source), source)
        except av.error.FFmpegError as error:
            decoded.error = f"decoding stops after frame {len(decoded.times)} with '{error.strerror}'"
    if broken:
        logger.warning("%s: the decoder marks frames %s as damaged.", source.name, broken)
    return decoded


def _to_rgb(frame: Any, background: tuple[int, int, int], source: _Source) -> np.ndarray:
    """A PyAV frame as displayed, uint8 `(H, W, 3)`."""
    if any(component.is_alpha for component in frame.format.components):
        picture = _flatten_image(Image.fromarray(frame.to_ndarray(format="rgba")), background)
    else:
        picture = frame.to_ndarray(format="rgb24")
    transpose, flip_vertical, flip_horizontal = _orientation(frame, source)
    if transpose:
        picture = picture.swapaxes(0, 1)
    if flip_vertical:
        picture = picture[::-1]
    if flip_horizontal:
        picture = picture[:, ::-1]
    return picture


def _orientation(frame: Any, source: _Source) -> tuple[bool, bool, bool]:
    """How to show the stored picture: (swap its axes, then mirror top-bottom, mirror left-right).

    From the display matrix x' = a x + c y, y' = b x + d y of the container. PyAV does not apply it, and its
    `frame.rotation` knows no mirroring.
    """
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, crossed) > 0.01 * max(straight, crossed):
        logger.warning("%s asks for a rotation that is no multiple of 90 degrees; shown unrotated.", source.name)
        return False, False, False
    if crossed > straight:
        return True, b < 0, c < 0
    return False, d < 0, a < 0


# Files through decord and torchcodec


def _scan_for(backend: str, source: _Source) -> _Scan:
    """Refuse what the backend is known to get wrong; what a scan through PyAV finds is the reference."""
    av = _import_backend("pyav")
    scan = _scan(source)
    if scan.damage:
        _damaged(source, scan.damage, scan.frames, "raise")
    if scan.frames == 0:
        raise EmptyVideoError(f"{source.name} has a video stream without frames.")
    if backend == "torchcodec" and scan.format == "avi":
        raise _refused(backend, source, "it returns frames that are one or two off in AVI files")
    if backend == "decord" and scan.hidden:
        raise _refused(backend, source, f"it shows {scan.hidden} frames that the edit list of the file hides")
    if backend == "decord" and scan.codec in ("av1", "libdav1d"):
        raise _refused(backend, source, "it has no AV1 decoder")
    with _open_container(source) as (container, stream):
        try:
            frame = next(container.decode(stream), None)
        except av.error.FFmpegError as error:
            raise VideoDecodeError(f"{source.name} cannot be decoded: {error.strerror}.") from error
        if frame is not None and sum(_orientation(frame, source)) % 2:
            raise _refused(backend, source, "it does not apply the mirroring that the file asks for")
    return scan


def _refused(backend: str, source: _Source, reason: str) -> VideoBackendError:
    return VideoBackendError(f"{source.name} cannot be read with backend={backend!r}: {reason}. Use backend='pyav'.")


def _check_count(backend: str, source: _Source, found: int, scan: _Scan) -> None:
    if found != scan.frames:
        raise _refused(backend, source, f"it counts {found} frames where the file has {scan.frames}")


def _load_decord(source: _Source, choose: Callable[[int], np.ndarray]) -> tuple[np.ndarray, BTAdapterVideoMetadata]:
    decord = _import_backend("decord")
    scan = _scan_for("decord", source)
    indices = choose(scan.frames)
    collector = _FrameCollector(indices)
    try:
        reader = decord.VideoReader(source.opened(), num_threads=1)
        _check_count("decord", source, len(reader), scan)
        # from the start, without seeking: `get_batch` returns wrong frames of HEVC files when it skips frames
        for index in range(int(indices.max()) + 1):
            frame = reader.next()
            if frame.shape[2] != 3:
                raise _refused("decord", source, "it takes the padding of narrow frames for a fourth channel")
            if collector.wants(index):
                collector.add(index, frame.asnumpy(), source)
    except (decord.DECORDError, RuntimeError, StopIteration) as error:
        reason = (str(error).strip().splitlines() or ["no more frames"])[0]
        raise VideoDecodeError(f"{source.name} cannot be decoded by decord: {reason}. {_OTHER_BACKEND}") from error
    return collector.result(scan.frames, scan.times, scan.fps, "decord")


def _load_torchcodec(
    source: _Source, choose: Callable[[int], np.ndarray]
) -> tuple[np.ndarray, BTAdapterVideoMetadata]:
    video_decoder = _import_backend("torchcodec").VideoDecoder
    scan = _scan_for("torchcodec", source)
    indices = choose(scan.frames)
    collector = _FrameCollector(indices)
    try:
        # "exact" reads all packets first; the default of some versions is off by frames at variable frame rates
        decoder = video_decoder(source.data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        _check_count("torchcodec", source, decoder.metadata.num_frames, scan)
        for index in np.unique(indices).tolist():
            collector.add(index, decoder.get_frame_at(index).data.numpy(), source)
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, VideoError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VideoDecodeError(f"{source.name} cannot be decoded by torchcodec: {reason}. {_OTHER_BACKEND}") from error
    return collector.result(scan.frames, scan.times, scan.fps, "torchcodec")
