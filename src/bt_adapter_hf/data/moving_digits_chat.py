"""Conversations about moving digits: stills, clips with one motion, and films of two, with questions and answers.

A *film* shows two motions of one digit, one after the other ("a red seven moves from the left to the right, then grows
from small to big"). "How does it move?" has six answers, and of a clip an average of frames still tells two opposite
ones apart from the rest: whoever is blind to order gets 50 %. Of a film it tells only which two pairs take part, and
"How does it move at first?" leaves it four answers of equal weight: 25 %.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from .moving_digits import (
    COLOURS,
    DIGITS,
    MOTIONS,
    STILL_PLACES,
    WRITERS,
    _film,
    _generator,
    _nth,
    clip,
    clip_caption,
    opposite,
    still_caption,
)


# Kind of question -> its forms.
QUESTIONS = {
    "digit": ("Which digit is it?", "What digit do you see?"),
    "colour": ("What colour is it?", "Which colour does it have?"),
    "place": ("Where is it?", "In which place is it?"),
    "size": ("How big is it?", "What size is it?"),
    "motion": ("How does it move?", "What does it do?"),
    "first": ("How does it move at first?", "What does it do first?"),
    "last": ("How does it move at last?", "What does it do last?"),
    "picture": ("Describe the picture.", "What do you see?"),
    "video": ("Describe the video.", "What happens?"),
}
MOTION_KINDS = ("motion", "first", "last")
# Share of right answers at best, and on average, for a model that sees the frames of a clip without their order.
ORDER_BLIND = {"motion": 1 / 2, "first": 1 / 4, "last": 1 / 4}
MOTION_PAIRS = tuple((a, b) for a, b in product(MOTIONS, MOTIONS) if b not in (a, opposite(a)))
NUM_CLIP_CAPTIONS = len(DIGITS) * len(COLOURS) * len(MOTIONS)
NUM_FILM_CAPTIONS = len(DIGITS) * len(COLOURS) * len(MOTION_PAIRS)


def film(split: str, seed: int, index: int) -> tuple[np.ndarray, str, dict[str, str]]:
    """One film: frames uint8 (T, 64, 64, 3) with 32 <= T <= 48, its caption and its facts.

    `index` modulo 1440 chooses digit, colour and the pair of motions (fastest), the rest is drawn from (split, seed,
    index). Both halves show the same handwriting, ink and background.
    """
    digit, colour, pair = _nth(index, DIGITS, COLOURS, range(len(MOTION_PAIRS)))
    first, last = MOTION_PAIRS[pair]
    # Twice the same generator: what is drawn first, the scene, is the same.
    halves = [_film(split, digit, colour, motion, _generator(split, seed, index, kind=2)) for motion in (first, last)]
    facts = {"digit": digit, "colour": colour, "first": first, "last": last}
    return np.concatenate(halves), film_caption(**facts), facts


def film_caption(digit: str, colour: str, first: str, last: str) -> str:
    return f"{clip_caption(digit, colour, first)}, then {MOTIONS[last]}"


def answers(facts: Mapping[str, str]) -> dict[str, str]:
    """Kind of question -> answer, for the facts of a still, a clip or a film."""
    told = {"digit": facts["digit"], "colour": facts["colour"]}
    told |= {kind: f"it {MOTIONS[facts[kind]]}" for kind in MOTION_KINDS if kind in facts}
    if "place" in facts:
        told |= {"place": STILL_PLACES[facts["place"]], "size": facts["size"], "picture": still_caption(**facts)}
    elif "motion" in facts:
        told["video"] = clip_caption(**facts)
    else:
        told["video"] = film_caption(**facts)
    return told


def conversation(
    seen: Mapping[str, Any] | str, facts: Mapping[str, str], rng: np.random.Generator, turns: int = 3
) -> list[dict[str, Any]]:
    """Messages of some turns about one still, clip or film, each of another kind of question.

    Args:
        seen: the part that shows it, such as `{"type": "video", "path": ...}`; or words that tell it.
        facts: what is true of it.
    """
    part = {"type": "text", "text": seen + "\n"} if isinstance(seen, str) else dict(seen)
    told, messages = answers(facts), []
    for kind in rng.permutation(list(told))[:turns]:
        question = [{"type": "text", "text": str(rng.choice(QUESTIONS[kind]))}]
        if not messages:
            question = [part, *question]
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": told[kind]}]},
        ]
    return messages


def clips_and_films(count: int) -> list[tuple[str, int]]:
    """("clip" or "film", index) of `count` videos, which take turns.

    Indices come in random order, so that any number of videos has all digits, and nothing follows from a place.
    """
    sequence = []
    for place in range(count):
        kind, captions = (("clip", NUM_CLIP_CAPTIONS), ("film", NUM_FILM_CAPTIONS))[place % 2]
        block, nth = divmod(place // 2, captions)
        order = np.random.default_rng([captions, block]).permutation(captions)
        sequence.append((kind, block * captions + int(order[nth])))
    return sequence


def write_chat_clips(
    folder: str | Path,
    split: str,
    count: int,
    seed: int,
    formats: Sequence[str] = ("mp4", "gif"),
    progress: Callable[[Any], Any] = iter,
) -> Path:
    """Write `count` videos, half clips and half films, and `metadata.jsonl` with their facts into `folder`.

    The formats take turns by pairs of videos. Returns the table's path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for place, (kind, index) in enumerate(progress(clips_and_films(count))):
        frames, text, facts = (clip if kind == "clip" else film)(split, seed, index)
        suffix = formats[place // 2 % len(formats)]
        name = f"{kind}-{split}-{seed}-{index:05d}.{suffix}"
        WRITERS[suffix](folder / name, frames)
        rows.append({"file_name": name, "text": text, **facts})
    table = folder / "metadata.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return table
