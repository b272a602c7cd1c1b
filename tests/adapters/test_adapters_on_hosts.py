"""The verbs on chat models in memory: what is shared, what is computed, and that unloading leaves no trace."""

import copy
import json

import accelerate
import peft
import pytest
import torch
from transformers import (
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    LlavaForConditionalGeneration,
    T5Config,
)

from bt_adapter_hf import (
    BTAdapterInstructBlipForConditionalGeneration,
    BTAdapterLlavaForConditionalGeneration,
    BTAdapterMiniGPT4ForConditionalGeneration,
    BTAdapterVisionModel,
    get_bt_adapter_model,
    load_bt_adapter,
    save_bt_adapter,
    unload_bt_adapter,
)
from bt_adapter_hf.adapters.files import AdapterError
from bt_adapter_hf.adapters.host_modules import find_tower
from tests.chat import tiny_hosts
from tests.chat.tiny_hosts import PATCHES, QUERIES, images, left_padded, right_padded, video


# peft asks transformers by a name that the latter deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


class Host:
    """One kind of chat model: native and of ours, with an adapter of four layers for its image tower."""

    def __init__(self, name: str, make, native_class, model_class, projector: str, tokens: int):
        self.name, self.make, self.native_class, self.model_class = name, make, native_class, model_class
        self.projector, self.tokens = projector, tokens

    def prepare(self, folder):
        self.native, self.adapter = folder / "native", folder / "adapter"
        native = self.make()
        native.save_pretrained(self.native)
        tower = BTAdapterVisionModel.from_backbone(find_tower(native))
        tiny_hosts.stir(tower.bt_adapter)
        save_bt_adapter(tower, self.adapter)
        # InstructBLIP's and BLIP-2's towers lack the last layer of the model that an EVA adapter is for
        self.layers = [1, 2, 3] if self.name == "llava" else [1, 2, 3, 4]
        return self

    def load(self, **options):
        return self.native_class.from_pretrained(self.native, **options).eval()

    def ours(self, **options):
        return self.model_class.from_pretrained(self.native, bt_adapter=self.adapter, **options)

    def inputs(self, with_video: bool = True, dtype=torch.float32) -> dict:
        def prompt(*parts):
            return tiny_hosts.prompt(*parts, tokens=self.tokens)

        text = {}
        if self.name == "instructblip":
            text = {"qformer_input_ids": torch.tensor([[3, 4], [3, 7]])}
        if not with_video:
            rows = left_padded(prompt("image", 4), prompt("image", 5, 6))
            return {**rows, **text, "pixel_values": images(2).to(dtype)}
        rows = left_padded(prompt("image", 4, "video", 5), prompt(4, 5, 6, "video", 7))
        visuals = {"pixel_values": images(), **right_padded(video(3), video(5, seed=4))}
        return {**rows, **text, **{k: v.to(dtype) if v.is_floating_point() else v for k, v in visuals.items()}}


HOSTS = {
    "llava": (
        tiny_hosts.llava,
        LlavaForConditionalGeneration,
        BTAdapterLlavaForConditionalGeneration,
        "model.multi_modal_projector",
        PATCHES,
    ),
    "instructblip": (
        tiny_hosts.instructblip,
        InstructBlipForConditionalGeneration,
        BTAdapterInstructBlipForConditionalGeneration,
        "language_projection",
        QUERIES,
    ),
    "minigpt4": (
        tiny_hosts.blip2,
        Blip2ForConditionalGeneration,
        BTAdapterMiniGPT4ForConditionalGeneration,
        "language_projection",
        QUERIES,
    ),
}


@pytest.fixture(scope="module", params=list(HOSTS))
def host(request, tmp_path_factory):
    return Host(request.param, *HOSTS[request.param]).prepare(tmp_path_factory.mktemp(request.param))


def snapshot(model) -> dict:
    """Everything of a model that the verbs could change, and the identity of its parts."""
    configs = [model.config] + [part.config for part in model.modules() if hasattr(part, "config")]
    return {
        "attributes": {
            name: value
            for name, value in vars(model).items()
            if name not in ("_parameters", "_buffers", "_modules", "_forward_hooks", "generation_config")
        },
        "modules": {name: (id(m), m.training, id(getattr(m, "_hf_hook", None))) for name, m in model.named_modules()},
        "tensors": {
            name: (0 if p.is_meta else id(p), p.clone(), p.requires_grad)  # accelerate makes them anew for each call
            for name, p in [*model.named_parameters(), *model.named_buffers()]
        },
        "configs": [
            (id(c), c._attn_implementation_internal, json.dumps(c.to_dict(), default=str, sort_keys=True))
            for c in configs
        ],
    }


def assert_as_before(model, before: dict):
    after = snapshot(model)
    for part in ("attributes", "modules", "configs"):
        assert after[part] == before[part]
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (identity, value, learns) in before["tensors"].items():
        found = after["tensors"][name]
        assert (found[0], found[2]) == (identity, learns), name
        assert found[1].is_meta or found[1].equal(value), name


def generate(model, **inputs):
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [18, 19]}
    return model.generate(**inputs, **options)


# ----------------------------------------------------------------------------------------------------- load and unload


@torch.no_grad()
def test_load_is_from_pretrained_around_the_same_parts_and_unload_leaves_no_trace(host):
    native, expected = host.load(), host.ours()
    before, logits = snapshot(native), native(**host.inputs(False)).logits
    shared = {name: parameter for name, parameter in native.named_parameters() if "vision" not in name}
    model = load_bt_adapter(native, host.adapter)
    assert type(model) is host.model_class
    assert find_tower(model).vision_model is find_tower(native)
    assert find_tower(model).config.adapter_layers == host.layers
    own = dict(model.named_parameters())
    assert all(own[name] is parameter for name, parameter in shared.items())
    assert not any(t.is_meta for t in [*own.values(), *model.buffers()])
    assert {name for name, p in own.items() if not p.requires_grad} == {
        name for name in own if "vision" in name and "bt_adapter" not in name
    }
    assert {k for k, v in model.state_dict().items() if not v.equal(expected.state_dict()[k])} == set()
    assert model.config.to_dict() | {"architectures": None} == expected.config.to_dict() | {"architectures": None}

    assert torch.equal(model(**host.inputs(False)).logits, logits)
    assert torch.equal(model(**host.inputs()).logits, expected(**host.inputs()).logits)
    assert torch.equal(generate(model, **host.inputs()), generate(expected, **host.inputs()))

    assert unload_bt_adapter(model) is native
    assert_as_before(native, before)
    assert torch.equal(native(**host.inputs(False)).logits, logits)


def test_a_fresh_branch_is_that_of_from_pretrained(host):
    native = host.load().train()
    before = snapshot(native)
    model = get_bt_adapter_model(native)
    expected = host.model_class.from_pretrained(host.native).config.vision_config
    tower = find_tower(model)
    assert type(model) is host.model_class and model.training and tower.bt_adapter.training
    assert tower.config.to_dict() == expected.to_dict() == model.config.vision_config.to_dict()
    layer, source = tower.bt_adapter.layers[-1], tower.vision_model.encoder.layers[tower.config.adapter_layers[-1]]
    assert torch.equal(layer.spatial.mlp.fc1.weight, source.mlp.fc1.weight)
    assert not layer.temporal.proj.weight.any()
    with pytest.raises(ValueError, match="has a BT-Adapter; take it away"):
        get_bt_adapter_model(model)
    assert unload_bt_adapter(model) is native
    assert_as_before(native, before)
    two = get_bt_adapter_model(native, 2, max_frames=7)
    top = 4 if host.name == "llava" else 5
    assert find_tower(two).config.adapter_layers == [top - 2, top - 1] and find_tower(two).config.max_frames == 7


def test_every_trainable_parameter_has_a_gradient(host):
    model = get_bt_adapter_model(host.load().train())
    ids = host.inputs()["input_ids"]
    model(**host.inputs(), labels=ids.masked_fill((ids == 19) | (ids == 18) | (ids == 0), -100)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@torch.no_grad()
def test_what_is_saved_comes_back_and_the_projector_goes_away_with_the_adapter(host, tmp_path):
    model = load_bt_adapter(host.load(), host.adapter)
    tiny_hosts.stir(model.get_submodule(host.projector))
    save_bt_adapter(model, tmp_path / "adapter", extra_modules=[host.projector])
    model.save_pretrained(tmp_path / "whole")
    native = host.load()
    before = snapshot(native)
    again = load_bt_adapter(native, tmp_path / "adapter")
    whole = host.model_class.from_pretrained(tmp_path / "whole")
    for other in (again, whole):
        assert {k for k, v in other.state_dict().items() if not v.equal(model.state_dict()[k])} == set()
    assert unload_bt_adapter(again) is native
    assert_as_before(native, before)
    # a model that was never native
    plain = unload_bt_adapter(whole)
    assert type(plain) is host.native_class
    assert torch.equal(plain(**host.inputs(False)).logits, whole(**host.inputs(False)).logits)
    plain.save_pretrained(tmp_path / "plain")
    loaded = host.native_class.from_pretrained(tmp_path / "plain")
    assert {k for k, v in loaded.state_dict().items() if not v.equal(plain.state_dict()[k])} == set()


@torch.no_grad()
def test_another_adapter_replaces_the_branch(host, tmp_path):
    model = get_bt_adapter_model(host.load(), adapter_layers=host.layers)
    tower = find_tower(model)
    assert load_bt_adapter(model, host.adapter) is model and find_tower(model) is tower
    assert torch.equal(model(**host.inputs()).logits, host.ours()(**host.inputs()).logits)
    other = get_bt_adapter_model(host.load(), adapter_layers=[2])
    with pytest.raises(AdapterError, match=r"the model's by \[2\]"):
        load_bt_adapter(other, host.adapter)


def test_new_tokens_and_merged_parts_outlive_unloading(host):
    native = host.load()
    model = load_bt_adapter(native, host.adapter)
    model.resize_token_embeddings(40)
    assert unload_bt_adapter(model) is native
    assert native.get_input_embeddings().num_embeddings == 40 and native.get_output_embeddings().out_features == 40


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(host, model, message, error=AdapterError, **options):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_bt_adapter(model, options.pop("adapter", host.adapter), **options)
    assert_as_before(model, before)


def test_what_does_not_fit_is_refused_before_anything_changes(host, tmp_path):
    other = host.load()
    with torch.no_grad():
        for parameter in find_tower(other).parameters():
            parameter.copy_(torch.randn_like(parameter))
    refused(host, other, "not those that .* was trained on")
    assert type(load_bt_adapter(other, host.adapter, allow_backbone_mismatch=True)) is host.model_class
    refused(host, host.load(), r"\[2, 3\] is no start", adapter_layers=[2, 3])
    if host.name == "llava":
        refused(host, host.load(), "goes beyond layer 3", adapter_layers=[1, 2, 3, 4])
        with pytest.raises(ValueError, match="goes beyond layer 3"):
            get_bt_adapter_model(host.load(), adapter_layers=[4])
    tuned = host.ours()
    save_bt_adapter(tuned, tmp_path, extra_modules=[host.projector])
    native = host.load()
    native.set_submodule(host.projector, torch.nn.Linear(3, 3))
    refused(host, native, "trained modules that do not fit", adapter=tmp_path)
    with pytest.raises(ValueError, match="has no BT-Adapter to unload"):
        unload_bt_adapter(host.load())


def test_hosts_of_other_kinds_are_refused(host):
    with pytest.raises(ValueError, match="cannot be attached to a"):
        load_bt_adapter(type("Another", (host.native_class,), {})(host.load().config), host.adapter)


def test_blip2_with_an_encoder_and_decoder_is_refused():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 32}
    native = tiny_hosts._blip(
        Blip2ForConditionalGeneration,
        tiny_hosts.Blip2Config,
        tiny_hosts.Blip2VisionConfig,
        T5Config(**sizes, decoder_start_token_id=0),
    )
    with pytest.raises(ValueError, match="a decoder such as Llama; this one has a t5"):
        get_bt_adapter_model(native)


# ---------------------------------------------------------------------------------------------------------- accelerate


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The following device_map keys")  # of accelerate, about a bare parameter
def test_a_dispatched_model(host, tmp_path):
    """The language model on the disk, where the model of ours needs the hook of the native one at its root."""
    parts = [name for name, _ in host.load().named_children()]
    if host.name == "llava":
        parts = ["model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"]
    else:
        parts.append("query_tokens")
    device_map = {part: "disk" if "language_model" in part else "cpu" for part in parts}
    native = host.load(device_map=device_map, offload_folder=tmp_path)
    before, logits = snapshot(native), native(**host.inputs(False)).logits
    model = load_bt_adapter(native, host.adapter)
    assert any(p.is_meta for p in model.parameters())
    assert not any(p.is_meta for p in find_tower(model).bt_adapter.parameters())
    assert model.hf_device_map == device_map and model._hf_hook.io_same_device
    assert torch.equal(model(**host.inputs(False)).logits, logits)
    expected = host.ours()
    torch.testing.assert_close(model(**host.inputs()).logits, expected(**host.inputs()).logits)
    assert torch.equal(generate(model, **host.inputs()), generate(expected, **host.inputs()))
    assert unload_bt_adapter(model) is native
    assert_as_before(native, before)
    assert torch.equal(native(**host.inputs(False)).logits, logits)


@torch.no_grad()
def test_an_offloaded_model(host, tmp_path):
    """All parameters wait in CPU memory, the vision model's too."""
    native = host.load()
    accelerate.cpu_offload(native, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in native.parameters())
    before = snapshot(native)
    with pytest.raises(ValueError, match="offloaded"):
        get_bt_adapter_model(native)
    if host.name != "llava":  # the EVA towers' position embeddings are no module that could fetch them
        refused(host, native, "position embeddings .* are offloaded", ValueError)
        return
    model = load_bt_adapter(native, host.adapter)
    assert not any(p.is_meta for p in find_tower(model).bt_adapter.parameters())
    expected = host.ours()
    torch.testing.assert_close(model(**host.inputs()).logits, expected(**host.inputs()).logits)
    assert torch.equal(generate(model, **host.inputs()), generate(expected, **host.inputs()))
    # a projector that is brought along goes into the copy in CPU memory, and out of it
    tiny_hosts.stir(expected.get_submodule(host.projector))
    save_bt_adapter(expected, tmp_path, extra_modules=[host.projector])
    assert unload_bt_adapter(model) is native
    model = load_bt_adapter(native, tmp_path)
    torch.testing.assert_close(model(**host.inputs()).logits, expected(**host.inputs()).logits)
    save_bt_adapter(model, tmp_path / "again", extra_modules=[host.projector])
    first, second = ((tmp_path / name / "bt_adapter.safetensors").read_bytes() for name in (".", "again"))
    assert first == second
    assert unload_bt_adapter(model) is native
    assert_as_before(native, before)
    images_only = host.inputs(False)
    assert torch.equal(native(**images_only).logits, host.load()(**images_only).logits)


@torch.no_grad()
@pytest.mark.parametrize("host", ["llava"], indirect=True)
def test_a_model_offloaded_after_attaching(host):
    model = load_bt_adapter(host.load(), host.adapter)
    expected = model(**host.inputs()).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model(**host.inputs()).logits, expected)


# ---------------------------------------------------------------------------------------------------------------- peft


LORA = {"r": 2, "target_modules": r".*language_model.*\.(q_proj|v_proj)", "init_lora_weights": False}


@torch.no_grad()
def test_a_model_that_peft_wrapped_before(host, tmp_path):
    native = host.load()
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(native, peft.LoraConfig(**LORA))
    before, logits = snapshot(native), wrapped(**host.inputs(False)).logits
    assert load_bt_adapter(wrapped, host.adapter) is wrapped
    model = wrapped.get_base_model()
    assert type(model) is host.model_class
    assert torch.equal(wrapped(**host.inputs(False)).logits, logits)
    assert not torch.equal(logits, host.load()(**host.inputs(False)).logits)
    with_lora = wrapped(**host.inputs()).logits
    assert wrapped.generate(**host.inputs(), max_new_tokens=2, min_new_tokens=2) is not None
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(**host.inputs()).logits, host.ours()(**host.inputs()).logits)
    wrapped.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(host.ours(), tmp_path / "lora")
    assert torch.equal(again(**host.inputs()).logits, with_lora)
    save_bt_adapter(wrapped, tmp_path / "adapter")
    name = "bt_adapter.safetensors"
    assert load_bt_adapter(host.load(), tmp_path / "adapter") and (tmp_path / "adapter" / name).is_file()
    assert unload_bt_adapter(wrapped) is wrapped and wrapped.get_base_model() is native
    assert_as_before(native, before)
    assert torch.equal(wrapped(**host.inputs(False)).logits, logits)


@torch.no_grad()
def test_a_causal_lm_wrapper_of_peft_generates_with_the_new_model(host):
    wrapped = peft.get_peft_model(host.load(), peft.LoraConfig(**LORA, task_type="CAUSAL_LM"))
    inputs = host.inputs()
    wrapped.generate(**host.inputs(False), max_new_tokens=2)  # peft keeps a method of the model then
    get_bt_adapter_model(wrapped)
    load_bt_adapter(unload_bt_adapter(wrapped), host.adapter)
    answer = generate(wrapped, **inputs)
    assert torch.equal(answer, generate(wrapped.merge_and_unload(), **inputs))


@torch.no_grad()
def test_peft_after_attaching_and_unloading_what_it_trained(host):
    native = host.load()
    model = load_bt_adapter(native, host.adapter)
    modules = ["bt_adapter", host.projector.rpartition(".")[2]]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA, modules_to_save=modules))
    inner = wrapped.get_base_model()
    tiny_hosts.stir(find_tower(inner).bt_adapter.modules_to_save["default"])
    tiny_hosts.stir(inner.get_submodule(host.projector).modules_to_save["default"])
    with pytest.raises(AdapterError, match="wrapped by peft"):
        load_bt_adapter(wrapped, host.adapter)
    logits = wrapped(**host.inputs(False)).logits
    merged = copy.deepcopy(wrapped).merge_and_unload()
    torch.testing.assert_close(merged(**host.inputs(False)).logits, logits)
    assert unload_bt_adapter(wrapped).get_base_model() is native
    assert torch.equal(wrapped(**host.inputs(False)).logits, logits)  # LoRA and the trained projector stay


def test_a_vision_model_with_lora_in_it(host, tmp_path):
    native = host.load()
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "qkv"])
    wrapped = peft.get_peft_model(native, lora)
    with pytest.raises(ValueError, match="peft has put adapters into these"):
        get_bt_adapter_model(wrapped)
    assert load_bt_adapter(wrapped, host.adapter) is wrapped  # nothing of the branch is copied
    assert unload_bt_adapter(wrapped).get_base_model() is native
    whole = load_bt_adapter(host.load(), host.adapter)
    plain = unload_bt_adapter(peft.get_peft_model(whole, lora).get_base_model())
    frozen = {name for name, p in find_tower(plain).named_parameters() if not p.requires_grad}
    assert not frozen  # as before the adapter
    in_branch = peft.get_peft_model(host.ours(), lora)
    with pytest.raises(ValueError, match="LoRA into the branch"):
        save_bt_adapter(in_branch, tmp_path)
