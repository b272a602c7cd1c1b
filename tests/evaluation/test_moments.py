import numpy as np
import pytest

from bt_adapter_hf.data.moving_digits_films import FilmMoment, write_films
from bt_adapter_hf.evaluation.moments import evaluate_films, format_moments, moment_scores
from bt_adapter_hf.search.encoding import VideoEncoder
from bt_adapter_hf.search.moments import Windows


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


def test_a_film_with_the_shipped_model(tmp_path):
    """Motion and order are found by the branch alone."""
    import json

    table = write_films(tmp_path, "test", 1, 3, minutes=(0.5, 0.5), moments=(8, 8))
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    path = str(tmp_path / rows[0].pop("file_name"))
    moments = [FilmMoment(**{name: value for name, value in row.items() if name != "file_name"}) for row in rows]
    encoder = VideoEncoder.from_pretrained(device="cpu", dtype="float32")
    scores = evaluate_films(encoder, [(path, moments)], Windows(2.0, 0.5))
    assert scores["bt_adapter"]["R1_iou50"] >= 75
    assert scores["bt_adapter"]["order"] == 100
    assert scores["reversed"]["order"] == pytest.approx(0, abs=26)
    assert format_moments(scores).splitlines()[1].split()[0] == "BT-Adapter"
