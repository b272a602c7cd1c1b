"""What is wrong with a checkpoint, in words: every tensor has its place, or is named."""

from collections.abc import Mapping

import torch

from ..adapters.strictness import more, with_nearest
from ..models.modeling_bt_adapter_pretraining import BTAdapterForPreTraining
from ..models.modeling_bt_adapter_vision import BTAdapterVisionModel
from .names import RenamedCheckpoint
from .reading import CheckpointError


def without_place(keys: list[str], model_class: type) -> dict[str, list[str]]:
    """Parts that a smaller model does not have, as a whole: {what they are: their keys}."""
    parts = {}
    if model_class is not BTAdapterForPreTraining:
        parts["mbta_head."] = "the alignment head of pretraining (keep it with model_class=BTAdapterForPreTraining)"
    if model_class is BTAdapterVisionModel:
        parts |= {"visual_projection.": "the projection", "text_": "the text tower"}
    found: dict[str, list[str]] = {}
    for key in keys:
        for prefix, title in parts.items():
            if key.startswith(prefix):
                found.setdefault(title, []).append(key)
    return found


def check_tensors(
    source: str, state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size], names: Mapping[str, str]
) -> None:
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    sizes = sorted(key for key in expected.keys() & state.keys() if expected[key] != state[key].shape)
    problems = []
    for title, keys, others in (
        ("are missing", missing, unexpected),
        ("have no place in the model", unexpected, missing),
    ):
        if keys:
            others = [names[key] for key in others]
            problems.append(f"{len(keys)} tensors {title}:\n" + with_nearest([names[key] for key in keys], others))
    if sizes:
        lines = [
            f"  {names[key]}: {tuple(state[key].shape)}, the model needs {tuple(expected[key])}" for key in sizes[:5]
        ]
        problems.append(f"{len(sizes)} tensors are of another size:\n" + "\n".join(lines) + more(sizes))
    if problems:
        raise CheckpointError(
            f"{source} does not fill the model ({len(expected)} tensors):\n"
            + "\n".join(problems)
            + "\nIs it complete, and is base= the model that it was trained on?"
        )


def no_branch(source: str, found: RenamedCheckpoint) -> str:
    if found.projector and not found.state and not found.unknown:
        return (
            f"{source} is LLaVA's projector file ({', '.join(found.projector)}) and holds no BT-Adapter. The chat "
            "models take it; convert the btadapter_weight.bin beside it."
        )
    seen = [*found.unknown, *found.origin.values()]
    return (
        f"{source} holds no BT-Adapter: none of its {len(seen) + len(found.projector)} tensors begins with "
        "btadapter or timesFPN, behind backbone., model.vision_tower. or nothing. It begins with "
        f"{', '.join(map(repr, seen[:3]))}. Pass a checkpoint of the released code; a CLIP alone takes a fresh "
        "branch with get_bt_adapter_model."
    )


def unknown_tensors(source: str, found: RenamedCheckpoint) -> str:
    known = sorted(found.origin.values())
    return (
        f"{source} holds {len(found.unknown)} tensors of {len(found.unknown) + len(known)} that no released "
        f"checkpoint has:\n{with_nearest(list(found.unknown), known)}\nIs it a checkpoint of another model, or of a "
        "changed one? Take out what does not belong to the BT-Adapter, and pass the rest as a state dict."
    )
