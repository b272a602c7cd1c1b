"""Language models as judges: an OpenAI-compatible endpoint or a local model, asked once per prompt.

Scores of judges drift with the judge by ten points and more, so what is kept is its name, the hash of the prompts and
every raw reply. A prompt that failed is asked again by the next run and counts as failed until then, never as a zero.
"""

import ast
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from ..adapters.writing import written_whole
from ..import_utils import require_package


logger = logging.getLogger(__name__)

_LONGEST = 10_000  # characters of a reply in which an object is looked for
_UNREADABLE = (ValueError, KeyError, TypeError)  # what a reader of replies raises
# Prompts in a row without an answer, and without one that can be read, after which the rest is not asked.
_UNANSWERED, _UNREAD = 8, 30

Messages = list[dict[str, str]]  # {"role": ..., "content": ...} each


class Judge(Protocol):
    """Whatever answers messages. `name` says which model it is, and goes into results and into the cache's keys;
    `threads` may call it at the same time."""

    name: str
    threads: int

    def __call__(self, messages: Messages) -> str: ...


class JudgeError(RuntimeError):
    """The judge gave no answer to a prompt; the message says why."""


class UnreadableReplyError(JudgeError):
    """A reply came, and what was asked for is not in it: worth asking again."""


class JudgeRefusedError(JudgeError):
    """The judge answers nothing until something is changed; the message says what."""


class EndpointJudge:
    """A chat completion endpoint that speaks OpenAI's protocol, greedy.

    Args:
        model: its name there.
        base_url: such as "http://127.0.0.1:8000/v1"; by default what the environment (`OPENAI_BASE_URL`) says, or
            OpenAI's own.
        timeout: seconds that one request may take.
        retries: of a request that was refused for now (429, 5xx, lost connections), with growing pauses.
        max_tokens: of a reply.
        threads: requests at the same time.

    What of the settings a model does not take (temperature, seed, length) is left to it, with a warning.

    Raises:
        ImportError: without the package `openai`.
        ValueError: without a key (`OPENAI_API_KEY`; any word where the server wants none).
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        max_tokens: int = 256,
        threads: int = 8,
    ):
        require_package("openai", "eval")
        import openai

        try:
            self._client = openai.OpenAI(base_url=base_url, timeout=timeout, max_retries=retries)
        except openai.OpenAIError as error:
            raise ValueError(
                f"The judge {model} cannot be asked: {error} Set OPENAI_API_KEY; a server of your own takes any word."
            ) from error
        self.model, self.threads = model, threads
        self.name = endpoint_name(model, str(self._client.base_url))
        self._settings = {"temperature": 0, "seed": 0, "max_tokens": max_tokens}
        self._error = openai.OpenAIError

    def __call__(self, messages: Messages) -> str:
        settings = dict(self._settings)  # which another thread may change
        try:
            reply = self._client.chat.completions.create(model=self.model, messages=messages, **settings)
        except (ValueError, RecursionError) as error:  # the body is no JSON, or nested without end
            raise UnreadableReplyError(f"the reply is no JSON ({type(error).__name__}: {error})") from error
        except self._error as error:
            unwanted = getattr(error, "param", None)
            if getattr(error, "status_code", None) == 400 and unwanted in settings:
                if self._settings.pop(unwanted, None) is not None:
                    logger.warning("The judge %s is asked without %s: %s", self.name, unwanted, error)
                return self(messages)
            raise self._refusal(error) from error
        try:
            content = reply.choices[0].message.content
        except (AttributeError, IndexError, KeyError, TypeError):  # the client takes JSON of any shape
            content = None
        if not isinstance(content, str) or not content.strip():
            raise UnreadableReplyError(f"the reply has no text: {_start(reply)}")
        return content

    def _refusal(self, error: Exception) -> JudgeError:
        """What an error of the client means: of this prompt, or of all."""
        import openai

        client, said = self._client, f"{type(error).__name__}: {error}"
        if isinstance(error, openai.APITimeoutError):
            times = f"{client.max_retries + 1} times" if client.max_retries else "once"
            return JudgeError(f"{said} It was given timeout={client.timeout:g} s, {times}")
        if isinstance(error, openai.APIConnectionError):
            return JudgeError(f"{said} Nothing answers at base_url={client.base_url}")
        status = getattr(error, "status_code", None)
        if status in (401, 403):
            advice = f"set OPENAI_API_KEY to a key that {client.base_url} takes for {self.model}"
        elif status in (404, 405):
            advice = f"it knows no {self.model}, or base_url={client.base_url} is not where it is (most end in /v1)"
        elif status == 402 or getattr(error, "code", None) == "insufficient_quota":
            advice = "nothing is left on the account: fill it up, or name another judge"
        else:
            return JudgeError(said)
        return JudgeRefusedError(f"The judge {self.name} answers nothing ({said}): {advice}.")


def endpoint_name(model: str, base_url: str | None = None) -> str:
    """What results call a model at an endpoint."""
    url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    return f"{model} at {urlsplit(url).hostname}"


def local_name(model: str) -> str:
    """What results call a model on this machine."""
    return f"{model} (local)"


class LocalJudge:
    """A chat model of transformers as judge, greedy.

    Args:
        model: Hub id or folder.
        device: as in `transformers.pipeline`; by default an accelerator where there is one.
        max_tokens: of a reply.

    Raises:
        ValueError: it is no chat model: its tokenizer has no chat template.
    """

    threads = 1

    def __init__(self, model: str, device: str | None = None, max_tokens: int = 256):
        from transformers import pipeline

        self._pipeline = pipeline("text-generation", model=model, device=device, dtype="auto")
        if self._pipeline.tokenizer.chat_template is None:
            raise ValueError(f"The judge {model} has no chat template: name a model that was tuned for conversation.")
        self.max_tokens = max_tokens
        self.name = local_name(model)

    def __call__(self, messages: Messages) -> str:
        options = {"max_new_tokens": self.max_tokens, "do_sample": False, "return_full_text": False}
        return self._pipeline(messages, **options)[0]["generated_text"]


@dataclass(frozen=True)
class Verdict:
    """What became of one prompt: the judge's raw reply and the fields read from it, or why there are none."""

    key: str
    raw: str | None
    fields: dict[str, Any] | None
    error: str | None


def judge_all(
    judge: Judge,
    prompts: Sequence[Messages],
    read: Callable[[Mapping[str, Any]], dict[str, Any]],
    cache: Path,
    attempts: int = 3,
) -> Iterator[Verdict]:
    """Asks the judge about every prompt, in the order of `prompts`.

    Args:
        read: takes the object that was found in a reply and returns the fields wanted; raises `ValueError` (and
            `KeyError`, `TypeError`) where it is not as asked for.
        cache: jsonl file of raw replies, by the hash of judge and prompt. What is in there is not asked again; every
            good reply is added as it comes. A damaged line, or one whose reply cannot be read, is dropped with a
            warning, and its prompt asked again.
        attempts: how often a prompt is asked whose reply cannot be read.

    Raises:
        JudgeRefusedError: no prompt gets an answer (a wrong key, no such model, or many prompts in a row without one).
            The rest is not asked; replies that came are in the cache.
    """
    known = _clean(cache)
    keys = [prompt_key(judge.name, messages) for messages in prompts]
    fields: dict[str, dict[str, Any]] = {}
    for key in set(keys) & known.keys():
        try:
            fields[key] = read(find_object(known[key]))
        except _UNREADABLE as problem:
            logger.warning("%s: a reply cannot be read (%s) and is asked for again", cache, problem)
    todo = {key: messages for key, messages in zip(keys, prompts, strict=True) if key not in fields}
    failed: dict[str, str] = {}
    in_row: list[JudgeError] = []
    refused: JudgeRefusedError | None = None
    stopped = threading.Event()

    def ask(key: str, messages: Messages) -> tuple[str, str, dict[str, Any] | JudgeError | None]:
        """The raw reply and its fields, or why there are none; None of what was not asked."""
        problem = None
        for _ in range(attempts):
            if stopped.is_set():
                break
            try:
                raw = judge(messages)
            except UnreadableReplyError as error:
                problem = error
                continue
            except JudgeError as error:
                return key, "", error  # the client has tried again itself
            try:
                return key, raw, read(find_object(raw))
            except _UNREADABLE as error:
                problem = UnreadableReplyError(f"unreadable reply ({error}): {_start(raw)}")
        return key, "", problem

    cache.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(judge.threads) as pool, cache.open("a", encoding="utf-8") as file:
        try:
            for future in as_completed([pool.submit(ask, *item) for item in todo.items()]):
                key, raw, found = future.result()
                if isinstance(found, dict):  # kept of those, too, that were under way when the judge was given up
                    in_row.clear()
                    known[key], fields[key] = raw, found
                    file.write(json.dumps({"key": key, "judge": judge.name, "raw": raw}) + "\n")
                    file.flush()
                elif found is not None and refused is None:
                    in_row.append(found)
                    refused = _given_up(judge.name, in_row)
                    if refused is not None:
                        stopped.set()
                    elif str(found) not in failed.values():  # not a line for each prompt
                        logger.warning("The judge gave no score: %s", found)
                    failed[key] = str(found)
        finally:
            stopped.set()
    if refused is not None:
        raise refused
    for key in keys:
        if key in failed:
            yield Verdict(key, None, None, failed[key])
        else:
            yield Verdict(key, known[key], fields[key], None)


def _given_up(name: str, in_row: Sequence[JudgeError]) -> JudgeRefusedError | None:
    """Why the judge is not asked any further, after these failures without an answer between them."""
    last = in_row[-1]
    if isinstance(last, JudgeRefusedError):
        return last
    silent = [error for error in in_row[-_UNANSWERED:] if not isinstance(error, UnreadableReplyError)]
    if len(silent) == _UNANSWERED or len(in_row) >= _UNREAD:
        count = len(silent) if len(silent) == _UNANSWERED else len(in_row)
        return JudgeRefusedError(f"The judge {name} scored none of {count} prompts in a row. The last: {last}.")
    return None


def known_keys(cache: Path) -> set[str]:
    """The prompts that have a reply in the cache."""
    return {record["key"] for record, _ in _records(cache)}


def prompt_key(judge: str, messages: Messages) -> str:
    """Hash of the judge's name and a prompt."""
    return hashlib.sha256(json.dumps([judge, messages], sort_keys=True).encode()).hexdigest()


def find_object(reply: str) -> dict[str, Any]:
    """The first JSON object (or Python dict, as many models write) in a reply, whatever stands around it.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(reply, str):
        raise ValueError("no text")
    reply = reply[:_LONGEST]
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{(?=\s*[\"'}])", reply):
        try:
            found, _ = decoder.raw_decode(reply, match.start())
        except RecursionError as error:
            raise ValueError("no JSON object in it, but brackets without end") from error
        except ValueError:
            end = reply.find("}", match.start()) + 1
            try:
                found = ast.literal_eval(reply[match.start() : end]) if end else None
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # as `ast` says
                continue
        if isinstance(found, dict):
            return found
    raise ValueError("no JSON object in it")


def read_score(found: Mapping[str, Any], lowest: int = 0, highest: int = 5) -> dict[str, float]:
    """The number under "score", within its bounds.

    Raises:
        ValueError: it is no number, or out of bounds.
    """
    score = found["score"]
    if isinstance(score, bool) or not isinstance(score, (int, float, str)):
        raise ValueError(f"score is {_start(score)}")
    try:
        score = float(score)
    except OverflowError as error:
        raise ValueError("score is a number of hundreds of digits") from error
    if not lowest <= score <= highest:
        raise ValueError(f"score {score:g} is not within {lowest} to {highest}")
    return {"score": score}


def read_yes_no(found: Mapping[str, Any]) -> dict[str, Any]:
    """Whether "pred" says yes, and the score.

    Raises:
        ValueError: it says something else.
    """
    said = found["pred"]
    said = {True: "yes", False: "no"}[said] if isinstance(said, bool) else said
    said = said.strip().lower() if isinstance(said, str) else None
    if said not in ("yes", "no"):
        raise ValueError(f"pred is {_start(found['pred'])}")
    return {"right": said == "yes", **read_score(found)}


def _start(value: Any) -> str:
    """What a message shows of something that may be of any size and shape."""
    try:
        return repr(value)[:200]
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deep"


def _records(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Good lines of the cache, as they are and as bytes; others are named in a warning."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines[:-1], 1):  # a last line without an end was cut short by a kill
        try:
            record = json.loads(line)
            if not isinstance(record["key"], str) or not isinstance(record["raw"], str):
                raise ValueError("no reply of a judge")
        except (*_UNREADABLE, RecursionError) as error:
            logger.warning("%s: line %d is damaged (%s) and is asked for again", path, number, error)
        else:
            yield record, line


def _clean(path: Path) -> dict[str, str]:
    """Replies by key; what is no good line leaves the file."""
    records = list(_records(path))
    content = b"".join(line + b"\n" for _, line in records)
    if path.exists() and path.stat().st_size != len(content):
        with written_whole(path) as temporary:
            temporary.write_bytes(content)
    return {record["key"]: record["raw"] for record, _ in records}
