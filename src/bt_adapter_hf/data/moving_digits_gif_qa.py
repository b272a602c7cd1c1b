"""GIFs of moving digits with questions in TGIF-QA's four forms, made in code.

A *repetition* shows a digit that does one thing so many times ("bounces" three times); a *transition* shows one that
grows or shrinks and then does something else. Of each GIF is asked which digit it is (FrameQA); of a repetition also
what the digit does so many times (Action) and how many times it does that (Count), of a transition what it does after
growing or shrinking (Transition). The tables are those that `load_tgif_qa` and `bt-adapter finetune` read.

All is a function of (split, seed, index), and the splits share no handwriting.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .moving_digits import CANVAS, COLOURS, DIGITS, _draw_glyph, _generator, _nth, _Scene, write_gif
from .tgif_qa import OPTIONS, GifQuestion


# What a digit does again and again: verb -> whole movement over one time, t from 0 to 1
REPEATED = ("bounces", "swings", "pulses", "blinks", "circles")
FIRST = {"grows": "growing", "shrinks": "shrinking"}
THEN = ("goes left", "goes right", "goes up", "goes down", "vanishes")
MOST_TIMES = 5
FRAMES = (24, 33)  # of a GIF
COLUMNS = {
    "frameqa": ("gif_name", "question", "answer"),
    "count": ("gif_name", "question", "answer"),
    "action": ("gif_name", "question", *OPTIONS, "answer"),
    "transition": ("gif_name", "question", *OPTIONS, "answer"),
}


def gif(split: str, seed: int, index: int, times: Sequence[int] = range(1, MOST_TIMES + 1)) -> tuple[np.ndarray, dict]:
    """One GIF: frames uint8 (T, 64, 64, 3) and its facts. Even indices are repetitions, odd ones transitions.

    Args:
        times: the counts that there are; of more than `MOST_TIMES` a GIF has as many more frames.
    """
    scene, states = _plan(split, seed, index, times)
    return np.stack([scene.frame(*state) for state in states]), facts_of(index, times)


def states_of(split: str, seed: int, index: int, times: Sequence[int] = range(1, MOST_TIMES + 1)) -> np.ndarray:
    """Side and centre of the digit in each frame of a GIF, (T, 3) in pixels; nothing is drawn."""
    return _plan(split, seed, index, times)[1]


def _plan(split: str, seed: int, index: int, times: Sequence[int]) -> tuple[_Scene, np.ndarray]:
    rng, facts = _generator(split, seed, index, kind=3), facts_of(index, times)
    scene = _Scene(_draw_glyph(split, facts["digit"], rng), str(rng.choice(list(COLOURS))), rng)
    T = int(rng.integers(*FRAMES)) * max(1, max(times) // MOST_TIMES)
    if index % 2:
        return scene, _transition(facts["first"], facts["then"], T, rng)
    return scene, _repetition(facts["action"], facts["count"], T, rng)


def facts_of(index: int, times: Sequence[int] = range(1, MOST_TIMES + 1)) -> dict[str, Any]:
    """What GIF `index` shows: digit, action and count of a repetition; digit, first and then of a transition."""
    if index % 2:
        return dict(zip(("digit", "first", "then"), _nth(index // 2, DIGITS, FIRST, THEN), strict=True))
    digit, action, count = _nth(index // 2, DIGITS, REPEATED, [str(number) for number in times])
    return {"digit": digit, "action": action, "count": int(count)}


def _repetition(action: str, count: int, T: int, rng: np.random.Generator) -> np.ndarray:
    """Side and centre of the digit in each frame, (T, 3)."""
    side, drift = rng.uniform(20, 24), rng.uniform(-6, 6, size=2)
    reach = (CANVAS - side) / 2 - 8
    turn = 2 * np.pi * count * np.arange(T) / T
    wave = (1 - np.cos(turn)) / 2  # 0 at the beginning of each time, 1 in its middle
    x, y, sides = np.full(T, CANVAS / 2 + drift[0]), np.full(T, CANVAS / 2 + drift[1]), np.full(T, side)
    if action == "bounces":
        y = CANVAS / 2 + reach * (1 - 2 * wave)
    elif action == "swings":
        x = CANVAS / 2 + reach * (1 - 2 * wave)
    elif action == "pulses":
        sides = side + 16 * wave
    elif action == "blinks":
        x = np.where(wave > 0.5, -CANVAS, x)
    else:
        x, y = CANVAS / 2 + reach * np.sin(turn), CANVAS / 2 - reach * np.cos(turn)
    return np.stack([sides, x, y], axis=1)


def _transition(first: str, then: str, T: int, rng: np.random.Generator) -> np.ndarray:
    half = int(T * rng.uniform(0.4, 0.6))
    small, big = rng.uniform(18, 22), rng.uniform(34, 40)
    sides = np.linspace(small, big, half) if first == "grows" else np.linspace(big, small, half)
    sides = np.concatenate([sides, np.full(T - half, sides[-1])])
    x, y = np.full(T, CANVAS / 2), np.full(T, CANVAS / 2)
    way = np.linspace(0, 1, T - half)
    distance = 18 * way
    if then == "goes left":
        x[half:] -= distance
    elif then == "goes right":
        x[half:] += distance
    elif then == "goes up":
        y[half:] -= distance
    elif then == "goes down":
        y[half:] += distance
    else:
        x[half + 1 :] = -CANVAS
    return np.stack([sides, x, y], axis=1)


def questions(name: str, facts: Mapping[str, Any], rng: np.random.Generator) -> list[GifQuestion]:
    """What is asked about a GIF with these facts; the order of the options is drawn."""
    asked = [GifQuestion(name, "which digit is it ?", facts["digit"], "frameqa")]

    def choice(task: str, text: str, answer: str, options: Sequence[str]) -> GifQuestion:
        return GifQuestion(name, text, answer, task, tuple(str(option) for option in rng.permutation(options)))

    if "action" in facts:
        action, count = facts["action"], facts["count"]
        asked.append(choice("action", f"what does it do {count} times ?", action, REPEATED))
        verb = {"blinks": "blink", "bounces": "bounce"}.get(action, action.removesuffix("s"))
        asked.append(GifQuestion(name, f"how many times does it {verb} ?", str(count), "count"))
    else:
        text = f"what does it do after {FIRST[facts['first']]} ?"
        asked.append(choice("transition", text, facts["then"], THEN))
    return asked


def told(facts: Mapping[str, Any]) -> str:
    """The facts in a sentence, for a language model that learns to read."""
    if "action" in facts:
        return f"{facts['digit']} {facts['action']} {facts['count']} times"
    return f"{facts['digit']} {facts['first']} then {facts['then']}"


def write_gif_questions(
    folder: str | Path,
    split: str,
    count: int,
    seed: int,
    times: Sequence[int] = range(1, MOST_TIMES + 1),
    tasks: Sequence[str] = tuple(COLUMNS),
    progress: Callable[[Any], Any] = iter,
) -> dict[str, Path]:
    """Write GIFs 0 to count - 1 of (split, seed) and the tables of their questions into `folder`; without those that
    none of the tasks asks about.

    Returns:
        Task -> its table, `<split>_<task>_question.csv`, tab-separated as TGIF-QA's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[GifQuestion]] = {task: [] for task in tasks}
    for index in progress(range(count)):
        name = f"{split}-{seed}-{index:05d}"
        asked = questions(name, facts_of(index, times), _generator(split, seed, index, kind=4))
        asked = [question for question in asked if question.task in rows]
        if asked:
            write_gif(folder / f"{name}.gif", gif(split, seed, index, times)[0])
        for question in asked:
            rows[question.task].append(question)
    tables = {}
    for task, asked in rows.items():
        tables[task] = folder / f"{split}_{task}_question.csv"
        with tables[task].open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(COLUMNS[task])
            for row in asked:
                answer = row.options.index(row.answer) if row.options else row.answer
                writer.writerow([row.gif, row.question, *row.options, answer])
    return tables
