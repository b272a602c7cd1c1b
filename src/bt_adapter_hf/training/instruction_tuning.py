"""Instruction tuning of the chat models: the projector and the branch learn, and by LoRA the language model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..adapters.host_modules import find_tower, has_branch, is_peft_model, is_quantized, projector_path
from ..import_utils import require_package
from ..models.modeling_bt_adapter_chat import BTAdapterChatMixin
from .arguments import InstructionArguments
from .blank_visuals import blank_row, shows, with_blank
from .resumable import ResumableTrainer


def prepare_for_tuning(model: PreTrainedModel, lora: Mapping[str, Any] | None = None) -> nn.Module:
    """Chooses what learns: the branch and the projector, in float32; all else is frozen.

    Args:
        model: a chat model of ours; quantized with `lora` only (QLoRA).
        lora: fields of `peft.LoraConfig`, such as `{"r": 16, "lora_alpha": 32}`, for LoRA on the language model; see
            [`lora_config`].

    Returns:
        The model; with `lora` a peft model around it.

    Raises:
        ValueError: if the model is no chat model with a branch, its language model is an encoder-decoder, or it is
            quantized and there is no `lora`.
    """
    if not isinstance(model, BTAdapterChatMixin):
        raise ValueError(
            f"{type(model).__name__} is no chat model with a BT-Adapter: load one with from_pretrained, or attach the "
            "adapter with load_bt_adapter or get_bt_adapter_model first."
        )
    if model.config.get_text_config().is_encoder_decoder:
        raise ValueError(
            f"The language model is a {model.config.get_text_config().model_type}, an encoder with a decoder; "
            "instruction tuning is for those that go on from a prompt, such as Llama and Vicuna."
        )
    model.requires_grad_(False)
    if lora is not None:
        require_package("peft", "train")
        import peft

        from ..adapters.lora import lora_config

        if is_quantized(model):
            # activation checkpointing is Trainer's to switch on
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = peft.get_peft_model(model, lora_config(model, **lora))
    elif is_quantized(model):
        raise ValueError("The language model is quantized: it takes LoRA to train such a model (lora, --lora).")
    else:
        if has_branch(model):
            find_tower(model).bt_adapter.requires_grad_(True)
        model.get_submodule(projector_path(model)).requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # small steps would be lost in half precision
    return model


class InstructionTrainer(ResumableTrainer):
    """Tunes what [`prepare_for_tuning`] has chosen on the batches of `InstructionCollator`.

    The loss is the mean over the tokens of all answers of a step, on all processes and over all accumulated batches.
    With a validation set `eval_loss` is measured.

    Conversations about videos, about images and of words alone may stand in one table, in any mixture. A batch without
    a video gets a blank one (see `blank_visuals`): it costs one row more, and adds nothing to the loss.

    `save_model()` writes the whole model for `from_pretrained`; with `args.adapter_only` an adapter with the projector
    in it, and of a peft model LoRA, branch and projector, both for `load_bt_adapter`. The processor, passed as
    `processing_class`, goes with it. All else as in `ResumableTrainer`.

    Raises:
        ValueError: for `adapter_only` with a peft model, of which the whole is what `save_model` writes.
    """

    args: InstructionArguments

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.adapter_only and is_peft_model(self.model):
            raise ValueError(
                "adapter_only would leave LoRA out: without it LoRA, branch and projector are written, and nothing "
                "else."
            )
        self._blanks: dict[str, dict[str, Any]] = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        self.take_broken(inputs, len(inputs["input_ids"]), "train" if model.training else "eval")
        inputs = self._with_blanks(inputs, model.training)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _with_blanks(self, inputs: dict[str, Any], training: bool) -> dict[str, Any]:
        """A batch of which all that learns takes part, in the same order on every process that shares its layers."""
        wanted = {"image": False, "video": training}
        if self.is_fsdp_enabled:  # each layer is put together by all processes, whenever one of them runs it
            own = torch.tensor([wanted[kind] or shows(inputs, kind) for kind in wanted], device=self.args.device)
            anywhere = self.accelerator.reduce(own.float(), reduction="sum").tolist()
            wanted = {kind: count > 0 for kind, count in zip(wanted, anywhere, strict=True)}
        dataset = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        for kind, is_wanted in wanted.items():
            if is_wanted and not shows(inputs, kind):
                if kind not in self._blanks:
                    self._blanks[kind] = blank_row(kind, dataset.processor, dataset.states)
                inputs = with_blank(inputs, self._blanks[kind])
        return inputs

    def _adapter_modules(self) -> list[str] | None:
        return [projector_path(self.model)] if self.args.adapter_only else None

    def _write_result(self, folder: Path, rehearsal: bool = False) -> None:
        if self.args.adapter_only:
            self._write_adapter(folder)
        else:
            super()._write_result(folder, rehearsal)
