"""Matching of free answers."""

import pytest

from bt_adapter_hf.evaluation.answers import answer_words, exact_match, relaxed_match


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The TWO dogs.", ["2", "dogs"]),
        ("it's  3.5 metres", ["it's", "3.5", "metres"]),
        ("Ｃａｆé – crème", ["café", "crème"]),
        ("左に動く", ["左に動く"]),
        ("", []),
        ("a_b", ["b"]),
    ],
)
def test_words(text, words):
    assert answer_words(text) == words


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "relaxed"),
    [
        ("A dog.", ["dog"], True, True),
        ("It is a big dog, running.", ["dog"], False, True),
        ("dogs", ["dog"], False, False),
        ("doghouse", ["dog"], False, False),
        ("three times", ["3"], False, True),
        ("13", ["3"], False, False),
        ("play the piano", ["playing", "play piano"], True, True),
        ("Yes, it does.", ["yes"], False, True),
        ("No, not yes.", ["yes"], False, False),
        ("No, not yes.", ["no"], False, True),
        ("I do not know", ["no"], False, False),
        ("", ["dog"], False, False),
        ("the", ["a"], True, True),
        ("dog", [""], False, False),
        ("dog", [], False, False),
    ],
)
def test_matches(prediction, references, exact, relaxed):
    assert exact_match(prediction, references) is exact
    assert relaxed_match(prediction, references) is relaxed
