import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from bt_adapter_hf.evaluation.retrieval import cosine_similarity, rank_metrics, retrieval_metrics, retrieval_ranks
from bt_adapter_hf.evaluation.retrieval_run import chance_of_recall


GOLDEN = Path(__file__).parent.parent / "data" / "golden"
EXPECTED = json.loads((GOLDEN / "metrics.json").read_text())["values"]
TENSORS = load_file(GOLDEN / "metrics.safetensors")


def naive_rank(scores, right):
    """Average over the two extreme ways of breaking ties, by sorting, for one row."""
    best = max(scores[i] for i in right)
    wrong = [score for i, score in enumerate(scores) if i not in right]
    optimistic = 1 + sum(score > best for score in wrong)
    pessimistic = 1 + sum(score >= best for score in wrong)
    return (optimistic + pessimistic) / 2


def released_ranks(similarity):
    """The released rule, by sorting: all positions of the row at which the diagonal's value stands."""
    ranks = []
    for row in range(len(similarity)):
        ordered = np.sort(similarity[row])[::-1]
        ranks.extend(np.flatnonzero(ordered == similarity[row, row]) + 1)
    return np.array(ranks)


@pytest.mark.parametrize("case, video", [("retrieval", "video"), ("retrieval_ties", "video_ties")])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_equals_the_released_metrics(case, video, kind):
    metrics = retrieval_metrics(kind(TENSORS["text"]), kind(TENSORS[video]), reference_ties=True)
    assert {name: metrics[f"t2v_{name}"] for name in EXPECTED[case]} == pytest.approx(EXPECTED[case], abs=1e-12)


def test_tie_rules_agree_where_nothing_is_tied_and_differ_where_something_is():
    text, video, ties = (TENSORS[name] for name in ("text", "video", "video_ties"))
    assert retrieval_metrics(text, video) == retrieval_metrics(text, video, reference_ties=True)
    assert retrieval_metrics(text, ties) != retrieval_metrics(text, ties, reference_ties=True)


@pytest.mark.parametrize("levels", [2, 5, 10_000])
def test_ranks_against_sorting(levels):
    scores = np.random.default_rng(levels).integers(0, levels, (30, 30)).astype(np.float32)
    expected = [naive_rank(scores[i], {i}) for i in range(30)]
    np.testing.assert_array_equal(retrieval_ranks(scores), expected)
    np.testing.assert_array_equal(
        np.sort(retrieval_ranks(scores, reference_ties=True)), np.sort(released_ranks(scores))
    )


def test_many_to_one_in_both_directions():
    rng = np.random.default_rng(0)
    text, video = rng.normal(size=(12, 6)), rng.normal(size=(5, 6))
    text_ids, video_ids = rng.integers(0, 5, 12), np.arange(5)
    text_ids[:5] = np.arange(5)
    scores = cosine_similarity(text, video)
    metrics = retrieval_metrics(text, video, text_ids, video_ids)
    t2v = [naive_rank(scores[i], {text_ids[i]}) for i in range(12)]
    v2t = [naive_rank(scores[:, j], set(np.flatnonzero(text_ids == j))) for j in range(5)]
    assert metrics["t2v_MnR"] == pytest.approx(np.mean(t2v)) and metrics["v2t_MnR"] == pytest.approx(np.mean(v2t))
    assert metrics["v2t_R1"] == 100 * np.mean(np.array(v2t) <= 1)


def test_a_blind_model_scores_at_chance():
    ranks = retrieval_ranks(np.zeros((100, 100), np.float32))
    assert rank_metrics(ranks) == {"R1": 0.0, "R5": 0.0, "R10": 0.0, "MdR": 50.5, "MnR": 50.5}
    assert rank_metrics(retrieval_ranks(np.zeros((100, 100)), reference_ties=True))["R1"] == 1.0


def test_cosine_is_float32_and_equal_for_equal_features():
    rng = np.random.default_rng(1)
    gallery = np.repeat(rng.normal(size=(1, 513)), 1001, axis=0).astype(np.float32)
    scores = cosine_similarity(3 * rng.normal(size=(7, 513)), gallery)
    assert scores.dtype == np.float32 and (scores == scores[:, :1]).all() and np.abs(scores).max() <= 1
    half = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    np.testing.assert_allclose(np.diag(cosine_similarity(half, half)), 1, rtol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: retrieval_ranks(np.full((2, 2), np.nan)), "4 NaN scores"),
        (lambda: retrieval_ranks(np.zeros((2, 0))), "both at least 1"),
        (lambda: retrieval_ranks(np.zeros((3, 2))), "1 of 3 queries have no right item"),
        (lambda: retrieval_ranks(np.zeros((2, 2)), [0, 1], [0]), "2 query ids and 1 gallery ids"),
        (lambda: retrieval_ranks(np.zeros((2, 2)), [0, 1]), "or neither"),
        (lambda: retrieval_ranks(np.zeros((1, 2)), [0], [0, 0], reference_ties=True), "exactly one right item"),
        (lambda: retrieval_metrics(np.ones((2, 3)), np.ones((2, 4))), "width 3 but the gallery has width 4"),
        (lambda: retrieval_metrics(np.array([[1.0, np.nan]]), np.ones((1, 2))), "queries holds NaN"),
        (lambda: retrieval_metrics(np.ones((1, 2)), np.zeros((1, 2))), "row 0 is all zeros"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_chance_of_recall():
    found = chance_of_recall(np.array([1, 3]), 4)  # of four: the only right one first; one of three first
    assert found["R1"] == pytest.approx(100 * (1 / 4 + 3 / 4) / 2)
    assert found["R5"] == found["R10"] == 100
    assert chance_of_recall(np.array([2]), 20)["R5"] == pytest.approx(100 * (1 - 15 * 14 / (20 * 19)))
