"""The world keeps its promises: rebuilt bit by bit, no digit in both splits, and nothing but time tells a motion."""

import hashlib
import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from bt_adapter_hf import BTAdapterModel, BTAdapterProcessor, load_video
from bt_adapter_hf.assets import default_model_path
from bt_adapter_hf.data import moving_digits as world
from bt_adapter_hf.evaluation.moving_digits import evaluate_moving_digits, motion_scores


pytest.importorskip("sklearn")


def test_everything_is_a_function_of_split_seed_and_index():
    for make in (world.still, world.clip):
        pixels, text, facts = make("train", 3, 41)
        again, same_text, same_facts = make("train", 3, 41)
        assert pixels.dtype == np.uint8 and pixels.shape[-3:] == (64, 64, 3)
        np.testing.assert_array_equal(pixels, again)
        assert (text, facts) == (same_text, same_facts)
        others = [make(*place)[0] for place in (("test", 3, 41), ("train", 4, 41))]
        assert all(other.shape != pixels.shape or (other != pixels).any() for other in others)
    # Frozen: a change of the world makes the shipped model's figures untrue.
    digest = hashlib.sha256(world._handwriting()["test"]["seven"].tobytes()).hexdigest()
    assert digest.startswith("0a4efbbb")


def test_the_splits_share_no_handwriting():
    hands = world._handwriting()
    for digit in world.DIGITS:
        train, test = ({image.tobytes() for image in hands[split][digit]} for split in world.SPLITS)
        assert len(train) > 100 and len(test) > 20
        assert not train & test


def test_indices_visit_every_caption():
    assert len(set(world.all_still_captions())) == 600 and len(set(world.all_captions())) == 360
    for index in (0, 7, 599, 600):
        _, text, facts = world.still("test", 0, index)
        assert text == world.all_still_captions()[index % 600] == world.still_caption(**facts)
    for index in (0, 7, 359, 360):
        frames, text, facts = world.clip("test", 0, index)
        assert text == world.all_captions()[index % 360] == world.clip_caption(**facts)
        assert 16 <= len(frames) <= 24


def test_captions_say_what_is_seen():
    assert world.still_caption("seven", "red", "small", "left") == "a small red seven at the left"
    assert world.clip_caption("seven", "red", "left to right") == "a red seven moves from the left to the right"
    for index in range(0, 600, 7):
        frame, _, facts = world.still("test", 5, index)
        x, y, extent = _where(frame)
        step_x, step_y = world.PLACES[facts["place"]]
        assert np.sign(x) * (abs(x) > 5) == step_x and np.sign(y) * (abs(y) > 5) == step_y, facts
        assert (extent > 27) == (facts["size"] == "big"), facts


def test_motions_go_the_way_they_are_called():
    for index in range(0, 360, 13):
        frames, _, facts = world.clip("test", 6, index)
        (x0, y0, extent0), (x1, y1, extent1) = _where(frames[0]), _where(frames[-1])
        seen = {
            "left to right": x1 - x0 > 15,
            "right to left": x0 - x1 > 15,
            "top to bottom": y1 - y0 > 15,
            "bottom to top": y0 - y1 > 15,
            "small to big": extent1 > 1.2 * extent0,
            "big to small": extent0 > 1.2 * extent1,
        }
        assert [motion for motion, is_seen in seen.items() if is_seen] == [facts["motion"]]


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_a_motion_backwards_is_the_opposite_motion(motion):
    assert world.opposite(world.opposite(motion)) == motion
    for seed in range(5):
        films = [
            world._film("train", "four", "green", name, np.random.default_rng(seed))
            for name in (motion, world.opposite(motion))
        ]
        np.testing.assert_array_equal(films[0], films[1][::-1])
        assert (films[0] != films[1]).any()


def test_files_hold_the_frames_and_the_table_their_facts(tmp_path):
    table = world.write_clips(tmp_path, "test", 12, seed=9)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert [row["text"] for row in rows] == world.all_captions()[:12]
    assert {row["file_name"].rsplit(".")[-1] for row in rows} == {"mp4", "gif"}
    for index, row in enumerate(rows):
        written, _, facts = world.clip("test", 9, index)
        assert facts.items() <= row.items()
        read, metadata = load_video(tmp_path / row["file_name"], num_frames=None)
        assert read.shape == written.shape
        assert metadata.fps == pytest.approx(world.FPS, rel=0.01)
        assert np.abs(read.astype(int) - written).mean() < 4


def test_formats_give_no_motion_away(tmp_path, monkeypatch):
    names = []
    writer = lambda path, frames: names.append(path.name)  # noqa: E731
    monkeypatch.setattr(world, "WRITERS", {"mp4": writer, "gif": writer})
    world.write_clips(tmp_path, "train", 720, seed=0)
    is_gif = np.array([name.endswith("gif") for name in names]).reshape(2, 60, 6)
    assert (is_gif == is_gif[..., :1]).all() and (is_gif[0] != is_gif[1]).all()


def test_unknown_formats_and_splits_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\['avi'\].*'gif', 'mp4'"):
        world.write_clips(tmp_path / "new", "test", 1, seed=0, formats=["avi"])
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="'val'"):
        world.clip("val", 0, 0)


def test_scores_against_a_naive_count():
    rng = np.random.default_rng(0)
    captions, facts = world.all_captions(), [world.clip("test", 0, index)[2] for index in range(0, 360, 7)]
    text = rng.normal(size=(360, 8))
    video = np.stack([text[captions.index(world.clip_caption(**fact))] for fact in facts])
    assert set(motion_scores(text, video, facts).values()) == {100.0}
    video = video + 1.2 * rng.normal(size=video.shape)
    scores = motion_scores(torch.tensor(text), torch.tensor(video), facts)

    def cosine(caption, row):
        t, v = text[captions.index(caption)], video[row]
        return t @ v / np.linalg.norm(t) / np.linalg.norm(v)

    motion, order, thing, recall = [], [], [], []
    for row, fact in enumerate(facts):
        same = {name: cosine(world.clip_caption(fact["digit"], fact["colour"], name), row) for name in world.MOTIONS}
        motion.append(max(same, key=same.get) == fact["motion"])
        order.append(same[fact["motion"]] > same[world.opposite(fact["motion"])])
        nearest = max(captions, key=lambda caption: cosine(caption, row))  # noqa: B023
        thing.append(nearest.startswith(f"a {fact['colour']} {fact['digit']} "))
        found = [cosine(world.clip_caption(**fact), other) for other in range(len(facts))]
        recall.append(np.argmax(found) == row)
    naive = {"motion": motion, "order": order, "object": thing, "t2v_R1": recall}
    for name, values in naive.items():
        assert 0 < np.mean(values) < 1, name
        assert scores[name] == pytest.approx(100 * np.mean(values)), name


@pytest.fixture(scope="module")
def shipped():
    path = default_model_path()
    return AutoModel.from_pretrained(path), AutoProcessor.from_pretrained(path)


def test_the_shipped_model_is_what_the_package_says(shipped):
    model, processor = shipped
    assert isinstance(model, BTAdapterModel) and isinstance(processor, BTAdapterProcessor)
    assert model.dtype == torch.float32
    files = [file for file in default_model_path().iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 10e6
    words = sorted({word for caption in world.all_captions() + world.all_still_captions() for word in caption.split()})
    assert [len(ids) for ids in processor.tokenizer(words)["input_ids"]] == [3] * len(words)
    # The text is pooled at the first end token, whatever the padding behind it.
    short, long = "a red seven", "a red seven moves from the left to the right"
    alone = model.get_text_features(**processor(text=[short], return_tensors="pt")).pooler_output
    padded = model.get_text_features(**processor(text=[short, long], padding=True, return_tensors="pt")).pooler_output
    torch.testing.assert_close(alone[0], padded[0], atol=1e-5, rtol=1e-5)
    assert processor.tokenizer.decode(processor(text="Übermut!")["input_ids"], skip_special_tokens=True) == "übermut !"


def test_the_shipped_model_knows_motion_and_only_by_the_order_of_frames(shipped):
    indices = [base + motion for base in range(0, 360, 30) for motion in range(6)]  # 12 objects, each in 6 motions
    clips, _, facts = zip(*(world.clip("test", 4, index) for index in indices), strict=True)
    scores = evaluate_moving_digits(*shipped, [clips[:36], clips[36:]], facts, draws=1)
    assert scores["bt_adapter"]["motion"] >= 90
    assert scores["bt_adapter"]["t2v_R1"] >= 85
    assert scores["reversed"]["order"] <= 10
    for control in ("frame_average", "one_frame", "shuffled"):
        assert 30 <= scores[control]["order"] <= 70, control


def _where(frame):
    """Centre of the ink relative to the middle of the canvas and its larger extent, in pixels."""
    ink = frame.max(axis=-1) > 100
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    extents = np.ptp(rows) + 1, np.ptp(columns) + 1
    return (columns[0] + columns[-1]) / 2 - 31.5, (rows[0] + rows[-1]) / 2 - 31.5, max(extents)
