"""What the page shows before anybody has sent anything: clips of moving digits, and a film of several."""

from pathlib import Path

import numpy as np

from ..data.moving_digits import clip, write_clips, write_mp4


SEED = 79  # of no clip in training, in the recipe's evaluation, or in the quickstart
CLIPS = 60
_FILM = (0, 9, 16, 19, 29, 32)  # of the clips: each of another colour and motion


def write_examples(folder: Path) -> tuple[list[str], str]:
    """Writes clips into `folder/clips`, and `folder/film.mp4`; returns their paths."""
    table = write_clips(folder / "clips", "test", CLIPS, SEED, formats=("mp4",))
    paths = sorted(str(path) for path in table.parent.glob("*.mp4"))
    film = folder / "film.mp4"
    write_mp4(film, np.concatenate([clip("test", SEED, number)[0] for number in _FILM]))
    return paths, str(film)


def example_texts() -> list[str]:
    """Captions of some of the clips; those of the film come first."""
    return [clip("test", SEED, number)[1] for number in (*_FILM, 1)]
