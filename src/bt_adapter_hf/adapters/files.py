"""Adapter files: their format, and whether they fit a model.

An adapter is a folder, local or on the Hub: `bt_adapter_config.json`, and `bt_adapter.safetensors` with the branch
under keys that name no host. Where LoRA was trained with the branch, peft's two files hold the weights of both, and
`bt_adapter_config.json` lies beside them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..models.configuration_bt_adapter import BTAdapterVisionConfig
from .host_modules import is_quantized, is_writable, learning_copy
from .writing import written_whole


logger = logging.get_logger(__name__)

CONFIG_NAME = "bt_adapter_config.json"
WEIGHTS_NAME = "bt_adapter.safetensors"
PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"

# Sizes that the branch's tensors depend on, and with them the backbone's own.
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size")
BRANCH_FIELDS = (
    BTAdapterVisionConfig.__dataclass_fields__.keys()
    - PreTrainedConfig.__dataclass_fields__.keys()
    - {"backbone", "adapter_layers"}
)
_EXTRA = "extra_modules."


class AdapterError(ValueError):
    """An adapter cannot be read, or does not belong to the model; nothing was changed."""


@dataclass
class AdapterConfig:
    """Content of `bt_adapter_config.json`.

    Args:
        backbone: model type and sizes of the backbone.
        adapter_layers: backbone layers whose outputs feed the branch.
        branch: the other fields of [`BTAdapterVisionConfig`].
        fingerprint: see [`backbone_fingerprint`].
        base_model_name_or_path, revision: where the base model came from.
        extra_modules: other trained modules of the model in the file, by their path in it.
        model_type: of the model of ours that it was saved from.
    """

    backbone: dict[str, Any]
    adapter_layers: list[int]
    branch: dict[str, Any]
    fingerprint: dict[str, dict[str, Any]]
    base_model_name_or_path: str | None = None
    revision: str | None = None
    extra_modules: list[str] = field(default_factory=list)
    model_type: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "AdapterConfig":
        """Reads and checks the file.

        Raises:
            AdapterError: if it is missing, damaged, or names other fields.
        """
        path = folder / CONFIG_NAME
        if not path.is_file() and is_peft_folder(folder):
            raise AdapterError(
                f"{folder} holds LoRA weights of peft without {CONFIG_NAME}. If a branch was trained with them, put "
                "it beside the model first (from_pretrained or load_bt_adapter, as for the training), then call "
                "peft.PeftModel.from_pretrained(model, folder); without a branch in the model peft drops it silently."
            )
        if not path.is_file():
            raise AdapterError(
                f"{folder} holds no {CONFIG_NAME}: it is no BT-Adapter. A whole model is loaded with "
                "AutoModel.from_pretrained, and a released checkpoint is converted with `bt-adapter convert`."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            config = cls(**content)
        except (ValueError, TypeError) as error:
            raise AdapterError(f"{path} is damaged or of another version: {error}") from error
        unknown = config.branch.keys() - BRANCH_FIELDS
        if unknown:
            raise AdapterError(
                f"{path} has branch fields of another version: {sorted(unknown)}. Update bt_adapter_hf."
            )
        return config

    def to_json(self) -> str:
        """Content of the file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def is_peft_folder(folder: Path) -> bool:
    return (folder / PEFT_CONFIG_NAME).is_file()


def read_weights(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(the branch, extra modules by their path); of a folder of peft the branch alone, the rest is for peft to load"""
    path = folder / WEIGHTS_NAME
    of_peft = not path.is_file() and is_peft_folder(folder)
    if of_peft:
        path = folder / PEFT_WEIGHTS_NAME
    if not path.is_file():
        raise AdapterError(f"{folder} holds no {path.name}: the adapter is incomplete.")
    branch, extra = {}, {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if of_peft:
                    _, found, name = key.partition(".bt_adapter.")
                    if found:
                        branch[name] = file.get_tensor(key)
                elif key.startswith(_EXTRA):
                    extra[key.removeprefix(_EXTRA)] = file.get_tensor(key)
                else:
                    branch[key] = file.get_tensor(key)
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged or truncated: {error}. Download or save it again.") from error
    if of_peft and not branch:
        raise AdapterError(
            f"{path} holds no tensor of a branch: it was saved without one, or without modules_to_save=['bt_adapter', "
            "...], and what the branch learned is not in it. Train with the config of bt_adapter_hf.lora_config."
        )
    return branch, extra


def read_branch(
    folder: Path, config: AdapterConfig, branch: nn.Module
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What a folder holds for this branch, which may lack the adapter's later layers and its output gate.

    Returns:
        State dict of the branch, and the tensors of extra modules by their path.

    Raises:
        AdapterError: if the file is damaged or has other tensors.
    """
    state, extra = read_weights(folder)
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
    return modules


def write_adapter(
    folder: Path, config: AdapterConfig, state: Mapping[str, torch.Tensor], extra: Mapping[str, torch.Tensor]
) -> None:
    """Writes both files; the tensors are on the CPU. Each appears whole or not at all, the weights first."""
    state = dict(state) | {f"{_EXTRA}{key}": value for key, value in extra.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / CONFIG_NAME) as text, written_whole(folder / WEIGHTS_NAME) as weights:
        text.write_text(config.to_json(), encoding="utf-8")
        save_file(state, weights, metadata={"format": "pt"})
