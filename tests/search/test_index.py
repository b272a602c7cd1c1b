import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bt_adapter_hf import BTAdapterModel
from bt_adapter_hf.search import index as indexing
from bt_adapter_hf.search.encoding import EncodedVideo, VideoEncoder
from bt_adapter_hf.search.files import find_videos
from bt_adapter_hf.search.index import IndexMismatchError, IndexWriter, VideoIndex
from bt_adapter_hf.search.store import check_writable
from tests import tiny_pairs


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint) -> VideoEncoder:
    return VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu")


def build(folder, encoder, videos) -> tuple[list[str], int]:
    """Index what is missing; returns that, and how many were skipped."""
    with IndexWriter(folder, encoder) as writer:
        missing = writer.missing(find_videos(videos))
        update = writer.update(find_videos(videos), videos)
    assert update.added + len(update.skipped) == len(missing)
    return [os.path.basename(path) for path in missing], len(update.skipped)


def random_index(rows: int, dim: int = 8) -> VideoIndex:
    features = np.random.default_rng(0).normal(size=(rows, dim)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return VideoIndex(Path("x"), {}, [{"path": f"{i}.mp4"} for i in range(rows)], features)


def test_build_and_load(encoder, clips, tmp_path):
    missing, skipped = build(tmp_path / "idx", encoder, [clips])
    assert (len(missing), skipped) == (6, 2)
    assert sorted(path.name for path in (tmp_path / "idx").iterdir()) == [
        "index.json",
        "part-00000.safetensors",
        "skipped.jsonl",
    ]
    index = VideoIndex.load(tmp_path / "idx")
    assert [Path(row["path"]).name for row in index.rows] == ["green.mp4", "grey.gif", "blue.MP4", "red.mp4"]
    assert index.features.shape == (4, 12)
    assert index.features.dtype == np.float32
    for row, feature in zip(index.rows, index.features, strict=True):
        (video,) = encoder.encode_videos([row["path"]])
        np.testing.assert_allclose(feature, video.feature, atol=1e-6)
        assert row["size"] == os.path.getsize(row["path"])
        assert row["duration"] > 0

    skipped = [json.loads(line) for line in (tmp_path / "idx" / "skipped.jsonl").read_text().splitlines()]
    assert [Path(line["path"]).name for line in skipped] == ["empty.mp4", "garbage.avi"]
    assert "empty" in skipped[0]["reason"]

    info = json.loads((tmp_path / "idx" / "index.json").read_text())
    assert info["model"] == encoder.source
    assert info["fingerprint"] == encoder.fingerprint()
    assert info["settings"]["num_frames"] == 4
    assert info["settings"]["sampling"] == "uniform"
    assert info["dtype"] == "float32"
    assert {"bt_adapter_hf", "torch", "transformers"} <= info["packages"].keys()


def test_resume_indexes_only_what_is_new_or_changed(encoder, clips, tmp_path):
    build(tmp_path / "idx", encoder, [clips])
    before = VideoIndex.load(tmp_path / "idx")
    assert build(tmp_path / "idx", encoder, [clips])[0] == ["empty.mp4", "garbage.avi"]  # may have been mended

    tiny_pairs.write_clip(clips / "new.mp4", (250, 250, 250), step=-3)
    tiny_pairs.write_clip(clips / "red.mp4", (20, 250, 250), step=5, frames=8)
    (clips / "empty.mp4").unlink()
    assert sorted(build(tmp_path / "idx", encoder, [clips])[0]) == ["garbage.avi", "new.mp4", "red.mp4"]
    after = VideoIndex.load(tmp_path / "idx")
    assert sorted(Path(row["path"]).name for row in after.rows) == [
        "blue.MP4",
        "green.mp4",
        "grey.gif",
        "new.mp4",
        "red.mp4",
    ]
    old = {row["path"]: feature for row, feature in zip(before.rows, before.features, strict=True)}
    for row, feature in zip(after.rows, after.features, strict=True):
        if row["path"].endswith("red.mp4"):
            assert np.abs(feature - old[row["path"]]).max() > 1e-4
        elif row["path"] in old:
            np.testing.assert_array_equal(feature, old[row["path"]])


def names(folder) -> list[str]:
    return sorted(Path(row["path"]).name for row in VideoIndex.load(folder).rows)


def test_what_is_gone_is_taken_out_where_it_was_looked_for(encoder, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "PART_ROWS", 2)
    build(tmp_path / "idx", encoder, [clips])
    assert names(tmp_path / "idx") == ["blue.MP4", "green.mp4", "grey.gif", "red.mp4"]
    (clips / "green.mp4").unlink()
    (clips / "more" / "blue.MP4").unlink()
    with IndexWriter(tmp_path / "idx", encoder) as writer:  # it looks elsewhere: they may lie on a disk that is away
        assert writer.update([str(clips / "grey.gif")], [clips / "more" / "*.gif"]).gone == 1
    assert names(tmp_path / "idx") == ["green.mp4", "grey.gif", "red.mp4"]
    with IndexWriter(tmp_path / "idx", encoder) as writer:
        update = writer.update(find_videos([clips]), [clips])
    assert (update.added, update.present, update.gone) == (0, 2, 1)
    assert names(tmp_path / "idx") == ["grey.gif", "red.mp4"]
    # the rest is as it was, and a file that comes back is indexed again
    tiny_pairs.write_clip(clips / "green.mp4", tiny_pairs.COLOURS["green"], step=3)
    assert "green.mp4" in build(tmp_path / "idx", encoder, [clips])[0]
    index = VideoIndex.load(tmp_path / "idx")
    for row, feature in zip(index.rows, index.features, strict=True):
        (video,) = encoder.encode_videos([row["path"]])
        np.testing.assert_allclose(feature, video.feature, atol=1e-6)


def test_a_file_under_several_names_counts_once(encoder, clips, tmp_path):
    build(tmp_path / "idx", encoder, [clips / "red.mp4"])
    os.link(clips / "red.mp4", clips / "a hard link.mp4")
    os.symlink(clips / "red.mp4", clips / "a symbolic link.mp4")
    missing, _ = build(tmp_path / "idx", encoder, [clips])
    assert "red.mp4" not in missing and not any("link" in name for name in missing)
    assert names(tmp_path / "idx") == ["blue.MP4", "green.mp4", "grey.gif", "red.mp4"]


def test_two_writers_at_a_time(encoder, clips, tmp_path):
    """The second is refused and changes nothing; a process that is killed keeps nobody out."""
    with IndexWriter(tmp_path / "idx", encoder) as first:
        with pytest.raises(OSError, match="another process is writing the index '.*idx': wait until it has ended"):
            build(tmp_path / "idx", encoder, [clips / "grey.gif"])
        first.update([str(clips / "red.mp4")])
    assert names(tmp_path / "idx") == ["red.mp4"]
    (tmp_path / "idx" / "index.lock").touch()  # of one that was killed
    build(tmp_path / "idx", encoder, [clips / "grey.gif"])
    assert names(tmp_path / "idx") == ["grey.gif", "red.mp4"]


def test_parts_are_of_bounded_size(encoder, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "PART_ROWS", 3)
    whole = tmp_path / "whole"
    build(whole, encoder, [clips])
    assert [path.name for path in sorted(whole.glob("part-*"))] == ["part-00000.safetensors", "part-00001.safetensors"]
    in_steps = tmp_path / "steps"  # part 0 is filled by two runs, then part 1 begun
    for name in ("green.mp4", "grey.gif", "more", "red.mp4"):
        build(in_steps, encoder, [clips / name])
    assert len(list(in_steps.glob("part-*"))) == 2
    a, b = VideoIndex.load(whole), VideoIndex.load(in_steps)
    assert a.rows == b.rows
    np.testing.assert_allclose(a.features, b.features, atol=1e-6)


def test_killed_at_any_time_it_goes_on(encoder, tiny_checkpoint, clips, tmp_path):
    """A process that is killed after two videos, while it writes the third, leaves an index of two."""
    script = f"""
import os, signal
from bt_adapter_hf.search import index as indexing
from bt_adapter_hf.search.encoding import VideoEncoder
from bt_adapter_hf.search.files import find_videos
indexing.FLUSH_SECONDS = 0
replace, count = os.replace, 0
def replace_or_die(source, target):
    global count
    count += str(target).endswith(".safetensors")
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_or_die
encoder = VideoEncoder.from_pretrained({str(tiny_checkpoint)!r}, device="cpu")
with indexing.IndexWriter({str(tmp_path / "idx")!r}, encoder) as writer:
    for video in encoder.encode_videos(writer.missing(find_videos([{str(clips)!r}])), batch_size=1):
        writer.add(video)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [Path(row["path"]).name for row in VideoIndex.load(tmp_path / "idx").rows] == ["green.mp4", "grey.gif"]
    assert build(tmp_path / "idx", encoder, [clips])[0] == ["empty.mp4", "garbage.avi", "blue.MP4", "red.mp4"]
    assert len(VideoIndex.load(tmp_path / "idx").rows) == 4
    assert not list((tmp_path / "idx").glob(".*"))


def test_an_interrupt_keeps_what_was_done(encoder, clips, tmp_path):
    with pytest.raises(KeyboardInterrupt), IndexWriter(tmp_path / "idx", encoder) as writer:
        for video in encoder.encode_videos([str(clips / "red.mp4"), str(clips / "green.mp4")]):
            writer.add(video)
            raise KeyboardInterrupt
    assert [Path(row["path"]).name for row in VideoIndex.load(tmp_path / "idx").rows] == ["red.mp4"]


def test_another_model_is_refused(encoder, clips, tmp_path):
    build(tmp_path / "idx", encoder, [clips])
    before = {path.name: path.read_bytes() for path in (tmp_path / "idx").iterdir()}
    torch.manual_seed(1)
    other = VideoEncoder(BTAdapterModel(encoder.model.config), encoder.processor, "other/model")
    with pytest.raises(IndexMismatchError, match=r"made with .*model \(float32\); the model now used, other/model"):
        IndexWriter(tmp_path / "idx", other).__enter__()
    index = VideoIndex.load(tmp_path / "idx")
    index.check_model(encoder)
    with pytest.raises(IndexMismatchError, match="other weights"):
        index.check_model(other)
    assert {path.name: path.read_bytes() for path in (tmp_path / "idx").iterdir()} == before


def test_other_settings_are_refused(encoder, tiny_checkpoint, clips, tmp_path):
    build(tmp_path / "idx", encoder, [clips])
    other = VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu", num_frames=6)
    with pytest.raises(IndexMismatchError, match=r"other settings \(num_frames=4, now 6\)"):
        IndexWriter(tmp_path / "idx", other).__enter__()


def test_search_equals_a_naive_one():
    index = random_index(50)
    queries = index.features[[7, 30]] + 0.1 * index.features[[8, 31]]
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    results = index.search(queries, k=6)
    for query, hits in zip(queries, results, strict=True):
        scores = [float(sum(a * b for a, b in zip(query, row, strict=True))) for row in index.features]
        expected = sorted(range(50), key=lambda i: -scores[i])[:6]
        assert [hit.row["path"] for hit in hits] == [f"{i}.mp4" for i in expected]
        assert [hit.score for hit in hits] == pytest.approx([scores[i] for i in expected], abs=1e-6)
        assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5, 6]
    assert [hits[0].row["path"] for hits in results] == ["7.mp4", "30.mp4"]
    assert len(index.search(queries, k=500)[0]) == 50


def test_search_refuses_bad_queries():
    index = random_index(5)
    with pytest.raises(ValueError, match=r"shape \(1, 3\); expected \(queries, 8\)"):
        index.search(np.ones((1, 3), np.float32))
    with pytest.raises(ValueError, match="k=0"):
        index.search(index.features[:1], k=0)


def test_median_score():
    index = random_index(9)
    query = index.features[0]
    assert index.median_score(query) == pytest.approx(sorted(index.features @ query)[4])


def test_no_index_and_damaged_index(encoder, clips, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no index: make one with `bt-adapter index"):
        VideoIndex.load(tmp_path)
    build(tmp_path / "idx", encoder, [clips])
    part = tmp_path / "idx" / "part-00000.safetensors"
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="part-00000.safetensors' is damaged"):
        VideoIndex.load(tmp_path / "idx")
    part.unlink()
    with pytest.raises(ValueError, match="is empty"):
        VideoIndex.load(tmp_path / "idx")
    info = tmp_path / "idx" / "index.json"
    info.write_text(info.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="format 2; this version reads 1"):
        VideoIndex.load(tmp_path / "idx")
    info.write_text('{"format": 1, "model": null}')
    with pytest.raises(ValueError, match="index.json' is damaged, it does not say revision, fingerprint"):
        VideoIndex.load(tmp_path / "idx")
    info.write_text("{")
    with pytest.raises(ValueError, match="not the description of a video index"):
        VideoIndex.load(tmp_path / "idx")


def test_outputs_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(FileExistsError, match="is a file; an index is a folder"):
        check_writable(file)
    with pytest.raises(OSError, match="cannot be written to '.*file/below'"):
        check_writable(file / "below")
    with pytest.raises(ValueError, match=r"holds other files \('file'\) and no index"):
        check_writable(tmp_path)
    check_writable(tmp_path / "new" / "folder")
    assert sorted(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can write to")
def test_read_only_output():
    with pytest.raises(OSError, match="the index cannot be written to '/proc/index'"):
        check_writable("/proc/index")


def test_a_feature_of_a_vanished_file_is_an_error(encoder, tmp_path):
    video = EncodedVideo(str(tmp_path / "gone.mp4"), np.ones(12, np.float32), {}, None)
    with pytest.raises(FileNotFoundError, match="gone.mp4"), IndexWriter(tmp_path / "idx", encoder) as writer:
        writer.add(video)
    assert not (tmp_path / "idx").exists()
