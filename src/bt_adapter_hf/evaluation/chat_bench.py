"""Prompts for judges of video answers: the five scores of the VideoChatGPT benchmark, and right or wrong.

The definitions are the benchmark's; the wording is our own, so scores compare among runs of this package only. The
consistency prompt shows both questions (the released script shows the first one twice). Scores may be fractions; the
released scripts cut 4.8 down to 4, which `mean_of_whole_scores` in results reproduces.
"""

import hashlib
import json

from .judge import Messages


# What each score asks for, and the file of questions of the benchmark that it is taken on.
ASPECTS = {
    "correctness": (
        "generic",
        "how far the facts in the answer agree with the reference: nothing wrong, misread or made up. Other words for "
        "the same fact are right.",
    ),
    "detail": (
        "generic",
        "how much of the reference the answer covers, and how specific it is: all main points, and particulars of "
        "this video instead of phrases that fit any video.",
    ),
    "context": (
        "generic",
        "how well the answer fits what the video as a whole is about according to the reference: its main theme, and "
        "no statement out of its context.",
    ),
    "temporal": (
        "temporal",
        "whether the answer tells the order of events as the reference does: what comes first, what follows, and what "
        "happens at the same time.",
    ),
    "consistency": (
        "consistency",
        "whether the two answers, to two wordings of one question, say the same, and agree with the reference.",
    ),
}
_ASK_SCORE = (
    'Give a score from 0 (not at all) to 5 (fully). Answer with a JSON object and nothing else: {"score": 3.5}'
)
_SYSTEM = "You compare answers to questions about a video with reference answers. You have not seen the video."


def aspect_messages(aspect: str, questions: list[str], reference: str, answers: list[str]) -> Messages:
    """The prompt for one of `ASPECTS`.

    Args:
        questions, answers: one each; of consistency two each, in the same order.

    Raises:
        ValueError: of another number.
    """
    wanted = 2 if aspect == "consistency" else 1
    if (len(questions), len(answers)) != (wanted, wanted):
        raise ValueError(f"{aspect} takes {wanted} questions and answers, got {len(questions)} and {len(answers)}.")
    lines = [f"Score {ASPECTS[aspect][1]}", ""]
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True), 1):
        mark = f" {number}" if wanted > 1 else ""
        lines += [f"Question{mark}: {question}", f"Answer{mark}: {answer}"]
    lines += [f"Reference: {reference}", "", _ASK_SCORE]
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": "\n".join(lines)}]


def right_or_wrong_messages(question: str, reference: str, answer: str) -> Messages:
    """The prompt for judged accuracy: "pred" yes or no, and a score from 0 to 5."""
    text = (
        f"Question: {question}\nAnswer: {answer}\nReference: {reference}\n\n"
        "Does the answer mean the same as the reference, as far as the question asks? Synonyms, other wordings and "
        "further true details are fine. Answer with a JSON object and nothing else: "
        '{"pred": "yes" or "no", "score": 0 to 5}'
    )
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": text}]


def prompts_hash() -> str:
    """Changes with every word of the prompts; results hold it."""
    prompts = [right_or_wrong_messages("q", "r", "a")]
    for aspect in ASPECTS:
        count = 2 if aspect == "consistency" else 1
        prompts.append(aspect_messages(aspect, ["q"] * count, "r", ["a"] * count))
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
