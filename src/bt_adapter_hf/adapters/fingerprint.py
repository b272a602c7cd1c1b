"""The fingerprint of a backbone: an adapter is never attached to image weights that it was not trained on."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .files import CONFIG_NAME, SIZES, AdapterConfig, AdapterError
from .host_modules import is_quantized, parameter_value


logger = logging.get_logger(__name__)

# Relative distance of two fingerprints. Measured: float16 3e-4, bfloat16 2e-3, 8-bit 1e-2, 4-bit up to 0.2; another
# CLIP of the same shape 1.4.
WARN_DISTANCE, MAX_DISTANCE = 0.02, 0.3
_PROJECTIONS, _SEED = 8, 20240226
# The image towers of BLIP-2 and InstructBLIP are one architecture.
_SAME_KIND = {"instructblip_vision_model": "blip_2_vision_model"}


def backbone_fingerprint(backbone: PreTrainedModel, layer: int) -> dict[str, dict[str, Any]]:
    """Seeded random projections of two weights of the backbone: of the patch embedding and of one MLP.

    Two copies in different dtypes, quantized ones too, give nearly the same numbers; another model's differ in all.

    Args:
        backbone: native vision model, quantized by bitsandbytes or not.
        layer: whose MLP is used, the first that feeds the branch, for every host has it.
    """
    fc2 = backbone.encoder.layers[layer].mlp.fc2
    modules = {"patch_embedding": backbone.embeddings.patch_embedding, f"layers.{layer}.mlp.fc2": fc2}
    return {name: _sketch(_weight(name, module)) for name, module in modules.items()}


def check_backbone(folder: Path, config: AdapterConfig, backbone: PreTrainedModel, allow_mismatch: bool) -> None:
    found, wanted = backbone.config, config.backbone
    kinds = [_SAME_KIND.get(kind, kind) for kind in (found.model_type, wanted.get("model_type"))]
    sizes = {size: (wanted.get(size), getattr(found, size)) for size in SIZES}
    other = [f"{size} {a}, the model's {b}" for size, (a, b) in sizes.items() if a != b]
    if kinds[0] != kinds[1]:
        other.insert(0, f"model_type {wanted.get('model_type')}, the model's {found.model_type}")
    base = f"It was trained on {config.base_model_name_or_path or 'an unnamed base'}."
    if other:
        raise AdapterError(f"{folder} needs another backbone: {'; '.join(other)}. {base}")
    own = backbone_fingerprint(backbone, config.adapter_layers[0])
    distances = {}
    for name, sketch in own.items():
        reference = config.fingerprint.get(name)
        if reference is None or len(reference["projections"]) != _PROJECTIONS:
            raise AdapterError(f"{folder / CONFIG_NAME} has no usable fingerprint of {name}: it is damaged.")
        distances[name] = distance(sketch, reference)
    worst = max(distances, key=distances.get)
    if distances[worst] <= WARN_DISTANCE:
        return
    message = (
        f"The weights of the model's backbone are not those that {folder} was trained on: they differ by "
        f"{distances[worst]:.2g} in {worst} (a copy in another dtype by less than {WARN_DISTANCE}, a 4-bit one by "
        f"less than {MAX_DISTANCE}). {base}"
    )
    if distances[worst] <= MAX_DISTANCE:
        if not is_quantized(backbone):
            logger.warning(message)
    elif allow_mismatch:
        logger.warning(f"{message} Attached all the same, as allow_backbone_mismatch=True asks.")
    else:
        raise AdapterError(f"{message} Load that model, or pass allow_backbone_mismatch=True.")


def _weight(name: str, module: nn.Module) -> torch.Tensor:
    module = getattr(module, "base_layer", module)  # beside it a LoRA of peft
    weight = parameter_value(module, "weight")
    if weight is None or weight.is_meta:
        raise AdapterError(
            f"The backbone's {name} cannot be read ({type(module).__name__}; offloaded, or quantized in an unknown "
            "way), so its fingerprint cannot be taken. Load the vision model whole, or quantize it with bitsandbytes."
        )
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        weight = _dequantized(module, weight)
    return weight.detach().float().cpu().flatten()


@torch.no_grad()
def _dequantized(module: nn.Module, weight: nn.Parameter) -> torch.Tensor:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    state = getattr(weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        # On some CPUs the first call shuffles 4-bit weights, and only the product knows how to read them then.
        # Not an import statement: `trust_remote_code` would demand the package of everyone.
        matmul_4bit = importlib.import_module("bitsandbytes").matmul_4bit
        return matmul_4bit(torch.eye(module.in_features, dtype=torch.bfloat16), weight, quant_state=state).t()
    return dequantize_bnb_weight(weight, module.state if hasattr(module, "state") else None)


def _sketch(weight: torch.Tensor) -> dict[str, Any]:
    """Dot products with random signs. PCG64's raw bits are the same in every version of numpy."""
    count = weight.numel()
    bits = np.random.PCG64(_SEED).random_raw(-(-count * _PROJECTIONS // 64))
    bits = np.unpackbits(bits.astype("<u8").view(np.uint8))[: count * _PROJECTIONS].reshape(_PROJECTIONS, count)
    projections = [float((torch.from_numpy(row).float() * 2 - 1) @ weight) for row in bits]
    return {"norm": float(weight.norm()), "projections": projections}


def distance(sketch: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """Estimates |w - w'| / |w'|, for a random projection keeps lengths on average."""
    difference = np.subtract(sketch["projections"], reference["projections"])
    return float(np.sqrt(np.mean(difference**2)) / max(reference["norm"], 1e-12))
