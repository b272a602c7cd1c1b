"""The fingerprint of a backbone: an adapter is never attached to image weights that it was not trained on."""

import hashlib
import importlib
import json
import re
import sys
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
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

Fingerprint = dict[str, list[float]]

# Distances of two fingerprints, the largest over the parts: see docs/released_and_paper.md for the measurements.
CAST_DISTANCE = 0.03  # a copy in another dtype
OTHER_DISTANCE = 0.35  # further tuning; beyond it they are other weights
QUANTIZED_DISTANCE = 0.7  # a copy that bitsandbytes has quantized
_BUCKETS, _ROW, _SEED = 8, 4096, 20240226
_TINY = 1e-4  # size of values, on average, below which a tensor's direction is rounding
# The image towers of BLIP-2 and InstructBLIP are one architecture.
_SAME_KIND = {"instructblip_vision_model": "blip_2_vision_model"}
_POSITIONS = "positions"


def backbone_fingerprint(backbone: PreTrainedModel, last_layer: int) -> Fingerprint:
    """A sketch of every weight that a branch depends on: the embeddings, and the layers up to the last that feeds it.

    Eight numbers for each part: "embeddings", "positions", "layers.0", ... They are sums of all values with random
    signs, each tensor scaled to length 1, so that a small one counts as much as a large one; its size is one more
    value. What comes behind the layers is left out, for hosts have their own last norm.

    Two copies in different dtypes, quantized ones too, give nearly the same numbers; see [`distances`].

    Args:
        backbone: native vision model, quantized by bitsandbytes or not.
        last_layer: number of the last layer that feeds the branch, or whatever the backbone has of these.
    """
    parts: dict[str, np.ndarray] = {}
    for path, module in backbone.named_modules():
        part, name = _place(path, last_layer)
        if part is None or "lora_" in path:
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter is None:
                continue
            own = _POSITIONS if "position_embedding" in f"{path}.{leaf}" else part
            weight = _value(f"{path}.{leaf}", module, leaf)
            parts[own] = parts.get(own, 0.0) + _sketch(f"{name}.{leaf}", weight)
    return {part: [float(f"{value:.6g}") for value in sketch] for part, sketch in parts.items()}


def xclip_fingerprint(tower: PreTrainedModel) -> Fingerprint:
    """The same of an X-CLIP tower of frames: of its vision model and, as "mit. ...", of what integrates its frames."""
    vision, mit = (backbone_fingerprint(part, sys.maxsize) for part in (tower.vision_model, tower.mit))
    return vision | {f"mit.{part}": sketch for part, sketch in mit.items()}


def distances(fingerprint: Fingerprint, reference: Fingerprint) -> dict[str, float]:
    """For each part of both: the root of the summed squares of the relative differences of its tensors, estimated.

    A random projection keeps lengths on average. One other tensor alone gives 1.4.
    """
    return {
        part: float(np.linalg.norm(np.subtract(fingerprint[part], reference[part])))
        for part in fingerprint.keys() & reference.keys()
    }


def check_backbone(folder: Path, config: AdapterConfig, backbone: PreTrainedModel, allow_mismatch: bool) -> None:
    """Compares the backbone that an adapter was trained on with that of a model.

    Raises:
        AdapterError: if it is of another kind or size, or has other weights and these are not allowed.
    """
    found, wanted = backbone.config, config.backbone
    kinds = [_SAME_KIND.get(kind, kind) for kind in (found.model_type, wanted.get("model_type"))]
    sizes = {size: (wanted.get(size), getattr(found, size)) for size in SIZES}
    other = [f"{size} {a}, the model's {b}" for size, (a, b) in sizes.items() if a != b]
    if kinds[0] != kinds[1]:
        other.insert(0, f"model_type {wanted.get('model_type')}, the model's {found.model_type}")
    base = f"It was trained on {config.base_model_name_or_path or 'an unnamed base'}."
    if other:
        raise AdapterError(f"{folder} needs another backbone: {'; '.join(other)}. {base}")
    if _is_former(config.fingerprint):
        own = _former_fingerprint(backbone, config.adapter_layers[0])
        apart = {name: _former_distance(own[name], config.fingerprint[name]) for name in own}
        limits = (_FORMER_CAST, _FORMER_OTHER, _FORMER_OTHER)
        logger.warning(
            f"{folder} has a fingerprint of an earlier version, which sees two of the backbone's weights and not the "
            "others. Save the adapter again (save_bt_adapter) from the model that it was trained on."
        )
    else:
        own = backbone_fingerprint(backbone, config.adapter_layers[-1])
        if wanted.get("image_size") != found.image_size:  # the table was made for another number of patches
            own.pop(_POSITIONS, None)
        apart = _compared(folder, own, config.fingerprint)
        limits = (CAST_DISTANCE, OTHER_DISTANCE, QUANTIZED_DISTANCE)
    worst = max(apart, key=apart.get)
    cast, far, quantized_far = limits
    far = quantized_far if is_quantized(backbone) else far
    if apart[worst] <= cast or (apart[worst] <= far and is_quantized(backbone)):
        return
    count = sum(value > cast for value in apart.values())
    message = (
        f"The weights of the model's backbone are not those that {folder} was trained on: they differ by "
        f"{apart[worst]:.2g} in {worst}, the most among {count} of {len(apart)} parts that differ (a copy in another "
        f"dtype differs by less than {cast}, other weights by more than {far}). {base}"
    )
    if apart[worst] <= far:
        logger.warning(message)
    elif allow_mismatch:
        logger.warning(f"{message} Attached all the same, as allow_backbone_mismatch=True asks.")
    else:
        raise AdapterError(f"{message} Load that model, or pass allow_backbone_mismatch=True.")


def _compared(folder: Path, own: Fingerprint, reference: Mapping[str, Sequence[float]]) -> dict[str, float]:
    for part in own:
        if len(reference.get(part, ())) != _BUCKETS:
            raise AdapterError(f"{folder / CONFIG_NAME} has no usable fingerprint of {part}: it is damaged.")
    return distances(own, reference)


def _place(path: str, last_layer: int) -> tuple[str | None, str]:
    """Part of the fingerprint that a module belongs to, and its name in it, the same in every host."""
    path = path.replace(".base_layer", "")  # beside it a LoRA of peft
    if found := re.match(r"encoder\.layers\.(\d+)(?:\.(.*))?$", path):
        number, name = int(found[1]), found[2] or ""
        return (f"layers.{number}", name) if number <= last_layer else (None, name)
    if path.partition(".")[0] in ("embeddings", "pre_layrnorm"):
        return "embeddings", path
    return None, path


def _value(name: str, module: nn.Module, leaf: str) -> torch.Tensor:
    weight = parameter_value(module, leaf)
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
        matmul_4bit = importlib.import_module("bitsandbytes").matmul_4bit
        return matmul_4bit(torch.eye(module.in_features, dtype=torch.bfloat16), weight, quant_state=state).t()
    return dequantize_bnb_weight(weight, module.state if hasattr(module, "state") else None)


def _sketch(name: str, weight: torch.Tensor) -> np.ndarray:
    """Eight sums over the values, scaled to length 1, with signs that depend on the tensor's name; plus its size.

    The sign of a value is the product of two: one by its place in a row of 4,096 values, turned by the name, and one
    by its row. So it is one product of matrices, fractions of a second for CLIP-L.
    """
    count, code = weight.numel(), zlib.crc32(name.encode())
    size = float(weight.norm()) / count**0.5
    rows = nn.functional.pad(weight, (0, -count % _ROW)).view(-1, _ROW)
    buckets = torch.zeros(_ROW, _BUCKETS)
    buckets[torch.arange(_ROW), torch.arange(_ROW) % _BUCKETS] = _signs(_ROW, 0)
    sums = _signs(len(rows), code) @ (rows @ buckets.roll(code % _ROW, dims=0))
    sums = sums.double().numpy() / (count**0.5 * (size + _TINY))
    sums[code % _BUCKETS] += np.log(size + _TINY) * (1 if code & _BUCKETS else -1)
    return sums


def _signs(count: int, code: int) -> torch.Tensor:
    """PCG64's raw bits are the same in every version of numpy."""
    bits = np.random.PCG64([_SEED, code]).random_raw(-(-count // 64))
    bits = np.unpackbits(bits.astype("<u8").view(np.uint8))[:count]
    return torch.from_numpy(bits).float() * 2 - 1


def weights_digest(weights: Iterable[tuple[str, torch.Tensor]], as_stored: bool = False, start: bytes = b"") -> str:
    """sha256 over name, shape and some evenly spaced values of every tensor: for weights that are to be the same.

    Args:
        as_stored: the dtype counts too; otherwise values are compared in float32.
        start: hashed before.
    """
    digest = hashlib.sha256(start)
    for name, tensor in weights:
        values = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)]
        if as_stored:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(values[:64].cpu().contiguous().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(values.float().cpu().numpy().tobytes())
    return digest.hexdigest()


# Fields of a saved config or processor that do not change what it computes.
VOLATILE = frozenset(
    "_attn_implementation _commit_hash _name_or_path architectures attn_implementation auto_map dtype "
    "processor_class return_metadata torch_dtype transformers_version video_processor_type".split()
)
# Fields that training alone reads, or initialisation, and one that bounds the memory: a model
# computes the same features and answers whatever they say.
TRAINING_FIELDS = frozenset(
    "drop_path_rate frames_per_chunk gather_gradient initializer_factor initializer_range logit_scale_init_value "
    "mask_order mask_ratio mbca_weight mbta_loss mbta_pairing mbta_weight order_negatives temperature "
    "time_embedding_init_std vtc_weight".split()
)


def plain(fields: Any, without: Collection[str] = VOLATILE) -> Any:
    """Fields of a config or processor as JSON has them, at any depth without those that are named."""
    if isinstance(fields, Mapping):
        return {name: plain(value, without) for name, value in fields.items() if name not in without}
    if isinstance(fields, (list, tuple)):
        return [plain(value, without) for value in fields]
    return fields if isinstance(fields, (str, int, float, bool, type(None))) else str(fields)


def model_fingerprint(model: PreTrainedModel, without: Collection[str] = VOLATILE | TRAINING_FIELDS) -> str:
    """sha256 over the config, as far as it decides what is computed, and up to 64 values of every weight in memory."""
    config = json.dumps(plain(model.config.to_diff_dict(), without), sort_keys=True)
    return weights_digest(sorted(model.state_dict().items()), as_stored=True, start=config.encode())


# ------------------------------------------------------------------------------------------- files of earlier versions

_FORMER_CAST, _FORMER_OTHER = 0.02, 0.3


def _is_former(fingerprint: Mapping) -> bool:
    return any(isinstance(sketch, Mapping) for sketch in fingerprint.values())


def _former_fingerprint(backbone: PreTrainedModel, layer: int) -> dict[str, np.ndarray]:
    """Projections of two weights, the patch embedding and one MLP, as versions up to 0.1 wrote them."""
    fc2 = backbone.encoder.layers[layer].mlp.fc2
    modules = {"patch_embedding": backbone.embeddings.patch_embedding, f"layers.{layer}.mlp.fc2": fc2}
    found = {}
    for name, module in modules.items():
        weight = _value(name, getattr(module, "base_layer", module), "weight")
        bits = np.random.PCG64(_SEED).random_raw(-(-weight.numel() * _BUCKETS // 64))
        bits = np.unpackbits(bits.astype("<u8").view(np.uint8))[: weight.numel() * _BUCKETS]
        rows = torch.from_numpy(bits.reshape(_BUCKETS, -1))
        found[name] = np.array([float((row.float() * 2 - 1) @ weight) for row in rows])
    return found


def _former_distance(sketch: np.ndarray, reference: Mapping) -> float:
    return float(np.sqrt(np.mean(np.square(sketch - reference["projections"]))) / max(reference["norm"], 1e-12))
