"""The key names of the released checkpoints and ours, key by key, in both directions.

Pure functions on state dicts. Our side is the naming of [`BTAdapterForPreTraining`], the largest of the models:
`vision_model.vision_model.*`, `vision_model.bt_adapter.*`, `visual_projection.*`, `text_model.*`,
`text_projection.weight`, `mbta_head.*`. Tensors keep their bytes: they are renamed, reshaped, transposed, split or
joined, never computed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from .reading import CheckpointError


BACKBONE = "vision_model.vision_model."
BRANCH = "vision_model.bt_adapter."
LAYERS = BACKBONE + "encoder.layers."
COMPLETE = BACKBONE + "embeddings.patch_embedding.weight"  # whether the backbone is there
LLAVA_PREFIX = "model.vision_tower."
# Prefixes in front of the keys of the tower, tried in this order, as often as they occur.
_TOWER_PREFIXES = (LLAVA_PREFIX, "backbone.")
_TEXT_PREFIXES = ("text_backbone.", "text.", "")
_PROJECTOR_KEYS = re.compile(r"^(?:model\.)?(mm_projector\.(?:weight|bias)|embed_(?:tokens|in)\.weight)$")

# (released name, our name). "{n}" stands for a layer number; a name that ends with a dot stands for all that follow
# it.
_CLIP_TOWER = (
    ("btadapter_cls_token", "vision_model.bt_adapter.video_cls"),
    ("btadapter_time_embed.", "vision_model.bt_adapter.time_embedding."),
    ("btadapter_T_layers.{n}.layer_norm1.", "vision_model.bt_adapter.layers.{n}.temporal.norm."),
    ("btadapter_T_layers.{n}.self_attn.", "vision_model.bt_adapter.layers.{n}.temporal.attn."),
    ("btadapter_T_layers.{n}.temporal_fc.", "vision_model.bt_adapter.layers.{n}.temporal.proj."),
    ("btadapter_S_layers.{n}.layer_norm1.", "vision_model.bt_adapter.layers.{n}.spatial.norm1."),
    ("btadapter_S_layers.{n}.self_attn.", "vision_model.bt_adapter.layers.{n}.spatial.attn."),
    ("btadapter_S_layers.{n}.layer_norm2.", "vision_model.bt_adapter.layers.{n}.spatial.norm2."),
    ("btadapter_S_layers.{n}.mlp.", "vision_model.bt_adapter.layers.{n}.spatial.mlp."),
    ("balance1", "vision_model.bt_adapter.output_gate"),
    ("balance2", "vision_model.bt_adapter.fusion_gate"),
    ("class_embedding", "vision_model.vision_model.embeddings.class_embedding"),
    ("patch_embedding.", "vision_model.vision_model.embeddings.patch_embedding."),
    ("position_embedding.", "vision_model.vision_model.embeddings.position_embedding."),
    ("pre_layrnorm.", "vision_model.vision_model.pre_layrnorm."),
    ("post_layernorm.", "vision_model.vision_model.post_layernorm."),
    ("layers.{n}.", "vision_model.vision_model.encoder.layers.{n}."),
    ("visual_projection.", "visual_projection."),
)
_EVA_TOWER = (
    ("btadapter_cls", "vision_model.bt_adapter.video_cls"),
    ("btadapter_position.", "vision_model.bt_adapter.time_embedding."),
    ("btadapter_T.{n}.norm1.", "vision_model.bt_adapter.layers.{n}.temporal.norm."),
    ("btadapter_T.{n}.attn.proj.", "vision_model.bt_adapter.layers.{n}.temporal.attn.projection."),
    ("btadapter_T.{n}.attn.", "vision_model.bt_adapter.layers.{n}.temporal.attn."),
    ("btadapter_T.{n}.temporal_fc.", "vision_model.bt_adapter.layers.{n}.temporal.proj."),
    ("btadapter_S.{n}.norm1.", "vision_model.bt_adapter.layers.{n}.spatial.norm1."),
    ("btadapter_S.{n}.attn.proj.", "vision_model.bt_adapter.layers.{n}.spatial.attn.projection."),
    ("btadapter_S.{n}.attn.", "vision_model.bt_adapter.layers.{n}.spatial.attn."),
    ("btadapter_S.{n}.norm2.", "vision_model.bt_adapter.layers.{n}.spatial.norm2."),
    ("btadapter_S.{n}.mlp.", "vision_model.bt_adapter.layers.{n}.spatial.mlp."),
    ("cls_token", "vision_model.vision_model.embeddings.class_embedding"),
    ("pos_embed", "vision_model.vision_model.embeddings.position_embedding"),
    ("patch_embed.proj.", "vision_model.vision_model.embeddings.patch_embedding."),
    ("blocks.{n}.norm1.", "vision_model.vision_model.encoder.layers.{n}.layer_norm1."),
    ("blocks.{n}.attn.proj.", "vision_model.vision_model.encoder.layers.{n}.self_attn.projection."),
    ("blocks.{n}.attn.", "vision_model.vision_model.encoder.layers.{n}.self_attn."),
    ("blocks.{n}.norm2.", "vision_model.vision_model.encoder.layers.{n}.layer_norm2."),
    ("blocks.{n}.mlp.", "vision_model.vision_model.encoder.layers.{n}.mlp."),
    ("norm.", "vision_model.vision_model.post_layernorm."),
    ("head.", "visual_projection."),
)
_CLIP_TEXT = (
    ("text_model.", "text_model."),
    ("text_projection.", "text_projection."),
)
# The text tower of EVA-CLIP, as open_clip writes it.
_EVA_TEXT = (
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("transformer.resblocks.{n}.ln_1.", "text_model.encoder.layers.{n}.layer_norm1."),
    ("transformer.resblocks.{n}.attn.in_proj_", "text_model.encoder.layers.{n}.self_attn.in_proj_"),
    ("transformer.resblocks.{n}.attn.out_proj.", "text_model.encoder.layers.{n}.self_attn.out_proj."),
    ("transformer.resblocks.{n}.ln_2.", "text_model.encoder.layers.{n}.layer_norm2."),
    ("transformer.resblocks.{n}.mlp.c_fc.", "text_model.encoder.layers.{n}.mlp.fc1."),
    ("transformer.resblocks.{n}.mlp.c_proj.", "text_model.encoder.layers.{n}.mlp.fc2."),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
)
_HEAD = (
    ("extra_proj.0.", "mbta_head.linear."),
    ("extra_proj.1.", "mbta_head.norm."),
)
_TOWER = {"clip": _CLIP_TOWER, "eva": _EVA_TOWER}
_TEXT = {"clip": _CLIP_TEXT, "eva": _EVA_TEXT}


@dataclass
class Layout:
    """How a released checkpoint writes its keys; what is needed to write them again."""

    family: Literal["clip", "eva"] = "clip"
    tower_prefix: str = ""
    text_prefix: str = ""
    position_ids: bool = False  # the buffer `embeddings.position_ids` of the text tower, which is only 0, 1, 2, ...


@dataclass
class RenamedCheckpoint:
    """A released checkpoint under our names."""

    state: dict[str, torch.Tensor]
    layout: Layout
    origin: dict[str, str]  # our name -> released name(s), for messages
    projector: dict[str, torch.Tensor] = field(default_factory=dict)  # LLaVA's, without `model.`
    unknown: dict[str, torch.Tensor] = field(default_factory=dict)  # under the released names


def rename_from_released(checkpoint: Mapping[str, torch.Tensor]) -> RenamedCheckpoint:
    """Released names -> our names.

    Args:
        checkpoint: state dict of the released code, in any of its spellings: CLIP or EVA tower; with `backbone.`,
            `model.vision_tower.` or nothing in front; `timesFPN` for `btadapter`; with or without text tower,
            alignment head and LLaVA's projector.

    Raises:
        CheckpointError: if the keys mix CLIP and EVA names or several prefixes.
    """
    layout = Layout()
    found = RenamedCheckpoint({}, layout, {})
    families: dict[str, str] = {}  # family -> a key of it
    tower_prefixes: dict[str, str] = {}
    text_prefixes: dict[str, str] = {}
    for key, tensor in checkpoint.items():
        if match := _PROJECTOR_KEYS.match(key):
            found.projector[match[1]] = tensor
            continue
        if key.endswith("position_ids"):
            layout.position_ids |= "text_model" in key
            continue
        prefix, short = _split_prefix(key)
        hit = _find(short.replace("timesFPN", "btadapter"), _TOWER)
        if hit is not None:
            tower_prefixes.setdefault(prefix, key)
        elif key.startswith("extra_proj."):
            hit = (None, _translate(key, _HEAD))
        else:
            for prefix in _TEXT_PREFIXES:
                hit = _find(key.removeprefix(prefix), _TEXT) if key.startswith(prefix) else None
                if hit is not None:
                    text_prefixes.setdefault(prefix, key)
                    break
        if hit is None or hit[1] is None:
            found.unknown[key] = tensor
            continue
        family, name = hit
        if family is not None:
            families.setdefault(family, key)
        found.state[name] = tensor
        found.origin[name] = key
    for what, seen in (("families", families), ("prefixes", tower_prefixes), ("text prefixes", text_prefixes)):
        if len(seen) > 1:
            raise CheckpointError(
                f"The checkpoint mixes {what}, as no released one does: {', '.join(map(repr, seen.values()))}. Is it "
                "merged from several files? Convert them one by one."
            )
    layout.family = next(iter(families), "clip")
    layout.tower_prefix = next(iter(tower_prefixes), "")
    layout.text_prefix = next(iter(text_prefixes), "")
    _reshape_from_released(found)
    return found


def rename_to_released(state: Mapping[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor]:
    """Our names -> released names, the inverse of [`rename_from_released`]; `logit_scale` has no released name.

    Raises:
        CheckpointError: if a key has no released counterpart.
    """
    state = {key: tensor for key, tensor in state.items() if key != "logit_scale"}
    _reshape_to_released(state, layout)
    released = {}
    for key, tensor in state.items():
        name = released_name(key, layout)
        if name is None:
            raise CheckpointError(
                f"{key!r} has no counterpart in the released checkpoints of the {layout.family} kind."
            )
        released[name] = tensor
    if layout.position_ids:
        key = layout.text_prefix + "text_model.embeddings.position_embedding.weight"
        if key in released:
            ids = torch.arange(len(released[key]))[None]
            released[layout.text_prefix + "text_model.embeddings.position_ids"] = ids
    return released


def released_name(key: str, layout: Layout) -> str | None:
    """The released name of one of our tensors; `None` where there is none."""
    tables = (
        (layout.tower_prefix, _TOWER[layout.family]),
        (layout.text_prefix, _TEXT[layout.family]),
        ("", _HEAD),
    )
    for prefix, table in tables:
        name = _translate(key, [(ours, theirs) for theirs, ours in table])
        if name is not None:
            return prefix + name
    return None


def _split_prefix(key: str) -> tuple[str, str]:
    short = key
    for prefix in _TOWER_PREFIXES:
        short = short.removeprefix(prefix)
    return key[: len(key) - len(short)], short


def _find(key: str, tables: dict[str, tuple]) -> tuple[str, str] | None:
    """(family, translated key) in the first family whose table knows the key."""
    for family, table in tables.items():
        name = _translate(key, table)
        if name is not None:
            return family, name
    return None


def _translate(key: str, table) -> str | None:
    for source, target in table:
        if "{n}" not in source:
            if key == source or (source[-1] in "._" and key.startswith(source)):
                return target + key[len(source) :]
            continue
        before, after = source.split("{n}")
        match = re.match(rf"{re.escape(before)}(\d+){re.escape(after)}", key)
        if match:
            return target.replace("{n}", match[1]) + key[match.end() :]
    return None


_VIDEO_CLS = "vision_model.bt_adapter.video_cls"


def _reshape_from_released(found: RenamedCheckpoint) -> None:
    state, origin = found.state, found.origin
    if _VIDEO_CLS in state and state[_VIDEO_CLS].shape[:-1] == (1, 1):
        state[_VIDEO_CLS] = state[_VIDEO_CLS].reshape(-1)
    if found.layout.family == "clip":
        return
    # EVA's attention has a query and a value bias; the key bias, which changes nothing in a softmax, is zero here.
    for key in [key for key in state if key.endswith(".q_bias")]:
        base = key.removesuffix("q_bias")
        if base + "v_bias" in state:
            q, v = state.pop(key), state.pop(base + "v_bias")
            state[base + "qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
            origin[base + "qkv.bias"] = f"{origin.pop(key)} + v_bias"
            origin.pop(base + "v_bias")
    for kind in ("weight", "bias"):
        for key in [key for key in state if key.endswith(f".in_proj_{kind}")]:
            fused, name = state.pop(key), origin.pop(key)
            base = key.removesuffix(f"in_proj_{kind}")
            for part, tensor in zip("qkv", fused.chunk(3), strict=False):
                state[f"{base}{part}_proj.{kind}"] = tensor.contiguous()
                origin[f"{base}{part}_proj.{kind}"] = name
    if "text_projection.weight" in state:
        state["text_projection.weight"] = state["text_projection.weight"].t().contiguous()


def _reshape_to_released(state: dict[str, torch.Tensor], layout: Layout) -> None:
    if _VIDEO_CLS in state:
        state[_VIDEO_CLS] = state[_VIDEO_CLS].reshape(1, 1, -1)
    if layout.family == "clip":
        return
    for key in [key for key in state if key.endswith(".qkv.bias")]:
        q, _, v = state.pop(key).chunk(3)
        base = key.removesuffix("qkv.bias")
        state[base + "q_bias"], state[base + "v_bias"] = q.contiguous(), v.contiguous()
    for kind in ("weight", "bias"):
        for key in [key for key in state if re.match(rf"text_model\..*\.q_proj\.{kind}$", key)]:
            base = key.removesuffix(f"q_proj.{kind}")
            state[f"{base}in_proj_{kind}"] = torch.cat([state.pop(f"{base}{part}_proj.{kind}") for part in "qkv"])
    if "text_projection.weight" in state:
        state["text_projection.weight"] = state["text_projection.weight"].t().contiguous()
