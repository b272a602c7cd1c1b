"""Whether an adapter fits a model, with all its layers or the first ones; and filling a branch that is there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..models.configuration_bt_adapter import BTAdapterVisionConfig
from .files import CONFIG_NAME, WEIGHTS_NAME, AdapterConfig, AdapterError, check_extra_names, read_weights
from .fingerprint import check_backbone
from .host_modules import fill_parameter, find_tower, is_quantized, is_writable, learning_copy, path_of
from .whole_models import is_whole_model, read_branch_of_model


logger = logging.get_logger(__name__)


def tower_config(
    config: PreTrainedConfig, adapter: AdapterConfig, overrides: dict[str, Any], keep: bool = False
) -> BTAdapterVisionConfig:
    """The tower that this host and this adapter make: the adapter's first layers, as far as the host reads.

    Args:
        config: of the host.
        overrides: fields of the tower that are not to be the adapter's.
        keep: the host has a branch, and has a use for what that has: such parts of the adapter's are not left out.
    """
    backbone, own = config.vision_config.backbone, adapter.adapter_layers
    asked = overrides.pop("adapter_layers", None)
    top = config.last_state(backbone.num_hidden_layers)
    if asked is None and top < backbone.num_hidden_layers and own[-1] >= top:
        asked = [layer for layer in own if layer < top]
        if not asked:
            raise AdapterError(
                f"The adapter is fed by the backbone layers {own}; this model reads its image tower after layer "
                f"{top - 1} of {backbone.num_hidden_layers}, so none of it can be attached."
            )
    layers = fit_layers(adapter, backbone, asked)
    saved = {**branch_fields(adapter, len(layers)), **overrides}
    fields = config.fit_branch(saved)
    if keep:
        fields |= {name: value for name, value in saved.items() if getattr(config.vision_config, name) == value}
    return BTAdapterVisionConfig(backbone=backbone, adapter_layers=layers, **fields)


def read_branch(
    folder: Path, config: AdapterConfig, branch: nn.Module
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What a folder holds for this branch, which may lack the adapter's later layers and its output gate.

    Returns:
        State dict of the branch, and the tensors of extra modules by their path.

    Raises:
        AdapterError: if the file is damaged or has other tensors.
    """
    state, extra = (read_branch_of_model(folder), {}) if is_whole_model(folder) else read_weights(folder)
    if len(branch.layers) < len(config.adapter_layers):
        state = first_layers(state, len(branch.layers))
    if branch.output_gate is None and config.branch.get("output_fusion") == "gate":
        state.pop("output_gate", None)
    check_branch(folder, state, branch)
    return state, extra


def first_layers(state: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The entries of a branch's state dict that its first `count` layers need."""
    kept = {}
    for key, value in state.items():
        if key.startswith("layers.") and int(key.split(".")[1]) >= count:
            continue
        if key == "fusion_gate" and count == 1:  # there is no second layer to take in the backbone
            continue
        kept[key] = value
    return kept


def fit_layers(config: AdapterConfig, backbone: PreTrainedConfig, asked: Sequence[int] | None) -> list[int]:
    """The adapter's layers that the backbone has and the caller wants: a start of the adapter's own list."""
    depth, own = backbone.num_hidden_layers, config.adapter_layers
    layers = [layer for layer in own if layer < depth]
    if asked is not None:
        asked = list(asked)
        if not asked or asked != own[: len(asked)]:
            raise AdapterError(
                f"adapter_layers={asked} is no start of the adapter's layers {own}: a branch layer needs the ones "
                "before it."
            )
        if asked[-1] >= depth:
            raise AdapterError(f"adapter_layers={asked} reaches beyond the backbone's {depth} layers.")
        layers = asked
    if not layers:
        raise AdapterError(
            f"The adapter is fed by the backbone layers {own}; the model has {depth} layers, so none of it can be "
            f"attached. It was trained on a {config.backbone.get('model_type')} of "
            f"{config.backbone.get('num_hidden_layers')} layers."
        )
    if asked is None and len(layers) < len(own):
        logger.warning(
            f"The adapter is fed by the backbone layers {own} and the model has {depth}: its first {len(layers)} "
            "branch layers are attached."
        )
    return layers


def branch_fields(config: AdapterConfig, count: int) -> dict[str, Any]:
    fields, K = dict(config.branch), len(config.adapter_layers)
    if count < K:  # every layer keeps its own rate of stochastic depth
        fields["drop_path_rate"] = fields["drop_path_rate"] * (count - 1) / (K - 1)
    return fields


def check_branch(folder: Path, state: Mapping[str, torch.Tensor], branch: nn.Module) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in branch.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    problems = [f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (
            ("missing", expected.keys() - found.keys()),
            ("without a place", found.keys() - expected.keys()),
            ("of another size", {key for key in expected.keys() & found.keys() if expected[key] != found[key]}),
        )
        if keys
    ]  # fmt: skip
    if problems:
        raise AdapterError(
            f"{folder / WEIGHTS_NAME} does not hold the branch that {CONFIG_NAME} describes ({len(expected)} "
            "tensors): "
            + "; ".join(problems)
            + ". The two files do not belong together, or one is damaged: download or save them again."
        )


def check_extra(
    folder: Path, config: AdapterConfig, extra: Mapping[str, torch.Tensor], model: nn.Module
) -> dict[str, nn.Module]:
    """The modules of the model that the adapter's extra tensors fill, by their path."""
    check_extra_names(config.extra_modules, folder)
    modules, expected = {}, {}
    for path in config.extra_modules:
        try:
            modules[path] = learning_copy(model.get_submodule(path))
        except AttributeError as error:
            raise AdapterError(
                f"{folder} brings the trained module {path!r}, which {type(model).__name__} does not have."
            ) from error
        if is_quantized(modules[path]):
            raise AdapterError(
                f"{folder} brings the trained module {path!r}, which is quantized in the model. Keep it out of it "
                "(bt_adapter_hf.quantization_config)."
            )
        expected |= {f"{path}.{key}": t.shape for key, t in modules[path].state_dict().items()}
    wrong = [k for k in expected.keys() | extra.keys() if k not in extra or extra[k].shape != expected.get(k)]
    if wrong:
        raise AdapterError(
            f"{folder} brings trained modules that do not fit {type(model).__name__}: {', '.join(sorted(wrong)[:3])}."
        )
    for path, module in modules.items():
        for name, _ in module.named_parameters():
            owner, _, leaf = name.rpartition(".")
            if not is_writable(module.get_submodule(owner), leaf):
                raise AdapterError(
                    f"{folder} brings the trained module {path!r}, which the model has on the disk. Keep it on a "
                    "device or the CPU (device_map)."
                )
    if modules:
        logger.warning(f"{folder} also replaces the weights of {', '.join(modules)} in the {type(model).__name__}.")
    return modules


def fill_branch(
    model: nn.Module, folder: Path, adapter: AdapterConfig, allow_backbone_mismatch: bool = False
) -> list[str]:
    """Copies an adapter's tensors into the branch of a model, which has the adapter's shape already.

    Returns:
        Names of the tensors that were filled.
    """
    tower = find_tower(model)
    check_backbone(folder, adapter, tower.vision_model, allow_backbone_mismatch)
    state, extra = read_branch(folder, adapter, tower.bt_adapter)
    check_extra(folder, adapter, extra, model)
    prefix = path_of(model, tower.bt_adapter)
    values = {f"{prefix}.{key}" if prefix else key: value for key, value in state.items()} | extra
    for name, value in values.items():
        fill_parameter(model, name, value)
    return list(values)
