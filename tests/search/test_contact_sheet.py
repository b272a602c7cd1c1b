import os

import numpy as np
import pytest
from PIL import Image

from bt_adapter_hf.search import contact_sheet
from bt_adapter_hf.search.contact_sheet import check_sheet_path, draw_contact_sheet, write_contact_sheet
from bt_adapter_hf.search.encoding import VideoEncoder
from bt_adapter_hf.search.index import Hit, VideoIndex
from bt_adapter_hf.search.writer import IndexWriter
from tests import tiny_pairs


@pytest.fixture
def index(tiny_checkpoint, clips, tmp_path) -> VideoIndex:
    encoder = VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu")
    with IndexWriter(tmp_path / "idx", encoder) as writer:
        for name in ("red.mp4", "green.mp4"):
            (video,) = encoder.encode_videos([str(clips / name)])
            writer.add(video)
    return VideoIndex.load(tmp_path / "idx")


def count(sheet: Image.Image, colour: tuple[int, int, int], tolerance: int = 40) -> int:
    """Pixels of about this colour."""
    return int((np.abs(np.asarray(sheet).astype(int) - colour).max(-1) < tolerance).sum())


def rows_of(sheet: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return np.flatnonzero((np.abs(np.asarray(sheet).astype(int) - colour).max(-1) < 40).any(1))


def test_frames_are_on_the_sheet_in_the_order_of_the_hits(index, tmp_path):
    hits = [Hit(1, 0.9, index.rows[0]), Hit(2, 0.4, index.rows[1])]
    write_contact_sheet(tmp_path / "hits.png", "a red square", hits, index, floor=0.1)
    assert not list(tmp_path.glob(".hits.png*"))
    with Image.open(tmp_path / "hits.png") as image:
        assert image.format == "PNG"
        sheet = image.convert("RGB")
    red, green = (rows_of(sheet, tiny_pairs.COLOURS[name]) for name in ("red", "green"))
    assert len(red) > 20
    assert len(green) > 20
    assert red.max() < green.min()
    swapped = draw_contact_sheet("a red square", hits[::-1], index, floor=0.1)
    assert rows_of(swapped, tiny_pairs.COLOURS["green"]).max() < rows_of(swapped, tiny_pairs.COLOURS["red"]).min()


def test_score_bar_runs_from_the_floor_to_the_best_hit(index):
    accent, full = (47, 95, 208), contact_sheet._TEXT_WIDTH - 100

    def bar(score: float) -> int:
        """Length of the second hit's bar: the longest run of the accent colour in the lower half of the sheet."""
        hits = [Hit(1, 0.9, index.rows[0]), Hit(2, score, index.rows[0])]
        pixels = np.asarray(draw_contact_sheet("x", hits, index, floor=0.1))
        pixels = pixels[len(pixels) // 2 :, : contact_sheet._MARGIN + contact_sheet._TEXT_WIDTH]
        return int((pixels == accent).all(-1).sum(1).max())

    assert bar(0.9) == pytest.approx(full, abs=4)
    assert bar(0.5) == pytest.approx(full / 2, abs=4)
    assert bar(0.1) < 30  # only the text


def test_a_file_that_has_gone_is_said_on_the_sheet(index):
    os.unlink(index.rows[0]["path"])
    hits = [Hit(1, 0.9, index.rows[0]), Hit(2, 0.4, index.rows[1])]
    sheet = draw_contact_sheet("a red square", hits, index, floor=0.1)
    assert count(sheet, tiny_pairs.COLOURS["green"]) > 1000
    assert count(sheet, (179, 38, 30), tolerance=10) > 100  # the error, written in its own colour


def test_a_moment_shows_its_own_frames_and_its_time(index, monkeypatch):
    """The square of these clips moves to the right."""
    row, said = index.rows[0], []
    write = lambda self, xy, text, *rest, **more: said.append(text)  # noqa: E731
    monkeypatch.setattr(contact_sheet.ImageDraw.ImageDraw, "text", write)

    def place(timestamps: list[float]) -> float:
        moment = {**row, "start": timestamps[0], "end": timestamps[-1] + 0.1, "timestamps": timestamps}
        sheet = np.asarray(draw_contact_sheet("x", [Hit(1, 0.5, moment)], index, floor=0.1)).astype(int)
        columns = np.flatnonzero((np.abs(sheet - tiny_pairs.COLOURS["red"]).max(-1) < 40).any(0))
        return columns.mean()

    assert place([0.0, 0.1]) < place([0.4, 0.5])
    assert "00:00.4-00:00.6" in " ".join(said)
    assert "0.40 s" in said and "0.50 s" in said


def test_long_names_queries_and_many_frames_stay_inside(index):
    row = {**index.rows[0], "timestamps": [0.1 * (number % 6) for number in range(40)]}
    query = "a very long query " * 20 + "x" * 300
    sheet = draw_contact_sheet(query, [Hit(1, 0.5, row)] * 3, index, floor=0.5)
    paper = np.asarray(sheet)[:, -contact_sheet._MARGIN + 2 :]
    assert (paper == paper[0, 0]).all()


def test_font_helpers():
    font = contact_sheet._font(20)
    short = contact_sheet._shorten("holiday_2019_summer_0012.mp4", font, 150)
    assert font.getlength(short) <= 150
    assert short.startswith("holi")
    assert short.endswith("12.mp4")
    assert contact_sheet._shorten("a.mp4", font, 150) == "a.mp4"
    lines = contact_sheet._wrap("one two three four five six", font, 100)
    assert " ".join(lines) == "one two three four five six"
    assert all(font.getlength(line) <= 100 for line in lines)


@pytest.mark.parametrize(
    ("seconds", "last", "text"),
    [(0.05, 0.1, "0.05 s"), (3.25, 12.0, "3.2 s"), (7.0, 75.0, "0:07"), (75.2, 100, "1:15"), (3723, 4000, "1:02:03")],
)
def test_clock(seconds, last, text):
    assert contact_sheet._clock(seconds, last) == text


def test_bad_paths(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.png"):
        check_sheet_path(tmp_path / "hits.jpg")
    with pytest.raises(FileNotFoundError, match="nowhere' for the contact sheet does not exist"):
        check_sheet_path(tmp_path / "nowhere" / "hits.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_sheet_path(tmp_path / "folder.png")
