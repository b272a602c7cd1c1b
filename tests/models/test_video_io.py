import io
import json
import os
import sys
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from bt_adapter_hf.models.video_backends import available_video_backends
from bt_adapter_hf.models.video_errors import (
    EmptyVideoError,
    NoVideoStreamError,
    TruncatedVideoError,
    VideoAccessError,
    VideoBackendError,
    VideoDecodeError,
    VideoDownloadError,
    VideoError,
    VideoInputError,
    VideoNotFoundError,
)
from bt_adapter_hf.models.video_io import VIDEO_BACKENDS, load_video, sample_frame_indices
from tests.clip_tools import SIDE, numbered_picture, read_numbers, write_clip, write_gif


DATA = Path(__file__).parents[1] / "data"
CLIPS = DATA / "clips"
USABLE_BACKENDS = [name for name, problem in available_video_backends().items() if problem is None]
INTACT_CLIPS = [
    "idx.mp4",
    "idx.mkv",
    "idx_elst.mp4",
    "idx_cut.mp4",
    "av1_video.mkv",
    "h265_video.mp4",
    "decord_video_0.mov",
    "decord_video_90.mov",
    "decord_video_180.mov",
    "decord_video_270.mov",
    "decord_unordered.mov",
]


def decode_naively(path) -> list[np.ndarray]:
    """All frames up to the first error, rotated by PyAV's angle."""
    frames = []
    with av.open(str(path)) as container:
        try:
            for frame in container.decode(video=0):
                frames.append(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
        except av.error.InvalidDataError:
            pass
    return frames


# Sampling


def test_sampling_rules_equal_the_released_ones():
    golden = json.loads((DATA / "frame_sampling.json").read_text())
    for row in golden["rows"]:
        total, count = row["total"], row["length"]
        assert sample_frame_indices(total, count).tolist() == row["uniform_test"]
        np.random.seed(golden["seed"])
        assert sample_frame_indices(total, count, "jitter").tolist() == row["uniform_train_seeded"]
        centers = sample_frame_indices(total, count, "centers").tolist()
        assert len(centers) == count
        if total >= count:  # the released function returns fewer for shorter videos
            assert centers == row["llava_get_seq_frames"]


@pytest.mark.parametrize("sampling", ["uniform", "jitter", "centers"])
@pytest.mark.parametrize(("total", "count"), [(1, 1), (1, 8), (3, 8), (8, 8), (200, 1), (301, 64)])
def test_sampled_indices_are_in_range_and_ordered(sampling, total, count):
    indices = sample_frame_indices(total, count, sampling, np.random.default_rng(0))
    assert len(indices) == count
    assert indices.min() >= 0 and indices.max() < total
    assert (np.diff(indices) >= 0).all()


def test_jitter_stays_in_its_segments_and_follows_the_generator():
    draws = np.stack([sample_frame_indices(80, 8, "jitter", np.random.default_rng(seed)) for seed in range(300)])
    starts = np.round((80 - 1) / 8 * np.arange(9)).astype(int)
    assert (draws.min(axis=0) == starts[:-1]).all() and (draws.max(axis=0) == starts[1:]).all()
    again = sample_frame_indices(80, 8, "jitter", np.random.default_rng(7))
    assert (again == draws[7]).all()


@pytest.mark.parametrize("num_frames", [0, -1, 2.0, "8", True])
def test_frame_counts_below_one_are_refused(num_frames):
    with pytest.raises(ValueError, match="`num_frames` must be an integer of at least 1"):
        load_video(CLIPS / "idx.mp4", num_frames=num_frames)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"sampling": "random"}, "`sampling` must be one of 'uniform', 'jitter', 'centers', got 'random'"),
        ({"backend": "opencv"}, "`backend` must be one of 'pyav', 'decord', 'torchcodec', got 'opencv'"),
        ({"on_damage": "skip"}, "`on_damage` must be one of"),
        ({"background": (0, 0, 256)}, "`background` must be three RGB values"),
        ({"backend": "decord", "on_damage": "salvage"}, "works with backend='pyav' only"),
    ],
)
def test_wrong_options_are_refused_and_are_no_video_errors(option, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_video(CLIPS / "idx.mp4", **option)
    assert not isinstance(caught.value, VideoError)


# The right frames


@pytest.mark.parametrize("backend", USABLE_BACKENDS)
@pytest.mark.parametrize("name", INTACT_CLIPS)
def test_every_backend_returns_the_right_frames_or_names_another(name, backend):
    expected = decode_naively(CLIPS / name)
    rng = np.random.default_rng(0)
    for _ in range(5):  # jitter skips frames unevenly, which is where seeking decoders fail
        try:
            frames, metadata = load_video(CLIPS / name, sampling="jitter", generator=rng, backend=backend)
        except VideoBackendError as error:
            assert backend != "pyav" and "backend='pyav'" in str(error)
            return
        assert metadata.total_num_frames == len(expected)
        assert len(frames) == 8
        for frame, index in zip(frames, metadata.frames_indices, strict=True):
            assert np.array_equal(frame, expected[index])


@pytest.mark.parametrize(
    ("file", "codec", "options"),
    [
        ("clip.mp4", "libx264", {"bf": "3"}),
        ("clip.mkv", "libx264", {"bf": "3"}),
        ("clip.webm", "libvpx-vp9", {}),
        ("clip.mov", "libx264", {}),
        ("mpeg4.avi", "mpeg4", {"bf": "2"}),
        ("h264.avi", "libx264", {"bf": "2"}),
        ("clip.ts", "libx264", {"bf": "3"}),
        ("raw.h264", "libx264", {}),
    ],
)
@pytest.mark.parametrize("backend", USABLE_BACKENDS)
def test_frame_numbers_of_every_container(tmp_path, file, codec, options, backend):
    path = write_clip(tmp_path / file, 50, codec, options=options)
    try:
        frames, metadata = load_video(path, num_frames=12, backend=backend)
    except (VideoBackendError, VideoDecodeError) as error:
        assert backend != "pyav" and "backend='pyav'" in str(error)
        return
    assert read_numbers(frames) == metadata.frames_indices == sample_frame_indices(50, 12).tolist()
    if file != "raw.h264":  # a raw stream knows neither its rate nor its times
        assert metadata.fps == 10
        assert metadata.duration == pytest.approx(5.0)
        assert metadata.timestamps == pytest.approx([index / 10 for index in metadata.frames_indices])


@pytest.mark.parametrize("backend", USABLE_BACKENDS)
def test_exactly_the_asked_number_of_frames(tmp_path, backend):
    path = write_clip(tmp_path / "short.mp4", 3)
    for count in (1, 2, 3, 8):
        frames, metadata = load_video(path, num_frames=count, backend=backend)
        assert read_numbers(frames) == metadata.frames_indices == sample_frame_indices(3, count).tolist()
    frames, metadata = load_video(path, num_frames=None, backend=backend)
    assert read_numbers(frames) == metadata.frames_indices == [0, 1, 2]


def test_avi_is_refused_by_torchcodec_in_words(tmp_path):
    if "torchcodec" not in USABLE_BACKENDS:
        pytest.skip("torchcodec is not installed")
    path = write_clip(tmp_path / "clip.avi", 10, "mpeg4")
    with pytest.raises(VideoBackendError, match="AVI files. Use backend='pyav'"):
        load_video(path, backend="torchcodec")


def test_known_failures_of_decord_are_refused_in_words(tmp_path):
    if "decord" not in USABLE_BACKENDS:
        pytest.skip("decord has no wheel here")
    with pytest.raises(VideoBackendError, match="33 frames that the edit list of the file hides"):
        load_video(CLIPS / "idx_elst.mp4", backend="decord")
    with pytest.raises(VideoBackendError, match="no AV1 decoder"):
        load_video(CLIPS / "av1_video.mkv", backend="decord")
    narrow = write_clip(tmp_path / "narrow.mp4", pictures=[np.zeros((64, 48, 3), np.uint8)] * 3)
    with pytest.raises(VideoBackendError, match="narrow frames"):
        load_video(narrow, backend="decord")
    mirrored = write_clip(tmp_path / "mirrored.mp4", 3, matrix=[-(1 << 16), 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30])
    with pytest.raises(VideoBackendError, match="mirroring"):
        load_video(mirrored, backend="decord")


@pytest.mark.parametrize("first", [-1, 1])
@pytest.mark.parametrize("second", [-1, 1])
@pytest.mark.parametrize("crossed", [False, True])
def test_display_matrix_is_applied(tmp_path, first, second, crossed):
    matrix = (0, first, second, 0) if crossed else (first, 0, 0, second)
    a, b, c, d = matrix
    stored = np.zeros((48, 64, 3), dtype=np.uint8)
    stored[:16, :16], stored[:16, 16:32] = 255, 90
    fixed = [value << 16 for value in matrix]
    path = write_clip(
        tmp_path / "turned.mp4", pictures=[stored] * 2, matrix=[*fixed[:2], 0, *fixed[2:], 0, 0, 0, 1 << 30]
    )
    # the definition, pixel by pixel: x' = a x + c y, y' = b x + d y
    rows, columns = np.mgrid[:48, :64]
    x, y = a * columns + c * rows, b * columns + d * rows
    x, y = x - x.min(), y - y.min()
    expected = np.zeros((y.max() + 1, x.max() + 1, 3))
    expected[y, x] = stored[rows, columns]
    frames, metadata = load_video(path, num_frames=1)
    assert frames[0].shape == expected.shape == (metadata.height, metadata.width, 3)
    assert np.abs(frames[0] - expected).mean() < 3  # lossy coding


def test_an_oblique_rotation_is_shown_unrotated_with_a_warning(tmp_path, caplog):
    diagonal = 46341  # cos 45 degrees in 16.16
    matrix = [diagonal, diagonal, 0, -diagonal, diagonal, 0, 0, 0, 1 << 30]
    frames, _ = load_video(write_clip(tmp_path / "oblique.mp4", 4, matrix=matrix), num_frames=None)
    assert read_numbers(frames) == [0, 1, 2, 3]
    assert "no multiple of 90 degrees" in caplog.text


@pytest.mark.parametrize("backend", USABLE_BACKENDS)
def test_variable_frame_rate_gives_real_timestamps(tmp_path, backend):
    stamps = [0, 33, 66, 400, 433, 1000, 1010]
    path = write_clip(tmp_path / "vfr.mp4", len(stamps), stamps=stamps)
    frames, metadata = load_video(path, num_frames=4, backend=backend)
    assert read_numbers(frames) == metadata.frames_indices
    assert metadata.timestamps == pytest.approx([stamps[index] / 1000 for index in metadata.frames_indices])


def test_timestamps_count_from_the_first_frame():
    _, metadata = load_video(CLIPS / "idx_cut.mp4", num_frames=None)  # starts at 1.4 s
    assert metadata.timestamps == pytest.approx(np.arange(140) / 25)
    assert metadata.duration == pytest.approx(140 / 25)


def test_the_default_of_several_video_streams_is_used(tmp_path):
    path = tmp_path / "two.mp4"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=10, width=side, height=side) for side in (32, 96)]
        streams[0].disposition, streams[1].disposition = av.stream.Disposition.dub, av.stream.Disposition.default
        for stream, side, value in zip(streams, (32, 96), (0, 200), strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((side, side, 3), value, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    for backend in USABLE_BACKENDS:
        frames, _ = load_video(path, num_frames=1, backend=backend)
        assert frames.shape == (1, 96, 96, 3) and frames.mean() > 150


def test_transparent_video_is_put_on_the_background(tmp_path):
    picture = np.full((32, 32, 4), 255, np.uint8)
    picture[:, 16:] = 0  # right half transparent
    path = write_clip(tmp_path / "alpha.mov", codec="qtrle", pictures=[picture] * 2)
    frames, _ = load_video(path, num_frames=1, background=(10, 20, 30))
    assert (frames[0, :, :16] == 255).all()
    assert (frames[0, :, 16:] == (10, 20, 30)).all()


def test_size_change_inside_a_video_is_an_error(tmp_path):
    for side in (64, 96):
        write_clip(tmp_path / f"{side}.h264", pictures=[np.zeros((side, side, 3), np.uint8)] * 4)
    both = (tmp_path / "64.h264").read_bytes() + (tmp_path / "96.h264").read_bytes()
    with pytest.raises(VideoDecodeError, match="changes its frame size from 64x64 to 96x96 at frame 4"):
        load_video(both, num_frames=None)


def test_only_the_selected_frames_are_held_as_rgb(tmp_path):
    path = write_clip(tmp_path / "long.mp4", pictures=[np.zeros((240, 320, 3), np.uint8)] * 60)
    load_video(path, num_frames=1)
    tracemalloc.start()
    frames, _ = load_video(path, num_frames=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * frames.nbytes  # two frames and one being converted; all frames would be 30 times as much


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_files_are_closed_also_after_errors():
    load_video(CLIPS / "idx.mp4")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("idx.mp4", "one.gif", "audio_only.mp4", "decord_corrupted.mp4"):
        for backend in USABLE_BACKENDS:
            try:
                load_video(CLIPS / name, backend=backend)
            except VideoError:
                pass
    assert len(os.listdir("/proc/self/fd")) == before


# GIF


@pytest.mark.parametrize("backend", USABLE_BACKENDS)
def test_gif_whatever_the_backend(tmp_path, backend):
    durations = [100, 30, 500, 0, 10, 20] * 2  # milliseconds; below 20 is shown as 100
    path = write_gif(tmp_path / "clip.gif", 12, durations)
    frames, metadata = load_video(path, num_frames=5, backend=backend)
    assert read_numbers(frames) == metadata.frames_indices == sample_frame_indices(12, 5).tolist()
    shown = [100, 30, 500, 100, 100, 20] * 2
    starts = [sum(shown[:index]) / 1000 for index in metadata.frames_indices]
    assert metadata.timestamps == pytest.approx(starts)
    assert metadata.duration == pytest.approx(sum(shown) / 1000)
    assert metadata.video_backend == "pil"


def test_gif_of_one_frame_repeats_it():
    frames, metadata = load_video(CLIPS / "one.gif", num_frames=4)
    assert frames.shape == (4, 165, 220, 3) and metadata.frames_indices == [0, 0, 0, 0]
    assert (frames == frames[0]).all()


def test_transparent_gif_is_put_on_the_background():
    frames = {colour: load_video(CLIPS / "transp.gif", background=colour)[0] for colour in [(255,) * 3, (0, 128, 255)]}
    white, blue = frames.values()
    transparent = (white != blue).any(axis=-1)
    assert 0.1 < transparent.mean() < 0.99
    assert (white[transparent] == 255).all()
    assert (blue[transparent] == (0, 128, 255)).all()
    assert (load_video(CLIPS / "transp.gif")[0] == white).all()


def test_truncated_gif_raises_or_is_salvaged(tmp_path, caplog):
    data = write_gif(tmp_path / "whole.gif", 12).read_bytes()
    cut = data[: len(data) // 2]
    with pytest.raises(TruncatedVideoError, match="ends inside a frame; 5 frames are readable"):
        load_video(cut)
    frames, metadata = load_video(cut, num_frames=5, on_damage="salvage")
    assert read_numbers(frames) == metadata.frames_indices
    assert metadata.total_num_frames == 5
    assert "salvaged 5 frames" in caplog.text


# Damage


def test_corrupted_video_raises_or_is_salvaged(caplog):
    path = CLIPS / "decord_corrupted.mp4"
    with pytest.raises(TruncatedVideoError, match="28 frames are readable .*on_damage='salvage'"):
        load_video(path)
    frames, metadata = load_video(path, on_damage="salvage")
    assert metadata.total_num_frames == 28
    assert metadata.frames_indices == sample_frame_indices(28, 8).tolist()
    expected = decode_naively(path)
    assert all(np.array_equal(frame, expected[i]) for frame, i in zip(frames, metadata.frames_indices, strict=True))
    assert "salvaged 28 frames" in caplog.text


@pytest.mark.parametrize(
    ("file", "codec", "options"),
    [
        ("clip.mp4", "libx264", {"movflags": "faststart"}),
        ("fragmented.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("clip.mkv", "libx264", {}),
        ("clip.webm", "libvpx-vp9", {}),
        ("clip.avi", "mpeg4", {}),
    ],
)
@pytest.mark.parametrize("backend", USABLE_BACKENDS)
def test_cut_files_raise_or_are_salvaged(tmp_path, file, codec, options, backend):
    path = write_clip(tmp_path / file, 60, codec, options={"g": "1"}, container_options=options)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(TruncatedVideoError, match="truncated or damaged"):
        load_video(path, backend=backend)
    frames, metadata = load_video(path, on_damage="salvage")
    assert 8 <= metadata.total_num_frames < 60
    assert metadata.frames_indices == sample_frame_indices(metadata.total_num_frames, 8).tolist()
    assert read_numbers(frames[:-1]) == metadata.frames_indices[:-1]


def test_a_hole_in_the_middle_of_mkv_is_noticed(tmp_path):
    data = bytearray(write_clip(tmp_path / "clip.mkv", 60).read_bytes())
    middle = len(data) // 2
    data[middle:] = os.urandom(len(data) - middle)
    with pytest.raises(TruncatedVideoError):
        load_video(bytes(data))


@pytest.mark.parametrize("on_damage", ["raise", "salvage"])
@pytest.mark.parametrize("backend", USABLE_BACKENDS)
@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", EmptyVideoError, r"empty \(0 bytes\)"),
        (bytes(range(256)) * 20, VideoDecodeError, "not a readable video"),
        (b"GIF89a", EmptyVideoError, "without a complete frame"),
        (b"GIF89a" + bytes(range(200)) * 9, VideoError, "GIF"),
        ((CLIPS / "idx.mp4").read_bytes()[:9000], VideoDecodeError, "not a readable video"),  # the index is at the end
        ((CLIPS / "audio_only.mp4").read_bytes(), NoVideoStreamError, r"no video stream \(streams found: audio\)"),
    ],
)
def test_what_is_no_video(tmp_path, content, error, message, backend, on_damage):
    if on_damage == "salvage" and backend != "pyav":
        return
    path = tmp_path / "file.mp4"
    path.write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        load_video(path, backend=backend, on_damage=on_damage)
    assert "file.mp4" in str(caught.value)


def test_cover_art_is_no_video(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 32
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        audio = container.add_stream("aac", rate=8000)
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(cover.encode(None))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.rate = 8000
        container.mux(audio.encode(samples))
        container.mux(audio.encode(None))
    with pytest.raises(NoVideoStreamError):
        load_video(path)


# Sources


def test_all_ways_to_give_a_file(tmp_path):
    path = write_clip(tmp_path / "clip with: strange %d name.mp4", 10)
    data = path.read_bytes()
    expected = sample_frame_indices(10, 8).tolist()
    with open(path, "rb") as file:
        sources = [
            str(path),
            path,
            data,
            bytearray(data),
            memoryview(data),
            io.BytesIO(data),
            file,
            {"bytes": data, "path": None},
            {"bytes": None, "path": str(path)},
        ]
        for source in sources:
            assert read_numbers(load_video(source)[0]) == expected


def test_relative_paths(tmp_path, monkeypatch):
    write_clip(tmp_path / "http:clip.mp4", 10)
    monkeypatch.chdir(tmp_path)
    assert read_numbers(load_video("http:clip.mp4")[0]) == sample_frame_indices(10, 8).tolist()


@pytest.mark.parametrize("backend", USABLE_BACKENDS)
def test_bytes_with_every_backend(backend):
    data = (CLIPS / "idx.mp4").read_bytes()
    frames, _ = load_video(data, backend=backend)
    assert np.array_equal(frames, load_video(CLIPS / "idx.mp4")[0])


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(VideoNotFoundError, match="nothing.mp4 does not exist"):
        load_video(tmp_path / "nothing.mp4")
    with pytest.raises(FileNotFoundError):  # also what Python programs expect
        load_video(str(tmp_path / "nothing.mp4"))
    with pytest.raises(VideoAccessError, match="is a folder"):
        load_video(tmp_path)
    with pytest.raises(VideoAccessError, match="not a regular file"):
        load_video("/dev/null")


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_files_without_permission(tmp_path):
    path = write_clip(tmp_path / "secret.mp4", 2)
    path.chmod(0)
    root = os.geteuid() == 0
    if root:  # root may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(VideoAccessError, match="cannot be read: Permission denied"):
            load_video(path)
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize(
    ("video", "error", "message"),
    [
        (None, VideoInputError, "got NoneType"),
        (7, VideoInputError, "got int"),
        ({"url": "x"}, VideoInputError, r"'bytes' or 'path', got the keys \['url'\]"),
        (io.StringIO("x"), VideoInputError, "mode 'rb'"),
        (io.BytesIO(b""), EmptyVideoError, "already read to its end"),
        ("nul\0byte.mp4", VideoAccessError, "cannot be read"),
    ],
)
def test_objects_that_are_no_source(video, error, message):
    with pytest.raises(error, match=message):
        load_video(video)


class _Handler(BaseHTTPRequestHandler):
    clip = (CLIPS / "idx.mp4").read_bytes()

    def do_GET(self):
        kind = self.path.strip("/")
        if kind == "moved":
            self.send_response(302)
            self.send_header("Location", "/clip.mp4")
            self.end_headers()
            return
        if kind == "missing":
            self.send_error(404)
            return
        body = {"empty": b"", "page": b"<html>no video here</html>" * 50}.get(kind, self.clip)
        self.send_response(200)
        if kind == "short":
            self.send_header("Content-Length", str(len(body) + 1000))
        elif kind != "unsized":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["clip.mp4", "moved", "unsized"])
def test_url(server, kind):
    frames, metadata = load_video(f"{server}/{kind}")
    expected, expected_metadata = load_video(CLIPS / "idx.mp4")
    assert np.array_equal(frames, expected) and metadata == expected_metadata


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("missing", {}, VideoDownloadError, "HTTP 404"),
        ("short", {}, VideoDownloadError, r"broke off after \d+ of \d+ bytes"),
        ("empty", {}, EmptyVideoError, "0 bytes"),
        ("page", {}, VideoDecodeError, "not a readable video"),
        ("clip.mp4", {"max_download_bytes": 1000}, VideoDownloadError, "the limit is 1000"),
        ("unsized", {"max_download_bytes": 1000}, VideoDownloadError, "more than 1000 bytes"),
    ],
)
def test_url_errors_name_the_url(server, kind, options, error, message):
    with pytest.raises(error, match=message) as caught:
        load_video(f"{server}/{kind}", **options)
    assert f"{server}/{kind}" in str(caught.value)


def test_url_without_a_server():
    with pytest.raises(VideoDownloadError, match="could not be downloaded"):
        load_video("http://127.0.0.1:9/clip.mp4", timeout=5)


# Arrays and lists of frames

CLIP = np.stack([numbered_picture(number) for number in range(10)])


@pytest.mark.parametrize(
    "video",
    [
        CLIP,
        CLIP.transpose(0, 3, 1, 2),
        CLIP.astype(np.int64),
        CLIP.astype(np.float32),
        CLIP / 255.0,
        torch.from_numpy(CLIP),
        torch.from_numpy(CLIP).permute(0, 3, 1, 2).to(torch.bfloat16) / 255,
        [Image.fromarray(frame) for frame in CLIP],
        list(CLIP),
        tuple(torch.from_numpy(CLIP).permute(0, 3, 1, 2)),
    ],
    ids=["THWC", "TCHW", "int64", "float255", "float1", "tensor", "bfloat16", "pil", "arrays", "tensors"],
)
def test_decoded_frames(video):
    frames, metadata = load_video(video, num_frames=4)
    indices = sample_frame_indices(10, 4)
    assert frames.dtype == np.uint8 and np.array_equal(frames, CLIP[indices])
    assert metadata.frames_indices == indices.tolist()
    assert (metadata.total_num_frames, metadata.height, metadata.width) == (10, SIDE, SIDE)
    with pytest.raises(ValueError, match="timestamps"):  # nobody told the frame rate
        _ = metadata.timestamps


def test_list_of_image_files(tmp_path):
    paths = []
    for number in range(5):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(numbered_picture(number)).save(paths[-1])
    paths[0].unlink()  # never selected below, so never opened
    frames, _ = load_video(paths, num_frames=2)
    assert read_numbers(frames) == sample_frame_indices(5, 2).tolist() == [1, 3]
    with pytest.raises(VideoNotFoundError, match="0.png"):
        load_video(paths, num_frames=5)
    paths[1].write_bytes(b"no image")
    with pytest.raises(VideoDecodeError, match="Frame 1, .*1.png, is not a readable image"):
        load_video(paths, num_frames=2)


def test_transparent_pictures_are_put_on_the_background():
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    frames, _ = load_video([picture], num_frames=1, background=(1, 2, 3))
    assert (frames == (1, 2, 3)).all()


@pytest.mark.parametrize(
    ("video", "error", "message"),
    [
        ([], EmptyVideoError, "list of frames is empty"),
        (np.zeros((0, 8, 8, 3), np.uint8), VideoInputError, "empty"),
        (np.zeros((4, 8, 8), np.uint8), VideoInputError, r"got the shape \(4, 8, 8\)"),
        (np.zeros((4, 8, 8, 4), np.uint8), VideoInputError, r"\(T, H, W, 3\) or \(T, 3, H, W\)"),
        (np.full((2, 8, 8, 3), np.nan), VideoInputError, "384 values that are NaN or infinite"),
        (torch.full((2, 8, 8, 3), torch.inf), VideoInputError, "NaN or infinite"),
        (np.full((2, 8, 8, 3), -1.5), VideoInputError, "before normalisation"),
        (np.full((2, 8, 8, 3), 300), VideoInputError, "from 300 to 300"),
        (np.zeros((2, 8, 8, 3), bool), VideoInputError, "dtype bool"),
        ([CLIP[0], np.zeros((8, 9, 3), np.uint8)], VideoInputError, r"frame 1 has \(8, 9, 3\)"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))], VideoInputError, "frame 1 has .9, 8."),
        ([CLIP[0], np.full((64, 64, 3), np.nan)], VideoInputError, "12288 values that are NaN"),
        ([CLIP, CLIP], VideoInputError, r"got the shape \(2, 10, 64, 64, 3\)"),
        ([Image.new("RGB", (8, 8)), None], VideoInputError, "Frame 1 is a NoneType"),
    ],
)
def test_decoded_frames_that_cannot_be_used(video, error, message):
    with pytest.raises(error, match=message):
        load_video(video, num_frames=2)


def test_nan_in_a_frame_that_is_not_sampled_is_still_reported():
    video = CLIP / 255.0
    video[9, 0, 0, 0] = np.nan
    with pytest.raises(VideoInputError, match="1 values that are NaN"):
        load_video(video, num_frames=1)


# Backends


def test_available_backends_names_each_with_its_problem():
    backends = available_video_backends()
    assert tuple(backends) == VIDEO_BACKENDS
    assert backends["pyav"] is None


def test_a_backend_that_does_not_load_is_an_error_with_the_fix(tmp_path, monkeypatch):
    """A torchcodec that is installed but whose libraries do not load: no other backend is used instead."""
    package = tmp_path / "torchcodec"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('Could not load libtorchcodec.\\nLong story')")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    problem = "RuntimeError: Could not load libtorchcodec."
    assert available_video_backends()["torchcodec"] == problem
    with pytest.raises(ImportError, match=f"'torchcodec' cannot be used: {problem}. Install the torchcodec release"):
        load_video(CLIPS / "idx.mp4", backend="torchcodec")
