"""Intervals and paired tests against naive versions, and against what they must mean."""

import numpy as np
import pytest
from scipy import stats

from bt_adapter_hf.evaluation.statistics import FEWEST_VIDEOS, compare, mean_interval, median_interval


def naive(values, videos, statistic, draws, seed):
    """Draws videos with all their items, as lists."""
    values, names = np.asarray(values, float), list(dict.fromkeys(videos))
    items = {name: [v for v, w in zip(values, videos, strict=True) if w == name] for name in names}
    generator = np.random.default_rng(seed)
    results = []
    for start in range(0, draws, 200):
        for counts in generator.multinomial(len(names), [1 / len(names)] * len(names), size=min(200, draws - start)):
            drawn = [v for name, count in zip(names, counts, strict=True) for v in items[name] * count]
            results.append(statistic(drawn))
    return statistic(values), *np.quantile(results, [0.025, 0.975])


@pytest.mark.parametrize(("interval", "statistic"), [(mean_interval, np.mean), (median_interval, np.median)])
def test_intervals_equal_the_naive_ones(interval, statistic):
    generator = np.random.default_rng(0)
    videos = [f"v{number}" for number in generator.integers(0, 12, size=40)]
    values = generator.integers(1, 9, size=40)
    found = interval(values, videos, draws=450, seed=3)
    np.testing.assert_allclose([found.value, found.low, found.high], naive(values, videos, statistic, 450, 3))


def test_the_interval_of_independent_items_is_that_of_scipy():
    values = np.random.default_rng(1).random(200)
    found = mean_interval(values, draws=4000)
    expected = stats.bootstrap((values,), np.mean, method="percentile", rng=5, n_resamples=4000).confidence_interval
    np.testing.assert_allclose([found.low, found.high], expected, atol=0.006)


def test_items_of_one_video_stand_together():
    """Ten copies of each item know no more than one copy."""
    values = np.random.default_rng(2).random(50)
    once, copies = (
        mean_interval(values, seed=4),
        mean_interval(np.repeat(values, 10), np.repeat(range(50), 10), seed=4),
    )
    apart = mean_interval(np.repeat(values, 10), seed=4)
    np.testing.assert_allclose([once.low, once.high], [copies.low, copies.high])
    assert apart.high - apart.low < (once.high - once.low) / 2


def test_nineteen_of_twenty_intervals_hold_the_truth():
    generator = np.random.default_rng(3)
    held = [
        found.low <= 0.3 <= found.high
        for found in (mean_interval(generator.random(150) < 0.3, draws=400, seed=n) for n in range(200))
    ]
    assert 0.90 <= np.mean(held) <= 0.99


def test_a_paired_test_sees_what_unpaired_intervals_do_not():
    """Wrong wherever the first is, and on 8 of 400 more: the intervals overlap, the difference is sure."""
    first = np.arange(400) % 2
    second = first.copy()
    second[np.flatnonzero(first)[:8]] = 0
    found = compare(first, second)
    assert mean_interval(second).high > mean_interval(first).low
    assert found.difference.value == pytest.approx(0.02) and found.difference.low > 0
    assert found.p_mcnemar == pytest.approx(2 * 0.5**8) and found.p_bootstrap < 0.01
    assert compare(first, first).p_mcnemar == 1.0 and compare(first, first).p_bootstrap == 1.0
    assert compare(first * 0.5, second * 0.5).p_mcnemar is None


def test_few_videos_are_too_few_for_a_bootstrap_test():
    """Three videos that agree would be p = 0.001 by a bootstrap, and are 0.25 by any exact test."""
    assert compare([1, 1, 1], [0, 0, 0]).p_bootstrap is None
    assert compare([1, 1, 1], [0, 0, 0]).p_mcnemar == pytest.approx(0.25)
    # many questions about few videos are few videos
    assert compare(np.ones(90), np.zeros(90), np.arange(90) % 29).p_bootstrap is None
    assert compare(np.ones(90), np.zeros(90), np.arange(90) % FEWEST_VIDEOS).p_bootstrap < 0.01


def test_from_that_number_on_equal_models_are_rarely_called_different():
    generator = np.random.default_rng(5)
    called = [
        compare(first, second, draws=400).p_bootstrap < 0.05
        for first, second in (generator.normal(size=(2, FEWEST_VIDEOS)) for _ in range(300))
    ]
    assert np.mean(called) < 0.1


@pytest.mark.parametrize(
    ("values", "videos", "words"),
    [([], None, "at least one item"), ([1, np.nan], None, "NaN"), ([1, 0], ["a"], "video of each value")],
)
def test_bad_input(values, videos, words):
    with pytest.raises(ValueError, match=words):
        mean_interval(values, videos)
    with pytest.raises(ValueError, match="same items"):
        compare([1, 0], [1])
