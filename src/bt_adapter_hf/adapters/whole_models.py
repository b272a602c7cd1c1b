"""A folder that holds a whole tower, dual encoder or pretraining run of ours, taken as an adapter: its branch."""

import json
from pathlib import Path

import torch

from ..models.configuration_bt_adapter import BTAdapterConfig, BTAdapterVisionConfig
from ..models.modeling_bt_adapter import BTAdapterModel
from ..models.modeling_bt_adapter_vision import BTAdapterVisionModel
from .damage import damage_of
from .description import describe_adapter
from .files import CONFIG_NAME, SUMMARY_NAME, AdapterConfig, AdapterError, is_peft_folder, tensors


def is_whole_model(folder: Path) -> bool:
    """Whether a branch can be taken out of the model in a folder. Where an adapter lies beside it, that is taken."""
    if (folder / CONFIG_NAME).is_file() or is_peft_folder(folder) or not (folder / "config.json").is_file():
        return False
    if damage := damage_of(folder / "config.json"):
        raise AdapterError(f"{damage}.")
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content.get("model_type") in (BTAdapterConfig.model_type, BTAdapterVisionConfig.model_type)


def read_config(folder: Path) -> AdapterConfig:
    """What the adapter in a folder says; of a whole model what it would say, fingerprint included.

    Raises:
        AdapterError: if there is no adapter, or it is damaged.
    """
    if not is_whole_model(folder):
        return AdapterConfig.read(folder)
    return describe_adapter(load_tower(folder), *base_of_run(folder))


def load_tower(folder: Path, dtype: torch.dtype | str = "auto") -> BTAdapterVisionModel:
    """The tower of a whole model."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if content["model_type"] == BTAdapterConfig.model_type:
        model = BTAdapterModel.from_pretrained(folder, dtype=dtype)
        model.vision_model._loaded_from = model._loaded_from
        return model.vision_model
    return BTAdapterVisionModel.from_pretrained(folder, dtype=dtype)


def base_of_run(folder: Path) -> tuple[str | None, str | None]:
    """Name and revision of what a training run started from; of a folder without its summary (None, None)."""
    path = folder / SUMMARY_NAME
    if not path.is_file():
        return None, None
    if damage := damage_of(path):
        raise AdapterError(f"{damage}.")
    summary = json.loads(path.read_text(encoding="utf-8"))
    return summary.get("model"), summary.get("revision")


def read_branch_of_model(folder: Path) -> dict[str, torch.Tensor]:
    """The branch in the safetensors of a whole model."""
    branch = {}
    for path in sorted(folder.glob("*.safetensors")):
        for key, tensor in tensors(path, "bt_adapter."):
            branch[f".{key}".partition(".bt_adapter.")[2]] = tensor
    return branch
