"""What an adapter says of a model: its branch, its backbone and where the base model came from."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.compat_bt_adapter import resolve_revision
from ..models.configuration_bt_adapter import BTAdapterVisionConfig
from ..models.modeling_bt_adapter_vision import BTAdapterVisionModel
from .files import BRANCH_FIELDS, SIZES, AdapterConfig, lasting_name
from .fingerprint import backbone_fingerprint
from .host_modules import find_tower, is_quantized, learning_copy, parameter_value


def describe_adapter(
    model: PreTrainedModel, base_model_name_or_path: str | None = None, revision: str | None = None
) -> AdapterConfig:
    """The content of `bt_adapter_config.json` for the branch of a model; see `save_bt_adapter`."""
    tower = find_tower(model)
    if not isinstance(tower, BTAdapterVisionModel):
        raise ValueError(f"{type(model).__name__} has no BT-Adapter to save; attach one with get_bt_adapter_model.")
    config = tower.config
    if config.model_type != BTAdapterVisionConfig.model_type:
        raise ValueError(
            f"An adapter file is of a BT-Adapter's branch; this tower is a {type(tower).__name__}, which would not be "
            "the same again. Save the model, or the tower alone, with save_pretrained."
        )
    name, commit = loaded_from(model)
    base_model_name_or_path = lasting_name(base_model_name_or_path)
    return AdapterConfig(
        base_model_name_or_path=base_model_name_or_path or name,
        revision=revision or (commit if base_model_name_or_path in (None, name) else None),
        backbone={
            "model_type": config.backbone.model_type,
            "num_hidden_layers": config.num_hidden_layers,
            "image_size": config.image_size,
            **{size: getattr(config, size) for size in SIZES},
        },
        adapter_layers=list(config.adapter_layers),
        branch=branch_of(config),
        fingerprint=backbone_fingerprint(tower.vision_model, config.adapter_layers[-1]),
        model_type=model.config.model_type,
    )


def branch_of(config: BTAdapterVisionConfig) -> dict[str, Any]:
    """The fields of a tower's config that say what its branch is, besides the layers that feed it."""
    return {key: getattr(config, key) for key in sorted(BRANCH_FIELDS)}


def adapter_state(
    model: PreTrainedModel, extra_modules: Sequence[str] = (), dtype: torch.dtype | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors of the branch, and of other modules by their paths in the model, on the CPU, for `write_adapter`.

    Raises:
        ValueError: if one of them is quantized, or has LoRA in it.
    """

    def cpu_state(path: str, module: nn.Module) -> dict[str, torch.Tensor]:
        module, state = learning_copy(module), {}
        if is_quantized(module):
            raise ValueError(f"{path} is quantized: an adapter holds trained weights as they are.")
        for key in module.state_dict():
            if ".lora_" in f".{key}" or "base_layer." in key:
                raise ValueError(
                    f"peft has put LoRA into {path}: merge it (merge_and_unload) before saving, and keep LoRA to the "
                    "language model (target_modules)."
                )
            owner, _, leaf = key.rpartition(".")
            value = parameter_value(module.get_submodule(owner), leaf).detach()
            cast = dtype if dtype and value.is_floating_point() else value.dtype
            state[key] = value.to(device="cpu", dtype=cast, copy=True).contiguous()
        return state

    extra = {
        f"{path}.{key}": value
        for path in extra_modules
        for key, value in cpu_state(path, model.get_submodule(path)).items()
    }
    return cpu_state("the branch", find_tower(model).bt_adapter), extra


def loaded_from(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """Name of the checkpoint that a model, or the backbone in it, came from, and its commit if it is on the Hub.

    Of a folder it is the absolute path.
    """
    known = getattr(model, "_loaded_from", None)
    if known is not None:
        return known
    for config in (model.config, find_tower(model).config):
        for part in (getattr(config, "backbone", config), config):
            if name := getattr(part, "_name_or_path", ""):
                return lasting_name(name), getattr(resolve_revision(name, local_files_only=True), "resolved", None)
    return None, None
