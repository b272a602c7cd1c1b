"""The command in a disk that holds a tenth of the GIFs, watched from outside, killed inside a chunk, and going on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chat import tiny_gif_qa
from tests.data.packed import file_server


GIFS, SIZE, ROWS, LIMIT = 192, 20_500, 8, 350_000
STEPS = GIFS // 4  # a chunk is two of them


def start(folder: Path, output: Path, *options: str) -> subprocess.Popen:
    fields = {
        "model": folder / "base", "train": folder / "Train_frameqa_question.csv", "media-root": folder / "links.tsv",
        "output-dir": output, "device": "cpu", "chunk-rows": ROWS, "max-disk": LIMIT, "batch-size": 4, "lora-r": 2,
        "epochs": 1, "save-steps": 5, "logging-steps": 1, "item-timeout": 0,
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.data.gif_run", str(ROWS), "--lora", *options]
    command += [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
        stdout=(folder / "log").open("a"),
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def fetched(output: Path) -> int:
    """Bytes of all that was fetched, what is being written included, at one moment: two looks that agree."""
    while (first := _sizes(output)) != _sizes(output):
        pass
    return sum(first.values())


def _sizes(output: Path) -> dict[str, int]:
    found = {}
    for folder, _, names in os.walk(output):  # folders come and go meanwhile, and files
        for path in (os.path.join(folder, name) for name in names if ".rows" in name):
            with contextlib.suppress(FileNotFoundError):
                found[path] = os.path.getsize(path)
    return found


def watch(process: subprocess.Popen, output: Path, kill_after: int | None = None) -> int:
    """The most bytes seen until the end, or until it is killed soon after so many steps are saved."""
    most, saved = 0, None
    while process.poll() is None:
        most = max(most, fetched(output))
        if kill_after is not None and (output / f"checkpoint-{kill_after}" / "trainer_state.json").exists():
            saved = saved or time.monotonic()
            if time.monotonic() - saved > 0.05:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        time.sleep(0.002)
    return most


def losses_of(output: Path) -> list[float]:
    state = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.slow
def test_killed_inside_a_chunk_of_a_run_over_ten_times_its_disk(tmp_path, record_property):
    for n in range(GIFS):
        path = tiny_gif_qa.write_gif(tmp_path / f"gif{n}.gif", frames=3, seed=n)
        path.write_bytes(path.read_bytes().ljust(SIZE, b"\0"))  # what follows the end of a GIF is not read
    model = tiny_gif_qa.model("mlp")
    model.save_pretrained(tmp_path / "base")
    tiny_gif_qa.processor(model.config).save_pretrained(tmp_path / "base")
    rows = [f"gif{n}\twhat happens ?\t{'left' if n % 2 else 'right'}\n" for n in range(GIFS)]
    (tmp_path / "Train_frameqa_question.csv").write_text("gif_name\tquestion\tanswer\n" + "".join(rows))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with file_server(tmp_path) as (address, *_):
        (tmp_path / "links.tsv").write_text("".join(f"{address}/gif{n}.gif\n" for n in range(GIFS)))
        process = start(tmp_path, whole)
        most = [watch(process, whole)]
        assert process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
        most.append(watch(start(tmp_path, killed), killed, kill_after=25))
        assert not (killed / f"checkpoint-{STEPS}").exists()
        process = start(tmp_path, killed, "--resume")
        most.append(watch(process, killed))
        assert process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    record_property("bytes", f"{GIFS * SIZE} of GIFs, at most {most} on the disk, limit {LIMIT}")
    assert 0 < max(most) <= LIMIT <= GIFS * SIZE / 10
    assert len(losses_of(whole)) == STEPS and losses_of(killed) == losses_of(whole)
