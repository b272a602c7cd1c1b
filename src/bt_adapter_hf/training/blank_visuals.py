"""Batches without a video, or with an image on one process only: a blank one goes with them.

What learns is behind the video: in a batch of words alone nothing would, and of several processes that one would lack
the gradients that the others wait for. So a row with a blank visual is added, on whose answer there is no loss.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import pad


if TYPE_CHECKING:
    from ..models.processing_bt_adapter_chat import BTAdapterChatProcessorMixin
    from .frozen_states import FrozenStates


PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
# What there is per row, and what it is padded with; a padding id is masked, and must only not be a placeholder's.
_ROWS = {
    "input_ids": 0,
    "attention_mask": 0,
    "labels": -100,
    "qformer_input_ids": 0,
    "qformer_attention_mask": 0,
}


def shows(batch: dict[str, Any], kind: str) -> bool:
    """Whether a batch of `InstructionCollator` has a visual of a kind, "image" or "video"."""
    return PIXELS[kind] in batch or (kind == "video" and "backbone_states" in batch)


def blank_row(
    kind: str, processor: "BTAdapterChatProcessorMixin", states: "FrozenStates | None" = None
) -> dict[str, Any]:
    """A batch of one conversation with a black image, or a black video of one frame, and no answer to learn.

    Args:
        kind: "image" or "video".
        processor: of the chat model.
        states: where those of videos take the place of their pixels.
    """
    size = processor.video_processor.crop_size
    frames = np.zeros((processor.blank_frames, size["height"], size["width"], 3), np.uint8)
    part = {"type": kind, kind: frames if kind == "video" else frames[0]}
    encoded = processor.apply_chat_template(
        [[{"role": "user", "content": [part, {"type": "text", "text": "."}]}]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"do_sample_frames": False},
    )
    row = {name: encoded[name] for name in (*_ROWS, PIXELS[kind]) if name in encoded}
    row["labels"] = torch.full_like(row["input_ids"], -100)
    if kind == "video" and states is not None:
        del row[PIXELS[kind]]
        row["backbone_states"] = states.blank()
    return row


def with_blank(batch: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """A batch that shows nothing of a kind, with a [`blank_row`] of that kind behind its rows."""
    device = batch["input_ids"].device
    joined = dict(batch)
    for name, value in row.items():
        if name not in _ROWS:
            joined[name] = (
                {index: state.to(device) for index, state in value.items()}
                if isinstance(value, dict)
                else value.to(device)
            )
            continue
        length = max(batch[name].shape[1], value.shape[1])
        parts = [pad(part, (0, length - part.shape[1]), value=_ROWS[name]) for part in (batch[name], value.to(device))]
        joined[name] = torch.cat(parts)
    return joined
