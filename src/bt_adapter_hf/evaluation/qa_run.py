"""Question answering over videos: exact and relaxed match, and a judge's verdict, with intervals and controls."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..data.broken import BrokenItem, broken_item, described
from .answering import Answerer, Answers, answer_clips
from .answers import exact_match, relaxed_match
from .chat_bench import prompts_hash, right_or_wrong_messages
from .clips import draws_of, repeated
from .features import ALL_CONTROLS, FULL, is_main_process
from .judge import Judge, Verdict, read_yes_no
from .judging import judged
from .qa_sets import Question, QuestionSet
from .results import EvaluationResult
from .statistics import Interval, compare, mean_interval


CACHE_NAME = "judge_replies.jsonl"
Values = dict[str, dict[str, list[float | None]]]  # score -> condition -> value of each question, None without one


def evaluate_qa(
    answerer: Answerer,
    board: QuestionSet,
    folder: Path,
    *,
    judge: Judge | None = None,
    controls: Sequence[str] = ALL_CONTROLS,
    draws: int = 3,
    seed: int = 0,
    workers: int = 1,
    item_timeout: float | None = 60.0,
    progress: Callable[[int], None] = lambda rows: None,
) -> EvaluationResult:
    """Share of questions whose answer has the reference's words (`exact`), or has them somewhere (`relaxed`).

    Args:
        board: clips and questions; see `open_question_set` and `table_questions`.
        folder: of this run; an interrupted run goes on in it.
        judge: gives `judged`, the share that it calls right, and `judge_score` from 0 to 5 (`judge_score_whole` as
            the released scripts cut it). Answers without a verdict are reported, and in none of these. A judge may
            be named, or changed, later: answers are kept, and asked about then.
        controls, draws, seed, workers, item_timeout, progress: see `encode_clips`.

    Raises:
        ValueError: no question has an answer.
        OtherRunError: `folder` is of another run.
        JudgeRefusedError: the judge answers nothing; see `judge_all`.
    """
    protocol = {"task": "qa", **answerer.describe(), **board.describe()}
    answers = answer_clips(
        answerer,
        board.clips.shards(item_timeout),
        board.by_row(),
        folder,
        protocol,
        controls=controls,
        draws=draws,
        seed=seed,
        workers=workers,
        item_timeout=item_timeout,
        progress=progress,
    )
    kept, failed = answered(board, answers)
    places = placed(board.questions)
    conditions = [condition for condition in dict.fromkeys(condition for _, condition in answers.texts)]

    def said(number: int, condition: str) -> str:
        return answers.texts[kept[number].row, condition][places[kept[number]]]

    values: Values = {
        name: {
            condition: [float(match(said(n, condition), kept[n].references)) for n in range(len(kept))]
            for condition in conditions
        }
        for name, match in (("exact", exact_match), ("relaxed", relaxed_match))
    }
    verdicts: dict[tuple[str, int], Verdict] = {}
    if judge is not None and is_main_process():
        prompts = {
            (condition, n): right_or_wrong_messages(kept[n].texts[0], kept[n].references[0], said(n, condition))
            for condition in conditions
            for n in range(len(kept))
        }
        verdicts = judged(judge, prompts, read_yes_no, folder / CACHE_NAME)
        for name, value in (
            ("judged", lambda fields: float(fields["right"])),
            ("judge_score", lambda fields: fields["score"]),
            ("judge_score_whole", lambda fields: float(int(fields["score"]))),
        ):
            values[name] = {
                condition: [
                    None if (fields := verdicts[condition, n].fields) is None else value(fields)
                    for n in range(len(kept))
                ]
                for condition in conditions
            }
        protocol |= {"judge": judge.name, "judge_prompts": prompts_hash()}
    result = question_result(
        "qa",
        values,
        [str(answers.names[question.row]) for question in kept],
        [question.kind for question in kept],
        controls,
        failed,
        {**protocol, "shuffle_draws": draws, "seed": seed},
        seed,
        percent=("exact", "relaxed", "judged"),
    )
    result.unjudged, result.to_judge = unjudged(board, kept, verdicts), len(verdicts)
    result.items |= repeated(kept)
    return result


def placed(questions: Sequence[Question]) -> dict[Question, int]:
    """Where the answer to each question stands among those of its row; of two wordings, the first."""
    seen: dict[int, int] = {}
    places = {}
    for question in questions:
        if question.problem is not None:
            continue
        places[question] = seen.get(question.row, 0)
        seen[question.row] = places[question] + len(question.texts)
    return places


def answered(board: QuestionSet, answers: Answers) -> tuple[list[Question], list[BrokenItem]]:
    """The questions that have answers, and why the others have none.

    Raises:
        ValueError: none has.
    """
    kept, failed = [], []
    for number, question in enumerate(board.questions):
        if question.problem is not None:
            name = answers.names.get(question.row) or f"row {number}"
            failed.append(broken_item(board.clips.source, number, name, question.problem))
        elif question.row in answers.failed:
            name, reason = answers.failed[question.row]
            failed.append(broken_item(board.clips.source, number, name, reason))
        else:
            kept.append(question)
    if not kept:
        raise ValueError(
            f"No question of {board.clips.source} can be asked about a video that can be read. The first of "
            f"{len(failed)}: {described(failed[0])}"
        )
    return kept, failed


def unjudged(
    board: QuestionSet, kept: Sequence[Question], verdicts: Mapping[tuple[str | int, ...], Verdict]
) -> list[BrokenItem]:
    """The answers without a verdict; keys of verdicts end in the number of the question, before it what was asked."""
    numbers = {question: number for number, question in enumerate(board.questions)}
    found = []
    for (*asked, n), verdict in verdicts.items():
        if verdict.error is not None:
            source = ", ".join([f"judge of {board.clips.source}", *asked])
            found.append(broken_item(source, numbers[kept[n]], kept[n].texts[0], verdict.error))
    return found


def question_result(
    task: str,
    values: Values,
    videos: Sequence[str],
    kinds: Sequence[str],
    controls: Sequence[str],
    failed: list[BrokenItem],
    protocol: dict,
    seed: int,
    percent: Sequence[str] = (),
) -> EvaluationResult:
    """Means with intervals over videos, of every score under every control, and by kind of question."""

    def mean(name: str, condition: str, only: Sequence[int]) -> Interval | None:
        found, owners = [], []
        for draw in draws_of(values[name], condition):
            for n in only:
                if draw[n] is not None:
                    found.append(draw[n])
                    owners.append(videos[n])
        if not found:
            return None
        return mean_interval(found, owners, seed=seed).scaled(100 if name in percent else 1)

    def means(condition: str, only: Sequence[int]) -> dict[str, Interval]:
        found = {name: mean(name, condition, only) for name in values}
        return {name: interval for name, interval in found.items() if interval is not None}

    everything = range(len(videos))
    against = {}
    if "frame_average" in controls:
        for name, by_condition in values.items():
            both = [n for n in everything if None not in (by_condition[FULL][n], by_condition["frame_average"][n])]
            if both:
                sides = [np.array([by_condition[side][n] for n in both]) for side in (FULL, "frame_average")]
                test = compare(*sides, [videos[n] for n in both], seed=seed)
                against[name] = test.scaled(100 if name in percent else 1)
    named = sorted({kind for kind in kinds if kind})
    return EvaluationResult(
        task=task,
        scores=means(FULL, everything),
        controls={control: means(control, everything) for control in controls},
        against_frame_average=against,
        chance={},
        items={"questions": len(videos), "videos": len(set(videos))},
        protocol=protocol,
        failed=failed,
        aspects={kind: means(FULL, [n for n in everything if kinds[n] == kind]) for kind in named if len(named) > 1},
    )
