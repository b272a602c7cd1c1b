import importlib.util
import json
import pickle
import platform
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from bt_adapter_hf.search.batches import EncodeVideos, write_rows
from bt_adapter_hf.search.encoding import VideoEncoder
from bt_adapter_hf.search.files import find_videos
from bt_adapter_hf.search.index import VideoIndex
from bt_adapter_hf.search.moments import Windows
from bt_adapter_hf.search.writer import IndexWriter


EXAMPLE = Path(__file__).parents[2] / "examples" / "index_with_ray.py"


def contents(folder) -> dict:
    index = VideoIndex.load(folder)
    return {
        (row["path"], row["start"]): (row, feature) for row, feature in zip(index.rows, index.features, strict=True)
    }


@pytest.mark.parametrize("windows", [None, (0.4, 0.2)])
def test_batches_of_workers_make_the_same_table(tiny_checkpoint, clips, tmp_path, windows):
    encoder = VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu")
    cut = windows and Windows(*windows)
    paths = find_videos([clips])
    with IndexWriter(tmp_path / "one", encoder, cut) as writer:
        writer.update(paths)
    worker = EncodeVideos(str(tiny_checkpoint), windows, device="cpu")
    worker = pickle.loads(pickle.dumps(worker))  # as it travels
    with IndexWriter(tmp_path / "many", encoder, cut) as writer:
        for start in (0, 2, 4, 2):  # one batch comes twice
            batch = worker({"path": np.array(paths[start : start + 2])})
            assert len({len(values) for values in batch.values()}) == 1
            write_rows(writer, batch)
    assert {line["path"] for line in writer.skipped} == {str(clips / "empty.mp4"), str(clips / "garbage.avi")}
    one, many = contents(tmp_path / "one"), contents(tmp_path / "many")
    assert one.keys() == many.keys()
    for key, (row, feature) in one.items():
        assert many[key][0] == row
        np.testing.assert_allclose(many[key][1], feature, atol=1e-5)


def test_a_dataset_maps_it(tiny_checkpoint, clips):
    datasets = pytest.importorskip("datasets")
    worker = EncodeVideos(str(tiny_checkpoint), device="cpu")
    rows = datasets.Dataset.from_dict({"path": find_videos([clips])}).map(worker, batched=True, batch_size=4)
    assert [row["reason"] is None for row in rows] == [False, False, True, True, True, True]
    assert len(rows[2]["vector"]) == 12


def test_a_worker_without_the_model_says_so(clips, tmp_path):
    with pytest.raises(OSError, match=f"the worker on {platform.node()} has no model '{tmp_path / 'gone'}'"):
        EncodeVideos(str(tmp_path / "gone"))({"path": find_videos([clips])})


@pytest.fixture
def cluster():
    """A local one of two workers, which is given up where it does not get on: Ray waits without end for what it
    cannot place."""
    ray = pytest.importorskip("ray")

    def stop(*_) -> None:
        raise TimeoutError("no rows for ten minutes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(600)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("cluster")
def test_a_ray_cluster_loses_a_worker(tiny_checkpoint, clips, tmp_path, monkeypatch):
    """The example on two workers, one of which is killed in mid-run: the rows of one process, none twice."""
    for number in range(12):
        shutil.copy(clips / "red.mp4", clips / f"{number}.mp4")
    with IndexWriter(tmp_path / "one", VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu")) as writer:
        writer.update(find_videos([clips]))
    mark = tmp_path / "killed"

    class Killed(EncodeVideos):
        def __call__(self, batch):
            import os
            import signal

            if "5.mp4" in " ".join(map(str, batch["path"])) and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    spec = importlib.util.spec_from_file_location("index_with_ray", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "EncodeVideos", Killed)
    argv = [str(clips), "-o", str(tmp_path / "many"), "--model", str(tiny_checkpoint), "--batch-size", "3"]
    monkeypatch.setattr(sys, "argv", ["index_with_ray.py", *argv])
    example.main()
    assert mark.exists()
    one, many = contents(tmp_path / "one"), contents(tmp_path / "many")
    assert one.keys() == many.keys()
    assert len(VideoIndex.load(tmp_path / "many")) == len(many)
    for key, (row, feature) in one.items():
        assert many[key][0] == row
        np.testing.assert_allclose(many[key][1], feature, atol=1e-5)
    lines = [(tmp_path / name / "skipped.jsonl").read_text().splitlines() for name in ("one", "many")]
    one, many = ({json.loads(line)["path"] for line in some} for some in lines)
    assert one == many == {str(clips / "empty.mp4"), str(clips / "garbage.avi")}
