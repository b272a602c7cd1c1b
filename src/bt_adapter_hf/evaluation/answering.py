"""Answers of a chat model to questions about clips, under every temporal control: decoded once, kept as they come."""

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..adapters.fingerprint import model_fingerprint
from ..adapters.host_modules import find_tower, has_branch
from ..models.processing_bt_adapter_gif_qa import BTAdapterGifQAProcessor
from .controls import check_controls, shuffle_frames
from .features import ALL_CONTROLS, BLIND, FULL, begin, own_clips, seed_of
from .frames import Clip, ClipDecoder, read_clip


logger = logging.getLogger(__name__)


@dataclass
class Answerer:
    """A chat model with its processor, greedy.

    Attributes:
        name: Hub id or folder, for results.
        max_new_tokens: of an answer.
        batch_size: questions at once.
    """

    model: Any
    processor: Any
    name: str
    max_new_tokens: int = 64
    batch_size: int = 8

    @property
    def needs_video(self) -> bool:
        """Whether it takes no question without a video, as the model of GIF question answering."""
        return isinstance(self.processor, BTAdapterGifQAProcessor)

    def describe(self) -> dict[str, Any]:
        """What decides the answers."""
        return {
            "model": f"{self.name} ({str(self.model.dtype).removeprefix('torch.')})",
            "model_fingerprint": model_fingerprint(self.model),
            "video_processor": json.loads(self.processor.video_processor.to_json_string()),
            "num_clips": self.processor.num_clips,
            "chat_template": self.processor.chat_template,
            "decoding": f"greedy, at most {self.max_new_tokens} tokens",
            "bt_adapter_hf": __version__,
        }

    @torch.inference_mode()
    def answer(self, frames: np.ndarray | None, questions: Sequence[str]) -> list[str]:
        """An answer to each question about frames uint8 (T, H, W, 3), or about nothing."""
        seen = [] if frames is None else [{"type": "video", "video": frames}]
        answers = []
        for start in range(0, len(questions), self.batch_size):
            chats = [
                [{"role": "user", "content": [*seen, {"type": "text", "text": question}]}]
                for question in questions[start : start + self.batch_size]
            ]
            inputs = self.processor.apply_chat_template(
                chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
            ).to(self.model.device, self.model.dtype)
            output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
            if getattr(self.model.config, "use_decoder_only_language_model", True):  # else it is the answer alone
                output = output[:, inputs["input_ids"].shape[1] :]
            answers += self.processor.post_process_image_text_to_text(output)
        return answers


@contextmanager
def frame_averaged(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model sees the average of what its image tower sees in the single frames: the branch has no say."""
    tower = find_tower(model)
    native = tower.forward

    def averaged(pixel_values: torch.Tensor | None = None, **kwargs: Any):
        if pixel_values is None or pixel_values.ndim != 5:
            return native(pixel_values, **kwargs)
        kwargs.pop("frame_mask", None)
        videos = pixel_values.shape[:2]

        def mean(states: torch.Tensor | None) -> torch.Tensor | None:
            return None if states is None else tower._place_cls(states.unflatten(0, videos).mean(dim=1))

        output = native(pixel_values.flatten(0, 1), **kwargs)
        output["last_hidden_state"] = mean(output.last_hidden_state)
        if output.hidden_states is not None:
            output["hidden_states"] = tuple(map(mean, output.hidden_states))
        return output

    tower.forward = averaged
    try:
        yield
    finally:
        del tower.forward


@dataclass
class Answers:
    """Answers by row of the clips and condition, one for each question of the row; and rows without any."""

    texts: dict[tuple[int, str], list[str]] = field(default_factory=dict)
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    identities: dict[int, str | None] = field(default_factory=dict)


def answer_clips(
    answerer: Answerer,
    shards: Sequence[Iterable[Clip]],
    questions: Mapping[int, Sequence[str]],
    folder: Path,
    protocol: dict[str, Any],
    *,
    controls: Sequence[str] = ALL_CONTROLS,
    draws: int = 3,
    seed: int = 0,
    workers: int = 1,
    item_timeout: float | None = 60.0,
    progress: Callable[[int], None] = lambda rows: None,
) -> Answers:
    """Asks about every clip under every control, from one decoding.

    Args:
        questions: of each row; rows without any are not read.
        shards, folder, protocol, controls, draws, seed, workers, item_timeout, progress: see `encode_clips`.

    Returns:
        Of all rows and processes, in every process.

    Raises:
        OtherRunError: `folder` is of another run.
        ValueError: an unknown control.
    """
    check_controls(controls, ALL_CONTROLS)
    if "frame_average" in controls and not has_branch(answerer.model):
        others = ",".join(control for control in controls if control != "frame_average")
        raise ValueError(
            f"The control frame_average takes a branch's say away, and {answerer.name} has no branch: leave it out "
            f"(controls={others})."
        )
    protocol = {**protocol, "controls": list(controls), "shuffle_draws": draws, "seed": seed}
    rank, processes, wait = begin(folder, protocol)
    known = read_answers(folder)
    conditions = conditions_of(controls, draws)
    rules, num_clips = answerer.processor.video_processor, answerer.processor.num_clips

    def load(video: str | bytes, backwards: bool, span: tuple[float, float] | None) -> np.ndarray:
        return read_clip(video, rules, backwards, span, num_clips)

    todo = (
        clip
        for clip in own_clips(shards, rank, processes)
        if questions.get(clip.row)
        and not (
            all((clip.row, condition) in known.texts for condition in conditions)
            and known.identities[clip.row] == clip.identity
        )
    )
    part = folder / "answers" / f"{time.time_ns():020d}-{uuid.uuid4().hex}.jsonl"
    part.parent.mkdir(exist_ok=True)
    with ClipDecoder(load, workers, item_timeout) as decoder, part.open("w", encoding="utf-8") as file:
        while batch := list(islice(todo, 4 * workers)):
            for clip, frames in decoder(batch):
                record = {"row": clip.row, "name": clip.name, "identity": clip.identity}
                if isinstance(frames, str):
                    record["reason"] = frames
                else:
                    record["answers"] = _answer(answerer, clip, frames, questions[clip.row], conditions, seed)
                file.write(json.dumps(record) + "\n")
                file.flush()
                progress(1)
    if part.stat().st_size == 0:
        part.unlink()
    wait()
    return read_answers(folder)


def read_answers(folder: Path) -> Answers:
    """What all processes have written so far, without a line that a kill cut short, and with a warning of others."""
    found = Answers()
    for path in sorted((folder / "answers").glob("*.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            try:
                record = _record(line)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                logger.warning("%s: line %d is damaged (%s), and its clip is asked about again", path, number, error)
                continue
            row = record["row"]
            found.names[row], found.identities[row] = record["name"], record["identity"]
            found.failed.pop(row, None)  # what came later holds
            for key in [key for key in found.texts if key[0] == row and "reason" in record]:
                del found.texts[key]
            if "reason" in record:
                found.failed[row] = record["name"], record["reason"]
            else:
                found.texts |= {(row, condition): texts for condition, texts in record["answers"].items()}
    return found


def _record(line: bytes) -> dict[str, Any]:
    """One line of a file of answers; `ValueError`, `KeyError` or `TypeError` if it is none."""
    record = json.loads(line)
    _, _, row = record["name"], record["identity"], record["row"]
    texts = [] if "reason" in record else [text for of_one in record["answers"].values() for text in of_one]
    if not isinstance(row, int) or not all(isinstance(text, str) for text in texts):
        raise ValueError("no answers of a clip")
    return record


def conditions_of(controls: Sequence[str], draws: int) -> list[str]:
    """How each clip is shown: as it is, and under every control."""
    found = [FULL]
    for control in controls:
        found += [f"shuffled_{draw}" for draw in range(draws)] if control == "shuffled" else [control]
    return found


def _answer(
    answerer: Answerer,
    clip: Clip,
    frames: np.ndarray,
    questions: Sequence[str],
    conditions: Sequence[str],
    seed: int,
) -> dict[str, list[str]]:
    generator = torch.Generator().manual_seed(seed_of(clip.name, seed))
    place = torch.arange(len(frames))[None, :, None, None, None]  # as a video of numbers
    answers = {}
    for condition in conditions:
        shown, averaging = frames, nullcontext()
        if condition == BLIND and answerer.needs_video:  # a grey one, all zeros once it is normalised
            mean = 255 * np.array(answerer.processor.video_processor.image_mean)
            shown = np.broadcast_to(mean.round().astype(np.uint8), frames.shape).copy()
        elif condition == BLIND:
            shown = None
        elif condition.startswith("shuffled_"):
            shown = frames[shuffle_frames(place, generator=generator).flatten().numpy()]
        elif condition == "reversed":
            shown = np.ascontiguousarray(frames[::-1])
        elif condition == "one_frame":  # as often as there are frames, which is what the model was trained for
            shown = np.repeat(frames[len(frames) // 2][None], len(frames), axis=0)
        elif condition == "frame_average":
            averaging = frame_averaged(answerer.model)
        with averaging:
            answers[condition] = answerer.answer(shown, questions)
    return answers
