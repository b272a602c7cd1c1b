"""Chat models quantized by bitsandbytes, on the CPU: what is quantized, what is not, and the verbs on them."""

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaConfig

from bt_adapter_hf import (
    get_bt_adapter_model,
    load_bt_adapter,
    quantization_config,
    save_bt_adapter,
    unload_bt_adapter,
)
from bt_adapter_hf.adapters.files import AdapterError
from bt_adapter_hf.adapters.host_modules import find_tower
from tests.adapters.test_adapters_on_hosts import HOSTS, Host, assert_as_before, snapshot
from tests.chat import tiny_hosts


pytest.importorskip("bitsandbytes")
BITS = {"4-bit": {"load_in_4bit": True}, "8-bit": {"load_in_8bit": True}}


@pytest.fixture(scope="module", params=list(HOSTS))
def host(request, tmp_path_factory):
    """As in the other tests, and wide enough for bitsandbytes' blocks of 64 weights, 32 rows at a time."""
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    text = LlamaConfig(**{**tiny_hosts.text_config().to_dict(), **wide, "num_key_value_heads": 4, "head_dim": 16})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_hosts, "SIZES", {**tiny_hosts.SIZES, **wide})
        patch.setattr(tiny_hosts, "QFORMER", {**tiny_hosts.QFORMER, **wide})
        patch.setattr(tiny_hosts, "text_config", lambda: text)
        return Host(request.param, *HOSTS[request.param]).prepare(tmp_path_factory.mktemp(request.param))


@pytest.fixture(params=list(BITS))
def bits(request):
    return BITS[request.param]


def quantized(model) -> set[str]:
    kinds = ("Linear4bit", "Linear8bitLt")
    return {name for name, module in model.named_modules() if type(module).__name__ in kinds}


def assert_only_the_language_model_is_quantized(model):
    linear = {
        name
        for name, module in model.named_modules()
        if "language_model" in name and isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    }
    assert linear and quantized(model) == linear
    kept = {name: p.dtype for name, p in model.named_parameters() if "language_model" not in name}
    assert {dtype for name, dtype in kept.items() if "qformer" not in name} <= {torch.bfloat16, torch.float32}
    for part in ("bt_adapter", "vision", "projec"):
        dtypes = {dtype for name, dtype in kept.items() if part in name and "qformer" not in name}
        assert dtypes == {torch.bfloat16}, part


def assert_comes_back(host, model, folder):
    """Saves, loads, and compares: before the first call, for bitsandbytes shuffles 4-bit weights then on some CPUs."""
    model.save_pretrained(folder)
    again = host.model_class.from_pretrained(folder, dtype=torch.bfloat16)
    assert quantized(again) == quantized(model)
    a, b = model.state_dict(), again.state_dict()
    assert {k for k in a.keys() | b.keys() if k not in a or k not in b or not torch.equal(a[k], b[k])} == set()
    inputs = host.inputs(dtype=torch.bfloat16)
    # its kernels round differently from one place in memory to the next
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, atol=0.2, rtol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("how", ["ours", "helper"])
def test_loading_quantizes_the_language_model_alone(host, bits, how, tmp_path):
    config = quantization_config(**bits) if how == "helper" else BitsAndBytesConfig(**bits)
    model = host.ours(quantization_config=config, dtype=torch.bfloat16)
    assert_only_the_language_model_is_quantized(model)
    assert_comes_back(host, model, tmp_path)


@torch.no_grad()
def test_a_fresh_branch_beside_a_quantized_language_model(host, bits):
    ours = host.model_class.from_pretrained(
        host.native, quantization_config=BitsAndBytesConfig(**bits), dtype=torch.bfloat16
    )
    assert_only_the_language_model_is_quantized(ours)
    model = get_bt_adapter_model(host.load(quantization_config=quantization_config(**bits), dtype=torch.bfloat16))
    assert_only_the_language_model_is_quantized(model)
    images_only = host.inputs(False, dtype=torch.bfloat16)
    assert torch.equal(model(**images_only).logits, ours(**images_only).logits)


@torch.no_grad()
def test_verbs_on_a_quantized_model_in_memory(host, bits, tmp_path):
    native = host.load(quantization_config=quantization_config(**bits), dtype=torch.bfloat16)
    images_only = host.inputs(False, dtype=torch.bfloat16)
    logits = native(**images_only).logits
    before = snapshot(native)
    model = load_bt_adapter(native, host.adapter)
    assert model.is_quantized and model.hf_quantizer is native.hf_quantizer
    assert_only_the_language_model_is_quantized(model)
    assert torch.equal(model(**images_only).logits, logits)
    inputs = host.inputs(dtype=torch.bfloat16)
    expected = host.ours(quantization_config=quantization_config(**bits), dtype=torch.bfloat16)
    torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits, atol=0.2, rtol=0.05)
    save_bt_adapter(model, tmp_path / "adapter", extra_modules=[host.projector])
    assert unload_bt_adapter(model) is native
    assert_as_before(native, before)
    assert torch.equal(native(**images_only).logits, logits)
    again = load_bt_adapter(
        host.load(quantization_config=quantization_config(**bits), dtype=torch.bfloat16), tmp_path / "adapter"
    )
    assert_comes_back(host, again, tmp_path / "whole")


@torch.no_grad()
def test_a_model_whose_vision_model_was_quantized_too(host, bits, tmp_path):
    """What transformers does by itself: everything but the output layer."""

    def load():
        return host.load(quantization_config=BitsAndBytesConfig(**bits), dtype=torch.bfloat16)

    native, images_only = load(), host.inputs(False, dtype=torch.bfloat16)
    assert any("vision" in name for name in quantized(native))
    with pytest.raises(ValueError, match="quantization_config"):
        get_bt_adapter_model(native)
    logits = native(**images_only).logits
    before = snapshot(native)
    model = load_bt_adapter(native, host.adapter)
    branch = find_tower(model).bt_adapter
    assert not quantized(branch) and {p.dtype for p in branch.parameters()} == {torch.bfloat16}
    assert torch.equal(model(**images_only).logits, logits)
    assert model(**host.inputs(dtype=torch.bfloat16)).logits.isfinite().all()
    assert unload_bt_adapter(model) is native
    assert_as_before(native, before)

    # a projector that was quantized by accident does not take the weights of a trained one
    save_bt_adapter(host.ours(), tmp_path / "projector", extra_modules=[host.projector])
    with pytest.raises(AdapterError, match="which is quantized in the model"):
        load_bt_adapter(native, tmp_path / "projector")
    assert_as_before(native, before)

    native = load()
    native.save_pretrained(tmp_path / "native")
    with pytest.raises(ValueError, match="quantized checkpoint, its vision model included"):
        host.model_class.from_pretrained(tmp_path / "native", bt_adapter=host.adapter)
    assert_comes_back(host, load_bt_adapter(native, host.adapter), tmp_path / "whole")


def test_one_of_4_and_8_bits():
    for bits in ({}, {"load_in_4bit": True, "load_in_8bit": True}):
        with pytest.raises(ValueError, match="load_in_4bit=True or load_in_8bit=True"):
            quantization_config(**bits)
    config = quantization_config(load_in_4bit=True, llm_int8_skip_modules=["model.language_model.layers.0"])
    assert config.llm_int8_skip_modules[0] == "model.language_model.layers.0"
    assert "lm_head" in config.llm_int8_skip_modules
