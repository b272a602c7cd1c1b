"""Verdicts of a judge over the answers of a run, under every control, and what asking costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .judge import Judge, Messages, Verdict, judge_all, known_keys, prompt_key


CHARACTERS_PER_TOKEN = 4  # of English, roughly
REPLY_TOKENS = 12  # of an object with a score


@dataclass(frozen=True)
class Cost:
    """What it takes to judge.

    Attributes:
        prompts: that have no reply in the cache yet, each once.
        tokens: of these prompts, roughly; replies take about `REPLY_TOKENS` each.
    """

    prompts: int
    tokens: int

    def describe(self, price_in: float | None = None, price_out: float | None = None) -> str:
        """For people; prices are per million tokens."""
        replies = self.prompts * REPLY_TOKENS
        said = f"{self.prompts} prompts to the judge, about {self.tokens} tokens, and {replies} of replies"
        if price_in is None and price_out is None:
            return said
        price = (self.tokens * (price_in or 0) + replies * (price_out or 0)) / 1e6
        return f"{said}: about {price:.2f} at these prices"


def cost_of(name: str, prompts: Sequence[Messages], cache: Path) -> Cost:
    """What it costs to ask the judge of this name."""
    known = known_keys(cache)
    todo = {prompt_key(name, messages): messages for messages in prompts}
    left = [messages for key, messages in todo.items() if key not in known]
    characters = sum(len(message["content"]) for messages in left for message in messages)
    return Cost(len(left), characters // CHARACTERS_PER_TOKEN)


def judged(
    judge: Judge,
    prompts: Mapping[Any, Messages],
    read: Callable[[Mapping[str, Any]], dict[str, Any]],
    cache: Path,
) -> dict[Any, Verdict]:
    """The verdict on every prompt, by its key in `prompts`; see `judge_all`."""
    return dict(zip(prompts, judge_all(judge, list(prompts.values()), read, cache), strict=True))
