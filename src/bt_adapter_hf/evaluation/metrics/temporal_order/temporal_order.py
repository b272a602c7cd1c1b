"""Whether texts that only the order of frames tells apart find their clips: pair accuracy and group score, in %."""

import datasets
import evaluate
import numpy as np

from bt_adapter_hf.evaluation.temporal import temporal_values


class TemporalOrder(evaluate.Metric):
    """Of items of n clips and m >= n texts, clip i showing text i; equal best scores share the hit."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=(
                "predictions: for each item the scores of its clips against its texts, n rows of m. references: the "
                "number of clips of each item, n."
            ),
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        for scores, clips in zip(predictions, references, strict=True):
            if len(scores) != clips:
                raise ValueError(f"An item of {clips} clips has {len(scores)} rows of scores.")
        values = [temporal_values(scores) for scores in predictions]
        names = ("pair", "text", "video", "group")
        found = {name: [value[name] for value in values if name in value] for name in names}
        return {name: 100 * float(np.mean(each)) for name, each in found.items() if each}
