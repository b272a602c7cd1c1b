"""The page as a program sees it: gradio's client against a server in this process, with the models of the package."""

import dataclasses
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from bt_adapter_hf.cli.demo import gather
from bt_adapter_hf.cli.main import main
from bt_adapter_hf.search.index import VideoIndex
from bt_adapter_hf.search.writer import IndexWriter
from tests.demo.conftest import arguments


gradio_client = pytest.importorskip("gradio_client")
_query = pytest.importorskip("bt_adapter_hf.demo.tabs")._query
RIGHT, LEFT = "a red zero moves from the left to the right", "a red zero moves from the right to the left"


@pytest.fixture(scope="module")
def client(served, tmp_path_factory):
    return gradio_client.Client(served[1], verbose=False, download_files=str(tmp_path_factory.mktemp("client")))


def handle(path) -> dict:
    return gradio_client.handle_file(str(path))


def example(served, caption: str) -> str:
    """The clip with a caption."""
    page, _, _ = served
    folder = Path(page.examples[0]).parent
    rows = map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())
    return str(folder / next(row["file_name"] for row in rows if row["text"] == caption))


def test_search(served, client):
    gallery, player, told = client.predict(RIGHT, None, api_name="/search")
    best = Path(example(served, RIGHT)).name
    assert gallery[0]["caption"].startswith(best) and best in told and len(gallery) == 8
    source = re.search(r'src="(clip/[^"#]+)', player)[1]
    answer = httpx.get(served[1] + source, headers={"Range": "bytes=0-99"})
    assert answer.status_code == 206 and len(answer.content) == 100  # a player can start from a moment
    assert answer.headers["content-type"] == "video/mp4"
    by_clip = client.predict("", handle(example(served, RIGHT)), api_name="/search")[0]
    assert by_clip[0]["caption"].startswith(best) and "1.00" in by_clip[0]["caption"]


def test_label_and_its_reverse(served, client):
    labels = f"{RIGHT}\n{LEFT}\n{RIGHT}\n"
    _, forward, backward = client.predict(handle(example(served, RIGHT)), labels, api_name="/label")
    assert forward["label"] == RIGHT and backward["label"] == LEFT
    assert len(forward["confidences"]) == 2  # one that is there twice counts once


def test_chat_streams_and_counts(served):
    client = gradio_client.Client(served[1], verbose=False)  # a conversation of its own
    message = {"text": "How does it move?", "files": [handle(example(served, RIGHT)), handle(example(served, LEFT))]}
    job = client.submit(message, [], api_name="/chat")
    _, talk, tokens = job.result(timeout=60)
    answer = talk[-1]["content"]
    answer = answer if isinstance(answer, str) else answer[0]["text"]
    assert "moves" in answer and len(job.outputs()) > 3  # as it was made
    assert re.fullmatch(r"2 videos, (\d+) tokens each; \d+ tokens in all", tokens)
    assert len([turn for turn in talk if turn["role"] == "user"]) == 3
    _, talk, _ = client.predict({"text": "What colour is it?", "files": []}, [], api_name="/chat")
    assert "red" in str(talk[-1]["content"])  # goes on with the same videos


def test_adapter_in_and_out(served, client):
    player, inside, outside, told = client.predict(
        handle(example(served, RIGHT)), "How does it move?", api_name="/adapter"
    )
    assert inside == "it moves from the left to the right" and outside != inside
    assert "bit by bit" in told and "middle frame" in told and "<video" in player


def test_over_time(served, client):
    page = served[0]
    html = client.predict(handle(page.film), page.texts[1], api_name="/over_time")
    assert 'role="img"' in html and 'aria-label="' in html and "ontimeupdate" in html
    found = [float(n) for n in re.search(r"fits best from ([\d.]+) to ([\d.]+) s", html).groups()]
    assert 1 < sum(found) / 2 < 5  # it is what the second of six clips shows


@pytest.mark.parametrize(
    ("inputs", "api_name", "expected"),
    [
        (("", None), "/search", "Type a sentence first."),
        (("word " * 99, None), "/search", "tokens long; this model takes"),
        (("x" * 600, None), "/search", "has 600 characters, and 500 are taken here"),
        ((None, "a\nb"), "/label", "Choose a clip first."),
        (("clip", "one"), "/label", "at least two labels"),
        (("words.mp4", "a\nb"), "/label", "words.mp4 is not a readable video"),
        (("empty.mp4", "a\nb"), "/label", "empty.mp4 is empty"),
        (("long.mp4", "a\nb"), "/label", "long.mp4 is 30 s long, and 20 s are taken here"),
        (("words.mp4", "What?"), "/adapter", "words.mp4 is not a readable video"),
        (("words.mp4", "a"), "/over_time", "words.mp4 is not a readable video"),
        (({"text": "", "files": []}, []), "/chat", "Type a question first."),
        (({"text": "What?", "files": ["clip"] * 3}, []), "/chat", "3 files; 2 a message are taken here."),
        (({"text": "What?", "files": ["words.png"]}, []), "/chat", "words.png cannot be read"),
    ],
)
def test_mistakes_are_told_without_folders(served, client, tmp_path, inputs, api_name, expected):
    import numpy as np

    from bt_adapter_hf.data.moving_digits import write_mp4

    (tmp_path / "words.mp4").write_text("these are words")
    (tmp_path / "words.png").write_text("these are words")
    (tmp_path / "empty.mp4").write_bytes(b"")
    if "long.mp4" in inputs:
        write_mp4(tmp_path / "long.mp4", np.zeros((30, 16, 16, 3), np.uint8), fps=1)

    def sent(value):
        if value == "clip":
            return handle(example(served, RIGHT))
        if isinstance(value, str) and value.endswith((".mp4", ".png")):
            return handle(tmp_path / value)
        if isinstance(value, dict):
            return {**value, "files": [sent(name) for name in value["files"]]}
        return value

    with pytest.raises(Exception, match=re.escape(expected)) as error:
        client.predict(*map(sent, inputs), api_name=api_name)
    assert "/tmp" not in str(error.value) and "/uploads" not in str(error.value)


def test_a_large_upload_is_refused_and_leaves_nothing(served, tmp_path):
    _, address, uploads = served
    before = sorted(path.name for path in uploads.rglob("*"))
    (tmp_path / "big.mp4").write_bytes(bytes(3 << 20))
    with (tmp_path / "big.mp4").open("rb") as file:
        answer = httpx.post(f"{address}gradio_api/upload", files={"files": file})
    assert answer.status_code == 413
    assert sorted(path.name for path in uploads.rglob("*")) == before


def test_only_what_was_shown_can_be_fetched(served):
    page, address, _ = served
    assert httpx.get(f"{address}clip/nothing").status_code == 404
    for path in (page.examples[0], "/etc/passwd"):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code in (403, 404)


def test_two_at_once(served):
    client = gradio_client.Client(served[1], verbose=False)
    clip = handle(example(served, RIGHT))
    with ThreadPoolExecutor(3) as pool:
        jobs = [
            pool.submit(client.predict, *inputs, api_name=name)
            for name, *inputs in (
                ("/search", RIGHT, None),
                ("/label", clip, f"{RIGHT}\n{LEFT}"),
                ("/chat", {"text": "How does it move?", "files": [clip]}, []),
            )
        ]
        hits, labels, talk = (job.result(timeout=120) for job in jobs)
    assert hits[0] and labels[1]["label"] == RIGHT and "left to the right" in str(talk[1][-1])


def test_the_page_asks_for_nothing_elsewhere(served):
    html = httpx.get(served[1]).text
    assert not re.findall(r'(?:src|href)="https?://', html)


def test_the_port_is_taken(served, capsys):
    port = served[1].rstrip("/").rpartition(":")[2]
    assert main(["demo", "--port", port]) == 1
    error = capsys.readouterr().err
    assert f"--port {port} cannot be served" in error and "choose another --port" in error
    assert main(["demo", "--port", "0", "--host", "no.such.host.invalid"]) == 1
    assert "cannot be served" in capsys.readouterr().err


def test_models_and_indexes_that_are_not_there(tmp_path, capsys):
    assert main(["demo", "--port", "0", "--model", str(tmp_path / "none")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert main(["demo", "--port", "0", "--chat-model", str(tmp_path / "none")]) == 1
    assert "--chat-model: there is no folder" in capsys.readouterr().err
    assert main(["demo", "--port", "0", str(tmp_path)]) == 1
    assert "no video under" in capsys.readouterr().err


def test_an_index_is_searched_as_it_is(served, tmp_path):
    """Two pages may search the same one."""
    other = gather(arguments(str(served[0].index.folder)), tmp_path)
    assert len(other.index.rows) == len(served[0].index.rows) and not (tmp_path / "index").exists()
    labels = other.encoder.encode_texts([RIGHT])
    assert other.index.search(labels, 1)[0][0].row["path"] == example(served, RIGHT)


def test_a_clip_is_sampled_as_the_index_was(served, tmp_path):
    page, clip = served[0], example(served, RIGHT)
    with IndexWriter(tmp_path / "three", page.encoder.with_settings({"num_frames": 3})) as writer:
        writer.update([clip])
    other = dataclasses.replace(page, index=VideoIndex.load(tmp_path / "three"))
    (own,) = page.encoder.encode_videos([clip])
    assert other.index.search(own.feature[None], 1)[0][0].score < 1 - 1e-5  # with the frames of the processor
    assert other.index.search(_query(other, clip)[None], 1)[0][0].score == pytest.approx(1, abs=1e-6)
