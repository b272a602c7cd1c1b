"""Retrieval: recall at 1, 5 and 10, median and mean rank, from scores of queries against a gallery."""

import datasets
import evaluate
import numpy as np

from bt_adapter_hf.evaluation.retrieval import rank_metrics, retrieval_ranks


class VideoRetrieval(evaluate.Metric):
    """Ranks are 1 + the wrong items that score higher + half of those that score the same."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=(
                "predictions: for each query its scores against all items of the gallery, higher is better. "
                "references: for each query the number of the right item, from 0. reference_ties: count ties as the "
                "code released with BT-Adapter does."
            ),
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list, references: list, reference_ties: bool = False) -> dict[str, float]:
        scores = np.asarray(predictions, dtype=np.float32)
        return rank_metrics(retrieval_ranks(scores, references, range(scores.shape[1]), reference_ties))
