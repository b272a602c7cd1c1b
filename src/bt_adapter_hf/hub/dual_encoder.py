"""A dual encoder with its processor, from all that names one: a model's folder or id, or that of an adapter."""

import os
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig

from ..adapters.files import PEFT_CONFIG_NAME
from ..models.compat_bt_adapter import resolve_revision
from ..models.configuration_bt_adapter import BTAdapterConfig
from ..models.modeling_bt_adapter import BTAdapterModel
from ..models.processing_bt_adapter import BTAdapterProcessor
from ..models.video_processing_bt_adapter import BTAdapterVideoProcessor
from .access import check_folder
from .contents import CHAT_CLASSES
from .source import base_of, find_adapter, from_hub


def load_dual_encoder(
    name: str | os.PathLike, revision: str | None = None, **options: Any
) -> tuple[BTAdapterModel, BTAdapterProcessor, str | None]:
    """Model, processor, and the commit that both come from, where they come from the Hub.

    An adapter is loaded with the base model that it names, and with a processor made from that of the base model where
    it brings none.

    Args:
        options: of `BTAdapterModel.from_pretrained`.

    Raises:
        ValueError: the name is that of a model of another kind (a plain CLIP has no trained branch), or of an adapter
            of one.
        OSError: there is nothing of this name.
    """
    name = os.fspath(name)
    check_folder(name)
    revision = resolve_revision(name, revision)  # one commit for all that is loaded below
    config = from_hub(lambda: PreTrainedConfig.get_config_dict(name, revision=revision)[0], name, revision)
    adapter = None if config else find_adapter(name, {"revision": revision})
    if adapter is not None:
        is_chat = adapter[1].model_type in CHAT_CLASSES  # any other branch fits the CLIP that it names
        config = {"model_type": adapter[1].model_type if is_chat else BTAdapterConfig.model_type}
    elif not config and os.path.isdir(name):
        found = "LoRA of peft without a branch" if os.path.isfile(os.path.join(name, PEFT_CONFIG_NAME)) else "no model"
        raise ValueError(f"'{name}' holds {found}: expected the folder of a dual encoder, or of an adapter of one.")
    if config.get("model_type") != BTAdapterConfig.model_type:
        kind = "an adapter of a model" if adapter is not None else "a model"
        raise ValueError(
            f"'{name}' holds {kind} of type '{config.get('model_type')}'; expected '{BTAdapterConfig.model_type}', a "
            "dual encoder with a trained branch."
        )
    model = BTAdapterModel.from_pretrained(name, revision=revision, **options)
    if adapter is None or (adapter[0] / "processor_config.json").is_file():
        processor = from_hub(lambda: BTAdapterProcessor.from_pretrained(name, revision=revision), name, revision)
    else:
        base, base_revision = base_of(adapter[0], name, adapter[1])
        processor = from_hub(lambda: processor_of_clip(base, base_revision), base, base_revision)
        if model.config.vision_config.num_trained_frames:  # which the base model's processor cannot know
            processor.video_processor.num_frames = model.config.vision_config.num_trained_frames
    return model, processor, getattr(revision, "resolved", revision)


def processor_of_clip(name: str | os.PathLike, revision: str | None = None) -> BTAdapterProcessor:
    """The processor of a branch beside a CLIP, whose sizes, statistics and tokenizer it takes."""
    image_processor = AutoImageProcessor.from_pretrained(name, revision=revision)
    video_processor = BTAdapterVideoProcessor(
        size=dict(image_processor.size),
        crop_size=dict(image_processor.crop_size),
        image_mean=image_processor.image_mean,
        image_std=image_processor.image_std,
    )
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    return BTAdapterProcessor(image_processor, video_processor, tokenizer)
