"""Two processes under `accelerate launch` against one process with the same global batch, on the CPU."""

import importlib.util
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from safetensors.torch import load_file

from bt_adapter_hf.training.arguments import BTAdapterTrainingArguments
from bt_adapter_hf.training.sharding import check_sharding
from bt_adapter_hf.training.trainer import BTAdapterTrainer
from tests import tiny_pairs
from tests.training.run_pretraining import ROOT, launch, run


LOSSES = ("loss", "vtc_loss", "mbta_loss", "mbca_loss", "grad_norm", "learning_rate", "step")
RECALL = ("eval_t2v_R1", "eval_reversed_t2v_R1", "eval_frame_average_t2v_R1", "eval_v2t_MnR", "eval_t2v_MnR")
CONFIGS = sorted((ROOT / "examples" / "accelerate_configs").glob("*.yaml"))

needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")
ALL = [pytest.param("ddp"), pytest.param("fsdp2"), pytest.param("deepspeed_zero2", marks=needs_deepspeed)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """18 clips, of which one is broken."""
    folder = tiny_pairs.write_table(tmp_path_factory.mktemp("processes") / "clips", rows=18).parent
    (folder / "clip6.mp4").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def alone(clips, tmp_path_factory):
    """Folder of the run of one process, with batches of 8."""
    folder = tmp_path_factory.mktemp("alone")
    run(clips, folder, batch=8)
    return folder


def values(history, *names):
    return [tuple(entry[name] for name in names) for entry in history if names[0] in entry]


def assert_same_training(log, folder, alone):
    expected = json.loads((alone / "log.json").read_text())["history"]
    one, two = values(expected, *LOSSES), values(log["history"], *LOSSES)
    assert len(one) == 5
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    (one,), (two,) = (values(history, *RECALL, "eval_pairs") for history in (expected, log["history"]))
    assert two == pytest.approx(one, rel=1e-6) and two[-1] == 17
    assert_same_parameters(folder / "final" / "model.safetensors", alone / "final" / "model.safetensors", 1e-3)
    assert_same_features(folder, alone)


def assert_same_features(folder, alone):
    """Each clip once, with its own features, whatever the number of processes they were gathered from."""
    one, two = np.load(alone / "features.npz"), np.load(folder / "features.npz")
    assert one.keys() == two.keys() >= {"ids", "text", "video", "reversed", "frame_average"}
    places = []
    for found in (one, two):
        ids = found["ids"].tolist()
        assert sorted(ids) == [-1, *(row for row in range(18) if row != 6)]  # -1: another clip for the broken one
        places.append([ids.index(row) for row in sorted(ids)[1:]])
    for name in one.keys() - {"ids"}:
        a, b = (found[name][rows] for found, rows in zip((one, two), places, strict=True))
        assert np.abs(a - b).max() <= 1e-3 * np.abs(a).max(), name
        assert np.abs(np.diff(a, axis=0)).max() > 1e-2 * np.abs(a).max(), name  # the clips are told apart


def assert_same_parameters(found, expected, relative):
    found, expected = load_file(found), load_file(expected)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if not name.endswith("k_proj.bias"):  # its gradient is rounding alone, of which Adam makes whole steps
            assert (tensor - expected[name]).norm() <= relative * expected[name].norm(), name


def test_two_processes_learn_what_one_does(clips, alone, tmp_path):
    log = launch("ddp", 2, clips, tmp_path / "out", batch=4)
    assert log["distributed"] == "DistributedType.MULTI_CPU"
    assert_same_training(log, tmp_path / "out", alone)
    lines = [line for path in (tmp_path / "out").glob("broken_items*.jsonl") for line in path.open()]
    assert {json.loads(line)["index"] for line in lines} == {6}


def test_fsdp2_learns_what_one_process_does(clips, alone, tmp_path):
    log = launch("fsdp2", 2, clips, tmp_path / "out", batch=4)
    assert log["distributed"] == "DistributedType.FSDP" and log["parameters"] == ["DTensor"]
    assert_same_training(log, tmp_path / "out", alone)
    config = json.loads((tmp_path / "out" / "final" / "config.json").read_text())
    assert config["architectures"] == ["BTAdapterForPreTraining"]
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert not list(checkpoint.glob("*model*"))
    trained = {name for name, p in tiny_pairs.model().named_parameters() if p.requires_grad}
    assert load_file(checkpoint / "trained.safetensors").keys() == trained


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_learns_what_one_process_does(clips, alone, tmp_path):
    log = launch("deepspeed_zero2", 2, clips, tmp_path / "out", batch=4)
    assert log["distributed"] == "DistributedType.DEEPSPEED"
    assert_same_training(log, tmp_path / "out", alone)


@pytest.mark.slow
@pytest.mark.parametrize("config", ALL)
def test_resumed_where_it_was(config, clips, tmp_path):
    whole = launch(config, 2, clips, tmp_path / "out", batch=4)
    (tmp_path / "out" / "checkpoint-5").rename(tmp_path / "last")
    resumed = launch(config, 2, clips, tmp_path / "out", batch=4, resume=True)
    assert values(resumed["history"], *LOSSES) == values(whole["history"], *LOSSES)
    assert values(resumed["history"], *RECALL) == values(whole["history"], *RECALL)
    name = "trained.safetensors"
    assert_same_parameters(tmp_path / "out" / "checkpoint-5" / name, tmp_path / "last" / name, 0)


@pytest.mark.slow
@pytest.mark.parametrize("config", ALL)
def test_cached_gradients_and_accumulation(config, clips, tmp_path):
    """Two accumulated batches of 4 over two processes, 2 clips at a time: the steps of two batches of 8 in one."""
    options = {"gradient_accumulation_steps": 2, "max_steps": 3}
    run(clips, tmp_path / "alone", batch=8, **options)
    expected = json.loads((tmp_path / "alone" / "log.json").read_text())
    log = launch(config, 2, clips, tmp_path / "out", batch=4, cached_gradient_batch_size=2, **options)
    for a, b in zip(values(expected["history"], *LOSSES), values(log["history"], *LOSSES), strict=True):
        assert b == pytest.approx(a, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_half_precision_with_checkpointed_activations(config, clips, alone, tmp_path):
    log = launch(config, 2, clips, tmp_path / "out", batch=4, bf16=True, activation_checkpointing=True)
    expected = json.loads((alone / "log.json").read_text())["history"]
    for (a,), (b,) in zip(values(expected, "mbta_loss"), values(log["history"], "mbta_loss"), strict=True):
        assert b == pytest.approx(a, rel=0.02) and b != a
    for (a,), (b,) in zip(values(expected, "loss"), values(log["history"], "loss"), strict=True):
        assert b == pytest.approx(a, rel=0.2)
    saved = load_file(tmp_path / "out" / "checkpoint-3" / "trained.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


# What is refused


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"fsdp_version": 1}, "leaves no learning rates per part"),
        ({"cpu_ram_efficient_loading": True}, "leaves the model empty on all processes but the first"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "would be read back by unpickling"),
    ],
)
def test_fsdp_that_cannot_work(fields, message, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin writes it
    plugin = FullyShardedDataParallelPlugin(
        **{"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False, **fields}
    )
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator.state, "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ValueError, match=message):
        check_sharding(accelerator, tiny_pairs.model())


def test_fsdp_where_accelerate_leaves_it_out(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = BTAdapterTrainingArguments(output_dir=tmp_path, use_cpu=True)
    with pytest.raises(ValueError, match="asks for FSDP, which accelerate offers on several accelerators only"):
        BTAdapterTrainer(model=tiny_pairs.model(), args=args)


def test_zero3_is_refused():
    state = SimpleNamespace(deepspeed_plugin=DeepSpeedPlugin(zero_stage=3))
    with pytest.raises(ValueError, match="zero_stage=3 shards the parameters themselves"):
        check_sharding(SimpleNamespace(state=state), tiny_pairs.model())


def test_another_launchers_checkpoint(clips, alone, tmp_path):
    """Without the optimizer's state a run would go on from nothing."""
    shutil.copytree(alone / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "optimizer.pt").rename(tmp_path / "checkpoint-3" / "optimizer.bin")
    with pytest.raises(ValueError, match="holds no optimizer.pt.*Resume with the launcher that wrote the checkpoint"):
        run(clips, tmp_path, batch=8, resume=True)


# The configs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_what_accelerate_reads(path):
    config = load_config_from_file(str(path))
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}[path.stem]
    assert config.distributed_type == expected and config.num_processes == 8
    text = path.read_text()
    assert f"--config_file examples/accelerate_configs/{path.name}" in text
    assert yaml.safe_load(text)["mixed_precision"] == "no"  # precision is an option of the command


def test_deepspeed_config_makes_a_plugin():
    config = load_config_from_file(str(ROOT / "examples" / "accelerate_configs" / "deepspeed_zero2.yaml"))
    plugin = DeepSpeedPlugin(
        zero_stage=config.deepspeed_config["zero_stage"],
        offload_optimizer_device=config.deepspeed_config["offload_optimizer_device"],
        offload_param_device=config.deepspeed_config["offload_param_device"],
        zero3_init_flag=config.deepspeed_config["zero3_init_flag"],
    )
    assert plugin.hf_ds_config.config["zero_optimization"]["stage"] == 2
