"""How many frames per video the time embeddings are trained for: recorded in the config, and varied."""

import logging
import math
from collections.abc import Sequence

import torch
from torch import nn

from ..models.modeling_bt_adapter_branch import BTAdapterBranch, hashed
from ..models.modeling_bt_adapter_vision import BTAdapterVisionModel


logger = logging.getLogger(__name__)


def record_trained_frames(model: nn.Module, num_frames: int) -> None:
    """Says in the config of the tower which rows of the time table are being trained, where it does not say so yet.

    Args:
        model: has a tower, perhaps with a branch that peft has copied.
        num_frames: most frames of a training video. Beyond the table's rows all of them learn, by interpolation.
    """
    branches = [module for module in model.modules() if isinstance(module, BTAdapterBranch)]
    if not any(branch.time_embedding.weight.requires_grad for branch in branches):
        return
    towers = [module for module in model.modules() if isinstance(module, BTAdapterVisionModel)]
    trained = towers[0].config.num_trained_frames
    if trained == 0:
        for module in branches + towers:  # a copy that peft has made of a branch has made one of its config too
            module.config.num_trained_frames = min(num_frames, module.config.max_frames)
    elif trained is not None and not trained / 2 <= num_frames <= 2 * trained:
        logger.warning(
            "The time embeddings were trained for %d frames per video and are interpolated to %d in this training.",
            trained, num_frames,
        )  # fmt: skip


def vary_frames(videos: torch.Tensor, choices: Sequence[int], seed: int, step: int) -> torch.Tensor:
    """(B, T, ...) -> (B, t, ...), t out of `choices`, one frame out of each of t equal parts; all by seed and step.

    All processes take the same in a step.
    """
    count = choices[int(hashed(seed, step)) % len(choices)]
    T = videos.shape[1]
    inside = [int(hashed(seed, step, part)) / 2**32 for part in range(count)]
    picked = [math.floor((part + place) * T / count) for part, place in enumerate(inside)]
    return videos[:, torch.tensor(picked, device=videos.device)]
