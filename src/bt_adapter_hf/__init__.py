"""BT-Adapter for Hugging Face: a temporal branch that gives image-language models a sense of time.

Importing the package is cheap: names are loaded on first use, and torch with them.
"""

import importlib

from .models.registration import install


__version__ = "0.1.0"

_EXPORTS = {
    "models.configuration_bt_adapter": ("BTAdapterConfig", "BTAdapterVisionConfig"),
    "models.configuration_bt_adapter_chat": (
        "BTAdapterInstructBlipConfig",
        "BTAdapterLlavaConfig",
        "BTAdapterMiniGPT4Config",
    ),
    "models.configuration_bt_adapter_gif_qa": ("BTAdapterGifQAConfig", "XCLIPFramesConfig"),
    "models.modeling_bt_adapter": ("BTAdapterModel",),
    "models.modeling_bt_adapter_vision": ("BTAdapterVisionModel",),
    "models.modeling_bt_adapter_gif_qa": ("BTAdapterGifQAForConditionalGeneration",),
    "models.modeling_bt_adapter_instructblip": ("BTAdapterInstructBlipForConditionalGeneration",),
    "models.modeling_bt_adapter_llava": ("BTAdapterLlavaForConditionalGeneration",),
    "models.modeling_bt_adapter_minigpt4": ("BTAdapterMiniGPT4ForConditionalGeneration",),
    "models.modeling_bt_adapter_pretraining": ("BTAdapterForPreTraining",),
    "models.modeling_xclip_frames": ("XCLIPFramesModel",),
    "models.processing_bt_adapter": ("BTAdapterProcessor",),
    "models.processing_bt_adapter_gif_qa": ("BTAdapterGifQAProcessor",),
    "models.processing_bt_adapter_llava": ("BTAdapterLlavaProcessor",),
    "models.processing_bt_adapter_qformer": ("BTAdapterInstructBlipProcessor", "BTAdapterMiniGPT4Processor"),
    "models.video_processing_bt_adapter": ("BTAdapterVideoProcessor",),
    "adapters.verbs": ("get_bt_adapter_model", "save_bt_adapter", "unload_bt_adapter"),
    "adapters.lora": ("lora_config",),
    "adapters.quantization": ("quantization_config",),
    "conversion": ("convert_original_checkpoint",),
    "conversion.projector": ("llava_projector",),
    "hub.loading": ("load_bt_adapter",),
    "hub.push": ("push_to_hub", "save_with_code"),
    "models.video_errors": ("VideoError",),
    "models.video_backends": ("available_video_backends",),
    "models.video_io": ("load_video",),
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
