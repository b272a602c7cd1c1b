"""The configs of the models that released checkpoints become: from the file's tensors and the base."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Blip2VisionConfig, CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig

from ..adapters.fingerprint import TRAINING_FIELDS
from ..adapters.fitting import first_layers
from ..models.configuration_bt_adapter import TOWER_FIELDS, BTAdapterConfig, BTAdapterVisionConfig
from .base import backbone_config
from .names import BACKBONE, BRANCH, COMPLETE, LAYERS, LLAVA_PREFIX, RenamedCheckpoint
from .reading import CheckpointError


_FUSION_GATE, _OUTPUT_GATE = BRANCH + "fusion_gate", BRANCH + "output_gate"
# Attention heads cannot be read off the weights. Without a base: the head width of every OpenAI CLIP, and of
# EVA-CLIP-g.
_HEAD_WIDTH = {"clip": 64, "eva": 88}
# The image towers of BLIP-2, InstructBLIP and MiniGPT-4 leave out the last of EVA-CLIP-g's layers.
_EVA_DEPTH, _LAVIS_DEPTH = 40, 39
RELEASED_TEMPERATURE = 0.01


def fields_of_base(base_config: PreTrainedConfig | None, found: RenamedCheckpoint, notes: list[str]) -> dict[str, Any]:
    """The settings of the branch that a dual encoder or tower of ours, given as the base, has and a file has not."""
    if isinstance(base_config, BTAdapterConfig):
        base_config = base_config.vision_config
    if not isinstance(base_config, BTAdapterVisionConfig):
        return {}
    shapes = {"max_frames"} if found.layout.family == "eva" else {"max_frames", "fusion", "output_fusion"}
    fields = {name: getattr(base_config, name) for name in TOWER_FIELDS - shapes}
    if len(base_config.adapter_layers) != count_layers(found.state, BRANCH + "layers."):
        del fields["adapter_layers"]
    fields["num_trained_frames"] = fields["num_trained_frames"] or None  # not recorded: read as released
    # what the user would not get from a base that has no branch
    released = BTAdapterVisionConfig(backbone=base_config.backbone, num_trained_frames=None).to_dict()
    told = sorted(
        f"{name}={value!r}"
        for name, value in fields.items()
        if name not in TRAINING_FIELDS | {"adapter_layers"} and value != released[name]
    )
    if told:
        notes.append(f"The branch is read with the settings of the base: {', '.join(told)}.")
    return fields


def settings_not_in_the_file(config: BTAdapterVisionConfig, found: RenamedCheckpoint) -> dict[str, tuple[Any, Any]]:
    """The settings of a branch that decide its features and that no released file holds, where they are not what the
    released code has: by name, the model's value and the released one."""
    layers = place_layers("", found, dict(found.state), config.backbone, None, [])
    released = make_tower_config("", found, dict(found.state), config.backbone, layers, {}, [])
    names = sorted(TOWER_FIELDS - TRAINING_FIELDS)
    values = {name: (getattr(config, name), getattr(released, name)) for name in names}
    return {name: (own, theirs) for name, (own, theirs) in values.items() if own != theirs}


def place_layers(
    source: str,
    found: RenamedCheckpoint,
    state: dict[str, torch.Tensor],
    base_config: PreTrainedConfig | None,
    adapter_layers: list[int] | None,
    notes: list[str],
) -> list[int]:
    """Which backbone layers feed the branch of the file. Renumbers the backbone layers of LLaVA's cached tower."""
    K = count_layers(state, BRANCH + "layers.")
    if K == 0:
        raise CheckpointError(f"{source} holds parts of a branch, but none of its layers: it is incomplete.")
    stored = count_layers(state, LAYERS)
    complete = COMPLETE in state
    backbone = backbone_config(base_config)
    if not complete and backbone is None:
        raise CheckpointError(
            f"{source} holds the branch ({K} layers) without a backbone: pass base=, the image model that it was "
            "trained on, such as base='openai/clip-vit-large-patch14'."
        )
    # LLaVA's cached tower holds the backbone layers that feed the branch, under new numbers, and the positions only.
    partial = not complete and any(key.startswith(BACKBONE) for key in state)
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
        numbered = {key: tensor for key, tensor in state.items() if key.startswith(LAYERS)}
        for key in numbered:
            del state[key]
        for key, tensor in numbered.items():
            number, rest = key.removeprefix(LAYERS).split(".", 1)
            name = f"{LAYERS}{layers[int(number)]}.{rest}"
            state[name] = tensor
            found.origin[name] = found.origin.pop(key)
        notes.append(f"It is LLaVA's cached tower: its layers 0..{stored - 1} are the backbone's {layers}.")
    return layers


def make_tower_config(
    source: str,
    found: RenamedCheckpoint,
    state: dict[str, torch.Tensor],
    base_config: PreTrainedConfig | None,
    adapter_layers: list[int],
    fields: dict[str, Any],
    notes: list[str],
) -> BTAdapterVisionConfig:
    backbone = backbone_config(base_config)
    complete = COMPLETE in state
    if backbone is None:
        backbone = _infer_backbone(source, found.layout.family, state)
    else:
        eva = backbone.model_type in ("blip_2_vision_model", "instructblip_vision_model")
        if eva != (found.layout.family == "eva") or backbone.model_type == "siglip_vision_model":
            raise CheckpointError(
                f"{source} is of the {found.layout.family} kind and the base is a {backbone.model_type}: pass the "
                "base that it was trained on."
            )
        stored = count_layers(state, LAYERS)
        if eva and complete and stored == backbone.num_hidden_layers + 1:  # the base leaves out the last layer
            backbone = type(backbone)(**{**backbone.to_dict(), "num_hidden_layers": stored})
    keep = [layer for layer in adapter_layers if layer < backbone.num_hidden_layers]
    if not keep:
        raise CheckpointError(
            f"The branch is fed by the backbone layers {adapter_layers}; the base has {backbone.num_hidden_layers}."
        )
    rate = fields.pop("drop_path_rate", BTAdapterVisionConfig.__dataclass_fields__["drop_path_rate"].default)
    if len(keep) < len(adapter_layers):
        branch = {key.removeprefix(BRANCH): key for key in state if key.startswith(BRANCH)}
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
    if BRANCH + "time_embedding.weight" in state:
        fields["max_frames"] = len(state[BRANCH + "time_embedding.weight"])
    fields.setdefault("num_trained_frames", None)  # the table is read as released
    return BTAdapterVisionConfig(backbone=backbone, adapter_layers=keep, drop_path_rate=rate, **fields)


def _gate_fields(
    found: RenamedCheckpoint, state: dict[str, torch.Tensor], fields: dict[str, Any], K: int, notes: list[str]
) -> dict[str, Any]:
    has = {"fusion": _FUSION_GATE in state, "output_fusion": _OUTPUT_GATE in state}
    branch_only = not any(key.startswith(BACKBONE) for key in found.state)
    tuned = branch_only and found.layout.tower_prefix == LLAVA_PREFIX
    if tuned and not any(has.values()) and fields.get("fusion") != "sum":
        # LLaVA's tuning runs with gates and does not save them; the released inference then finds them at zero.
        like = state.get(BRANCH + "video_cls", torch.empty(0))
        for key in (_FUSION_GATE, _OUTPUT_GATE):
            state[key] = torch.zeros_like(like)
            found.origin[key] = "(zeros)"
        notes.append("LLaVA's tuning does not save its gates; they are zero (half and half), as in the released code.")
        has = {"fusion": True, "output_fusion": True}
    if K == 1 and has["fusion"]:
        del state[_FUSION_GATE]
        notes.append(f"{found.origin[_FUSION_GATE]} is left out: a branch of one layer never uses it.")
    # one of two is a defect, unless a field says so: report the other
    gated = any(has.values())
    fields = {**dict.fromkeys(has, "gate" if gated else "sum"), **fields}
    for name, key in (("fusion", _FUSION_GATE), ("output_fusion", _OUTPUT_GATE)):
        if fields[name] == "sum" and key in state:
            del state[key]
            notes.append(f'{found.origin[key]} is left out, as {name}="sum" asks.')
    return fields


def _infer_backbone(source: str, family: str, state: Mapping[str, torch.Tensor]) -> PreTrainedConfig:
    """The backbone's config from the shapes of its weights."""
    try:
        D, _, patch, _ = state[BACKBONE + "embeddings.patch_embedding.weight"].shape
        name = "embeddings.position_embedding" + (".weight" if family == "clip" else "")
        positions = state[BACKBONE + name].shape[-2]
        sizes = {
            "hidden_size": D,
            "intermediate_size": len(state[LAYERS + "0.mlp.fc1.weight"]),
            "num_hidden_layers": count_layers(state, LAYERS),
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


def make_dual_config(
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
            num_hidden_layers=count_layers(state, "text_model.encoder.layers."),
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
        logit_scale_init_value=-math.log(RELEASED_TEMPERATURE),
        **{"mbta_weight": 0.0 if found.layout.family == "eva" else 0.1, **fields},
    )


def count_layers(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    numbers = {int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix)}
    return max(numbers) + 1 if numbers else 0
