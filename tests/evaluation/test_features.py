"""Features under the temporal controls: equal to the plain way, decoded once, resumable, in several processes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bt_adapter_hf.evaluation import frames as frames_module
from bt_adapter_hf.evaluation.controls import middle_frame, reverse_frames
from bt_adapter_hf.evaluation.features import Clip, OtherRunError, encode_clips, own_clips, read_features
from bt_adapter_hf.evaluation.frames import ClipDecoder
from bt_adapter_hf.hub import machine
from bt_adapter_hf.search.encoding import VideoEncoder
from tests import tiny_pairs
from tests.chat.tiny_hosts import stir
from tests.evaluation.forks import in_processes, killed_after


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint) -> VideoEncoder:
    encoder = VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu")
    stir(encoder.model.vision_model.bt_adapter)  # a fresh branch would not see the order
    return encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(7):
        tiny_pairs.write_clip(folder / f"{number}.mp4", (200, 20 * number, 90), step=number + 1)
    (folder / "broken.mp4").write_bytes(b"nothing")
    return folder


def clips_of(folder) -> list[Clip]:
    names = sorted(path.name for path in folder.iterdir())
    return [Clip(row, name, str(folder / name), {"texts": [name]}) for row, name in enumerate(names)]


def encode(encoder, folder, output, protocol=None, **options):
    return encode_clips(encoder, [clips_of(folder)], output, protocol or {}, **options)


def assert_equal(found, expected, atol=0.0):
    assert (found.failed, found.rows) == (expected.failed, expected.rows)
    assert found.features.keys() == expected.features.keys()
    for condition, rows in expected.features.items():
        assert found.features[condition].keys() == rows.keys()
        for name, row in rows.items():
            np.testing.assert_allclose(found.features[condition][name], row, atol=atol, rtol=0)


def test_conditions_equal_the_plain_way(encoder, folder, tmp_path):
    found = encode(encoder, folder, tmp_path / "run", draws=2)
    assert set(found.features) == {"full", "shuffled_0", "shuffled_1", "reversed", "one_frame", "frame_average"}
    assert found.failed.keys() == {7} and found.failed[7][0] == "broken.mp4" in found.failed[7][1]
    assert found.rows[3] == ("3.mp4", {"texts": ["3.mp4"]}) and len(found.rows) == 7
    videos = encoder.processor(videos=[str(folder / "3.mp4")], return_tensors="pt")["pixel_values_videos"]
    with torch.no_grad():
        plain = {
            "full": encoder.model.get_video_features(videos),
            "reversed": encoder.model.get_video_features(reverse_frames(videos)),
            "one_frame": encoder.model.get_video_features(middle_frame(videos)),
        }
        images = encoder.model.get_image_features(videos[0]).pooler_output
    rows = {name: output.pooler_output[0] for name, output in plain.items()}
    rows["frame_average"] = torch.nn.functional.normalize(images, dim=-1).mean(dim=0)
    for name, row in rows.items():
        expected = torch.nn.functional.normalize(row, dim=-1).numpy()
        np.testing.assert_allclose(found.features[name]["3.mp4"], expected, atol=1e-6)
    shuffled = [found.features[name]["3.mp4"] for name in ("full", "shuffled_0", "shuffled_1", "reversed")]
    assert min(np.abs(shuffled[0] - other).max() for other in shuffled[1:]) > 1e-5


def test_every_clip_is_decoded_once(encoder, folder, tmp_path, monkeypatch):
    decoded = []
    load = frames_module.load_video

    def counted(video, *args, **kwargs):
        decoded.append(video)
        return load(video, *args, **kwargs)

    monkeypatch.setattr(frames_module, "load_video", counted)
    encode(encoder, folder, tmp_path / "run", item_timeout=None)
    assert len(decoded) == 8
    encode(encoder, folder, tmp_path / "run", item_timeout=None)
    assert len(decoded) == 9  # what failed is tried again


def test_workers_and_time_limits_change_nothing(encoder, folder, tmp_path):
    expected = encode(encoder, folder, tmp_path / "a", item_timeout=None)
    assert_equal(encode(encoder, folder, tmp_path / "b", workers=2, item_timeout=30), expected)


def test_those_that_decode_leave_cores_to_the_model(monkeypatch):
    monkeypatch.setattr(machine, "available_cores", lambda: 4)
    with machine.torch_threads(torch.get_num_threads()):
        torch.set_num_threads(4)
        with ClipDecoder(lambda *clip: np.array(torch.get_num_threads()), 1, None) as decoder:
            ((_, threads),) = decoder([Clip(0, "a", "a.mp4", {})])
            assert torch.get_num_threads() == 3 and threads == 1
        assert torch.get_num_threads() == 4


def test_killed_and_resumed_and_in_two_processes(encoder, folder, tmp_path):
    """The same features as without a kill and in one process, to the last bit."""
    expected = encode(encoder, folder, tmp_path / "a", workers=2)
    assert in_processes(lambda: encode(encoder, folder, tmp_path / "b", progress=killed_after(1)), 1) == [-9]
    assert len(read_features(tmp_path / "b").features["full"]) == 4
    assert in_processes(lambda: encode(encoder, folder, tmp_path / "b")) == [0, 0]
    found = encode(encoder, folder, tmp_path / "b")
    assert_equal(found, expected, atol=1e-6)


def test_processes_share_videos_and_not_rows():
    """Of two rows for each video no video goes to both processes, and neither gets all of those that come first."""
    clips = [Clip(row, f"{row // 2}.mp4", None, {}) for row in range(12)]
    shares = [list(own_clips([clips], rank, 2)) for rank in range(2)]
    assert [sorted({clip.name for clip in share}) for share in shares] == [
        ["0.mp4", "2.mp4", "4.mp4"],
        ["1.mp4", "3.mp4", "5.mp4"],
    ]
    assert sorted(clip.row for share in shares for clip in share) == list(range(12))
    assert [len(list(own_clips([clips[:4], clips[4:]], rank, 2))) for rank in range(2)] == [4, 8]  # whole shards


def test_another_run_is_refused(encoder, folder, tmp_path):
    encode(encoder, folder, tmp_path / "run", {"model": "a"})
    with pytest.raises(OtherRunError, match="model: 'a' there, 'b' now"):
        encode(encoder, folder, tmp_path / "run", {"model": "b"})
    with pytest.raises(OtherRunError, match="seed: 0 there, 1 now"):
        encode(encoder, folder, tmp_path / "run", {"model": "a"}, seed=1)
    with pytest.raises(ValueError, match="Unknown controls"):
        encode(encoder, folder, tmp_path / "run", {"model": "a"}, controls=["backwards"])


def test_damaged_files_of_a_run_are_named(encoder, folder, tmp_path, caplog):
    expected = encode(encoder, folder, tmp_path / "run", workers=1)
    parts = sorted((tmp_path / "run" / "features").iterdir())
    parts[0].write_bytes(parts[0].read_bytes()[:-7])
    assert_equal(encode(encoder, folder, tmp_path / "run", workers=1), expected)
    assert f"{parts[0]} is damaged" in caplog.text
    (tmp_path / "run" / "protocol.json").write_text("[]")
    with pytest.raises(OtherRunError, match="protocol.json is damaged .*use another folder"):
        encode(encoder, folder, tmp_path / "run")


def test_what_came_back_is_no_failure_any_more(encoder, folder, tmp_path):
    one, other = clips_of(folder)[:2]
    gone = one._replace(video=None, problem="0.mp4 is gone.")
    first = encode_clips(encoder, [[gone, other]], tmp_path / "run", {}, item_timeout=None)
    assert first.failed == {0: ("0.mp4", "0.mp4 is gone.")} and list(first.features["full"]) == ["1.mp4"]
    second = encode_clips(encoder, [[one, other]], tmp_path / "run", {}, item_timeout=None)
    assert second.failed == {} and second.stacked("reversed", ["1.mp4", "0.mp4"]).shape == (2, 12)
    assert set(second.rows) == {0, 1}


def test_rows_may_share_a_video(encoder, folder, tmp_path):
    """Several captions of one video: it is encoded once; from bytes as from a path."""
    one, other = clips_of(folder)[:2]
    content = (folder / "0.mp4").read_bytes()
    rows = [one, one._replace(row=5, video=content, info={"texts": ["b"]}), other, one._replace(row=9, info={})]
    found = encode_clips(encoder, [rows], tmp_path / "run", {}, item_timeout=None)
    assert set(found.rows) == {0, 1, 5, 9} and set(found.features["full"]) == {"0.mp4", "1.mp4"}
    again = encode_clips(encoder, [[one._replace(video=content)]], tmp_path / "bytes", {}, item_timeout=None)
    np.testing.assert_array_equal(again.features["full"]["0.mp4"], found.features["full"]["0.mp4"])


def test_a_feature_that_is_no_number_is_a_failure(encoder, folder, tmp_path, monkeypatch):
    """Of that clip alone, and named; not of the ranks of all others."""
    native = encoder.model.get_image_features

    def spoilt(pixels):
        output = native(pixels)
        output["pooler_output"] = output.pooler_output / (0 if len(read) == 1 else 1)
        read.append(pixels)
        return output

    read = []
    monkeypatch.setattr(encoder.model, "get_image_features", spoilt)
    found = encode_clips(encoder, [clips_of(folder)[:3]], tmp_path / "run", {}, item_timeout=None)
    assert set(found.rows) == {0, 2} and found.failed[1][0] == "1.mp4" and "is not finite" in found.failed[1][1]


def test_a_file_that_changed_is_encoded_anew(encoder, folder, tmp_path):
    """Other content under the same name, here of another media root; and a file that was spoilt is a failure then."""
    one, other = clips_of(folder)[:2]
    first = encode_clips(encoder, [[one._replace(identity="a")]], tmp_path / "run", {}, item_timeout=None)
    changed = one._replace(video=other.video, identity="b")
    second = encode_clips(encoder, [[changed]], tmp_path / "run", {}, item_timeout=None)
    assert np.abs(second.features["full"]["0.mp4"] - first.features["full"]["0.mp4"]).max() > 1e-5
    plain = encode_clips(encoder, [[other]], tmp_path / "plain", {}, item_timeout=None)
    np.testing.assert_array_equal(second.features["full"]["0.mp4"], plain.features["full"]["1.mp4"])
    spoilt = one._replace(video=str(folder / "broken.mp4"), identity="c")
    third = encode_clips(encoder, [[spoilt]], tmp_path / "run", {}, item_timeout=None)
    assert third.rows == {} and third.failed.keys() == {0}
    with pytest.raises(ValueError, match="twice"):
        encode_clips(encoder, [[one]], tmp_path / "run", {}, controls=["reversed", "reversed"])
