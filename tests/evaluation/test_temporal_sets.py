"""Temporal benchmarks in the layout that each has on the Hub, and runs over them."""

import json

import numpy as np
import pytest

from bt_adapter_hf.data.moving_digits_temporal import temporal_item
from bt_adapter_hf.data.pairs import load_table
from bt_adapter_hf.evaluation.controls import reverse_frames
from bt_adapter_hf.evaluation.frames import read_frames
from bt_adapter_hf.evaluation.retrieval_run import evaluate_retrieval
from bt_adapter_hf.evaluation.temporal_run import evaluate_temporal
from bt_adapter_hf.evaluation.temporal_sets import (
    OPPOSITES,
    READERS,
    BenchmarkFiles,
    moving_digits_set,
    open_temporal_set,
    rtime_hard,
    table_set,
)
from bt_adapter_hf.models.video_errors import EmptyVideoError
from bt_adapter_hf.models.video_io import load_video
from bt_adapter_hf.search.encoding import VideoEncoder
from tests.chat.tiny_hosts import stir
from tests.evaluation import layouts


ITEMS = {
    "vinoground": [
        (("0_pos.mp4", "0_neg.mp4"), ("a cat sits, then runs", "a cat runs, then sits"), "object"),
        (("1_pos.mp4", "1_neg.mp4"), ("water before ice", "ice before water"), "action"),
    ],
    "rtime": [(("33.mp4", "33.mp4 backwards"), ("a door opens", "a door closes"), "")],
    "vitatecs": [
        (("MSRVTT/video7.mp4",), ("a man stands up", "a man sits down"), "Direction"),
        (("VATEX/ab_000_010.mp4",), ("a man stands up", "a man sits down"), "Type"),
    ],
    "tempcompass": [
        (
            ("1021488277.mp4",),
            tuple(f"In which direction does it go? {choice}" for choice in ("down", "up", "left")),
            "direction",
        )
    ],
    "tvbench": [
        ((name,), ("How often? 3", "How often? 2", "How often? 1"), aspect)
        for name, aspect in (
            ("v.webm", "action count"),
            ("w.mp4 from 0.2 to 0.4 s", "action sequence"),
            ("w.mp4 from 7 to 9 s", "action sequence"),
        )
    ],
    "ssv2": [
        (("7.webm",), ("Pushing a pen from left to right", "Pushing a pen from right to left"), "pushing"),
        (("8.webm",), ("Putting a pen into a box", "Taking a pen out of a box"), "putting"),
    ],
}


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint) -> VideoEncoder:
    encoder = VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu")
    stir(encoder.model.vision_model.bt_adapter)  # a fresh branch would not see the order
    return encoder


@pytest.mark.parametrize("name", READERS)
def test_each_is_read_and_run_in_its_layout(name, encoder, tmp_path):
    getattr(layouts, name)(tmp_path / "copy")
    board = open_temporal_set(name, tmp_path / "copy")
    names = [clip.name for clip in board.clips.clips]
    found = [(tuple(names[row] for row in item.clips), item.texts, item.aspect) for item in board.items]
    assert found == ITEMS[name]
    result = evaluate_temporal(encoder, board, tmp_path / "run", controls=("reversed",), draws=1, item_timeout=None)
    bad = [item["reason"] for item in result.failed]
    assert bad == (["Nothing lies between 7 and 9 s: it ends at 0.6 s."] if name == "tvbench" else [])
    assert result.items["items"] + len(bad) == len(board.items) and "(chance)" in result.table()


def test_a_clip_and_its_reverse(encoder, tmp_path):
    """The features are those of the frames in reverse; averaged frames cannot tell the two, and get half of the pairs
    and no group."""
    layouts.rtime(tmp_path)
    board = open_temporal_set("rtime", tmp_path)
    result = evaluate_temporal(encoder, board, tmp_path / "run", draws=1, item_timeout=None)
    assert result.controls["frame_average"]["pair"].value == 50 == result.controls["blind"]["pair"].value
    assert result.chance["pair"] == 50 and result.chance["group"] == pytest.approx(100 / 6)
    assert result.controls["reversed"]["pair"].value == 100 - result.scores["pair"].value
    from bt_adapter_hf.evaluation.features import read_features

    features = read_features(tmp_path / "run").features
    np.testing.assert_array_equal(features["full"]["33.mp4 backwards"], features["reversed"]["33.mp4"])
    videos = encoder.processor(videos=[str(tmp_path / "videos/33.mp4")], return_tensors="pt")["pixel_values_videos"]
    expected = encoder.model.get_video_features(reverse_frames(videos)).pooler_output[0].detach().numpy()
    np.testing.assert_allclose(features["full"]["33.mp4 backwards"], expected / np.linalg.norm(expected), atol=1e-6)
    hard = rtime_hard(BenchmarkFiles("rtime", None, tmp_path))
    retrieval = evaluate_retrieval(encoder, hard, tmp_path / "hard", controls=("frame_average",), item_timeout=None)
    assert retrieval.items["videos"] == 2 == retrieval.items["texts"]


def test_a_table_of_right_and_wrong_texts(encoder, tmp_path):
    rows = [
        {"video": "a.mp4", "text": "it opens", "wrong": ["it closes", "it turns"], "aspect": "x"},
        {"video": "b.mp4", "text": "it goes up", "wrong": ["it goes down"], "aspect": "y"},
        {"video": "gone.mp4", "text": "it goes up", "wrong": ["it goes down"], "aspect": "y"},
    ]
    layouts.dump(tmp_path / "pairs.jsonl", rows)
    layouts.clip(tmp_path / "a.mp4")
    layouts.clip(tmp_path / "b.mp4")
    columns = [load_table(tmp_path / "pairs.jsonl", text_column=name) for name in ("text", "wrong", "aspect")]
    board = table_set(*columns)
    assert [item.texts for item in board.items][0] == ("it opens", "it closes", "it turns")
    result = evaluate_temporal(encoder, board, tmp_path / "run", draws=2, item_timeout=None)
    assert result.chance == {"pair": pytest.approx(100 * (1 / 3 + 1 / 2) / 2)} and result.aspects.keys() == {"x", "y"}
    assert [item["video"] for item in result.failed] == ["gone.mp4"]
    assert json.loads(result.write(tmp_path).read_text())["aspects"]["x"]["pair"]["value"] in (0, 100)
    with pytest.raises(ValueError, match=r"No row of .*The first of 3, row 0: its texts must be two or"):
        table_set(columns[0], columns[0])


def test_a_row_without_two_texts_counts_as_failed(encoder, tmp_path):
    rows = [
        {"video": "a.mp4", "text": "", "wrong": "it closes"},
        {"video": "a.mp4", "text": "it opens", "wrong": "it closes"},
        {"video": "a.mp4", "text": "it opens", "wrong": ["it opens", "x"]},
        {"video": "a.mp4", "text": "it opens", "wrong": []},
    ]
    layouts.dump(tmp_path / "pairs.jsonl", rows)
    layouts.clip(tmp_path / "a.mp4")
    columns = [load_table(tmp_path / "pairs.jsonl", text_column=name) for name in ("text", "wrong")]
    result = evaluate_temporal(encoder, table_set(*columns), tmp_path / "run", controls=(), item_timeout=None)
    assert result.items["items"] == 1 and [item["index"] for item in result.failed] == [0, 2, 3]
    layouts.vinoground(tmp_path / "copy")
    text = (tmp_path / "copy" / "vinoground.csv").read_text()
    (tmp_path / "copy" / "vinoground.csv").write_text(text.replace("water before ice", ""))
    board = open_temporal_set("vinoground", root=tmp_path / "copy")
    assert len(board) == 2 and [number for number, _ in board.numbered()] == [0]
    assert board.broken == {1: ("1_pos.mp4", "one of its texts is empty")}


def test_moving_digits(encoder, tmp_path):
    """The same frames in each item; what is there is not written again."""
    for board in ("order", "sequence", "count"):
        shown, texts, _ = temporal_item(board, "test", 77, 5)
        assert len(shown) == len(texts) == len(set(texts)) >= 2
        if board == "sequence":
            (_, one, _), (_, other, _) = shown
            assert sorted(frame.tobytes() for frame in one) == sorted(frame.tobytes() for frame in other)
    boards = [moving_digits_set("order", tmp_path, count=2) for _ in range(2)]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert boards[0].items == boards[1].items and len(files) == 2
    assert evaluate_temporal(encoder, boards[0], tmp_path / "run", controls=(), item_timeout=None).items["clips"] == 4
    with pytest.raises(ValueError, match="no board 'speed'"):
        moving_digits_set("speed", tmp_path)


def test_what_is_not_as_published(tmp_path):
    with pytest.raises(ValueError, match="no temporal benchmark 'vino'"):
        open_temporal_set("vino", tmp_path)
    with pytest.raises(ValueError, match="rtime is not on the Hub: name the folder of your copy with data_root"):
        open_temporal_set("rtime")
    with pytest.raises(ValueError, match="is not a folder"):
        open_temporal_set("ssv2", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="The videos of vitatecs are not in 'videos' or 'videos.zip'"):
        open_temporal_set("vitatecs", tmp_path)
    layouts.tempcompass(tmp_path)
    layouts.parquet(tmp_path / "multi-choice" / "test.parquet", [{"video_id": "1", "answer": "A. x"}])
    with pytest.raises(ValueError, match="has no question; it has video_id, answer"):
        open_temporal_set("tempcompass", tmp_path)
    layouts.dump(tmp_path / "test.json", {})
    (tmp_path / "videos").mkdir()
    with pytest.raises(ValueError, match="rtime lists no clips"):
        open_temporal_set("rtime", tmp_path)
    for content, words in (
        ([], "test.json holds a list where an object with a row"),
        (3, "it holds '3' where a list"),
    ):
        layouts.dump(tmp_path / "test.json", content)
        with pytest.raises(ValueError, match=words):
            open_temporal_set("rtime", tmp_path)
    layouts.tvbench(tmp_path / "tvbench")
    file = tmp_path / "tvbench" / "json" / "action_sequence.json"
    file.write_text(file.read_text().replace("7.0", '"late"'))
    with pytest.raises(ValueError, match=r"Row 1 of json/action_sequence.json has 'late' in 'start' where a number"):
        open_temporal_set("tvbench", tmp_path / "tvbench")
    (tmp_path / "test.json").write_text('{"cut')
    with pytest.raises(ValueError, match="test.json cannot be read"):
        open_temporal_set("rtime", tmp_path)
    assert all(OPPOSITES[OPPOSITES[template]] == template for template in OPPOSITES)


def test_frames_of_parts_and_of_stills(encoder, tmp_path):
    path, rules = layouts.clip(tmp_path / "a.mp4"), encoder.processor.video_processor
    whole, metadata = load_video(path, num_frames=None)
    part = read_frames(str(path), rules, (0.2, 0.4))
    inside = whole[[0.2 <= second <= 0.4 for second in metadata.timestamps]]
    assert {frame.tobytes() for frame in part} == {frame.tobytes() for frame in inside} and len(part) == 4
    with pytest.raises(EmptyVideoError, match="is empty"):
        read_frames(str(path), rules, (3.0, 1.0))
    from PIL import Image

    Image.fromarray(whole[0]).save(tmp_path / "still.gif")
    for video in (str(tmp_path / "still.gif"), (tmp_path / "still.gif").read_bytes()):
        with pytest.raises(EmptyVideoError, match="has become a still"):
            read_frames(video, rules)
