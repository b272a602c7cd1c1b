"""The metrics of TGIF-QA: accuracy for FrameQA, Action and Transition, the mean squared error for Count."""

from collections import defaultdict
from collections.abc import Sequence

from ..data.tgif_qa import GifQuestion, as_count, chosen_option
from .answers import exact_match


def score_tgif_qa(questions: Sequence[GifQuestion], answers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Task -> its figures for answers as a model gave them.

    - FrameQA: `accuracy`, of answers that are the reference but for case, articles and punctuation.
    - Action, Transition: `accuracy`; an answer names an option by its words or its letter.
    - Count: `mse`, after the answer is rounded to a whole number from 0 to 10, and beside it `mse_of_mean`, that of
      always answering the rounded mean of the references. An answer without a number counts as 0, as far as it is
      from the truth, and `unread` says how many there were.

    `count` is how many questions there were.

    Raises:
        ValueError: if there are not as many answers as questions.
    """
    if len(questions) != len(answers):
        raise ValueError(f"There are {len(questions)} questions and {len(answers)} answers.")
    by_task: dict[str, list[tuple[GifQuestion, str]]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        by_task[question.task].append((question, answer))
    found = {}
    for task, asked in by_task.items():
        if task == "count":
            found[task] = _count(asked)
            continue
        if task == "frameqa":
            right = [exact_match(answer, [question.answer]) for question, answer in asked]
        else:
            right = [
                chosen_option(answer, question.options) == question.options.index(question.answer)
                for question, answer in asked
            ]
        found[task] = {"accuracy": sum(right) / len(right), "count": len(right)}
    return found


def _count(asked: list[tuple[GifQuestion, str]]) -> dict[str, float]:
    wanted = [int(question.answer) for question, _ in asked]
    said = [as_count(answer) for _, answer in asked]
    mean = round(sum(wanted) / len(wanted))
    pairs = [(number or 0, reference) for number, reference in zip(said, wanted, strict=True)]
    return {
        "mse": sum((a - b) ** 2 for a, b in pairs) / len(pairs),
        "mse_of_mean": sum((mean - b) ** 2 for b in wanted) / len(wanted),
        "unread": sum(number is None for number in said),
        "count": len(pairs),
    }
