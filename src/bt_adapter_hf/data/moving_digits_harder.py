"""The harder world of the moving digits, for comparisons: the quickstart's task is solved by all who see order.

The digits, colours and backgrounds are those of `moving_digits`; what happens in a clip is more. Five kinds of clips,
in turns:

- *path*: one digit, three motions in a row: "a red seven moves from the left to the top to the right to the middle";
- *bounce*: back and forth between two opposite places, or big and small, two to four times; the caption counts by
  repeating: "a red seven moves from the left to the right to the left";
- *pair*: two digits at once with different motions: "a red seven moves from the left to the right and a blue two
  grows from small to big";
- *speed*: one motion over the whole clip ("moves slowly") or over a quarter of it ("moves quickly");
- *distracted*: one motion, beside a grey digit that stands still, or jumps from place to place, and is not named.

A clip has 32 to 48 frames, so whoever looks at 8 of them sees each part of a path two or three times. Some stories
are their own reverse (there and back again): their opposite is their own caption, and no order can be read from them.

Everything is a function of (split, seed, index); the splits share no handwritten digit.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..models.video_io import sample_frame_indices
from .moving_digits import COLOURS, DIGITS, PLACES, SIZES, WRITERS, _draw_glyph, _generator, _Scene, _spot


KINDS = ("path", "bounce", "pair", "speed", "distracted")
MIN_FRAMES, MAX_FRAMES = 32, 48
_GREY = (105, 105, 105)
_AXES = (("left", "right"), ("top", "bottom"), ("small", "big"))
_QUICK = 0.25  # share of the clip that a quick motion takes


@dataclass(frozen=True)
class Mover:
    """A digit and the places, or the sizes, that it goes through."""

    digit: str
    colour: str
    states: tuple[str, ...]
    speed: str = ""  # "quickly", "slowly", or not said

    def reversed(self) -> "Mover":
        return replace(self, states=self.states[::-1])

    def __str__(self) -> str:
        sized = self.states[0] in SIZES
        verb = "moves" if not sized else "grows" if self.states[0] == "small" else "shrinks"
        start, *rest = [state if sized else f"the {state}" for state in self.states]
        words = ["a", self.colour, self.digit, verb, self.speed, "from", start]
        return " ".join([*filter(None, words), *(f"to {state}" for state in rest)])


@dataclass(frozen=True)
class Story:
    """What happens in a clip: one digit or two that move, and whether an unnamed one is beside them."""

    kind: str
    movers: tuple[Mover, ...]
    distractor: str = ""  # "still", "jumping" or none

    @property
    def caption(self) -> str:
        return " and ".join(map(str, self.movers))

    def reversed(self) -> "Story":
        """What the clip shows when it is played backwards."""
        return replace(self, movers=tuple(mover.reversed() for mover in self.movers))

    @property
    def symmetric(self) -> bool:
        return self.reversed().movers == self.movers


def story(split: str, seed: int, index: int) -> Story:
    """The story of a clip: `index` modulo 5 is its kind, the rest is drawn."""
    return _story(index, _generator(split, seed, index, kind=2))


def clip(split: str, seed: int, index: int, num_frames: int | None = None) -> tuple[np.ndarray, str, dict[str, str]]:
    """One clip: frames uint8 (T, 64, 64, 3) with 32 <= T <= 48, its caption and its facts.

    With `num_frames`, only so many of them: the middles of as many equal parts, as the sampling "centers" takes them.

    The facts are `kind`, `opposite` (the caption of the clip played backwards; the caption itself where the two are
    alike), `digit` and `colour`, and of a pair `second_digit` and `second_colour`.
    """
    rng = _generator(split, seed, index, kind=2)
    told = _story(index, rng)
    first, *second = told.movers
    facts = {"kind": told.kind, "opposite": told.reversed().caption, "digit": first.digit, "colour": first.colour}
    if second:
        facts |= {"second_digit": second[0].digit, "second_colour": second[0].colour}
    return _film(split, told, rng, num_frames), told.caption, facts


def others(told: Story, count: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Wrong captions: the same digits with other motions of the kind, and other digits with the same motion.

    The former are at most `count`; of a single motion there are four, its opposite left out.

    The latter differ from the story in the digit or the colour of one mover: all 59 looks that the first could have,
    and of a pair those of the second too.
    """
    motions: dict[str, None] = {}
    for _ in range(20 * count):
        drawn = zip(_story(KINDS.index(told.kind), rng).movers, told.movers, strict=True)
        movers = [replace(new, digit=old.digit, colour=old.colour) for new, old in drawn]
        caption = replace(told, movers=tuple(movers)).caption
        if caption not in (told.caption, told.reversed().caption):
            motions[caption] = None
        if len(motions) == count:
            break
    looks = []
    for number, mover in enumerate(told.movers):
        for digit in DIGITS:
            for colour in COLOURS:
                if (digit, colour) != (mover.digit, mover.colour):
                    movers = list(told.movers)
                    movers[number] = replace(mover, digit=digit, colour=colour)
                    looks.append(replace(told, movers=tuple(movers)).caption)
    return list(motions), looks


def write_clips(
    folder: str | Path,
    split: str,
    count: int,
    seed: int,
    format: str = "mp4",
    progress: Callable[[Any], Any] = iter,
) -> Path:
    """Write clips 0..count-1 of (split, seed) and `metadata.jsonl` into `folder`; returns the table's path.

    The rows hold file_name, text, opposite and the other facts: the table serves as `bt-adapter pretrain --opposites`
    too.
    """
    if format not in WRITERS:
        raise ValueError(f"format: got {format!r}, expected one of {sorted(WRITERS)}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in progress(range(count)):
        frames, text, facts = clip(split, seed, index)
        name = f"{split}-{seed}-{index:05d}.{format}"
        WRITERS[format](folder / name, frames)
        rows.append({"file_name": name, "text": text, **facts})
    table = folder / "metadata.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return table


def _story(index: int, rng: np.random.Generator) -> Story:
    kind = KINDS[index % len(KINDS)]
    looks = rng.choice(len(DIGITS) * len(COLOURS), size=2, replace=False)
    looks = [(DIGITS[look // len(COLOURS)], list(COLOURS)[look % len(COLOURS)]) for look in looks]
    speed = distractor = ""
    if kind == "path":
        states = [str(rng.choice(list(PLACES)))]
        while len(states) < 4:
            states.append(str(rng.choice([place for place in PLACES if place != states[-1]])))
        paths = [tuple(states)]
    elif kind == "bounce":
        axis, turns = _axis(rng), int(rng.integers(2, 5))
        paths = [tuple(axis[step % 2] for step in range(turns + 1))]
    elif kind == "pair":
        # on other axes, so that the two motions differ in more than their direction
        first, second = rng.choice(len(_AXES), size=2, replace=False)
        paths = [_axis(rng, first), _axis(rng, second)]
    else:
        paths = [_axis(rng)]
        if kind == "speed":
            speed = str(rng.choice(["quickly", "slowly"]))
        else:
            distractor = str(rng.choice(["still", "jumping"]))
    movers = [Mover(*look, path, speed) for look, path in zip(looks, paths, strict=False)]
    return Story(kind, tuple(movers), distractor)


def _axis(rng: np.random.Generator, number: int | None = None) -> tuple[str, str]:
    axis = _AXES[rng.integers(len(_AXES)) if number is None else number]
    return axis if rng.integers(2) else axis[::-1]


def _film(split: str, told: Story, rng: np.random.Generator, num_frames: int | None = None) -> np.ndarray:
    """Frames uint8 (T or num_frames, 64, 64, 3)."""
    T = int(rng.integers(MIN_FRAMES, MAX_FRAMES + 1))
    scenes, ways = [], []
    if told.distractor:
        digit = DIGITS[rng.integers(len(DIGITS))]
        scenes.append(_Scene(_draw_glyph(split, digit, rng), told.movers[0].colour, rng))
        scenes[0].ink = np.array(_GREY) * rng.uniform(0.85, 1.15)
        jumps = np.sort(rng.integers(1, T, size=3)) if told.distractor == "jumping" else []
        spots = [(20.0, *_spot(str(rng.choice(list(PLACES))), 20.0, rng)) for _ in range(len(jumps) + 1)]
        ways.append(np.array(spots)[np.searchsorted(jumps, np.arange(T), side="right")])
    for mover in told.movers:
        scenes.append(_Scene(_draw_glyph(split, mover.digit, rng), mover.colour, rng))
        ways.append(_way(mover, T, rng))
    # All before the background of the first, the later ones in front.
    frames = []
    for t in range(T) if num_frames is None else sample_frame_indices(T, num_frames, "centers"):
        frame = scenes[0].background
        for scene, way in zip(scenes, ways, strict=True):
            frame = scene.draw(frame, *way[t])
        frames.append(np.round(frame).astype(np.uint8))
    return np.stack(frames)


def _way(mover: Mover, T: int, rng: np.random.Generator) -> np.ndarray:
    """Side and centre (T, 3) of the digit in every frame: straight from state to state, all parts equally long."""
    if mover.states[0] in SIZES:
        side_of = {word: rng.uniform(*SIZES[word]) for word in SIZES}
        centre = _spot("middle", max(side_of.values()), rng)
        stops = np.array([(side_of[word], *centre) for word in mover.states])
    else:
        side = rng.uniform(SIZES["small"][0], 30.0)
        spot_of = {word: _spot(word, side, rng) for word in PLACES}
        stops = np.array([(side, *spot_of[word]) for word in mover.states])
    t = np.linspace(0.0, 1.0, T)
    if mover.speed == "quickly":
        start = rng.uniform(0.1, 0.9 - _QUICK)
        t = np.clip((t - start) / _QUICK, 0.0, 1.0)
    legs = np.linspace(0.0, 1.0, len(stops))
    return np.stack([np.interp(t, legs, column) for column in stops.T], axis=1)
