"""What kind of repository a folder makes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.files import CONFIG_NAME, PEFT_CONFIG_NAME
from ..models.configuration_bt_adapter import BTAdapterConfig, BTAdapterVisionConfig
from ..models.configuration_bt_adapter_chat import (
    BTAdapterInstructBlipConfig,
    BTAdapterLlavaConfig,
    BTAdapterMiniGPT4Config,
)


# model type -> start of the names of its classes
CHAT_CLASSES = {
    config.model_type: config.__name__.removesuffix("Config")
    for config in (BTAdapterLlavaConfig, BTAdapterInstructBlipConfig, BTAdapterMiniGPT4Config)
}


@dataclass(frozen=True)
class Contents:
    """What kind of repository a folder makes.

    Args:
        kind: "dual encoder", "tower", "chat model", "adapter", "LoRA adapter" or "processor".
        model_type: of the model, or of the model of ours that an adapter was saved from; None if that is not known.
        config: content of the file that describes it.
    """

    kind: str
    model_type: str | None
    config: dict[str, Any]

    @property
    def tower(self) -> dict[str, Any]:
        """Fields of the branch."""
        return self.config.get("branch") or self.config.get("vision_config") or self.config

    @property
    def backbone(self) -> dict[str, Any]:
        """Model type and sizes of the image tower."""
        return self.config["backbone"] if "branch" in self.config else self.tower["backbone"]

    @property
    def layers(self) -> list[int]:
        """Backbone layers that feed the branch."""
        return (self.config if "branch" in self.config else self.tower)["adapter_layers"]

    @property
    def image_size(self) -> int:
        """Side of a frame in pixels."""
        return self.backbone["image_size"]

    @classmethod
    def of(cls, folder: Path) -> "Contents":
        """Looks at the config files of a folder.

        Raises:
            ValueError: if it holds nothing of this package, or both a model and an adapter.
        """
        if (folder / "config.json").is_file() and (folder / CONFIG_NAME).is_file():
            raise ValueError(f"{folder} holds a model and an adapter: give each a folder of its own.")
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            model_type = config.get("model_type")
            kinds = {BTAdapterConfig.model_type: "dual encoder", BTAdapterVisionConfig.model_type: "tower"}
            kinds |= dict.fromkeys(CHAT_CLASSES, "chat model")
            if model_type not in kinds:
                raise ValueError(f"{folder} holds a model of type {model_type!r}, which is none of this package.")
            return cls(kinds[model_type], model_type, config)
        if (folder / CONFIG_NAME).is_file():
            config = read_json(folder / CONFIG_NAME)
            kind = "LoRA adapter" if (folder / PEFT_CONFIG_NAME).is_file() else "adapter"
            return cls(kind, config.get("model_type"), config)
        if (folder / "processor_config.json").is_file():
            return cls("processor", None, read_json(folder / "processor_config.json"))
        raise ValueError(
            f"{folder} holds no config.json, {CONFIG_NAME} or processor_config.json: it is no model, adapter or "
            "processor. Of a training run name the output folder, not a checkpoint in it."
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Save it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object.")
    return content
