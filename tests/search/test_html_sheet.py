import re
from urllib.parse import unquote

import pytest

from bt_adapter_hf.cli.main import main
from bt_adapter_hf.search.encoding import VideoEncoder
from bt_adapter_hf.search.html_sheet import write_html_sheet
from bt_adapter_hf.search.index import Hit, VideoIndex
from bt_adapter_hf.search.writer import IndexWriter


@pytest.fixture
def index(tiny_checkpoint, clips, tmp_path) -> VideoIndex:
    (clips / "red.mp4").rename(clips / "red <&> #1 'ü'.mp4")
    encoder = VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    with IndexWriter(tmp_path / "idx", encoder) as writer:
        writer.update([str(clips / "red <&> #1 'ü'.mp4"), str(clips / "grey.gif")])
    return VideoIndex.load(tmp_path / "idx")


def test_players_and_frames(index, clips, tmp_path):
    hits = [Hit(rank, 0.9 - rank / 10, row) for rank, row in enumerate(index.rows, start=1)]
    write_html_sheet(tmp_path / "hits.html", "a <b>red</b> & square", hits, index, floor=0.1)
    page = (tmp_path / "hits.html").read_text(encoding="utf-8")
    assert "<b>" not in page and "a &lt;b&gt;red" in page and "<&>" not in page
    (video,) = re.findall(r'<video src="([^"]+)"', page)
    (gif,) = re.findall(r'<img class="still" src="([^"]+)"', page)
    for source in (video, gif):
        assert "#" not in source and (tmp_path / unquote(source)).is_file()  # as a browser finds it beside the page
    assert len(re.findall(r'<img src="data:image/jpeg;base64,', page)) >= 4
    assert all('alt="' in image for image in re.findall(r"<img[^>]*>", page))
    assert [float(value) for value in re.findall(r'value="([\d.]+)"', page)] == pytest.approx([1, 0.6 / 0.7], abs=2e-3)


def test_what_is_gone_is_said(index, clips, tmp_path):
    hits = [Hit(1, 0.9, row) for row in index.rows if row["path"].endswith(".gif")]
    (clips / "grey.gif").unlink()
    write_html_sheet(tmp_path / "hits.html", "x", hits, index, floor=0.1)
    page = (tmp_path / "hits.html").read_text(encoding="utf-8")
    assert 'class="alarm"' in page and "does not exist" in page and "still" not in page.split("</style>")[1]


def test_search_sheet(index, tmp_path, capsys):
    folder = str(index.folder)
    assert main(["search", folder, "a red square", "--device", "cpu", "--sheet", str(tmp_path / "hits.html")]) == 0
    assert "<video" in (tmp_path / "hits.html").read_text(encoding="utf-8")
    assert main(["search", folder, "a red square", "--device", "cpu", "--sheet", str(tmp_path / "hits.txt")]) == 1
    assert "a PNG picture or page: give it a name that ends in .png or .html" in capsys.readouterr().err
