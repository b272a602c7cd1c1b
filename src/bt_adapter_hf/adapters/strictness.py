"""Strict loading: no weight of a model is silently random, and none of a checkpoint silently dropped."""

import difflib
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..models.modeling_bt_adapter_pretraining import BTAdapterForPreTraining


logger = logging.get_logger(__name__)

# Part of a tensor's name -> the field of the config that its size comes from.
_SIZE_OF = {
    "time_embedding": "max_frames",
    "position_embedding": "image_size",
    "token_embedding": "vocab_size",
    "embed_tokens": "vocab_size",
    "lm_head": "vocab_size",
    "query_tokens": "num_query_tokens",
}


def check_loading(model: PreTrainedModel, info: dict[str, Any], source: str, is_ours: bool = False) -> None:
    """Looks at transformers' report on what `from_pretrained` has done.

    Modules that a checkpoint of a bare backbone lacks as a whole (the model's `_new_modules`) are told in the log: as
    a warning, but where pretraining starts.

    Args:
        info: the report.
        source: the checkpoint, for messages.
        is_ours: it was saved from a model with a branch, and what it lacks was lost.

    Raises:
        ValueError: if a tensor is missing, unexpected or of another shape; with counts and nearest names.
    """
    shapes = {key: (tuple(found), tuple(wanted)) for key, found, wanted in info["mismatched_keys"]}
    missing, unexpected = set(info["missing_keys"]) - shapes.keys(), set(info["unexpected_keys"])
    fresh = []
    for name in () if is_ours else model._new_modules:
        prefixes = {f"{path}." for path, _ in model.named_modules() if path.split(".")[-1] == name}
        for prefix in prefixes:
            keys = {key for key in model.state_dict() if key.startswith(prefix)}
            if keys and keys <= missing:
                missing -= keys
                fresh.append(f"{prefix[:-1]} ({len(keys)} tensors)")
    problems = []
    for title, keys, others in (
        ("missing from the checkpoint", missing, unexpected),
        ("in the checkpoint without a place in the model", unexpected, missing or model.state_dict().keys()),
    ):
        if keys:
            problems.append(f"{len(keys)} tensors {title}:\n{with_nearest(sorted(keys), others)}")
    if shapes:
        lines = [
            f"  {key}: {found} in the checkpoint, {wanted} in the model" for key, (found, wanted) in shapes.items()
        ]
        fields = sorted({field for key in shapes for part, field in _SIZE_OF.items() if part in key})
        problems.append(
            f"{len(lines)} tensors of another shape:\n" + "\n".join(sorted(lines)[:5]) + more(lines) + "\nSet "
            f"{' and '.join(fields) or 'the sizes in the config'} to what the checkpoint has."
        )
    if problems:
        raise ValueError(
            f"{source} does not fit {type(model).__name__}:\n"
            + "\n".join(problems)
            + "\nIs it a checkpoint of this model, or of its backbone? Check adapter_layers and the sizes in its "
            "config.json."
        )
    if fresh:
        # A fresh branch and head are what pretraining starts with, and on --resume its checkpoint brings them.
        tell = logger.info if isinstance(model, BTAdapterForPreTraining) else logger.warning
        tell(f"{source} holds no {', '.join(fresh)}: newly initialised.")


def with_nearest(keys: list[str], others: Collection[str]) -> str:
    """A line for each of the first five names, with the nearest of the others."""
    lines = []
    for key in keys[:5]:
        near = difflib.get_close_matches(key, others, n=1)
        lines.append(f"  {key}" + (f" (nearest: {near[0]})" if near else ""))
    return "\n".join(lines) + more(keys)


def more(keys: list[str]) -> str:
    return f"\n  and {len(keys) - 5} more" if len(keys) > 5 else ""
