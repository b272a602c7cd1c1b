"""How sure a score is: intervals over videos, and paired tests of two models on the same videos.

Items of one video (its captions, its questions) stand or fall together, so whole videos are drawn anew, not items. Two
models are compared on the same draws.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..import_utils import require_package


Values = Sequence[float] | np.ndarray

DRAWS = 2000
CONFIDENCE = 0.95
# For a paired bootstrap. Of two equal models it calls up to 30 in 100 different (p < 0.05) on 3 videos, 15 on 10,
# and 5 to 7 on 30.
FEWEST_VIDEOS = 30
_BATCH = 200  # draws at once, which bounds the memory
_KEPT = 2 * 10**7  # numbers of draws that are kept for the next score, 160 MB


@dataclass(frozen=True)
class Interval:
    """A score with the interval that holds it with 95 % confidence (percentiles of the bootstrap over videos)."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Interval":
        """In another unit, for instance percent."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same videos.

    Attributes:
        difference: first minus second, with its interval.
        p_bootstrap: two-sided, from the paired bootstrap over videos; never below 1 / (draws + 1). None of fewer than
            `FEWEST_VIDEOS`: drawn from few videos that happen to agree, it calls nearly every difference sure.
        p_mcnemar: of the exact McNemar test over items, where every item is right or wrong; else None. It takes items
            for independent, which several of one video are not.
    """

    difference: Interval
    p_bootstrap: float | None
    p_mcnemar: float | None

    def scaled(self, factor: float) -> "Comparison":
        """The difference in another unit, for instance percent."""
        return Comparison(self.difference.scaled(factor), self.p_bootstrap, self.p_mcnemar)


def mean_interval(
    values: Sequence[float] | np.ndarray,
    videos: Sequence[Hashable] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Mean of the values of items, with its interval over videos.

    Args:
        values: (items,) such as 1 for a right answer and 0 for a wrong one.
        videos: (items,) the video of each item; left out, every item is a video of its own.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: no items, a value that is not finite, or another number of videos than of values.
    """
    values, groups = _checked(values, videos)
    sums, counts = _per_video(values, groups)
    means = _resampled(len(counts), lambda weights: (weights @ sums) / (weights @ counts), draws, seed)
    return _interval(values.mean(), means)


def median_interval(
    values: Sequence[float] | np.ndarray,
    videos: Sequence[Hashable] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Median of the values of items, with its interval over videos. Arguments and errors as in [`mean_interval`]."""
    values, groups = _checked(values, videos)
    order = np.argsort(values, kind="stable")
    ordered, groups = values[order], groups[order]

    def medians(weights: np.ndarray) -> np.ndarray:
        """An item that is drawn w times counts w times; the middle two are averaged, as numpy's median does."""
        total = weights[:, groups].cumsum(axis=1)  # (draws, items)
        count = total[:, -1:]
        middle = [(total > (count - 1) // 2).argmax(axis=1), (total > count // 2).argmax(axis=1)]
        return (ordered[middle[0]] + ordered[middle[1]]) / 2

    return _interval(np.median(values), _resampled(groups.max() + 1, medians, draws, seed))


def compare(
    first: Values,
    second: Values,
    videos: Sequence[Hashable] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Comparison:
    """Whether the first model is better than the second on the same items.

    Args:
        first, second: (items,) values of the two models, item by item.
        videos, draws, seed: as in [`mean_interval`].

    Raises:
        ValueError: as there, and where the two differ in number.
    """
    require_package("scipy", "eval")
    from scipy.stats import binomtest

    first, groups = _checked(first, videos)
    second, _ = _checked(second, videos)
    if len(first) != len(second):
        raise ValueError(f"A paired test needs the same items twice; got {len(first)} and {len(second)} values.")
    sums, counts = _per_video(first - second, groups)
    means = _resampled(len(counts), lambda weights: (weights @ sums) / (weights @ counts), draws, seed)
    p_bootstrap = None
    if len(counts) >= FEWEST_VIDEOS:
        tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
        p_bootstrap = min(1.0, 2 * (tail + 1) / (draws + 1))
    p_mcnemar = None
    if np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        better, worse = int((first > second).sum()), int((first < second).sum())
        p_mcnemar = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return Comparison(_interval((first - second).mean(), means), p_bootstrap, p_mcnemar)


def _checked(values: Sequence[float] | np.ndarray, videos: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Values as float64 (items,), and the number of the video of each item."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"Expected one value per item and at least one item, got shape {values.shape}.")
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} values are NaN or infinite.")
    if videos is None:
        return values, np.arange(len(values))
    if len(videos) != len(values):
        raise ValueError(f"Got {len(values)} values and {len(videos)} videos; expected the video of each value.")
    numbers = {video: number for number, video in enumerate(dict.fromkeys(videos))}
    return values, np.array([numbers[video] for video in videos])


def _per_video(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.bincount(groups, weights=values), np.bincount(groups).astype(np.float64)


def _resampled(videos: int, statistic: Callable[[np.ndarray], np.ndarray], draws: int, seed: int) -> np.ndarray:
    """The statistic of every draw: it takes how often each video was drawn, (draws, videos), and gives (draws,)."""
    parts = _draws(videos, draws, seed) if videos * draws <= _KEPT else _draw(videos, draws, seed)
    return np.concatenate([statistic(weights) for weights in parts])


def _draw(videos: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(seed)
    share = np.full(videos, 1 / videos)
    for start in range(0, draws, _BATCH):
        yield generator.multinomial(videos, share, size=min(_BATCH, draws - start))


@lru_cache(maxsize=2)
def _draws(videos: int, draws: int, seed: int) -> list[np.ndarray]:
    """All scores of a run draw the same videos: drawing takes longer than scoring."""
    return list(_draw(videos, draws, seed))


def _interval(value: float, resampled: np.ndarray) -> Interval:
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(value), float(low), float(high))
