import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bt_adapter_hf.cli.main import main
from bt_adapter_hf.hub.machine import processes_now
from bt_adapter_hf.search.index import VideoIndex
from bt_adapter_hf.search.ranks import encode_together
from tests import tiny_pairs
from tests.evaluation.forks import in_processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are copies of this one")
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("count", [0, 1, 11])
def test_each_process_encodes_its_part_and_the_first_has_all(tmp_path, count):
    def run() -> None:
        rank, processes, _ = processes_now()
        assert processes == 2
        paths = [f"{number}.mp4" for number in range(count)] if rank == 0 else None
        done = list(encode_together(paths, lambda part: ((path, rank) for path in part)))
        (tmp_path / str(rank)).write_text(json.dumps(done))

    assert in_processes(run) == [0, 0]
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert second == []
    assert sorted(first) == sorted([f"{number}.mp4", number % 2] for number in range(count))


def contents(folder) -> dict:
    index = VideoIndex.load(folder)
    assert len(index) == len({(row["path"], row["start"]) for row in index.rows})  # none twice
    return {
        (row["path"], row["start"]): (row, feature) for row, feature in zip(index.rows, index.features, strict=True)
    }


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "options"),
    [(TORCHRUN, []), (TORCHRUN, ["--window", "0.4", "--stride", "0.2"]), (ACCELERATE, ["--window", "0.4"])],
    ids=["torchrun", "torchrun-moments", "accelerate-moments"],
)
def test_a_launcher_writes_one_table(tiny_checkpoint, clips, tmp_path, launcher, options):
    """The rows and the skipped files of one process, none twice; a second run has nothing to do."""
    for number in range(9):
        tiny_pairs.write_clip(clips / f"{number}.mp4", (20 * number, 200, 100), step=number)
    argv = ["index", str(clips), "--model", str(tiny_checkpoint), "--device", "cpu", "--workers", "1", *options]
    for added in (13, 0):
        command = [sys.executable, "-m", *launcher, "-m", "bt_adapter_hf.cli.main", *argv, "-o", str(tmp_path / "two")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert f"{added} videos added" in done.stdout
    assert main([*argv, "-o", str(tmp_path / "one")]) == 0
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, (row, feature) in one.items():
        assert two[key][0] == row
        np.testing.assert_allclose(two[key][1], feature, atol=1e-5)
    skipped = [(tmp_path / name / "skipped.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert sorted(map(json.loads, skipped[0]), key=str) == sorted(map(json.loads, skipped[1]), key=str)
