"""The frames of a clip of an evaluation, decoded once."""

from typing import TYPE_CHECKING

import numpy as np

from ..data.pairs import decoding_options
from ..models.video_errors import EmptyVideoError
from ..models.video_io import load_video, sample_frame_indices


if TYPE_CHECKING:
    from ..models.video_processing_bt_adapter import BTAdapterVideoProcessor

SPAN_DENSITY = 4  # frames that are decoded for each one wanted of a part of a video
SPAN_FRAMES = 512  # decoded at most


def read_frames(
    video: str | bytes,
    video_processor: "BTAdapterVideoProcessor",
    span: tuple[float, float] | None = None,
    clips: int = 1,
) -> np.ndarray:
    """Frames uint8 (T, H, W, 3) that the video processor samples.

    Args:
        span: only this part, in seconds: more frames of the whole are decoded, and sampled again among those inside.
        clips: so many times the frames, for chat models that cut a video into clips.

    Raises:
        VideoError: the video cannot be used; or it is a GIF that has become a still, as happens to data sets that
            were converted by tools for images; or nothing of it lies in the span.
    """
    wanted = video_processor.num_frames * clips
    options = {"sampling": video_processor.sampling, **decoding_options(video_processor)}
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
