"""Prompts of the five scores."""

import pytest

from bt_adapter_hf.evaluation.chat_bench import ASPECTS, aspect_messages, prompts_hash, right_or_wrong_messages


@pytest.mark.parametrize("aspect", ASPECTS)
def test_a_prompt_holds_all_that_is_to_be_compared(aspect):
    count = 2 if aspect == "consistency" else 1
    questions, answers = ["first question", "second question"][:count], ["first answer", "second answer"][:count]
    _, user = aspect_messages(aspect, questions, "a red kite", answers)
    for text in (*questions, *answers, "a red kite"):
        assert user["content"].count(text) == 1
    with pytest.raises(ValueError, match=aspect):
        aspect_messages(aspect, questions, "a red kite", [*answers, "one more"])


def test_the_hash_follows_the_words(monkeypatch):
    before = prompts_hash()
    monkeypatch.setitem(ASPECTS, "detail", ("generic", "something else"))
    assert prompts_hash() != before
    assert "dog" in right_or_wrong_messages("which animal?", "dog", "a cat")[1]["content"]
