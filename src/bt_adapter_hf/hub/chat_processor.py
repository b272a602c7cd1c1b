"""The processor of a chat model with an adapter: the one that was tuned with it, where the adapter brings it."""

import os
from pathlib import Path
from typing import Any, TypeVar

from ..adapters.files import CONFIG_NAME
from ..adapters.whole_models import is_whole_model
from .contents import read_json
from .source import PROCESSOR_FILES, from_hub


Processor = TypeVar("Processor")

_CONFIGS = PROCESSOR_FILES[:2]  # of today, and of older versions of transformers


def load_chat_processor(
    cls: type[Processor],
    name: str | os.PathLike,
    revision: str | None = None,
    adapter: Path | None = None,
    **fields: Any,
) -> Processor:
    """The processor of this class in the folder of an adapter, where one is there; otherwise that of the model.

    An adapter without one says how many frames it was trained on, perhaps; the model's processor takes as many then.

    Args:
        cls: of a chat model.
        name, revision: of the model.
        adapter: folder of the adapter that is put into it.
        fields: of the processor, such as `num_frames`, instead of what is saved.

    Raises:
        ValueError: there is no processor.
    """
    if adapter is not None and brings_processor(adapter, cls):
        return cls.from_pretrained(adapter, **fields)
    trained = None if adapter is None else trained_frames(adapter)
    if trained:
        fields = {"num_frames": trained, **fields}
    if os.path.isdir(name) and not any(Path(name, config).is_file() for config in _CONFIGS):
        raise ValueError(
            f"'{name}' holds a model without its processor. Save that beside it: {cls.__name__}.from_pretrained(X)"
            f".save_pretrained('{name}'), where X is the model that it was made from, or of a merged LoRA its folder."
        )
    return from_hub(lambda: cls.from_pretrained(name, revision=revision, **fields), name, revision)


def brings_processor(adapter: Path, cls: type) -> bool:
    """Whether a processor of this class lies beside an adapter; that of a dual encoder is of no use in a chat."""
    path = adapter / _CONFIGS[0]
    return path.is_file() and read_json(path).get("processor_class") == cls.__name__


def trained_frames(adapter: Path) -> int | None:
    """Frames per video that the branch in a folder was trained on; 0 or None: not known."""
    if is_whole_model(adapter):
        config = read_json(adapter / "config.json")
        return config.get("vision_config", config).get("num_trained_frames")
    if (adapter / CONFIG_NAME).is_file():
        return read_json(adapter / CONFIG_NAME).get("branch", {}).get("num_trained_frames")
    return None
