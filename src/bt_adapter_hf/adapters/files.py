"""Adapter files: their format.

An adapter is a folder, local or on the Hub: `bt_adapter_config.json`, and `bt_adapter.safetensors` with the branch
under keys that name no host. Where LoRA was trained with the branch, peft's two files hold the weights of both, and
`bt_adapter_config.json` lies beside them; `bt_adapter.safetensors` there is the branch before that training.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from ..models.configuration_bt_adapter import BTAdapterVisionConfig
from .damage import damage_of
from .writing import written_whole


CONFIG_NAME = "bt_adapter_config.json"
WEIGHTS_NAME = "bt_adapter.safetensors"
SUMMARY_NAME = "run_summary.json"  # of the training run that wrote a folder
PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"

# Sizes that the branch's tensors depend on, and with them the backbone's own.
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size")
BRANCH_FIELDS = (
    BTAdapterVisionConfig.__dataclass_fields__.keys()
    - PreTrainedConfig.__dataclass_fields__.keys()
    - {"backbone", "adapter_layers"}
)
_EXTRA = "extra_modules."
# Modules that an adapter may bring besides the branch: the projectors of the chat models and the head of pretraining.
EXTRA_MODULES = ("multi_modal_projector", "language_projection", "mbta_head")


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
        base_model_name_or_path, revision: where the base model came from: an id of the Hub and its commit, or the
            absolute path of a folder.
        extra_modules: other trained modules of the model in the file, by their path in it.
        model_type: of the model of ours that it was saved from.
    """

    backbone: dict[str, Any]
    adapter_layers: list[int]
    branch: dict[str, Any]
    fingerprint: dict[str, Any]
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
        if damage := damage_of(path):
            raise AdapterError(f"{damage}.")
        content = json.loads(path.read_text(encoding="utf-8"))
        try:
            config = cls(**content)
            if not (isinstance(config.branch, dict) and isinstance(config.adapter_layers, list)):
                raise TypeError("branch is no object, or adapter_layers no list")
        except (ValueError, TypeError) as error:
            raise AdapterError(f"{path} is damaged or of another version: {error}") from error
        unknown = config.branch.keys() - BRANCH_FIELDS
        if unknown:
            raise AdapterError(
                f"{path} has branch fields of another version: {sorted(unknown)}. Update bt_adapter_hf."
            )
        return config

    @classmethod
    def of_peft(cls, content: Mapping[str, Any]) -> "AdapterConfig":
        """What `adapter_config.json` of peft says, of a model without a branch."""
        base, revision = (content.get(name) for name in ("base_model_name_or_path", "revision"))
        return cls({}, [], {}, {}, base_model_name_or_path=base, revision=revision)

    def to_json(self) -> str:
        """Content of the file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def lasting_name(name: str | os.PathLike | None) -> str | None:
    """The name of a model as files keep it: a folder's absolute path, which holds elsewhere; an id as it is."""
    if name is None:
        return None
    return os.path.abspath(name) if os.path.isdir(name) else os.fspath(name)


def is_peft_folder(folder: Path) -> bool:
    return (folder / PEFT_CONFIG_NAME).is_file()


def has_branch_file(folder: Path) -> bool:
    """Of a folder of peft: whether the branch as it was before tuning lies beside what was tuned."""
    return (folder / WEIGHTS_NAME).is_file()


def check_extra_names(paths: Sequence[str], what: object) -> None:
    """An adapter may bring the modules between the image tower and the language model, and nothing else of a model.

    Raises:
        AdapterError: if it names another one.
    """
    other = [path for path in paths if path.rpartition(".")[2] not in EXTRA_MODULES]
    if other:
        raise AdapterError(
            f"{what} names {', '.join(map(repr, other))} among extra_modules. Besides the branch an adapter brings "
            f"{' or '.join(EXTRA_MODULES)} only; weights of other modules belong into a checkpoint of the model."
        )


def read_weights(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(the branch, extra modules by their path); of a folder of peft both as they were before tuning, if it has them

    What was tuned is for peft to load.
    """
    if is_peft_folder(folder):
        tuned = {}
        for key, tensor in tensors(folder / PEFT_WEIGHTS_NAME, ".bt_adapter."):
            tuned[key.partition(".bt_adapter.")[2]] = tensor
        if not tuned:
            raise AdapterError(
                f"{folder / PEFT_WEIGHTS_NAME} holds no tensor of a branch: it was saved without one, or without "
                "modules_to_save=['bt_adapter', ...], and what the branch learned is not in it. Train with the config "
                "of bt_adapter_hf.lora_config."
            )
        if not has_branch_file(folder):
            return tuned, {}
    branch, extra = {}, {}
    for key, tensor in tensors(folder / WEIGHTS_NAME):
        if key.startswith(_EXTRA):
            extra[key.removeprefix(_EXTRA)] = tensor
        else:
            branch[key] = tensor
    return branch, extra


def tensors(path: Path, part: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a file that have this in their names."""
    if not path.is_file():
        raise AdapterError(f"{path.parent} holds no {path.name}: the adapter is incomplete.")
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if part in key:
                    yield key, file.get_tensor(key)
    except SafetensorError as error:
        damage = damage_of(path) or f"{path} is damaged or truncated ({error}): download or save it again"
        raise AdapterError(f"{damage}.") from error


def write_adapter(
    folder: Path, config: AdapterConfig, state: Mapping[str, torch.Tensor], extra: Mapping[str, torch.Tensor]
) -> None:
    """Writes both files; the tensors are on the CPU. Each appears whole or not at all, the weights first."""
    state = dict(state) | {f"{_EXTRA}{key}": value for key, value in extra.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / CONFIG_NAME) as text, written_whole(folder / WEIGHTS_NAME) as weights:
        text.write_text(config.to_json(), encoding="utf-8")
        save_file(state, weights, metadata={"format": "pt"})
