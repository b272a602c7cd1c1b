"""The verbs that put a branch beside a model in memory, save it, and take it away again."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..models.configuration_bt_adapter import BTAdapterVisionConfig
from ..models.modeling_bt_adapter_chat import BTAdapterChatMixin
from ..models.modeling_bt_adapter_vision import BTAdapterVisionModel
from .attachment import CHAT_HOSTS, OURS, Attachment, attach, chat_config, check_host, empty_model, native_of
from .description import adapter_state, describe_adapter
from .files import (
    BRANCH_FIELDS,
    AdapterConfig,
    AdapterError,
    check_extra_names,
    has_branch_file,
    is_peft_folder,
    write_adapter,
)
from .fingerprint import check_backbone
from .fitting import branch_fields, check_extra, fit_layers, read_branch, tower_config
from .host_modules import (
    execution_device,
    fill_parameter,
    find_tower,
    has_branch,
    is_peft_model,
    is_quantized,
    learning_copy,
)
from .whole_models import read_config


logger = logging.get_logger(__name__)


def get_bt_adapter_model(
    model: nn.Module, num_adapter_layers: int | None = None, **config_fields: Any
) -> PreTrainedModel:
    """Puts a fresh, warm-started branch beside a model in memory, without copying it.

    Args:
        model: CLIPVisionModel, SiglipVisionModel, InstructBlipVisionModel or Blip2VisionModel, which give a
            [`BTAdapterVisionModel`]; CLIPModel, which gives a [`BTAdapterModel`]; or
            LlavaForConditionalGeneration, InstructBlipForConditionalGeneration or Blip2ForConditionalGeneration (with
            a decoder), which give the chat model of ours of that kind. A peft model around one of these stays, and
            what is inside is exchanged.
        num_adapter_layers: the branch is fed by the last so many layers of those that the model reads; by default
            four, and three in a chat model. `adapter_layers` takes precedence.
        config_fields: further fields of [`BTAdapterVisionConfig`].

    Raises:
        ValueError: if the model has a branch, or takes none.
    """
    inner = _InsidePeft(model)
    model = inner.model
    backbone = find_tower(model)
    if isinstance(backbone, BTAdapterVisionModel):
        raise ValueError(f"{type(model).__name__} has a BT-Adapter; take it away with unload_bt_adapter first.")
    check_host(model)
    _check_warm_start(backbone)
    if type(model) in CHAT_HOSTS:
        host = chat_config(model.config, backbone.config)
        layers = host.vision_config.adapter_layers
        if num_adapter_layers is not None:
            top = host.last_state(backbone.config.num_hidden_layers)
            if not 1 <= num_adapter_layers <= top:
                raise ValueError(f"num_adapter_layers={num_adapter_layers} must be between 1 and {top}.")
            layers = list(range(top - num_adapter_layers, top))
        config_fields = host.fit_branch({"adapter_layers": layers, **config_fields})
        host.vision_config = BTAdapterVisionConfig(backbone=backbone.config, **config_fields)
        host.validate_architecture()  # refuses a branch that the host would not use whole
    attachment = Attachment.of(model, backbone)
    tower = BTAdapterVisionModel.from_backbone(backbone, num_adapter_layers or 4, **config_fields)
    tower.bt_adapter.to(execution_device(backbone))
    inner.model = attach(model, tower, attachment)
    return inner.result


def attach_adapter(
    model: nn.Module,
    folder: Path,
    adapter_layers: Sequence[int] | None = None,
    allow_backbone_mismatch: bool = False,
) -> nn.Module:
    """Attaches the adapter in a folder to a model in memory: `load_bt_adapter` behind the search for the folder."""
    plain_lora = is_peft_folder(folder) and isinstance(model, BTAdapterChatMixin) and not has_branch(model)
    adapter_config = None if plain_lora else read_config(folder)
    if is_peft_folder(folder) and is_peft_model(model):
        raise AdapterError(
            f"{folder} brings LoRA along, and the model is a peft model. Pass model.get_base_model() without its "
            "adapters (model.unload()), or use peft's model.load_adapter if the model has a branch."
        )
    if plain_lora:
        from .lora import check_lora, load_lora

        check_lora(folder, empty_model(type(model), model.config))
        return load_lora(model, folder, None)
    inner = _InsidePeft(model)
    inner.model = _with_adapter(inner.model, folder, adapter_config, adapter_layers, allow_backbone_mismatch)
    if not is_peft_folder(folder):
        return inner.result
    from .lora import load_lora

    return load_lora(inner.model, folder, adapter_config)


def _with_adapter(
    model: PreTrainedModel,
    folder: Path,
    adapter_config: AdapterConfig,
    adapter_layers: Sequence[int] | None,
    allow_backbone_mismatch: bool,
) -> PreTrainedModel:
    tower = find_tower(model)
    has_branch = isinstance(tower, BTAdapterVisionModel)
    backbone = tower.vision_model if has_branch else tower
    if not has_branch:
        check_host(model)
    elif learning_copy(tower.bt_adapter) is not tower.bt_adapter:
        raise AdapterError(
            "The model's branch is wrapped by peft (modules_to_save). Load the adapter before get_peft_model, or take "
            "the wrapper away (model.unload())."
        )
    host = None
    if isinstance(model, BTAdapterChatMixin) or (type(model) in CHAT_HOSTS and not has_branch):
        host = copy.copy(model.config) if has_branch else chat_config(model.config, backbone.config)
        overrides = {} if adapter_layers is None else {"adapter_layers": list(adapter_layers)}
        host.vision_config = config = tower_config(host, adapter_config, overrides, keep=has_branch)
        try:
            host.validate_architecture()
        except ValueError as error:
            raise AdapterError(f"{folder} does not fit {type(model).__name__}: {error}") from error
    else:
        layers = fit_layers(adapter_config, backbone.config, adapter_layers)
        fields = branch_fields(adapter_config, len(layers))
        config = BTAdapterVisionConfig(backbone=backbone.config, adapter_layers=layers, **fields)
    check_backbone(folder, adapter_config, backbone, allow_backbone_mismatch)
    if has_branch and tower.config.adapter_layers != config.adapter_layers:
        raise AdapterError(
            f"The adapter's branch is fed by the backbone layers {config.adapter_layers}, the model's by "
            f"{tower.config.adapter_layers}. Take the model's branch away with unload_bt_adapter first, or name a "
            "common start in adapter_layers."
        )
    # The backbone on the meta device costs nothing, and is replaced by the real one; so the branch is not
    # warm-started.
    with torch.device("meta"):
        new = BTAdapterVisionModel(config)
    state, extra = read_branch(folder, adapter_config, new.bt_adapter)
    trained = check_extra(folder, adapter_config, extra, model)
    if is_peft_folder(folder):
        if host is None:
            raise AdapterError(f"{folder} brings LoRA for a chat model, and this is a {type(model).__name__}.")
        from .lora import check_lora

        check_lora(folder, empty_model(CHAT_HOSTS.get(type(model), type(model)), host))

    device = execution_device(backbone)
    state = {key: tensor.to(device=device, dtype=backbone.dtype) for key, tensor in state.items()}
    new.bt_adapter.load_state_dict(state, assign=True)
    of_peft_alone = is_peft_folder(folder) and not has_branch_file(folder)
    if of_peft_alone and has_branch and all(getattr(tower.config, n) == getattr(config, n) for n in BRANCH_FIELDS):
        return model  # its own branch is the one before tuning; the tuned one comes with LoRA
    if of_peft_alone:
        logger.warning(
            f"{folder} was saved by an earlier version, without the branch and the projector from before tuning: with "
            "peft's disable_adapter() the model has the tuned branch."
        )
    if has_branch:
        logger.warning(f"The branch that the {type(model).__name__} had is replaced by that of {folder}.")
        _set_branch(model, tower, new.bt_adapter.train(tower.training), config)
    else:
        attachment = Attachment.of(model, backbone)
        new.vision_model = backbone
        new.freeze_backbone()
        model = attach(model, new.train(backbone.training), attachment)
    attachment = getattr(model, "_bt_adapter_attachment", None)
    for path, module in trained.items():
        if attachment is not None:
            attachment.keep(path, module)
        for name, _ in module.named_parameters():
            fill_parameter(module, name, extra[f"{path}.{name}"])
    return model


def save_bt_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    extra_modules: Sequence[str] = (),
) -> None:
    """Writes the branch of a model, and nothing of the backbone, into a folder.

    Of a peft model, whose `save_pretrained` writes LoRA and the branch together, this writes the branch alone.

    Args:
        model: a [`BTAdapterVisionModel`], or a model with one inside.
        folder: created if needed; an adapter in it is replaced.
        dtype: of the stored tensors, such as `torch.float16`; by default as they are.
        base_model_name_or_path, revision: of the base model; by default what it was loaded from.
        extra_modules: paths of other trained modules in the model that belong to the adapter, such as
            "model.multi_modal_projector" (LLaVA) or "language_projection".

    Raises:
        ValueError: if the model has no branch, or LoRA has been put into it.
    """
    model = _InsidePeft(model).model
    config = describe_adapter(model, base_model_name_or_path, revision)
    config.extra_modules = list(extra_modules)
    check_extra_names(extra_modules, "This adapter")
    branch, extra = adapter_state(model, extra_modules, dtype)
    write_adapter(Path(folder), config, branch, extra)


def unload_bt_adapter(model: nn.Module) -> nn.Module:
    """Takes the branch away and returns the base model: the very object that the adapter was attached to.

    Other modules that the adapter brought have their former weights again; what training changed in them stays. A
    model that was loaded with its branch, from one checkpoint, gives a native model around the same parameters. A peft
    model stays, with the base model inside.

    Raises:
        ValueError: if the model has no branch.
    """
    inner = _InsidePeft(model)
    if not isinstance(inner.model, OURS):
        raise ValueError(f"{type(inner.model).__name__} has no BT-Adapter to unload.")
    attachment = getattr(inner.model, "_bt_adapter_attachment", None)
    if attachment is not None:
        inner.model = attachment.release(inner.model, find_tower(inner.model))
    else:
        inner.model = native_of(inner.model)
    return inner.result


def _set_branch(
    model: PreTrainedModel, tower: BTAdapterVisionModel, branch: nn.Module, config: BTAdapterVisionConfig
) -> None:
    tower.bt_adapter = branch
    branch.config = tower.config = config
    if model is not tower:
        model.config.vision_config = config


def _check_warm_start(backbone: PreTrainedModel) -> None:
    """A fresh branch starts from the backbone's weights: they must be there, as they are."""
    if is_quantized(backbone):
        raise ValueError(
            "A fresh branch starts from the backbone's weights, and these are quantized. Quantize after attaching, "
            "or keep the vision model out of it (bt_adapter_hf.quantization_config); a trained adapter can be loaded "
            "with load_bt_adapter."
        )
    names = [name for name, _ in backbone.named_parameters()]
    if any(parameter.is_meta for parameter in backbone.parameters()):
        raise ValueError(
            "A fresh branch starts from the backbone's weights, and some of these are offloaded. Keep the vision "
            "model on a device or the CPU (device_map), or attach before dispatching; a trained adapter can be loaded "
            "with load_bt_adapter."
        )
    if any("lora_" in name or ".base_layer." in name for name in names):
        raise ValueError(
            "A fresh branch is a copy of layers of the backbone, and peft has put adapters into these. Attach before "
            "get_peft_model, and keep LoRA to the language model (bt_adapter_hf.lora_config)."
        )


class _InsidePeft:
    """The model inside a peft model, or the model itself. Setting `model` exchanges it; `result` is what came in."""

    def __init__(self, model: nn.Module):
        self._wrapper = model if is_peft_model(model) else None
        self._model = model.get_base_model() if self._wrapper is not None else model

    @property
    def model(self) -> PreTrainedModel:
        return self._model

    @model.setter
    def model(self, new: PreTrainedModel) -> None:
        wrapper, old, self._model = self._wrapper, self._model, new
        if wrapper is None or new is old:
            return
        owner, name = (wrapper, "base_model") if wrapper.base_model is old else (wrapper.base_model, "model")
        setattr(owner, name, new)
        if hasattr(wrapper, "base_model_prepare_inputs_for_generation"):  # methods of the old model that peft keeps
            wrapper.base_model.__dict__.pop("prepare_inputs_for_generation", None)
            wrapper.base_model_prepare_inputs_for_generation = new.prepare_inputs_for_generation

    @property
    def result(self) -> nn.Module:
        return self._wrapper if self._wrapper is not None else self._model
