"""`bt-adapter finetune` from a native model and a table to a model that answers."""

import argparse
import json
import shutil
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlamaConfig

from bt_adapter_hf import BTAdapterLlavaForConditionalGeneration, BTAdapterLlavaProcessor, load_bt_adapter
from bt_adapter_hf.adapters.host_modules import find_tower
from bt_adapter_hf.cli.finetune import load_model
from bt_adapter_hf.cli.main import main
from tests import tiny_instructions
from tests.chat import tiny_hosts
from tests.tiny_instructions import Host


# peft asks transformers by names that the latter deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return Host("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return tiny_instructions.write_table(tmp_path_factory.mktemp("clips"))


def finetune(host, table, output_dir, *options) -> int:
    argv = ["finetune", "--model", str(host.native), "--bt-adapter", str(host.adapter), "--train", str(table)]
    argv += ["--output-dir", str(output_dir), "--batch-size", "2", "--num-frames", "4", "--logging-steps", "1"]
    return main([*argv, "--set", "use_cpu=true", *map(str, options)])


def answer(capsys, *argv) -> str:
    capsys.readouterr()
    argv = ["chat", *map(str, argv), "-q", "what happens ?", "--max-new-tokens", "4", "--device", "cpu", "--json"]
    assert main(argv) == 0
    return json.loads(capsys.readouterr().out)["answers"][0]["answer"]


def test_from_a_native_model_to_one_that_answers(llava, table, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--validation", table, "--epochs", 1, "--learning-rate", "1e-3", "--set", "warmup-steps=0.5"]
    assert finetune(llava, table, out, *options) == 0
    told = capsys.readouterr().out
    assert "validation loss" in told and f"bt-adapter chat VIDEO --model {out}" in told
    summary = json.loads((out / "run_summary.json").read_text())
    assert (summary["kind"], summary["steps"], summary["finished"]) == ("instruction tuning", 4, True)
    assert summary["data"]["train"]["rows"] == 8 and summary["data"]["num_frames"] == 4
    assert "eval_loss" in summary["metrics"] and (out / "losses.png").stat().st_size > 1000
    processor = BTAdapterLlavaProcessor.from_pretrained(out)
    assert processor.video_processor.num_frames == 4
    assert isinstance(answer(capsys, table.parent / "clip0.mp4", "--model", out), str)


def test_lora_and_the_adapter_alone_are_plugged_into_the_base(llava, table, tmp_path, capsys):
    clip, base = table.parent / "clip0.mp4", ["--model", llava.native]
    for name, options in (("lora", ["--lora", "--lora-r", 2]), ("adapter", ["--adapter-only"])):
        out = tmp_path / name
        assert finetune(llava, table, out, "--max-steps", 2, *options) == 0
        assert f"--model {llava.native} --bt-adapter {out}" in capsys.readouterr().out
        assert not (out / "model.safetensors").exists()
        assert isinstance(answer(capsys, clip, *base, "--bt-adapter", out), str)
    # how many frames were trained is known once training begins, after peft's config is made
    tuned = load_bt_adapter(AutoModelForImageTextToText.from_pretrained(llava.native), tmp_path / "lora")
    assert find_tower(tuned).config.num_trained_frames == 4
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = BTAdapterLlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert merged.config.vision_config.num_trained_frames == 4
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 32)
    assert json.loads((tmp_path / "lora" / "run_summary.json").read_text())["config"]["lora"]["r"] == 2


def test_qlora_from_start_to_answer(table, tmp_path, monkeypatch, capsys):
    """Real 4-bit layers on the CPU: trained, resumed bit for bit, and plugged into the base as it is."""
    pytest.importorskip("bitsandbytes")
    # wide enough for bitsandbytes' blocks of 64 weights
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    text = {**tiny_hosts.text_config().to_dict(), **wide, "num_key_value_heads": 4, "head_dim": 16}
    monkeypatch.setattr(tiny_hosts, "SIZES", {**tiny_hosts.SIZES, **wide})
    monkeypatch.setattr(tiny_hosts, "text_config", lambda: LlamaConfig(**text))
    host, out = Host("llava", tmp_path / "llava"), tmp_path / "out"
    options = ["--lora", "--load-in-4bit", "--max-steps", 4, "--save-steps", 2, "--learning-rate", "1e-2"]
    assert finetune(host, table, out, *options) == 0
    expected = load_file(out / "adapter_model.safetensors")
    assert not any("base_layer" in key for key in expected) and any(".bt_adapter." in key for key in expected)
    assert json.loads((out / "run_summary.json").read_text())["config"]["load_in_4bit"] is True
    shutil.rmtree(out / "checkpoint-4")
    (out / "adapter_model.safetensors").unlink()
    assert finetune(host, table, out, *options, "--resume") == 0
    found = load_file(out / "adapter_model.safetensors")
    assert found.keys() == expected.keys() and all(expected[key].equal(found[key]) for key in expected)
    clip = table.parent / "clip0.mp4"
    assert isinstance(answer(capsys, clip, "--model", host.native, "--bt-adapter", out), str)


def test_a_fresh_branch_is_told_unless_a_checkpoint_brings_it(llava, caplog):
    args = argparse.Namespace(
        model=str(llava.native), revision=None, bt_adapter=None, num_frames=None, on_damage=None, load_in_4bit=False
    )
    for resumed in (False, True, False):
        caplog.clear()
        load_model(args, argparse.Namespace(bf16=False, device="cpu"), resumed)
        assert ("newly initialised" in caplog.text) is not resumed


def test_a_model_with_a_branch_takes_no_adapter(llava, tmp_path, capsys):
    """Told before tables and weights are read: there are none."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bt_adapter_llava"}')
    argv = ["finetune", "--model", folder, "--bt-adapter", llava.adapter, "--train", "absent.jsonl"]
    assert main([*map(str, argv), "--output-dir", str(tmp_path / "a" / "out")]) == 1
    assert capsys.readouterr().err == (
        f"bt-adapter finetune: error: '{folder}' has an adapter in: leave out --bt-adapter, or name the native model "
        "with --model.\n"
    )
    assert not (tmp_path / "a").exists()


def test_states_are_computed_once(llava, table, tmp_path, capsys):
    states, weights = tmp_path / "states", {}
    for name, options in (("plain", []), ("cached", ["--cache-states", states, "--cache-dtype", "fp32"])):
        assert finetune(llava, table, tmp_path / name, "--max-steps", 3, "--learning-rate", "1e-3", *options) == 0
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    assert "8 videos to encode" in capsys.readouterr().out
    for key, value in weights["plain"].items():
        assert value.allclose(weights["cached"][key], rtol=1e-3, atol=1e-4), key
    assert finetune(llava, table, tmp_path / "again", "--max-steps", 1, *options, "--json") == 0
    said = capsys.readouterr()  # with --json nothing else is on stdout
    assert json.loads(said.out)["steps"] == 1 and "; 0 videos to encode" in said.err
    assert finetune(llava, table, tmp_path / "other", "--max-steps", 1, *options, "--num-frames", 2) == 1
    assert "num-frames 4, here 2" in capsys.readouterr().err


def test_resume(llava, table, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--max-steps", 4, "--save-steps", 2, "--learning-rate", "1e-3"]
    assert finetune(llava, table, out, *options) == 0
    expected = load_file(out / "model.safetensors")
    assert finetune(llava, table, out, *options) == 1
    assert "holds checkpoints of an earlier run: add --resume" in capsys.readouterr().err
    shutil.rmtree(out / "checkpoint-4")
    (out / "model.safetensors").unlink()
    assert finetune(llava, table, out, *options, "--resume") == 0
    found = load_file(out / "model.safetensors")
    assert all(expected[key].equal(found[key]) for key in expected)
    # the result is a starting point too
    argv = ["finetune", "--model", str(out), "--train", str(table), "--output-dir", str(tmp_path / "next")]
    assert main([*argv, "--batch-size", "2", "--max-steps", "1", "--set", "use_cpu=true"]) == 0
    assert BTAdapterLlavaForConditionalGeneration.from_pretrained(tmp_path / "next")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--resume"], "holds no complete checkpoint"),
        (["--load-in-4bit"], "takes LoRA; add --lora"),
        (["--lora", "--adapter-only"], "would leave LoRA out"),
        (["--validation", "absent.jsonl"], "Cannot read the table absent.jsonl"),
        (["--train", "table.txt"], "is a .jsonl or a .json file"),
        (["--set", "learning_rat=1"], "Nearest: learning_rate"),
        (["--eval-steps", "5"], "needs --validation"),
        (["--batch-size", "50"], "fewer than one batch"),
        (["--bt-adapter", "/nowhere/at/all"], "nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(options, message, llava, table, tmp_path, capsys):
    assert finetune(llava, table, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bt-adapter finetune: error: ") and message in error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_another_kind_of_model(tiny_checkpoint, table, tmp_path, capsys):
    argv = ["finetune", "--model", str(tiny_checkpoint), "--train", str(table), "--output-dir", str(tmp_path)]
    assert main(argv) == 1
    assert "holds a dual encoder of type 'bt_adapter'; expected a chat model, of type llava" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_and_resumed_on_two_processes_with_states(llava, table, tmp_path):
    """SIGKILL in the middle, with loader workers: the same model as of a run that was left alone."""

    def start(out, *options, processes=1):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        argv = [sys.executable, *(launch if processes > 1 else []), "-m", "bt_adapter_hf.cli.main", "finetune"]
        argv += ["--model", llava.native, "--bt-adapter", llava.adapter, "--train", table, "--output-dir", out]
        argv += ["--num-frames", 4, "--learning-rate", "1e-3", "--save-steps", 1, "--max-steps", 6, "--workers", 1]
        argv += ["--batch-size", 4 // processes, "--set", "use_cpu=true", *options]
        return subprocess.Popen(list(map(str, argv)), stderr=subprocess.PIPE, text=True)

    def finish(*args, **kwargs):
        process = start(*args, **kwargs)
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors

    finish(tmp_path / "whole")
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    killed = start(tmp_path / "killed")
    while not list((tmp_path / "killed").glob("checkpoint-2/trainer_state.json")):
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    finish(tmp_path / "killed", "--resume")
    found = load_file(tmp_path / "killed" / "model.safetensors")
    assert all(expected[key].equal(found[key]) for key in expected)

    states = ["--cache-states", tmp_path / "states", "--cache-dtype", "fp32"]
    finish(tmp_path / "two", *states, processes=2)
    assert len(list((tmp_path / "states").glob("states-*.safetensors"))) == 2
    summary = json.loads((tmp_path / "two" / "run_summary.json").read_text())
    assert (summary["processes"], summary["steps"]) == (2, 6)
    alone = json.loads((tmp_path / "whole" / "run_summary.json").read_text())
    # stochastic depth is drawn by each process for itself
    assert summary["train_loss"] == pytest.approx(alone["train_loss"], rel=0.05)
