"""decord and torchcodec, where they are known to return the right frames; PyAV finds out, and its first frame decides.

A part of the package that `trust_remote_code` does not bring along.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from .video_decoding import (
    VIDEO_BACKENDS,
    BTAdapterVideoMetadata,
    FrameCollector,
    Painter,
    Scan,
    Source,
    damaged,
    decoded_frames,
    has_alpha,
    open_container,
    orientation,
    scan_packets,
)
from .video_errors import EmptyVideoError, VideoBackendError, VideoDecodeError, VideoError, item_errors, sentence
from .video_seeking import NOT_ONE_FRAME, Seeker


_MODULES = {"pyav": "av", "decord": "decord", "torchcodec": "torchcodec.decoders"}
_FIXES = {
    "decord": "Install it with `pip install decord` (it has no wheels for ARM and for newer macOS), or use "
    "backend='pyav'.",
    "torchcodec": "Install the torchcodec release that matches your torch and FFmpeg's shared libraries "
    "(`apt-get install ffmpeg`), or use backend='pyav'.",
}


def available_video_backends() -> dict[str, str | None]:
    """Each backend name with None where it can be used, else the reason (each one is really imported)."""
    return {name: _problem(name) for name in VIDEO_BACKENDS}


def _problem(name: str) -> str | None:
    try:
        importlib.import_module(_MODULES[name])
    except Exception as error:  # a broken binary raises OSError, RuntimeError and others, not only ImportError
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return None


def loader(backend: str) -> Callable[..., tuple[np.ndarray, BTAdapterVideoMetadata]]:
    """The function that reads a `Source` with decord or torchcodec.

    Raises:
        ImportError: it cannot be imported.
    """
    if problem := _problem(backend):
        raise ImportError(f"The video backend {backend!r} cannot be used: {problem}. {_FIXES[backend]}")
    return {"decord": load_decord, "torchcodec": load_torchcodec}[backend]


def _scan_for(backend: str, source: Source) -> tuple[Scan, np.ndarray]:
    """Refuse what the backend is known to get wrong; what PyAV finds, and its first frame, are the reference."""
    with open_container(source) as (container, stream):
        seeker = Seeker(container, stream)
        scan = scan_packets(source, container, stream, seeker.visit)
    if scan.damage:
        damaged(source.name, scan.damage, scan.frames, "raise")
    if scan.frames == 0:
        raise EmptyVideoError(f"{source.name} has a video stream without frames.")
    if seeker.problem == NOT_ONE_FRAME or (seeker.problem is None and seeker.entries[:1] != [0]):
        raise _refused(backend, source, "it takes each packet for a frame, which not every packet of the file may be")
    if backend == "torchcodec" and scan.format == "avi":
        raise _refused(backend, source, "it returns frames that are one or two off in AVI files")
    if backend == "decord" and scan.hidden:
        raise _refused(backend, source, f"it shows {scan.hidden} frames that the edit list of the file hides")
    if backend == "decord" and scan.codec in ("av1", "libdav1d"):
        raise _refused(backend, source, "it has no AV1 decoder")
    with open_container(source) as (container, stream), item_errors(source.name):
        frame = next(decoded_frames(container, stream, source.name), None)
        if frame is None:
            raise EmptyVideoError(f"{source.name}: none of {scan.frames} packets decodes to a frame.")
        painter = Painter(stream, source.name, (255, 255, 255))
        if has_alpha(frame.format):
            raise _refused(backend, source, "it drops the transparency that the file has")
        if painter.aspect != 1:
            raise _refused(backend, source, "it does not show the pixels of the file in their shape")
        if sum(orientation(frame, source.name)) % 2:
            raise _refused(backend, source, "it does not apply the mirroring that the file asks for")
        return scan, painter.paint(frame)


def _refused(backend: str, source: Source, reason: str) -> VideoBackendError:
    return VideoBackendError(f"{source.name} cannot be read with backend={backend!r}: {reason}. Use backend='pyav'.")


def _check(backend: str, source: Source, count: int, scan: Scan, first: np.ndarray, reference: np.ndarray) -> None:
    if count != scan.frames:
        raise _refused(backend, source, f"it counts {count} frames where the file has {scan.frames}")
    if first.shape != reference.shape or np.abs(first.astype(int) - reference).mean() > 1:
        raise _refused(backend, source, "it does not show the first frame as the file asks for")


def load_decord(source: Source, collect: Callable[[int], FrameCollector]) -> tuple[np.ndarray, BTAdapterVideoMetadata]:
    decord = importlib.import_module(_MODULES["decord"])
    scan, reference = _scan_for("decord", source)
    collector = collect(scan.frames)
    with _errors_of("decord", source):
        reader = decord.VideoReader(source.data if isinstance(source.data, str) else source.opened(), num_threads=1)
        # from the start, without seeking: `get_batch` returns wrong frames of HEVC files when it skips frames
        for index in range(int(collector.indices.max()) + 1):
            frame = reader.next().asnumpy()
            if frame.shape[2] != 3:
                raise _refused("decord", source, "it takes the padding of narrow frames for a fourth channel")
            if index == 0:
                _check("decord", source, len(reader), scan, frame, reference)
            if collector.wants(index):
                collector.add(index, frame, source.name)
    return collector.result(scan.frames, scan.times, scan.fps, "decord")


def load_torchcodec(
    source: Source, collect: Callable[[int], FrameCollector]
) -> tuple[np.ndarray, BTAdapterVideoMetadata]:
    video_decoder = importlib.import_module(_MODULES["torchcodec"]).VideoDecoder
    scan, reference = _scan_for("torchcodec", source)
    collector = collect(scan.frames)
    with _errors_of("torchcodec", source):
        # "exact" reads all packets first; the default of some versions is off by frames at variable frame rates
        decoder = video_decoder(source.data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        _check(
            "torchcodec", source, decoder.metadata.num_frames, scan, decoder.get_frame_at(0).data.numpy(), reference
        )
        for index in np.unique(collector.indices).tolist():
            collector.add(index, decoder.get_frame_at(index).data.numpy(), source.name)
    return collector.result(scan.frames, scan.times, scan.fps, "torchcodec")


@contextmanager
def _errors_of(backend: str, source: Source) -> Iterator[None]:
    try:
        yield
    except VideoError:
        raise
    except Exception as error:  # DECORDError, RuntimeError, IndexError, StopIteration and others
        raise VideoDecodeError(
            f"{source.name} cannot be decoded by {backend}: {sentence(error)} Try backend='pyav', with "
            "on_damage='salvage' if the file is damaged."
        ) from error
