"""The projector of LLaVA-1.0 in the form that LLaVA has in transformers."""

from collections.abc import Mapping

import torch


def llava_projector(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LLaVA-1.0's single linear layer as the two layers that LLaVA has in transformers, exactly.

    The config goes with it: `projector_hidden_act="linear"`.

    Args:
        state_dict: of the authors' `mm_projector.bin` (`torch.load(path, weights_only=True)`), under any prefix.

    Returns:
        State dict for `multi_modal_projector`: the layer, then an identity.

    Raises:
        ValueError: if the state dict does not hold one linear projector.
    """
    found = {key.rpartition("mm_projector.")[2]: value for key, value in state_dict.items() if "mm_projector." in key}
    if found.keys() != {"weight", "bias"} or found["weight"].ndim != 2 or len(found["weight"]) != len(found["bias"]):
        raise ValueError(
            "Expected mm_projector.weight (width, vision width) and mm_projector.bias (width,), the single linear "
            f"layer of LLaVA-1.0; found { ({key: tuple(value.shape) for key, value in found.items()}) } among "
            f"{len(state_dict)} tensors."
        )
    weight, bias = found["weight"], found["bias"]
    return {
        "linear_1.weight": weight,
        "linear_1.bias": bias,
        "linear_2.weight": torch.eye(len(weight), dtype=weight.dtype),
        "linear_2.bias": torch.zeros_like(bias),
    }
