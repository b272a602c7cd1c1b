"""The examples run as their headers say."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel, LlavaForConditionalGeneration

from bt_adapter_hf.assets import default_model_path
from bt_adapter_hf.cli.main import build_parser
from bt_adapter_hf.data.instructions import load_instructions
from bt_adapter_hf.data.moving_digits import write_clips


EXAMPLES = Path(__file__).parents[2] / "examples"


def test_text_video_similarity_prefers_the_right_direction(tmp_path):
    pytest.importorskip("sklearn")
    assert default_model_path()
    write_clips(tmp_path, "test", 2, seed=5, formats=("mp4",))  # a red zero from left to right, and back
    clips = sorted(str(path) for path in tmp_path.glob("*.mp4"))
    texts = [f"a red zero moves from the {a} to the {b}" for a, b in (("left", "right"), ("right", "left"))]
    command = [sys.executable, str(EXAMPLES / "text_video_similarity.py"), *clips, "--texts", *texts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    values = [float(line.split()[0]) for line in lines]
    assert len(lines) == 4 and values[0] > values[1] and values[3] > values[2]
    assert all(clip in line for clip, line in zip([clips[0]] * 2 + [clips[1]] * 2, lines, strict=True))


def test_the_clip_l14_recipe_runs_its_command(tmp_path):
    from transformers import CLIPModel

    from tests import tiny_pairs

    processor = tiny_pairs.processor()
    CLIPModel(tiny_pairs.clip_config()).save_pretrained(tmp_path / "clip")
    processor.image_processor.save_pretrained(tmp_path / "clip")
    processor.tokenizer.save_pretrained(tmp_path / "clip")
    for name, rows in (("train", 8), ("val", 4)):
        tiny_pairs.write_table(tmp_path / name, rows)
    script = EXAMPLES.parent / "recipes" / "clip_l14" / "pretrain.sh"
    small = "--batch-size 4 --workers 0 --num-adapter-layers 2 --max-text-length 20 --set use_cpu=true".split()
    environment = {**os.environ, "LAUNCH": sys.executable}
    done = subprocess.run(
        ["bash", str(script), "train", "val", "out", "clip", *small],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_small_models_are_native_and_the_readme_goes_on_from_them(tmp_path, monkeypatch):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "a red seven moves"}\n')
    monkeypatch.setattr(sys, "argv", ["small_models.py", str(tmp_path / "small"), "--clips", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "small_models.py"), run_name="__main__")
    clip, llava = CLIPModel.from_pretrained(tmp_path / "small/clip"), tmp_path / "small/llava"
    native = LlavaForConditionalGeneration.from_pretrained(llava)
    for name, tensor in native.model.vision_tower.state_dict().items():  # one tower: the adapter of one fits the other
        assert torch.equal(tensor, clip.vision_model.state_dict()[name])
    (table,) = [load_instructions(tmp_path / "small/chats.jsonl")]
    assert table.messages(0)[1]["content"] == [{"type": "text", "text": "a red seven moves"}]
    readme = (EXAMPLES.parent / "README.md").read_text()
    (block,) = re.findall(r"```bash\npython examples/small_models.py small.*?\n(.*?)```", readme, re.DOTALL)
    commands = [shlex.split(line, comments=True)[1:] for line in block.replace("\\\n", " ").splitlines()]
    assert [build_parser().parse_args(command).command for command in commands] == ["pretrain", "finetune", "chat"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) < 100
