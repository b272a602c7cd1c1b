"""Finding, reading and filling parts of a model, also where peft wraps them and where accelerate offloads them."""

import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.modeling_bt_adapter_branch import BACKBONES
from ..models.modeling_bt_adapter_vision import BTAdapterVisionModel


def find_tower(model: nn.Module) -> PreTrainedModel:
    """The one vision model inside `model` that has a branch or takes one: a tower, or a native vision model.

    Raises:
        ValueError: if there is none, or several.
    """
    natives = tuple(family.model_class for family in BACKBONES.values())
    for kinds in (BTAdapterVisionModel, natives):
        found = [module for module in model.modules() if isinstance(module, kinds)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{type(model).__name__} has {len(found)} vision models; pass the one that is meant.")
    raise ValueError(
        f"{type(model).__name__} has no vision model that takes a BT-Adapter: "
        + ", ".join(kind.__name__ for kind in natives)
        + "."
    )


def has_branch(model: nn.Module) -> bool:
    """Whether there is a BT-Adapter in it; the model of GIF question answering may have an X-CLIP instead."""
    return any(isinstance(module, BTAdapterVisionModel) for module in model.modules())


def path_of(model: nn.Module, module: nn.Module) -> str:
    """Path of a module inside a model."""
    return next(path for path, found in model.named_modules() if found is module)


def projector_path(model: nn.Module) -> str:
    """Path of the layer between the vision model, or its Q-Former, and the language model."""
    names = ("multi_modal_projector", "language_projection")
    return next(path for path, _ in model.named_modules() if path.rpartition(".")[2] in names)


# ---------------------------------------------------------------------------------------------------------------- peft


def is_peft_model(model: nn.Module) -> bool:
    # A model that peft wraps exists only where peft has been imported; importing it here takes seconds.
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def learning_copy(module: nn.Module) -> nn.Module:
    """The module itself, or the copy in use where peft has wrapped it for training (`modules_to_save`).

    Raises:
        ValueError: if peft has several adapters in use.
    """
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    active = list(module.active_adapters)
    if len(active) != 1:
        raise ValueError(f"peft has {len(active)} adapters in use ({', '.join(active)}); activate one (set_adapter).")
    return copies[active[0]]


# ---------------------------------------------------------------------------------------------------------- parameters


def is_quantized(module: nn.Module) -> bool:
    """Whether bitsandbytes has quantized a parameter of it."""
    return any(type(parameter).__name__ in ("Params4bit", "Int8Params") for parameter in module.parameters())


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its parameters are, or where accelerate moves them for each call."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def offloaded_value(module: nn.Module, leaf: str) -> torch.Tensor | None:
    """The copy of a parameter that accelerate moves to its device for each call only; None if there is none."""
    weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    return weights[leaf] if weights is not None and leaf in weights else None


def parameter_value(module: nn.Module, leaf: str) -> Any:
    """A parameter or buffer of the module, also an offloaded one; on the meta device if it is nowhere."""
    value = getattr(module, leaf, None)
    if value is not None and value.is_meta:
        offloaded = offloaded_value(module, leaf)
        return value if offloaded is None else offloaded
    return value


@torch.no_grad()
def fill_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Overwrites a parameter, also an offloaded one."""
    path, _, leaf = name.rpartition(".")
    parameter_value(model.get_submodule(path), leaf).copy_(value)


def is_writable(module: nn.Module, leaf: str) -> bool:
    """Whether [`fill_parameter`] would last: a parameter on the disk is read anew for each call."""
    if not getattr(module, leaf).is_meta:
        return True
    first, second = offloaded_value(module, leaf), offloaded_value(module, leaf)
    return first is not None and first.data_ptr() == second.data_ptr()
