"""Verdicts of a judge over the answers of a run, under every control, and what asking costs."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chat_bench import right_or_wrong_messages
from .judge import (
    Judge,
    JudgeError,
    JudgeRefusedError,
    Messages,
    UnreadableReplyError,
    Verdict,
    judge_all,
    known_keys,
    prompt_key,
)


logger = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 4  # of English, roughly
REPLY_TOKENS = 12  # of an object with a score


@dataclass(frozen=True)
class Cost:
    """What it takes to judge.

    Attributes:
        prompts: that have no reply in the cache yet, each once.
        tokens: of these prompts, roughly; replies take about `REPLY_TOKENS` each.
        known: prompts that have one.
        clips: that are asked about; answered: how many of them have their answers already.
    """

    prompts: int
    tokens: int
    known: int
    clips: int
    answered: int

    def describe(self, price_in: float | None = None, price_out: float | None = None) -> str:
        """For people; prices are per million tokens."""
        replies = self.prompts * REPLY_TOKENS
        said = f"{self.prompts} prompts to the judge, about {self.tokens} tokens, and {replies} of replies"
        if price_in is not None or price_out is not None:
            price = (self.tokens * (price_in or 0) + replies * (price_out or 0)) / 1e6
            said += f": about {price:.2f} at these prices"
        said += f" ({self.known} more have its reply already)" if self.known else ""
        if self.answered == self.clips:
            return f"{said}. The answers about all {self.clips} videos are there."
        return (
            f"{said}. The answers about {self.answered} of {self.clips} videos are there; questions about the others "
            "are taken to be answered with their references."
        )


def cost_of(name: str | None, prompts: Sequence[Messages], cache: Path, clips: int, answered: int) -> Cost:
    """What it costs to ask the judge of this name, or one that has been asked nothing yet."""
    known = set() if name is None else known_keys(cache)
    todo = {prompt_key(name or "", messages): messages for messages in prompts}
    left = [messages for key, messages in todo.items() if key not in known]
    characters = sum(len(message["content"]) for messages in left for message in messages)
    return Cost(len(left), characters // CHARACTERS_PER_TOKEN, len(todo) - len(left), clips, answered)


def check_answers(judge: Judge, cache: Path) -> None:
    """Asks the judge about no video, before hours of answers, unless the cache has a reply of it.

    Raises:
        JudgeRefusedError: it answers nothing.
    """
    if cache.exists() and json.dumps(judge.name).encode() in cache.read_bytes():
        return
    try:
        judge(right_or_wrong_messages("Which colour is snow?", "white", "It is white."))
    except JudgeRefusedError:
        raise
    except UnreadableReplyError as error:
        logger.warning("The judge %s answers, but %s", judge.name, error)
    except JudgeError as error:
        raise JudgeRefusedError(f"The judge {judge.name} does not answer: {error}.") from error


def judged(
    judge: Judge,
    prompts: Mapping[Any, Messages],
    read: Callable[[Mapping[str, Any]], dict[str, Any]],
    cache: Path,
) -> dict[Any, Verdict]:
    """The verdict on every prompt, by its key in `prompts`; see `judge_all`."""
    return dict(zip(prompts, judge_all(judge, list(prompts.values()), read, cache), strict=True))
