import numpy as np

from bt_adapter_hf.evaluation.moments import moment_scores


def test_scores_of_known_answers():
    spans = [(float(start), start + 4.0) for start in range(0, 40, 2)]
    features = np.eye(20, dtype=np.float32)
    texts = np.zeros((3, 20), np.float32)
    texts[0, 5] = 1  # finds 10-14
    texts[1, [5, 10]] = 1, 0.9  # the right one, 20-24, is second
    texts[2, 1] = 1  # finds 2-6
    truth = [
        {"start": 10.0, "end": 14.0, "opposite": (30.0, 34.0)},
        {"start": 20.0, "end": 24.0, "opposite": (10.0, 14.0)},
        {"start": 2.5, "end": 7.5, "opposite": None},
    ]
    a, b, c = moment_scores(texts, features, spans, truth)
    assert a == {"R1_iou50": 1, "R1_iou70": 1, "R5_iou50": 1, "order": 1}
    assert b == {"R1_iou50": 0, "R1_iou70": 0, "R5_iou50": 1, "order": 0}
    assert c == {"R1_iou50": 1, "R1_iou70": 0, "R5_iou50": 1}  # 3.5 of 5.5 seconds
