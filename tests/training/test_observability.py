import io
import math
import sys
import time

import pytest
import torch
from transformers import TrainerCallback, set_seed

from bt_adapter_hf.data.pairs import PairCollator, PairDataset, load_table
from bt_adapter_hf.training.arguments import RELEASED_LR_MULTIPLIERS, BTAdapterTrainingArguments
from bt_adapter_hf.training.observability import TrainingProgress, clipping, describe
from bt_adapter_hf.training.report import mean_clipping
from bt_adapter_hf.training.trainer import BTAdapterTrainer
from tests import tiny_pairs


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tiny_pairs.write_table(tmp_path_factory.mktemp("clips"), rows=16).parent
    (folder / "clip3.mp4").write_bytes(b"cut")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


class SlowDataset(PairDataset):
    """Every item takes `seconds` more."""

    seconds = 0.0

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return super().__getitem__(index)


def make_trainer(clips, output_dir, *, seconds=0.0, validation=False, **options) -> BTAdapterTrainer:
    set_seed(0)
    processor, table = tiny_pairs.processor(), load_table(clips)
    arguments = {
        "output_dir": output_dir,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-4,
        "logging_steps": 2,
        "max_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "max_broken": 1.0,
        **options,
    }
    train = SlowDataset(table, processor, training=True, item_timeout=None)
    train.seconds = seconds
    return BTAdapterTrainer(
        model=tiny_pairs.model(),
        args=BTAdapterTrainingArguments(**arguments),
        train_dataset=train,
        eval_dataset=PairDataset(table, processor, training=False, item_timeout=None) if validation else None,
        data_collator=PairCollator(processor),
        processing_class=processor,
    )


class Stopwatch(TrainerCallback):
    """The seconds from each fetch of a batch to the end of its step, and the learning rates of the step."""

    def __init__(self, trainer):
        self.trainer, self.start, self.seconds, self.rates = trainer, None, [], []
        fetch = trainer.get_batch_samples

        def timed(*args):
            self.start = time.perf_counter()
            return fetch(*args)

        trainer.get_batch_samples = timed

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


class LongSave(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        time.sleep(0.3)


def windows(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_each_entry_says_how_fast_and_why(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, seconds=0.05, gradient_accumulation_steps=2)
    stopwatch = Stopwatch(trainer)
    trainer.add_callback(stopwatch)
    trainer.add_callback(LongSave())  # between the steps: must not count
    trainer.train()
    entries = windows(trainer)
    assert [entry["step"] for entry in entries] == [2, 4, 5]  # the last step too
    fetched = (5, 4, 1)  # batches: accelerate fetches one ahead
    for entry, steps, batches in zip(entries, (slice(0, 2), slice(2, 4), slice(4, 5)), fetched, strict=True):
        seconds = stopwatch.seconds[steps]
        clips_in_window = 8 * len(seconds)
        assert entry["clips_per_second"] == pytest.approx(clips_in_window / sum(seconds), rel=0.15)
        assert 0.9 * 0.05 * 4 * batches / sum(seconds) <= entry["data_wait"] <= 1
        assert entry["epoch"] == entry["step"] * 8 / 16
        assert "gpu_memory_gib" not in entry
    assert trainer.speed["clips"] == 40
    assert trainer.speed["seconds"] == pytest.approx(sum(stopwatch.seconds), rel=0.15)
    assert trainer.speed["clips_per_second"] == pytest.approx(40 / trainer.speed["seconds"])
    assert 0 < trainer.speed["data_wait"] < 1


def test_no_wait_where_workers_are_ahead(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, dataloader_num_workers=1, logging_steps=1, max_steps=6)

    class SlowStep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(0.3)

    trainer.add_callback(SlowStep())
    trainer.train()
    later = [entry["data_wait"] for entry in windows(trainer)[2:]]
    assert max(later) < 0.5, later


def test_learning_rates_of_all_groups_and_skipped_items(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, logging_steps=1, warmup_steps=2)
    stopwatch = Stopwatch(trainer)
    trainer.add_callback(stopwatch)
    trainer.train()
    factors = sorted(set(RELEASED_LR_MULTIPLIERS.values()))
    for entry, rates in zip(windows(trainer), stopwatch.rates, strict=True):
        assert [entry[f"lr_x{factor:g}"] for factor in factors] == rates
        assert entry["lr_x100"] == pytest.approx(10 * entry["lr_x10"]) and entry["learning_rate"] == entry["lr_x10"]
    skipped = [entry["skipped_items"] for entry in windows(trainer)]
    assert skipped == sorted(skipped) and skipped[-1] == 1 == trainer.broken_items["train"]


def test_a_second_training_starts_its_totals_anew(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, max_steps=2)
    trainer.train()
    trainer.train()
    assert trainer.speed["clips"] == 8


def test_tensorboard_gets_every_value(clips, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(
        clips, tmp_path, validation=True, report_to="tensorboard", eval_strategy="steps", eval_steps=4
    )
    trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            if name == "step":
                continue
            tag = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
            found = [event.value for event in events.Scalars(tag) if event.step == entry["step"]]
            assert any(value == pytest.approx(other, rel=1e-6) for other in found), tag
    for name in ("clips_per_second", "data_wait", "lr_x10", "lr_x100", "skipped_items", "vtc_loss", "epoch"):
        assert len(events.Scalars(f"train/{name}")) >= 3, name


def test_lines_for_people(clips, tmp_path, capfd):
    trainer = make_trainer(clips, tmp_path, validation=True, disable_tqdm=False, eval_strategy="steps", eval_steps=4)
    assert sum(isinstance(c, TrainingProgress) for c in trainer.callback_handler.callbacks) == 1
    trainer.train()
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "4/5", "5/5", "5/5"] and not out
    assert "vtc_loss" in lines[0] and "clips/s" in lines[0] and "waiting for data" in lines[0]
    assert lines[2].startswith("step 4/5  evaluation  loss ") and "t2v_R1" in lines[2] and "runtime" not in lines[2]
    assert "it/s" not in err  # no bars where stderr is no terminal


def test_the_bar_goes_on_where_a_resumed_run_does(clips, tmp_path, monkeypatch):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "disable_tqdm": False}
    make_trainer(clips, tmp_path, **options).train()

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    make_trainer(clips, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    bars = [part for part in terminal.getvalue().split("\r") if "/4 [" in part]
    assert "3/4" in bars[0] and "4/4" in bars[-1]


def test_what_a_line_says_of_memory_and_skipped_items():
    logs = {"loss": 1.25, "epoch": 0.5, "learning_rate": 1e-4, "clips_per_second": 12.34567, "data_wait": 0.05}
    logs |= {"gpu_memory_gib": 1.23, "gpu_memory_peak_gib": 4.56, "skipped_items": 3}
    assert describe(logs) == (
        "epoch 0.50  loss 1.25  learning_rate 0.0001  12.35 clips/s  waiting for data 5%  "
        "GPU 1.2 GiB, peak 4.6  skipped 3"
    )
    assert describe({"train_runtime": 3.0, "train_loss": 2.0, "epoch": 1.0}) == ""


@pytest.mark.gpu
def test_memory_of_the_gpu(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, use_cpu=False)
    trainer.train()
    last = windows(trainer)[-1]
    assert 0 < last["gpu_memory_gib"] <= last["gpu_memory_peak_gib"] == trainer.speed["gpu_memory_peak_gib"]
    assert last["gpu_memory_peak_gib"] == pytest.approx(torch.cuda.max_memory_allocated() / 2**30)


def test_how_much_is_clipped(clips, tmp_path):
    """Each step on its own, then the same steps in windows of two, and all of them in the summary."""
    each = make_trainer(clips, tmp_path / "a", logging_steps=1, max_grad_norm=30, max_steps=4, warmup_steps=0)
    each.train()
    norms = [entry["grad_norm"] for entry in each.state.log_history if "grad_norm" in entry]
    above = [norm / 30 for norm in norms if norm > 30]
    assert 0 < len(above) < len(norms) == 4, norms  # else the limit here shows nothing
    entries = [entry for entry in each.state.log_history if "clipped_steps" in entry]
    for entry, norm in zip(entries, norms, strict=True):
        assert entry["clipped_steps"] == (norm > 30) and entry["clipped_by"] == pytest.approx(max(norm / 30, 1))
    expected = {"clipped_steps": len(above) / 4, "clipped_by": math.prod(above) ** (1 / len(above))}
    pairs = make_trainer(clips, tmp_path / "b", logging_steps=2, max_grad_norm=30, max_steps=4, warmup_steps=0)
    pairs.train()
    for trainer in (each, pairs):
        assert mean_clipping(trainer.state.log_history) == pytest.approx(expected, abs=1e-3)
    without = make_trainer(clips, tmp_path / "c", max_grad_norm=0, max_steps=2)
    without.train()
    assert not any("clipped_steps" in entry for entry in without.state.log_history)
    assert mean_clipping(without.state.log_history) == {}


def test_what_is_clipped_stands_in_the_line_of_the_log():
    entry = {"loss": 1.0, "epoch": 1.0, "learning_rate": 0.1, **clipping([600.0, 3.0], 5.0)}
    assert entry["clipped_steps"] == 0.5 and entry["clipped_by"] == pytest.approx(120)
    assert "clipped 50% of steps by 120" in describe(entry)
    assert "clipped" not in describe({**entry, **clipping([4.0, math.inf], 5.0)})


def test_several_gpus_in_one_process_and_nothing_to_contrast(clips, tmp_path):
    args = BTAdapterTrainingArguments(output_dir=tmp_path, use_cpu=True)
    args._n_gpu = 2  # as transformers counts them
    with pytest.raises(ValueError, match="2 GPUs are visible.*torchrun --nproc-per-node 2.*CUDA_VISIBLE_DEVICES=0"):
        BTAdapterTrainer(model=tiny_pairs.model(), args=args)
    with pytest.raises(ValueError, match="per_device_train_batch_size=1 on one process leaves nothing to contrast"):
        make_trainer(clips, tmp_path, per_device_train_batch_size=1)
