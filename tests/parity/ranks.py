"""What one process of the multi-process tests does. Imports nothing of pytest: it runs in fresh processes."""

import multiprocessing
from pathlib import Path

import torch
import torch.distributed as dist

from bt_adapter_hf import BTAdapterForPreTraining
from bt_adapter_hf.conversion import convert_original_checkpoint
from tests.parity.golden import Golden


def gradients(
    rank: int, world: int, case: str, gather_gradient: str
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Losses and local gradients of the rows that belong to this rank."""
    golden = Golden(case)
    model = convert_original_checkpoint(
        golden.weights,
        golden.base,
        model_class=BTAdapterForPreTraining,
        mask_order="released",
        mbta_pairing="released",
        drop_path_rate=0.0,
        gather_gradient=gather_gradient,
    ).train()
    share = len(golden.inputs["input_ids"]) // world
    rows = slice(rank * share, (rank + 1) * share)
    output = model(
        golden.inputs["input_ids"][rows].long(),
        golden.inputs["pixel_values"][rows],
        bool_masked_pos=golden.inputs["tube_mask"][rows],
    )
    output.loss.backward()
    losses = {
        "NCE_loss": output.vtc_loss.item(),
        "branch_text_nce_loss": model.config.mbca_weight * output.mbca_loss.item(),
        "clip_branch_mask_mse_loss": model.config.mbta_weight * output.mbta_loss.item(),
    }
    released = golden.released_name()
    return losses, {released[k]: p.grad for k, p in model.named_parameters() if p.requires_grad}


def _work(rank: int, world: int, case: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    result = {}
    for mode in ("released", "global"):
        losses, local = gradients(rank, world, case, mode)
        averaged = {}
        for key, gradient in local.items():
            averaged[key] = gradient.clone()
            dist.all_reduce(averaged[key])
            averaged[key] /= world
        result[mode] = {"losses": losses, "local": local, "averaged": averaged}
    torch.save(result, Path(folder, f"rank{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(world: int, case: str, folder: Path) -> list[dict]:
    """Runs the case on `world` gloo processes; their results in rank order."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bt_adapter_hf.conversion"])  # the imports, seconds of them, happen once
    processes = [context.Process(target=_work, args=(rank, world, case, str(folder))) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * world
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]
