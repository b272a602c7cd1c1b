import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from bt_adapter_hf.evaluation.recognition import recognition_metrics


GOLDEN = Path(__file__).parent.parent / "data" / "golden"


def test_equals_the_released_accuracy():
    expected = json.loads((GOLDEN / "metrics.json").read_text())["values"]["zero_shot"]
    tensors = load_file(GOLDEN / "metrics.safetensors")
    metrics = recognition_metrics(tensors["zs_video"], tensors["class_text"], tensors["labels"])
    assert metrics == {"top1": expected["overall_acc1"], "top5": expected["overall_acc5"]}


def test_against_sorting():
    rng = np.random.default_rng(0)
    videos, classes, labels = rng.normal(size=(50, 8)), rng.normal(size=(12, 8)), rng.integers(0, 12, 50)
    order = np.argsort(-(videos @ (classes / np.linalg.norm(classes, axis=1, keepdims=True)).T), axis=1)
    expected = {
        f"top{k}": np.mean([label in row[:k] for label, row in zip(labels, order, strict=True)]) for k in (1, 5)
    }
    assert recognition_metrics(videos, classes, labels) == pytest.approx(expected)


def test_trivial_k_is_left_out_and_ties_do_not_count_as_hits():
    assert recognition_metrics(np.ones((3, 4)), np.ones((5, 4)), [0, 1, 2]) == {"top1": 0.0}


@pytest.mark.parametrize("labels, message", [([0, 9], "from 0 to 9"), ([0], "shape"), ([-1, 0], "from -1")])
def test_bad_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        recognition_metrics(np.eye(2), np.eye(2), labels)


def test_labels_are_inside_the_classes():
    videos, classes = np.eye(3), np.eye(3)
    assert recognition_metrics(videos, classes, [0, 1, 2])["top1"] == 1
    for labels in ([0, 1, 3], [-1, 1, 2]):
        with pytest.raises(ValueError, match="with 3 classes: 0 to 2"):
            recognition_metrics(videos, classes, labels)
