import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import lancedb
import numpy as np
import pytest
import torch

from bt_adapter_hf import BTAdapterModel
from bt_adapter_hf.search import writer as writing
from bt_adapter_hf.search.encoding import EncodedVideo, VideoEncoder
from bt_adapter_hf.search.files import find_videos
from bt_adapter_hf.search.index import IndexMismatchError, VideoIndex
from bt_adapter_hf.search.moments import Windows
from bt_adapter_hf.search.table import check_writable
from bt_adapter_hf.search.writer import IndexWriter, Update, prune
from tests import tiny_pairs


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint) -> VideoEncoder:
    return VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu")


def build(folder, encoder, videos, **options) -> tuple[list[str], Update]:
    """Index what is missing; returns that."""
    with IndexWriter(folder, encoder) as writer:
        missing = writer.missing(find_videos(videos))
        update = writer.update(find_videos(videos), videos, **options)
    assert update.added + len(update.skipped) == len(missing)
    return [os.path.basename(path) for path in missing], update


def names(folder) -> list[str]:
    return sorted(Path(row["path"]).name for row in VideoIndex.load(folder).rows)


def test_build_and_load(encoder, clips, tmp_path):
    missing, update = build(tmp_path / "idx", encoder, [clips])
    assert (len(missing), len(update.skipped)) == (6, 2)
    assert sorted(path.name for path in (tmp_path / "idx").iterdir()) == ["skipped.jsonl", "videos.lance"]
    index = VideoIndex.load(tmp_path / "idx")
    assert [Path(row["path"]).name for row in index.rows] == ["green.mp4", "grey.gif", "blue.MP4", "red.mp4"]
    assert index.features.shape == (4, 12)
    assert index.features.dtype == np.float32
    for row, feature in zip(index.rows, index.features, strict=True):
        (video,) = encoder.encode_videos([row["path"]])
        np.testing.assert_allclose(feature, video.feature, atol=1e-6)
        assert row["size"] == os.path.getsize(row["path"])
        assert row["start"] == 0 < row["duration"] == row["end"]
        assert {name: row[name] for name in video.facts} == video.facts

    skipped = [json.loads(line) for line in (tmp_path / "idx" / "skipped.jsonl").read_text().splitlines()]
    assert [Path(line["path"]).name for line in skipped] == ["empty.mp4", "garbage.avi"]
    assert skipped[0]["reason"].startswith("is empty")  # the path stands beside it

    info = index.info
    assert info["model"] == encoder.source
    assert info["features_fingerprint"] == encoder.fingerprint()
    assert info["settings"]["num_frames"] == 4
    assert info["settings"]["sampling"] == "uniform"
    assert info["dtype"] == "float32"
    assert {"bt_adapter_hf", "torch", "transformers", "lancedb"} <= info["packages"].keys()


def test_resume_indexes_only_what_is_new_or_changed(encoder, clips, tmp_path):
    build(tmp_path / "idx", encoder, [clips])
    before = VideoIndex.load(tmp_path / "idx")
    assert build(tmp_path / "idx", encoder, [clips])[0] == ["empty.mp4", "garbage.avi"]  # may have been mended

    tiny_pairs.write_clip(clips / "new.mp4", (250, 250, 250), step=-3)
    tiny_pairs.write_clip(clips / "red.mp4", (20, 250, 250), step=5, frames=8)
    (clips / "empty.mp4").unlink()
    version = before.table.version
    assert sorted(build(tmp_path / "idx", encoder, [clips])[0]) == ["garbage.avi", "new.mp4", "red.mp4"]
    after = VideoIndex.load(tmp_path / "idx")
    assert after.table.version == version + 1  # the old row left as the new ones came
    assert names(tmp_path / "idx") == ["blue.MP4", "green.mp4", "grey.gif", "new.mp4", "red.mp4"]
    old = {row["path"]: feature for row, feature in zip(before.rows, before.features, strict=True)}
    for row, feature in zip(after.rows, after.features, strict=True):
        if row["path"].endswith("red.mp4"):
            assert np.abs(feature - old[row["path"]]).max() > 1e-4
        elif row["path"] in old:
            np.testing.assert_array_equal(feature, old[row["path"]])


def test_a_video_that_changed_into_a_broken_one_leaves(encoder, clips, tmp_path):
    build(tmp_path / "idx", encoder, [clips])
    (clips / "red.mp4").write_bytes(b"no longer a video")
    (clips / "green.mp4").unlink()  # vanished ones stay until they are pruned
    with IndexWriter(tmp_path / "idx", encoder) as writer:
        update = writer.update([*find_videos([clips]), str(clips / "green.mp4")])
    assert len(update.skipped) == 4
    assert names(tmp_path / "idx") == ["blue.MP4", "green.mp4", "grey.gif"]


def test_what_is_gone_is_taken_out_where_it_was_looked_for(encoder, clips, tmp_path):
    build(tmp_path / "idx", encoder, [clips])
    (clips / "green.mp4").unlink()
    (clips / "more" / "blue.MP4").unlink()
    _, update = build(tmp_path / "idx", encoder, [clips])
    assert (update.added, update.present, update.gone, update.pruned) == (0, 2, 2, 0)
    assert names(tmp_path / "idx") == ["blue.MP4", "green.mp4", "grey.gif", "red.mp4"]
    with IndexWriter(tmp_path / "idx", encoder) as writer:  # it looks elsewhere: they may lie on a disk that is away
        looked = [str(clips / "grey.gif")], [clips / "more" / "*.gif"]
        with pytest.raises(ValueError, match="left under '.*more' .1 gone, .*blue.MP4'.*not mounted.*--force"):
            writer.update(*looked, prune=True)
        assert writer.update(*looked, prune=True, force=True).pruned == 1
    assert names(tmp_path / "idx") == ["green.mp4", "grey.gif", "red.mp4"]
    _, update = build(tmp_path / "idx", encoder, [clips], prune=True)
    assert (update.added, update.present, update.gone, update.pruned) == (0, 2, 1, 1)
    assert names(tmp_path / "idx") == ["grey.gif", "red.mp4"]
    # the rest is as it was, and a file that comes back is indexed again
    tiny_pairs.write_clip(clips / "green.mp4", tiny_pairs.COLOURS["green"], step=3)
    assert "green.mp4" in build(tmp_path / "idx", encoder, [clips])[0]
    (clips / "red.mp4").unlink()
    assert prune(tmp_path / "idx") == 1
    index = VideoIndex.load(tmp_path / "idx")
    assert names(tmp_path / "idx") == ["green.mp4", "grey.gif"]
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


def test_odd_names(encoder, clips, tmp_path):
    """Quotes are no SQL, and bytes that are no text come back as they were."""
    odd = [os.fsencode(clips) + name for name in (b"/it's.mp4", b"/caf\xe9.mp4", b"/two\nlines.mp4")]
    for name in odd:
        shutil.copy(clips / "red.mp4", name)
    (clips / "red.mp4").unlink()
    build(tmp_path / "idx", encoder, [clips])
    paths = {os.fsencode(row["path"]) for row in VideoIndex.load(tmp_path / "idx").rows}
    assert paths > set(odd)
    assert len(build(tmp_path / "idx", encoder, [clips])[0]) == 2  # the broken ones
    for name in odd:
        os.unlink(name)
    assert prune(tmp_path / "idx") == 3
    assert names(tmp_path / "idx") == ["blue.MP4", "green.mp4", "grey.gif"]


def test_a_disk_that_is_not_mounted_is_not_pruned(encoder, clips, tmp_path):
    """Nothing is left of a folder, be it there or not, while another one has all its videos."""
    away = tmp_path / "disk" / "videos"
    away.mkdir(parents=True)
    shutil.copy(clips / "red.mp4", away / "far.mp4")
    build(tmp_path / "idx", encoder, [clips / "red.mp4", away])
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    (tmp_path / "disk").mkdir()
    with pytest.raises(ValueError, match="left under '.*disk'"), IndexWriter(tmp_path / "idx", encoder) as writer:
        writer.update([str(clips / "red.mp4")], [], prune=True)
    with pytest.raises(ValueError, match=r"left under '.*disk' \(1 gone, the first is '.*far.mp4'\)"):
        prune(tmp_path / "idx")
    assert names(tmp_path / "idx") == ["far.mp4", "red.mp4"]
    assert prune(tmp_path / "idx", force=True) == 1
    assert names(tmp_path / "idx") == ["red.mp4"]


@pytest.mark.parametrize("windows", [None, Windows(0.4, 0.2)])
def test_a_feature_that_is_not_finite_is_the_failure_of_its_video(encoder, clips, tmp_path, windows):
    """Here of one whose frames are red: the other one of its batch is indexed, and it is listed."""

    def spoil(module, args):
        red = args[0].mean((2, 3))[:, 0] > args[0].mean((2, 3))[:, 1]  # of frames (N, 3, H, W)
        return (args[0].masked_fill(red[:, None, None, None], torch.nan), *args[1:])

    hook = encoder.model.vision_model.vision_model.register_forward_pre_hook(spoil)
    paths = find_videos([clips / "red.mp4", clips / "green.mp4"])
    with IndexWriter(tmp_path / "idx", encoder, windows) as writer:
        update = writer.update(paths, batch_size=2, workers=1)
    hook.remove()
    assert update.added == 1
    assert [line["path"] for line in update.skipped] == [str(clips / "red.mp4")]
    assert "red.mp4' is not finite: try --dtype float32" in update.skipped[0]["reason"]
    assert set(names(tmp_path / "idx")) == {"green.mp4"}
    assert encoder.stopwatch.seconds.keys() >= {"decode", "preprocess", "tower", "write"}


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


def index_in_a_process(model: str, paths: list[str], folder: str) -> None:
    writing.FLUSH_SECONDS = 0  # a transaction for every video
    with IndexWriter(folder, VideoEncoder.from_pretrained(model, device="cpu")) as writer:
        writer.update(paths, batch_size=1, workers=1)


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on(encoder, tiny_checkpoint, clips, tmp_path):
    """SIGKILL at 20 random moments, then the same command again: the table is that of a run that nobody stopped."""
    for number in range(60):
        tiny_pairs.write_clip(clips / f"{number}.mp4", (4 * number, 200, 100), step=number)
    paths, rng, ends = find_videos([clips]), np.random.default_rng(20), []
    # Processes of a server that has never used LanceDB: a copy of one that has may crash.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.search.test_writer"])
    arguments = (str(tiny_checkpoint), paths, str(tmp_path / "idx"))
    started = time.monotonic()
    build(tmp_path / "whole", encoder, [clips], batch_size=1, workers=1)
    seconds = time.monotonic() - started
    for _ in range(20):
        child = context.Process(target=index_in_a_process, args=arguments)
        child.start()
        child.join(rng.uniform(0.3, 2) * seconds / 4)
        child.kill()
        child.join()
        ends.append(child.exitcode)
    assert -signal.SIGKILL in ends and set(ends) <= {0, -signal.SIGKILL}
    again_equals_whole(tmp_path, encoder, clips, 64)


def test_what_is_on_the_disk_at_any_time_can_be_gone_on_with(encoder, clips, tmp_path, monkeypatch):
    """As a process that is killed leaves it: after each video, with the lock held."""
    monkeypatch.setattr(writing, "FLUSH_SECONDS", 0)
    build(tmp_path / "whole", encoder, [clips])
    paths = find_videos([clips])
    with IndexWriter(tmp_path / "running", encoder) as writer:
        for number, video in enumerate(encoder.encode_videos(paths, batch_size=1, workers=1)):
            writer.add(video)
            (tmp_path / str(number)).mkdir()
            shutil.copytree(tmp_path / "running", tmp_path / str(number) / "idx")
            shutil.copytree(tmp_path / "whole", tmp_path / str(number) / "whole")
    for number in range(len(paths)):
        again_equals_whole(tmp_path / str(number), encoder, clips, 4)


def again_equals_whole(folder, encoder, clips, rows: int) -> None:
    build(folder / "idx", encoder, [clips])
    table = {row["path"]: (row, feature) for row, feature in contents(folder / "idx")}
    whole = {row["path"]: (row, feature) for row, feature in contents(folder / "whole")}
    assert len(table) == len(contents(folder / "idx")) == rows
    assert table.keys() == whole.keys()
    for path, (row, feature) in table.items():
        assert row == whole[path][0]
        np.testing.assert_allclose(feature, whole[path][1], atol=1e-6)
    assert not list((folder / "idx").glob(".*"))


def contents(folder) -> list:
    index = VideoIndex.load(folder)
    return list(zip(index.rows, index.features, strict=True))


def test_an_interrupt_keeps_what_was_done(encoder, clips, tmp_path):
    with pytest.raises(KeyboardInterrupt), IndexWriter(tmp_path / "idx", encoder) as writer:
        for video in encoder.encode_videos([str(clips / "red.mp4"), str(clips / "green.mp4")]):
            writer.add(video)
            raise KeyboardInterrupt
    assert names(tmp_path / "idx") == ["red.mp4"]


def test_what_is_added_twice_is_there_once(encoder, clips, tmp_path, monkeypatch):
    (video,) = encoder.encode_videos([str(clips / "red.mp4")])
    with IndexWriter(tmp_path / "idx", encoder) as writer:
        writer.add(video)
        writer.add(video)
        monkeypatch.setattr(writing, "FLUSH_SECONDS", 0)
        writer.add(video)
        writer.add(video)
    assert names(tmp_path / "idx") == ["red.mp4"]


def test_another_model_is_refused(encoder, clips, tmp_path):
    build(tmp_path / "idx", encoder, [clips])
    version = VideoIndex.load(tmp_path / "idx").table.version
    torch.manual_seed(1)
    other = VideoEncoder(BTAdapterModel(encoder.model.config), encoder.processor, "other/model")
    with pytest.raises(IndexMismatchError, match=r"made with .*model \(float32\); the model now used, other/model"):
        IndexWriter(tmp_path / "idx", other).__enter__()
    index = VideoIndex.load(tmp_path / "idx")
    index.check_model(encoder)
    with pytest.raises(IndexMismatchError, match="other weights"):
        index.check_model(other)
    assert index.table.version == version


def test_other_settings_are_refused(encoder, tiny_checkpoint, clips, tmp_path):
    build(tmp_path / "idx", encoder, [clips])
    other = VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu", num_frames=6)
    with pytest.raises(IndexMismatchError, match=r"other settings \(num_frames=4, now 6\)"):
        IndexWriter(tmp_path / "idx", other).__enter__()


def test_a_table_that_does_not_say_what_made_it_is_not_adopted(encoder, clips, tmp_path):
    build(tmp_path / "idx", encoder, [clips])
    data = VideoIndex.load(tmp_path / "idx").table.to_arrow().replace_schema_metadata(None)
    lancedb.connect(tmp_path / "idx").create_table("videos", data, mode="overwrite")
    with pytest.raises(ValueError, match="does not say which model made it"):
        IndexWriter(tmp_path / "idx", encoder).__enter__()


def test_outputs_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(FileExistsError, match="is a file; an index is a folder"):
        check_writable(file)
    with pytest.raises(OSError, match="cannot be written to '.*file/below'"):
        check_writable(file / "below")
    with pytest.raises(ValueError, match=r"holds other files \('file'\) and no index"):
        check_writable(tmp_path)
    with pytest.raises(OSError, match="cannot be written to '.*': File name too long"):
        check_writable(tmp_path / ("n" * 300))
    with pytest.raises(ValueError, match=r"cannot be written to '.*caf\\xe9': the name is no text"):
        check_writable(tmp_path / "caf\udce9")
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
