"""Adapter files and the verbs that put a branch beside a model in memory, and take it away again.

An adapter is a folder, local or on the Hub: `bt_adapter_config.json`, and `bt_adapter.safetensors` with the branch
under keys that name no host. The configuration names the base model and holds a fingerprint of its weights, so that
an adapter is never attached to a backbone that it was not trained on.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .compat_bt_adapter import resolve_revision
from .configuration_bt_adapter import BTAdapterConfig, BTAdapterVisionConfig
from .modeling_bt_adapter import BACKBONES, BTAdapterModel, BTAdapterVisionModel


logger = logging.get_logger(__name__)

CONFIG_NAME = "bt_adapter_config.json"
WEIGHTS_NAME = "bt_adapter.safetensors"

# Relative distance of two fingerprints. Measured: float16 3e-4, bfloat16 2e-3, 8-bit 1e-2, 4-bit up to 0.2; another
# CLIP of the same shape 1.4.
WARN_DISTANCE, MAX_DISTANCE = 0.02, 0.3
_PROJECTIONS, _SEED = 8, 20240226
_EXTRA = "extra_modules."
_COMMON_FIELDS = PreTrainedConfig.__dataclass_fields__.keys()
_BRANCH_FIELDS = BTAdapterVisionConfig.__dataclass_fields__.keys() - _COMMON_FIELDS - {"backbone", "adapter_layers"}
# Sizes that the branch's tensors depend on, and with them the backbone's own.
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size")
# The image towers of BLIP-2 and InstructBLIP are one architecture.
_SAME_KIND = {"instructblip_vision_model": "blip_2_vision_model"}


class AdapterError(ValueError):
    """An adapter cannot be read, or does not belong to the model; nothing was changed."""


@dataclass
class AdapterConfig:
    """Content of `bt_adapter_config.json`.

    Args:
        backbone: model type and sizes of the backbone.
        adapter_layers: backbone layers whose outputs feed the branch.
        branch: the other fields of [`BTAdapterVisionConfig`].
        fingerprint: see [`backbone_fingerprint`].
        base_model_name_or_path, revision: where the base model came from.
        extra_modules: other trained modules of the model in the file, by their path in it.
    """

    backbone: dict[str, Any]
    adapter_layers: list[int]
    branch: dict[str, Any]
    fingerprint: dict[str, dict[str, Any]]
    base_model_name_or_path: str | None = None
    revision: str | None = None
    extra_modules: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> "AdapterConfig":
        """Reads and checks the file.

        Raises:
            AdapterError: if it is missing, damaged, or names other fields.
        """
        path = folder / CONFIG_NAME
        if not path.is_file():
            raise AdapterError(
                f"{folder} holds no {CONFIG_NAME}: it is no BT-Adapter. A whole model is loaded with "
                "AutoModel.from_pretrained, and a released checkpoint is converted with `bt-adapter convert`."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            config = cls(**content)
        except (ValueError, TypeError) as error:
            raise AdapterError(f"{path} is damaged or of another version: {error}") from error
        unknown = config.branch.keys() - _BRANCH_FIELDS
        if unknown:
            raise AdapterError(
                f"{path} has branch fields of another version: {sorted(unknown)}. Update bt_adapter_hf."
            )
        return config


def get_bt_adapter_model(model: PreTrainedModel, num_adapter_layers: int = 4, **config_fields: Any) -> PreTrainedModel:
    """Puts a fresh, warm-started branch beside a model in memory, without copying it.

    Args:
        model: CLIPVisionModel, SiglipVisionModel, InstructBlipVisionModel or Blip2VisionModel, which give a
            [`BTAdapterVisionModel`]; or CLIPModel, which gives a [`BTAdapterModel`].
        num_adapter_layers: the branch is fed by the last so many layers; `adapter_layers` takes precedence.
        config_fields: further fields of [`BTAdapterVisionConfig`].

    Raises:
        ValueError: if the model has a branch, or takes none.
    """
    backbone = find_tower(model)
    if isinstance(backbone, BTAdapterVisionModel):
        raise ValueError(f"{type(model).__name__} has a BT-Adapter; take it away with unload_bt_adapter first.")
    _check_host(model)
    if _is_quantized(backbone):
        raise ValueError(
            "A fresh branch starts from the backbone's weights, and these are quantized. Quantize after attaching, "
            "or keep the vision model out of it (llm_int8_skip_modules); a trained adapter can be loaded with "
            "load_bt_adapter."
        )
    attachment = _Attachment.of(model, backbone)
    tower = BTAdapterVisionModel.from_backbone(backbone, num_adapter_layers, **config_fields)
    return _wrap(model, tower, attachment)


def load_bt_adapter(
    model: PreTrainedModel,
    adapter: str | os.PathLike,
    *,
    adapter_layers: Sequence[int] | None = None,
    allow_backbone_mismatch: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> PreTrainedModel:
    """Attaches a trained adapter to a model in memory, without copying the model.

    A branch that reaches beyond the model's depth (EVA-CLIP-g has 40 layers, the towers of BLIP-2 and InstructBLIP 39)
    is attached with its first layers.

    Args:
        model: as in [`get_bt_adapter_model`]; or a [`BTAdapterVisionModel`] or [`BTAdapterModel`], whose branch, on
            the same backbone layers, is replaced in place.
        adapter: folder, or id on the Hub.
        adapter_layers: attach the first branch layers only, those fed by these backbone layers.
        allow_backbone_mismatch: attach to other weights than the adapter was trained on, with a warning.
        revision, token, cache_dir, local_files_only: for an adapter on the Hub.

    Returns:
        [`BTAdapterVisionModel`] or [`BTAdapterModel`] around the model's own modules; the branch learns, the backbone
        is frozen.

    Raises:
        AdapterError: if the adapter is damaged, or was trained on another backbone, width or set of layers. The model
            is unchanged then.
        OSError: if the adapter is not found.
    """
    folder = _resolve(adapter, revision, token, cache_dir, local_files_only)
    adapter_config = AdapterConfig.read(folder)
    tower = find_tower(model)
    attached = isinstance(tower, BTAdapterVisionModel)
    backbone = tower.vision_model if attached else tower
    if not attached:
        _check_host(model)
    layers = _fit_layers(adapter_config, backbone.config, adapter_layers)
    _check_backbone(folder, adapter_config, backbone, allow_backbone_mismatch)
    if attached and tower.config.adapter_layers != layers:
        raise AdapterError(
            f"The adapter's branch is fed by the backbone layers {layers}, the model's by "
            f"{tower.config.adapter_layers}. Take the model's branch away with unload_bt_adapter first, or name a "
            "common start in adapter_layers."
        )
    config = BTAdapterVisionConfig(
        backbone=backbone.config,
        adapter_layers=layers,
        **_branch_fields(adapter_config, len(layers)),
    )
    # The backbone on the meta device costs nothing, and is replaced by the real one; so the branch is not
    # warm-started.
    with torch.device("meta"):
        new = BTAdapterVisionModel(config)
    state, extra = _read_weights(folder)
    state = first_layers(state, len(layers)) if len(layers) < len(adapter_config.adapter_layers) else state
    _check_branch(folder, state, new.bt_adapter)
    _check_extra(folder, adapter_config, extra, model)

    state = {key: tensor.to(device=backbone.device, dtype=backbone.dtype) for key, tensor in state.items()}
    new.bt_adapter.load_state_dict(state, assign=True)
    if attached:
        tower.bt_adapter = new.bt_adapter.train(tower.training)
        tower.bt_adapter.config = tower.config = config
        if model is not tower:
            model.config.vision_config = config
    else:
        attachment = _Attachment.of(model, backbone)
        new.vision_model = backbone
        new.freeze_backbone()
        model = _wrap(model, new.train(backbone.training), attachment)
    for name in adapter_config.extra_modules:
        own = {key.removeprefix(f"{name}."): value for key, value in extra.items() if key.startswith(f"{name}.")}
        model.get_submodule(name).load_state_dict(own)
    return model


def save_bt_adapter(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    extra_modules: Sequence[str] = (),
) -> None:
    """Writes the branch of a model, and nothing of the backbone, into a folder.

    Args:
        model: a [`BTAdapterVisionModel`], or a model with one inside.
        folder: created if needed; an adapter in it is replaced.
        dtype: of the stored tensors, such as `torch.float16`; by default as they are.
        base_model_name_or_path, revision: of the base model; by default what it was loaded from.
        extra_modules: paths of other trained modules in the model that belong to the adapter.

    Raises:
        ValueError: if the model has no branch.
    """
    tower = find_tower(model)
    if not isinstance(tower, BTAdapterVisionModel):
        raise ValueError(f"{type(model).__name__} has no BT-Adapter to save; attach one with get_bt_adapter_model.")
    config = tower.config
    name, commit = _source(model, tower)
    adapter_config = AdapterConfig(
        base_model_name_or_path=base_model_name_or_path or name,
        revision=revision or (commit if base_model_name_or_path in (None, name) else None),
        backbone={
            "model_type": config.backbone.model_type,
            "num_hidden_layers": config.num_hidden_layers,
            "image_size": config.image_size,
            **{size: getattr(config, size) for size in _SIZES},
        },
        adapter_layers=list(config.adapter_layers),
        branch={key: getattr(config, key) for key in sorted(_BRANCH_FIELDS)},
        extra_modules=list(extra_modules),
        fingerprint=backbone_fingerprint(tower.vision_model, config.adapter_layers[0]),
    )
    state = dict(tower.bt_adapter.state_dict())
    for path in extra_modules:
        state |= {f"{_EXTRA}{path}.{key}": t for key, t in model.get_submodule(path).state_dict().items()}
    state = {
        key: t.detach().to(device="cpu", dtype=dtype if dtype and t.is_floating_point() else t.dtype).contiguous()
        for key, t in state.items()
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Each file appears whole or not at all, the weights first.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        weights, text = Path(scratch, WEIGHTS_NAME), Path(scratch, CONFIG_NAME)
        save_file(state, weights, metadata={"format": "pt"})
        text.write_text(json.dumps(asdict(adapter_config), indent=2) + "\n", encoding="utf-8")
        for path in (weights, text):
            path.chmod(0o666 & ~_umask())
            path.replace(folder / path.name)


def unload_bt_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Takes the branch away and returns the base model: the very object that the adapter was attached to.

    A model that was loaded with its branch, from one checkpoint, gives a native model around the same parameters.

    Raises:
        ValueError: if the model has no branch.
    """
    if not isinstance(model, (BTAdapterVisionModel, BTAdapterModel)):
        raise ValueError(f"{type(model).__name__} has no BT-Adapter to unload.")
    tower = find_tower(model)
    attachment = getattr(model, "_bt_adapter_attachment", None)
    if attachment is not None:
        return attachment.release(tower.vision_model)
    return tower.vision_model if model is tower else _native_clip(model)


def find_tower(model: PreTrainedModel) -> PreTrainedModel:
    """The one vision model inside `model` that has a branch or takes one: a tower, or a native vision model.

    Raises:
        ValueError: if there is none, or several.
    """
    natives = tuple(family.model_class for family in BACKBONES.values())
    for kinds in (BTAdapterVisionModel, natives):
        found = [module for module in model.modules() if isinstance(module, kinds)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{type(model).__name__} has {len(found)} vision models; pass the one that is meant.")
    raise ValueError(
        f"{type(model).__name__} has no vision model that takes a BT-Adapter: "
        + ", ".join(kind.__name__ for kind in natives)
        + "."
    )


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


def first_layers(state: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The entries of a branch's state dict that its first `count` layers need."""
    kept = {}
    for key, value in state.items():
        if key.startswith("layers.") and int(key.split(".")[1]) >= count:
            continue
        if key == "fusion_gate" and count == 1:  # there is no second layer to take in the backbone
            continue
        kept[key] = value
    return kept


# --------------------------------------------------------------------------------------------------------------- hosts


@dataclass
class _Attachment:
    """What unloading gives back: the model as it was."""

    base: PreTrainedModel
    learning: list[str]  # parameters of the backbone that were not frozen
    training: bool

    @classmethod
    def of(cls, base: PreTrainedModel, backbone: PreTrainedModel) -> "_Attachment":
        learning = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
        return cls(base, learning, base.training)

    def release(self, backbone: PreTrainedModel) -> PreTrainedModel:
        for name in self.learning:
            backbone.get_parameter(name).requires_grad_(True)
        return self.base.train(self.training)


def _check_host(model: PreTrainedModel) -> None:
    if not isinstance(model, (CLIPModel, *(family.model_class for family in BACKBONES.values()))):
        raise ValueError(
            f"A BT-Adapter cannot be attached to a {type(model).__name__}: pass a CLIPModel or its vision model, or "
            "one of " + ", ".join(family.model_class.__name__ for family in BACKBONES.values()) + "."
        )


def _wrap(model: PreTrainedModel, tower: BTAdapterVisionModel, attachment: _Attachment) -> PreTrainedModel:
    """The model of ours around a tower and the other modules of a native model."""
    if not isinstance(model, CLIPModel):
        tower._bt_adapter_attachment = attachment
        return tower
    config = BTAdapterConfig(
        text_config=model.config.text_config,
        vision_config=tower.config,
        projection_dim=model.config.projection_dim,
        logit_scale_init_value=model.config.logit_scale_init_value,
    )
    config._attn_implementation = model.config._attn_implementation
    config._name_or_path = model.config._name_or_path
    with torch.device("meta"):
        dual = BTAdapterModel(config)
    _share(model, dual)
    dual.vision_model = tower
    dual.config.vision_config = tower.config
    dual._bt_adapter_attachment = attachment
    return dual.train(model.training)


def _native_clip(model: BTAdapterModel) -> CLIPModel:
    """A CLIPModel around the modules of a dual encoder."""
    vision = model.vision_model.vision_model
    if vision.config.model_type != "clip_vision_model" or model.visual_projection.bias is not None:
        raise ValueError(
            f"transformers has no dual encoder with a {vision.config.model_type} backbone; unload the tower, "
            "model.vision_model, instead."
        )
    config = CLIPModel.config_class(
        text_config=model.config.text_config.to_dict(),
        vision_config=vision.config.to_dict(),
        projection_dim=model.config.projection_dim,
        logit_scale_init_value=model.config.logit_scale_init_value,
    )
    config._attn_implementation = model.config._attn_implementation
    config._name_or_path = model.config._name_or_path
    with torch.device("meta"):
        clip = CLIPModel(config)
    _share(model, clip)
    clip.vision_model = vision
    return clip.train(model.training)


def _share(source: nn.Module, target: nn.Module) -> None:
    """Lets `target` use the text tower, the projections and the temperature of `source`."""
    for name in ("text_model", "visual_projection", "text_projection", "logit_scale"):
        setattr(target, name, getattr(source, name))


# -------------------------------------------------------------------------------------------------------------- checks


def _fit_layers(config: AdapterConfig, backbone: PreTrainedConfig, asked: Sequence[int] | None) -> list[int]:
    """The adapter's layers that the backbone has and the caller wants: a start of the adapter's own list."""
    depth, own = backbone.num_hidden_layers, config.adapter_layers
    layers = [layer for layer in own if layer < depth]
    if asked is not None:
        asked = list(asked)
        if not asked or asked != own[: len(asked)]:
            raise AdapterError(
                f"adapter_layers={asked} is no start of the adapter's layers {own}: a branch layer needs the ones "
                "before it."
            )
        if asked[-1] >= depth:
            raise AdapterError(f"adapter_layers={asked} reaches beyond the backbone's {depth} layers.")
        layers = asked
    if not layers:
        raise AdapterError(
            f"The adapter is fed by the backbone layers {own}; the model has {depth} layers, so none of it can be "
            f"attached. It was trained on a {config.backbone.get('model_type')} of "
            f"{config.backbone.get('num_hidden_layers')} layers."
        )
    if asked is None and len(layers) < len(own):
        logger.warning(
            f"The adapter is fed by the backbone layers {own} and the model has {depth}: its first {len(layers)} "
            "branch layers are attached."
        )
    return layers


def _branch_fields(config: AdapterConfig, count: int) -> dict[str, Any]:
    fields, K = dict(config.branch), len(config.adapter_layers)
    if count < K:  # every layer keeps its own rate of stochastic depth
        fields["drop_path_rate"] = fields["drop_path_rate"] * (count - 1) / (K - 1)
    return fields


def _check_backbone(folder: Path, config: AdapterConfig, backbone: PreTrainedModel, allow_mismatch: bool) -> None:
    found, wanted = backbone.config, config.backbone
    kinds = [_SAME_KIND.get(kind, kind) for kind in (found.model_type, wanted.get("model_type"))]
    sizes = {size: (wanted.get(size), getattr(found, size)) for size in _SIZES}
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
        distances[name] = _distance(sketch, reference)
    worst = max(distances, key=distances.get)
    if distances[worst] <= WARN_DISTANCE:
        return
    message = (
        f"The weights of the model's backbone are not those that {folder} was trained on: they differ by "
        f"{distances[worst]:.2g} in {worst} (a copy in another dtype by less than {WARN_DISTANCE}, a 4-bit one by "
        f"less than {MAX_DISTANCE}). {base}"
    )
    if distances[worst] <= MAX_DISTANCE:
        if not _is_quantized(backbone):
            logger.warning(message)
    elif allow_mismatch:
        logger.warning(f"{message} Attached all the same, as allow_backbone_mismatch=True asks.")
    else:
        raise AdapterError(f"{message} Load that model, or pass allow_backbone_mismatch=True.")


def _check_branch(folder: Path, state: Mapping[str, torch.Tensor], branch: nn.Module) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in branch.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    problems = [f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (
            ("missing", expected.keys() - found.keys()),
            ("without a place", found.keys() - expected.keys()),
            ("of another size", {key for key in expected.keys() & found.keys() if expected[key] != found[key]}),
        )
        if keys
    ]  # fmt: skip
    if problems:
        raise AdapterError(
            f"{folder / WEIGHTS_NAME} does not hold the branch that {CONFIG_NAME} describes ({len(expected)} "
            "tensors): "
            + "; ".join(problems)
            + ". The two files do not belong together, or one is damaged: download or save them again."
        )


def _check_extra(folder: Path, config: AdapterConfig, extra: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    expected = {}
    modules = dict(model.named_modules())
    for path in config.extra_modules:
        if path not in modules:
            raise AdapterError(
                f"{folder} brings the trained module {path!r}, which {type(model).__name__} does not have."
            )
        expected |= {f"{path}.{key}": t.shape for key, t in modules[path].state_dict().items()}
    wrong = [k for k in expected.keys() | extra.keys() if k not in extra or extra[k].shape != expected.get(k)]
    if wrong:
        raise AdapterError(
            f"{folder} brings trained modules that do not fit {type(model).__name__}: {', '.join(sorted(wrong)[:3])}."
        )


# --------------------------------------------------------------------------------------------------------- fingerprint


def _weight(name: str, module: nn.Module) -> torch.Tensor:
    weight = getattr(module, "weight", None)
    if weight is not None and weight.is_meta:  # accelerate keeps it elsewhere between calls
        offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        weight = offloaded["weight"] if offloaded is not None else weight
    if weight is None or weight.is_meta:
        raise AdapterError(
            f"The backbone's {name} cannot be read ({type(module).__name__}; offloaded, or quantized in an unknown "
            "way), so its fingerprint cannot be taken. Load the vision model whole, or quantize it with bitsandbytes."
        )
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        weight = dequantize_bnb_weight(weight, module.state if hasattr(module, "state") else None)
    return weight.detach().float().cpu().flatten()


def _sketch(weight: torch.Tensor) -> dict[str, Any]:
    """Dot products with random signs. PCG64's raw bits are the same in every version of numpy."""
    count = weight.numel()
    bits = np.random.PCG64(_SEED).random_raw(-(-count * _PROJECTIONS // 64))
    bits = np.unpackbits(bits.astype("<u8").view(np.uint8))[: count * _PROJECTIONS].reshape(_PROJECTIONS, count)
    projections = [float((torch.from_numpy(row).float() * 2 - 1) @ weight) for row in bits]
    return {"norm": float(weight.norm()), "projections": projections}


def _distance(sketch: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """Estimates |w - w'| / |w'|, for a random projection keeps lengths on average."""
    difference = np.subtract(sketch["projections"], reference["projections"])
    return float(np.sqrt(np.mean(difference**2)) / max(reference["norm"], 1e-12))


def _is_quantized(backbone: PreTrainedModel) -> bool:
    return any(type(parameter).__name__ in ("Params4bit", "Int8Params") for parameter in backbone.parameters())


# --------------------------------------------------------------------------------------------------------------- files


def _resolve(
    adapter: str | os.PathLike,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike | None,
    local_files_only: bool,
) -> Path:
    if Path(adapter).is_dir():
        return Path(adapter)
    try:
        folder = snapshot_download(
            str(adapter),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=[CONFIG_NAME, WEIGHTS_NAME],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise OSError(
            f"{adapter} is neither a folder nor an adapter that could be fetched from the Hub: {error}"
        ) from error
    return Path(folder)


def _read_weights(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(the branch, extra modules by their path)"""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise AdapterError(f"{folder} holds no {WEIGHTS_NAME}: the adapter is incomplete.")
    branch, extra = {}, {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                target = extra if key.startswith(_EXTRA) else branch
                target[key.removeprefix(_EXTRA)] = file.get_tensor(key)
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged or truncated: {error}. Download or save it again.") from error
    return branch, extra


def _source(model: PreTrainedModel, tower: BTAdapterVisionModel) -> tuple[str | None, str | None]:
    """Name of the checkpoint that the backbone came from, and its commit in the local cache of the Hub."""
    for config in (tower.config.backbone, tower.config, model.config):
        if name := getattr(config, "_name_or_path", ""):
            return name, getattr(resolve_revision(name, local_files_only=True), "resolved", None)
    return None, None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
