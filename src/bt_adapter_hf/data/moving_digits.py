"""Moving digits: a small world of stills, clips and captions that anyone can rebuild bit by bit.

Handwritten digits (scikit-learn's `load_digits`, extra `quickstart`), coloured, on a dark background. A *still* shows
one digit with a place and a size ("a small red seven at the left"); a *clip* shows one of six motions ("a red seven
moves from the left to the right", "a red seven grows from small to big"). Motions come in opposite pairs, and
the one is the other played backwards: no single frame, no unordered set of frames and no average of frames tells the
two apart.

Everything is a function of (split, seed, index). The splits share no handwritten digit.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..import_utils import require_package


CANVAS = 64  # pixels; the smallest square where 4:2:0 chroma of an mp4 still keeps a thin stroke's colour
FPS = 10
MIN_FRAMES, MAX_FRAMES = 16, 24
TEST_FRACTION = 0.2

SPLITS = ("train", "test")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (235, 45, 40),
    "green": (50, 205, 70),
    "blue": (65, 100, 255),
    "yellow": (245, 225, 50),
    "purple": (200, 70, 235),
    "white": (240, 240, 240),
}
SIZES = {"small": (20.0, 24.0), "big": (34.0, 40.0)}  # side of the digit's box in pixels
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0)}
STILL_PLACES = {
    "left": "at the left",
    "right": "at the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
MOTIONS = {
    "left to right": "moves from the left to the right",
    "right to left": "moves from the right to the left",
    "top to bottom": "moves from the top to the bottom",
    "bottom to top": "moves from the bottom to the top",
    "small to big": "grows from small to big",
    "big to small": "shrinks from big to small",
}


def opposite(motion: str) -> str:
    """The motion that a clip of `motion` shows when played backwards."""
    start, end = motion.split(" to ")
    return f"{end} to {start}"


def still_caption(digit: str, colour: str, size: str, place: str) -> str:
    return f"a {size} {colour} {digit} {STILL_PLACES[place]}"


def still_phrasings(digit: str, colour: str, size: str, place: str) -> list[str]:
    """Ways to say what a still shows, the caption first.

    A text tower that has read only one form of sentence confuses the digits in any other one, such as the captions of
    clips; these differ in length and order and say "from" and "to", but never a word of motion.
    """
    opposite_place = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}.get(place)
    opposite_size = {"small": "big", "big": "small"}[size]
    near = f"closer to the {place} than to the {opposite_place}" if opposite_place else STILL_PLACES[place]
    far = f"far from the {opposite_place}" if opposite_place else STILL_PLACES[place]
    return [
        still_caption(digit, colour, size, place),
        f"{STILL_PLACES[place]} a {size} {colour} {digit}",
        f"a {size} {colour} {digit} {near}",
        f"a {colour} {digit} {near} and closer to {size} than to {opposite_size}",
        f"a {colour} {digit} {far} and far from {opposite_size}",
    ]


def clip_caption(digit: str, colour: str, motion: str) -> str:
    return f"a {colour} {digit} {MOTIONS[motion]}"


def all_still_captions() -> list[str]:
    """The 600 distinct captions of stills: digit x colour x size x place."""
    return [still_caption(*facts) for facts in product(DIGITS, COLOURS, SIZES, PLACES)]


def all_captions() -> list[str]:
    """The 360 distinct captions of clips: digit x colour x motion, motion fastest."""
    return [clip_caption(*facts) for facts in product(DIGITS, COLOURS, MOTIONS)]


def still(split: str, seed: int, index: int) -> tuple[np.ndarray, str, dict[str, str]]:
    """One still: an image uint8 (64, 64, 3), its caption and the facts behind it.

    `index` modulo 600 chooses the caption (so that consecutive indices visit all of them in a fixed order), the rest
    is drawn from (split, seed, index).
    """
    rng = _generator(split, seed, index, kind=0)
    digit, colour, size, place = _nth(index, DIGITS, COLOURS, SIZES, PLACES)
    glyph = _draw_glyph(split, digit, rng)
    side = rng.uniform(*SIZES[size])
    frame = _Scene(glyph, colour, rng).frame(side, *_spot(place, side, rng))
    facts = {"digit": digit, "colour": colour, "size": size, "place": place}
    return frame, still_caption(digit, colour, size, place), facts


def clip(split: str, seed: int, index: int) -> tuple[np.ndarray, str, dict[str, str]]:
    """One clip: frames uint8 (T, 64, 64, 3) with 16 <= T <= 24 at 10 frames a second, its caption and its facts.

    `index` modulo 360 chooses the caption in the order of `all_captions`, the rest is drawn from (split, seed, index).
    """
    digit, colour, motion = _nth(index, DIGITS, COLOURS, MOTIONS)
    frames = _film(split, digit, colour, motion, _generator(split, seed, index, kind=1))
    return frames, clip_caption(digit, colour, motion), {"digit": digit, "colour": colour, "motion": motion}


def write_clips(
    folder: str | Path,
    split: str,
    count: int,
    seed: int,
    formats: Sequence[str] = ("mp4", "gif"),
    progress: Callable[[Any], Any] = iter,
) -> Path:
    """Write clips 0..count-1 of (split, seed) and `metadata.jsonl` into `folder`; returns the table's path.

    The formats take turns in such a way that the six motions of one digit and colour share a format, and the next
    clips of the same captions have the next one: a format gives no motion away. The rows of the table hold
    file_name, text, digit, colour and motion: the folder loads with `datasets` as a `videofolder`, and the table
    trains `bt-adapter pretrain`. `progress` wraps the range of indices (tqdm, for one).
    """
    unknown = sorted(set(formats) - set(WRITERS))
    if unknown or not formats:
        raise ValueError(f"formats: got {list(formats)}, expected a non-empty choice of {sorted(WRITERS)}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in progress(range(count)):
        frames, text, facts = clip(split, seed, index)
        suffix = formats[(index // len(MOTIONS) + index // len(all_captions())) % len(formats)]
        name = f"{split}-{seed}-{index:05d}.{suffix}"
        WRITERS[suffix](folder / name, frames)
        rows.append({"file_name": name, "text": text, **facts})
    table = folder / "metadata.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return table


def write_mp4(path: str | Path, frames: np.ndarray, fps: int = FPS) -> None:
    """Write frames uint8 (T, H, W, 3) as H.264 at high quality; MPEG-4 Part 2 where PyAV was built without x264."""
    import av

    codec, options = "mpeg4", {"qscale": "2"}
    if "libx264" in av.codecs_available:
        codec, options = "libx264", {"crf": "12", "preset": "veryfast"}
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_gif(path: str | Path, frames: np.ndarray, fps: int = FPS) -> None:
    """Write frames uint8 (T, H, W, 3) as an endlessly looping GIF with one palette of 256 colours for the clip."""
    height, width = frames.shape[1:3]
    strip = Image.fromarray(frames.reshape(-1, width, 3)).quantize(256, method=Image.Quantize.FASTOCTREE)
    first, *rest = [strip.crop((0, top, width, top + height)) for top in range(0, strip.height, height)]
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


WRITERS = {"mp4": write_mp4, "gif": write_gif}


@lru_cache(maxsize=1)
def _handwriting() -> dict[str, dict[str, np.ndarray]]:
    """split -> digit word -> instances float32 (n, 8, 8) in [0, 1]; the split is drawn once and for all."""
    require_package("sklearn", "quickstart")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    rng = np.random.default_rng(2024)
    split: dict[str, dict[str, np.ndarray]] = {name: {} for name in SPLITS}
    for label, word in enumerate(DIGITS):
        instances = images[rng.permutation(np.flatnonzero(labels == label))]
        num_test = round(len(instances) * TEST_FRACTION)
        split["test"][word], split["train"][word] = instances[:num_test], instances[num_test:]
    return split


def _generator(split: str, seed: int, index: int, kind: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {SPLITS}.")
    return np.random.default_rng([SPLITS.index(split), kind, seed, index])


def _nth(index: int, *axes: Sequence[str]) -> tuple[str, ...]:
    """Item `index` (modulo the number of items) of the product of the axes, the last axis fastest."""
    words = [tuple(axis) for axis in axes]
    shape = [len(axis) for axis in words]
    places = np.unravel_index(index % math.prod(shape), shape)
    return tuple(axis[place] for axis, place in zip(words, places, strict=True))


def _film(split: str, digit: str, colour: str, motion: str, rng: np.random.Generator) -> np.ndarray:
    """Frames uint8 (T, 64, 64, 3). The second motion of a pair is the first one played backwards, draw for draw."""
    motions = list(MOTIONS)
    if motions.index(motion) > motions.index(opposite(motion)):
        return _film(split, digit, colour, opposite(motion), rng)[::-1].copy()
    scene = _Scene(_draw_glyph(split, digit, rng), colour, rng)
    start, end = motion.split(" to ")
    if start in SIZES:
        sides = [rng.uniform(*SIZES[word]) for word in (start, end)]
        centre = _spot("middle", max(sides), rng)
        ends = np.array([(side, *centre) for side in sides])
    else:
        side = rng.uniform(SIZES["small"][0], 30.0)
        ends = np.array([(side, *_spot(word, side, rng)) for word in (start, end)])
    t = np.linspace(0.0, 1.0, int(rng.integers(MIN_FRAMES, MAX_FRAMES + 1)))
    pace = rng.uniform(0.8, 1.3)  # below 1 slower in the middle of the way, above 1 slower at its ends
    way = (t**pace / (t**pace + (1 - t) ** pace))[:, None]
    return np.stack([scene.frame(*state) for state in (1 - way) * ends[0] + way * ends[1]])


def _draw_glyph(split: str, digit: str, rng: np.random.Generator) -> Image.Image:
    """A handwritten instance with a border of zeros, so that interpolation fades out at its edge."""
    instances = _handwriting()[split][digit]
    ink = np.pad(instances[rng.integers(len(instances))], 1)
    return Image.fromarray(np.round(ink * 255).astype(np.uint8))


def _spot(place: str, side: float, rng: np.random.Generator) -> tuple[float, float]:
    """Centre (x, y) in pixels of a digit of this side at a place: near its edge, anywhere near the middle across."""
    reach = (CANVAS - side) / 2 - 1  # from the middle to where the digit's box touches the edge
    x, y = PLACES[place]
    along, across = rng.uniform(0.8, 1.0), rng.uniform(-0.2, 0.2, size=2)
    return tuple(
        CANVAS / 2 + reach * (step * along if step else drift) for step, drift in zip((x, y), across, strict=True)
    )


class _Scene:
    """A coloured glyph before a dark background, both fixed for the length of a clip."""

    def __init__(self, glyph: Image.Image, colour: str, rng: np.random.Generator):
        self.glyph = glyph
        ink = np.array(COLOURS[colour]) * rng.uniform(0.85, 1.0) + rng.uniform(-12, 12, size=3)
        self.ink = np.clip(ink, 0, 255)
        corners = rng.uniform(0, 45, size=(2, 2, 1)) + rng.uniform(-6, 6, size=(2, 2, 3))
        ramp = np.linspace(0.0, 1.0, CANVAS)
        weights = np.stack([1 - ramp, ramp])  # (2, CANVAS)
        self.background = np.clip(np.einsum("ah,bw,abc->hwc", weights, weights, corners), 0, 255)

    def frame(self, side: float, x: float, y: float) -> np.ndarray:
        """uint8 (64, 64, 3) with the digit's box of this side centred at (x, y)."""
        return np.round(self.draw(self.background, side, x, y)).astype(np.uint8)

    def draw(self, background: np.ndarray, side: float, x: float, y: float) -> np.ndarray:
        """float (64, 64, 3): the digit in front of another picture, not rounded."""
        scale = 8 / side  # canvas pixel -> glyph pixel
        matrix = (scale, 0, 5 - x * scale, 0, scale, 5 - y * scale)  # 5: the middle of the 10 x 10 glyph
        mask = self.glyph.transform((CANVAS, CANVAS), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        alpha = np.asarray(mask, dtype=np.float64)[..., None] / 255
        return alpha * self.ink + (1 - alpha) * background
