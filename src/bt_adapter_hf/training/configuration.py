"""What a run is configured as, and one that resumes it too: the model, LoRA and how videos are prepared."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import nn

from ..adapters.fingerprint import VOLATILE, plain
from ..adapters.host_modules import is_peft_model
from .checkpoint import CONFIGURATION_KEY, TRAINED_WEIGHTS_NAME


# What training itself sets, what depends on the machine, and what is done with files that are damaged.
_FREE = VOLATILE | set(
    "base_model_name_or_path frames_per_chunk inference_mode num_trained_frames on_damage peft_version revision "
    "use_cache video_backend".split()
)


def configuration_of(model: nn.Module, processor: Any, num_frames: int) -> dict[str, Any]:
    """The fields, by names such as `mask_ratio`, `vision_config.gate_on`, `lora_r` and `video_processor.sampling`."""
    parts = {"": model.config.to_dict()}
    if is_peft_model(model):
        for name, lora in model.peft_config.items():
            prefix = "lora_" if name == "default" else f"{name}.lora_"
            parts[prefix] = {
                key.removeprefix("lora_"): sorted(value) if isinstance(value, set) else value
                for key, value in lora.to_dict().items()
            }
    if processor is not None:
        parts["video_processor."] = processor.video_processor.to_dict()
        parts["processor."] = {"num_clips": getattr(processor, "num_clips", None)}
    found = {}
    for prefix, fields in parts.items():
        found |= _flat(prefix, plain(fields, _FREE))
    found.pop("video_processor.num_frames", None)
    return json.loads(json.dumps({**found, "num_frames": num_frames}))


def _flat(prefix: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in fields.items():
        found |= _flat(f"{prefix}{name}.", value) if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def check_configuration(folder: str | os.PathLike, wanted: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a run that was configured in another way. One of an earlier version does not say how.

    Raises:
        ValueError: it names the fields that differ, with both values.
    """
    try:
        with safetensors.safe_open(Path(folder) / TRAINED_WEIGHTS_NAME, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(CONFIGURATION_KEY, "{}"))
    except safetensors.SafetensorError:
        return  # loading it says so
    # A field that one of them lacks is of another version of transformers or of this package.
    differing = [name for name in wanted if name in found and found[name] != wanted[name]]
    if differing:
        # by the names of the options, where they have one
        told = "; ".join(
            f"{name.removeprefix('vision_config.')}={found[name]!r}, now {wanted[name]!r}" for name in differing[:6]
        )
        more = f"; and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise ValueError(
            f"{folder} is of a run with other settings: {told}{more}. Resume with those of then, or train into "
            "another folder."
        )
