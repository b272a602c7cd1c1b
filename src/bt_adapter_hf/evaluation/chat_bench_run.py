"""The five scores of the VideoChatGPT benchmark, by a judge, with intervals and temporal controls."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .answering import Answerer, Answers, answer_clips, read_answers
from .chat_bench import ASPECTS, aspect_messages, prompts_hash, right_or_wrong_messages
from .clips import draws_of, repeated
from .features import ALL_CONTROLS, FULL, check_run, is_main_process
from .judge import Judge, Messages, Verdict, read_score
from .judging import Cost, cost_of, judged
from .qa_run import CACHE_NAME, Values, answered, placed, question_result, unjudged
from .qa_sets import Question, QuestionSet
from .results import EvaluationResult
from .statistics import Interval, mean_interval


def parts_of(aspects: Sequence[str]) -> tuple[str, ...]:
    """The files of questions that these scores need.

    Raises:
        ValueError: an unknown score.
    """
    unknown = sorted(set(aspects) - set(ASPECTS))
    if unknown or not aspects:
        raise ValueError(f"aspects={','.join(aspects)}: expected a choice of {', '.join(ASPECTS)}.")
    return tuple(dict.fromkeys(ASPECTS[aspect][0] for aspect in aspects))


def evaluate_chat_bench(
    answerer: Answerer,
    board: QuestionSet,
    folder: Path,
    judge: Judge,
    *,
    aspects: Sequence[str] = tuple(ASPECTS),
    controls: Sequence[str] = ALL_CONTROLS,
    draws: int = 3,
    seed: int = 0,
    workers: int = 1,
    item_timeout: float | None = 60.0,
    progress: Callable[[int], None] = lambda rows: None,
) -> EvaluationResult | None:
    """Scores from 0 to 5, by aspect, and their averages.

    `average` is the mean of the aspects, `average_of_answers` that of all scores, in which aspects of more questions
    weigh more; papers report either. `..._whole` are the scores cut to whole numbers, as the released scripts do.

    Args:
        board: see `open_chat_bench`.
        folder: of this run; answers and the judge's replies are kept in it, and an interrupted run goes on.
        judge: asked by the main process only.
        controls, draws, seed, workers, item_timeout, progress: see `encode_clips`.

    Returns:
        None in processes that are not the main one.

    Raises:
        ValueError: no question has an answer, or no answer a score.
        OtherRunError: `folder` is of another run.
        JudgeRefusedError: the judge answers nothing; see `judge_all`.
    """
    parts_of(aspects)
    protocol = {"task": "chat-bench", **answerer.describe(), **board.describe()}
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
    if not is_main_process():
        return None
    kept, failed = answered(board, answers)
    prompts = _prompts(board, kept, answers, aspects)
    verdicts = judged(judge, prompts, read_score, folder / CACHE_NAME)
    conditions = list(dict.fromkeys(condition for _, condition in answers.texts))
    values: Values = {}
    for aspect in aspects:
        values[aspect] = {
            condition: [_score(verdicts.get((aspect, condition, n))) for n in range(len(kept))]
            for condition in conditions
        }
        values[f"{aspect}_whole"] = {
            condition: [None if score is None else float(int(score)) for score in scores]
            for condition, scores in values[aspect].items()
        }
    without = unjudged(board, kept, verdicts)
    if all(score is None for aspect in aspects for score in values[aspect][FULL]):
        raise ValueError(f"The judge {judge.name} scored no answer. The first reason: {without[0]['reason']}")
    videos = [str(answers.names[question.row]) for question in kept]
    result = question_result(
        "chat-bench",
        values,
        videos,
        [""] * len(kept),
        controls,
        failed,
        {
            **protocol,
            "aspects": list(aspects),
            "judge": judge.name,
            "judge_prompts": prompts_hash(),
            "shuffle_draws": draws,
            "seed": seed,
        },
        seed,
    )
    result.unjudged, result.to_judge = without, len(verdicts)
    result.items |= repeated(kept)
    for condition in (FULL, *controls):
        scores = result.scores if condition == FULL else result.controls[condition]
        scores.update(_averages(values, aspects, condition, videos, seed))
    return result


def dry_run_cost(
    board: QuestionSet, folder: Path, judge: str | None, aspects: Sequence[str] | None, conditions: Sequence[str]
) -> Cost:
    """What judging would still cost, without a model: of the answers that `folder` has, and references in place of
    others. What could not be read is not counted.

    Args:
        judge: its name, see `Judge`, for the replies that are there; None for one that has been asked nothing yet.
        aspects: of the benchmark; None for right or wrong.
        conditions: how the clips are shown, "full" and the controls.

    Raises:
        OtherRunError: `folder` is of another run.
    """
    check_run(folder, {"task": "qa" if aspects is None else "chat-bench", **board.describe()}, whole=False)
    answers = read_answers(folder)
    asked = [
        question for question in board.questions if question.problem is None and question.row not in answers.failed
    ]
    rows = {question.row for question in asked}
    answered = sum(all((row, condition) in answers.texts for condition in conditions) for row in rows)
    references: dict[int, list[str]] = {}
    for question in asked:
        references.setdefault(question.row, []).extend([question.references[0]] * len(question.texts))
    for row, texts in references.items():
        for condition in conditions:
            answers.texts.setdefault((row, condition), [f"{text} {condition}" for text in texts])
    if aspects is not None:
        prompts = _prompts(board, asked, answers, aspects)
    else:
        places = placed(board.questions)
        prompts = {
            (condition, n): right_or_wrong_messages(
                question.texts[0], question.references[0], answers.texts[question.row, condition][places[question]]
            )
            for condition in conditions
            for n, question in enumerate(asked)
        }
    return cost_of(judge, list(prompts.values()), folder / CACHE_NAME, len(rows), answered)


def _score(verdict: Verdict | None) -> float | None:
    return None if verdict is None or verdict.fields is None else verdict.fields["score"]


def _prompts(
    board: QuestionSet, kept: Sequence[Question], answers: Answers, aspects: Sequence[str]
) -> Mapping[tuple[str, str, int], Messages]:
    """By aspect, condition and number of the question."""
    places = placed(board.questions)
    of_row: dict[int, list[tuple[int, Question]]] = {}
    for n, question in enumerate(kept):
        of_row.setdefault(question.row, []).append((n, question))
    prompts = {}
    for (row, condition), texts in answers.texts.items():
        for n, question in of_row.get(row, ()):
            own = texts[places[question] : places[question] + len(question.texts)]
            for aspect in aspects:
                if ASPECTS[aspect][0] == question.kind:
                    prompts[aspect, condition, n] = aspect_messages(
                        aspect, list(question.texts), question.references[0], own
                    )
    return prompts


def _averages(
    values: Values, aspects: Sequence[str], condition: str, videos: Sequence[str], seed: int
) -> dict[str, Interval]:
    found = {}
    for whole in ("", "_whole"):
        scores: list[tuple[float, str, str]] = []
        for aspect in aspects:
            for draw in draws_of(values[aspect + whole], condition):
                scores += [(score, videos[n], aspect) for n, score in enumerate(draw) if score is not None]
        if not scores:
            continue
        counts = {aspect: sum(of == aspect for _, _, of in scores) for aspect in aspects}
        counts = {aspect: count for aspect, count in counts.items() if count}
        owners = [video for _, video, _ in scores]
        # weighed so that the aspects, and not the answers, count alike
        weighed = [score * len(scores) / (len(counts) * counts[aspect]) for score, _, aspect in scores]
        found[f"average{whole}"] = mean_interval(weighed, owners, seed=seed)
        found[f"average_of_answers{whole}"] = mean_interval([score for score, _, _ in scores], owners, seed=seed)
    return found
