"""Our chat models in lmms-eval, which finds them by its entry-point group: `lmms-eval --model bt_adapter`.

This file is imported by lmms-eval only.
"""

from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

import bt_adapter_hf  # noqa: F401  (registers the classes with transformers)


def manifest() -> ModelManifest:
    """What lmms-eval asks for."""
    return ModelManifest("bt_adapter", chat_class_path=f"{__name__}.BTAdapterChat")


class BTAdapterChat(lmms):
    """A chat model with its adapter in, by the chat interface; decodes with the package's own reader.

    Args (of `--model_args`):
        pretrained: Hub id or folder.
        num_frames, num_clips: as the processor says by default.
        device: an accelerator where there is one by default.
        batch_size: questions at once.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        num_frames: int | None = None,
        num_clips: int | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        dtype: str = "auto",
        **unknown: Any,
    ):
        super().__init__()
        from accelerate import PartialState
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        unknown = {name: value for name, value in unknown.items() if value is not None and name != "max_batch_size"}
        if unknown:
            raise ValueError(f"--model_args has no {', '.join(unknown)}; see the class BTAdapterChat.")
        kind = AutoConfig.from_pretrained(pretrained).model_type
        if not kind.startswith("bt_adapter_"):
            raise ValueError(f"{pretrained} is a model of type '{kind}': save or push it with its adapter in.")
        fields = {"num_frames": num_frames, "num_clips": num_clips}
        fields = {name: int(value) for name, value in fields.items() if value is not None}
        self.processor = AutoProcessor.from_pretrained(pretrained, **fields)
        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        self.batch_size = int(batch_size)
        model = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=dtype)
        self.model = model.to(state.device if device is None else device).eval()

    @torch.inference_mode()
    def generate_until(self, requests: list) -> list[str]:
        """The answers, in the order of the requests; greedy unless the task says otherwise."""
        answers = []
        for start in tqdm(range(0, len(requests), self.batch_size), disable=self.rank != 0):
            batch = [request.args for request in requests[start : start + self.batch_size]]
            for_all = batch[0][2]
            groups = [[one] for one in batch] if any(one[2] != for_all for one in batch) else [batch]
            for group in groups:
                answers += self._answer(group)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), answer)
        return answers

    def _answer(self, batch: list[tuple]) -> list[str]:
        chats = []
        for _, to_messages, _, doc_id, task, split in batch:
            messages = to_messages(self.task_dict[task][split][doc_id])
            chats.append(_conversation(ChatMessages(messages=messages)))
        wishes = dict(batch[0][2])
        until = wishes.pop("until", [])
        options = {name: wishes[name] for name in ("max_new_tokens", "num_beams") if name in wishes}
        if wishes.get("do_sample") or wishes.get("temperature"):
            options |= {name: wishes[name] for name in ("temperature", "top_p") if wishes.get(name)} | {
                "do_sample": True
            }
        inputs = self.processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        ).to(self.model.device, self.model.dtype)
        output = self.model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 256, **options})
        if getattr(self.model.config, "use_decoder_only_language_model", True):  # else it is the answer alone
            output = output[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.post_process_image_text_to_text(output)
        for stop in [until] if isinstance(until, str) else until:
            texts = [text.split(stop)[0] if stop else text for text in texts]
        return texts

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        raise NotImplementedError("bt_adapter answers tasks of generation only.")

    def generate_until_multi_round(self, requests: list) -> list[str]:
        raise NotImplementedError("bt_adapter answers tasks of one round only.")


def _conversation(messages: ChatMessages) -> list[dict[str, Any]]:
    """Messages of lmms-eval as our processors take them."""
    found = []
    for message in messages.messages:
        parts = []
        for part in message.content:
            if part.type == "text":
                parts.append({"type": "text", "text": part.text})
            elif part.type in ("image", "video"):
                parts.append({"type": part.type, part.type: part.url})
            else:
                raise ValueError(f"bt_adapter takes text, images and videos, not {part.type}.")
        found.append({"role": message.role, "content": parts})
    return found
