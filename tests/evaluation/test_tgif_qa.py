"""TGIF-QA's metrics, by hand."""

import pytest

from bt_adapter_hf.data.tgif_qa import GifQuestion
from bt_adapter_hf.evaluation.tgif_qa import score_tgif_qa


def test_accuracy_and_squared_error():
    options = ("wave", "nod", "jump", "spin", "blink")
    questions = [
        GifQuestion("a", "what ?", "dog", "frameqa"),
        GifQuestion("b", "what ?", "cat", "frameqa"),
        *(GifQuestion("c", "how many times ?", str(n), "count") for n in (2, 4, 6)),
        GifQuestion("d", "what ?", "nod", "action", options),
        GifQuestion("e", "what ?", "jump", "action", options),
        GifQuestion("f", "what after ?", "spin", "transition", options),
    ]
    answers = ["A dog.", "dog", "3", "four", "often", "(B) nod", "spin", "D"]
    scores = score_tgif_qa(questions, answers)
    assert scores["frameqa"] == {"accuracy": 0.5, "count": 2}
    assert scores["action"] == {"accuracy": 0.5, "count": 2} and scores["transition"]["accuracy"] == 1.0
    # (3 - 2)^2, 0, and (0 - 6)^2 for what says no number; the mean is 4
    assert scores["count"] == pytest.approx({"mse": 37 / 3, "mse_of_mean": 8 / 3, "unread": 1, "count": 3})
    with pytest.raises(ValueError, match="8 questions and 7 answers"):
        score_tgif_qa(questions, answers[:-1])
