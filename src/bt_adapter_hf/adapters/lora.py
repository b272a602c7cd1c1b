"""LoRA and QLoRA on the language model, by peft, together with the branch and the projector."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..import_utils import require_package
from ..models.modeling_bt_adapter_chat import BTAdapterChatMixin
from .description import adapter_state, branch_of, describe_adapter
from .files import PEFT_WEIGHTS_NAME, AdapterConfig, AdapterError, tensors, write_adapter
from .host_modules import find_tower, has_branch, projector_path


require_package("peft", "train")

from peft import LoraConfig, PeftModel, get_peft_model_state_dict  # noqa: E402


class BTAdapterLoraConfig(LoraConfig):
    """A `LoraConfig` whose `save_pretrained`, which that of a peft model calls, also describes the branch.

    A model without a branch, which GIF question answering with X-CLIP is, is described by peft's files alone.

    With `bt_adapter_config.json` beside peft's files `load_bt_adapter` restores all of them in one call; with branch
    and projector as they were before tuning, peft's `disable_adapter()` gives that model again.
    """

    # No fields: peft writes its own file without them.
    branch_description: AdapterConfig | None = None
    tower_config: PreTrainedConfig  # the model's own: training changes it (`num_trained_frames`)
    before: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]  # branch and projector before tuning

    def remember(self, model: PreTrainedModel) -> None:
        """Takes down what the branch is, and with the projector what it holds before peft makes copies that learn."""
        if not has_branch(model):
            return
        description = describe_adapter(model)
        description.extra_modules = [projector_path(model)]
        self.branch_description = description
        self.tower_config = find_tower(model).config
        self.before = adapter_state(model, description.extra_modules)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        if self.branch_description is not None:
            self.branch_description.branch = branch_of(self.tower_config)
            write_adapter(Path(save_directory), self.branch_description, *self.before)


def lora_config(
    model: PreTrainedModel,
    *,
    target_modules: list[str] | None = None,
    modules_to_save: list[str] | None = None,
    **fields: Any,
) -> BTAdapterLoraConfig:
    """The config to give to `peft.get_peft_model`, for LoRA on the language model and whole training of the rest.

    Names such as "q_proj" are also those of layers in the image tower and in the branch; LoRA stays out of these here.

    Args:
        model: a chat model of ours, quantized or not.
        target_modules: names of linear layers of the language model; by default all but its output layer.
        modules_to_save: trained whole, besides the branch and the projector.
        fields: the other fields of `peft.LoraConfig`, `r` and `lora_alpha` among them.

    Raises:
        ValueError: if the model is no chat model with a branch, or its language model has no layer of such a name.
    """
    if not isinstance(model, BTAdapterChatMixin):
        raise ValueError(
            f"{type(model).__name__} is no chat model with a BT-Adapter: load one with from_pretrained, or attach the "
            "adapter with load_bt_adapter or get_bt_adapter_model first."
        )
    output = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if "language_model." in name and isinstance(module, (nn.Linear, Conv1D)) and module is not output
    }
    wanted = linear if target_modules is None else set(target_modules)
    if not wanted or wanted - linear:
        raise ValueError(
            f"The language model has no linear layers named {sorted(wanted - linear)}; it has {sorted(linear)}."
        )
    parts = ["bt_adapter"] if has_branch(model) else []
    config = BTAdapterLoraConfig(
        target_modules=rf"(?:.*\.)?language_model\.(?:.*\.)?(?:{'|'.join(sorted(wanted))})",
        modules_to_save=[*parts, projector_path(model).rpartition(".")[2], *(modules_to_save or [])],
        **fields,
    )
    config.remember(model)
    return config


def check_lora(folder: Path, empty: PreTrainedModel) -> None:
    """Compares what peft saved in a folder with a model, before anything of it is put into one.

    Args:
        empty: the model as it will be then, without weights: peft leaves traces in one that it wraps.

    Raises:
        AdapterError: if the model lacks a part that the folder has weights for, or the other way round.
    """
    saved = {key: tuple(tensor.shape) for key, tensor in tensors(folder / PEFT_WEIGHTS_NAME)}
    config = LoraConfig(**{**LoraConfig.from_pretrained(folder).to_dict(), "init_lora_weights": False})
    expected = {
        key: tuple(tensor.shape) for key, tensor in get_peft_model_state_dict(PeftModel(empty, config)).items()
    }
    wrong = sorted(key for key in saved.keys() | expected.keys() if saved.get(key) != expected.get(key))
    if wrong:
        raise AdapterError(
            f"{folder / PEFT_WEIGHTS_NAME} was saved from another model than a {type(empty).__name__} of this size: "
            f"{len(wrong)} tensors differ, among them {', '.join(wrong[:3])}."
        )


def load_lora(model: PreTrainedModel, folder: Path, description: AdapterConfig | None) -> PeftModel:
    """A peft model around a model with a branch, with all that peft saved in a folder; it learns on.

    Of a model without a branch there is no description. `check_lora` comes first.
    """
    config = BTAdapterLoraConfig(**LoraConfig.from_pretrained(folder).to_dict())
    config.remember(model)
    if description is not None:
        config.branch_description.base_model_name_or_path = description.base_model_name_or_path
        config.branch_description.revision = description.revision
    config.inference_mode = False  # peft saves it as True
    wrapped = PeftModel(model, config)
    wrapped.load_adapter(str(folder), "default", is_trainable=True)
    return wrapped.train(model.training)
