"""The released recipes: parameter groups and schedule of what the shell scripts run, on tiny models."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel, TrainerCallback

from bt_adapter_hf import BTAdapterConfig, BTAdapterModel, save_bt_adapter
from bt_adapter_hf.cli.main import main
from bt_adapter_hf.data.moving_digits import MOTIONS, clip
from bt_adapter_hf.training import trainer as trainer_module
from bt_adapter_hf.training.arguments import BTAdapterTrainingArguments
from tests import tiny_pairs


RECIPES = Path(__file__).parents[2] / "recipes"
ROWS, BATCH = 16, 2
STEPS = ROWS // BATCH


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return tiny_pairs.write_table(tmp_path_factory.mktemp("clips"), rows=ROWS).parent


def save_clip(folder: Path) -> Path:
    CLIPModel(tiny_pairs.clip_config()).save_pretrained(folder)
    processor = tiny_pairs.processor()
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    return folder


def save_eva(folder: Path) -> None:
    """A dual encoder as converted from the released EVA checkpoint, with its branch."""
    config = tiny_pairs.clip_config().to_dict()
    backbone = {**config["vision_config"], "model_type": "blip_2_vision_model"}
    tower = {"backbone": backbone, "adapter_layers": [1, 2], "fusion": "sum", "output_fusion": "sum"}
    text = {**config["text_config"], "hidden_act": "gelu"}
    config = BTAdapterConfig(text_config=text, vision_config=tower, projection_dim=12, visual_projection_bias=True)
    BTAdapterModel(config).save_pretrained(folder)


def options_of(recipe: str, *arguments: str) -> list[str]:
    """The command line of `bt-adapter` that a recipe's script runs."""
    result = subprocess.run(
        ["bash", str(RECIPES / recipe / "pretrain.sh"), *arguments],
        env={**os.environ, "LAUNCH": r"printf %s\n"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = result.stdout.splitlines()
    assert words[:2] == ["-m", "bt_adapter_hf.cli.main"]
    return words[2:]


@pytest.fixture
def run_recipe(clips, tmp_path, monkeypatch):
    def run_recipe(recipe: str, model: Path):
        """The trainer, and the learning rate of every parameter before each step."""
        trainers, rates = [], []

        class Recording(trainer_module.BTAdapterTrainer):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                trainers.append(self)
                self.add_callback(Rates())

        class Rates(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
                rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
                rates.append({name: rate[id(p)] for name, p in model.named_parameters() if p.requires_grad})

        monkeypatch.setattr(trainer_module, "BTAdapterTrainer", Recording)
        smaller = ["--num-adapter-layers", "2", "--num-frames", "4", "--max-text-length", "24", "--workers", "0"]
        smaller += ["--batch-size", str(BATCH), "--eval-controls", "--logging-steps", "1", "--set", "use_cpu=true"]
        words = options_of(recipe, str(clips), str(clips), str(tmp_path / "out"), str(model), *smaller)
        assert main(words) == 0
        return trainers[0], rates

    return run_recipe


def released_schedule(step: int) -> float:
    """Linear from 0.05 to 1 in the first half of the epoch, then a cosine of 4.5 epochs."""
    warmup = STEPS // 2
    if step < warmup:
        return 0.05 + 0.95 * step / (warmup - 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (4.5 * STEPS)))


def check_common(trainer, rates, factor):
    assert len(rates) == STEPS and released_schedule(STEPS - 1) == pytest.approx(0.9698, abs=1e-4)
    for step, by_name in enumerate(rates):
        for name, rate in by_name.items():
            assert rate == pytest.approx(2e-6 * factor(name) * released_schedule(step), rel=1e-9), (step, name)
    optimizer = trainer.optimizer.optimizer
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.98), 1e-8, 0.05)
    args, config = trainer.args, trainer.model.config
    assert (args.max_grad_norm, args.num_train_epochs) == (5.0, 1.0)
    assert (config.mask_ratio, config.vtc_weight, config.mbca_weight, config.temperature) == (0.7, 1.0, 0.1, 0.01)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_clip_l14(run_recipe, tmp_path):
    trainer, rates = run_recipe("clip_l14", save_clip(tmp_path / "clip"))

    def factor(name):
        if ".temporal." in name or name.endswith("_gate"):
            return 100
        assert ".bt_adapter." in name or name.startswith("mbta_head.")
        return 10

    check_common(trainer, rates, factor)
    assert {factor(name) for name in rates[0]} == {10, 100}
    assert trainer.model.config.mbta_weight == 0.1 and trainer.model.config.vision_config.fusion == "gate"


def test_eva_g(run_recipe, tmp_path, monkeypatch):
    """With a starting point made as README.md says, where the names of its models are folders."""
    monkeypatch.chdir(tmp_path)
    save_clip(tmp_path / "openai" / "clip-vit-large-patch14")
    save_eva(tmp_path / "eva-g-trained")
    (code,) = re.findall(r"```python\n(.*?)```", (RECIPES / "eva_g" / "README.md").read_text(), re.DOTALL)
    exec(code, {})
    trainer, rates = run_recipe("eva_g", tmp_path / "eva-g")
    check_common(trainer, rates, lambda name: 10)
    assert all(".bt_adapter." in name and "_gate" not in name for name in rates[0])
    assert not any("mbta_loss" in entry for entry in trainer.state.log_history)
    tower = trainer.model.config.vision_config
    assert (tower.fusion, tower.output_fusion, tower.adapter_layers) == ("sum", "sum", [1, 2])


def test_released_sizes_are_in_the_scripts():
    for recipe, batch, length in (("clip_l14", "52", "64"), ("eva_g", "16", "77")):
        words = options_of(recipe, "a", "b", "c", "d")
        for option, value in {
            "--batch-size": batch,
            "--max-text-length": length,
            "--num-frames": "8",
            "--num-adapter-layers": "4",
        }.items():
            assert words[words.index(option) + 1] == value


@pytest.mark.parametrize("script", sorted(RECIPES.glob("*/*.sh")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_scripts_parse_and_explain_themselves(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    result = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert result.returncode == 2 and f"bash recipes/{script.parent.name}/{script.name} " in result.stderr
    assert "set -euo" not in result.stderr and not result.stderr.startswith("#")


def test_steps_are_taken_once_and_timed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(RECIPES.parent)
    from recipes.shared import make, run_arguments, ship

    taken = []

    def step(name):
        taken.append(name)
        (tmp_path / name).write_text(name)

    steps = [(name, tmp_path / name, lambda name=name: step(name)) for name in ("a", "b")]
    assert make(steps, tmp_path / "results.json") == {"a": 0, "b": 0}
    (tmp_path / "b").unlink()
    assert make(steps, tmp_path / "results.json").keys() == {"a", "b"} and taken == ["a", "b", "b"]
    ship(tmp_path, tmp_path / "assets")
    assert {path.name for path in (tmp_path / "assets").iterdir()} == {"a", "b", "results.json"}
    args = run_arguments(BTAdapterTrainingArguments, tmp_path, max_steps=7, logging_steps=100)
    assert (args.max_steps, args.logging_steps, args.save_strategy, args.use_cpu) == (7, 100, "no", True)


@pytest.mark.parametrize(
    ("module", "ships"),
    [
        ("moving_digits.build", 1),
        ("moving_digits_chat.build", 1),
        ("zero_shot_chat.build", 0),
        ("zero_shot_chat.eva_hosts", 0),
    ],
)
def test_builds_start_as_their_pages_say(module, ships):
    command = [sys.executable, "-m", f"recipes.{module}"]
    assert " ".join(["python", *command[1:]]) in (RECIPES / module.split(".")[0] / "README.md").read_text()
    result = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=120, cwd=RECIPES.parent)
    assert result.returncode == 0 and ("--ship" in result.stdout) == bool(ships), result.stderr


def test_conversations_with_and_without_a_picture_share_a_batch(tmp_path, monkeypatch):
    """A stream's batch has more rows than pictures, and all of both reach the model."""
    monkeypatch.syspath_prepend(RECIPES.parent)
    from recipes.moving_digits_chat import build

    monkeypatch.setattr(build, "STILL_STEPS", 1)
    monkeypatch.setattr(build, "STILL_BATCH", 6)
    build.train_on_stills(tmp_path)
    assert (tmp_path / "processor_config.json").is_file()


def test_a_trail_tells_a_motion_from_its_opposite(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES.parent)
    from recipes.zero_shot_chat.build import inside, shuffled_index, trail

    count = len(MOTIONS)
    assert sorted(shuffled_index(count, place, 1) for place in range(count, 2 * count)) == [*range(count, 2 * count)]
    for index, motion in enumerate(MOTIONS):
        frames, caption, facts = clip("test", 0, index)
        image, *told = trail("test", 0, index)
        assert told == [caption, facts] and facts["motion"] == motion
        assert (image >= frames[-1]).all() and (image > frames[-1]).any()
        assert (image != trail("test", 0, index ^ 1)[0]).any()
    span = np.diag([3.0, 2.0, 0.0])
    assert inside(np.array([[1.0, 1.0, 0.0]]), np.concatenate([span, -span])) == pytest.approx(100)
    assert inside(np.array([[1.0, 0.0, 1.0]]), np.concatenate([span, -span])) == pytest.approx(50)


def test_an_adapter_beside_a_small_eva_clip_goes_into_both_hosts_of_eva(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(RECIPES.parent)
    from recipes.zero_shot_chat import eva_hosts

    for name in ("CLIP_STEPS", "CHAT_STEPS"):
        monkeypatch.setattr(eva_hosts, name, 1)
    for name in ("CLIP_BATCH", "CHAT_BATCH"):
        monkeypatch.setattr(eva_hosts, name, 4)
    clip, adapter = tmp_path / "eva-clip", tmp_path / "adapter"
    eva_hosts.train_clip(clip)
    assert not any(".bt_adapter." in name for name in load_file(clip / "model.safetensors"))
    eva = BTAdapterModel.from_pretrained(clip)
    save_bt_adapter(eva, adapter)
    frames = torch.zeros(1, 2, 3, 48, 48)
    frames[:, 1] = 1.0
    for name in eva_hosts.HOSTS:
        eva_hosts.train_chat(name, clip, tmp_path / name)
        plugged = eva_hosts.plug_in(name, tmp_path / name, adapter)
        for key, value in eva.vision_model.bt_adapter.state_dict().items():
            if key in (held := plugged.vision_model.bt_adapter.state_dict()):  # a host has no use for the output gate
                assert torch.equal(held[key], value), key
        average = eva_hosts.plug_in(name, tmp_path / name, adapter)
        average.vision_model.__class__ = eva_hosts.FrameAveragedTower
        tokens = [model.vision_model(frames).last_hidden_state for model in (plugged, average)]
        each = average.vision_model(frames[0]).last_hidden_state
        assert torch.allclose(tokens[1][0], each.mean(dim=0), atol=1e-5) and not torch.allclose(*tokens, atol=1e-3)
