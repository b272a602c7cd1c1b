"""LoRA and QLoRA by peft with the branch and the projector: a step of training, saved, restored, refused."""

import json

import peft
import pytest
import torch
from packaging import version
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.integrations.peft import MIN_PEFT_VERSION

from bt_adapter_hf import get_bt_adapter_model, load_bt_adapter, lora_config, quantization_config, save_bt_adapter
from bt_adapter_hf.adapters import verbs
from bt_adapter_hf.adapters.files import AdapterError
from bt_adapter_hf.adapters.host_modules import find_tower, learning_copy
from tests.adapters.test_adapters_on_hosts import HOSTS, Host, assert_as_before, snapshot
from tests.chat import tiny_hosts


# peft asks transformers by names that the latter deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.fixture(scope="module", params=list(HOSTS))
def host(request, tmp_path_factory):
    """Wide enough for bitsandbytes' blocks."""
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    text = LlamaConfig(**{**tiny_hosts.text_config().to_dict(), **wide, "num_key_value_heads": 4, "head_dim": 16})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_hosts, "text_config", lambda: text)
        return Host(request.param, *HOSTS[request.param]).prepare(tmp_path_factory.mktemp(request.param))


def labels(inputs):
    ids = inputs["input_ids"]
    return ids.masked_fill((ids == 19) | (ids == 18) | (ids == 0), -100)


def trained(model, host, dtype=torch.float32, **fields):
    """`model` in peft's wrapper after a step, and what the step was to change."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, lora_config(model, r=2, init_lora_weights=False, **fields)).train()
    parameters = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    inputs = host.inputs(dtype=dtype)
    wrapped(**inputs, labels=labels(inputs)).loss.backward()
    assert [name for name, p in parameters.items() if p.grad is None] == []
    torch.optim.AdamW(parameters.values(), lr=1e-2).step()
    wrapped.zero_grad()
    changed = [name for name, p in parameters.items() if not p.equal(before[name])]
    assert len(changed) > 0.9 * len(parameters)  # the key biases are without effect
    return wrapped.eval(), parameters


def test_lora_learns_beside_branch_and_projector_and_nowhere_else(host):
    wrapped, parameters = trained(host.ours(), host)
    for name in parameters:
        kinds = ["lora_" in name and "language_model" in name and "lm_head" not in name]
        kinds += ["modules_to_save" in name and part in name for part in (".bt_adapter.", host.projector)]
        assert sum(kinds) == 1, name
    assert sum(".bt_adapter." in name for name in parameters) == len(
        list(find_tower(host.ours()).bt_adapter.parameters())
    )
    assert sum("lora_A" in name for name in parameters) == 2 * 7  # all linear layers of two
    two = peft.get_peft_model(host.ours(), lora_config(host.ours(), r=2, target_modules=["q_proj", "v_proj"]))
    assert sum("lora_A" in name for name, _ in two.named_parameters()) == 2 * 2


@torch.no_grad()
def test_one_save_and_one_call_to_restore(host, tmp_path):
    with torch.enable_grad():
        wrapped, parameters = trained(host.ours(), host)
    expected, images = wrapped(**host.inputs()).logits, wrapped(**host.inputs(False)).logits
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(parameters)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "bt_adapter_config.json"}

    again = load_bt_adapter(host.load(), tmp_path)
    assert isinstance(again, peft.PeftModel) and type(again.get_base_model()) is host.model_class
    assert torch.equal(again(**host.inputs()).logits, expected)
    assert torch.equal(again(**host.inputs(False)).logits, images)
    learning = {name for name, p in again.named_parameters() if p.requires_grad}
    assert learning == set(parameters)
    # what was restored is saved as whole as before
    again.save_pretrained(tmp_path / "again")
    for name in ("adapter_model.safetensors", "bt_adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    # peft's own way, on a model with a branch
    theirs = peft.PeftModel.from_pretrained(host.ours(), tmp_path)
    assert torch.equal(theirs(**host.inputs()).logits, expected)
    merged = again.merge_and_unload()
    assert type(merged) is host.model_class
    torch.testing.assert_close(merged(**host.inputs()).logits, expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = host.model_class.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(**host.inputs()).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_branch_on_other_layers_comes_back(host, tmp_path):
    """Its shape is in `bt_adapter_config.json`, not in a default."""
    model = get_bt_adapter_model(host.load(), adapter_layers=[2], max_frames=9)
    wrapped, _ = trained(model, host)
    wrapped.save_pretrained(tmp_path)
    again = load_bt_adapter(host.load(), tmp_path)
    assert find_tower(again).config.adapter_layers == [2] and find_tower(again).config.max_frames == 9
    with torch.no_grad():
        assert torch.equal(again(**host.inputs()).logits, wrapped(**host.inputs()).logits)
    save_bt_adapter(wrapped, tmp_path / "branch")
    alone = load_bt_adapter(host.load(), tmp_path / "branch")
    branch = learning_copy(find_tower(wrapped).bt_adapter)
    assert all(p.equal(branch.get_parameter(name)) for name, p in find_tower(alone).bt_adapter.named_parameters())


@pytest.mark.parametrize("bits", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_qlora(host, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    options = {"quantization_config": quantization_config(**bits), "dtype": torch.bfloat16}
    model = peft.prepare_model_for_kbit_training(host.ours(**options), use_gradient_checkpointing=False)
    kinds = {type(m).__name__ for n, m in model.named_modules() if "language_model" in n and n.endswith("q_proj")}
    assert kinds <= {"Linear4bit", "Linear8bitLt"}
    wrapped, parameters = trained(model, host)
    assert any(".bt_adapter." in name for name in parameters) and any("lora_A" in name for name in parameters)
    wrapped.save_pretrained(tmp_path)
    native = peft.prepare_model_for_kbit_training(host.load(**options), use_gradient_checkpointing=False)
    again = load_bt_adapter(native, tmp_path)
    for name, parameter in again.named_parameters():
        if parameter.requires_grad:
            assert parameter.equal(parameters[name]), name
    with torch.no_grad():
        inputs = host.inputs()
        torch.testing.assert_close(again(**inputs).logits, wrapped(**inputs).logits, atol=0.2, rtol=0.05)


def test_activation_checkpointing(host):
    """As QLoRA has it by default: inputs require gradients, and layers run twice."""
    model = host.ours()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained(model, host)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_folder_without_the_branch_is_refused(host, tmp_path):
    native = host.load()
    before = snapshot(native)
    plain = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    peft.get_peft_model(host.ours(), plain).save_pretrained(tmp_path / "lora")
    with pytest.raises(AdapterError, match="LoRA weights of peft without bt_adapter_config.json"):
        load_bt_adapter(native, tmp_path / "lora")
    wrapped, _ = trained(host.ours(), host)
    wrapped.save_pretrained(tmp_path / "whole")
    path = tmp_path / "whole" / "adapter_model.safetensors"
    state = load_file(path)
    with pytest.raises(AdapterError, match="load_bt_adapter.model, folder., which restores"):
        host.model_class.from_pretrained(host.native, bt_adapter=tmp_path / "whole")
    for part, message in ((".bt_adapter.", "holds no tensor of a branch"), ("lora_A", r"\d+ tensors differ")):
        save_file({k: v for k, v in state.items() if part not in k}, path, metadata={"format": "pt"})
        with pytest.raises(AdapterError, match=message):
            load_bt_adapter(native, tmp_path / "whole")
        assert_as_before(native, before)
        ours = get_bt_adapter_model(host.load(), adapter_layers=find_tower(wrapped).config.adapter_layers)
        untouched = snapshot(ours)
        with pytest.raises(AdapterError, match=message):
            load_bt_adapter(ours, tmp_path / "whole")
        assert_as_before(ours, untouched)
    path.unlink()
    with pytest.raises(AdapterError, match="holds no adapter_model.safetensors"):
        load_bt_adapter(native, tmp_path / "whole")
    with pytest.raises(AdapterError, match="brings LoRA along, and the model is a peft model"):
        load_bt_adapter(wrapped, tmp_path / "whole")


def put_in(model, config):
    """As `model.add_adapter(config)`, which asks for a newer peft than there is on some versions of transformers."""
    peft.inject_adapter_in_model(config, model, "default")
    model._hf_peft_config_loaded = True
    return model


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "fc1", "proj", "qkv"], "all-linear"])
def test_saving_lora_alone_is_refused(host, tmp_path, targets):
    """Ordinary targets have their names in the branch too, and LoRA beside a branch is not the branch."""
    model = put_in(host.ours(), peft.LoraConfig(r=2, target_modules=targets))
    assert any("lora_" in name and ".bt_adapter." in f".{name}" for name, _ in model.named_parameters()) or (
        host.name != "llava" and targets == ["q_proj", "v_proj"]  # the EVA towers have other names
    )
    with pytest.raises(ValueError, match=r"without the branch \(\d+ of its tensors"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_lora_with_the_branch_may_be_saved(host, tmp_path):
    model = host.ours()
    put_in(model, lora_config(model, r=2, init_lora_weights=False))
    assert model._unsaved_by_peft() == []
    if version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION):
        pytest.skip(f"transformers saves such a model from peft {MIN_PEFT_VERSION} on; this is {peft.__version__}")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = load_bt_adapter(host.load(), tmp_path)
        assert torch.equal(again(**host.inputs()).logits, model.eval()(**host.inputs()).logits)


# ------------------------------------------------------------------------------------------------- before and after


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)  # other kernels for other alignments in memory


@torch.no_grad()
def test_disabled_it_is_the_model_before_tuning(host, tmp_path, log):
    """Also after saving, on a model with and without a branch: a reference model for DPO and the like."""
    base = host.ours()
    save_bt_adapter(base, tmp_path / "branch")
    videos, images = base(**host.inputs()).logits, base(**host.inputs(False)).logits
    with torch.enable_grad():
        wrapped, _ = trained(base, host)
    expected = wrapped(**host.inputs()).logits
    wrapped.save_pretrained(tmp_path / "tuned")
    for start in (wrapped, host.load(), load_bt_adapter(host.load(), tmp_path / "branch")):
        again = start if start is wrapped else load_bt_adapter(start, tmp_path / "tuned")
        close(again.eval()(**host.inputs()).logits, expected)
        with again.disable_adapter():
            close(again(**host.inputs()).logits, videos)
            close(again(**host.inputs(False)).logits, images)
        assert (expected - videos).abs().max() > 0.01
    again.save_pretrained(tmp_path / "again")
    for name in ("adapter_model.safetensors", "bt_adapter.safetensors", "bt_adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "tuned" / name).read_bytes()
    assert not any("earlier version" in line for line in log)


@torch.no_grad()
def test_folders_of_before_have_no_branch_from_before_tuning(host, tmp_path, log):
    """A model's own branch is taken for it then; a native model has none, and the log says so."""
    base = host.ours()
    save_bt_adapter(base, tmp_path / "branch")
    videos = base(**host.inputs()).logits
    with torch.enable_grad():
        wrapped, _ = trained(base, host)
    expected = wrapped(**host.inputs()).logits
    wrapped.save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned" / "bt_adapter.safetensors").unlink()
    path = tmp_path / "tuned" / "bt_adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "extra_modules": []}))
    again = load_bt_adapter(load_bt_adapter(host.load(), tmp_path / "branch"), tmp_path / "tuned").eval()
    close(again(**host.inputs()).logits, expected)
    with again.disable_adapter():
        close(again(**host.inputs()).logits, videos)
    assert not any("earlier version" in line for line in log)
    again = load_bt_adapter(host.load(), tmp_path / "tuned").eval()
    close(again(**host.inputs()).logits, expected)
    assert any("disable_adapter() the model has the tuned branch" in line for line in log)


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr(verbs.logger, "warning", lines.append)
    return lines


def test_configs_that_make_no_sense_are_refused(host):
    with pytest.raises(ValueError, match="is no chat model with a BT-Adapter"):
        lora_config(host.load())
    with pytest.raises(ValueError, match=r"no linear layers named \['query'\]; it has \['down_proj'"):
        lora_config(host.ours(), target_modules=["q_proj", "query"])
