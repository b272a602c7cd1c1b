"""Scores of temporal items, against definitions written out by hand."""

from itertools import permutations

import numpy as np
import pytest

from bt_adapter_hf.evaluation.temporal import TemporalItem, temporal_chance, temporal_scores, temporal_values


def test_two_clips_and_each_others_text():
    right = [[0.9, 0.1], [0.2, 0.8]]
    assert temporal_values(right) == {"pair": 1, "text": 1, "video": 1, "group": 1}
    one_text_for_both = [[0.9, 0.1], [0.8, 0.2]]
    assert temporal_values(one_text_for_both) == {"pair": 0.5, "text": 0, "video": 1, "group": 0}
    one_clip_for_both = [[0.9, 0.8], [0.1, 0.2]]
    assert temporal_values(one_clip_for_both) == {"pair": 1, "text": 1, "video": 0, "group": 0}
    assert temporal_values([[0.1, 0.9], [0.8, 0.2]]) == {"pair": 0, "text": 0, "video": 0, "group": 0}


def test_who_sees_no_difference_gets_chance():
    """All scores equal, as for a model that averages frames, and a clip beside its reverse: half of each pair."""
    assert temporal_values(np.zeros((2, 2))) == {"pair": 0.5, "text": 0.25, "video": 0.25, "group": 0.0625}
    assert temporal_values(np.zeros((1, 4))) == {"pair": 0.25, "text": 0.25}


@pytest.mark.parametrize(("clips", "texts"), [(1, 2), (1, 4), (2, 2), (2, 3)])
def test_chance_is_the_mean_over_all_orders(clips, texts):
    found = temporal_chance(clips, texts)
    all_orders = [temporal_values(np.reshape(p, (clips, texts))) for p in permutations(range(clips * texts))]
    for name, value in found.items():
        assert value == pytest.approx(np.mean([values[name] for values in all_orders]), abs=0.01), name


def test_scores_by_aspect_and_over_sources():
    items = [TemporalItem((f"v{n}",), ("up", "down"), "direction" if n % 4 else "order", n // 2) for n in range(40)]
    items += [TemporalItem((f"w{n}", f"w{n}-reversed"), ("open", "close"), "reverse") for n in range(10)]
    scores = [np.array([[1.0, 0.0]]) if n % 2 else np.array([[0.0, 1.0]]) for n in range(40)] + [np.eye(2)] * 10
    found = temporal_scores(items, scores)
    assert found.keys() == {"all", "direction", "order", "reverse"}
    assert found["order"].keys() == {"pair"} and found["reverse"].keys() == {"pair", "text", "video", "group"}
    assert found["order"]["pair"].interval.value == 0 and found["order"]["pair"].items == 10
    assert found["direction"]["pair"].interval.value == pytest.approx(100 * 2 / 3)
    assert found["all"]["pair"].interval.value == pytest.approx(60) and found["all"]["pair"].chance == 50
    assert found["all"]["group"].items == 10 and found["all"]["group"].chance == pytest.approx(100 / 6)
    # One right and one wrong item in each source: whichever sources are drawn, the mean is the same.
    pairs = temporal_scores(items[:40], scores[:40])["all"]["pair"].interval
    assert (pairs.low, pairs.value, pairs.high) == (50, 50, 50)


def test_bad_input():
    with pytest.raises(ValueError, match="two texts"):
        TemporalItem(("a",), ("only",))
    with pytest.raises(ValueError, match="must differ"):
        TemporalItem(("a",), ("same", "same"))
    with pytest.raises(ValueError, match="shape"):
        temporal_values([[1, 2], [3, 4], [5, 6]])
    with pytest.raises(ValueError, match=r"expected \(1, 2\)"):
        temporal_scores([TemporalItem(("a",), ("x", "y"))], [np.zeros((2, 2))])
