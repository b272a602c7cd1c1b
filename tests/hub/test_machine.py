"""What `--dtype auto` stands for, and threads that are not more than the cores."""

import contextlib
import os
from pathlib import Path

import pytest
import torch

from bt_adapter_hf.hub import machine
from bt_adapter_hf.hub.machine import decoding_pool, machine_dtype, torch_threads, usable_device
from bt_adapter_hf.search.encoding import VideoEncoder


@pytest.mark.parametrize(
    ("units", "dtype", "reason"),
    [
        ({}, "float32", "the CPU has neither AMX nor AVX512-BF16"),
        ({"amx_bf16": False, "avx512_bf16": True}, "bfloat16", "the CPU has AVX512-BF16"),
        ({"amx_bf16": True, "avx512_bf16": True}, "bfloat16", "the CPU has AMX and AVX512-BF16"),
    ],
)
def test_the_units_of_the_cpu_decide(monkeypatch, units, dtype, reason):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert machine_dtype(torch.device("cpu")) == (dtype, reason)
    assert VideoEncoder.from_pretrained(device="cpu").model.dtype == getattr(torch, dtype)
    assert VideoEncoder.from_pretrained(device="cpu", dtype="float32").model.dtype == torch.float32


def test_a_device_that_is_not_there():
    assert usable_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'abacus' cannot be used"):
        usable_device("abacus")


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted as Linux shows them")
def test_those_that_decode_and_a_model_beside_them_are_not_more_than_the_cores(monkeypatch):
    """Counted are the threads of this process that have computed."""

    def spent() -> dict[str, int]:
        found = {}
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                fields = Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()
                found[thread] = int(fields[11]) + int(fields[12])  # ticks of user and system
        return found

    matrix = torch.randn(400, 400)

    def compute() -> int:
        for _ in range(30):
            matrix @ matrix
        return torch.get_num_threads()

    monkeypatch.setattr(machine, "available_cores", lambda: 3)
    with torch_threads(torch.get_num_threads()):  # to what it was
        torch.set_num_threads(4)
        before = spent()
        with decoding_pool(1) as pool:
            beside = pool.submit(compute)
            assert compute() == 2
            assert beside.result() == 1
        after = spent()
        assert torch.get_num_threads() == 4
        with decoding_pool(8) as pool:  # as was asked for
            assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == 1
    assert 1 <= sum(after[thread] - before.get(thread, 0) > 1 for thread in after) <= 3
