"""BT-Adapter for Hugging Face: a temporal branch that gives image-language models a sense of time.

Importing the package is cheap: names are loaded on first use, and torch with them.
"""

import importlib

from ._auto_registration import install


__version__ = "0.1.0"

_EXPORTS = {
    "configuration_bt_adapter": ("BTAdapterConfig", "BTAdapterVisionConfig"),
    "configuration_bt_adapter_chat": (
        "BTAdapterInstructBlipConfig",
        "BTAdapterLlavaConfig",
        "BTAdapterMiniGPT4Config",
    ),
    "modeling_bt_adapter": ("BTAdapterModel", "BTAdapterVisionModel"),
    "modeling_bt_adapter_instructblip": ("BTAdapterInstructBlipForConditionalGeneration",),
    "modeling_bt_adapter_llava": ("BTAdapterLlavaForConditionalGeneration", "llava_projector"),
    "modeling_bt_adapter_minigpt4": ("BTAdapterMiniGPT4ForConditionalGeneration",),
    "modeling_bt_adapter_pretraining": ("BTAdapterForPreTraining",),
    "processing_bt_adapter": ("BTAdapterProcessor",),
    "processing_bt_adapter_chat": (
        "BTAdapterInstructBlipProcessor",
        "BTAdapterLlavaProcessor",
        "BTAdapterMiniGPT4Processor",
    ),
    "video_processing_bt_adapter": ("BTAdapterVideoProcessor",),
    "adapters": ("get_bt_adapter_model", "load_bt_adapter", "save_bt_adapter", "unload_bt_adapter"),
    "lora": ("lora_config",),
    "quantization": ("quantization_config",),
    "conversion": ("convert_original_checkpoint",),
    "hub": ("push_to_hub", "save_with_code"),
    "video_io": ("VideoError", "available_video_backends", "load_video"),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


install()
