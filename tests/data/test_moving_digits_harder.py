"""The harder world: rebuilt bit by bit, played backwards it tells the opposite, and wrong captions are wrong."""

import json

import numpy as np
import pytest

from bt_adapter_hf.data import moving_digits_harder as world


pytest.importorskip("sklearn")


def spots(frames: np.ndarray) -> np.ndarray:
    """(T, 2): centre of what is bright, frame by frame."""
    ink = (frames.astype(float) - np.median(frames, axis=(1, 2), keepdims=True)).clip(30).sum(axis=-1) - 90
    y, x = np.mgrid[:64, :64]
    return np.stack([(ink * axis).sum(axis=(1, 2)) / ink.sum(axis=(1, 2)) for axis in (x, y)], axis=1)


def test_everything_is_a_function_of_split_seed_and_index():
    frames, text, facts = world.clip("train", 3, 42)
    again, same_text, same_facts = world.clip("train", 3, 42)
    np.testing.assert_array_equal(frames, again)
    assert (text, facts) == (same_text, same_facts)
    assert world.story("train", 3, 42).caption == text
    assert frames.dtype == np.uint8 and frames.shape[1:] == (64, 64, 3) and 32 <= len(frames) <= 48
    few = world.clip("train", 3, 42, num_frames=8)[0]
    starts = np.round((len(frames) - 1) / 8 * np.arange(9)).astype(int)
    np.testing.assert_array_equal(few, frames[(starts[:-1] + starts[1:]) // 2])


def test_stories_are_of_five_kinds_with_the_captions_of_what_happens():
    stories = [world.story("train", 0, index) for index in range(500)]
    assert [told.kind for told in stories[:5]] == list(world.KINDS)
    for told in stories:
        assert told.reversed().reversed() == told
        assert (told.caption == told.reversed().caption) == told.symmetric
        assert len(told.movers) == (2 if told.kind == "pair" else 1)
    by_kind = {kind: [told for told in stories if told.kind == kind] for kind in world.KINDS}
    assert {len(told.movers[0].states) for told in by_kind["path"]} == {4}
    assert {len(told.movers[0].states) for told in by_kind["bounce"]} == {3, 4, 5}
    assert {told.symmetric for told in by_kind["bounce"]} == {True, False}
    assert {told.movers[0].speed for told in by_kind["speed"]} == {"quickly", "slowly"}
    assert {told.distractor for told in by_kind["distracted"]} == {"still", "jumping"}
    mover = world.Mover("seven", "red", ("left", "top", "right"))
    assert str(mover) == "a red seven moves from the left to the top to the right"
    assert str(mover.reversed()) == "a red seven moves from the right to the top to the left"
    grows = world.Mover("two", "blue", ("small", "big"), "slowly")
    assert str(grows) == "a blue two grows slowly from small to big"
    assert str(grows.reversed()) == "a blue two shrinks slowly from big to small"


def test_digits_go_where_the_caption_says():
    index = next(index for index in range(0, 500, 5) if world.story("test", 1, index).movers[0].states[0] == "left")
    told, frames = world.story("test", 1, index), world.clip("test", 1, index)[0]
    middle = {"left": (15, 32), "right": (49, 32), "top": (32, 15), "bottom": (32, 49), "middle": (32, 32)}
    stops = np.linspace(0, len(frames) - 1, 4).round().astype(int)
    for spot, state in zip(spots(frames)[stops], told.movers[0].states, strict=True):
        assert np.abs(spot - middle[state]).max() < 12, (state, spot)


def test_wrong_captions_are_wrong():
    rng = np.random.default_rng(0)
    for index in range(10):
        told = world.story("test", 0, index)
        motions, looks = world.others(told, 5, rng)
        assert len(motions) == (4 if told.kind == "distracted" else 5)
        assert len(looks) == 59 * len(told.movers)
        assert len({*motions, *looks, told.caption}) == len(motions) + len(looks) + 1
        assert told.reversed().caption not in motions


def test_a_written_table_has_opposites(tmp_path):
    from bt_adapter_hf.data.pairs import load_opposites

    table = world.write_clips(tmp_path, "test", 5, 0)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert all((tmp_path / row["file_name"]).is_file() for row in rows)
    assert load_opposites(table) == {row["text"]: row["opposite"] for row in rows}
    with pytest.raises(ValueError, match=r"expected one of \['gif', 'mp4'\]"):
        world.write_clips(tmp_path, "test", 1, 0, format="avi")
