"""Moving-digit GIFs with questions: made by their numbers alone, and read by the reader of TGIF-QA."""

import numpy as np
import pytest

from bt_adapter_hf.data.moving_digits_gif_qa import REPEATED, THEN, facts_of, gif, states_of, write_gif_questions
from bt_adapter_hf.data.tgif_qa import load_tgif_qa
from bt_adapter_hf.models.video_io import load_video


pytest.importorskip("sklearn")


def test_a_gif_is_a_function_of_its_numbers():
    for index in (0, 1, 8, 9):
        frames, facts = gif("train", 3, index)
        again, _ = gif("train", 3, index)
        assert (frames == again).all() and facts == facts_of(index)
        assert states_of("train", 3, index).shape == (len(frames), 3) and frames.shape[1:] == (64, 64, 3)
        assert (frames != gif("test", 3, index)[0][: len(frames)][0]).any()
    frames, facts = gif("train", 0, 0)  # bounces so many times
    assert facts["action"] == "bounces"
    y = states_of("train", 0, 0)[:, 2]
    turns = np.diff(np.sign(np.diff(y)))
    assert (turns != 0).sum() in (2 * facts["count"] - 1, 2 * facts["count"])


def test_the_tables_are_those_of_tgif_qa(tmp_path):
    tables = write_gif_questions(tmp_path, "test", 8, seed=2)
    found = {task: load_tgif_qa(path) for task, path in tables.items()}
    assert {task: len(rows) for task, rows in found.items()} == {
        "frameqa": 8, "count": 4, "action": 4, "transition": 4,
    }  # fmt: skip
    for task, words in (("action", REPEATED), ("transition", THEN)):
        assert all(row.task == task and sorted(row.options) == sorted(words) for row in found[task])
    first = found["action"][0]
    assert first.answer == facts_of(0)["action"] and f"{facts_of(0)['count']} times" in first.question
    assert load_video(tmp_path / f"{first.gif}.gif", num_frames=16)[0].shape == (16, 64, 64, 3)
