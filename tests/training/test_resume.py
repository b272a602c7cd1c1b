"""Exact, cheap resume: the same losses bit by bit, every row once per epoch, nothing decoded twice."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import TrainerCallback

from bt_adapter_hf.data import pairs
from bt_adapter_hf.data.order import EpochOrder
from bt_adapter_hf.training.checkpoint import last_checkpoint
from tests import tiny_pairs
from tests.training.resume_run import EVALUATED, LOGGED, logged, make_trainer, seen_file, seen_rows


ROWS = 17  # no batch size of these tests divides it


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return tiny_pairs.write_table(tmp_path_factory.mktemp("clips"), rows=ROWS).parent


@pytest.fixture(scope="module")
def packed(clips, tmp_path_factory) -> Path:
    """The same clips in parquet, as bytes: six shards of uneven size in two files, which have to be fetched."""
    lines = [json.loads(line) for line in (clips / "metadata.jsonl").read_text().splitlines()]
    columns = {"video": [(clips / line["file_name"]).read_bytes() for line in lines]}
    columns["text"] = [line["text"] for line in lines]
    table = pa.table(columns)
    folder = tmp_path_factory.mktemp("packed")
    pq.write_table(table.slice(0, 11), folder / "a.parquet", row_group_size=4)
    pq.write_table(table.slice(11), folder / "b.parquet", row_group_size=2)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def keep_only(output_dir, step):
    for folder in Path(output_dir).glob("checkpoint-*"):
        if folder.name != f"checkpoint-{step}":
            shutil.rmtree(folder)


def each_row_once_per_epoch(rows: list[int], table_rows: int = ROWS) -> bool:
    epochs = [rows[start : start + table_rows] for start in range(0, len(rows), table_rows)]
    whole = all(sorted(epoch) == list(range(table_rows)) for epoch in epochs[:-1])
    return whole and max(Counter(epochs[-1]).values()) == 1


# One process


@pytest.mark.parametrize(
    "source, options, step",
    [
        ("clips", {}, 2),  # in the first epoch
        ("clips", {"gradient_accumulation_steps": 2}, 3),  # in the second: 17 rows are 2.8 steps of 6
        ("clips", {"dataloader_num_workers": 1}, 6),
        ("clips", {"dataloader_num_workers": 4, "dataloader_persistent_workers": True}, 6),
        ("packed", {"dataloader_num_workers": 1, "chunk_rows": 6, "eval_steps": 9}, 6),
    ],
)
def test_resume_gives_the_same_losses(source, options, step, request, tmp_path):
    table = request.getfixturevalue(source)
    options = {
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": step,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "validation": True,
        **options,
    }
    whole = make_trainer(table, tmp_path, **options)
    whole.train()
    expected = logged(whole.state.log_history, *LOGGED), logged(whole.state.log_history, *EVALUATED)
    rows = seen_rows(tmp_path)
    assert len(set(expected[0])) == 9 and len(expected[1]) in (1, 3)
    assert len(rows) == 27 * options.get("gradient_accumulation_steps", 1) and each_row_once_per_epoch(rows)
    keep_only(tmp_path, step)
    resumed = make_trainer(table, tmp_path, **options)
    torch.rand(17)  # the random state of the new process must not matter
    resumed.train(resume_from_checkpoint=True)
    assert (logged(resumed.state.log_history, *LOGGED), logged(resumed.state.log_history, *EVALUATED)) == expected
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert seen_rows(tmp_path) == rows
    assert not list(tmp_path.glob("chunks/*/*"))


def test_rows_come_in_the_order_and_uneven_epochs_lose_none(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, num_train_epochs=3, per_device_train_batch_size=4, seed=5)
    trainer.train()
    rows = seen_rows(tmp_path)
    order = EpochOrder([ROWS], seed=5)
    assert rows == [order.row(position)[1] for position in range(48)]  # 12 whole batches of 3 x 17 rows
    assert trainer.state.global_step == 12 and trainer.state.epoch == 48 / 17


def test_without_drop_last_the_last_batch_is_filled_up(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, num_train_epochs=1, dataloader_drop_last=False)
    trainer.train()
    rows = seen_rows(tmp_path)
    assert trainer.state.global_step == 6 and len(rows) == 18
    assert sorted(rows[:17]) == list(range(17))


def test_the_batch_size_may_change(clips, tmp_path):
    """The next position follows, and the number of steps to come is computed anew."""
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
    first = make_trainer(clips, tmp_path, **options)
    first.train()
    keep_only(tmp_path, 3)
    lines = seen_file(tmp_path).read_text().splitlines()
    seen_file(tmp_path).write_text("\n".join(lines[:3]) + "\n")
    changed = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    second = make_trainer(clips, tmp_path, **{**options, **changed})
    second.train(resume_from_checkpoint=True)
    rows = seen_rows(tmp_path)
    assert second.state.global_step == second.state.max_steps == 3 + (34 - 9) // 4
    assert len(rows) == 33 and each_row_once_per_epoch(rows)
    again = make_trainer(clips, tmp_path, **{**options, **changed})
    again.train(resume_from_checkpoint=True)  # from checkpoint 9, the last: nothing is left to do
    assert again.state.global_step == 9 and len(seen_rows(tmp_path)) == 33


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_decoded_before_the_place_of_resume(workers, clips, tmp_path, monkeypatch):
    """After 90 % of three epochs, counted in all processes that decode."""
    decoded = tmp_path / "decoded"
    original = pairs.load_video

    def counting(video, **kwargs):
        file = os.open(decoded, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(file, f"{Path(video).stem.removeprefix('clip')}\n".encode())
        os.close(file)
        return original(video, **kwargs)

    monkeypatch.setattr(pairs, "load_video", counting)
    options = {"max_steps": 20, "save_strategy": "steps", "save_steps": 18, "dataloader_num_workers": workers}
    make_trainer(clips, tmp_path, **options).train()
    before = [int(row) for row in decoded.read_text().split()]
    assert len(before) == 60
    keep_only(tmp_path, 18)
    decoded.unlink()
    make_trainer(clips, tmp_path, **options).train(resume_from_checkpoint=True)
    after = [int(row) for row in decoded.read_text().split()]
    assert Counter(after) == Counter(seen_rows(tmp_path)[54:]) and len(after) == 6  # what is trained on, and no more


def test_what_happens_at_the_end_of_an_epoch(clips, tmp_path):
    """17 rows in batches of 3: the epochs end in steps 6, 12 and, with the run, 17."""
    strategies = {f"{name}_strategy": "epoch" for name in ("eval", "save", "logging")}
    trainer = make_trainer(clips, tmp_path, num_train_epochs=3, validation=True, **strategies)
    trainer.train()
    history = trainer.state.log_history
    ends = [(6, 18 / 17), (12, 36 / 17), (17, 3.0)]
    assert [entry[1:] for entry in logged(history, "loss", "step", "epoch")] == ends
    assert [entry[1:] for entry in logged(history, "eval_loss", "step", "epoch")] == ends
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step, _ in ends}
    assert trainer.state.num_train_epochs == 3 and trainer.state.max_steps == 17


def test_a_packed_table_is_evaluated_while_it_trains_and_fetched_once_for_that(packed, tmp_path):
    """One table for both; what one evaluation has fetched is there for the next."""
    options = {"max_steps": 6, "chunk_rows": 6, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(packed, tmp_path, validation=True, **options)
    trainer.eval_dataset = pairs.PairDataset(trainer.train_dataset.table, tiny_pairs.processor(), training=False)
    written = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            written.append({path.name: path.stat().st_mtime_ns for path in tmp_path.glob("chunks/eval-0/*.rows")})

    trainer.add_callback(Watch())
    trainer.train()
    assert not (tmp_path / "chunks").exists()
    assert len(written) == 3 and len(written[0]) == 6 and written[0] == written[1] == written[2]
    rows = seen_rows(tmp_path)
    assert len(rows) == 18 and each_row_once_per_epoch(rows)
    assert trainer.evaluate()["eval_pairs"] == ROWS and not (tmp_path / "chunks").exists()


# Several processes


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def command(table, output_dir, options, processes=1) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    script = [str(Path(__file__).with_name("resume_run.py")), str(table), str(output_dir), json.dumps(options)]
    return [sys.executable, *(torchrun if processes > 1 else []), *script]


def run(table, output_dir, options, processes=1) -> list[dict]:
    """Run to the end, from the last checkpoint if there is one; the log. One process is this one."""
    if processes == 1:
        trainer = make_trainer(table, output_dir, **options)
        trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))
        return trainer.state.log_history
    arguments = command(table, output_dir, options, processes)
    result = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(Path(output_dir, "log.json").read_text())


def run_and_kill(table, output_dir, options, processes, after_step, delay) -> None:
    """SIGKILL to all processes of the run, `delay` seconds after a step has begun."""
    seen = seen_file(output_dir)
    earlier = seen.stat().st_size if seen.exists() else 0
    with open(Path(output_dir) / "stderr", "w+") as stderr:
        arguments = command(table, output_dir, options, processes)
        process = subprocess.Popen(arguments, env=environment(), start_new_session=True, stdout=stderr, stderr=stderr)
        try:
            while last_step(seen, earlier) < after_step:
                if process.poll() is not None:
                    raise AssertionError(Path(stderr.name).read_text()[-4000:])
                time.sleep(0.002)
            time.sleep(delay)
        finally:
            kill_all(process)


def kill_all(process: subprocess.Popen) -> None:
    """The run with the processes it has started: torchrun's are groups of their own."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in listed.splitlines()]
    victims = [process.pid]
    for victim in victims:
        victims.extend(pid for pid, parent in parents if parent == victim)
    for victim in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    process.wait()


def last_step(seen: Path, offset: int) -> int:
    lines = seen.read_text()[offset:].splitlines() if seen.exists() else []
    return json.loads(lines[-1])[1] if lines else -1


def killed_and_resumed(table, folder, options, processes, kills, seed) -> None:
    """A run that is killed at random steps, and one that is not: the same losses, and the same rows."""
    chance = random.Random(seed)
    (folder / "whole").mkdir(parents=True)
    expected = run(table, folder / "whole", options, processes)
    rows = seen_rows(folder / "whole", processes)
    assert each_row_once_per_epoch(rows)
    (folder / "killed").mkdir()
    for step in sorted(chance.sample(range(1, options["max_steps"] - 1), kills)):
        run_and_kill(table, folder / "killed", options, processes, step, delay=chance.uniform(0, 0.2))
    found = run(table, folder / "killed", options, processes)
    assert seen_rows(folder / "killed", processes) == rows
    for names in (LOGGED, EVALUATED):
        a, b = logged(expected, *names), logged(found, *names)
        assert len(a) == len(b) > 0
        assert b == a if processes == 1 else all(y == pytest.approx(x, rel=1e-6) for x, y in zip(a, b, strict=True))


KILLED = {
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "validation": True,
    "dataloader_num_workers": 2,
}


def test_two_kills_lose_nothing(clips, tmp_path):
    options = {**KILLED, "max_steps": 12, "per_device_train_batch_size": 4}
    killed_and_resumed(clips, tmp_path, options, processes=1, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("source", ["clips", "packed"])
def test_twenty_kills_lose_nothing(source, processes, request, tmp_path):
    """Across thirteen epochs; the parquet shards are fetched to a bounded folder, which a kill may leave anyhow."""
    options = {**KILLED, "max_steps": 56, "per_device_train_batch_size": 4 // processes, "chunk_rows": 6}
    killed_and_resumed(request.getfixturevalue(source), tmp_path, options, processes, kills=20, seed=processes)


@pytest.mark.slow
@pytest.mark.parametrize("source, workers", [("clips", 2), ("packed", 0)])
def test_the_number_of_processes_may_change(source, workers, request, tmp_path):
    """1, 4, 2, 1 processes in turn, 17 rows in 1 or 6 shards: each row once per epoch, over all processes."""
    rows, steps = [], 0
    for processes, more_steps in ((1, 5), (4, 4), (2, 6), (1, 3)):
        steps += more_steps
        options = {
            "per_device_train_batch_size": 2,
            "max_steps": steps,
            "save_strategy": "steps",
            "save_steps": steps,
            "dataloader_num_workers": workers,
            "chunk_rows": 8,
        }
        table = request.getfixturevalue(source)
        log = run(table, tmp_path, options, processes)
        rows += seen_rows(tmp_path, processes)
        for rank in range(processes):
            seen_file(tmp_path, rank).unlink()
    assert len(rows) == 2 * (5 + 4 * 4 + 2 * 6 + 3) and each_row_once_per_epoch(rows)
    assert [step for _, step in logged(log, "loss", "step")] == list(range(1, steps + 1))


def test_a_list_of_broken_items_that_a_kill_has_cut(clips, tmp_path):
    damaged = shutil.copytree(clips, tmp_path / "damaged")
    (damaged / "clip5.mp4").write_bytes(b"")
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6}
    make_trainer(damaged, tmp_path / "out", **options).train()
    keep_only(tmp_path / "out", 6)
    path = tmp_path / "out" / "broken_items.jsonl"
    (line,) = path.read_text().splitlines(keepends=True)
    path.write_text(line[:20])
    trainer = make_trainer(damaged, tmp_path / "out", **options)
    trainer.train(resume_from_checkpoint=True)
    assert path.read_text() == line and trainer.broken_items == {"train": 1}  # met again in the second epoch


def test_what_is_drawn_does_not_depend_on_the_number_of_processes(clips, tmp_path):
    """A checkpoint of two processes goes on in one, with the masks and dropped paths of an uninterrupted run."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(clips, tmp_path, **options)
    whole.train()
    keep_only(tmp_path, 2)
    edit_data_state(tmp_path / "checkpoint-2", processes=2)
    (tmp_path / "checkpoint-2" / "rng_state.pth").unlink()
    trainer = make_trainer(clips, tmp_path, **options)
    torch.rand(5)
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert logged(trainer.state.log_history, *LOGGED) == logged(whole.state.log_history, *LOGGED)


# What cannot be resumed


def edit_data_state(checkpoint, **changes) -> None:
    path = checkpoint / "data_state.json"
    state = json.loads(path.read_text())
    for name, value in changes.items():
        (state["data"] if name in state["data"] else state)[name] = value
    path.write_text(json.dumps(state))


@pytest.fixture(scope="module")
def checkpoint(clips, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_trainer(clips, folder, max_steps=2, save_strategy="steps", save_steps=1).train()
    return folder / "checkpoint-1"


def test_the_state_is_a_small_file(checkpoint):
    state = json.loads((checkpoint / "data_state.json").read_text())
    assert (state["consumed"], state["steps"], state["processes"]) == (3, 1, 1)
    assert state["data"]["rows"] == ROWS and state["data"]["order_seed"] == 0
    assert (checkpoint / "data_state.json").stat().st_size < 1000


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seed": 1}, "is of another run, over .*order_seed=0; this run is over .*order_seed=1"),
        ({"data_seed": 7}, "order_seed=0; this run is over .*order_seed=7"),
        ({"item_seed": 1}, "item_seed=0; this run is over .*item_seed=1"),
        ({"chunk_rows": 5}, "chunk_rows=10000; this run is over .*chunk_rows=5"),
    ],
)
def test_another_order_is_refused(options, message, clips, checkpoint, tmp_path):
    trainer = make_trainer(clips, tmp_path, max_steps=4, **options)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert not seen_file(tmp_path).exists()


def test_another_table_is_refused_and_a_moved_one_is_not(clips, checkpoint, tmp_path):
    other = tiny_pairs.write_table(tmp_path / "other", rows=ROWS - 1).parent
    message = f"source='{clips}'.*rows=17.*; this run is over source='{other}'.*rows=16"
    with pytest.raises(ValueError, match=message):
        make_trainer(other, tmp_path / "out", max_steps=4).train(resume_from_checkpoint=checkpoint)
    moved = shutil.copytree(clips, tmp_path / "moved")
    trainer = make_trainer(moved, tmp_path / "moved-out", max_steps=3)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 3


def test_incomplete_checkpoints_are_refused(clips, checkpoint, tmp_path):
    def resume(name):
        make_trainer(clips, tmp_path / "out", max_steps=4).train(resume_from_checkpoint=tmp_path / name)

    for name in ("killed", "older", "edited", "torn"):
        shutil.copytree(checkpoint, tmp_path / name)
    (tmp_path / "killed" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="killed was not written to its end: use an earlier checkpoint"):
        resume("killed")
    (tmp_path / "older" / "data_state.json").unlink()
    with pytest.raises(ValueError, match="older holds no readable data_state.json.*another version"):
        resume("older")
    (tmp_path / "torn" / "data_state.json").write_text('{"consumed"')
    with pytest.raises(ValueError, match="torn holds no readable data_state.json"):
        resume("torn")
    edit_data_state(tmp_path / "edited", format=2)
    with pytest.raises(ValueError, match="written by another version"):
        resume("edited")
    with pytest.raises(ValueError, match="holds no readable data_state.json"):
        resume("absent")


def test_a_checkpoint_of_the_weights_alone_does_not_pretend(clips, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    make_trainer(clips, tmp_path, **options).train()
    with pytest.raises(ValueError, match="holds no readable data_state.json.*save_only_model"):
        make_trainer(clips, tmp_path, **options).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"per_device_train_batch_size": 18}, "has 17 rows, fewer than one batch over all processes .18."),
        ({"per_device_train_batch_size": 9, "gradient_accumulation_steps": 2}, "is less than one step of 18 rows"),
        ({"train_sampling_strategy": "group_by_length"}, "would change the order of the data"),
        ({"ignore_data_skip": True}, "ignore_data_skip=True would change the order"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True would change the order"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True would change the order"),
    ],
)
def test_runs_that_cannot_be(options, message, clips, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(clips, tmp_path, **options).train()


def test_a_step_has_to_fit_the_chunks_that_are_fetched(packed, tmp_path):
    with pytest.raises(ValueError, match="A step takes 8 rows, more than chunk_rows=7"):
        make_trainer(packed, tmp_path, per_device_train_batch_size=8, chunk_rows=7).train()


FULL_DISK = """
import resource, signal, sys
from transformers import TrainerCallback
from tests.training.resume_run import make_trainer

table, output_dir, size = sys.argv[1:]

class FullAfterTwoSteps(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))

trainer = make_trainer(table, output_dir, max_steps=4, save_strategy="steps", save_steps=1)
trainer.add_callback(FullAfterTwoSteps())
trainer.train()
"""


@pytest.mark.parametrize("share", [pytest.param(0.5, marks=pytest.mark.slow), 1.5])
def test_no_room_for_a_checkpoint(share, clips, checkpoint, tmp_path):
    """Files may not grow beyond half of the weights, or beyond the weights but not the optimizer's state."""
    size = int(share * (checkpoint / "trained.safetensors").stat().st_size)
    assert (checkpoint / "optimizer.pt").stat().st_size > size
    arguments = [sys.executable, "-c", FULL_DISK, str(clips), str(tmp_path), str(size)]
    result = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=240)
    assert result.returncode == 1
    last_line = result.stderr.strip().splitlines()[-1]
    assert "checkpoint-3 could not be written" in last_line and "bytes are free there. Make room" in last_line
    assert last_line.endswith(f"the last complete checkpoint is {tmp_path / 'checkpoint-2'}.")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    trainer = make_trainer(clips, tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
