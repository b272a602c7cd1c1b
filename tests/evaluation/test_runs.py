"""Retrieval and recognition runs over tables: against the metrics of features encoded by hand, and with bad rows."""

import json

import numpy as np
import pytest

from bt_adapter_hf.data.pairs import load_table
from bt_adapter_hf.evaluation.recognition_run import evaluate_recognition
from bt_adapter_hf.evaluation.retrieval import retrieval_metrics
from bt_adapter_hf.evaluation.retrieval_run import dual_softmax_scores, evaluate_retrieval
from bt_adapter_hf.hub.result_files import CONTROL_NAMES
from bt_adapter_hf.search.encoding import VideoEncoder
from tests import tiny_pairs


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint) -> VideoEncoder:
    return VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six videos; the first has a second caption, the fourth no text, the fifth is broken, the sixth is missing."""
    folder = tmp_path_factory.mktemp("table")
    rows = []
    for number in range(6):
        tiny_pairs.write_clip(folder / f"{number}.mp4", (220 - 30 * number, 30 * number, 90), step=number + 1)
        rows.append({"file_name": f"{number}.mp4", "text": f"clip {number}", "label": ["left", "right"][number % 2]})
    rows[3]["text"] = ""
    (folder / "4.mp4").write_bytes(b"nothing")
    (folder / "5.mp4").unlink()
    rows.append({"file_name": "0.mp4", "text": "another caption", "label": "up"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run(evaluate, encoder, folder, output, column="text", **options):
    return evaluate(encoder, load_table(str(folder), text_column=column), output, item_timeout=None, **options)


def test_retrieval_equals_the_metrics_of_features_encoded_by_hand(encoder, folder, tmp_path):
    result = run(evaluate_retrieval, encoder, folder, tmp_path / "run")
    names = ["0.mp4", "0.mp4", "1.mp4", "2.mp4"]
    texts = encoder.encode_texts(["clip 0", "another caption", "clip 1", "clip 2"])
    videos = np.stack([video.feature for video in encoder.encode_videos([str(folder / f"{n}.mp4") for n in range(3)])])
    expected = retrieval_metrics(texts, videos, names, names[1:])
    assert result.scores.keys() == expected.keys()
    for name, value in expected.items():
        assert result.scores[name].value == pytest.approx(value), name
        assert result.scores[name].low <= value <= result.scores[name].high
    assert result.items["texts"] == 4 and result.items["videos"] == 3
    assert result.chance["t2v_R1"] == pytest.approx(100 / 3)
    assert (
        result.controls.keys()
        == {"blind", "shuffled", "reversed", "one_frame", "frame_average"}
        <= CONTROL_NAMES.keys()
    )
    assert result.against_frame_average["t2v_R1"].p_mcnemar is not None


def test_what_could_not_be_used_is_named_and_not_in_the_scores(encoder, folder, tmp_path):
    result = run(evaluate_retrieval, encoder, folder, tmp_path / "run")
    reasons = {item["video"].rpartition("/")[2]: item["reason"] for item in result.failed}
    assert reasons.keys() == {"3.mp4", "4.mp4", "5.mp4"}
    assert reasons["3.mp4"] == "it has no text." and "does not exist" in reasons["5.mp4"]
    written = json.loads(result.write(tmp_path / "run").read_text())
    assert written["failed"]["items"] == 3 and sum(written["failed"]["reasons"].values()) == 3
    assert written["protocol"]["model_fingerprint"] == encoder.fingerprint()
    assert written["protocol"]["data_fingerprint"] and written["protocol"]["video_processor"]["num_frames"] == 4
    table = result.table()
    assert "3 could not be used and are not in the scores" in table and "frames reversed" in table


def test_a_row_without_a_text_is_named_where_its_video_has_another(encoder, folder, tmp_path):
    rows = [
        {"file_name": str(folder / f"{n}.mp4"), "text": text} for n, text in ((0, "clip 0"), (1, "clip 1"), (1, ""))
    ]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(evaluate_retrieval, encoder, table, tmp_path / "run", controls=())
    assert (result.items["texts"], result.items["videos"]) == (2, 2)
    assert [(item["index"], item["reason"]) for item in result.failed] == [(2, "it has no text.")]


def test_rows_that_are_there_twice_are_counted(encoder, folder, tmp_path):
    """They count twice, as where a set is published so, and the result says how many they are."""
    rows = [{"file_name": str(folder / f"{n}.mp4"), "text": f"clip {n}", "label": f"{n}"} for n in (0, 1, 1, 1)]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for evaluate, options in (
        (evaluate_retrieval, {}),
        (evaluate_retrieval, {"paragraph": True}),
        (evaluate_recognition, {"column": "label"}),
    ):
        result = run(evaluate, encoder, table, tmp_path / evaluate.__name__, controls=(), **options)
        assert result.items["rows that are there again"] == 2 and "2 rows that are there again" in result.table()
    result = run(evaluate_retrieval, encoder, folder, tmp_path / "all", controls=())
    assert "rows that are there again" not in result.items


def test_options_of_retrieval(encoder, folder, tmp_path):
    joined = run(evaluate_retrieval, encoder, folder, tmp_path / "a", paragraph=True, controls=())
    assert joined.items["texts"] == 3 and joined.controls == {} and joined.against_frame_average == {}
    cut = run(evaluate_retrieval, encoder, folder, tmp_path / "b", max_text_length=6, controls=("reversed",))
    assert cut.items["of them cut at 6 tokens"] == 4
    scores = np.random.default_rng(0).random((5, 4))
    softmax = np.exp(100 * scores) / np.exp(100 * scores).sum(axis=0)
    np.testing.assert_allclose(dual_softmax_scores(scores), scores * softmax)
    weighted = run(evaluate_retrieval, encoder, folder, tmp_path / "c", dual_softmax=True, controls=())
    assert weighted.protocol["dual_softmax"] and "t2v_R1" in weighted.scores
    assert "(dual softmax)" in weighted.table() and "(dual softmax)" not in joined.table()


def test_recognition(encoder, folder, tmp_path):
    options = {"column": "label", "templates": ["{}", "it goes {}"]}
    result = run(evaluate_recognition, encoder, folder, tmp_path / "run", classes=["left", "right"], **options)
    videos = np.stack([video.feature for video in encoder.encode_videos([str(folder / f"{n}.mp4") for n in range(4)])])
    texts = (encoder.encode_texts(["left", "right"]) + encoder.encode_texts(["it goes left", "it goes right"])) / 2
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    expected = 100 * np.mean((videos @ texts.T).argmax(axis=1) == [0, 1, 0, 1])
    assert result.scores["top1"].value == pytest.approx(expected) and result.scores.keys() == {"top1"}
    assert result.items == {"videos": 4, "classes": 2} and result.chance == {"top1": 50}
    reasons = [item["reason"] for item in result.failed]
    assert len(reasons) == 3 and "its label 'up' is none of the 2 classes." in reasons
    named = run(evaluate_recognition, encoder, folder, tmp_path / "named", **options)
    assert named.items == {"videos": 5, "classes": 3}


def test_labels_by_number_and_bad_classes(encoder, folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()[:4]]
    table = tmp_path / "numbers.jsonl"
    table.write_text("\n".join(json.dumps({**row, "label": str(1 + n % 2)}) for n, row in enumerate(rows)))
    options = {"classes": ["left", "right"], "item_timeout": None, "controls": ()}
    opened = load_table(str(table), text_column="label", media_root=str(folder))
    by_number = evaluate_recognition(encoder, opened, tmp_path / "a", label_offset=1, **options)
    assert by_number.items["videos"] == 4 and by_number.failed == []
    with pytest.raises(ValueError, match="Only 2 of 4 rows have a label that is a class.*'2' is none of the 2"):
        evaluate_recognition(encoder, opened, tmp_path / "b", **options)
    with pytest.raises(ValueError, match="two or more different classes, found 1"):
        evaluate_recognition(encoder, opened, tmp_path / "b", **{**options, "classes": ["left"]})
    with pytest.raises(ValueError, match="found 3 in the classes given, 'left' more than once"):
        evaluate_recognition(encoder, opened, tmp_path / "b", **{**options, "classes": ["left", "right", "left"]})
    same = tmp_path / "same.jsonl"
    same.write_text("\n".join(json.dumps({**row, "label": "up"}) for row in rows))
    opened = load_table(str(same), text_column="label", media_root=str(folder))
    with pytest.raises(ValueError, match="found 1 in the labels of .*same.jsonl .text_column names the column.*'up'"):
        evaluate_recognition(encoder, opened, tmp_path / "c", item_timeout=None)
    assert not (tmp_path / "c").exists()  # nothing was encoded
    with pytest.raises(ValueError, match="has no {}"):
        evaluate_recognition(encoder, opened, tmp_path / "b", templates=["a video"], **options)


@pytest.mark.slow
def test_five_thousand_captions_and_videos_are_scored_in_ten_seconds():
    from benchmarks import scoring

    _, busy, _ = scoring.main(5000, 768, [])
    assert busy < 10  # of the processor, whatever else the machine does
