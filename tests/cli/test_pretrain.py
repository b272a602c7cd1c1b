import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from bt_adapter_hf import BTAdapterModel
from bt_adapter_hf.cli.main import main
from tests import tiny_pairs


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    CLIPModel(tiny_pairs.clip_config()).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size, image_mean=[0.4, 0.5, 0.6])
    CLIPProcessor(images, tiny_pairs.tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return str(tiny_pairs.write_table(tmp_path_factory.mktemp("clips"), rows=12).parent)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pretrain(clip, clips, output_dir, *options) -> int:
    argv = ["pretrain", "--model", clip, "--train", clips, "--output-dir", str(output_dir), "--batch-size", "4"]
    argv += ["--num-frames", "4", "--num-adapter-layers", "2", "--set", "use_cpu=true", *options]
    return main(argv)


def test_from_a_clip_to_a_model_that_loads(clip, clips, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--validation", clips, "--epochs", "2", "--learning-rate", "1e-3", "--mask-ratio", "0.5"]
    options += ["--eval-controls", "reversed", "--logging-steps", "1", "--set", "warmup-steps=0.5"]
    assert pretrain(clip, clips, out, *options) == 0
    assert "recall over 12 validation pairs" in capsys.readouterr().out
    summary = json.loads((out / "pretrain_summary.json").read_text())
    assert summary["steps"] == 6 and summary["data"]["train"]["rows"] == 12
    assert summary["config"]["mask_ratio"] == 0.5 and summary["config"]["adapter_layers"] == [1, 2]
    assert summary["training"]["warmup_steps"] == 0.5 and summary["training"]["weight_decay"] == 0.05
    assert "eval_reversed_t2v_R1" in summary["metrics"] and "eval_shuffled_t2v_R1" not in summary["metrics"]
    model, processor = AutoModel.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert isinstance(model, BTAdapterModel) and processor.video_processor.num_frames == 4
    assert tuple(processor.video_processor.image_mean) == (0.4, 0.5, 0.6)
    inputs = processor(videos=[str(Path(clips) / "clip0.mp4")], return_tensors="pt")
    assert inputs["pixel_values_videos"].shape == (1, 4, 3, 16, 16)
    assert model.get_video_features(**inputs).pooler_output.shape == (1, 12)
    base = CLIPModel.from_pretrained(clip).state_dict()
    assert all(torch.equal(base[name], model.state_dict()[name]) for name in base if name.startswith("text_model."))


def test_resume_and_continue_from_a_finished_model(clip, clips, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--max-steps", "4", "--save-steps", "3", "--learning-rate", "1e-3", "--logging-steps", "1"]
    assert pretrain(clip, clips, out, *options) == 0
    expected = AutoModel.from_pretrained(out).state_dict()
    assert pretrain(clip, clips, out, *options) == 1
    assert "holds checkpoints of an earlier run: add --resume" in capsys.readouterr().err
    shutil.rmtree(out / "checkpoint-4")
    (out / "model.safetensors").unlink()
    assert pretrain(clip, clips, out, *options, "--resume") == 0
    found = AutoModel.from_pretrained(out).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    argv = ["pretrain", "--model", str(out), "--train", clips, "--output-dir", str(tmp_path / "next")]
    assert main([*argv, "--batch-size", "4", "--max-steps", "1", "--set", "use_cpu=true"]) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (["--resume"], "holds no complete checkpoint"),
        (["--text-column", "words"], "no text column: looked for 'words', found file_name, text"),
        (["--mask-ratio", "1.5"], "mask_ratio=1.5 must be in [0, 1)"),
        (["--fusion", "magic"], "fusion"),
        (["--max-text-length", "99"], "the text tower takes 1 to 24 tokens"),
        (["--set", "learning_rat=1"], "Nearest: learning_rate"),
        (["--set", "max_grad_norm"], "expected NAME=VALUE"),
        (["--set", "max_grad_norm=much"], "invalid float value: 'much'"),
        (["--eval-steps", "5"], "needs --validation"),
        (["--eval-controls", "blind"], "Unknown controls"),
        (["--batch-size", "50"], "An epoch yields no batch"),
        (["--num-frames", "0"], "num_frames=0"),
        (["--crop-scale", "0.5", "3"], "0 < smallest"),
        (["--validation", "absent.csv"], "Cannot read the table absent.csv"),
    ],
)
def test_bad_input_is_one_clear_line(options, message, clip, clips, tmp_path, capsys):
    assert pretrain(clip, clips, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bt-adapter pretrain: error: ") and message in error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_bad_places(clip, clips, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert pretrain(clip, clips, tmp_path / "file") == 1
    assert "file" in capsys.readouterr().err
    assert pretrain(str(tmp_path / "absent"), clips, tmp_path / "out") == 1
    assert "absent" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        pretrain(clip, clips, tmp_path / "out", "--num-adapter-layers", "2", "--adapter-layers", "1")


def test_too_many_adapter_layers(clip, clips, tmp_path, capsys):
    assert pretrain(clip, clips, tmp_path / "out", "--num-adapter-layers", "9") == 1
    assert "between 1 and the backbone's 3" in capsys.readouterr().err


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "example:" in text and '{"file_name": "clip1.mp4"' in text


def test_the_example_runs(clip, clips, tmp_path):
    example = Path(__file__).parents[2] / "examples" / "pretrain.py"
    assert len(example.read_text().splitlines()) < 100
    command = [sys.executable, str(example), "--model", clip, "--train", clips, "--validation", clips]
    command += ["--output-dir", str(tmp_path / "out"), "--batch-size", "4", "--workers", "0"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    assert "shuffled_t2v_R1" in result.stdout and AutoModel.from_pretrained(tmp_path / "out").config.mask_ratio == 0.7
