"""The code of model and processor as files of a repository, for `trust_remote_code=True` without this package.

A config names its classes in `auto_map`; the files lie beside it. Modelling files import each other with a single dot
for this.
"""

import json
from pathlib import Path
from typing import Any

from ..adapters.files import CONFIG_NAME
from .compat import get_relative_import_files


_SOURCE = Path(__file__).parents[1] / "models"
_CHAT = ("configuration_bt_adapter_chat", "AutoModelForImageTextToText")
# model type -> file of the config, Auto class of the model; file and start of the names of the model's classes
_MODELS = {
    "bt_adapter": ("configuration_bt_adapter", "AutoModel", "modeling_bt_adapter", "BTAdapter", "Model"),
    "bt_adapter_vision": (
        "configuration_bt_adapter",
        "AutoModel",
        "modeling_bt_adapter_vision",
        "BTAdapterVision",
        "Model",
    ),
    "bt_adapter_llava": (*_CHAT, "modeling_bt_adapter_llava", "BTAdapterLlava", "ForConditionalGeneration"),
    "bt_adapter_instructblip": (
        *_CHAT,
        "modeling_bt_adapter_instructblip",
        "BTAdapterInstructBlip",
        "ForConditionalGeneration",
    ),
    "bt_adapter_minigpt4": (*_CHAT, "modeling_bt_adapter_minigpt4", "BTAdapterMiniGPT4", "ForConditionalGeneration"),
    "bt_adapter_gif_qa": (
        "configuration_bt_adapter_gif_qa",
        "AutoModelForImageTextToText",
        "modeling_bt_adapter_gif_qa",
        "BTAdapterGifQA",
        "ForConditionalGeneration",
    ),
}
_PROCESSORS = {
    "BTAdapterProcessor": "processing_bt_adapter",
    "BTAdapterLlavaProcessor": "processing_bt_adapter_llava",
    "BTAdapterInstructBlipProcessor": "processing_bt_adapter_qformer",
    "BTAdapterMiniGPT4Processor": "processing_bt_adapter_qformer",
    "BTAdapterGifQAProcessor": "processing_bt_adapter_gif_qa",
}


def code_files(folder: Path) -> dict[str, Path | bytes]:
    """What a folder needs to load without this package: its configs with the names of the code, and the code.

    Nothing for an adapter, which this package alone can load.
    """
    if (folder / CONFIG_NAME).is_file():
        return {}
    files: dict[str, Path | bytes] = {}
    modules: set[str] = set()
    for name, change in (("config.json", _name_model), ("processor_config.json", _name_processor)):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            used = change(content)
            if used:
                files[name] = _to_bytes(content)
                modules |= used
    for module in modules:
        path = _SOURCE / f"{module}.py"
        for needed in (path, *map(Path, get_relative_import_files(path))):
            files[needed.name] = needed
    return files


def without_code(folder: Path) -> dict[str, bytes]:
    """The configs of a folder that name code, without the names: they would lead to files that are not there."""
    files = {}
    for name in ("config.json", "processor_config.json"):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            parts = [content, *(part for part in content.values() if isinstance(part, dict))]
            if any([part.pop("auto_map", None) for part in parts]):
                files[name] = _to_bytes(content)
    return files


def add_code(folder: Path) -> None:
    """Puts the files of [`code_files`] into the folder."""
    for name, content in code_files(folder).items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())


def _name_model(config: dict[str, Any]) -> set[str]:
    """Adds `auto_map` and returns the modules that it names."""
    if config.get("model_type") not in _MODELS:
        return set()
    configuration, auto, modeling, start, end = _MODELS[config["model_type"]]
    autos = (auto, "AutoModelForMultimodalLM") if auto == "AutoModelForImageTextToText" else (auto,)
    config["auto_map"] = {"AutoConfig": f"{configuration}.{start}Config"} | {
        name: f"{modeling}.{start}{end}" for name in autos
    }
    return {configuration, modeling}


def _name_processor(config: dict[str, Any]) -> set[str]:
    name = config.get("processor_class") or ""
    if name not in _PROCESSORS:
        return set()
    module = _PROCESSORS[name]
    config["auto_map"] = {"AutoProcessor": f"{module}.{name}"}
    video = "video_processing_bt_adapter"
    config["video_processor"]["auto_map"] = {"AutoVideoProcessor": f"{video}.BTAdapterVideoProcessor"}
    return {module, video}


def _to_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
