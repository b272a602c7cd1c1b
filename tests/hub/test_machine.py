"""What `--dtype auto` stands for."""

import pytest
import torch

from bt_adapter_hf.hub.machine import machine_dtype, usable_device
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
