"""Tuning on two processes of which one has only words, or only images, where the other has a video."""

import json

import pytest
from safetensors.torch import load_file

from bt_adapter_hf import load_bt_adapter
from bt_adapter_hf.adapters.host_modules import find_tower
from bt_adapter_hf.data.instructions import load_instructions
from bt_adapter_hf.training.frozen_states import build_states, plan_states
from bt_adapter_hf.training.instruction_tuning import prepare_for_tuning
from tests import tiny_instructions
from tests.tiny_instructions import Host
from tests.training.run_tuning import launch, run


# peft asks transformers by names that the latter deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
KINDS = ["video", "text", "image", "both", "text", "image"]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return Host("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return tiny_instructions.write_mixed_table(tmp_path_factory.mktemp("mixed"), KINDS)


@pytest.fixture(scope="module")
def alone(host, table, tmp_path_factory):
    """Folder of the run of one process, with batches of two."""
    folder = tmp_path_factory.mktemp("alone")
    run(host, table, folder, per_device_train_batch_size=2)
    return folder


def logged(folder):
    return [
        (entry["loss"], entry["grad_norm"])
        for entry in json.loads((folder / "log.json").read_text())["history"]
        if "loss" in entry
    ]


def assert_same(found, expected):
    assert len(found) == len(expected) == 3
    for a, b in zip(expected, found, strict=True):
        assert b == pytest.approx(a, rel=1e-5)


@pytest.mark.parametrize(
    "config, options",
    [
        ("ddp", {"activation_checkpointing": True}),
        pytest.param("ddp", {}, marks=pytest.mark.slow),
        ("fsdp2", {}),
        pytest.param("fsdp2", {"activation_checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_learn_what_one_does_from_a_mixture(config, options, host, table, alone, tmp_path):
    launch(config, 2, host, table, tmp_path / "out", **options)
    assert_same(logged(tmp_path / "out"), logged(alone))
    found, expected = (load_file(folder / "final" / "model.safetensors") for folder in (tmp_path / "out", alone))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_lora(config, checkpointing, host, table, tmp_path):
    run(host, table, tmp_path / "alone", lora=True, per_device_train_batch_size=2)
    options = {"lora": True, "activation_checkpointing": checkpointing}
    launch(config, 2, host, table, tmp_path / "out", **options)
    assert_same(logged(tmp_path / "out"), logged(tmp_path / "alone"))
    names = {path.name for path in (tmp_path / "alone" / "final").iterdir()}
    assert {path.name for path in (tmp_path / "out" / "final").iterdir()} == names
    load_bt_adapter(host.model(), tmp_path / "out" / "final")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_from_frozen_states(config, host, table, alone, tmp_path):
    model, processor = prepare_for_tuning(host.model()), host.processor()
    build_states(
        plan_states(tmp_path / "states", model, processor, load_instructions(table).videos(), "fp32"), model, processor
    )
    launch(config, 2, host, table, tmp_path / "out", states=str(tmp_path / "states"))
    assert_same(logged(tmp_path / "out"), logged(alone))


def test_the_adapter_alone_of_a_sharded_model(host, table, alone, tmp_path):
    launch("fsdp2", 2, host, table, tmp_path / "out", adapter_only=True)
    plugged = host.model_class.from_pretrained(host.native, bt_adapter=tmp_path / "out" / "final")
    whole = load_file(alone / "final" / "model.safetensors")
    prefix = next(name for name in whole if "bt_adapter.fusion_gate" in name).removesuffix("fusion_gate")
    for name, parameter in find_tower(plugged).bt_adapter.named_parameters():
        expected = whole[prefix + name]
        assert (parameter - expected).norm() <= 1e-5 * expected.norm(), name
