import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from bt_adapter_hf import BTAdapterModel
from bt_adapter_hf.cli._training import find_checkpoint, only_run
from bt_adapter_hf.cli._training_options import size_in_bytes
from bt_adapter_hf.cli.main import main
from bt_adapter_hf.hub.dual_encoder import load_dual_encoder
from tests import tiny_pairs
from tests.hub.conftest import hf_home, hub  # noqa: F401 (fixtures)


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


def test_a_model_that_was_typed_as_a_relative_path(clip, clips, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(clip).parent)
    assert pretrain(Path(clip).name, clips, tmp_path / "out", "--max-steps", "1") == 0
    monkeypatch.chdir(tmp_path)
    assert json.loads((tmp_path / "out" / "run_summary.json").read_text())["model"] == clip
    model, _, _ = load_dual_encoder("out/adapter")
    assert isinstance(model, BTAdapterModel)


def test_from_a_clip_to_a_model_that_loads(clip, clips, tmp_path, capsys, caplog):
    out = tmp_path / "out"
    options = ["--validation", clips, "--epochs", "2", "--learning-rate", "1e-3", "--mask-ratio", "0.5"]
    options += ["--eval-controls", "reversed", "--logging-steps", "1", "--set", "warmup-steps=0.5"]
    assert pretrain(clip, clips, out, *options) == 0
    assert "recall over 12 validation pairs" in capsys.readouterr().out
    assert "newly initialised" not in caplog.text  # branch and head: what pretraining starts with
    assert Image.open(out / "losses.png").format == "PNG"
    summary = json.loads((out / "run_summary.json").read_text())
    assert summary["kind"] == "pretraining" and summary["finished"] and summary["train_loss"] > 0
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
        (["--fusion", "magic"], "fusion"),
        (["--max-text-length", "99"], "the text tower takes 1 to 24 tokens"),
        (["--set", "learning_rat=1"], "Nearest: learning_rate"),
        (["--set", "hub_tokn=hf_secret"], "--set hub_tokn: there is no such field"),  # without the token
        (["--set", "max_grad_norm"], "expected NAME=VALUE"),
        (["--set", "max_grad_norm=much"], "invalid float value: 'much'"),
        (["--eval-steps", "5"], "needs --validation"),
        (["--eval-controls", "blind"], "Unknown controls"),
        (["--batch-size", "50"], "has 12 rows, fewer than one batch"),
        (["--batch-size", "1"], "--batch-size 1 on one process leaves nothing to contrast"),
        (["--set", "output_dir=elsewhere"], "--set output_dir: that is --output-dir"),
        (["--set", 'lr_scheduler_kwargs={"a":'], "--set lr_scheduler_kwargs: the value is no JSON"),
        (["--set", "adam_epsilon=nan"], "adam_epsilon=nan must be a finite number"),
        (
            ["--lr-multipliers", '{"bt_adaptr.": 10}'],
            "'bt_adaptr.' occurs in the name of no parameter that is trained",
        ),
        (["--device", "meta"], "--device meta: there is no such device here"),
        (["--set", "per_device_train_batch_size=0"], "must be at least 1"),
        (["--device", "mps"], "--device mps: there is no such device here; there is cpu"),
        (["--device", "gpu"], "--device gpu: expected cpu, cuda"),
        (["--crop-scale", "0.5", "0.2"], "0 < smallest"),
        (["--opposites", "empty.csv"], "--opposites are read with --order-negatives reversed"),
        (["--order-negatives", "reversed", "--opposites", "absent.jsonl"], "--opposites: absent.jsonl cannot be read"),
        (["--order-negatives", "reversed", "--vtc-weight", "0"], "which --vtc-weight 0 leaves out"),
        (["--order-negatives", "reversed", "--num-frames", "1"], "the data set gives 1 per clip"),
        (["--validation", "absent.csv"], "Cannot read the table absent.csv"),
        (["--train", "empty.csv"], "The table empty.csv has no rows"),
        (["--epochs", "0.1"], "nothing would be trained"),
    ],
)
def test_bad_input_is_one_clear_line(options, message, clip, clips, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.csv").write_text("video,text\n")
    assert pretrain(clip, clips, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bt-adapter pretrain: error: ") and message in error
    assert not (tmp_path / "out").exists()  # nothing is left of what was refused


def test_a_run_that_was_killed_in_its_first_checkpoint_starts_anew(tmp_path, caplog):
    args = argparse.Namespace(output_dir=str(tmp_path / "out"), resume=True)
    with pytest.raises(ValueError, match="--resume: .*out holds no complete checkpoint"):
        find_checkpoint(args)
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)  # its weights were not finished
    assert find_checkpoint(args) is None
    assert "holds no complete checkpoint: the run starts from its beginning" in caplog.text
    args.resume = False
    assert find_checkpoint(args) is None


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_two_runs_into_one_folder(command, tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [command, "--model", str(tiny_checkpoint), "--train", "t.jsonl", "--output-dir", str(out)]
    with only_run(str(out)):
        assert main(argv) == 1
        assert capsys.readouterr().err == (
            f"bt-adapter {command}: error: another run writes to {out}: wait until it has ended, or choose another "
            "--output-dir.\n"
        )
        assert list(out.iterdir()) == [out / "run.lock"]
    assert not out.exists()
    out.mkdir()
    assert main(argv) == 1 and "another run" not in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_bad_places(clip, clips, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert pretrain(clip, clips, tmp_path / "file") == 1
    assert "file" in capsys.readouterr().err
    assert pretrain(str(tmp_path / "absent"), clips, tmp_path / "out") == 1
    assert "absent" in capsys.readouterr().err
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "config.json").write_text('{"model_type": "bt_adapter_llava"}')
    assert pretrain(str(tmp_path / "chat"), "https://127.0.0.1:9/far.csv", tmp_path / "out") == 1
    assert "a chat model with its adapter in of type 'bt_adapter_llava'" in capsys.readouterr().err  # before the table
    with pytest.raises(SystemExit):
        pretrain(clip, clips, tmp_path / "out", "--num-adapter-layers", "2", "--adapter-layers", "1")


def test_too_many_adapter_layers(clip, clips, tmp_path, capsys):
    assert pretrain(clip, clips, tmp_path / "out", "--num-adapter-layers", "9") == 1
    assert "between 1 and the backbone's 3" in capsys.readouterr().err


def test_a_model_trained_with_order_negatives_goes_on_with_them(clip, clips, tmp_path):
    opposites = tmp_path / "opposites.jsonl"
    opposites.write_text(json.dumps({"text": "a", "opposite": "b"}) + "\n")
    assert pretrain(clip, clips, tmp_path / "a", "--epochs", "1", "--order-negatives", "reversed") == 0
    options = ["--opposites", str(opposites), "--epochs", "1"]
    assert pretrain(str(tmp_path / "a"), clips, tmp_path / "b", *options) == 0
    summary = json.loads((tmp_path / "b" / "run_summary.json").read_text())
    assert summary["config"]["order_negatives"] == "reversed" and summary["data"]["opposites"] == 1


def pack(clips, path: Path, rows_per_group: int) -> str:
    """The table in `clips` as a parquet file with the bytes of the clips."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [json.loads(line) for line in (Path(clips) / "metadata.jsonl").read_text().splitlines()]
    videos = [{"bytes": (Path(clips) / line["file_name"]).read_bytes(), "path": line["file_name"]} for line in lines]
    table = pa.table({"video": videos, "text": [line["text"] for line in lines]})
    pq.write_table(table, path, row_group_size=rows_per_group)
    return str(path)


def test_packed_shards_pass_through_a_bounded_folder(clip, clips, tmp_path):
    packed, out = pack(clips, tmp_path / "clips.parquet", rows_per_group=4), tmp_path / "out"
    options = ["--train", packed, "--validation", packed, "--epochs", "2", "--max-disk", "1MB", "--chunk-rows", "4"]
    assert pretrain(clip, clips, out, *options, "--logging-steps", "1") == 0
    summary = json.loads((out / "run_summary.json").read_text())
    assert summary["steps"] == 6 and summary["data"]["train"]["source"] == packed
    assert summary["training"]["max_disk"] == 10**6 and summary["training"]["chunk_rows"] == 4
    assert summary["metrics"]["eval_pairs"] == 12 and summary["broken_items"] == {}


def test_from_a_table_on_the_hub_to_a_model_on_the_hub(hub, clip, clips, tmp_path):  # noqa: F811
    packed = pack(clips, tmp_path / "clips.parquet", rows_per_group=4)
    api = HfApi()
    api.create_repo("tester/clips", repo_type="dataset")
    api.upload_file(
        path_or_fileobj=packed, path_in_repo="data/train-00000.parquet", repo_id="tester/clips", repo_type="dataset"
    )
    out = tmp_path / "out"
    options = [
        "--train",
        "tester/clips",
        "--epochs",
        "1",
        "--logging-steps",
        "1",
        "--push-to-hub",
        "tester/pretrained",
    ]
    assert pretrain(clip, clips, out, *options) == 0
    summary = json.loads((out / "run_summary.json").read_text())
    assert summary["data"]["train"]["source"] == "tester/clips" and summary["steps"] == 3
    assert summary["data"]["train"]["revision"] == api.dataset_info("tester/clips").sha
    files = hub.files("tester/pretrained")
    published = {**summary, "model": None}  # a folder of this machine, which nobody else has
    assert json.loads(files["run_summary.json"]) == published and "losses.png" in files
    assert not any(name.startswith(("checkpoint", "chunks", "runs")) or name.endswith(".bin") for name in files)
    card = files["README.md"].decode()
    assert "tester/clips" in card
    model = AutoModel.from_pretrained("tester/pretrained")
    expected = AutoModel.from_pretrained(out).state_dict()
    assert all(torch.equal(expected[name], value) for name, value in model.state_dict().items())


def test_a_hub_that_refuses_is_known_before_training(hub, clip, clips, tmp_path, capsys):  # noqa: F811
    assert pretrain(clip, clips, tmp_path / "out", "--push-to-hub", "someone/else") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "refused access to someone/else" in error and "Nothing was trained" in error


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_no_room_for_the_rows(workers, clip, clips, tmp_path, capsys):
    packed = pack(clips, tmp_path / "clips.parquet", rows_per_group=4)
    options = ["--train", packed, "--max-disk", "1KB", "--workers", workers]
    assert pretrain(clip, clips, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bt-adapter pretrain: error: Fetching ") and "Raise --max-disk" in error


@pytest.mark.parametrize(
    "text, expected", [("20GB", 20 * 10**9), ("1.5 kb", 1500), ("2MiB", 2**21), ("7", 7), ("7B", 7)]
)
def test_sizes(text, expected):
    assert size_in_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "20 apples", "1e3XB"])
def test_what_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        size_in_bytes(text)


def test_too_many_broken_items_stop_the_run_and_the_summary_says_so(clip, clips, tmp_path, capsys):
    lines = (Path(clips) / "metadata.jsonl").read_text()
    table = tmp_path / "more.jsonl"
    table.write_text(lines + "".join(lines.replace("clip", f"gone{i}-clip") for i in range(3)))
    out = tmp_path / "out"
    options = ["--train", str(table), "--media-root", clips, "--max-broken", "0.2", "--logging-steps", "1"]
    assert pretrain(clip, clips, out, *options) == 1
    assert "are broken, more than the allowed share of 20%" in capsys.readouterr().err
    summary = json.loads((out / "run_summary.json").read_text())
    assert not summary["finished"] and summary["error"].startswith("BrokenItemsError: ")
    assert 0 <= summary["steps"] < summary["total_steps"] == 12 and not (out / "model.safetensors").exists()
    assert summary["broken_reasons"]["train"]["<path> does not exist."] == summary["broken_items"]["train"] > 9


def test_the_time_limit_of_a_video_is_an_option(clip, clips, tmp_path, capsys):
    assert pretrain(clip, clips, tmp_path / "out", "--item-timeout", "1e-6", "--max-broken", "1") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "None of 12 items tried in a row" in error and "longer than 1e-06 s and was cut off" in error


def test_no_item_can_be_used(clip, clips, tmp_path, capsys):
    table = tmp_path / "gone.jsonl"
    table.write_text("".join(json.dumps({"video": f"gone{i}.mp4", "text": "x"}) + "\n" for i in range(8)))
    assert pretrain(clip, clips, tmp_path / "out", "--train", str(table), "--max-broken", "1") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "None of 8 items tried in a row" in error and "does not exist" in error


def test_resume_with_another_table_is_refused(clip, clips, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--max-steps", "2", "--save-steps", "1"]
    assert pretrain(clip, clips, out, *options) == 0
    other = tmp_path / "other.jsonl"
    other.write_text((Path(clips) / "metadata.jsonl").read_text().replace("goes", "went"))
    capsys.readouterr()
    arguments = ["--train", str(other), "--media-root", clips, "--resume", "--max-steps", "4"]
    assert pretrain(clip, clips, out, *arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "checkpoint-2" in error and "other" in error


def test_resume_with_other_settings_is_refused(clip, clips, tmp_path, capsys):
    """The branch would have been learned under one formula and be saved as of another."""
    out = tmp_path / "out"
    options = ["--save-steps", "1", "--workers", "0"]
    assert pretrain(clip, clips, out, *options, "--max-steps", "1", "--gate-on", "branch") == 0
    capsys.readouterr()
    others = ["--gate-on", "backbone", "--mask-ratio", "0.2", "--num-frames", "3"]
    assert pretrain(clip, clips, out, *options, "--max-steps", "2", "--resume", *others) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "checkpoint-1 is of a run with other settings" in error
    assert "--gate-on 'branch', now 'backbone'" in error and "--mask-ratio 0.7, now 0.2" in error
    assert "--num-frames 4, now 3" in error
    assert not (out / "checkpoint-2").exists()
    assert json.loads((out / "config.json").read_text())["vision_config"]["gate_on"] == "branch"

    # a checkpoint of an earlier version does not say: it is gone on from
    weights = out / "checkpoint-1" / "trained.safetensors"
    with safe_open(weights, "pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != "configuration"}
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata=metadata)
    assert pretrain(clip, clips, out, *options, "--max-steps", "2", "--resume", "--gate-on", "branch") == 0


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_ctrl_c_saves_and_resume_goes_on(workers, clip, clips, tmp_path, capsys):
    """The interrupted and resumed run ends in the model of an undisturbed one."""
    options = ["--max-steps", "40", "--learning-rate", "1e-3", "--logging-steps", "1", "--workers", str(workers)]
    assert pretrain(clip, clips, tmp_path / "whole", *options) == 0
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bt_adapter_hf.cli.main", "pretrain", "--model", clip, "--train", clips]
    command += ["--output-dir", str(out), "--batch-size", "4", "--num-frames", "4", "--num-adapter-layers", "2"]
    command += ["--set", "use_cpu=true", *options]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    # A group of its own: like a terminal's Ctrl-C, the signal goes to the workers too.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("step 3/40"):
            os.killpg(process.pid, signal.SIGINT)
            break
    lines += process.stderr.readlines()
    assert process.wait(timeout=60) == 130, "".join(lines)
    assert "--resume goes on" in lines[-1] and "Traceback" not in "".join(lines)
    summary = json.loads((out / "run_summary.json").read_text())
    assert not summary["finished"] and summary["error"] == "interrupted" and 3 <= summary["steps"] < 40
    assert (out / f"checkpoint-{summary['steps']}").is_dir() and (out / "losses.png").is_file()
    assert not (out / "model.safetensors").exists()
    assert pretrain(clip, clips, out, *options, "--resume") == 0
    assert json.loads((out / "run_summary.json").read_text())["finished"]
    whole, resumed = (AutoModel.from_pretrained(folder).state_dict() for folder in (tmp_path / "whole", out))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_write_one_summary(clip, clips, tmp_path):
    table = tmp_path / "table.jsonl"
    lines = (Path(clips) / "metadata.jsonl").read_text()
    table.write_text(lines + lines.replace("clip", "gone-clip"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "bt_adapter_hf.cli.main", "pretrain", "--model", clip, "--train", str(table)]
    command += ["--media-root", clips, "--output-dir", str(tmp_path / "out"), "--batch-size", "2", "--num-frames", "4"]
    command += ["--num-adapter-layers", "2", "--set", "use_cpu=true", "--set", "ddp_backend=gloo", "--max-steps", "12"]
    command += ["--max-broken", "1", "--logging-steps", "5", "--validation", clips]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "out" / "run_summary.json").read_text())
    assert summary["processes"] == 2 and summary["speed"]["clips"] == 2 * 2 * 12 and summary["steps"] == 12
    assert summary["broken_items"] == {"train": 12}  # in two epochs both processes have met some of them
    assert len(list((tmp_path / "out").glob("broken_items*.jsonl"))) == 2
    steps = [line for line in result.stderr.splitlines() if line.startswith("step ")]
    assert len(steps) == 3 and steps[-1].endswith("skipped 12")


def test_ctrl_c_at_once_names_the_checkpoint(clip, clips, tmp_path, capsys, monkeypatch):
    from bt_adapter_hf.data.pairs import PairDataset

    read = PairDataset.__getitem__

    def pressed(self, index):
        if index[0] == 1:  # the second epoch
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(PairDataset, "__getitem__", pressed)
    out = tmp_path / "out"
    assert pretrain(clip, clips, out, "--epochs", "2", "--save-steps", "1", "--logging-steps", "1") == 130
    assert f"--resume would go on from {out}/checkpoint-" in capsys.readouterr().err
    assert json.loads((out / "run_summary.json").read_text())["error"] == "interrupted"


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
