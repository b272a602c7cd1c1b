"""FSDP2 and DeepSpeed: what is needed beyond accelerate's own preparation."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from torch.distributed.fsdp import FSDPModule, StateDictType
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import GradientCheckpointingLayer

from .compat import OPTIMIZER_NAME, SCHEDULER_NAME


def check_sharding(accelerator: Accelerator, model: nn.Module) -> None:
    """Refuses what cannot work, and says which layers FSDP2 shards one by one where the config does not.

    Raises:
        ValueError: for FSDP1, FSDP2 with sharded checkpoints or with loading on one process, DeepSpeed's ZeRO-3, and
            FSDP where accelerate would leave it out.
    """
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage > 2:
        raise ValueError(
            f"DeepSpeed with zero_stage={deepspeed.zero_stage} shards the parameters themselves, and the checkpoints "
            "of what is trained cannot be written then. Use zero_stage 2, or FSDP2 (fsdp_version: 2)."
        )
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is None:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ValueError(
                "The accelerate config asks for FSDP, which accelerate offers on several accelerators only; this is "
                f"{accelerator.num_processes} process(es) on {accelerator.device.type}. Use another config."
            )
        return
    if fsdp.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version={fsdp.fsdp_version} flattens frozen and trained parameters into one, which leaves no "
            "learning rates per part. Set fsdp_version: 2 in the accelerate config, or use DDP."
        )
    if fsdp.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading leaves the model empty on all processes but the first, where a fresh "
            "branch cannot start from its backbone. Set it to false."
        )
    if fsdp.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ValueError(
            f"fsdp_state_dict_type {fsdp.state_dict_type.name} would be read back by unpickling. Set it to "
            "FULL_STATE_DICT: only the optimizer's state of what is trained is written in it."
        )
    if fsdp.transformer_cls_names_to_wrap is None:
        layers = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
        fsdp.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Lets other methods than `forward` of a model that FSDP2 sharded be called. Layers see to themselves."""
    if isinstance(model, FSDPModule):
        model.unshard()
    yield
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of which every process holds a part; all of them have to ask for it. Another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a module on the CPU; of a sharded one all processes have to ask for it."""
    return {name: whole(value.detach()).cpu().contiguous() for name, value in module.state_dict().items()}


def sharded_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that all of them have, as `parameter` is sharded."""
    if not isinstance(parameter, DTensor):
        return tensor
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def save_sharded_optimizer(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    folder: str | os.PathLike,
) -> None:
    """Optimizer and scheduler as `Trainer` reads them back, without the copy of the model that it writes for FSDP."""
    save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, folder)
    if accelerator.is_main_process:
        torch.save(scheduler.state_dict(), Path(folder) / SCHEDULER_NAME)


def check_optimizer_state(accelerator: Accelerator, folder: str | os.PathLike) -> None:
    """Refuses a checkpoint whose optimizer state was written in another way than this run reads it.

    Raises:
        ValueError: where the state is missing; `Trainer` would go on without it, or fail for want of a file.
    """
    expected = {DistributedType.FSDP: f"{OPTIMIZER_NAME}.bin", DistributedType.DEEPSPEED: "latest"}.get(
        accelerator.distributed_type, f"{OPTIMIZER_NAME}.pt"
    )
    if not (Path(folder) / expected).is_file():
        raise ValueError(
            f"{folder} holds no {expected}, the state of the optimizer as this run reads it: FSDP2, DeepSpeed and all "
            "others (DDP, one process) write it differently. Resume with the launcher that wrote the checkpoint."
        )
