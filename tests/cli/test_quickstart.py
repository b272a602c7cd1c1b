"""`quickstart` with the shipped model, on fewer clips than a user gets."""

import json

import pytest
from PIL import Image

from bt_adapter_hf.cli import quickstart
from bt_adapter_hf.cli.main import main


pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def few_clips(monkeypatch):
    monkeypatch.setattr(quickstart, "CLIPS", 24)  # red, green, blue and yellow zeros


def test_quickstart_leaves_files_and_tells_scores(tmp_path, capsys):
    folder = tmp_path / "start"
    assert main(["quickstart", "-o", str(folder), "--json", "--device", "cpu"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((folder / "scores.json").read_text())
    assert {file.suffix for file in (folder / "clips").iterdir()} == {".mp4", ".gif", ".jsonl"}
    with Image.open(summary["contact_sheet"]) as sheet:
        assert sheet.width > 500 and sheet.height > 500
    assert [len(hits) for hits in summary["search"].values()] == [3] * len(quickstart.QUERIES)
    assert summary["scores"]["bt_adapter"]["motion"] >= 80
    assert summary["scores"]["reversed"]["order"] <= 20
    assert set(summary["scores"]) == {"bt_adapter", "frame_average", "one_frame", "shuffled", "reversed"}
    moments = summary["moments"]
    hit, shown = moments["hit"], moments["shown"]
    assert min(hit["end"], shown[1]) - max(hit["start"], shown[0]) > 1  # of two seconds
    assert moments["R1_iou50"]["bt_adapter"] > moments["R1_iou50"]["reversed"]
    # once more over the same folder, for people
    assert main(["quickstart", "-o", str(folder), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "frame-averaged CLIP" in out and "frames shuffled" in out
    # the index it leaves is an ordinary one
    query = "a blue zero moves from the right to the left"
    assert main(["search", str(folder / "index"), query, "--json", "-k", "1"]) == 0
    (hit,) = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (folder / "clips" / "metadata.jsonl").read_text().splitlines()]
    assert hit["path"].endswith(next(row["file_name"] for row in rows if row["text"] == query))


def test_quickstart_needs_a_folder_it_can_fill(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["quickstart", "-o", str(tmp_path / "file")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("bt-adapter quickstart: error:") and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"
