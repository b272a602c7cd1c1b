import math

import numpy as np
import pytest

from bt_adapter_hf.search.moments import Windows, clock, pick_frames, shared, span_text, suppress


@pytest.mark.parametrize(
    ("window", "stride", "frames", "duration"),
    [(8, 4, 8, 100), (8, 8, 8, 30.5), (8, 2.5, 8, 61.3), (2, 0.1, 8, 7.77), (3, 1, 5, 3), (5, 5, 16, 5.2)],
)
def test_windows_lie_on_one_grid_and_cover_the_film(window, stride, frames, duration):
    grid, starts, step = Windows(window, stride).plan(duration, frames)
    assert step * grid * frames == pytest.approx(window)  # its frames, evenly
    seconds = [start * grid for start in starts]
    assert seconds == sorted(set(seconds))
    assert seconds[0] == 0
    assert duration - grid - 1e-5 <= seconds[-1] + window <= duration + 1e-5
    gaps = np.diff(seconds)
    assert (gaps <= stride + grid + 1e-6).all()  # as asked for, to the grid
    assert len(starts) <= math.floor((duration - window) / stride + 1e-6) + 2


def test_overlapping_windows_share_their_frames():
    _, starts, step = Windows(8, 4).plan(800, 8)
    points = np.array(starts)[:, None] + step * np.arange(8)
    assert len(np.unique(points)) == 800  # one a second, as without overlap
    _, starts, step = Windows(8, 8).plan(800, 8)
    assert len(np.unique(np.array(starts)[:, None] + step * np.arange(8))) == 800


def test_short_videos_are_whole():
    windows = Windows(8, 4)
    assert [windows.fits(duration) for duration in (None, 7.9, 8.0, 9)] == [False, False, True, True]


@pytest.mark.parametrize(("window", "stride"), [(0, 1), (8, 0), (8, -1), (math.inf, 1), (8, math.nan), (8, 1e-7)])
def test_bad_lengths(window, stride):
    with pytest.raises(ValueError, match="expected a number of seconds, 0.01 or more"):
        Windows(window, stride)


def test_a_stride_that_leaves_gaps():
    with pytest.raises(ValueError, match="stride=9 is longer than window=8"):
        Windows(8, 9)


def test_frames_at_points_of_time():
    times = np.array([0.0, 0.1, 0.5, 0.6])
    assert pick_frames(times, np.array([0, 0.09, 0.1, 0.49, 0.55, 9])).tolist() == [0, 0, 1, 1, 2, 3]
    thirds = np.arange(30) / 3
    assert pick_frames(thirds, np.arange(0, 10)).tolist() == list(range(0, 30, 3))


def test_shared_time():
    assert shared((0, 8), (4, 12)) == pytest.approx(1 / 3)
    assert shared((0, 8), (8, 16)) == 0
    assert shared((0, 8), (0, 8)) == 1
    assert shared((0, math.inf), (0, math.inf)) == 1


def test_suppress_keeps_the_best_of_each_heap():
    rows = [("a", 4), ("a", 0), ("b", 0), ("a", 8), ("a", 12)]
    hits = [(1 - i / 10, {"path": path, "start": start, "end": start + 8}) for i, (path, start) in enumerate(rows)]

    def kept(**options) -> list[tuple[str, int]]:
        return [(row["path"], row["start"]) for _, row in suppress(hits, **options)]

    assert kept() == [("a", 4), ("b", 0), ("a", 12)]
    assert kept(overlap=0.5) == rows
    assert kept(per_video=True) == [("a", 4), ("b", 0)]


@pytest.mark.parametrize(
    ("start", "end", "text"),
    [(41, 49, "00:41-00:49"), (3599, 3607, "59:59-1:00:07"), (1.5, 3.5, "00:01.5-00:03.5"), (0, None, "00:00-")],
)
def test_times_in_print(start, end, text):
    assert span_text(start, end) == text
    assert clock(59.97) == "01:00"
