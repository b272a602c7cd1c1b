"""Scores of benchmarks that only the order of frames decides: clips and texts that differ in time alone.

All of them are items of n clips and m >= n texts, clip i showing text i: one clip with a right and a wrong text
(binary), two clips with each other's text (Vinoground, a clip beside its reverse), one clip with several choices.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import factorial

import numpy as np

from .statistics import Interval, mean_interval


@dataclass(frozen=True)
class TemporalItem:
    """Clips and texts, clip i showing text i.

    Attributes:
        clips: names of the clips.
        texts: as many, or more: the rest are wrong for all clips.
        aspect: what the item tests ("direction", "order", ...); scores are also given by aspect.
        source: the video that the clips were cut from; items of one source are drawn together for intervals.
    """

    clips: tuple[Hashable, ...]
    texts: tuple[str, ...]
    aspect: str = ""
    source: Hashable = None

    def __post_init__(self):
        if not 1 <= len(self.clips) <= len(self.texts) or len(self.texts) < 2:
            raise ValueError(
                f"An item needs at least one clip, two texts, and a text for each clip; got {len(self.clips)} clips "
                f"and {len(self.texts)} texts: {self.texts}."
            )
        if len(set(self.texts)) < len(self.texts):
            raise ValueError(f"The texts of an item must differ: {self.texts}.")


@dataclass(frozen=True)
class TemporalScore:
    """One score over items, in percent, beside what guessing gives."""

    interval: Interval
    chance: float
    items: int


def temporal_values(scores: np.ndarray) -> dict[str, float]:
    """What an item is worth, from the scores of its clips against its texts (n, m).

    Returns:
        pair: share of the clips whose own text beats every other one.
        text: all of them do (1 or 0).
        video: each of the n texts finds its clip among the clips; None with a single clip.
        group: both; None with a single clip.

        A tie is worth its share: two equal best texts are half a hit each.
    """
    scores = np.asarray(scores, dtype=np.float64)
    clips = len(scores)
    if scores.ndim != 2 or not 1 <= clips <= scores.shape[1]:
        raise ValueError(
            f"scores must have shape (clips, texts), at least as many texts as clips; got {scores.shape}."
        )
    by_text = np.array([_share(row, number) for number, row in enumerate(scores)])
    values = {"pair": float(by_text.mean()), "text": float(by_text.prod())}
    if clips > 1:
        by_clip = np.array([_share(scores[:, number], number) for number in range(clips)])
        values |= {"video": float(by_clip.prod()), "group": float(by_text.prod() * by_clip.prod())}
    return values


def temporal_chance(clips: int, texts: int) -> dict[str, float]:
    """What `temporal_values` gives on average for scores without ties that know nothing."""
    chance = {"pair": 1 / texts, "text": texts**-clips}
    if clips > 1:
        chance["video"] = clips**-clips
        # All n right pairs above all others of their row and column. For 2 x 2 that is min(right) > max(wrong).
        if (clips, texts) == (2, 2):
            chance["group"] = factorial(2) * factorial(2) / factorial(4)
        else:
            generator = np.random.default_rng(0)
            drawn = generator.random((20_000, clips, texts))
            chance["group"] = float(np.mean([temporal_values(scores)["group"] for scores in drawn]))
    return chance


def temporal_scores(
    items: Sequence[TemporalItem], scores: Sequence[np.ndarray], seed: int = 0
) -> dict[str, dict[str, TemporalScore]]:
    """Scores over all items (under "all") and by aspect, in percent.

    Args:
        items: what was asked.
        scores: of each item, its clips against its texts, (n, m).
        seed: of the intervals.

    Returns:
        {aspect: {"pair" | "text" | "video" | "group": score}}; of items with one clip "pair" and "text" are the same,
        and only "pair" is given.
    """
    if len(items) != len(scores):
        raise ValueError(f"Got {len(items)} items and scores of {len(scores)}.")
    for item, values in zip(items, scores, strict=True):
        if np.shape(values) != (len(item.clips), len(item.texts)):
            raise ValueError(
                f"The scores of {item.clips} have shape {np.shape(values)}, expected "
                f"{(len(item.clips), len(item.texts))}."
            )
    aspects = {"all": range(len(items))}
    named = sorted({item.aspect for item in items if item.aspect})
    if len(named) > 1:
        aspects |= {name: [n for n, item in enumerate(items) if item.aspect == name] for name in named}
    values = [temporal_values(matrix) for matrix in scores]
    shapes = {(len(item.clips), len(item.texts)) for item in items}
    chances = {shape: temporal_chance(*shape) for shape in shapes}
    found: dict[str, dict[str, TemporalScore]] = {}
    for aspect, numbers in aspects.items():
        found[aspect] = {}
        names = ["pair"] if all(len(items[n].clips) == 1 for n in numbers) else ["pair", "text", "video", "group"]
        for name in names:
            # with mixed shapes, items of one clip have a say in "pair" only
            kept = [n for n in numbers if name == "pair" or len(items[n].clips) > 1]
            sources = [n if items[n].source is None else ("source", items[n].source) for n in kept]
            interval = mean_interval([values[n][name] for n in kept], sources, seed=seed).scaled(100)
            chance = np.mean([chances[len(items[n].clips), len(items[n].texts)][name] for n in kept])
            found[aspect][name] = TemporalScore(interval, 100 * float(chance), len(kept))
    return found


def _share(scores: np.ndarray, right: int) -> float:
    """1 where the right one is the best, 1 / (number of the best) in a tie, else 0."""
    best = scores == scores.max()
    return float(best[right] / best.sum())
