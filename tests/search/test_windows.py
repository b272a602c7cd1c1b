import av
import numpy as np
import pytest
import torch
from PIL import Image

from bt_adapter_hf.hub import machine
from bt_adapter_hf.models.video_io import load_video
from bt_adapter_hf.search.encoding import EncodedVideo, VideoEncoder
from bt_adapter_hf.search.film import Film
from bt_adapter_hf.search.frame_states import FrameStates
from bt_adapter_hf.search.index import VideoIndex
from bt_adapter_hf.search.moments import Windows
from bt_adapter_hf.search.windows import EncodedMoments, encode_moments
from bt_adapter_hf.search.writer import IndexWriter


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint) -> VideoEncoder:
    return VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture
def frames_seen(encoder):
    """Numbers of frames that pass the image model, of each call."""
    counts: list[int] = []
    tower = encoder.model.vision_model.vision_model
    hook = tower.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    yield counts
    hook.remove()


def write_film(path, frames: int, fps: int = 10, codec: str = "libx264", form: str = "mp4") -> None:
    """No two frames are equal; a key frame every 12."""
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=fps, options={"g": "12"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for t in range(frames):
            image = np.full((32, 32, 3), 15, np.uint8)
            image[10:20, t % 22 : t % 22 + 10] = (3 * t % 255, 90, 220 - 2 * t % 200)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module", params=["film.mp4", "film.avi", "film.gif"])
def film(request, tmp_path_factory):
    """A film of 6 s: one that can be sought in, one that cannot, one that PIL reads."""
    path = tmp_path_factory.mktemp("film") / request.param
    if path.suffix == ".gif":
        frames = [Image.fromarray(np.full((24, 32, 3), 4 * t, np.uint8)) for t in range(60)]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    elif path.suffix == ".avi":
        write_film(path, 60, codec="mpeg4", form="avi")
    else:
        write_film(path, 60)
    return str(path)


@pytest.mark.parametrize("stride", [1.0, 0.3])
def test_features_equal_those_of_each_window_alone(encoder, film, stride, frames_seen):
    frames_seen.clear()
    (video,) = encode_moments(encoder, [film], Windows(2.0, stride), batch_size=2)
    assert video.error is None
    count = sum(frames_seen)
    shown = {second for moment in video.moments for second in moment.timestamps}
    assert count == len(shown)  # each distinct frame once
    assert video.moments[0].start == 0
    assert video.moments[-1].end == pytest.approx(6.0, abs=0.51)
    assert video.features.shape == (len(video.moments), 12)
    every, metadata = load_video(film, num_frames=None)
    times = np.array(metadata.timestamps)
    for moment, feature in zip(video.moments, video.features, strict=True):
        assert moment.end - moment.start == pytest.approx(2)
        grid = moment.start + np.arange(4) * 0.5
        np.testing.assert_allclose(moment.timestamps, grid, atol=0.1 + 1e-6)
        frames = every[[int(np.abs(times - second).argmin()) for second in moment.timestamps]]
        inputs = encoder.processor(videos=[frames], return_tensors="pt")
        with torch.no_grad():
            alone = encoder.model.get_video_features(**inputs).pooler_output[0]
        np.testing.assert_allclose(feature, (alone / alone.norm()).numpy(), atol=1e-5)


def test_overlap_costs_no_frame_of_the_tower(encoder, tmp_path, frames_seen):
    write_film(tmp_path / "film.mp4", 80)
    counts = []
    for stride in (2.0, 1.0):
        frames_seen.clear()
        (video,) = encode_moments(encoder, [str(tmp_path / "film.mp4")], Windows(2.0, stride))
        counts.append((len(video.moments), sum(frames_seen)))
    assert counts == [(4, 16), (7, 16)]


def test_short_videos_broken_ones_and_films_in_one_run(encoder, clips, tmp_path):
    write_film(clips / "film.mp4", 30)
    names = ("red.mp4", "empty.mp4", "green.mp4", "film.mp4", "garbage.avi", "grey.gif")
    paths = [str(clips / name) for name in names]
    encoded = list(encode_moments(encoder, paths, Windows(2.0, 1.0), batch_size=2, workers=2))
    assert [video.path for video in encoded] == paths
    assert [type(video) for video in encoded] == [
        EncodedVideo, EncodedMoments, EncodedVideo, EncodedMoments, EncodedMoments, EncodedVideo
    ]  # fmt: skip
    assert [video.error is None for video in encoded] == [True, False, True, True, False, True]
    (alone,) = encoder.encode_videos(paths[:1])
    np.testing.assert_allclose(encoded[0].feature, alone.feature, atol=1e-6)
    # and as an index
    with IndexWriter(tmp_path / "idx", encoder, Windows(2.0, 1.0)) as writer:
        update = writer.update(paths, [clips])
    assert (update.added, len(update.skipped)) == (4, 2)
    index = VideoIndex.load(tmp_path / "idx")
    assert index.info["moments"] == {"window": 2.0, "stride": 1.0}
    spans = [(row["start"], row["end"]) for row in index.rows if row["path"].endswith("film.mp4")]
    assert spans == [(0.0, 2.0), (1.0, 3.0)]
    assert len(index) == 5
    with IndexWriter(tmp_path / "idx", encoder, Windows(2.0, 1.0)) as writer:
        assert writer.update(paths, [clips]).added == 0
    write_film(clips / "film.mp4", 41)  # longer: its rows are others
    with IndexWriter(tmp_path / "idx", encoder, Windows(2.0, 1.0)) as writer:
        assert writer.update(paths, [clips]).added == 1
    spans = [row["start"] for row in VideoIndex.load(tmp_path / "idx").rows if row["path"].endswith("film.mp4")]
    assert sorted(spans) == [0.0, 1.0, 2.0]


def test_decoding_and_the_tower_share_the_cores(encoder, tmp_path, monkeypatch):
    write_film(tmp_path / "film.mp4", 40)
    threads, add = [], FrameStates.add
    monkeypatch.setattr(FrameStates, "add", lambda *args: threads.append(torch.get_num_threads()) or add(*args))
    monkeypatch.setattr(machine, "available_cores", lambda: 4)
    with machine.torch_threads(torch.get_num_threads()):
        torch.set_num_threads(4)
        (film,) = encode_moments(encoder, [str(tmp_path / "film.mp4")], Windows(1.0, 0.5))
        assert torch.get_num_threads() == 4
    assert film.error is None and set(threads) == {2}  # two decode


def test_a_film_that_is_cut(encoder, tiny_checkpoint, tmp_path):
    path = tmp_path / "cut.mkv"
    write_film(path, 60, form="matroska")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    (video,) = encode_moments(encoder, [str(path)], Windows(1.0, 1.0))
    assert "cut.mkv is truncated" in str(video.error)
    salvaging = VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu", on_damage="salvage")
    (video,) = encode_moments(salvaging, [str(path)], Windows(1.0, 1.0))
    assert 2 <= len(video.moments) <= 4


def test_memory_is_that_of_a_few_frames(encoder, tmp_path):
    write_film(tmp_path / "film.mp4", 80)
    film = Film(str(tmp_path / "film.mp4"), "raise", (0, 0, 0))
    read = list(film.read(np.arange(0, 80, 5), at_once=3))
    film.close()
    assert [len(part) for part in read] == [3, 3, 3, 3, 3, 1]
    every, _ = load_video(tmp_path / "film.mp4", num_frames=None)
    np.testing.assert_array_equal(np.concatenate(read), every[::5])


def test_bad_options(encoder):
    with pytest.raises(ValueError, match="batch_size=0"):
        next(encode_moments(encoder, ["x.mp4"], Windows(2, 1), batch_size=0))
    with pytest.raises(ValueError, match="workers=0"):
        next(encode_moments(encoder, ["x.mp4"], Windows(2, 1), workers=0))
