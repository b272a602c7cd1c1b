"""Released checkpoints -> models, strictly, and models -> state dicts with the released names."""

import inspect
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..adapters.files import lasting_name
from ..models.configuration_bt_adapter import TOWER_FIELDS, BTAdapterConfig
from ..models.modeling_bt_adapter import BTAdapterModel
from ..models.modeling_bt_adapter_vision import BTAdapterPreTrainedModel, BTAdapterVisionModel
from .base import is_partial, lend, read_base
from .checks import check_tensors, no_branch, unknown_tensors, without_place
from .configs import (
    RELEASED_TEMPERATURE,
    fields_of_base,
    make_dual_config,
    make_tower_config,
    place_layers,
    settings_not_in_the_file,
)
from .names import BACKBONE, BRANCH, COMPLETE, Layout, released_name, rename_from_released, rename_to_released
from .reading import CheckpointError, read_checkpoint


logger = logging.get_logger(__name__)

# Parts that a base lends as a whole, if the file has nothing of them.
_LENT = {"text_model.": "the text tower", "text_projection.": "the text tower", "visual_projection.": "the projection"}


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


def convert_original_checkpoint(*args: Any, **kwargs: Any) -> BTAdapterPreTrainedModel:
    """Builds a model that computes what a released checkpoint computes.

    The defects of the released code are not switched on with it; see `docs/released_and_paper.md` for the fields
    (`mask_order`, `temporal_window`, `mbta_pairing`, `cls_position`, ...) that reproduce each of them.

    Args:
        checkpoint: file (`.pth`, `.pt`, `.bin`, `.safetensors`), or state dict, in any of the released spellings. Read
            with `weights_only=True`.
        base: Hub id, folder, model in memory, or config. Gives what the file does not hold: the backbone where the
            file has the branch only (LLaVA's `btadapter_weight.bin`), the text tower where it has the video tower
            only, and in any case the number of attention heads and the activation; a dual encoder or tower of ours
            also the settings of the branch, such as `gate_on`. The file's own tensors take precedence.
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
    plan = plan_conversion(*args, **kwargs)
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
    if not any(key.startswith(BRANCH) for key in found.state):
        raise CheckpointError(no_branch(source, found))
    if found.unknown:
        raise CheckpointError(unknown_tensors(source, found))
    base_config, base_state = read_base(
        base,
        weights=is_partial(found.state),
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    notes = []
    state = dict(found.state)
    inherited = fields_of_base(base_config, found, notes)
    adapter_layers = adapter_layers or inherited.pop("adapter_layers", None)
    adapter_layers = place_layers(source, found, state, base_config, adapter_layers, notes)
    tower_fields = {**inherited, **{k: config_fields.pop(k) for k in TOWER_FIELDS & config_fields.keys()}}
    tower_config = make_tower_config(source, found, state, base_config, adapter_layers, tower_fields, notes)
    if isinstance(base, (str, Path)):
        tower_config.backbone._name_or_path = lasting_name(base)

    own = {part for part in (*_LENT, COMPLETE) if any(key.startswith(part) for key in found.state)}
    if COMPLETE not in own and not base_state:
        raise CheckpointError(
            f"{source} holds the branch without a backbone, and the base has a config and no weights: pass the image "
            "model that it was trained on."
        )
    if COMPLETE not in own:
        lend(state, base_state, BACKBONE, "the backbone", notes)
    if model_class is None:
        has_text = "text_model." in own or any(key.startswith("text_model.") for key in base_state)
        model_class = BTAdapterModel if has_text else BTAdapterVisionModel
    if model_class is not BTAdapterVisionModel:
        for part, title in _LENT.items():
            if part not in own:
                lend(state, base_state, part, title, notes)
    wanted = dtype or _widest(state)
    if model_class is BTAdapterVisionModel:
        config, prefix = tower_config, "vision_model."
        other = config_fields
    else:
        state["logit_scale"] = base_state.get("logit_scale", torch.tensor(-math.log(RELEASED_TEMPERATURE))).clone()
        config, prefix = make_dual_config(source, found, state, base_config, tower_config, config_fields), ""
        other = config_fields.keys() - BTAdapterConfig.__dataclass_fields__.keys()
    if other:
        raise ValueError(f"{', '.join(sorted(other))}: no such field in the configuration of {model_class.__name__}.")
    if found.projector:
        notes.append(f"{len(found.projector)} tensors are LLaVA's projector, which the chat models take.")

    state = {k: t.to(wanted) if t.is_floating_point() else t for k, t in state.items()}
    with torch.device("meta"):
        expected = {k: t.shape for k, t in model_class(config).state_dict().items()}
    dropped = [key for key in state if not key.startswith(prefix) or key.removeprefix(prefix) not in expected]
    for title, keys in without_place(dropped, model_class).items():
        notes.append(f"{len(keys)} tensors have no place in {model_class.__name__} and are left out: {title}.")
        for key in keys:
            del state[key]
    state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    origin = {key.removeprefix(prefix): name for key, name in found.origin.items()}
    names = {key: origin.get(key) or released_name(prefix + key, found.layout) for key in (*state, *expected)}
    check_tensors(source, state, expected, names)
    if not from_file:  # the caller's tensors stay the caller's
        state = {key: tensor.clone() for key, tensor in state.items()}
    rows = [
        (origin.get(key, "(base)"), key, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for key, tensor in state.items()
    ]
    return ConversionPlan(model_class, config, state, rows, notes, found.projector)


convert_original_checkpoint.__signature__ = inspect.signature(plan_conversion).replace(
    return_annotation=BTAdapterPreTrainedModel
)


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

    Settings with which the released code computes something else are not among them: a warning names each.

    Args:
        model: with a CLIP or EVA backbone.
        tower_prefix: `"backbone."` (the default for a dual encoder), `"model.vision_tower."` or `""` (the default for
            a tower).

    Raises:
        ValueError: if the backbone is of a kind that was not released.
    """
    dual = isinstance(model, BTAdapterModel)
    if not dual and not isinstance(model, BTAdapterVisionModel):
        raise ValueError(
            f"A {type(model).__name__} was given; expected a dual encoder or a video tower. Of a chat model pass "
            "model.model.vision_tower, or what it calls its tower."
        )
    tower = model.vision_model if dual else model
    family = {"clip_vision_model": "clip", "blip_2_vision_model": "eva", "instructblip_vision_model": "eva"}.get(
        tower.config.backbone.model_type
    )
    if family is None:
        raise ValueError(f"No weights were released for a {tower.config.backbone.model_type} backbone.")
    prefix = tower_prefix if tower_prefix is not None else ("backbone." if dual else "")
    layout = Layout(family, prefix, "text_backbone." if dual else "", position_ids=dual and family == "clip")
    state = {key if dual else f"vision_model.{key}": tensor for key, tensor in model.state_dict().items()}
    released = rename_to_released(state, layout)
    lost = settings_not_in_the_file(tower.config, rename_from_released(released))
    if lost:
        logger.warning(
            "A file of the released code holds no settings, and that code computes otherwise than this model: %s. To "
            "get the same back from the file, convert it with this model as the base (--base), or with %s.",
            "; ".join(f"{name}={own!r} here, {theirs!r} there" for name, (own, theirs) in lost.items()),
            " ".join(f"--set {shlex.quote(f'{name}={_as_option(own)}')}" for name, (own, _) in lost.items()),
        )
    return released


def _as_option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _widest(state: Mapping[str, torch.Tensor]) -> torch.dtype:
    dtype = None
    for tensor in state.values():
        if tensor.is_floating_point():
            dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    return dtype
