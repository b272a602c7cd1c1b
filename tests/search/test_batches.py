import pickle
import shutil
import signal

import numpy as np
import pytest

from bt_adapter_hf.search.batches import EncodeVideos, write_rows
from bt_adapter_hf.search.encoding import VideoEncoder
from bt_adapter_hf.search.files import find_videos
from bt_adapter_hf.search.index import VideoIndex
from bt_adapter_hf.search.moments import Windows
from bt_adapter_hf.search.writer import IndexWriter


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


@pytest.fixture
def time_limit():
    """Ray waits without end for what it cannot place."""

    def stop(*_) -> None:
        raise TimeoutError("no rows for ten minutes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(600)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.usefixtures("time_limit")
def test_a_local_ray_cluster_loses_a_worker(tiny_checkpoint, clips, tmp_path):
    """Two workers, one of which is killed in mid-run: the rows of one process, none twice."""
    ray = pytest.importorskip("ray")
    for number in range(12):
        shutil.copy(clips / "red.mp4", clips / f"{number}.mp4")
    encoder = VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu")
    paths = find_videos([clips])
    with IndexWriter(tmp_path / "one", encoder) as writer:
        writer.update(paths)
    mark = tmp_path / "killed"

    class Killed(EncodeVideos):
        def __call__(self, batch):
            import os
            import signal

            if "5.mp4" in " ".join(map(str, batch["path"])) and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    ray.init(num_cpus=2, include_dashboard=False, ignore_reinit_error=True)
    try:
        rows = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=6).map_batches(
            Killed,
            fn_constructor_kwargs={"model": str(tiny_checkpoint), "device": "cpu"},
            batch_size=3,
            compute=ray.data.ActorPoolStrategy(size=2),
            max_restarts=4,
            max_task_retries=4,
        )
        with IndexWriter(tmp_path / "many", encoder) as writer:
            for batch in rows.iter_batches(batch_size=None):
                write_rows(writer, batch)
    finally:
        ray.shutdown()
    assert mark.exists()
    one, many = contents(tmp_path / "one"), contents(tmp_path / "many")
    assert one.keys() == many.keys()
    assert len(VideoIndex.load(tmp_path / "many")) == len(many)
    for key, (row, feature) in one.items():
        assert many[key][0] == row
        np.testing.assert_allclose(many[key][1], feature, atol=1e-5)
