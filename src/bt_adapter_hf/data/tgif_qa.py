"""TGIF-QA's four tasks: questions about GIFs, for training (`load_instructions`) and for evaluation.

The released tables are tab-separated, with a header line:

    frameqa     gif_name, question, answer                    an open answer of one word
    count       gif_name, question, answer                    a number from 0 to 10
    action      gif_name, question, a1 ... a5, answer         what is done so many times; `answer` is 0 to 4
    transition  gif_name, question, a1 ... a5, answer         what comes before or after; `answer` is 0 to 4
"""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


TASKS = ("frameqa", "count", "action", "transition")
OPTIONS = ("a1", "a2", "a3", "a4", "a5")
LETTERS = "ABCDE"
TABLE_SUFFIXES = (".csv", ".tsv")
MOST_COUNTED = 10  # the highest answer in TGIF-QA

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class GifQuestion:
    """A question about one GIF.

    Attributes:
        gif: its name, without an ending as released.
        question: as it stands in the table.
        answer: in words; of a choice the words of the right option.
        task: one of `TASKS`.
        options: of a choice, else none.
    """

    gif: str
    question: str
    answer: str
    task: str
    options: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """The question as a model is asked it: with what there is to choose from."""
        if not self.options:
            return self.question
        listed = " ".join(f"({letter}) {text}" for letter, text in zip(LETTERS, self.options, strict=False))
        return f"{self.question} {listed}"

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The question and its answer as a conversation, for training."""
        seen = [{"type": "video", "path": self.gif}, {"type": "text", "text": self.prompt}]
        return [{"role": "user", "content": seen}, {"role": "assistant", "content": self.answer}]


def task_of(columns: list[str], name: str, questions: list[str]) -> str:
    """The task of a table: its file's name says it ("Test_count_question.csv"), or what is in it.

    Raises:
        ValueError: if neither does.
    """
    named = [task for task in TASKS if task in Path(name).name.lower()]
    choice = set(OPTIONS) <= set(columns)
    if len(named) == 1 and choice == (named[0] in ("action", "transition")):
        return named[0]
    if choice:
        return "transition" if any(re.search(r"\b(before|after)\b", text) for text in questions[:20]) else "action"
    return "count" if all(re.match(r"how many times\b", text.lower()) for text in questions[:20]) else "frameqa"


def read_tgif_qa(text: str, name: str) -> Iterator[GifQuestion | str]:
    """The questions of a table, and in place of a row that cannot be used the reason, in words.

    Args:
        text: content of the table.
        name: of its file.

    Raises:
        ValueError: if it is no table of TGIF-QA.
    """
    first = text.split("\n", 1)[0]
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in first else ",")
    columns = [column.strip() for column in rows.fieldnames or []]
    rows.fieldnames = columns
    missing = {"gif_name", "question", "answer"} - set(columns)
    if missing:
        raise ValueError(
            f"it has the columns {', '.join(columns) or 'none'}; a table of TGIF-QA has gif_name, question and "
            f"answer, and of a choice {OPTIONS[0]} to {OPTIONS[-1]}"
        )
    found = [{key: value.strip() for key, value in row.items() if isinstance(value, str) and key} for row in rows]
    task = task_of(columns, name, [row.get("question", "") for row in found])
    for row in found:
        yield _question(row, task)


def _question(row: dict[str, str], task: str) -> GifQuestion | str:
    empty = [key for key in ("gif_name", "question", "answer") if not row.get(key)]
    if empty:
        return f"it has no {' and no '.join(empty)}."
    gif, question, answer = row["gif_name"], row["question"], row["answer"]
    if task == "frameqa":
        return GifQuestion(gif, question, answer, task)
    if task == "count":
        count = as_count(answer)
        if count is None:
            return f"its answer is {answer!r}; expected a number."
        return GifQuestion(gif, question, str(count), task)
    options = tuple(row.get(name, "") for name in OPTIONS)
    if not all(options):
        return f"it lacks {', '.join(name for name, text in zip(OPTIONS, options, strict=True) if not text)}."
    if not re.fullmatch(r"[0-4]", answer):
        return f"its answer is {answer!r}; expected the number of an option, 0 to 4."
    return GifQuestion(gif, question, options[int(answer)], task, options)


def load_tgif_qa(source: str | Path) -> list[GifQuestion]:
    """All questions of a table on the disk.

    Raises:
        ValueError: if it is no table of TGIF-QA, or a row of it cannot be used.
        OSError: it cannot be read.
    """
    found = []
    text = Path(source).read_text(encoding="utf-8-sig")
    for number, question in enumerate(read_tgif_qa(text, str(source))):
        if isinstance(question, str):
            raise ValueError(f"row {number} of {source}: {question}")
        found.append(question)
    if not found:
        raise ValueError(f"The table {source} has no rows.")
    return found


def as_count(text: str) -> int | None:
    """The number that an answer says, rounded and cut to 0 to 10 as TGIF-QA counts; None if it says none."""
    said = re.search(r"-?\d+(?:\.\d+)?", text)
    if said:
        return min(max(round(float(said[0])), 0), MOST_COUNTED)
    words = re.findall(r"[a-z]+", text.lower())
    return next((_NUMBERS.index(word) for word in words if word in _NUMBERS), None)


def chosen_option(answer: str, options: tuple[str, ...]) -> int | None:
    """Which option a model's answer names, by its words or by its letter; None if none, or several."""
    words = _words(answer)
    exact = [index for index, option in enumerate(options) if _words(option) == words]
    if exact:
        return exact[0]
    letter = re.match(rf"\(?([{LETTERS[: len(options)]}])(?:[).:\s]|$)", answer.strip())
    if letter:
        return LETTERS.index(letter[1])
    named = [index for index, option in enumerate(options) if f" {_words(option)} " in f" {words} "]
    return named[0] if len(named) == 1 else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def is_tgif_qa(head: str) -> bool:
    """Whether a table that begins so is one of TGIF-QA."""
    columns = re.split(r"[\t,]", head.split("\n", 1)[0].strip().lstrip("\ufeff"))
    return {"gif_name", "question", "answer"} <= {column.strip().strip('"') for column in columns}
