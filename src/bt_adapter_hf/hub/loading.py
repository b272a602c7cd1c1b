"""`from_pretrained` of the models, and `load_bt_adapter`: strict, pinned to one commit, with adapters by folder or id.

The models reach this module at one place (`package_loading`), and do without it in code that came with a checkpoint.
"""

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..adapters.files import CONFIG_NAME, AdapterConfig, AdapterError, is_peft_folder, lasting_name
from ..adapters.fitting import branch_fields, fill_branch, tower_config
from ..adapters.host_modules import find_tower, offloaded_value, path_of
from ..adapters.quantization import check_kept_out, language_model_only
from ..adapters.strictness import check_loading
from ..adapters.verbs import attach_adapter
from ..adapters.video_token import video_token_id
from ..adapters.whole_models import read_config
from ..models.configuration_bt_adapter import TOWER_FIELDS
from ..models.modeling_bt_adapter_vision import BTAdapterVisionModel
from .source import base_of, find_adapter, from_hub, naming_base, pinned, resolve_adapter


Loading = Callable[..., tuple[PreTrainedModel, dict]]  # `from_pretrained` of transformers, with its report

# transformers' own error for a tensor of another shape points at a table in the log; ours says which, in the error.
REPORT = {"output_loading_info": True, "ignore_mismatched_sizes": True}
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# Fields of every config that `from_pretrained` of a model handles itself.
_MODEL_ARGUMENTS = {"dtype", "model_type", "architectures", "transformers_version"}


def load_bt_adapter(
    model: nn.Module,
    adapter: str | os.PathLike,
    *,
    adapter_layers: Sequence[int] | None = None,
    allow_backbone_mismatch: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Attaches a trained adapter to a model in memory, without copying the model.

    A branch that reaches beyond what the model reads (EVA-CLIP-g has 40 layers, the towers of BLIP-2 and InstructBLIP
    39; LLaVA leaves out CLIP's last) is attached with its first layers.

    The model may be quantized by bitsandbytes, and dispatched or offloaded by accelerate; the branch is neither.

    Args:
        model: as in [`get_bt_adapter_model`]; or a model of ours, whose branch, on the same backbone layers, is
            replaced in place, as a warning says. (`from_pretrained(..., bt_adapter=...)` and `--bt-adapter` name a
            checkpoint to start from, and put into one with a branch only what was tuned in such a model.)
        adapter: folder, or id on the Hub; also one that peft saved from a model with a branch (see
            [`lora_config`]), or of a whole tower, dual encoder or pretraining run, whose branch is taken.
        adapter_layers: attach the first branch layers only, those fed by these backbone layers.
        allow_backbone_mismatch: attach to other weights than the adapter was trained on, with a warning.
        revision, token, cache_dir, local_files_only: for an adapter on the Hub.

    Returns:
        The model of ours around the model's own modules; the branch learns, the image backbone is frozen. A peft model
        that was passed, with the model of ours inside; or a new one around it, if the adapter comes with LoRA: all
        that was saved with it learns then.

    Raises:
        AdapterError: if the adapter is damaged, or was trained on another backbone, width or set of layers. The model
            is unchanged then.
        OSError: if the adapter is not found.
    """
    folder = resolve_adapter(adapter, revision, token, cache_dir, local_files_only)
    return attach_adapter(model, folder, adapter_layers, allow_backbone_mismatch)


def load_model(
    load: Loading, name: str | os.PathLike, *model_args: Any, output_loading_info: bool = False, **kwargs: Any
) -> PreTrainedModel | tuple[PreTrainedModel, dict]:
    """`from_pretrained` of a tower or dual encoder, around that of transformers (`load`)."""
    name = lasting_name(name)
    kwargs["revision"] = pinned(name, kwargs)  # one commit for all that is read
    try:
        model, info = from_hub(lambda: load(name, *model_args, **{**kwargs, **REPORT}), name, kwargs["revision"])
        if name is not None:
            model._loaded_from = (name, getattr(kwargs["revision"], "resolved", None))
    except OSError:
        found = _load_with_base(load, name, kwargs)
        if found is None:
            raise
        model, info = found
    check_loading(model, info, name)
    model.freeze_backbone()  # loading replaces parameters, and new ones learn
    return (model, info) if output_loading_info else model


def load_chat_model(
    cls: type[PreTrainedModel],
    load: Loading,
    name: str | os.PathLike | None,
    *model_args: Any,
    bt_adapter: str | os.PathLike | None,
    bt_adapter_revision: str | None,
    allow_backbone_mismatch: bool,
    config: PreTrainedConfig | str | None = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> PreTrainedModel | tuple[PreTrainedModel, dict]:
    """`from_pretrained` of a chat model, around that of transformers (`load`)."""
    name = lasting_name(name)
    kwargs["revision"] = pinned(name, kwargs)  # one commit for all that is read
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    source, source_type = {}, None
    if name is not None:
        source = from_hub(lambda: PreTrainedConfig.get_config_dict(name, **hub)[0], name, kwargs["revision"])
        found = None
        if not source and bt_adapter is None:  # no config.json
            found = find_adapter(name, hub)
        if found is not None:
            options = {"allow_backbone_mismatch": allow_backbone_mismatch, "config": config, **kwargs}
            options["output_loading_info"] = output_loading_info
            return _chat_model_of_adapter(cls, name, *found, *model_args, **options)
        source_type = source.get("model_type")
    is_ours = source_type == cls.config_class.model_type
    if bt_adapter is not None and is_ours:
        folder = _resolve_branch(bt_adapter, hub, bt_adapter_revision)
        if not was_tuned_in(folder, source_type):
            raise ValueError(
                f"{name} has a branch of its own: load it without the adapter, or name the native checkpoint that "
                f"{bt_adapter} is to be put into."
            )
        options = {"allow_backbone_mismatch": allow_backbone_mismatch, "config": config, **kwargs}
        model, info = cls.from_pretrained(name, *model_args, output_loading_info=True, **options)
        model = attach_adapter(model, folder, allow_backbone_mismatch=allow_backbone_mismatch)
        model.freeze_backbone()
        return (model, info) if output_loading_info else model
    if not isinstance(config, PreTrainedConfig):
        fields = cls.config_class.__dataclass_fields__.keys() | TOWER_FIELDS
        fields = {key: kwargs.pop(key) for key in fields & kwargs.keys() - _MODEL_ARGUMENTS}
        vision = fields.get("vision_config")
        named = {**(vision if isinstance(vision, dict) else {}), **fields}
        tower_fields = {key: named[key] for key in TOWER_FIELDS & named.keys()}
        if bt_adapter is not None:  # these change what the adapter says
            fields = {key: value for key, value in fields.items() if key not in tower_fields}
        config = cls.config_class.from_pretrained(config or name, **hub, **fields)
        if not is_ours and not {"video_token_index", "video_token_id"} & (fields.keys() | source.keys()):
            token = video_token_id(config, name, hub)
            config.video_token_index = config.video_token_index if token is None else token
    else:
        config, tower_fields = copy.deepcopy(config), {}

    if kwargs.get("quantization_config") is not None:
        kwargs["quantization_config"] = language_model_only(kwargs["quantization_config"])
    elif getattr(config, "quantization_config", None) is not None and not is_ours:
        check_kept_out(config.quantization_config, name)
    adapter = None
    if bt_adapter is not None:
        adapter = fit_config(config, bt_adapter, hub, bt_adapter_revision, tower_fields)
    # With an adapter what the report calls new is not: the branch is filled below.
    with without_load_report() if adapter is not None else contextlib.nullcontext():
        model, info = from_hub(
            lambda: load(name, *model_args, **{**kwargs, **REPORT}, config=config),
            name,
            kwargs["revision"],
        )
    if not is_ours:
        tower = find_tower(model)
        _check_branch_is_there(tower, path_of(model, tower))
    if adapter is not None:
        branch = set(fill_branch(model, *adapter, allow_backbone_mismatch))
        info["missing_keys"] = {key for key in info["missing_keys"] if key not in branch}
    check_loading(model, info, name, is_ours)
    model.freeze_backbone()  # loading replaces parameters, and new ones learn
    if name is not None:
        model._loaded_from = (name, getattr(kwargs["revision"], "resolved", None))
    return (model, info) if output_loading_info else model


def fit_config(
    config: PreTrainedConfig,
    bt_adapter: str | os.PathLike,
    hub: Mapping[str, Any],
    revision: str | None = None,
    tower_fields: Mapping[str, Any] | None = None,
) -> tuple[Path, AdapterConfig]:
    """Finds an adapter and makes the config of a chat model one for it.

    Returns:
        The adapter's folder and config, for [`fill_branch`].
    """
    folder = _resolve_branch(bt_adapter, hub, revision)
    adapter = read_config(folder)
    config.vision_config = tower_config(config, adapter, dict(tower_fields or {}))
    config.validate()
    return folder, adapter


def was_tuned_in(folder: Path, model_type: str) -> bool:
    """Whether the adapter in a folder, saved from a chat model of ours of this type, takes the place of a branch."""
    return (folder / CONFIG_NAME).is_file() and AdapterConfig.read(folder).model_type == model_type


def _resolve_branch(bt_adapter: str | os.PathLike, hub: Mapping[str, Any], revision: str | None) -> Path:
    options = {name: hub.get(name) for name in ("token", "cache_dir")}
    folder = resolve_adapter(bt_adapter, revision, local_files_only=hub.get("local_files_only", False), **options)
    if is_peft_folder(folder):
        raise AdapterError(
            f"{folder} was saved by peft and holds more than a branch. Load the model without it, and call "
            "load_bt_adapter(model, folder), which restores the branch, LoRA and what else was trained."
        )
    return folder


def _load_with_base(
    load: Loading, name: str | os.PathLike, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict] | None:
    """Loads the base model that an adapter names, and puts the adapter's branch into it.

    Args:
        load: the class's `from_pretrained` of transformers.
        name: folder or id.
        options: of the call.

    Returns:
        The model and the report on its weights; None if `name` is no adapter.
    """
    found = find_adapter(name, options)
    if found is None:
        return None
    folder, adapter = found
    base, base_revision = base_of(folder, name, adapter)
    options = {key: value for key, value in options.items() if key not in ("revision", "subfolder")}
    layers = list(options.pop("adapter_layers", None) or adapter.adapter_layers)
    fields = {"adapter_layers": layers, **branch_fields(adapter, len(layers))}
    with naming_base(name, base, base_revision), without_load_report():
        base_revision = pinned(base, {**options, "revision": base_revision})
        options = {**fields, **options, "revision": base_revision}
        model, info = from_hub(lambda: load(base, **{**options, **REPORT}), base, base_revision)
    filled = set(fill_branch(model, folder, adapter))
    info["missing_keys"] = {key for key in info["missing_keys"] if key not in filled}
    return model, info


def _chat_model_of_adapter(
    cls: type[PreTrainedModel],
    name: str | os.PathLike,
    folder: Path,
    adapter: AdapterConfig,
    *model_args: Any,
    **kwargs: Any,
) -> PreTrainedModel | tuple[PreTrainedModel, dict]:
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


def _check_branch_is_there(tower: BTAdapterVisionModel, prefix: str):
    """Disk offloading reads from the checkpoint, and a new branch is not in it."""
    for name, parameter in tower.bt_adapter.named_parameters():
        path, _, leaf = name.rpartition(".")
        if parameter.is_meta and offloaded_value(tower.bt_adapter.get_submodule(path), leaf) is None:
            raise ValueError(
                f"The branch is new, and device_map puts it on the disk. Keep {prefix} on a device or the CPU, or "
                "save the model once and load the result."
            )


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """Silences transformers' table of weights; `check_loading` makes errors of what it would tell."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
