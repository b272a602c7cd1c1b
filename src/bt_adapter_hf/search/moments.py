"""Moments of videos: how a video is cut into windows on one grid of frames, and how hits that overlap become one."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np


SHORTEST = 0.01  # seconds; frames of a video are hardly closer, and windows closer than frames are equal


@dataclass(frozen=True)
class Windows:
    """How videos are cut: windows of `window` seconds, one every `stride` seconds.

    Raises:
        ValueError: a length below a hundredth of a second, or a stride beyond the window, which would leave gaps.
    """

    window: float
    stride: float

    def __post_init__(self):
        for name, value in (("window", self.window), ("stride", self.stride)):
            if not (math.isfinite(value) and value >= SHORTEST):
                raise ValueError(f"{name}={value:g}: expected a number of seconds, {SHORTEST} or more.")
        if self.stride > self.window:
            raise ValueError(
                f"stride={self.stride:g} is longer than window={self.window:g}: what lies between would be in none."
            )

    def plan(self, duration: float, num_frames: int) -> tuple[float, list[int], int]:
        """The grid of a video: (seconds between its points, the point where each window starts, points from one frame
        of a window to its next). A window ends with the video, whatever the stride."""
        apart = self.window / num_frames
        step = max(1, math.ceil(apart / self.stride - 1e-9))
        grid = apart / step
        last = math.floor((duration - self.window) / grid + 1e-6)
        count = math.floor(last * grid / self.stride + 1e-6) + 1
        starts = {min(last, round(number * self.stride / grid)) for number in range(count)} | {last}
        return grid, sorted(starts), step

    def fits(self, duration: float | None) -> bool:
        """Whether a video is as long as a window; a shorter one is a moment as a whole."""
        return duration is not None and duration >= self.window - 1e-6


def suppress(
    hits: Iterable[tuple[float, dict[str, Any]]], overlap: float = 0.0, per_video: bool = False
) -> list[tuple[float, dict[str, Any]]]:
    """Of hits, best first, those that no better one of the same file covers: non-maximum suppression in time.

    Args:
        overlap: moments that share more than this part of the time that both take are one.
        per_video: all moments of a file are one.
    """
    kept: list[tuple[float, dict[str, Any]]] = []
    spans: dict[str, list[tuple[float, float]]] = {}
    for score, row in hits:
        span = (row["start"], math.inf if row["end"] is None else row["end"])
        better = spans.setdefault(row["path"], [])
        if better if per_video else any(shared(span, other) > overlap for other in better):
            continue
        better.append(span)
        kept.append((score, row))
    return kept


def shared(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Intersection over union of two spans of time."""
    both = min(a[1], b[1]) - max(a[0], b[0])
    if both <= 1e-6:
        return 0.0
    union = max(a[1], b[1]) - min(a[0], b[0])
    return 1.0 if math.isinf(union) else both / union


def clock(seconds: float, like: float = 0.0) -> str:
    """00:41, or 1:00:41; with tenths where `seconds` or `like` are no whole number."""
    tenths = any(abs(value - round(value)) > 0.05 for value in (seconds, like))
    seconds = round(seconds, 1) if tenths else round(seconds)
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    shown = f"{minutes:02d}:{rest:04.1f}" if tenths else f"{minutes:02d}:{int(rest):02d}"
    return f"{hours}:{shown}" if hours else shown


def span_text(start: float, end: float | None) -> str:
    """00:41-00:49."""
    return f"{clock(start)}-" if end is None else f"{clock(start, end)}-{clock(end, start)}"


def pick_frames(times: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The frame that is shown at each point of time: the last one that has begun, or the first one."""
    return np.clip(np.searchsorted(times, points + 1e-6, side="right") - 1, 0, len(times) - 1)
