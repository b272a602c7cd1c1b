"""Checkpoints that hold only what is trained.

The frozen part is the base model's; a checkpoint records a digest of it and refuses to be laid over another one.
"""

import hashlib
import json
import os
import re
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME


TRAINED_WEIGHTS_NAME = "trained.safetensors"
_SAMPLES = 64  # values of each frozen tensor in the digest


def frozen_digest(model: nn.Module) -> str:
    """sha256 over name, shape and a few evenly spaced values (as float32) of every frozen parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            values = parameter.detach().flatten()[:: max(1, parameter.numel() // _SAMPLES)]
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            digest.update(values.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def save_trained(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the trainable parameters of `model` to `folder/trained.safetensors`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trained = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    save_file(trained, folder / TRAINED_WEIGHTS_NAME, metadata={"format": "pt", "frozen_digest": frozen_digest(model)})


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
            parameter.copy_(found[name])


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest complete `checkpoint-N` folder, or None.

    A run that was killed while it saved leaves a folder without a readable trainer state, which is written last.
    """
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if step and (folder / TRAINED_WEIGHTS_NAME).is_file() and _is_json(folder / TRAINER_STATE_NAME):
            found.append((int(step.group(1)), str(folder)))
    return max(found)[1] if found else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True
