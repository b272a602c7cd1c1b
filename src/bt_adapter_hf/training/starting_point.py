"""What pretraining starts from: a CLIP checkpoint, or a dual encoder that already has a branch."""

import os
from typing import Any

from ..hub.dual_encoder import processor_of_clip
from ..hub.kinds import wrong_kind
from ..hub.source import model_type_of
from ..models.configuration_bt_adapter import BTAdapterConfig
from ..models.modeling_bt_adapter_pretraining import BTAdapterForPreTraining
from ..models.processing_bt_adapter import BTAdapterProcessor


def check_kind(name: str | os.PathLike, revision: str | None = None) -> str:
    """The model type of what pretraining is to start from, of its config alone.

    Raises:
        ValueError: if it is no CLIP and no dual encoder.
    """
    model_type = model_type_of(name, revision)
    if model_type not in ("clip", BTAdapterConfig.model_type):
        raise wrong_kind(name, model_type, "a CLIP ('clip') or a dual encoder with a branch ('bt_adapter')")
    return model_type


def load_starting_point(
    name: str | os.PathLike,
    *,
    revision: str | None = None,
    num_frames: int | None = None,
    num_adapter_layers: int | None = None,
    **config_fields: Any,
) -> tuple[BTAdapterForPreTraining, BTAdapterProcessor]:
    """Model in float32 and processor, ready for `BTAdapterTrainer`.

    From a CLIP checkpoint the branch is fresh, warm-started from the backbone's last layers, and the processor takes
    size and statistics from CLIP's image processor. From a BT-Adapter checkpoint both are as saved.

    Args:
        name: Hub id or folder.
        num_frames: frames per clip of the processor; as saved by default (8 for a fresh one).
        num_adapter_layers: K, for the last K backbone layers; `adapter_layers` among the fields names them instead.
        config_fields: fields of `BTAdapterConfig` and `BTAdapterVisionConfig`, such as `mask_ratio=0.5`.

    Raises:
        ValueError: for another kind of model, or values that do not fit it.
        OSError: where there is no such model.
    """
    model_type = check_kind(name, revision)
    if num_adapter_layers is not None:
        if config_fields.get("adapter_layers") is not None:
            raise ValueError("Give num_adapter_layers or adapter_layers, not both.")
        depth = BTAdapterConfig.from_pretrained(name, revision=revision).vision_config.num_hidden_layers
        if not 1 <= num_adapter_layers <= depth:
            raise ValueError(f"num_adapter_layers={num_adapter_layers} must be between 1 and the backbone's {depth}.")
        config_fields["adapter_layers"] = list(range(depth - num_adapter_layers, depth))
    if model_type == "clip":
        processor = processor_of_clip(name, revision)
    else:
        processor = BTAdapterProcessor.from_pretrained(name, revision=revision)
    if num_frames is not None:
        if num_frames < 1:
            raise ValueError(f"num_frames={num_frames} must be at least 1.")
        processor.video_processor.num_frames = num_frames
    model = BTAdapterForPreTraining.from_pretrained(name, revision=revision, dtype="float32", **config_fields)
    return model, processor
