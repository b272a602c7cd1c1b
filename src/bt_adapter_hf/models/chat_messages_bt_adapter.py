"""Conversations as callers write them, in the one form that the chat templates of the hosts read."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any


# What a caller's text holds is text, also where it spells a placeholder: until the prompt is tokenized such a word
# stands between these, which are transformers' marks for `sanitize_control_tokens`.
START, END = "\U000f0000", "\U000f0001"
KINDS = ("image", "video")
_SOURCES = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}


def is_batch(conversation: Any) -> bool:
    """Whether these are several conversations: lists of messages, or objects that hold such a list."""
    return isinstance(conversation, (list, tuple)) and any(
        isinstance(item, (list, tuple)) or hasattr(item, "messages") for item in conversation[:1]
    )


def plain_messages(conversation: Any, where: str) -> list[dict[str, Any]]:
    """Messages as dicts, whose content is text or a list of parts of type text, image and video, as dicts too.

    Raises:
        ValueError: there are none, one is no message, or it has a part that is neither.
    """
    messages = []
    for message in map(_fields, getattr(conversation, "messages", conversation)):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"{where} has a message {message!r}; expected one with role and content.")
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            message = {**message, "content": [_part(part, where) for part in content]}
        elif content is not None and not isinstance(content, str):
            raise ValueError(f"{where} has the content {content!r}; expected text or a list of parts.")
        if message["role"] == "user" and not "".join(texts(message)).strip():
            raise ValueError(f"{where} has a user's message without text: ask a question.")
        messages.append(dict(message))
    if not messages:
        raise ValueError(f"{where} has no messages.")
    return messages


def parts_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The images and videos of a message."""
    content = message.get("content") or []
    return [] if isinstance(content, str) else [part for part in content if part["type"] in KINDS]


def texts(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content") or []
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _fields(value: Any) -> Any:
    """A message or part as a dict, whatever object it is, without the keys that data sets fill with None."""
    if callable(getattr(value, "model_dump", None)):  # pydantic
        value = value.model_dump()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else value


def _part(part: Any, where: str) -> dict[str, Any]:
    part = _fields(part)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("image_url", "video_url"):  # as OpenAI writes them
        url = _fields(part.get(kind))
        url = url.get("url") if isinstance(url, Mapping) else url
        if url is None:
            raise ValueError(f"{where} has a part of type {kind} without a url.")
        part, kind = {"url": url}, kind.removesuffix("_url")
    if kind == "text":
        if not isinstance(text := part.get("text", ""), str):
            raise ValueError(f"{where} has a part of type text with {text!r}; expected a string.")
        return {**part, "text": text}
    if kind not in KINDS:
        raise ValueError(f"{where} has a part of type {kind!r}; expected text, image or video.")
    if len(found := [key for key in _SOURCES[kind] if key in part]) > 1:
        raise ValueError(f"{where} has a part of type {kind} with {' and '.join(found)}; expected one of them.")
    if any(isinstance(part[key], str) and not part[key].strip() for key in found):
        raise ValueError(f"{where} has a part of type {kind} whose {found[0]} is empty.")
    return {**part, "type": kind}


def sources_of(part: Mapping[str, Any]) -> list[Any]:
    """What an image or video part shows, in a list; an empty one if that is said elsewhere."""
    kind = part["type"]
    if isinstance(encoded := part.get("base64"), str) and kind == "image" and not encoded.startswith("data:"):
        return [f"data:;base64,{encoded}"]
    return [part[key] for key in _SOURCES[kind] if key in part]


def hide(message: dict[str, Any], pattern: str) -> dict[str, Any]:
    """The message, in whose texts placeholders are marked as words."""

    def marked(text: str) -> str:
        return re.sub(pattern, rf"{START}\g<0>{END}", show(text))

    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": marked(content)}
    if content:
        parts = [{**part, "text": marked(part["text"])} if part["type"] == "text" else part for part in content]
        return {**message, "content": parts}
    return message


def show(text: str) -> str:
    """The text without the marks."""
    return text.replace(START, "").replace(END, "")
