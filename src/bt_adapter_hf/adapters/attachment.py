"""A model of ours around the parts of a native one, without a copy; and the native one again, as it was."""

import copy
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import (
    Blip2ForConditionalGeneration,
    CLIPModel,
    InstructBlipForConditionalGeneration,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from ..models.configuration_bt_adapter import BTAdapterConfig
from ..models.modeling_bt_adapter import BTAdapterModel
from ..models.modeling_bt_adapter_branch import BACKBONES
from ..models.modeling_bt_adapter_instructblip import BTAdapterInstructBlipForConditionalGeneration
from ..models.modeling_bt_adapter_llava import BTAdapterLlavaForConditionalGeneration
from ..models.modeling_bt_adapter_minigpt4 import BTAdapterMiniGPT4ForConditionalGeneration
from ..models.modeling_bt_adapter_vision import BTAdapterVisionModel
from .description import loaded_from
from .files import lasting_name
from .host_modules import fill_parameter, find_tower, learning_copy, parameter_value, path_of
from .quantization import keep_out
from .video_token import video_token_id


logger = logging.get_logger(__name__)

CHAT_HOSTS = {
    LlavaForConditionalGeneration: BTAdapterLlavaForConditionalGeneration,
    InstructBlipForConditionalGeneration: BTAdapterInstructBlipForConditionalGeneration,
    Blip2ForConditionalGeneration: BTAdapterMiniGPT4ForConditionalGeneration,
}
OURS = (BTAdapterVisionModel, BTAdapterModel, *CHAT_HOSTS.values())
# What loading leaves on a model beside its modules: how it is quantized, where its parts are, which adapters it has.
_STATE = (
    "generation_config",
    "hf_device_map",
    "hf_quantizer",
    "is_quantized",
    "quantization_method",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "_is_quantized_training_enabled",
    "_hf_peft_config_loaded",
    "peft_config",
    "model_tags",
)
# Of the fields that every config has, those that say how a model runs.
_COMMON_FIELDS = {"dtype", "is_encoder_decoder", "output_hidden_states", "return_dict", "chunk_size_feed_forward"}


def check_host(model: nn.Module) -> None:
    """Refuses a model that a branch cannot be put into.

    Raises:
        ValueError: if it is one.
    """
    bare = tuple(family.model_class for family in BACKBONES.values())
    if not isinstance(model, (CLIPModel, *bare)) and type(model) not in CHAT_HOSTS:
        raise ValueError(
            f"A BT-Adapter cannot be attached to a {type(model).__name__}: pass a "
            + ", ".join(kind.__name__ for kind in CHAT_HOSTS)
            + ", a CLIPModel, or a vision model: "
            + ", ".join(kind.__name__ for kind in bare)
            + "."
        )
    if isinstance(model, Blip2ForConditionalGeneration) and not model.config.use_decoder_only_language_model:
        raise ValueError(
            "A BLIP-2 takes a BT-Adapter as MiniGPT-4, whose language model is a decoder such as Llama; this one has "
            f"a {model.config.text_config.model_type}. InstructBLIP takes both kinds."
        )
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            if getattr(part, "offload", False) and getattr(part, "place_submodules", False):
                raise ValueError(
                    f"accelerate offloads a {type(module).__name__} of the model as one block, by the names of its "
                    "parameters, and a BT-Adapter changes them. Offload without preload_module_classes."
                )
    embeddings = find_tower(model).embeddings
    if isinstance(embeddings.position_embedding, nn.Parameter) and embeddings.position_embedding.is_meta:
        raise ValueError(
            "The position embeddings of the vision model are offloaded, and the branch reads them. Keep the vision "
            "model on a device or the CPU (device_map)."
        )


@dataclass
class Attachment:
    """What unloading gives back: the model as it was."""

    base: PreTrainedModel
    learning: list[str]  # parameters of the backbone that were not frozen
    modes: list[tuple[nn.Module, bool]]  # which modules were in training
    replaced: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  # parameters of other modules

    @classmethod
    def of(cls, base: PreTrainedModel, backbone: PreTrainedModel) -> "Attachment":
        learning = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
        return cls(base, learning, [(module, module.training) for module in base.modules()])

    def keep(self, path: str, module: nn.Module) -> None:
        """Remembers the parameters of a module at `path`, which an adapter is about to bring along."""
        own = {}
        for name, _ in module.named_parameters():
            owner, _, leaf = name.rpartition(".")
            own[name] = parameter_value(module.get_submodule(owner), leaf).detach().clone()
        self.replaced.setdefault(path, own)

    def release(self, model: PreTrainedModel, tower: BTAdapterVisionModel) -> PreTrainedModel:
        """Gives the base model back, with what has since been put in place of its other parts (LoRA, new tokens)."""
        for name, parameter in tower.vision_model.named_parameters():
            if name.replace(".base_layer.", ".") in self.learning:  # LoRA may have come in
                parameter.requires_grad_(True)
        if model is not tower:
            share(model, self.base, path_of(model, tower))
        for path, own in self.replaced.items():
            module = self.base.get_submodule(path)
            for copied in {learning_copy(module), getattr(module, "original_module", module)}:
                for name, value in own.items():
                    fill_parameter(copied, name, value)
        self.base.train(self.modes[0][1])
        for module, training in self.modes:
            module.training = training
        return self.base


def attach(model: PreTrainedModel, tower: BTAdapterVisionModel, attachment: Attachment) -> PreTrainedModel:
    """The model of ours around a tower and the other parts of a native model; the tower itself for a vision model."""
    if model is tower.vision_model:
        tower._bt_adapter_attachment = attachment
        tower._loaded_from = loaded_from(tower)  # now, for a folder's name may mean another one later
        return tower
    path = path_of(model, tower.vision_model)
    tower.config.dtype = tower.vision_model.config.dtype
    if isinstance(model, CLIPModel):
        ours = empty_model(BTAdapterModel, _composite(BTAdapterConfig, model.config, {"vision_config": tower.config}))
    else:
        ours = empty_model(CHAT_HOSTS[type(model)], chat_config(model.config, tower.config))
    _set_tower(ours, path, tower)
    share(model, ours, path, hooks=True)
    for name in _STATE:
        if name in model.__dict__:
            setattr(ours, name, getattr(model, name))
    if hasattr(ours.config, "quantization_config"):
        keep_out(ours.config.quantization_config, path_of(ours, tower.bt_adapter))
    ours._bt_adapter_attachment = attachment
    ours._loaded_from = loaded_from(ours)
    ours.training = model.training
    for module, training in attachment.modes:
        if module is not tower.vision_model:
            module.training = training
    return ours


def native_of(model: PreTrainedModel) -> PreTrainedModel:
    """A native model around the parts of one of ours that was loaded as a whole."""
    tower = find_tower(model)
    if model is tower:
        return tower.vision_model
    native_class = next((native for native, ours in CHAT_HOSTS.items() if isinstance(model, ours)), CLIPModel)
    vision = tower.vision_model
    if native_class is CLIPModel and (
        vision.config.model_type != "clip_vision_model" or model.visual_projection.bias is not None
    ):
        raise ValueError(
            f"transformers has no dual encoder with a {vision.config.model_type} backbone; unload the tower, "
            "model.vision_model, instead."
        )
    if getattr(model.config, "post_layernorm_eps", None) not in (None, vision.config.layer_norm_eps):
        logger.warning(
            f"The last norm of the vision model has the epsilon {model.config.post_layernorm_eps}. It keeps it in "
            "memory; a saved BLIP-2 cannot say so."
        )
    path = path_of(model, tower)
    config = _composite(native_class.config_class, model.config, {"vision_config": vision.config})
    native = empty_model(native_class, config)
    _set_tower(native, path, vision)
    share(model, native, path, hooks=True)
    for name in _STATE:
        if name in model.__dict__:
            setattr(native, name, getattr(model, name))
    native.training = model.training
    return native


def chat_config(native: PreTrainedConfig, tower: PreTrainedConfig) -> PreTrainedConfig:
    """The config of ours for a native chat model with this tower config, or this native vision config."""
    config_class = next(
        ours.config_class for host, ours in CHAT_HOSTS.items() if host.config_class.model_type == native.model_type
    )
    fields = config_class._native_fields() | {"vision_config": tower}
    if native.name_or_path:  # what was loaded has been fetched: nothing is fetched for this
        token = video_token_id(native, native.name_or_path, {"local_files_only": True})
        fields |= {} if token is None else {"video_token_index": token}
    return _composite(config_class, native, fields)


def _composite(config_class: type[PreTrainedConfig], source: PreTrainedConfig, fields: dict) -> PreTrainedConfig:
    """A config with what `source` says, and `fields`; nested configs are shared."""
    common = config_class.__dataclass_fields__.keys() & source.__class__.__dataclass_fields__.keys()
    common -= PreTrainedConfig.__dataclass_fields__.keys() - _COMMON_FIELDS
    common -= fields.keys()
    fields = fields | {name: getattr(source, name) for name in common}
    config = config_class(**copy.deepcopy(fields))  # it changes nested configs that it is given
    for name in config.sub_configs:
        if type(getattr(config, name)) is type(fields[name]):
            setattr(config, name, fields[name])
        else:  # a native vision config, in that of a tower
            getattr(config, name).backbone = fields[name]
    config._attn_implementation_internal = source._attn_implementation_internal
    config._name_or_path = lasting_name(source._name_or_path)
    for name in vars(source).keys() - source.__class__.__dataclass_fields__.keys():  # the quantization, for one
        value = getattr(source, name)
        if not name.startswith("_") and not hasattr(config, name):
            setattr(config, name, copy.deepcopy(value))
    return config


def empty_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose parts are to be replaced; they cost nothing."""
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))  # building changes configs, and the nested ones are the base's
    for name in config.sub_configs:
        setattr(model.config, name, getattr(config, name))
    return model


def _set_tower(model: nn.Module, path: str, tower: nn.Module) -> None:
    model.set_submodule(path, tower)
    model.config.vision_config = tower.config


def share(source: nn.Module, target: nn.Module, path: str, hooks: bool = False) -> None:
    """Lets `target` use all parts of `source` but the one at `path`, where the two differ.

    Args:
        hooks: also has accelerate do for the modules above `path`, which are new, what it does for those of `source`.
    """
    head, _, rest = path.partition(".")
    for table in ("_parameters", "_buffers", "_modules"):
        parts = getattr(source, table)
        getattr(target, table).update({name: part for name, part in parts.items() if name != head})
    if rest:
        share(getattr(source, head), getattr(target, head), rest, hooks)
    if hooks and (hook := getattr(source, "_hf_hook", None)) is not None:
        from accelerate.hooks import SequentialHook, add_hook_to_module

        # a hook remembers where it found the parameters of its own module
        several = isinstance(hook, SequentialHook)
        add_hook_to_module(target, SequentialHook(*map(copy.copy, hook.hooks)) if several else copy.copy(hook))
