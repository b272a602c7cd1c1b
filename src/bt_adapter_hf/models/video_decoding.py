"""The decoders behind [`load_video`]: pictures and animations through PIL, other files by PyAV, decord or torchcodec.

All of them return exactly the frames that `collect(total)` wants, or raise. PyAV is the reference: it reads from the
first packet to the last and so knows how many frames there are. The others are checked against it, because they are
known to return wrong frames of some files without saying so.
"""

import importlib
import io
import logging
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.video_utils import VideoMetadata

from .video_errors import (
    EmptyVideoError,
    NoVideoStreamError,
    TruncatedVideoError,
    VideoDecodeError,
    VideoError,
    VideoInputError,
    sentence,
)


logger = logging.getLogger(__name__)

VIDEO_BACKENDS = ("pyav", "decord", "torchcodec")


@dataclass
class BTAdapterVideoMetadata(VideoMetadata):
    """`VideoMetadata` of transformers with the real time of each returned frame.

    `frame_timestamps` are seconds from the first frame of the video, as the file stores them, so they are right for
    variable frame rates, where index / fps is not. None where the source knows no time (arrays, lists of frames).
    `decoding` is "seeking" where only what these frames need was decoded, and damage elsewhere would not be noticed;
    "linear" where all frames were, as with `on_damage="check"`.
    """

    frame_timestamps: list[float] | None = None
    decoding: str | None = None

    @property
    def timestamps(self) -> list[float]:
        """Seconds from the first frame of the video, one per returned frame."""
        if self.frame_timestamps is not None:
            return self.frame_timestamps
        return super().timestamps


def import_pyav() -> ModuleType:
    # not an import statement: `trust_remote_code` would demand every package that one of its files imports
    try:
        return importlib.import_module("av")
    except Exception as error:  # a broken binary raises OSError and others, not only ImportError
        raise ImportError(
            f"Videos are decoded by PyAV, which cannot be used: {sentence(error)} Run `pip install av`."
        ) from error


def package_part(name: str) -> ModuleType | None:
    """A file beside this one that the package has, and a repository's own code goes without."""
    try:
        return importlib.import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.{name}":
            raise
        return None


def fetch(url: str, file: BinaryIO, max_bytes: int, timeout: float) -> None:
    """`download`, of the package."""
    part = package_part("video_download")
    if part is None:
        raise ImportError(f"Fetching {url} needs the package bt_adapter_hf; or download it and give its path.")
    part.download(url, file, max_bytes, timeout)


@dataclass
class Source:
    """A video on this machine: a path to a regular, readable, non-empty file, or its bytes."""

    data: str | bytes
    name: str

    def read_at(self, offset: int, count: int) -> bytes:
        with self.opened() as file:
            file.seek(offset)
            return file.read(count)

    def size(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else os.path.getsize(self.data)

    def opened(self) -> BinaryIO:
        return io.BytesIO(self.data) if isinstance(self.data, bytes) else open(self.data, "rb")


def flatten_image(image: Image.Image, background: tuple[int, int, int]) -> np.ndarray:
    if image.mode.startswith("I;16"):  # PIL would cut these off at 255
        return np.repeat((np.asarray(image) / 257).round().astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise VideoInputError(f"An image of mode {image.mode} does not say which number is white: convert it to RGB.")
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, (*background, 255))
    return np.asarray(Image.alpha_composite(canvas, image).convert("RGB"))


class FrameCollector:
    """The output array, filled in place: no second copy of the frames, or of what `shrink` makes of each."""

    def __init__(self, choose: Callable[[int], np.ndarray], shrink: Callable | None, total: int):
        self.indices, self.shrink = choose(total), shrink
        self.frames: np.ndarray | None = None
        self.shape: tuple[int, ...] = ()  # of the frames as they came

    def wants(self, index: int) -> bool:
        position = np.searchsorted(self.indices, index)
        return bool(position < len(self.indices) and self.indices[position] == index)

    def add(self, index: int, picture: np.ndarray, name: str) -> None:
        shape, self.shape = self.shape or picture.shape, picture.shape
        if shape != picture.shape:
            raise VideoDecodeError(
                f"{name} changes its frame size from {shape[1]}x{shape[0]} to "
                f"{picture.shape[1]}x{picture.shape[0]} at frame {index}: re-encode it at one size."
            )
        picture = picture if self.shrink is None else self.shrink(picture)
        if self.frames is None:
            self.frames = np.empty((len(self.indices), *picture.shape), dtype=np.uint8)
        self.frames[self.indices == index] = picture

    def result(
        self,
        total: int,
        times: Sequence[float],
        fps: float | None,
        backend: str,
        duration: float | None = None,
        decoding: str | None = "linear",
    ) -> tuple[np.ndarray, BTAdapterVideoMetadata]:
        """`times`: seconds of all frames of the video, the first one at 0."""
        if duration is None and fps is not None:
            duration = times[-1] + 1 / fps
        metadata = BTAdapterVideoMetadata(
            total_num_frames=total,
            fps=fps,
            width=self.shape[1],
            height=self.shape[0],
            duration=duration,
            video_backend=backend,
            frames_indices=self.indices.tolist(),
            frame_timestamps=[times[index] for index in self.indices],
            decoding=decoding,
        )
        return self.frames, metadata


# Pictures and animations through PIL


def picture_kind(source: Source) -> str | None:
    """The format of an image file that PIL shows right, moving or not; FFmpeg drops its alpha, times or frames."""
    head = source.read_at(0, 12)
    if head[4:8] == b"ftyp":
        return {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIF", b"heix": "HEIF", b"mif1": "HEIF"}.get(head[8:])
    starts = {b"GIF8": "GIF", b"\x89PNG": "PNG", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
    return "WebP" if head[:4] == b"RIFF" and head[8:] == b"WEBP" else starts.get(head[:4])


def load_picture_file(
    source: Source, collect: Callable[[int], FrameCollector], on_damage: str, background: tuple[int, int, int]
) -> tuple[np.ndarray, BTAdapterVideoMetadata]:
    with source.opened() as file:
        try:
            image = Image.open(file)
        except (UnidentifiedImageError, EOFError, IndexError) as error:
            raise EmptyVideoError(
                f"{source.name} is a {picture_kind(source)} without a complete frame, or of a kind that PIL has no "
                "reader for."
            ) from error
        return load_animation(image, source.name, collect, on_damage, background)


def load_animation(
    image: Image.Image,
    name: str,
    collect: Callable[[int], FrameCollector],
    on_damage: str,
    background: tuple[int, int, int],
    total: int | None = None,
) -> tuple[np.ndarray, BTAdapterVideoMetadata]:
    """Of an image that PIL has opened; `total`: frames that can be read, if that is known."""
    place = image.tell()
    skipped = 1 if image.info.get("default_image") else 0  # of an animated PNG: for viewers that know no animations
    total = total or max(image.n_frames - skipped, 1)
    ends, error = [0.0], None
    collector = collect(total)
    try:
        for index in range(total):
            image.seek(index + skipped)  # PIL applies each frame on the ones before it, so every frame is visited
            image.load()
            if collector.wants(index):
                collector.add(index, flatten_image(ImageOps.exif_transpose(image), background), name)
            delay = float(image.info.get("duration") or 0) / 1000
            # browsers and FFmpeg show a delay below 2/100 s as 1/10 s
            ends.append(ends[-1] + (delay if delay >= 0.02 else 0.1))
    except (OSError, EOFError, ValueError, SyntaxError) as caught:
        if isinstance(caught, VideoError):
            raise
        error = caught
    if error is not None:
        readable = len(ends) - 1
        damaged(name, f"PIL says '{sentence(error)[:-1]}', it is broken or ends inside a frame", readable, on_damage)
        return load_animation(image, name, collect, on_damage, background, readable)
    image.seek(place)
    *times, duration = ends
    return collector.result(total, times, total / duration, "pil", duration)


# Files through PyAV


@dataclass
class Scan:
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
    collector: FrameCollector
    times: list[float] = field(default_factory=list)
    error: str | None = None


def damaged(name: str, reason: str, frames: int, on_damage: str) -> None:
    message = f"{name} is truncated or damaged: {reason}"
    if on_damage != "salvage" or frames == 0:
        hint = "on_damage='salvage', a command's --on-damage salvage, takes these" if frames else "nothing to salvage"
        raise TruncatedVideoError(f"{message}; {frames} frames are readable ({hint}).")
    logger.warning("%s; salvaged %d frames, sampling among these.", message, frames)


@contextmanager
def open_container(source: Source) -> Iterator[tuple[Any, Any]]:
    """The PyAV container and its video stream; closed on every way out."""
    av = import_pyav()
    with source.opened() as file:
        try:
            # Some real files carry tags that are not UTF-8; they must not stop the video. The file is handed over open
            # and FFmpeg may open nothing itself: a playlist under a video's name would make it read other files.
            container = av.open(file, metadata_errors="ignore", options={"protocol_whitelist": "none"})
        except av.error.FFmpegError as error:
            raise VideoDecodeError(
                f"{source.name} is not a readable video ({error.strerror}): the file is cut, damaged or something "
                "else, such as a list of other files."
            ) from error
        with container:
            stream = container.streams.best("video")  # as FFmpeg, decord and torchcodec choose among several
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
                raise NoVideoStreamError(f"{source.name} has no video stream (streams found: {kinds}).")
            if stream.codec_context is None:
                raise VideoDecodeError(f"{source.name} uses a video codec that PyAV has no decoder for.")
            stream.codec_context.thread_count = 1  # else one per core, in each worker
            yield container, stream


def _decoder(stream: Any, name: str) -> Any:
    """The codec context that decodes a stream. FFmpeg's own VP8 and VP9 decoders drop the alpha, Google's do not."""
    context = stream.codec_context
    if stream.metadata.get("alpha_mode") != "1" or context.name not in ("vp8", "vp9"):
        return context
    av = import_pyav()
    try:
        decoder = av.CodecContext.create({"vp8": "libvpx", "vp9": "libvpx-vp9"}[context.name], "r")
    except av.codec.codec.UnknownCodecError as error:
        raise VideoDecodeError(
            f"{name} is transparent, and this PyAV cannot decode the alpha of {context.name}."
        ) from error
    decoder.extradata = context.extradata
    return decoder


def decoded_frames(container: Any, stream: Any, name: str) -> Iterator[Any]:
    """All frames in the order shown."""
    decoder = _decoder(stream, name)
    for packet in container.demux(stream):
        yield from decoder.decode(packet)


def scan_packets(source: Source, container: Any, stream: Any, visit: Callable[[Any], None] | None = None) -> Scan:
    """Count the frames exactly: headers are 0 for mkv and webm, and too high where an edit list hides frames.

    `visit` is called with each packet that has a frame.
    """
    av = import_pyav()
    hidden = packets = 0
    shown: list[int | None] = []  # presentation times, in units of the stream's time base
    error = None
    ends: dict[int, int] = {}  # of each stream, in units of its time base
    try:
        for packet in container.demux():
            if packet.dts is None and packet.size == 0:
                continue  # the flush packet that PyAV adds at the end
            index, pts = packet.stream_index, packet.pts
            if pts is not None:
                ends[index] = max(ends.get(index, 0), pts + (packet.duration or 0))
            if index != stream.index:
                continue
            packets += 1
            if packet.size > 0:
                if visit is not None:
                    visit(packet)
                if packet.is_discard:
                    hidden += 1
                else:
                    shown.append(pts)
    except av.error.FFmpegError as demux_error:
        error = f"reading stops with '{demux_error.strerror}'"
    formats = container.format.name
    reached = max((float(end * container.streams[index].time_base) for index, end in ends.items()), default=0.0)
    if error is None:
        error = _missing_part(source, formats, stream, packets, reached)
    fps = frame_rate(stream)
    timed = formats != "avi" and None not in shown  # AVI stores none; what FFmpeg makes up is uneven
    times = packet_times(shown, float(stream.time_base)) if timed else _even_times(len(shown), fps)
    return Scan(formats, stream.codec_context.name, len(shown), hidden, fps, times, timed, error)


def frame_rate(stream: Any) -> float | None:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


def packet_times(stamps: list[int], time_base: float) -> list[float]:
    stamps = sorted(stamps)  # packets come in decoding order
    return [(stamp - stamps[0]) * time_base for stamp in stamps]


def _even_times(count: int, fps: float | None) -> list[float]:
    return [index / fps if fps else 0.0 for index in range(count)]


def _missing_part(source: Source, formats: str, stream: Any, packets: int, reached: float) -> str | None:
    """FFmpeg reads many cut files to their end without an error, so compare with what the container declares."""
    if "mp4" in formats and packets < stream.frames:
        part = package_part("video_mp4_index")
        if part is None or packets < len(stream.index_entries) or not part.has_all(source, stream):
            return f"{packets} of {stream.frames} declared frames are in the file"
    if "mp4" in formats and stream.frames == 0:  # fragmented: the index is spread over the file
        missing = _missing_from_last_box(source)
        if missing > 0:
            return f"{missing} bytes are missing at the end"
    if formats == "avi" and packets < stream.frames:
        # writers get this count wrong in intact files too, so ask for a second sign: the RIFF size
        missing = 8 + int.from_bytes(source.read_at(4, 4), "little") - source.size()
        if missing > 0:
            return f"{packets} of {stream.frames} declared frames are in the file, {missing} bytes are missing"
    if "matroska" in formats and stream.container.duration is not None:
        end = stream.container.duration / 1e6  # where the last frame ends, or how long after the first one
        if reached < end - max(0.5, 0.05 * end):
            return f"it ends at {reached:.2f} s of {end:.2f} s"
    return None


def _missing_from_last_box(source: Source) -> int:
    """How many bytes the last top-level box of an mp4 file reaches beyond the end of the file."""
    position, size = 0, source.size()
    while position + 8 <= size:
        head = source.read_at(position, 16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:  # the size is in the next 8 bytes
            length = int.from_bytes(head[8:], "big")
        if length < 8:  # 0: up to the end of the file
            return 0
        position += length
    return max(0, position - size)


def load_pyav(
    source: Source, collect: Callable[[int], FrameCollector], on_damage: str, background: tuple[int, int, int]
) -> tuple[np.ndarray, BTAdapterVideoMetadata]:
    seeking = package_part("video_seeking") if on_damage != "check" else None
    with open_container(source) as (container, stream):
        seeker = seeking and seeking.Seeker(container, stream)
        scan = seeker.scan(source) if seeker else scan_packets(source, container, stream)
        if seeker and scan.frames and not scan.damage:
            found = seeker.decode(collect(scan.frames), Painter(stream, source.name, background), source.name)
            if found is not None:
                return found.result(scan.frames, scan.times, scan.fps, "pyav", decoding="seeking")
    if scan.frames == 0:
        if scan.damage:
            damaged(source.name, scan.damage, 0, on_damage)
        raise EmptyVideoError(f"{source.name} has a video stream without frames.")
    decoded = _decode(source, collect(scan.frames), background)
    total = len(decoded.times)
    damage = scan.damage or decoded.error
    if damage:
        damaged(source.name, damage, total, on_damage)
    if total == 0:
        raise EmptyVideoError(f"{source.name}: none of {scan.frames} packets decodes to a frame.")
    if total != scan.frames:
        # a cut file, or one whose packets are not one frame each (field pairs, invisible frames)
        logger.info("%s: %d packets, %d frames; sampling again.", source.name, scan.frames, total)
        decoded = _decode(source, collect(total), background)
    times = decoded.times if scan.timed else _even_times(total, scan.fps)
    return decoded.collector.result(total, times, scan.fps, "pyav")


def _decode(source: Source, collector: FrameCollector, background: tuple[int, int, int]) -> _Decoded:
    """Decode from the first frame to the last, so that the count of frames and their order are certain."""
    av = import_pyav()
    decoded = _Decoded(collector)
    broken: list[int] = []
    first_time = None
    with open_container(source) as (container, stream):
        painter = Painter(stream, source.name, background)
        try:
            for index, frame in enumerate(decoded_frames(container, stream, source.name)):
                time = frame.time or 0.0
                first_time = time if first_time is None else first_time
                decoded.times.append(time - first_time)
                if decoded.collector.wants(index):
                    if frame.is_corrupt:
                        broken.append(index)
                    decoded.collector.add(index, painter.paint(frame), source.name)
        except av.error.FFmpegError as error:
            decoded.error = f"decoding stops after frame {len(decoded.times)} with '{error.strerror}'"
    if broken:
        logger.warning("%s: the decoder marks frames %s as damaged.", source.name, broken)
    return decoded


class Painter:
    """Makes pictures of PyAV's frames as a player shows them."""

    def __init__(self, stream: Any, name: str, background: tuple[int, int, int]):
        self.stream, self.name, self.background = stream, name, background
        self.aspect = stream.sample_aspect_ratio or 1  # width of a pixel / its height; None or 0: not said
        self.coded_aspect = stream.codec_context.sample_aspect_ratio
        if not 0.1 <= self.aspect <= 10:
            raise VideoDecodeError(
                f"{name} says that its pixels are {self.aspect} times as wide as high: re-encode it."
            )
        self.warned = False

    def paint(self, frame: Any) -> np.ndarray:
        """uint8 `(H, W, 3)`."""
        if self.stream.codec_context.sample_aspect_ratio != self.coded_aspect:
            raise VideoDecodeError(f"{self.name} changes the shape of its pixels on the way: re-encode it with one.")
        if frame.color_trc in (16, 18) and not self.warned:  # PQ and HLG
            logger.warning("%s is HDR; its colours are shown without tone mapping.", self.name)
            self.warned = True
        # One thread: colour conversion with several hangs in forked processes, such as data loader workers.
        if has_alpha(frame.format):
            picture = flatten_image(Image.fromarray(frame.to_ndarray(format="rgba", threads=1)), self.background)
        else:
            picture = frame.to_ndarray(format="rgb24", threads=1)
        if self.aspect != 1:  # to square pixels; like browsers, by making one side longer
            height, width = picture.shape[:2]
            size = (round(width * max(self.aspect, 1)), round(height / min(self.aspect, 1)))
            picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
        transpose, flip_vertical, flip_horizontal = orientation(frame, self.name)
        if transpose:
            picture = picture.swapaxes(0, 1)
        if flip_vertical:
            picture = picture[::-1]
        if flip_horizontal:
            picture = picture[:, ::-1]
        return picture


def has_alpha(form: Any) -> bool:
    return form.has_palette or any(component.is_alpha for component in form.components)


def orientation(frame: Any, name: str) -> tuple[bool, bool, bool]:
    """How to show the stored picture: (swap its axes, then mirror top-bottom, mirror left-right).

    From the display matrix x' = a x + c y, y' = b x + d y of the container. PyAV does not apply it, and its
    `frame.rotation` knows no mirroring.
    """
    matrix = _display_matrix(frame, name)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, crossed) > 0.01 * max(straight, crossed):
        logger.warning("%s asks for a rotation that is no multiple of 90 degrees; shown unrotated.", name)
        return False, False, False
    if crossed > straight:
        return True, b < 0, c < 0
    return False, d < 0, a < 0


def _display_matrix(frame: Any, name: str) -> bytes | None:
    container = importlib.import_module("av.sidedata.sidedata").SideDataContainer
    found = container.__new__(container, frame)
    # PyAV has no name for some side data, such as Exif, and stops there; FFmpeg puts the matrix before these.
    with suppress(ValueError):
        found.__init__(frame)
    with suppress(ValueError):
        for data in found:
            if data.type.name == "DISPLAYMATRIX":
                return bytes(data)
    if frame.rotation:
        raise VideoDecodeError(f"{name} is rotated, and PyAV cannot read how: re-encode it upright.")
    return None
