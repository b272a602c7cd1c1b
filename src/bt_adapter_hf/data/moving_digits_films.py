"""Moving digits, long: films of minutes with many moments, each with its caption, its start and its end.

A moment is a clip of the [moving digits][bt_adapter_hf.data.moving_digits]; between two of them nothing moves: the
background is empty, or a digit stands there. In half of the cases the same digit makes the opposite motion elsewhere
in the film, so that only the order of the frames tells the two apart. No caption comes twice in a film.

Everything is a function of (split, seed, index).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .moving_digits import CANVAS, FPS, MOTIONS, SPLITS, all_captions, clip, opposite, write_mp4


MINUTES = (2.0, 10.0)
MOMENTS = (20, 60)


class FilmMoment(NamedTuple):
    """What happens from `start` to `end` (seconds), and the caption and facts of it."""

    start: float
    end: float
    text: str
    digit: str
    colour: str
    motion: str


def film(
    split: str, seed: int, index: int, minutes: tuple[float, float] = MINUTES, moments: tuple[int, int] = MOMENTS
) -> tuple[np.ndarray, list[FilmMoment]]:
    """One film: frames uint8 (T, 64, 64, 3) at 10 a second, and its moments in order.

    Args:
        minutes, moments: how long films are and how many moments they have, from and to.

    Raises:
        ValueError: an unknown split, or more moments than fit into the time.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {SPLITS}.")
    rng = np.random.default_rng([SPLITS.index(split), 2, seed, index])
    count, total = int(rng.integers(moments[0], moments[1] + 1)), round(rng.uniform(*minutes) * 60 * FPS)
    clips = [clip(split, _seed(seed, index), number) for number in _captions(count, rng)]
    left = total - sum(len(frames) for frames, _, _ in clips)
    if left < 0:
        raise ValueError(f"{count} moments are longer than {total / FPS / 60:.1f} minutes: ask for fewer, or longer.")
    cuts = np.sort(rng.integers(0, left + 1, size=count))
    pauses = np.diff(np.concatenate([[0], cuts, [left]]))
    frames, found, at = [], [], 0
    for number, (moving, text, facts) in enumerate(clips):
        frames += [_pause(int(pauses[number]), clips, rng), moving]
        start = at + int(pauses[number])
        at = start + len(moving)
        found.append(FilmMoment(start / FPS, at / FPS, text, **facts))
    frames.append(_pause(int(pauses[-1]), clips, rng))
    return np.concatenate(frames), found


def write_films(
    folder: str | Path,
    split: str,
    count: int,
    seed: int,
    progress: Callable[[Any], Any] = iter,
    **options: tuple,
) -> Path:
    """Write films 0..count-1 as mp4 files and `moments.jsonl` into `folder`; returns the table's path.

    The rows of the table are moments: file_name, start, end, text, digit, colour, motion. `options` go to [`film`].
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in progress(range(count)):
        frames, moments = film(split, seed, index, **options)
        name = f"film-{split}-{seed}-{index:03d}.mp4"
        write_mp4(folder / name, frames)
        lines += [json.dumps({"file_name": name, **moment._asdict()}) + "\n" for moment in moments]
    table = folder / "moments.jsonl"
    table.write_text("".join(lines), encoding="utf-8")
    return table


def _seed(seed: int, index: int) -> int:
    return 1_000_000 + 1000 * seed + index  # of no clip elsewhere


def _captions(count: int, rng: np.random.Generator) -> list[int]:
    """Numbers of different captions, in an order by chance; about half of them with their opposites."""
    motions, chosen = list(MOTIONS), []
    for number in rng.permutation(len(all_captions())).tolist():
        motion = number % len(motions)
        other = number - motion + motions.index(opposite(motions[motion]))
        if number in chosen:
            continue
        chosen += [number, other] if rng.random() < 0.5 and other not in chosen else [number]
        if len(chosen) >= count:
            break
    return rng.permutation(chosen[:count]).tolist()


def _pause(length: int, clips: list, rng: np.random.Generator) -> np.ndarray:
    """Nothing moves: an empty background, or a still of one of the film's digits."""
    if length and rng.random() < 0.5:
        frames = clips[rng.integers(len(clips))][0]
        return np.repeat(frames[rng.integers(len(frames))][None], length, axis=0)
    return np.full((length, CANVAS, CANVAS, 3), rng.integers(10, 40), np.uint8)
