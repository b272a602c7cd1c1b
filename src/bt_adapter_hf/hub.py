"""What goes into a repository besides weights."""

from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin


def save_with_code(directory: str | Path, model: PreTrainedModel, processor: ProcessorMixin | None = None, **kwargs):
    """Saves a model, and its processor, together with the files that define them.

    Such a directory loads with `AutoModel.from_pretrained(directory, trust_remote_code=True)` where this package is
    not installed. Where it is installed, the package's own code is used.

    Args:
        directory: where to save; created if needed.
        model: a tower or a dual encoder.
        processor: saved beside it.
        kwargs: passed to `model.save_pretrained`, e.g. `max_shard_size`.
    """
    auto_classes = {type(model): "AutoModel", type(model.config): "AutoConfig"}
    if processor is not None:
        auto_classes[type(processor)] = "AutoProcessor"
        auto_classes[type(processor.video_processor)] = "AutoVideoProcessor"
    # Only registered classes take their code along, and registration lasts: undo it, for plain saves must stay plain.
    try:
        for cls, name in auto_classes.items():
            cls.register_for_auto_class(name)
        model.save_pretrained(directory, **kwargs)
        if processor is not None:
            processor.save_pretrained(directory)
    finally:
        for cls in auto_classes:
            cls._auto_class = None
