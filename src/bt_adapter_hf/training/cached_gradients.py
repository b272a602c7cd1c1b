"""A large contrastive batch on a small card: the gradient of the whole batch, a few clips at a time.

The losses need one small row per clip, not the clip's activations. So the rows of all clips are computed without a
graph, a few clips at a time; the losses of all rows give the gradient of each row; and each few clips are run again,
with a graph, with the same masks and all else that is drawn, to carry their rows' gradient to the parameters. That is
the gradient of the whole batch, for the activations of a few clips and one forward pass more.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..models.modeling_bt_adapter_pretraining import (
    BTAdapterForPreTraining,
    BTAdapterForPreTrainingOutput,
    BTAdapterPreTrainingFeatures,
)


def cached_gradient_step(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    clips: int,
    *,
    backward: Callable[[torch.Tensor], None],
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
    bare: BTAdapterForPreTraining | None = None,
    scale: float = 1.0,
) -> BTAdapterForPreTrainingOutput:
    """Adds the gradient of the loss of the whole batch to the parameters, `clips` clips at a time.

    On several processes the contrastive losses are over the batches of all of them, as in the model's `forward`, and
    every process has to come here with as many clips as the others.

    Args:
        model: the model to call, wrapped for several processes or compiled or bare, in training mode.
        inputs: tensors with B rows each, or dicts of them, as `BTAdapterForPreTraining.forward` takes them.
        clips: clips at a time; the last ones may be fewer.
        backward: runs the backward pass of a scalar; it may scale it.
        no_sync: context in which a backward pass does not average gradients over the processes. All passes but the
            last run in it.
        bare: the `BTAdapterForPreTraining` inside of `model`.
        scale: factor on the gradient.

    Returns:
        The losses of the batch, without a graph.

    Raises:
        ValueError: if `clips` is below 1.
    """
    if clips < 1:
        raise ValueError(f"cached gradients need at least 1 clip at a time, not {clips}.")
    bare = model if bare is None else bare
    inputs = dict(inputs)
    B, device = len(inputs["input_ids"]), inputs["input_ids"].device
    if inputs.get("row_seeds") is None:  # of masks and dropped paths
        inputs["row_seeds"] = torch.randint(2**32, (B,), device=device)
    parts = [_rows(inputs, slice(start, start + clips)) for start in range(0, B, clips)]
    states, rows = [], []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state(device))
            rows.append(model(**part, return_loss=False))
    features = {
        name: torch.cat([row[name] for row in rows]).requires_grad_() for name in rows[0] if rows[0][name] is not None
    }
    torch.clear_autocast_cache()  # inside an autocast of the caller's: weights cast without a graph stay without one
    output = bare.losses(BTAdapterPreTrainingFeatures(**features))
    constant = {"distinct"} if bare.text_learns() else {"distinct", "text", "opposite"}
    wanted = [name for name in features if name not in constant]
    gradients = torch.autograd.grad(output.loss * scale, [features[name] for name in wanted])
    gradients = dict(zip(wanted, (gradient.split(clips) for gradient in gradients), strict=True))

    for i, (part, state) in enumerate(zip(parts, states, strict=True)):
        with nullcontext() if i == len(parts) - 1 else no_sync():
            _set_random_state(state, device)
            again = model(**part, return_loss=False)
            # A scalar whose gradient with respect to the rows is theirs in the whole batch.
            backward(sum((again[name] * gradients[name][i]).sum() for name in wanted))
    return BTAdapterForPreTrainingOutput(**{name: value.detach() for name, value in output.items()})


def _rows(x: Any, rows: slice) -> Any:
    """Some rows of all tensors in `x`."""
    if isinstance(x, dict):
        return {name: _rows(value, rows) for name, value in x.items()}
    return x[rows] if isinstance(x, torch.Tensor) else x


def _random_state(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)
