"""Order, bounds and threads of what encodes many videos."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bt_adapter_hf.hub.machine import torch_threads
from bt_adapter_hf.search import encoding
from bt_adapter_hf.search.encoding import VideoEncoder
from bt_adapter_hf.search.pipeline import Stopwatch, in_order


def test_results_come_in_order_and_a_few_ahead():
    begun = []

    def work(number):
        begun.append(number)
        time.sleep(0.002 * (number % 3))
        return number

    with ThreadPoolExecutor(3) as pool:
        for number, result in enumerate(in_order(pool, work, range(30), ahead=5)):
            assert result == number and len(begun) <= number + 5
        results = in_order(pool, lambda number: 1 // number, [1, 0, 1], ahead=2)
        assert next(results) == 1
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_shares():
    stopwatch = Stopwatch()
    assert stopwatch.shares() == {}
    stopwatch.seconds.update(decode=3.0, tower=1.0)
    assert stopwatch.shares() == {"decode": 0.75, "tower": 0.25}


def test_a_stage_inside_another_is_not_counted_twice():
    stopwatch = Stopwatch()
    start = time.perf_counter()
    with stopwatch("decode"):
        time.sleep(0.01)
        for _ in range(2):
            with stopwatch("preprocess"), stopwatch("inside"):
                time.sleep(0.05)
    passed = time.perf_counter() - start
    assert sum(stopwatch.seconds.values()) <= passed
    assert stopwatch.seconds["inside"] >= 0.1
    assert stopwatch.seconds["decode"] <= passed - 0.1 and stopwatch.seconds["preprocess"] <= passed - 0.11


@pytest.mark.parametrize(("workers", "threads", "size"), [(None, 1, 1), (2, 2, 2), (1, 4, 4), (8, 1, 1)])
def test_threads_of_python_and_torch_are_not_more_than_the_cores(
    tiny_checkpoint, clips, monkeypatch, workers, threads, size
):
    """On a CPU; eight workers on four cores were asked for."""
    encoder = VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu")
    monkeypatch.setattr(encoding, "available_cores", lambda: 4)
    seen, original = [], encoder.model.get_video_features

    def features(pixel_values, **kwargs):
        seen.append((torch.get_num_threads(), len(pixel_values), threading.current_thread().name))
        return original(pixel_values, **kwargs)

    monkeypatch.setattr(encoder.model, "get_video_features", features)
    paths = [str(clips / "red.mp4")] * 9
    with torch_threads(torch.get_num_threads()):
        torch.set_num_threads(4)
        encoded = list(encoder.encode_videos(paths, batch_size=4, workers=workers))
        assert torch.get_num_threads() == 4  # as before
    assert [video.path for video in encoded] == paths
    assert {count for count, _, _ in seen} == {threads}
    assert max(videos for _, videos, _ in seen) == size
    assert len({name for _, _, name in seen}) <= (workers or 4)
    assert encoder.stopwatch.seconds.keys() == {"decode", "preprocess", "transfer", "tower"}


def test_beside_an_accelerator_the_next_batch_is_begun_before_one_is_waited_for(tiny_checkpoint, clips, monkeypatch):
    encoder = VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu")
    names = ["red.mp4", "green.mp4", "garbage.avi", "blue.MP4", "grey.gif"]
    paths = [str(path) for name in names for path in clips.rglob(name)]
    expected = list(encoder.encode_videos(paths))
    steps, start, finish = [], encoder._start, encoder._finish
    monkeypatch.setattr(encoder, "_start", lambda *args: steps.append("start") or start(*args))
    monkeypatch.setattr(encoder, "_finish", lambda *args: steps.append("finish") or finish(*args))
    found = list(encoder._encode_stream(map(encoder.prepare, paths), batch_size=2))
    assert steps == ["start", "start", "finish", "start", "finish", "finish"]
    for video, other in zip(found, expected, strict=True):
        assert video.path == other.path and type(video.error) is type(other.error)
        if other.error is None:
            assert abs(video.feature - other.feature).max() < 1e-6
