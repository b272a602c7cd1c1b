"""Moving digits where only time tells: a clip beside its reverse, two motions in either order, a motion repeated.

No single frame and no average of frames tells the clips of one item apart: they hold the same frames, or in `count`
nearly the same.
"""

from collections.abc import Iterator

import numpy as np

from .moving_digits import MOTIONS, _film, _generator, clip, clip_caption, opposite
from .moving_digits_chat import film, film_caption


BOARDS = ("order", "sequence", "count")
TIMES = ("once", "twice", "three times")

Shown = tuple[str, np.ndarray, bool]  # name of the file, its frames, whether it is played backwards


def temporal_item(board: str, split: str, seed: int, index: int) -> tuple[list[Shown], list[str], str]:
    """Clips uint8 (T, 64, 64, 3), texts (clip i shows text i), and the kind of motion.

    - `order`: a clip, and the same file backwards; 360 items.
    - `sequence`: two motions, one after the other, in either order; 1440 items.
    - `count`: a motion once, twice and three times; 360 items.

    Raises:
        ValueError: another board.
    """
    name = f"{split}-{seed}-{index:05d}"
    if board == "order":
        frames, text, facts = clip(split, seed, index)
        reverse = clip_caption(facts["digit"], facts["colour"], opposite(facts["motion"]))
        kind = "size" if "big" in facts["motion"] else "place"
        return [(name, frames, False), (name, frames, True)], [text, reverse], kind
    if board == "sequence":
        _, text, facts = film(split, seed, index)
        first, last = facts["first"], facts["last"]
        digit, colour = facts["digit"], facts["colour"]
        halves = [
            _film(split, digit, colour, motion, _generator(split, seed, index, kind=2)) for motion in (first, last)
        ]
        shown = [
            (f"{name}-{order}", np.concatenate(parts), False)
            for order, parts in (("as-told", halves), ("swapped", halves[::-1]))
        ]
        return shown, [text, film_caption(digit, colour, last, first)], "sequence"
    if board == "count":
        frames, text, facts = clip(split, seed, index)
        shown = [(f"{name}-{n}", np.concatenate([frames] * n), False) for n in range(1, len(TIMES) + 1)]
        return shown, [f"{text} {times}" for times in TIMES], MOTIONS[facts["motion"]].split()[0]
    raise ValueError(f"There is no board {board!r} of moving digits; there are {', '.join(BOARDS)}.")


def temporal_items(board: str, count: int, seed: int) -> Iterator[tuple[list[Shown], list[str], str]]:
    """`count` items of the test split, spread evenly over digits, colours and motions."""
    captions = 1440 if board == "sequence" else 360
    order = np.random.default_rng([captions, seed]).permutation(captions)
    for place in range(count):
        block, nth = divmod(place, captions)
        yield temporal_item(board, "test", seed, block * captions + int(order[nth]))
