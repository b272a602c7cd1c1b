"""Our metrics as modules of `evaluate`, loaded from their folders, against their functions."""

import numpy as np
import pytest

from bt_adapter_hf.evaluation.metrics import METRICS, metric_path
from bt_adapter_hf.evaluation.retrieval import rank_metrics, retrieval_ranks
from bt_adapter_hf.evaluation.temporal import temporal_values


evaluate = pytest.importorskip("evaluate")


@pytest.fixture(autouse=True, scope="module")
def caches(tmp_path_factory):
    """Folders of the run; `evaluate` imports from the first one that it is given."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(folder / "modules"))
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(folder / "metrics"))
        yield


def test_retrieval(tmp_path):
    metric = evaluate.load(metric_path("video_retrieval"), cache_dir=str(tmp_path))
    scores = np.random.default_rng(0).integers(0, 5, (12, 9)).astype(np.float32)
    right = np.arange(12) % 9
    assert metric.compute(predictions=scores, references=right) == rank_metrics(
        retrieval_ranks(scores, right, range(9))
    )
    for row, number in zip(scores, right, strict=True):
        metric.add(prediction=row, reference=number)
    tied = metric.compute(reference_ties=True)
    assert tied == rank_metrics(retrieval_ranks(scores, right, range(9), True))


def test_temporal_order(tmp_path):
    metric = evaluate.load(metric_path("temporal_order"), cache_dir=str(tmp_path))
    items = [[[0.9, 0.1], [0.2, 0.8]], [[0.9, 0.1], [0.8, 0.2]], [[0.5, 0.5, 0.1]]]
    found = metric.compute(predictions=items, references=[2, 2, 1])
    values = [temporal_values(item) for item in items]
    assert found["pair"] == pytest.approx(100 * np.mean([value["pair"] for value in values]))
    assert found["group"] == 50
    with pytest.raises(ValueError, match="2 clips has 1 rows"):
        metric.compute(predictions=[[[0.5, 0.5]]], references=[2])
    with pytest.raises(ValueError, match=f"there are {METRICS[0]}"):
        metric_path("bleu")
