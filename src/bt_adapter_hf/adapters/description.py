"""What an adapter says of a model: its branch, its backbone and where the base model came from."""

from transformers import PreTrainedModel

from ..models.compat_bt_adapter import resolve_revision
from ..models.modeling_bt_adapter_vision import BTAdapterVisionModel
from .files import BRANCH_FIELDS, SIZES, AdapterConfig
from .fingerprint import backbone_fingerprint
from .host_modules import find_tower


def describe_adapter(
    model: PreTrainedModel, base_model_name_or_path: str | None = None, revision: str | None = None
) -> AdapterConfig:
    """The content of `bt_adapter_config.json` for the branch of a model; see `save_bt_adapter`."""
    tower = find_tower(model)
    if not isinstance(tower, BTAdapterVisionModel):
        raise ValueError(f"{type(model).__name__} has no BT-Adapter to save; attach one with get_bt_adapter_model.")
    config = tower.config
    name, commit = loaded_from(model)
    return AdapterConfig(
        base_model_name_or_path=base_model_name_or_path or name,
        revision=revision or (commit if base_model_name_or_path in (None, name) else None),
        backbone={
            "model_type": config.backbone.model_type,
            "num_hidden_layers": config.num_hidden_layers,
            "image_size": config.image_size,
            **{size: getattr(config, size) for size in SIZES},
        },
        adapter_layers=list(config.adapter_layers),
        branch={key: getattr(config, key) for key in sorted(BRANCH_FIELDS)},
        fingerprint=backbone_fingerprint(tower.vision_model, config.adapter_layers[0]),
        model_type=model.config.model_type,
    )


def loaded_from(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """Name of the checkpoint that a model, or the backbone in it, came from, and its commit if it is on the Hub."""
    known = getattr(model, "_loaded_from", None)
    if known is not None:
        return known
    for config in (find_tower(model).config, model.config):
        for part in (getattr(config, "backbone", config), config):
            if name := getattr(part, "_name_or_path", ""):
                return name, getattr(resolve_revision(name, local_files_only=True), "resolved", None)
    return None, None
