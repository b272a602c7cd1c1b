"""Checkpoints that hold only what is trained, and the place in the data.

The frozen part is the base model's; a checkpoint records a digest of it and refuses to be laid over another one. It
records the table, the seeds and the configuration too, and refuses to go on in another order or as another model.
"""

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..adapters.fingerprint import weights_digest
from ..adapters.writing import written_whole
from .compat import TRAINER_STATE_NAME
from .sharding import sharded_like, whole


TRAINED_WEIGHTS_NAME = "trained.safetensors"
DATA_STATE_NAME = "data_state.json"
CONFIGURATION_KEY = "configuration"  # of the metadata of the weights


def frozen_digest(model: nn.Module) -> str:
    """sha256 over name, shape and a few evenly spaced values (as float32) of every frozen parameter.

    Of a sharded model all processes have to ask for it.
    """
    frozen = ((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)
    return weights_digest((name, whole(parameter.detach())) for name, parameter in frozen)


def save_trained(
    model: nn.Module, folder: str | os.PathLike, write: bool = True, configuration: dict[str, Any] | None = None
) -> None:
    """Write the trainable parameters of `model` to `folder/trained.safetensors`, and what the run is configured as.

    Of a sharded model all processes have to come here; the one that is to `write` does.
    """
    folder = Path(folder)
    trained = {
        name: whole(parameter.detach()).cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    digest = frozen_digest(model)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / TRAINED_WEIGHTS_NAME) as path:
            metadata = {"format": "pt", "frozen_digest": digest, CONFIGURATION_KEY: json.dumps(configuration or {})}
            save_file(trained, path, metadata=metadata)


def load_trained(model: nn.Module, folder: str | os.PathLike) -> None:
    """Load what `save_trained` wrote, into a model with the same frozen part and the same trainable parameters.

    Raises:
        ValueError: where there is no such file, or it is of another run: other parameters, other shapes, other frozen
            weights. Nothing has been loaded then.
    """
    path = Path(folder) / TRAINED_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {TRAINED_WEIGHTS_NAME}: it is not a checkpoint of a BTAdapterTrainer, or it was not "
            "written to the end."
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            expected_digest = (file.metadata() or {}).get("frozen_digest")
        found = load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): use an earlier checkpoint.") from error
    expected = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    misshapen = sorted(name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape)
    if missing or unknown or misshapen:
        raise ValueError(
            f"{path} is of another run: of {len(expected)} trained parameters {len(missing)} are missing "
            f"{missing[:3]}, {len(unknown)} are unknown here {unknown[:3]}, {len(misshapen)} have another shape "
            f"{misshapen[:3]}."
        )
    if expected_digest != frozen_digest(model):
        raise ValueError(
            f"{path} was trained on other frozen weights than this model has: start from the same base model, in the "
            "same dtype."
        )
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(sharded_like(found[name], parameter))


@dataclass(frozen=True)
class DataState:
    """The place of a run in its data.

    Attributes:
        consumed: rows trained on by all processes; the position in the order of the next one.
        steps: optimizer steps taken.
        processes: how many processes took them.
        data: what makes the order and the items: `source`, `fingerprint`, `rows` and `shards` of the table, and
            `order_seed`, `item_seed`, `chunk_rows`.
    """

    consumed: int
    steps: int
    processes: int
    data: dict[str, Any]


def save_data_state(state: DataState, folder: str | os.PathLike) -> None:
    """Write `state` to `folder/data_state.json`."""
    text = json.dumps(asdict(state), indent=2) + "\n"
    with written_whole(Path(folder) / DATA_STATE_NAME) as path:
        path.write_text(text, encoding="utf-8")


def load_data_state(folder: str | os.PathLike, data: dict[str, Any]) -> DataState:
    """What `save_data_state` wrote, for a run over the same `data`. The table may have moved: `source` may differ.

    Raises:
        ValueError: where there is no such file, or it is of another table, other seeds or other chunks.
    """
    path = Path(folder) / DATA_STATE_NAME
    if not _is_json(path):
        raise ValueError(
            f"{folder} holds no readable {DATA_STATE_NAME}: it is not a checkpoint, was written with save_only_model "
            "or by another version, or was not written to the end. A run cannot go on from it."
        )
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.keys() != DataState.__annotations__.keys() or found["data"].keys() != data.keys():
        raise ValueError(f"{path} was written by another version: it holds {found}. A run cannot go on from it.")
    state = DataState(**found)
    different = [name for name in data if name != "source" and state.data[name] != data[name]]
    if different:
        named = ["source", *different]
        raise ValueError(
            f"{folder} is of another run, over "
            + ", ".join(f"{name}={state.data[name]!r}" for name in named)
            + "; this run is over "
            + ", ".join(f"{name}={data[name]!r}" for name in named)
            + ". Resume with the same table and settings, or train into another folder."
        )
    return state


def is_complete(folder: str | os.PathLike) -> bool:
    """Whether a checkpoint was written to its end: its trainer state is readable, which is written last."""
    return (Path(folder) / TRAINED_WEIGHTS_NAME).is_file() and _is_json(Path(folder) / TRAINER_STATE_NAME)


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest complete `checkpoint-N` folder, or None. A run that was killed while it saved leaves others too."""
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if step and is_complete(folder):
            found.append((int(step.group(1)), str(folder)))
    return max(found)[1] if found else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True
