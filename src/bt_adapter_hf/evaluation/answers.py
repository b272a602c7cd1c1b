"""Free answers against reference answers, without a judge.

Open-ended video question answering has short references ("dog", "two", "yes"). `exact_match` wants the same words,
`relaxed_match` finds the reference anywhere in a longer answer. Both see articles, case, punctuation and spelled
numbers alike, as VQA's evaluation does.
"""

import re
import unicodedata
from collections.abc import Sequence


_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty".split()
    )
}
_YES_NO = ("yes", "no")


def answer_words(text: str) -> list[str]:
    """The words that count: "The TWO dogs." -> ["2", "dogs"]."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    words = re.findall(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:'[^\W\d_]+)*", text)
    return [_NUMBERS.get(word, word) for word in words if word not in _ARTICLES]


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction has the words of one of the references, and no others."""
    words = answer_words(prediction)
    return any(words == answer_words(reference) for reference in references)


def relaxed_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the words of one of the references stand in the prediction, side by side.

    Of "yes" and "no" only the one that the prediction says first counts, so that "No, not yes" is not both. A
    reference without words matches nothing but a prediction without words.
    """
    words = answer_words(prediction)
    for wanted in map(answer_words, references):
        if len(wanted) == 1 and wanted[0] in _YES_NO:
            if next((word for word in words if word in _YES_NO), None) == wanted[0]:
                return True
        elif wanted and any(words[start : start + len(wanted)] == wanted for start in range(len(words))):
            return True
        elif not wanted and not words:
            return True
    return False
