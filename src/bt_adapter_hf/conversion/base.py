"""The base of a conversion: what a released checkpoint does not hold, from an image model or its config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from ..adapters.host_modules import find_tower
from ..models.configuration_bt_adapter import BACKBONE_TYPES
from ..models.modeling_bt_adapter_vision import BTAdapterVisionModel
from .names import BRANCH, COMPLETE
from .reading import CheckpointError


def lend(
    state: dict[str, torch.Tensor], base: Mapping[str, torch.Tensor], prefix: str, title: str, notes: list[str]
) -> None:
    lent = {key: tensor.clone() for key, tensor in base.items() if key.startswith(prefix) and key not in state}
    state.update(lent)
    if lent:
        notes.append(f"{len(lent)} tensors of {title} come from the base.")


def is_partial(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a base must lend weights: no complete backbone, or no text tower."""
    return COMPLETE not in state or not any(key.startswith("text_model.") for key in state)


def read_base(base: Any, weights: bool, **hub: Any) -> tuple[PreTrainedConfig | None, dict[str, torch.Tensor]]:
    """The base's config, and its tensors under the names of the dual encoder (without any branch)."""
    if base is None:
        return None, {}
    if isinstance(base, PreTrainedConfig):
        return base, {}
    if isinstance(base, (str, Path)):
        if not weights or _has_config_only(Path(base)):
            return AutoConfig.from_pretrained(base, **hub), {}
        base = AutoModel.from_pretrained(base, **hub)
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"base is a {type(base).__name__}; pass a Hub id, a folder, a model or a config.")
    tower = find_tower(base)
    state = {f"vision_model.{key}": tensor for key, tensor in tower.state_dict().items()}
    if not isinstance(tower, BTAdapterVisionModel):
        state = {f"vision_model.{key}": tensor for key, tensor in state.items()}
    if hasattr(base, "text_projection") and hasattr(base, "visual_projection"):  # CLIPModel or BTAdapterModel
        for key, tensor in base.state_dict().items():
            if key.startswith(("text_model.", "text_projection.", "visual_projection.", "logit_scale")):
                state[key] = tensor
        config = base.config
    else:
        config = tower.config
    return config, {key: tensor.detach() for key, tensor in state.items() if not key.startswith(BRANCH)}


def backbone_config(config: PreTrainedConfig | None) -> PreTrainedConfig | None:
    """The native vision config inside a config of any of the bases."""
    while config is not None and config.model_type not in BACKBONE_TYPES:
        inner = getattr(config, "vision_config", None) or getattr(config, "backbone", None)
        if inner is None:
            raise CheckpointError(f"The base, a {config.model_type!r}, has no vision model that takes a BT-Adapter.")
        config = inner
    return config


def _has_config_only(folder: Path) -> bool:
    """It says the sizes, and lends nothing."""
    return (folder / "config.json").is_file() and not any(
        path.suffix in (".safetensors", ".bin") for path in folder.iterdir()
    )
