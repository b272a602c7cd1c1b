"""Instruction tuning of the chat models: the projector and the branch learn, and by LoRA the language model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..adapters.host_modules import find_tower, is_peft_model, is_quantized
from ..adapters.verbs import save_bt_adapter
from ..import_utils import require_package
from ..models.modeling_bt_adapter_chat import BTAdapterChatMixin
from .arguments import ResumableArguments
from .resumable import ResumableTrainer


@dataclass
class InstructionArguments(ResumableArguments):
    """`ResumableArguments` with the values of the released tuning as defaults.

    These are AdamW with a learning rate of 2e-5 for the projector and the branch alike, without weight decay, a cosine
    after a warm-up over 3 % of the steps, gradients clipped at norm 1, and three epochs. The released global batch was
    8 x 1 conversations.

    Args:
        adapter_only (`bool`, *optional*, defaults to `False`):
            Write only the branch and the projector at the end, as an adapter for `load_bt_adapter`, and not the whole
            model.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "Base learning rate; see lr_multipliers."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay on every trained parameter."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Number of passes over the training table."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps, or below 1 their share of all steps."})
    hub_strategy: str = field(default="end", metadata={"help": "When to push to the Hub."})
    adapter_only: bool = field(default=False, metadata={"help": "Write the branch and the projector only."})


def projector_path(model: nn.Module) -> str:
    """Path of the layer between the vision model, or its Q-Former, and the language model."""
    names = ("multi_modal_projector", "language_projection")
    return next(path for path, _ in model.named_modules() if path.rpartition(".")[2] in names)


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

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        self.take_broken(inputs, len(inputs["input_ids"]), "train" if model.training else "eval")
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        is_checkpoint = _internal_call and output_dir is not None
        if is_checkpoint or not self.args.adapter_only:
            return super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            save_bt_adapter(model, output_dir, extra_modules=[projector_path(model)])
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
