"""The fine-tuning examples on the chat model inside the package and a few clips, as their headers say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bt_adapter_hf.assets import default_chat_model_path
from bt_adapter_hf.cli.main import main
from bt_adapter_hf.data.moving_digits import MOTIONS, opposite, write_clips


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, "train", 12, seed=1, formats=("mp4",))
    return folder


def rows(clips):
    return [json.loads(line) for line in (clips / "metadata.jsonl").open()]


def run(example: str, *argv) -> str:
    command = [sys.executable, str(EXAMPLES / example), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_videos(clips, tmp_path, capsys):
    """Every motion by the name of its opposite: in half a minute the model says so."""
    lines = []
    for facts in rows(clips):
        question = [{"type": "video", "path": facts["file_name"]}, {"type": "text", "text": "How does it move?"}]
        answer = f"it {MOTIONS[opposite(facts['motion'])]}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    table = clips / "train.jsonl"
    table.write_text("".join(lines))
    out = run("finetune_own_videos.py", table, "--output-dir", tmp_path, "--epochs", 8, "--learning-rate", "2e-3")
    assert out.strip() == f"ask it: bt-adapter chat VIDEO --model {tmp_path}"
    for facts in rows(clips)[:2]:
        argv = ["chat", str(clips / facts["file_name"]), "--model", str(tmp_path), "-q", "How does it move?"]
        assert main([*argv, "--device", "cpu"]) == 0
        assert capsys.readouterr().out.strip() == f"it {MOTIONS[opposite(facts['motion'])]}"


def test_llava_on_video_chatgpt(clips, tmp_path):
    names = [facts["file_name"].partition(".")[0] for facts in rows(clips)]
    table = tmp_path / "VideoInstruct.json"
    table.write_text(json.dumps([{"q": "What do you see?", "a": "a red zero", "video_id": name} for name in names]))
    argv = ["--train", table, "--media-root", clips, "--output-dir", tmp_path / "out", "--epochs", 1]
    out = run("finetune_llava.py", *argv, "--batch-size", 6, "--lora", "--num-frames", 4)
    assert out.splitlines()[-1] == "2 steps, 0 rows skipped"
    assert (tmp_path / "out" / "bt_adapter_config.json").is_file()


@pytest.mark.slow
def test_the_recipe_runs_its_command(clips, tmp_path):
    """Two steps of the released settings, from what is in the package."""
    names = [facts["file_name"].partition(".")[0] for facts in rows(clips)]
    table = tmp_path / "VideoInstruct.json"
    table.write_text(json.dumps([{"q": "What do you see?", "a": "a red zero", "video_id": name} for name in names]))
    script = EXAMPLES.parent / "recipes" / "instruction_tuning" / "tune_llava.sh"
    argv = [table, clips, tmp_path / "out", default_chat_model_path(), "--max-steps", 2, "--workers", 0]
    argv += ["--num-frames", 8, "--set", "use_cpu=true", "--set", "bf16=false"]
    done = subprocess.run(
        ["bash", str(script), *map(str, argv)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "LAUNCH": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "run_summary.json").read_text())
    found = {name: summary["training"][name] for name in ("learning_rate", "num_train_epochs", "weight_decay")}
    assert found == {"learning_rate": 2e-5, "num_train_epochs": 3, "weight_decay": 0}
    assert summary["training"]["lr_multipliers"] == {"bt_adapter.fusion_gate": 0}
