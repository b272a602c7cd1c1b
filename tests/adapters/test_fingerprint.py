"""The fingerprint: every weight that the branch depends on counts, and copies in other dtypes pass."""

import copy
import json
import tarfile
import zlib

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from bt_adapter_hf import load_bt_adapter, save_bt_adapter, unload_bt_adapter
from bt_adapter_hf.adapters import fingerprint
from bt_adapter_hf.adapters.files import CONFIG_NAME, AdapterError
from bt_adapter_hf.adapters.fingerprint import CAST_DISTANCE, OTHER_DISTANCE, QUANTIZED_DISTANCE, backbone_fingerprint
from tests.adapters.test_verbs import FAMILIES, refused, trained, vision
from tests.chat import tiny_hosts
from tests.hub.test_published_before import ARCHIVE


LAYERS = 3


def backbone(seed=0):
    """Wide enough for estimates of distances, with norms and biases as trained models have them."""
    model = vision(seed=seed, hidden_size=64, intermediate_size=128, depth=LAYERS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model


@pytest.fixture(scope="module")
def model():
    return backbone()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("adapter")
    save_bt_adapter(trained(copy.deepcopy(model), 2), folder, base_model_name_or_path="org/clip")
    return folder


def distance(found, reference, last=LAYERS - 1):
    apart = fingerprint.distances(backbone_fingerprint(found, last), backbone_fingerprint(reference, last))
    return max(apart.values())


@torch.no_grad()
def noisy(model, share):
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.add_(share * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr(fingerprint.logger, "warning", lines.append)
    return lines


def test_the_numbers_are_the_same_everywhere(model):
    """Computed here by the definition: signs from the bits of PCG64, for places and, by the name, for rows."""

    def sign(i, code):
        raw = int(np.random.PCG64([20240226, code]).random_raw(i // 64 + 1)[-1])
        return 1.0 if (raw >> (i % 64 // 8 * 8)) & (0x80 >> i % 8) else -1.0

    places = [sign(i, 0) for i in range(4096)]
    model = vision(hidden_size=1024, num_attention_heads=4, intermediate_size=8, depth=LAYERS)
    found = backbone_fingerprint(model, LAYERS - 1)
    assert found.keys() == {"embeddings", "positions", "layers.0", "layers.1", "layers.2"}
    name = "embeddings.position_embedding.weight"
    weight = model.get_parameter(name).detach().double().flatten().numpy()
    assert len(weight) == 5 * 1024  # more than a row
    code = zlib.crc32(name.encode())
    size = np.linalg.norm(weight) / len(weight) ** 0.5
    sums = np.zeros(8)
    for i, value in enumerate(weight / (len(weight) ** 0.5 * (size + 1e-4))):
        place = (i % 4096 - code) % 4096
        sums[place % 8] += places[place] * sign(i // 4096, code) * value
    sums[code % 8] += (1 if code & 8 else -1) * np.log(size + 1e-4)
    np.testing.assert_allclose(found["positions"], sums, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_that_the_branch_depends_on_counts(family):
    """And no other: hosts have their own last norm, and what comes behind the last layer that feeds the branch."""
    model, last = FAMILIES[family](), 3
    before = backbone_fingerprint(model, last)
    assert sum(map(len, before.values())) == 8 * 6
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            kept = parameter.clone()
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            apart = fingerprint.distances(backbone_fingerprint(model, last), before)
            parameter.copy_(kept)
        moved = {part for part, value in apart.items() if value > 0}
        place = name.split(".")
        if "position_embedding" in name:
            assert moved == {"positions"}
        elif place[0] in ("embeddings", "pre_layrnorm"):
            assert moved == {"embeddings"}
        elif place[0] == "encoder" and int(place[2]) <= last:
            assert moved == {f"layers.{place[2]}"}
        else:
            assert moved == set(), name
        assert not moved or max(apart.values()) > OTHER_DISTANCE, name


def test_casts_are_accepted_without_a_word(model, adapter, log):
    for dtype, most in ((torch.float16, 3e-3), (torch.bfloat16, CAST_DISTANCE / 2)):
        found = copy.deepcopy(model).to(dtype)
        assert 0 < distance(found, model) < most
        load_bt_adapter(found, adapter)
    load_bt_adapter(copy.deepcopy(model).half().bfloat16(), adapter)
    assert log == []


def test_further_tuning_is_told_and_other_weights_are_refused(model, adapter, log):
    assert CAST_DISTANCE < distance(noisy(model, 0.01), model) < OTHER_DISTANCE / 2
    load_bt_adapter(noisy(model, 0.01), adapter)
    assert len(log) == 1 and "parts that differ" in log[0] and "org/clip" in log[0]
    load_bt_adapter(noisy(model, 0.05), adapter)
    assert len(log) == 2
    assert distance(noisy(model, 0.25), model) > 1.5 * OTHER_DISTANCE
    assert distance(backbone(seed=1), model) > 4 * OTHER_DISTANCE
    for other in (noisy(model, 0.25), backbone(seed=1)):
        refused(other, adapter, "allow_backbone_mismatch")
    assert len(log) == 2
    load_bt_adapter(noisy(model, 0.25), adapter, allow_backbone_mismatch=True)
    assert "Attached all the same" in log[-1]


@pytest.mark.parametrize("name", ["encoder.layers.1.self_attn.k_proj.bias", "encoder.layers.0.mlp.fc1.weight"])
def test_one_random_tensor_is_refused_by_the_name_of_its_part(model, adapter, name):
    """The largest of the distances decides, not their mean."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(name).normal_(std=0.1)
    refused(other, adapter, rf"differ by .* in layers\.{name.split('.')[2]}, the most among 1 of 5 parts")


def test_all_but_the_two_weights_of_before_random(model, adapter):
    """What the fingerprint of version 0.1 saw is right, and all else is random."""
    other = backbone(seed=1)
    with torch.no_grad():
        for name in ("embeddings.patch_embedding.weight", "encoder.layers.1.mlp.fc2.weight"):
            other.get_parameter(name).copy_(model.get_parameter(name))
    refused(other, adapter, "they differ by")


def test_another_image_size_leaves_the_positions_out(model, adapter):
    larger = vision(hidden_size=64, intermediate_size=128, depth=LAYERS, image_size=32)
    own = {key: value for key, value in model.state_dict().items() if "position" not in key}
    assert not larger.load_state_dict(own, strict=False).unexpected_keys
    assert load_bt_adapter(larger, adapter).config.image_size == 32


def test_a_damaged_fingerprint(model, adapter, tmp_path):
    content = json.loads((adapter / CONFIG_NAME).read_text())
    for change in ({}, {**content["fingerprint"], "layers.1": [1.0]}):
        (tmp_path / CONFIG_NAME).write_text(json.dumps({**content, "fingerprint": change}))
        refused(copy.deepcopy(model), tmp_path, "no usable fingerprint of")


# ----------------------------------------------------------------------------------------------------------- quantized


def quantize(model, kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for layer in model.encoder.layers:
        for part in (layer.mlp, layer.self_attn):
            for name, linear in list(part.named_children()):
                if not isinstance(linear, torch.nn.Linear):
                    continue
                sizes = (linear.in_features, linear.out_features)
                if kind == "int8":
                    new = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
                    new.weight = bitsandbytes.nn.Int8Params(
                        linear.weight.data, requires_grad=False, has_fp16_weights=False
                    )
                else:
                    new = bitsandbytes.nn.Linear4bit(*sizes, quant_type=kind)
                    new.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type=kind)
                new.bias = linear.bias
                setattr(part, name, new.to("cpu"))
    return model


@pytest.mark.parametrize("kind, least, most", [("int8", 0.005, 0.1), ("nf4", 0.1, 0.4), ("fp4", 0.15, 0.5)])
def test_quantized_copies_are_accepted_and_others_not(model, adapter, log, kind, least, most):
    found = quantize(copy.deepcopy(model), kind)
    assert found.encoder.layers[0].mlp.fc2.weight.dtype in (torch.uint8, torch.int8)
    assert least < distance(found, model) < most < QUANTIZED_DISTANCE
    tower = load_bt_adapter(found, adapter)
    with torch.no_grad():
        assert tower(torch.randn(1, 2, 3, 16, 16)).pooler_output.isfinite().all()
    assert log == [] and type(unload_bt_adapter(tower)) is type(model)
    assert distance(quantize(noisy(model, 0.25), kind), model) > QUANTIZED_DISTANCE
    refused(quantize(backbone(seed=1), kind), adapter, "they differ by")


# ------------------------------------------------------------------------------------------- files of earlier versions


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """An adapter as version 0.1 wrote it, and the LLaVA that it was made for."""
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    from bt_adapter_hf import BTAdapterLlavaForConditionalGeneration

    model = BTAdapterLlavaForConditionalGeneration.from_pretrained(folder / "llava").eval()
    return folder / "adapter", model


def test_adapters_of_before_load_with_a_warning(before, log):
    adapter, model = before
    assert "patch_embedding" in json.loads((adapter / CONFIG_NAME).read_text())["fingerprint"]
    native = unload_bt_adapter(copy.deepcopy(model))
    assert type(native) is LlavaForConditionalGeneration
    loaded = load_bt_adapter(native, adapter)
    assert len(log) == 1 and "of an earlier version, which sees two" in log[0] and "save_bt_adapter" in log[0]
    found, expected = (m.model.vision_tower.bt_adapter for m in (loaded, model))
    assert all(p.equal(found.get_parameter(name)) for name, p in expected.named_parameters())


def test_adapters_of_before_are_refused_by_what_they_know(before, log):
    adapter, _ = before
    with pytest.raises(AdapterError, match="of 2 parts that differ"):
        load_bt_adapter(tiny_hosts.llava(), adapter)  # not rounded: another one
