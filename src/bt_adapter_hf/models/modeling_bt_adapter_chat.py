"""What the chat models share: loading a native host together with an adapter, and putting visual tokens in place."""

import contextlib
import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import torch_compilable_check

from ..adapters.files import AdapterConfig, AdapterError, branch_fields, fit_layers, is_peft_folder
from ..adapters.host_modules import find_tower, offloaded_value, path_of
from ..adapters.quantization import check_kept_out, language_model_only
from ..adapters.source import (
    base_of,
    fill_branch,
    find_adapter,
    from_hub,
    naming_base,
    pinned,
    resolve_adapter,
    without_load_report,
)
from .configuration_bt_adapter import BTAdapterVisionConfig
from .configuration_bt_adapter_chat import TOWER_FIELDS
from .modeling_bt_adapter_vision import BTAdapterPreTrainedModel, BTAdapterVisionModel


_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# Fields of every config that `from_pretrained` of a model handles itself.
_MODEL_ARGUMENTS = {"dtype", "model_type", "architectures", "transformers_version"}


class BTAdapterChatMixin:
    """A native image chat model with a BT-Adapter tower in it."""

    _new_modules = ("bt_adapter",)
    _check_loading = BTAdapterPreTrainedModel._check_loading
    freeze_backbone = BTAdapterPreTrainedModel.freeze_backbone

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        bt_adapter: str | None = None,
        bt_adapter_revision: str | None = None,
        allow_backbone_mismatch: bool = False,
        config: PreTrainedConfig | str | None = None,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """As in transformers, but strict: a weight is never silently random or dropped.

        Args:
            pretrained_model_name_or_path: a native checkpoint of the host (old and new key names), or one of ours; or
                an adapter, which is put into the base model that it names, at the revision that it was trained on.
            bt_adapter: adapter folder, or id on the Hub, for a native checkpoint. Without it a native checkpoint gets
                a fresh branch, warm-started from the image tower; a checkpoint of ours has its own.
            bt_adapter_revision: of an adapter on the Hub.
            allow_backbone_mismatch: attach to other image weights than the adapter was trained on, with a warning.
            config: replaces the checkpoint's own.
            output_loading_info: also return the report on the weights.
            kwargs: as in transformers; fields of the tower's config are passed on to it, `adapter_layers` among them.
                A `quantization_config` of bitsandbytes quantizes the language model alone (see
                [`quantization_config`]).

        Raises:
            ValueError: if the checkpoint does not fill the model, or holds weights that the model has no place for.
            AdapterError: if the adapter is damaged, or was trained on another backbone.
            OSError: if a repository cannot be fetched; of an adapter's base model it says which, and what to do.
        """
        kwargs["revision"] = pinned(pretrained_model_name_or_path, kwargs)  # one commit for all that is read
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        source_type = None
        if pretrained_model_name_or_path is not None:
            source = from_hub(
                lambda: PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)[0],
                pretrained_model_name_or_path,
                kwargs["revision"],
            )
            found = None
            if not source and bt_adapter is None:  # no config.json
                found = find_adapter(pretrained_model_name_or_path, hub)
            if found is not None:
                options = {"allow_backbone_mismatch": allow_backbone_mismatch, "config": config, **kwargs}
                options["output_loading_info"] = output_loading_info
                return cls._from_adapter(pretrained_model_name_or_path, *found, *model_args, **options)
            source_type = source.get("model_type")
        is_ours = source_type == cls.config_class.model_type
        if bt_adapter is not None and is_ours:
            raise ValueError(
                f"{pretrained_model_name_or_path} has a branch of its own. Load it without bt_adapter, or name the "
                f"native checkpoint that {bt_adapter} is to be put into."
            )
        if not isinstance(config, PreTrainedConfig):
            fields = cls.config_class.__dataclass_fields__.keys() | TOWER_FIELDS
            fields = {name: kwargs.pop(name) for name in fields & kwargs.keys() - _MODEL_ARGUMENTS}
            tower_fields = {name: fields[name] for name in TOWER_FIELDS & fields.keys()}
            if bt_adapter is not None:  # these change what the adapter says
                fields = {name: value for name, value in fields.items() if name not in tower_fields}
            config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **hub, **fields)
        else:
            config, tower_fields = copy.deepcopy(config), {}

        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = language_model_only(kwargs["quantization_config"])
        elif getattr(config, "quantization_config", None) is not None and not is_ours:
            check_kept_out(config.quantization_config, pretrained_model_name_or_path)
        adapter = cls.read_adapter(config, bt_adapter, hub, bt_adapter_revision, tower_fields)
        # With an adapter what the report calls new is not: the branch is filled below.
        with without_load_report() if adapter is not None else contextlib.nullcontext():
            load = super().from_pretrained
            model, info = from_hub(
                lambda: load(
                    pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
                ),
                pretrained_model_name_or_path,
                kwargs["revision"],
            )
        if is_ours:
            model._new_modules = ()  # what it lacks was lost
        else:
            tower = find_tower(model)
            _check_branch_is_there(tower, path_of(model, tower))
        if adapter is not None:
            branch = set(model.load_branch(*adapter, allow_backbone_mismatch))
            info["missing_keys"] = {key for key in info["missing_keys"] if key not in branch}
        model._check_loading(info, pretrained_model_name_or_path)
        model.freeze_backbone()  # loading replaces parameters, and new ones learn
        model._loaded_from = (str(pretrained_model_name_or_path), getattr(kwargs["revision"], "resolved", None))
        return (model, info) if output_loading_info else model

    @classmethod
    def _from_adapter(cls, name: str | os.PathLike, folder: Path, adapter: AdapterConfig, *model_args, **kwargs):
        base, revision = base_of(folder, name, adapter)
        if adapter.model_type not in (None, cls.config_class.model_type):
            raise AdapterError(
                f"The adapter {name} was saved from a {adapter.model_type} with the weights of {base}; this class is "
                f"a {cls.config_class.model_type}. Name the chat model too: from_pretrained(model, "
                f"bt_adapter={str(name)!r})."
            )
        kwargs = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
        with naming_base(name, base, revision):
            return cls.from_pretrained(base, *model_args, bt_adapter=folder, revision=revision, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """As in transformers.

        Raises:
            ValueError: if peft's adapters are in the model (`add_adapter`), and the branch is not among what of them
                would be saved.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            if not any(".bt_adapter." in f".{key}" for key in self.get_adapter_state_dict()):
                raise ValueError(
                    "The model has adapters of peft, and save_pretrained would write these alone, without the branch. "
                    "Train with peft.get_peft_model(model, bt_adapter_hf.lora_config(model)), whose save_pretrained "
                    "writes all that was trained; or save the branch with save_bt_adapter."
                )
        return super().save_pretrained(save_directory, **kwargs)

    @staticmethod
    def read_adapter(
        config: PreTrainedConfig,
        bt_adapter: str | os.PathLike | None,
        hub: Mapping[str, Any],
        revision: str | None = None,
        tower_fields: Mapping[str, Any] | None = None,
    ) -> tuple[Path, AdapterConfig] | None:
        """Finds an adapter and makes the host's config one for it.

        Returns:
            The adapter's folder and config; None without an adapter.
        """
        if bt_adapter is None:
            return None
        options = {name: hub.get(name) for name in ("token", "cache_dir")}
        folder = resolve_adapter(bt_adapter, revision, local_files_only=hub.get("local_files_only", False), **options)
        if is_peft_folder(folder):
            raise AdapterError(
                f"{folder} was saved by peft and holds more than a branch. Load the model without it, and call "
                "load_bt_adapter(model, folder), which restores the branch, LoRA and what else was trained."
            )
        adapter = AdapterConfig.read(folder)
        config.vision_config = tower_config(config, adapter, dict(tower_fields or {}))
        config.validate()
        return folder, adapter

    load_branch = fill_branch


def tower_config(config: PreTrainedConfig, adapter: AdapterConfig, overrides: dict[str, Any]) -> BTAdapterVisionConfig:
    """The tower that this host and this adapter make: the adapter's first layers, as far as the host reads."""
    backbone, own = config.vision_config.backbone, adapter.adapter_layers
    asked = overrides.pop("adapter_layers", None)
    top = config.last_state(backbone.num_hidden_layers)
    if asked is None and top < backbone.num_hidden_layers and own[-1] >= top:
        asked = [layer for layer in own if layer < top]
        if not asked:
            raise AdapterError(
                f"The adapter is fed by the backbone layers {own}; this model reads its image tower after layer "
                f"{top - 1} of {backbone.num_hidden_layers}, so none of it can be attached."
            )
    layers = fit_layers(adapter, backbone, asked)
    fields = config.fit_branch({**branch_fields(adapter, len(layers)), **overrides})
    return BTAdapterVisionConfig(backbone=backbone, adapter_layers=layers, **fields)


def _check_branch_is_there(tower: BTAdapterVisionModel, prefix: str):
    """Disk offloading reads from the checkpoint, and a new branch is not in it."""
    for name, parameter in tower.bt_adapter.named_parameters():
        path, _, leaf = name.rpartition(".")
        if parameter.is_meta and offloaded_value(tower.bt_adapter.get_submodule(path), leaf) is None:
            raise ValueError(
                f"The branch is new, and device_map puts it on the disk. Keep {prefix} on a device or the CPU, or "
                "save the model once and load the result."
            )


def embed_text(embedding: nn.Module, input_ids: torch.LongTensor, *placeholders: int | None) -> torch.Tensor:
    """Embeddings of a prompt whose placeholders may lie beyond the vocabulary: (B, S) -> (B, S, D)."""
    for token_id in placeholders:
        if token_id is not None:
            input_ids = input_ids.masked_fill(input_ids == token_id, 0)
    return embedding(input_ids)


def check_length(config: PreTrainedConfig, length: int):
    """Refuses a prompt that is longer than the language model's positions.

    Raises:
        ValueError: if it is.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(
            f"The conversation is {length} tokens long, visual tokens included, and the language model takes {limit}: "
            "drop earlier turns, images or videos, or use fewer clips per video (num_clips)."
        )


def check_placeholders(input_ids: torch.LongTensor, token_id: int | None, visuals: int, tokens: int, kind: str):
    """Compares the placeholders of a prompt with the visual tokens that are to stand there.

    Args:
        input_ids: (B, S).
        token_id: of the placeholder.
        visuals: number of images or videos passed.
        tokens: number of tokens that they make in all.
        kind: "image" or "video".

    Raises:
        ValueError: if there are not as many placeholders.
    """
    found = (input_ids == token_id).sum() if token_id is not None else torch.zeros((), dtype=torch.long)
    torch_compilable_check(
        found == tokens,
        lambda: (
            f"The prompt has {int(found)} {kind} tokens (id {token_id}), and {visuals} {kind}s with {tokens} tokens "
            f"in all were passed. Prepare prompts with the processor of this model: its {kind}_token_id must be the "
            f"model's config.{kind}_token_id, and its number of tokens per {kind} the model's."
        ),
    )


def put_in_place(
    inputs_embeds: torch.Tensor,
    input_ids: torch.LongTensor,
    token_id: int | None,
    features: list[torch.Tensor] | torch.Tensor,
    kind: str,
) -> torch.Tensor:
    """Replaces the embeddings (B, S, D) of placeholders by visual tokens, a tensor (tokens, D) per image or video.

    Raises:
        ValueError: if placeholders and tokens are not equally many.
    """
    check_placeholders(input_ids, token_id, len(features), sum(len(feature) for feature in features), kind)
    if not len(features):
        return inputs_embeds
    features = torch.cat(list(features)).to(inputs_embeds.device, inputs_embeds.dtype)
    where = (input_ids == token_id).unsqueeze(-1).to(inputs_embeds.device)
    return inputs_embeds.masked_scatter(where, features)
