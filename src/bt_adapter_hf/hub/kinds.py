"""What a folder or a repository holds, in words: for errors where something else was expected."""

import os
from pathlib import Path

from ..adapters.files import CONFIG_NAME, PEFT_CONFIG_NAME
from ..models.configuration_bt_adapter import BTAdapterConfig, BTAdapterVisionConfig
from .contents import CHAT_CLASSES, read_json


_MODELS = {
    BTAdapterConfig.model_type: "a dual encoder",
    BTAdapterVisionConfig.model_type: "a video tower",
    **dict.fromkeys(CHAT_CLASSES, "a chat model with its adapter in"),
}


def wrong_kind(name: str | os.PathLike, model_type: str | None, expected: str) -> ValueError:
    """The error that says what there is in the place of what was expected."""
    if model_type is not None:
        found = f"{_MODELS.get(model_type, 'a model')} of type '{model_type}'"
    else:
        found = holding(Path(name)) if os.path.isdir(name) else "no model: it has no config.json with a model_type"
    return ValueError(f"'{name}' holds {found}; expected {expected}.")


def holding(folder: Path) -> str:
    """What is in a folder."""
    if (folder / "config.json").is_file():
        model_type = read_json(folder / "config.json").get("model_type")
        if model_type is None:
            return "a config.json without the type of a model"
        return f"{_MODELS.get(model_type, 'a model')} of type '{model_type}'"
    if (folder / CONFIG_NAME).is_file():
        model_type = read_json(folder / CONFIG_NAME).get("model_type")
        kind = "LoRA with a branch" if (folder / PEFT_CONFIG_NAME).is_file() else "an adapter"
        return kind if model_type is None else f"{kind} of a model of type '{model_type}'"
    if (folder / PEFT_CONFIG_NAME).is_file():
        return "LoRA of peft without a branch"
    names = sorted(path.name for path in folder.iterdir())
    if "index.json" in names and any(name.startswith("part-") for name in names):
        return "an index of videos"
    if "trained.safetensors" in names:
        return "a checkpoint of a training run, which --resume goes on from, and no finished model"
    if any(name.startswith("checkpoint-") for name in names):
        return "a training run that has not come to its end (go on with --resume), and no finished model"
    if any(name in names for name in ("processor_config.json", "preprocessor_config.json", "tokenizer.json")):
        return "a processor and no model"
    return f"only {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}" if names else "no file at all"
