"""What this machine has: devices, cores, and the number format that it computes fastest in."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


def default_device() -> str:
    """An accelerator where there is one."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def usable_device(device: str | None) -> torch.device:
    """The device of this name, or an accelerator where there is one.

    Raises:
        ValueError: this machine has no such device.
    """
    try:
        if device is not None and torch.device(device).type == "meta":
            raise RuntimeError("it holds no values, so that nothing can be computed on it")
        return torch.empty(0, device=default_device() if device is None else device).device
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:  # torch's ways to say so
        raise ValueError(f"device '{device}' cannot be used: {str(error).splitlines()[0]}") from error


def available_cores() -> int:
    """Those that this process may use, not all that there are: a container or `taskset` may leave it fewer."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Each thread of Python that computes here does so with `count` of torch's at most (one at least), none of them
    beyond those that the user allows (`OMP_NUM_THREADS`)."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, count)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def decoding_workers() -> int:
    """Of those that decode beside a model on the same cores: half as many, and 4 at most."""
    return max(1, min(4, available_cores() // 2))


@contextmanager
def decoding_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that decode on one core each, while the caller computes with the cores that they leave."""
    one_each = {"initializer": torch.set_num_threads, "initargs": (1,)}  # of the thread that calls it
    with (
        torch_threads(available_cores() - workers),
        ThreadPoolExecutor(workers, thread_name_prefix="decode", **one_each) as pool,
    ):
        yield pool


def machine_dtype(device: torch.device) -> tuple[str, str]:
    """The dtype that `--dtype auto` stands for, and why.

    bfloat16 where the processor or accelerator has units for it, which halves the time and more; float32 elsewhere,
    where bfloat16 would be made up of float32 and slower.

    Returns:
        "bfloat16" or "float32", and the reason in words.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        has_units = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "xpu":
        name, has_units = torch.xpu.get_device_name(device), torch.xpu.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        found = torch.cpu.get_capabilities()
        units = {"AMX": found.get("amx_bf16"), "AVX512-BF16": found.get("avx512_bf16")}
        name, has_units = "the CPU", any(units.values())
        if has_units:
            return "bfloat16", f"{name} has {' and '.join(unit for unit, there in units.items() if there)}"
        return "float32", f"{name} has neither AMX nor AVX512-BF16"
    else:
        return "float32", f"{device.type} is not known to be faster in bfloat16"
    return ("bfloat16", f"{name} has units for it") if has_units else ("float32", f"{name} has no units for bfloat16")


def processes_now() -> tuple[int, int, Callable[[], None]]:
    """Rank, number of processes, and what waits for all of them."""
    if "RANK" not in os.environ:  # of torchrun and accelerate launch
        return 0, 1, lambda: None
    from accelerate import PartialState

    state = PartialState(cpu=default_device() == "cpu")  # without this it takes a process on a CPU for the only one
    return state.process_index, state.num_processes, state.wait_for_everyone
