"""The clips of an evaluation and their frames, each decoded once."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..data.decoding_process import DecodingProcess
from ..data.pairs import decoding_options
from ..hub.machine import decoding_pool
from ..models.video_errors import EmptyVideoError, VideoError
from ..models.video_io import load_video, sample_frame_indices


if TYPE_CHECKING:
    from ..models.video_processing_bt_adapter import BTAdapterVideoProcessor

SPAN_DENSITY = 4  # frames that are decoded for each one wanted of a part of a video
SPAN_FRAMES = 512  # decoded at most


class Clip(NamedTuple):
    """One row of an evaluation.

    Attributes:
        row: its number.
        name: of its video; rows with one name share the video, which is encoded once.
        video: path, or bytes of the file; None with a `problem`.
        info: what belongs to the row (texts, label), plain values; it is kept with the features.
        problem: why there is no video.
        identity: changes with the content of the file; features of another one are made anew.
        backwards: the frames are taken from last to first.
        span: only this part of the video is taken, in seconds.
    """

    row: int
    name: str
    video: str | bytes | None
    info: dict[str, Any]
    problem: str | None = None
    identity: str | None = None
    backwards: bool = False
    span: tuple[float, float] | None = None


def read_clip(
    video: str | bytes,
    video_processor: "BTAdapterVideoProcessor",
    backwards: bool,
    span: tuple[float, float] | None,
    clips: int = 1,
    shrink: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Frames uint8 (T, H, W, 3) of a clip; see `read_frames`."""
    frames = read_frames(video, video_processor, span, clips, shrink)
    return np.ascontiguousarray(frames[::-1]) if backwards else frames


def read_frames(
    video: str | bytes,
    video_processor: "BTAdapterVideoProcessor",
    span: tuple[float, float] | None = None,
    clips: int = 1,
    shrink: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Frames uint8 (T, H, W, 3) that the video processor samples.

    Args:
        span: only this part, in seconds: more frames of the whole are decoded, and sampled again among those inside.
        clips: so many times the frames, for chat models that cut a video into clips.
        shrink: see [`load_video`].

    Raises:
        VideoError: the video cannot be used; or it is a GIF that has become a still, as happens to data sets that
            were converted by tools for images; or nothing of it lies in the span.
    """
    wanted = video_processor.num_frames * clips
    options = {"sampling": video_processor.sampling, "shrink": shrink, **decoding_options(video_processor)}
    if span is None:
        frames, metadata = load_video(video, num_frames=wanted, **options)
        if metadata.total_num_frames == 1 and _is_gif(video):
            raise EmptyVideoError(
                "It is a GIF of one frame: the video has become a still, and nothing moves in it. Get the original."
            )
        return frames
    start, end = span
    if not 0 <= start < end:
        raise EmptyVideoError(f"The part from {start:g} to {end:g} s is empty.")
    _, metadata = load_video(video, num_frames=1, **options)
    duration = max(metadata.duration or 0.0, end)
    dense = min(SPAN_FRAMES, round(SPAN_DENSITY * wanted * duration / (end - start)) + 1)
    every = dense >= metadata.total_num_frames
    frames, metadata = load_video(video, num_frames=None if every else dense, **options)
    inside = [place for place, second in enumerate(metadata.timestamps) if start <= second <= end]
    if not inside:
        raise EmptyVideoError(f"Nothing lies between {start:g} and {end:g} s: it ends at {metadata.duration:g} s.")
    chosen = sample_frame_indices(len(inside), wanted, video_processor.sampling)
    return frames[[inside[place] for place in chosen]]


def _is_gif(video: str | bytes) -> bool:
    if isinstance(video, bytes):
        return video[:4] == b"GIF8"
    with open(video, "rb") as file:
        return file.read(4) == b"GIF8"


class ClipDecoder:
    """Decodes several clips at a time, each in a child process of its own thread, while the caller computes with the
    cores that these leave.

    Args:
        load: (video, backwards, span) -> an array.
        workers: at a time.
        item_timeout: seconds for one, see `DecodingProcess`; None decodes in this process.
    """

    def __init__(self, load: Callable[..., np.ndarray], workers: int, item_timeout: float | None):
        self.load, self.item_timeout = load, item_timeout
        self.workers, self._open = workers, ExitStack()
        self._own = threading.local()
        self._children: list[DecodingProcess] = []

    def __enter__(self) -> "ClipDecoder":
        self._pool = self._open.enter_context(decoding_pool(self.workers))
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._open.close()
        for child in self._children:
            child.close()

    def __call__(self, clips: Iterable[Clip]) -> Iterator[tuple[Clip, np.ndarray | str]]:
        """What was loaded of each clip, or the reason why it could not be, in order."""
        futures = deque((clip, self._pool.submit(self._attempt, clip)) for clip in clips)
        while futures:
            clip, future = futures.popleft()
            yield clip, future.result()

    def _attempt(self, clip: Clip) -> np.ndarray | str:
        if clip.problem is not None:
            return clip.problem
        load = self.load
        if self.item_timeout is not None:
            load = getattr(self._own, "child", None)
            if load is None:
                load = self._own.child = DecodingProcess(self.load, self.item_timeout)
                self._children.append(load)
        try:
            return load(clip.video, clip.backwards, clip.span)
        except VideoError as error:
            return str(error) or repr(error)
