"""Answers of a chat model, as they are made; and with the branch beside without it."""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from ..adapters.attachment import native_of
from ..models.image_io import load_image
from ..models.video_io import load_video
from .clips import STILLS


class Chat(NamedTuple):
    """A chat model of ours with its processor."""

    model: PreTrainedModel
    processor: ProcessorMixin
    max_new_tokens: int = 128

    def inputs(self, messages: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device, self.model.dtype)

    def visual_tokens(self, input_ids: torch.Tensor) -> tuple[int, int]:
        """How many of images and of videos there are."""
        kinds = self.processor.image_token_id, self.processor.video_token_id
        return tuple(int((input_ids == token).sum()) for token in kinds)

    def stream(self, inputs: dict[str, torch.Tensor]) -> Iterator[str]:
        """The answer so far, again and again. Who stops listening ends the generation."""
        words: queue.Queue = queue.Queue()
        stopped = threading.Event()
        processor = self.processor

        class Listener(BaseStreamer):
            def __init__(self):
                self.ids: list[int] = []
                self.is_prompt = True

            def put(self, value) -> None:
                if self.is_prompt:  # comes first
                    self.is_prompt = False
                    return
                self.ids.extend(value.flatten().tolist())
                words.put(processor.post_process_image_text_to_text([self.ids])[0])

            def end(self) -> None:
                words.put(None)

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.full((len(input_ids),), stopped.is_set(), dtype=torch.bool, device=input_ids.device)

        def generate() -> None:
            try:
                self.model.generate(
                    **inputs,
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    streamer=Listener(),
                    stopping_criteria=StoppingCriteriaList([Stopped()]),
                )
            except Exception as error:  # is raised where the answer is waited for
                words.put(error)

        thread = threading.Thread(target=generate, name="generate", daemon=True)
        thread.start()
        try:
            while (word := words.get()) is not None:
                if isinstance(word, Exception):
                    raise word
                yield word.strip()
        finally:
            stopped.set()
            thread.join()

    def answer(self, messages: list[dict[str, Any]]) -> str:
        return ["", *self.stream(self.inputs(messages))][-1]


def part(path: str) -> dict[str, Any]:
    """A file as a part of a message."""
    kind = "image" if Path(path).suffix.lower() in STILLS else "video"
    return {"type": kind, "path": path}


class InAndOut(NamedTuple):
    """The same question with the branch and without it."""

    with_branch: str
    without_branch: str
    shown_without: str  # what the model without a branch was shown
    image_is_equal: bool  # whether both give the same logits for an image, to the bit
    numbers: int  # that were compared


def in_and_out(chat: Chat, path: str, question: str) -> InAndOut:
    """Asks with the branch and without it, and compares all logits for an image, the middle frame of a video.

    The model without a branch is the native one, around the same parameters. It takes images only.
    """
    words = {"type": "text", "text": question}
    with_branch = chat.answer([{"role": "user", "content": [part(path), words]}])
    if part(path)["type"] == "image":
        image, shown = load_image(path), "the image"
    else:
        frames, _ = load_video(path, num_frames=3, sampling="centers")
        image, shown = Image.fromarray(frames[1]), "the middle frame"
    message = [{"role": "user", "content": [{"type": "image", "image": image}, words]}]
    native = chat._replace(model=native_of(chat.model).eval())
    inputs = chat.inputs(message)
    with torch.inference_mode():
        ours, theirs = (model(**inputs).logits for model in (chat.model, native.model))
    return InAndOut(with_branch, native.answer(message), shown, torch.equal(ours, theirs), ours.numel())
