"""What kind of repository a folder makes, and which of its files."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.damage import check_whole, damage_of
from ..adapters.files import (
    CONFIG_NAME,
    PEFT_CONFIG_NAME,
    PEFT_WEIGHTS_NAME,
    SUMMARY_NAME,
    WEIGHTS_NAME,
    AdapterConfig,
)
from ..models.configuration_bt_adapter import BTAdapterConfig, BTAdapterVisionConfig
from ..models.configuration_bt_adapter_chat import (
    BTAdapterInstructBlipConfig,
    BTAdapterLlavaConfig,
    BTAdapterMiniGPT4Config,
)
from ..models.configuration_bt_adapter_gif_qa import BTAdapterGifQAConfig
from .sentence_files import SENTENCE_NAMES


# model type -> start of the names of its classes
CHAT_CLASSES = {
    config.model_type: config.__name__.removesuffix("Config")
    for config in (BTAdapterLlavaConfig, BTAdapterInstructBlipConfig, BTAdapterMiniGPT4Config, BTAdapterGifQAConfig)
}


MODEL_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
# What save_pretrained of a model, an adapter (peft's too) or a processor writes, and what a run adds. By name: a
# folder may hold anything, and its owner may have forgotten it.
_NAMES = frozenset(
    f"""README.md {SUMMARY_NAME} losses.png
    config.json generation_config.json
    {CONFIG_NAME} {WEIGHTS_NAME} {PEFT_CONFIG_NAME} {PEFT_WEIGHTS_NAME}
    processor_config.json preprocessor_config.json video_preprocessor_config.json
    chat_template.jinja chat_template.json
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
    {" ".join(SENTENCE_NAMES)}
    vocab.json vocab.txt merges.txt tokenizer.model spiece.model sentencepiece.bpe.model""".split()
)
# Folders of a processor: templates beside the default one, and InstructBLIP's second tokenizer.
_TEMPLATES, _QFORMER_TOKENIZER = "additional_chat_templates", "qformer_tokenizer"


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
        """Backbone layers that feed the branch; none where there is no branch."""
        return (self.config if "branch" in self.config else self.tower).get("adapter_layers", [])

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
        if (folder / PEFT_CONFIG_NAME).is_file():  # of a model without a branch
            return cls("LoRA adapter", BTAdapterGifQAConfig.model_type, read_json(folder / PEFT_CONFIG_NAME))
        if (folder / "processor_config.json").is_file():
            return cls("processor", None, read_json(folder / "processor_config.json"))
        raise ValueError(
            f"{folder} holds no config.json, {CONFIG_NAME} or processor_config.json: it is no model, adapter or "
            "processor. Of a training run name the output folder, not a checkpoint in it."
        )


def belongs(name: str) -> bool:
    """Whether a path in a folder is that of something that a model, an adapter, a processor or a run is made of."""
    folder, _, file = name.rpartition("/")
    if folder == _TEMPLATES:
        return file.endswith(".jinja") and "/" not in file
    if folder not in ("", _QFORMER_TOKENIZER):
        return False
    return file in _NAMES or (not folder and MODEL_WEIGHTS.fullmatch(file) is not None)


def collect_files(folder: Path, include: Sequence[str] = ()) -> tuple[dict[str, Path], list[str]]:
    """The files of a folder that are published, by their path in it, and the names of what is left out.

    Args:
        include: further files, by their path in the folder or a pattern of paths.

    Raises:
        ValueError: if it is nothing of this package, its weights are missing, damaged, incomplete or pickles, or
            there is nothing of a name in `include`.
    """
    check_whole(folder)
    candidates = [*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*"), *folder.glob(f"{_QFORMER_TOKENIZER}/*")]
    names = {path.relative_to(folder).as_posix(): path for path in sorted(candidates)}
    files = {name: path for name, path in names.items() if belongs(name) and path.is_file()}
    for pattern in include:
        files |= _included(folder, pattern)
    for path in files.values():
        _check_inside(path, folder)
    folders = {name.partition("/")[0] for name in files if "/" in name}
    left_out = [name for name in names if name not in files and name not in folders]
    _check_weights(folder, files, left_out)
    return files, left_out


def _included(folder: Path, pattern: str) -> dict[str, Path]:
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts or not Path(pattern).parts:
        raise ValueError(
            f"'{pattern}' is no path in {folder}: name what is to be published by its path in the folder."
        )
    exact = folder / pattern
    found = [exact] if exact.is_file() else [path for path in sorted(folder.glob(pattern)) if path.is_file()]
    if not found:
        raise ValueError(f"{folder} holds no file '{pattern}', which was to be included.")
    return {path.relative_to(folder).as_posix(): path for path in found}


def _check_inside(path: Path, folder: Path) -> None:
    """A link could publish a file from anywhere. Those of the Hub's cache lead to its own folder of files."""
    target, own = path.resolve(), folder.resolve()
    cached = own.parent.name == "snapshots" and target.is_relative_to(own.parent.parent / "blobs")
    if not target.is_relative_to(own) and not cached:
        raise ValueError(
            f"{path} is a link to {target}, outside of the folder: copy the file there if it is to be published."
        )


def _check_weights(folder: Path, files: dict[str, Path], left_out: list[str]) -> None:
    contents = Contents.of(folder)
    if contents.kind in ("adapter", "LoRA adapter"):
        if (folder / CONFIG_NAME).is_file():
            AdapterConfig.read(folder)
        weights = [WEIGHTS_NAME if contents.kind == "adapter" else PEFT_WEIGHTS_NAME]
    elif contents.kind == "processor":
        weights = []
    elif "model.safetensors.index.json" in files:
        index = files["model.safetensors.index.json"].read_text(encoding="utf-8")
        weights = sorted(set(re.findall(r"model-\d+-of-\d+\.safetensors", index)))
    else:
        weights = ["model.safetensors"]
    missing = [name for name in weights if name not in files]
    if missing:
        pickles = [name for name in left_out if name.endswith((".bin", ".pt", ".pth"))]
        hint = f" Pickles such as {pickles[0]} are not published: load it, and save it again." if pickles else ""
        raise ValueError(f"{folder} holds no {', '.join(missing)}: the {contents.kind} is incomplete.{hint}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if it is damaged."""
    if damage := damage_of(path):
        raise ValueError(f"{damage}.")
    return json.loads(path.read_text(encoding="utf-8"))
