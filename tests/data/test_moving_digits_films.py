import json

import numpy as np
import pytest

from bt_adapter_hf.data.moving_digits import FPS, clip_caption, opposite
from bt_adapter_hf.data.moving_digits_films import film, write_films


SHORT = {"minutes": (0.3, 0.4), "moments": (5, 6)}


def test_a_film_is_its_moments_and_pauses():
    frames, moments = film("test", 0, 0, **SHORT)
    assert frames.dtype == np.uint8 and frames.shape[1:] == (64, 64, 3)
    assert 0.3 * 60 - 0.1 <= len(frames) / FPS <= 0.4 * 60 + 0.1
    assert 5 <= len(moments) <= 6
    assert len({moment.text for moment in moments}) == len(moments)
    ends = [0.0]
    moving = np.zeros(len(frames), bool)
    for moment in moments:
        assert moment.start >= ends[-1] - 1e-9 and 1.6 <= round(moment.end - moment.start, 3) <= 2.4
        assert moment.text == clip_caption(moment.digit, moment.colour, moment.motion)
        ends.append(moment.end)
        shown = slice(round(moment.start * FPS), round(moment.end * FPS))
        moving[shown] = True
        assert np.abs(frames[shown][0].astype(int) - frames[shown][-1]).max() > 50
    assert ends[-1] <= len(frames) / FPS
    changes = (frames[1:] != frames[:-1]).any((1, 2, 3))
    within = ~moving[1:] & ~moving[:-1]
    assert changes[within].sum() <= 1 + len(moments)  # where one pause meets the next


def test_films_are_functions_of_their_numbers():
    frames, moments = film("test", 0, 1, **SHORT)
    again, same = film("test", 0, 1, **SHORT)
    np.testing.assert_array_equal(frames, again)
    assert moments == same
    assert film("test", 1, 1, **SHORT)[1] != moments
    with pytest.raises(ValueError, match="split"):
        film("x", 0, 0)
    with pytest.raises(ValueError, match="moments are longer than"):
        film("test", 0, 0, minutes=(0.1, 0.1), moments=(20, 20))


def test_opposites_are_there():
    pairs = total = 0
    for index in range(4):
        _, moments = film("test", 0, index, minutes=(1, 1), moments=(10, 10))
        texts = {moment.text for moment in moments}
        total += len(moments)
        pairs += sum(clip_caption(m.digit, m.colour, opposite(m.motion)) in texts for m in moments)
    assert pairs > total / 3


def test_write_films(tmp_path):
    table = write_films(tmp_path, "test", 1, 0, **SHORT)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert {row["file_name"] for row in rows} == {"film-test-0-000.mp4"}
    assert (tmp_path / "film-test-0-000.mp4").stat().st_size > 0
    assert rows[0].keys() == {"file_name", "start", "end", "text", "digit", "colour", "motion"}
