"""Temporal controls: what a score is worth once the order of the frames, or all but one of them, is taken away.

A model that has learned motion must lose on `shuffled` and `reversed` clips; one that scores as high there reads
single frames. `one_frame` and `frame_average` show how far the image model alone gets.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from ..models import modeling_bt_adapter_branch
from .retrieval import Features, retrieval_metrics


CONTROLS = ("shuffled", "reversed", "one_frame", "frame_average")


def frame_counts(videos: torch.Tensor, frame_mask: torch.Tensor | None = None) -> list[int]:
    """Real frames of each video in (B, T, C, H, W); `ValueError` where the mask (B, T) is not right-padded."""
    if videos.ndim != 5:
        raise ValueError(f"videos must have shape (B, T, C, H, W), got {tuple(videos.shape)}.")
    if frame_mask is None:
        return [videos.shape[1]] * videos.shape[0]
    if frame_mask.shape != videos.shape[:2]:
        raise ValueError(f"frame_mask must have shape {tuple(videos.shape[:2])}, got {tuple(frame_mask.shape)}.")
    counts = frame_mask.sum(dim=1)
    if not torch.equal(frame_mask.bool(), torch.arange(videos.shape[1], device=counts.device) < counts[:, None]):
        raise ValueError("frame_mask must be right-padded: real frames first, then padding.")
    return counts.tolist()


def _reorder(videos: torch.Tensor, orders: list[torch.Tensor]) -> torch.Tensor:
    frames = videos.shape[1]
    rows = [torch.cat([order, torch.arange(len(order), frames)]) for order in orders]  # padding stays where it is
    index = torch.stack(rows).to(videos.device)
    return videos[torch.arange(len(videos), device=videos.device)[:, None], index]


def shuffle_frames(
    videos: torch.Tensor, frame_mask: torch.Tensor | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Frames (B, T, C, H, W) in random order: a permutation of its own for every clip, never the identity.

    One fixed permutation can leave the ends of the clip in place and prove nothing. Clips of a single frame have no
    other order and stay as they are.

    Args:
        generator: a CPU generator; the permutations do not depend on the device of the videos.
    """
    orders = []
    for count in frame_counts(videos, frame_mask):
        order = torch.randperm(count, generator=generator)
        while count > 1 and torch.equal(order, torch.arange(count)):
            order = torch.randperm(count, generator=generator)
        orders.append(order)
    return _reorder(videos, orders)


def reverse_frames(videos: torch.Tensor, frame_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Frames (B, T, C, H, W) of every clip from last to first; padding stays at the end."""
    return _reorder(videos, [torch.arange(count - 1, -1, -1) for count in frame_counts(videos, frame_mask)])


def middle_frame(videos: torch.Tensor, frame_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The middle frame of every clip as a video of one frame: (B, 1, C, H, W)."""
    index = torch.tensor([count // 2 for count in frame_counts(videos, frame_mask)], device=videos.device)
    return videos[torch.arange(len(videos), device=videos.device), index][:, None]


def frame_average_features(
    encode_images: Callable[[torch.Tensor], torch.Tensor],
    videos: torch.Tensor,
    frame_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean of the normalised image features of the frames of each clip, (B, D): the frame-averaged CLIP baseline."""
    counts = frame_counts(videos, frame_mask)
    features = encode_images(videos.flatten(0, 1))  # (B*T, D)
    features = torch.nn.functional.normalize(features, dim=-1).unflatten(0, videos.shape[:2])
    return torch.stack([clip[:count].mean(dim=0) for clip, count in zip(features, counts, strict=True)])


def control_features(
    encode_videos: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    videos: torch.Tensor,
    frame_mask: torch.Tensor | None = None,
    *,
    controls: Sequence[str] = ("shuffled", "reversed", "one_frame"),
    encode_images: Callable[[torch.Tensor], torch.Tensor] | None = None,
    draws: int = 3,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Features of one batch under every control.

    Args:
        encode_videos: (videos, frame_mask) -> features (B, D).
        videos: (B, T, C, H, W), as the model takes them; frame_mask: (B, T), right-padded, or None.
        controls: names out of `CONTROLS`.
        encode_images: frames (N, C, H, W) -> image features (N, D); needed for `frame_average` only.
        draws: how many times every clip is shuffled anew.
        generator: for the permutations; seed it once per evaluation, not once per batch.

    Yields:
        `("shuffled_0", (B, D))`, ... `("reversed", ...)`, in the order of `controls`.
    """
    check_controls(controls)
    if "frame_average" in controls and encode_images is None:
        raise ValueError("The control 'frame_average' needs encode_images.")
    for control in controls:
        if control == "shuffled":
            for draw in range(draws):
                yield f"shuffled_{draw}", encode_videos(shuffle_frames(videos, frame_mask, generator), frame_mask)
        elif control == "reversed":
            yield "reversed", encode_videos(reverse_frames(videos, frame_mask), frame_mask)
        elif control == "one_frame":
            with without_warning_of_one_frame():
                features = encode_videos(middle_frame(videos, frame_mask), None)
            yield "one_frame", features
        else:
            yield "frame_average", frame_average_features(encode_images, videos, frame_mask)


@contextlib.contextmanager
def without_warning_of_one_frame() -> Iterator[None]:
    """A model warns of so few frames that its order of events is told badly, which is what this control is for."""

    def is_other(record: logging.LogRecord) -> bool:
        return "are interpolated to 1:" not in record.getMessage()

    logger = logging.getLogger(modeling_bt_adapter_branch.__name__)
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def check_controls(controls: Sequence[str], known: Sequence[str] = CONTROLS) -> None:
    """`ValueError` for a name that is not one of the known, or is there twice."""
    unknown = sorted(set(controls) - set(known))
    if unknown:
        raise ValueError(f"Unknown controls {unknown}; choose from {list(known)}.")
    if len(set(controls)) < len(controls):
        raise ValueError(f"A control is there twice in {list(controls)}.")


def control_metrics(
    text_features: Features,
    features: dict[str, Features],
    text_ids: Sequence | None = None,
    video_ids: Sequence | None = None,
) -> dict[str, float]:
    """Retrieval metrics of the features gathered from `control_features`, flat: `reversed_t2v_R1`, ...

    The draws of `shuffled` are averaged into one `shuffled_t2v_R1`, ....
    """
    totals: dict[str, list[float]] = {}
    for name, video_features in features.items():
        control = "shuffled" if name.startswith("shuffled_") else name
        for metric, value in retrieval_metrics(text_features, video_features, text_ids, video_ids).items():
            totals.setdefault(f"{control}_{metric}", []).append(value)
    return {metric: sum(values) / len(values) for metric, values in totals.items()}
