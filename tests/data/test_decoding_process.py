"""Decoders that hang or crash, for real: in C, with the interpreter's lock held."""

import ctypes
import faulthandler
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import psutil
import pytest
import torch

from bt_adapter_hf.data import decoding_process, pairs
from bt_adapter_hf.data.decoding_process import DecodingProcess
from bt_adapter_hf.data.pairs import PairCollator, PairDataset, load_table
from bt_adapter_hf.models.video_errors import VideoDecodeError, VideoNotFoundError, VideoTimeoutError
from tests import tiny_pairs


# Functions called through PyDLL keep the interpreter's lock: no thread, signal handler or timer of Python runs.
HANGING = ctypes.PyDLL(None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def work(what, *args):
    if what == "hang":
        HANGING.sleep(60)
    if what == "crash":
        faulthandler.disable()  # pytest's would print all of its stack
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exit":
        os._exit(3)
    if what == "missing":
        raise VideoNotFoundError("x.mp4 does not exist.")
    if what == "unpicklable":
        return lambda: None
    return what, os.getpid(), *args


@pytest.fixture(autouse=True)
def no_children_of_other_tests():
    gc.collect()  # a data set ends its child when it is collected
    assert children() == []


def children() -> list[int]:
    """Processes that decode; other tests may have left others, such as multiprocessing's resource tracker."""
    mine = psutil.Process().cmdline()
    return [child.pid for child in psutil.Process().children() if child.cmdline() == mine]


@pytest.mark.parametrize("shared", [1 << 26, 1000], ids=["shared memory", "pipe"])
def test_results_come_from_one_child(shared, monkeypatch):
    process = DecodingProcess(work, timeout=20)
    array = np.random.default_rng(0).integers(0, 255, (9, 300, 400, 3), np.uint8)
    empty = np.zeros((0, 3), np.float32)
    monkeypatch.setattr(decoding_process, "SHARED_BYTES", shared)
    answers = [process("ok", array, empty) for _ in range(3)]
    assert {answer[1] for answer in answers} == set(children()) and os.getpid() not in children()
    for _, _, same, nothing in answers:
        assert np.array_equal(same, array) and same.flags.writeable and nothing.shape == (0, 3)
    process.close()
    assert children() == []


def test_a_hang_that_holds_the_lock_is_cut_off():
    process = DecodingProcess(work, timeout=0.5)
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(VideoTimeoutError, match="longer than 0.5 s and was cut off"):
            process("hang")
    assert time.monotonic() - started < 10
    assert process("ok")[0] == "ok"  # by a fresh child
    assert len(children()) == 1
    process.close()


@pytest.mark.parametrize("what, how", [("crash", "signal SIGSEGV"), ("exit", "exit code 3")])
def test_a_crash_is_an_error_of_the_video(what, how):
    process = DecodingProcess(work, timeout=20)
    with pytest.raises(VideoDecodeError, match=f"ended the process that decodes .{how}"):
        process(what)
    assert process("ok")[0] == "ok"
    process.close()


def test_errors_keep_their_class_and_say_where_they_came_from():
    process = DecodingProcess(work, timeout=20)
    with pytest.raises(VideoNotFoundError, match="x.mp4 does not exist") as error:
        process("missing")
    assert "in work" in error.value.__notes__[0]
    with pytest.raises(RuntimeError, match="cannot be handed over"):
        process("unpicklable")
    with pytest.raises(TypeError, match="missing 1 required positional"):
        process()
    assert process("ok")[0] == "ok"
    process.close()


def test_a_child_that_was_killed_meanwhile_is_started_again():
    process = DecodingProcess(work, timeout=20)
    os.kill(process("ok")[1], signal.SIGKILL)
    time.sleep(0.2)
    assert process("ok")[0] == "ok"
    process.close()


def test_bad_limits(monkeypatch):
    with pytest.raises(ValueError, match="item_timeout=0 must be a number of seconds above 0"):
        DecodingProcess(work, timeout=0)
    monkeypatch.delattr(os, "fork")  # as on Windows
    with pytest.raises(ValueError, match="Use item_timeout=None"):
        DecodingProcess(work, timeout=1)


ORPHAN = """
import ctypes, os
from bt_adapter_hf.data.decoding_process import DecodingProcess

def work(hang):
    if hang:
        ctypes.PyDLL(None).sleep(60)
    return os.getpid()

process = DecodingProcess(work, timeout=600)
print(process(False), flush=True)
process(True)
"""


def test_no_child_outlives_a_killed_parent():
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        time.sleep(0.3)  # it hangs
        assert psutil.pid_exists(child)
        parent.kill()
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.05)


# In the dataset


@pytest.fixture
def with_a_hang(tmp_path, monkeypatch):
    """Eight clips, of which the decoder hangs on the fourth."""
    tiny_pairs.write_table(tmp_path)
    load_video = pairs.load_video

    def hang_on_one(video, **options):
        if str(video).endswith("clip3.mp4"):
            HANGING.sleep(60)
        return load_video(video, **options)

    monkeypatch.setattr(pairs, "load_video", hang_on_one)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_video_that_hangs_is_a_broken_item(with_a_hang, workers):
    dataset = PairDataset(load_table(with_a_hang), tiny_pairs.processor(), training=True, item_timeout=2.0)
    loader = torch.utils.data.DataLoader(
        dataset, 4, collate_fn=PairCollator(tiny_pairs.processor()), num_workers=workers
    )
    started = time.monotonic()
    batches = list(loader)
    assert time.monotonic() - started < 30
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4]
    (record,) = [record for batch in batches for record in batch["broken"]]
    assert (record["index"], record["video"]) == (3, "clip3.mp4") and "longer than 2 s" in record["reason"]
    if workers:
        del loader
        assert not [child for child in psutil.Process().children(recursive=True) if child.status() == "running"]


def test_the_time_limit_changes_no_item(tmp_path):
    tiny_pairs.write_table(tmp_path)
    shutil.copy(tmp_path / "clip0.mp4", tmp_path / "broken.mp4")
    (tmp_path / "clip2.mp4").write_bytes(b"garbage" * 50)
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "t.jsonl").write_text("\n".join([*lines, json.dumps({"video": "absent.mp4", "text": "x"})]))
    options = {"training": True, "crop_scale": (0.3, 1.0), "seed": 5}
    table = load_table(tmp_path)
    limited = PairDataset(table, tiny_pairs.processor(), **options)
    free = PairDataset(table, tiny_pairs.processor(), item_timeout=None, **options)
    for index in [(epoch, row) for epoch in range(2) for row in range(8)]:
        a, b = limited[index], free[index]
        assert torch.equal(a.pop("pixel_values_videos"), b.pop("pixel_values_videos")) and a == b
    assert limited[2]["broken"][0]["video"] == "clip2.mp4"
