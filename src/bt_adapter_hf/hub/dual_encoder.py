"""A dual encoder with its processor, from all that names one: a model's folder or id, or that of an adapter."""

import os
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer

from ..models.compat_bt_adapter import resolve_revision
from ..models.configuration_bt_adapter import BTAdapterConfig
from ..models.modeling_bt_adapter import BTAdapterModel
from ..models.processing_bt_adapter import BTAdapterProcessor
from ..models.video_processing_bt_adapter import BTAdapterVideoProcessor
from .access import check_folder
from .contents import CHAT_CLASSES
from .kinds import wrong_kind
from .source import base_of, find_adapter, from_hub, model_type_of


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
    model_type = model_type_of(name, revision)
    adapter = None if model_type else find_adapter(name, {"revision": revision})
    # the branch of what is no chat model fits the CLIP that it names; LoRA alone has none
    fits = adapter is not None and bool(adapter[1].adapter_layers) and adapter[1].model_type not in CHAT_CLASSES
    if model_type != BTAdapterConfig.model_type and not fits:
        expected = f"'{BTAdapterConfig.model_type}', a dual encoder with a trained branch, or an adapter of one"
        raise wrong_kind(name, model_type, expected)
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
