"""Released checkpoints -> models, strictly, and models -> state dicts with the released names."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    Blip2VisionConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from ..adapters.fitting import first_layers
from ..adapters.host_modules import find_tower
from ..models.configuration_bt_adapter import BACKBONE_TYPES, BTAdapterConfig, BTAdapterVisionConfig
from ..models.modeling_bt_adapter import BTAdapterModel
from ..models.modeling_bt_adapter_pretraining import BTAdapterForPreTraining
from ..models.modeling_bt_adapter_vision import BTAdapterPreTrainedModel, BTAdapterVisionModel
from .names import (
    LLAVA_PREFIX,
    Layout,
    RenamedCheckpoint,
    released_name,
    rename_from_released,
    rename_to_released,
)
from .reading import CheckpointError, read_checkpoint


logger = logging.get_logger(__name__)

_BACKBONE = "vision_model.vision_model."
_BRANCH = "vision_model.bt_adapter."
_LAYERS = _BACKBONE + "encoder.layers."
_FUSION_GATE, _OUTPUT_GATE = _BRANCH + "fusion_gate", _BRANCH + "output_gate"
_COMPLETE = _BACKBONE + "embeddings.patch_embedding.weight"
# Parts that a base lends as a whole, if the file has nothing of them.
_LENT = {"text_model.": "the text tower", "text_projection.": "the text tower", "visual_projection.": "the projection"}
# Attention heads cannot be read off the weights. Without a base: the head width of every OpenAI CLIP, and of
# EVA-CLIP-g.
_HEAD_WIDTH = {"clip": 64, "eva": 88}
# The image towers of BLIP-2, InstructBLIP and MiniGPT-4 leave out the last of EVA-CLIP-g's layers.
_EVA_DEPTH, _LAVIS_DEPTH = 40, 39
_RELEASED_TEMPERATURE = 0.01


@dataclass
class ConversionPlan:
    """What a conversion will do; made and checked before anything is built or written."""

    model_class: type[BTAdapterPreTrainedModel]
    config: PreTrainedConfig
    state: dict[str, torch.Tensor]  # under the names of `model_class`
    rows: list[tuple[str, str, tuple[int, ...], str]]  # (released name, our name, shape, dtype)
    notes: list[str]  # what the model does not take over, and what it takes from elsewhere
    projector: dict[str, torch.Tensor]  # LLaVA's, for the chat models

    def build(self) -> BTAdapterPreTrainedModel:
        """The model, in evaluation mode."""
        dtype = next(t.dtype for t in self.state.values() if t.is_floating_point())
        return self.model_class.from_pretrained(None, config=self.config, state_dict=self.state, dtype=dtype).eval()


def convert_original_checkpoint(
    checkpoint: str | Path | Mapping[str, torch.Tensor],
    base: str | Path | PreTrainedModel | PreTrainedConfig | None = None,
    *,
    model_class: type[BTAdapterPreTrainedModel] | None = None,
    adapter_layers: list[int] | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **config_fields: Any,
) -> BTAdapterPreTrainedModel:
    """Builds a model that computes what a released checkpoint computes.

    The defects of the released code are not switched on with it; see `docs/released_and_paper.md` for the fields
    (`mask_order`, `temporal_window`, `mbta_pairing`, `cls_position`, ...) that reproduce each of them.

    Args:
        checkpoint: file (`.pth`, `.pt`, `.bin`, `.safetensors`), or state dict, in any of the released spellings. Read
            with `weights_only=True`.
        base: Hub id, folder, model in memory, or config. Gives what the file does not hold: the backbone where the
            file has the branch only (LLaVA's `btadapter_weight.bin`), the text tower where it has the video tower
            only, and in any case the number of attention heads and the activation. The file's own tensors take
            precedence.
        model_class: [`BTAdapterModel`], [`BTAdapterVisionModel`] or [`BTAdapterForPreTraining`], which keeps the
            alignment head. By default `BTAdapterModel` if there is a text tower, else `BTAdapterVisionModel`.
        adapter_layers: the backbone layers that feed the branch of the file, counted from 0. By default the last ones
            of its own tower. Branch layers whose backbone layer the base does not have are left out.
        dtype: of the result; by default the widest one in the file.
        revision, token, cache_dir, local_files_only: for a base on the Hub.
        config_fields: fields of [`BTAdapterVisionConfig`] and [`BTAdapterConfig`], such as `fusion="sum"`.

    Raises:
        CheckpointError: if the file is damaged, holds code, belongs to another model, or does not fill the model:
            unknown, missing and mis-sized tensors are counted and named.
        FileNotFoundError: if there is no such file.
    """
    plan = plan_conversion(
        checkpoint,
        base,
        model_class=model_class,
        adapter_layers=adapter_layers,
        dtype=dtype,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        **config_fields,
    )
    for note in plan.notes:
        logger.warning(note)
    return plan.build()


def plan_conversion(
    checkpoint: str | Path | Mapping[str, torch.Tensor],
    base: str | Path | PreTrainedModel | PreTrainedConfig | None = None,
    *,
    model_class: type[BTAdapterPreTrainedModel] | None = None,
    adapter_layers: list[int] | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **config_fields: Any,
) -> ConversionPlan:
    """All of [`convert_original_checkpoint`] but the building, with the same arguments and errors."""
    from_file = isinstance(checkpoint, (str, Path))
    source = str(checkpoint) if from_file else "The state dict"
    found = rename_from_released(read_checkpoint(checkpoint) if from_file else checkpoint)
    if not any(key.startswith(_BRANCH) for key in found.state):
        raise CheckpointError(_no_branch(source, found))
    if found.unknown:
        raise CheckpointError(_unknown(source, found))
    base_config, base_state = _read_base(
        base,
        weights=_is_partial(found.state),
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    notes = []
    state = dict(found.state)
    adapter_layers = _place_layers(source, found, state, base_config, adapter_layers, notes)
    tower_fields = {k: config_fields.pop(k) for k in _TOWER_FIELDS & config_fields.keys()}
    tower_config = _tower_config(source, found, state, base_config, adapter_layers, tower_fields, notes)
    if isinstance(base, (str, Path)):
        tower_config.backbone._name_or_path = str(base)

    own = {part for part in (*_LENT, _COMPLETE) if any(key.startswith(part) for key in found.state)}
    if _COMPLETE not in own:
        _lend(state, base_state, _BACKBONE, "the backbone", notes)
    if model_class is None:
        has_text = "text_model." in own or any(key.startswith("text_model.") for key in base_state)
        model_class = BTAdapterModel if has_text else BTAdapterVisionModel
    if model_class is not BTAdapterVisionModel:
        for part, title in _LENT.items():
            if part not in own:
                _lend(state, base_state, part, title, notes)
    wanted = dtype or _widest(state)
    if model_class is BTAdapterVisionModel:
        config, prefix = tower_config, "vision_model."
        other = config_fields
    else:
        state["logit_scale"] = base_state.get("logit_scale", torch.tensor(-math.log(_RELEASED_TEMPERATURE))).clone()
        config, prefix = _dual_config(source, found, state, base_config, tower_config, config_fields), ""
        other = config_fields.keys() - BTAdapterConfig.__dataclass_fields__.keys()
    if other:
        raise ValueError(f"{', '.join(sorted(other))}: no such field in the configuration of {model_class.__name__}.")
    if found.projector:
        notes.append(f"{len(found.projector)} tensors are LLaVA's projector, which the chat models take.")

    state = {k: t.to(wanted) if t.is_floating_point() else t for k, t in state.items()}
    with torch.device("meta"):
        expected = {k: t.shape for k, t in model_class(config).state_dict().items()}
    dropped = [key for key in state if not key.startswith(prefix) or key.removeprefix(prefix) not in expected]
    for title, keys in _without_place(dropped, model_class).items():
        notes.append(f"{len(keys)} tensors have no place in {model_class.__name__} and are left out: {title}.")
        for key in keys:
            del state[key]
    state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    origin = {key.removeprefix(prefix): name for key, name in found.origin.items()}
    names = {key: origin.get(key) or released_name(prefix + key, found.layout) for key in (*state, *expected)}
    _check(source, state, expected, names)
    if not from_file:  # the caller's tensors stay the caller's
        state = {key: tensor.clone() for key, tensor in state.items()}
    rows = [
        (origin.get(key, "(base)"), key, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for key, tensor in state.items()
    ]
    return ConversionPlan(model_class, config, state, rows, notes, found.projector)


def read_llava_projector(checkpoint: str | Path | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LLaVA's projector out of `mm_projector.bin`: `mm_projector.weight`, `mm_projector.bias`, `embed_tokens.weight`.

    Raises:
        CheckpointError: if the file is damaged, holds code, or holds no projector.
    """
    from_file = isinstance(checkpoint, (str, Path))
    found = rename_from_released(read_checkpoint(checkpoint) if from_file else checkpoint)
    if not found.projector:
        raise CheckpointError(f"{checkpoint if from_file else 'The state dict'} holds no mm_projector of LLaVA.")
    return found.projector


def convert_to_original(
    model: BTAdapterModel | BTAdapterVisionModel, tower_prefix: str | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a model under the released names, byte for byte; the inverse of [`convert_original_checkpoint`].

    Args:
        model: with a CLIP or EVA backbone.
        tower_prefix: `"backbone."` (the default for a dual encoder), `"model.vision_tower."` or `""` (the default for
            a tower).

    Raises:
        ValueError: if the backbone is of a kind that was not released.
    """
    dual = isinstance(model, BTAdapterModel)
    tower = model.vision_model if dual else model
    family = {"clip_vision_model": "clip", "blip_2_vision_model": "eva", "instructblip_vision_model": "eva"}.get(
        tower.config.backbone.model_type
    )
    if family is None:
        raise ValueError(f"No weights were released for a {tower.config.backbone.model_type} backbone.")
    prefix = tower_prefix if tower_prefix is not None else ("backbone." if dual else "")
    layout = Layout(family, prefix, "text_backbone." if dual else "", position_ids=dual and family == "clip")
    state = {key if dual else f"vision_model.{key}": tensor for key, tensor in model.state_dict().items()}
    return rename_to_released(state, layout)


_COMMON_FIELDS = PreTrainedConfig.__dataclass_fields__.keys()
_TOWER_FIELDS = BTAdapterVisionConfig.__dataclass_fields__.keys() - _COMMON_FIELDS - {"backbone", "adapter_layers"}


def _lend(
    state: dict[str, torch.Tensor], base: Mapping[str, torch.Tensor], prefix: str, title: str, notes: list[str]
) -> None:
    lent = {key: tensor.clone() for key, tensor in base.items() if key.startswith(prefix) and key not in state}
    state.update(lent)
    if lent:
        notes.append(f"{len(lent)} tensors of {title} come from the base.")


def _is_partial(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a base must lend weights: no complete backbone, or no text tower."""
    return _COMPLETE not in state or not any(key.startswith("text_model.") for key in state)


def _read_base(base: Any, weights: bool, **hub: Any) -> tuple[PreTrainedConfig | None, dict[str, torch.Tensor]]:
    """The base's config, and its tensors under the names of the dual encoder (without any branch)."""
    if base is None:
        return None, {}
    if isinstance(base, PreTrainedConfig):
        return base, {}
    if isinstance(base, (str, Path)):
        if not weights:
            return AutoConfig.from_pretrained(base, **hub), {}
        base = AutoModel.from_pretrained(base, **hub)
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"base is a {type(base).__name__}; pass a Hub id, a folder, a model or a config.")
    tower = find_tower(base)
    state = {f"vision_model.{key}": tensor for key, tensor in tower.state_dict().items()}
    if not isinstance(tower, BTAdapterVisionModel):
        state = {f"vision_model.{key}": tensor for key, tensor in state.items()}
    if hasattr(base, "text_projection") and hasattr(base, "visual_projection"):  # CLIPModel or BTAdapterModel
        for key, tensor in base.state_dict().items():
            if key.startswith(("text_model.", "text_projection.", "visual_projection.", "logit_scale")):
                state[key] = tensor
        config = base.config
    else:
        config = tower.config
    return config, {key: tensor.detach() for key, tensor in state.items() if not key.startswith(_BRANCH)}


def _backbone_config(config: PreTrainedConfig | None) -> PreTrainedConfig | None:
    """The native vision config inside a config of any of the bases."""
    while config is not None and config.model_type not in BACKBONE_TYPES:
        inner = getattr(config, "vision_config", None) or getattr(config, "backbone", None)
        if inner is None:
            raise CheckpointError(f"The base, a {config.model_type!r}, has no vision model that takes a BT-Adapter.")
        config = inner
    return config


def _place_layers(
    source: str,
    found: RenamedCheckpoint,
    state: dict[str, torch.Tensor],
    base_config: PreTrainedConfig | None,
    adapter_layers: list[int] | None,
    notes: list[str],
) -> list[int]:
    """Which backbone layers feed the branch of the file. Renumbers the backbone layers of LLaVA's cached tower."""
    K = _count(state, _BRANCH + "layers.")
    if K == 0:
        raise CheckpointError(f"{source} holds parts of a branch, but none of its layers: it is incomplete.")
    stored = _count(state, _LAYERS)
    complete = _COMPLETE in state
    backbone = _backbone_config(base_config)
    if not complete and backbone is None:
        raise CheckpointError(
            f"{source} holds the branch ({K} layers) without a backbone: pass base=, the image model that it was "
            "trained on, such as base='openai/clip-vit-large-patch14'."
        )
    # LLaVA's cached tower holds the backbone layers that feed the branch, under new numbers, and the positions only.
    partial = not complete and any(key.startswith(_BACKBONE) for key in state)
    cached = partial and stored == K and found.layout.family == "clip"
    if partial and not cached:
        raise CheckpointError(
            f"{source} holds {stored} layers of the backbone but not its patch embedding, and {K} branch layers. It "
            "is neither a whole tower, nor a branch, nor LLaVA's cached tower: it is incomplete."
        )
    depth = stored if complete else backbone.num_hidden_layers
    if found.layout.family == "eva" and not complete and depth == _LAVIS_DEPTH:
        depth = _EVA_DEPTH
    # LLaVA's tuning works on the layers before the last, and saves the branch without its last layer.
    tuned = cached or (not complete and found.layout.tower_prefix == LLAVA_PREFIX)
    last = depth - 1 if tuned else depth
    layers = adapter_layers if adapter_layers is not None else list(range(last - K, last))
    if len(layers) != K or layers[0] < 0:
        raise CheckpointError(
            f"{source} holds {K} branch layers; adapter_layers={layers} names {len(layers)} layers of a backbone with "
            f"{depth}. Name {K} layers, each at least 0."
        )
    if cached:
        numbered = {key: tensor for key, tensor in state.items() if key.startswith(_LAYERS)}
        for key in numbered:
            del state[key]
        for key, tensor in numbered.items():
            number, rest = key.removeprefix(_LAYERS).split(".", 1)
            name = f"{_LAYERS}{layers[int(number)]}.{rest}"
            state[name] = tensor
            found.origin[name] = found.origin.pop(key)
        notes.append(f"It is LLaVA's cached tower: its layers 0..{stored - 1} are the backbone's {layers}.")
    return layers


def _tower_config(
    source: str,
    found: RenamedCheckpoint,
    state: dict[str, torch.Tensor],
    base_config: PreTrainedConfig | None,
    adapter_layers: list[int],
    fields: dict[str, Any],
    notes: list[str],
) -> BTAdapterVisionConfig:
    backbone = _backbone_config(base_config)
    complete = _COMPLETE in state
    if backbone is None:
        backbone = _infer_backbone(source, found.layout.family, state)
    else:
        eva = backbone.model_type in ("blip_2_vision_model", "instructblip_vision_model")
        if eva != (found.layout.family == "eva") or backbone.model_type == "siglip_vision_model":
            raise CheckpointError(
                f"{source} is of the {found.layout.family} kind and the base is a {backbone.model_type}: pass the "
                "base that it was trained on."
            )
        stored = _count(state, _LAYERS)
        if eva and complete and stored == backbone.num_hidden_layers + 1:  # the base leaves out the last layer
            backbone = type(backbone)(**{**backbone.to_dict(), "num_hidden_layers": stored})
    keep = [layer for layer in adapter_layers if layer < backbone.num_hidden_layers]
    if not keep:
        raise CheckpointError(
            f"The branch is fed by the backbone layers {adapter_layers}; the base has {backbone.num_hidden_layers}."
        )
    rate = fields.pop("drop_path_rate", BTAdapterVisionConfig.__dataclass_fields__["drop_path_rate"].default)
    if len(keep) < len(adapter_layers):
        branch = {key.removeprefix(_BRANCH): key for key in state if key.startswith(_BRANCH)}
        kept = first_layers(branch, len(keep))
        for name in branch.keys() - kept.keys():
            del state[branch[name]]
        rate = rate * (len(keep) - 1) / (len(adapter_layers) - 1)
        notes.append(
            f"The base has no layer {adapter_layers[len(keep) :]}: the first {len(keep)} branch layers are attached."
        )
    if found.layout.family == "eva":
        fields = {"fusion": "sum", "output_fusion": "sum", "spatial_layer_norm_eps": 1e-5, **fields}
    else:
        fields = _gate_fields(found, state, fields, len(keep), notes)
    if _BRANCH + "time_embedding.weight" in state:
        fields["max_frames"] = len(state[_BRANCH + "time_embedding.weight"])
    fields.setdefault("num_trained_frames", None)  # the table is read as released
    return BTAdapterVisionConfig(backbone=backbone, adapter_layers=keep, drop_path_rate=rate, **fields)


def _gate_fields(
    found: RenamedCheckpoint, state: dict[str, torch.Tensor], fields: dict[str, Any], K: int, notes: list[str]
) -> dict[str, Any]:
    has = {"fusion": _FUSION_GATE in state, "output_fusion": _OUTPUT_GATE in state}
    branch_only = not any(key.startswith(_BACKBONE) for key in found.state)
    tuned = branch_only and found.layout.tower_prefix == LLAVA_PREFIX
    if tuned and not any(has.values()) and fields.get("fusion") != "sum":
        # LLaVA's tuning runs with gates and does not save them; the released inference then finds them at zero.
        like = state.get(_BRANCH + "video_cls", torch.empty(0))
        for key in (_FUSION_GATE, _OUTPUT_GATE):
            state[key] = torch.zeros_like(like)
            found.origin[key] = "(zeros)"
        notes.append("LLaVA's tuning does not save its gates; they are zero (half and half), as in the released code.")
        has = {"fusion": True, "output_fusion": True}
    if K == 1 and has["fusion"]:
        del state[_FUSION_GATE]
        notes.append(f"{found.origin[_FUSION_GATE]} is left out: a branch of one layer never uses it.")
    fields = {**{name: "gate" if there else "sum" for name, there in has.items()}, **fields}
    if has["fusion"] != has["output_fusion"]:
        fields = {**fields, "fusion": "gate", "output_fusion": "gate"}  # one of two is a defect: report the other
    for name, key in (("fusion", _FUSION_GATE), ("output_fusion", _OUTPUT_GATE)):
        if fields[name] == "sum" and key in state:
            del state[key]
            notes.append(f'{found.origin[key]} is left out, as {name}="sum" asks.')
    return fields


def _infer_backbone(source: str, family: str, state: Mapping[str, torch.Tensor]) -> PreTrainedConfig:
    """The backbone's config from the shapes of its weights."""
    try:
        D, _, patch, _ = state[_BACKBONE + "embeddings.patch_embedding.weight"].shape
        name = "embeddings.position_embedding" + (".weight" if family == "clip" else "")
        positions = state[_BACKBONE + name].shape[-2]
        sizes = {
            "hidden_size": D,
            "intermediate_size": len(state[_LAYERS + "0.mlp.fc1.weight"]),
            "num_hidden_layers": _count(state, _LAYERS),
            "num_attention_heads": _heads(source, D, _HEAD_WIDTH[family]),
            "image_size": patch * math.isqrt(positions - 1),
            "patch_size": patch,
        }
    except KeyError as error:
        raise CheckpointError(f"{source} has a backbone without {error}: it is incomplete.") from error
    if family == "clip":
        return CLIPVisionConfig(**sizes, hidden_act="quick_gelu")
    return Blip2VisionConfig(**sizes, hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True)


def _heads(source: str, width: int, head_width: int) -> int:
    if width % head_width:
        raise CheckpointError(
            f"The number of attention heads cannot be told from {source}: its width {width} is no multiple of "
            f"{head_width}. Pass base=, the model that it was trained on or its config."
        )
    return width // head_width


def _dual_config(
    source: str,
    found: RenamedCheckpoint,
    state: Mapping[str, torch.Tensor],
    base_config: PreTrainedConfig | None,
    tower_config: BTAdapterVisionConfig,
    fields: dict[str, Any],
) -> BTAdapterConfig:
    for key in ("text_model.embeddings.token_embedding.weight", "text_projection.weight", "visual_projection.weight"):
        if key not in state:
            raise CheckpointError(
                f"{source} has no {key}, which a dual encoder needs: pass a CLIP as base=, or "
                "model_class=BTAdapterVisionModel for the video tower alone."
            )
    text_config = getattr(base_config, "text_config", None)
    if not isinstance(text_config, CLIPTextConfig):
        tokens = state["text_model.embeddings.token_embedding.weight"]
        if "text_model.encoder.layers.0.mlp.fc1.weight" not in state:
            raise CheckpointError(f"{source} has a text tower without layers: it is incomplete.")
        text_config = CLIPTextConfig(
            vocab_size=tokens.shape[0],
            hidden_size=tokens.shape[1],
            intermediate_size=len(state["text_model.encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=_count(state, "text_model.encoder.layers."),
            num_attention_heads=_heads(source, tokens.shape[1], 64),
            max_position_embeddings=len(state["text_model.embeddings.position_embedding.weight"]),
            hidden_act="quick_gelu" if found.layout.family == "clip" else "gelu",
            projection_dim=len(state["text_projection.weight"]),
        )
    # As released, the text is pooled at its largest token id; transformers keeps that rule for this id.
    text_config = CLIPTextConfig(**{**text_config.to_dict(), "eos_token_id": 2})
    return BTAdapterConfig(
        text_config=text_config,
        vision_config=tower_config,
        projection_dim=len(state["visual_projection.weight"]),
        visual_projection_bias="visual_projection.bias" in state,
        logit_scale_init_value=-math.log(_RELEASED_TEMPERATURE),
        **{"mbta_weight": 0.0 if found.layout.family == "eva" else 0.1, **fields},
    )


def _count(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    numbers = {int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix)}
    return max(numbers) + 1 if numbers else 0


def _widest(state: Mapping[str, torch.Tensor]) -> torch.dtype:
    dtype = None
    for tensor in state.values():
        if tensor.is_floating_point():
            dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


def _without_place(keys: list[str], model_class: type) -> dict[str, list[str]]:
    """Parts that a smaller model does not have, as a whole: {what they are: their keys}."""
    parts = {}
    if model_class is not BTAdapterForPreTraining:
        parts["mbta_head."] = "the alignment head of pretraining (keep it with model_class=BTAdapterForPreTraining)"
    if model_class is BTAdapterVisionModel:
        parts |= {"visual_projection.": "the projection", "text_": "the text tower"}
    found: dict[str, list[str]] = {}
    for key in keys:
        for prefix, title in parts.items():
            if key.startswith(prefix):
                found.setdefault(title, []).append(key)
    return found


def _check(
    source: str, state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size], names: Mapping[str, str]
) -> None:
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    sizes = sorted(key for key in expected.keys() & state.keys() if expected[key] != state[key].shape)
    problems = []
    for title, keys, others in (
        ("are missing", missing, unexpected),
        ("have no place in the model", unexpected, missing),
    ):
        if keys:
            others = [names[key] for key in others]
            problems.append(f"{len(keys)} tensors {title}:\n" + _nearest([names[key] for key in keys], others))
    if sizes:
        lines = [
            f"  {names[key]}: {tuple(state[key].shape)}, the model needs {tuple(expected[key])}" for key in sizes[:5]
        ]
        problems.append(f"{len(sizes)} tensors are of another size:\n" + "\n".join(lines) + _more(sizes))
    if problems:
        raise CheckpointError(
            f"{source} does not fill the model ({len(expected)} tensors):\n"
            + "\n".join(problems)
            + "\nIs it complete, and is base= the model that it was trained on?"
        )


def _nearest(keys: list[str], others: list[str]) -> str:
    lines = []
    for key in keys[:5]:
        near = difflib.get_close_matches(key, others, n=1)
        lines.append(f"  {key}" + (f" (nearest: {near[0]})" if near else ""))
    return "\n".join(lines) + _more(keys)


def _more(keys: list[str]) -> str:
    return f"\n  and {len(keys) - 5} more" if len(keys) > 5 else ""


def _no_branch(source: str, found: RenamedCheckpoint) -> str:
    if found.projector and not found.state and not found.unknown:
        return (
            f"{source} is LLaVA's projector file ({', '.join(found.projector)}) and holds no BT-Adapter. The chat "
            "models take it; convert the btadapter_weight.bin beside it."
        )
    seen = [*found.unknown, *found.origin.values()]
    return (
        f"{source} holds no BT-Adapter: none of its {len(seen) + len(found.projector)} tensors begins with "
        "btadapter or timesFPN, behind backbone., model.vision_tower. or nothing. It begins with "
        f"{', '.join(map(repr, seen[:3]))}. Pass a checkpoint of the released code; a CLIP alone takes a fresh "
        "branch with get_bt_adapter_model."
    )


def _unknown(source: str, found: RenamedCheckpoint) -> str:
    known = sorted(found.origin.values())
    return (
        f"{source} holds {len(found.unknown)} tensors of {len(found.unknown) + len(known)} that no released "
        f"checkpoint has:\n{_nearest(list(found.unknown), known)}\nIs it a checkpoint of another model, or of a "
        "changed one? Take out what does not belong to the BT-Adapter, and pass the rest as a state dict."
    )
