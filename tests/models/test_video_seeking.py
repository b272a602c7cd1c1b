"""Decoding from key frames gives the pixels and times of decoding from the start, or leaves the file to that."""

import multiprocessing
import time
from contextlib import suppress
from fractions import Fraction
from itertools import cycle

import av
import numpy as np
import pytest

from bt_adapter_hf.data.decoding_process import DecodingProcess
from bt_adapter_hf.models import video_io, video_seeking
from bt_adapter_hf.models.video_backends import available_video_backends
from bt_adapter_hf.models.video_errors import VideoBackendError, VideoDecodeError, VideoError, VideoTimeoutError
from bt_adapter_hf.models.video_io import load_video
from tests.clip_tools import numbered_picture, write_clip
from tests.models.test_video_io import CLIPS


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """One thread and several, by turns."""
    numbers = cycle([1, 4])
    monkeypatch.setattr(video_seeking, "decoding_threads", lambda: next(numbers))


def pictures(count=60):
    """Numbered, and with a texture that moves, so that a frame made from wrong references shows it."""
    texture = np.random.default_rng(0).integers(0, 120, (64, 64, 3), dtype=np.uint8)
    return [numbered_picture(n) // 2 + np.roll(texture, (n, 2 * n), (0, 1)) for n in range(count)]


def same_as_linear(path, tries=6, backend="pyav") -> set[str]:
    """Compares many choices of frames; the ways that were taken."""
    every, facts = load_video(path, num_frames=None, on_damage="check")
    assert facts.decoding == "linear"
    generator, ways = np.random.default_rng(0), set()
    for attempt in range(tries):
        # few and many, spread and at the end
        count, rule = [(1, "jitter"), (2, "uniform"), (4, "jitter"), (9, "uniform"), (3, "centers")][attempt % 5]
        frames, metadata = load_video(path, num_frames=count, sampling=rule, generator=generator)
        assert np.array_equal(frames, every[metadata.frames_indices])
        assert metadata.timestamps == pytest.approx([facts.timestamps[index] for index in metadata.frames_indices])
        for name in ("total_num_frames", "fps", "width", "height", "video_backend"):
            assert metadata[name] == facts[name]
        assert metadata.duration == pytest.approx(facts.duration)
        ways.add(metadata.decoding)
    return ways


def remuxed(source, path, change=None, **options):
    """The packets of a file, one by one through `change`, which returns None for one to drop."""
    with av.open(str(source)) as old, av.open(str(path), "w", **options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            packet = packet if change is None else change(number, packet)
            if packet is not None:
                packet.stream = stream
                new.mux(packet)
    return path


@pytest.mark.parametrize("path", sorted(CLIPS.glob("*.m*")), ids=lambda path: path.name)
def test_files_of_the_wild(path):
    try:
        load_video(path, num_frames=None, on_damage="check")
    except VideoError as error:
        with pytest.raises(type(error)):
            load_video(path)
        return
    assert same_as_linear(path) <= {"seeking", "linear"}


X264 = "keyint=12:min-keyint=4:scenecut=0"
X265 = "log-level=none:keyint=12:min-keyint=4:scenecut=0"


@pytest.mark.parametrize(
    ("file", "codec", "options"),
    [
        ("closed.mp4", "libx264", {"x264-params": f"{X264}:bframes=3"}),
        ("closed.mkv", "libx264", {"x264-params": f"{X264}:bframes=3"}),
        ("pyramid.mp4", "libx264", {"x264-params": f"{X264}:bframes=7:b-pyramid=normal:ref=4"}),
        ("open.mp4", "libx264", {"x264-params": f"{X264}:bframes=3:open-gop=1"}),
        ("open.mkv", "libx264", {"x264-params": f"{X264}:bframes=3:open-gop=1"}),
        ("slices.mp4", "libx264", {"x264-params": f"{X264}:slices=4"}),
        ("one_group.mp4", "libx264", {"x264-params": "keyint=infinite:bframes=3"}),
        ("all_key.mp4", "libx264", {"x264-params": "keyint=1"}),
        ("hevc_closed.mp4", "libx265", {"x265-params": f"{X265}:open-gop=0"}),
        ("hevc_rasl.mp4", "libx265", {"x265-params": f"{X265}:open-gop=1:bframes=4"}),
        ("hevc_rasl.mkv", "libx265", {"x265-params": f"{X265}:open-gop=1:bframes=4"}),
        ("hevc_layers.mp4", "libx265", {"x265-params": f"{X265}:temporal-layers=3:bframes=4"}),
        ("superframes.webm", "libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "15", "cpu-used": "8"}),
        ("vp9.mp4", "libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "15", "cpu-used": "8"}),
        ("av1.mkv", "libsvtav1", {"preset": "12", "g": "16"}),
        ("av1.mp4", "libsvtav1", {"preset": "12", "g": "16"}),
        ("fragmented.mp4", "libx264", {"x264-params": X264, "movflags": "frag_keyframe+empty_moov"}),
    ],
)
def test_what_can_be_sought_in(tmp_path, file, codec, options):
    container = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    path = write_clip(tmp_path / file, codec=codec, pictures=pictures(), options=options, container_options=container)
    assert same_as_linear(path) == {"seeking"}


@pytest.mark.parametrize(
    ("file", "codec", "options"),
    [
        ("invisible.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "15", "cpu-used": "8"}),
        ("refresh.mp4", "libx264", {"x264-params": f"{X264}:intra-refresh=1"}),
        ("mpeg4.avi", "mpeg4", {"bf": "2", "g": "12"}),
        ("h264.avi", "libx264", {"x264-params": X264}),
        ("mpeg4.mp4", "mpeg4", {"bf": "2", "g": "12"}),
        ("mpeg2.mpg", "mpeg2video", {"bf": "2", "g": "12"}),
        ("fields.ts", "mpeg2video", {"flags": "+ilme+ildct", "g": "12"}),
        ("fields.mkv", "mpeg2video", {"flags": "+ilme+ildct", "alternate_scan": "1", "g": "12"}),
        ("interlaced.mp4", "libx264", {"x264-params": f"{X264}:interlaced=1"}),
        ("h264.ts", "libx264", {"x264-params": X264}),
        ("raw.h264", "libx264", {"x264-params": X264}),
    ],
)
def test_what_is_read_from_its_start(tmp_path, file, codec, options):
    path = write_clip(tmp_path / file, codec=codec, pictures=pictures(), options=options)
    ways = same_as_linear(path)
    assert ways == {"linear"} or file in ("invisible.webm", "refresh.mp4", "interlaced.mp4")


@pytest.mark.parametrize("file", ["vfr.mp4", "vfr.mkv"])
def test_variable_frame_rate(tmp_path, file):
    stamps = np.cumsum(np.random.default_rng(0).integers(1, 90, 60)).tolist()
    options = {"x264-params": f"{X264}:bframes=3"}
    path = write_clip(tmp_path / file, pictures=pictures(), options=options, stamps=stamps)
    assert same_as_linear(path) == {"seeking"}


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    path = tmp_path_factory.mktemp("closed") / "closed.mp4"
    return write_clip(path, pictures=pictures(), options={"x264-params": f"{X264}:bframes=3"})


@pytest.mark.parametrize("file", ["a.mp4", "a.mkv"])
def test_times_that_begin_below_zero_or_late(closed, tmp_path, file):
    for shift in (-5000, 100_000):

        def moved(number, packet, shift=shift):
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            return packet

        options = {"options": {"avoid_negative_ts": "disabled"}}
        assert same_as_linear(remuxed(closed, tmp_path / file, moved, **options)) <= {"seeking", "linear"}


@pytest.mark.parametrize("file", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("what", ["all key", "no key", "every 5th key", "first missing", "one missing", "twice"])
def test_indexes_that_lie(closed, tmp_path, file, what):
    def change(number, packet):
        if what in ("all key", "no key", "every 5th key"):
            packet.is_keyframe = what == "all key" or (what == "every 5th key" and number % 5 == 0)
        elif (what == "first missing" and number == 0) or (what == "one missing" and number == 30):
            return None
        elif what == "twice" and number == 31:
            packet.pts = packet.dts
        return packet

    path = remuxed(closed, tmp_path / file, change)
    try:
        load_video(path, num_frames=None, on_damage="check")
    except VideoDecodeError:
        return  # damage: below
    ways = same_as_linear(path)
    if what == "all key" or (what, file) == ("no key", "a.mp4"):  # mp4 says of all frames that they are, or of some
        assert ways == {"seeking"}  # only those that are key frames are used
    elif what in ("no key", "first missing"):
        assert ways == {"linear"}


@pytest.mark.parametrize("file", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("what", ["broken link", "end of sequence", "no earlier ones"])
def test_frames_of_hevc_that_are_not_shown(tmp_path, file, what):
    options = {"x265-params": f"{X265}:bframes=4:open-gop={int(what != 'no earlier ones')}"}
    source = write_clip(tmp_path / "whole.mp4", codec="libx265", pictures=pictures(), options=options)

    def change(number, packet):
        data, start = bytearray(bytes(packet)), 0
        while start < len(data):
            kind = data[start + 4] >> 1 & 63
            if number and kind == 21 and what == "broken link":
                data[start + 4] = 16 << 1
            elif number and kind == 21 and what == "end of sequence":
                data[:0] = b"\0\0\0\2\x48\1"
                break
            elif kind in (19, 20) and what == "no earlier ones":
                data[start + 6] |= 0x40
            start += 4 + int.from_bytes(data[start : start + 4], "big")
        other = av.Packet(bytes(data))
        other.pts, other.dts, other.time_base = packet.pts, packet.dts, packet.time_base
        other.duration, other.is_keyframe = packet.duration, packet.is_keyframe
        return other

    path = remuxed(source, tmp_path / file, change)
    assert load_video(path)[1].total_num_frames < 60
    assert same_as_linear(path) == {"linear"}


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
def test_other_backends_refuse_packets_that_show_nothing(closed, tmp_path, backend):
    if available_video_backends()[backend] is not None:
        pytest.skip(f"{backend} is not installed")
    path = remuxed(closed, tmp_path / "a.mkv", lambda number, packet: packet if number else None)
    total = load_video(path)[1].total_num_frames
    with av.open(str(path)) as container:
        assert sum(1 for packet in container.demux(video=0) if packet.size) > total
    with pytest.raises(VideoBackendError, match="takes each packet for a frame"):
        load_video(path, backend=backend)


@pytest.mark.parametrize("at", [24, 30, 41])  # one is a key frame
@pytest.mark.parametrize("back", [3.5, 9.5, 20.5])
def test_times_that_jump_back(closed, tmp_path, at, back):
    def change(number, packet):
        if number >= at:
            packet.pts -= round(back * packet.duration)
        packet.dts = number - 10_000  # which mkv does not store
        return packet

    path = remuxed(closed, tmp_path / "a.mkv", change, options={"avoid_negative_ts": "disabled"})
    same_as_linear(path, tries=12)


@pytest.mark.parametrize(("first", "count"), [(0, 10), (24, 24), (24, 36), (7, 30)])
def test_edit_lists_that_show_a_part(closed, tmp_path, first, count):
    data = bytearray(closed.read_bytes())
    clock, start = data.index(b"mdhd") + 16, data.index(b"elst") + 12
    frame = int.from_bytes(data[clock : clock + 4], "big") // 10
    begin = int.from_bytes(data[start + 4 : start + 8], "big") + first * frame
    data[start : start + 8] = (100 * count).to_bytes(4, "big") + begin.to_bytes(4, "big")  # ms, and of the clock
    path = tmp_path / "part.mp4"
    path.write_bytes(data)
    frames, metadata = load_video(path, num_frames=None)
    assert metadata.total_num_frames == count
    whole = load_video(closed, num_frames=None)[0]
    assert np.array_equal(frames, whole[first : first + count])
    same_as_linear(path)


@pytest.mark.parametrize("file", ["a.avi", "a.mp4"])
@pytest.mark.parametrize("factor", [0.5, 3])
def test_frame_counts_that_lie(closed, tmp_path, file, factor):
    path, order = closed, "big"
    if file == "a.avi":
        path, order = write_clip(tmp_path / file, codec="mpeg4", pictures=pictures(), options={"g": "12"}), "little"
    every = load_video(path, num_frames=None)[0]
    data = bytearray(path.read_bytes())
    for box, offset in ((b"avih", 24), (b"strh", 40), (b"stsz", 12)):
        place = data.find(box) + offset
        if box in data:
            count = int.from_bytes(data[place : place + 4], order)
            assert count == 60
            data[place : place + 4] = int(count * factor).to_bytes(4, order)
    (tmp_path / file).write_bytes(data)
    try:
        found, _ = load_video(tmp_path / file, num_frames=None, on_damage="check")
    except VideoError:
        with pytest.raises(VideoError):
            load_video(tmp_path / file)
        return
    assert np.array_equal(found, every[: len(found)])
    same_as_linear(tmp_path / file)


def test_a_decoder_that_hangs_after_a_seek_is_cut_off(closed, monkeypatch):
    monkeypatch.setattr(video_seeking.Seeker, "_run", lambda *args: map(time.sleep, [60]))
    decode = DecodingProcess(load_video, timeout=1.0)
    with pytest.raises(VideoTimeoutError):
        decode(closed)
    decode.close()


def field_pairs(path, count=10):
    """MPEG-2 of two pictures per frame, one of each field: pictures of half the height, their headers changed."""
    fields, written = pictures(2 * count), bytearray()
    encoder = av.CodecContext.create("mpeg2video", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.gop_size = 64, 32, "yuv420p", 0
    encoder.framerate, encoder.time_base, encoder.options = 25, Fraction(1, 25), {"qscale": "2"}
    frames = [av.VideoFrame.from_ndarray(np.ascontiguousarray(field[::2]), format="rgb24") for field in fields]
    packets = [packet for frame in [*frames, None] for packet in encoder.encode(frame)]
    for number, packet in enumerate(packets):
        data = bytearray(bytes(packet))
        picture, details = data.index(b"\0\0\1\0"), data.index(b"\0\0\1\xb5\x8f")
        data[picture + 4], data[picture + 5] = 0, data[picture + 5] & 63  # the first of its group
        data[details + 6] = data[details + 6] & ~3 | 1 + number % 2  # top, bottom
        data[details + 7] &= ~0xC1
        data[details + 8] &= ~0x80
        if number % 2 == 0:
            data[6 + data.index(b"\0\0\1\xb3")] = 64
            data[5 + data.index(b"\0\0\1\xb5\x14")] &= ~8
        written += data[picture:] if number % 2 else data
    path.write_bytes(written)
    return [np.stack([fields[n][::2], fields[n + 1][::2]], 1).reshape(64, 64, 3) for n in range(0, 2 * count, 2)]


def test_field_pairs_are_one_frame(tmp_path):
    expected = field_pairs(tmp_path / "fields.m2v")
    found, metadata = load_video(tmp_path / "fields.m2v", num_frames=None)
    assert metadata.total_num_frames == len(expected)
    for picture, other in zip(found, expected, strict=True):
        grey = [image.astype(float).mean(2) for image in (picture, other)]
        assert np.abs(grey[0] - grey[1]).mean() < 12  # and not that of another frame
    assert same_as_linear(tmp_path / "fields.m2v") == {"linear"}
    assert same_as_linear(remuxed(tmp_path / "fields.m2v", tmp_path / "fields.mkv")) == {"linear"}


def test_two_streams_and_one_that_starts_late(tmp_path):
    path = tmp_path / "two.mp4"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=10, options={"x264-params": X264}) for _ in range(2)]
        for stream in streams:
            stream.width = stream.height = 64
        streams[0].disposition, streams[1].disposition = av.stream.Disposition.dub, av.stream.Disposition.default
        for number, picture in enumerate(pictures(40)):
            for stream, shift in zip(streams, (0, 33), strict=True):
                frame = av.VideoFrame.from_ndarray(np.roll(picture, shift, 0), format="rgb24")
                frame.pts = number + shift
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    assert same_as_linear(path) == {"seeking"}


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
def test_damage_where_frames_are_wanted_is_reported_and_elsewhere_by_check(closed, tmp_path, place):
    data = bytearray(closed.read_bytes())
    start = int(len(data) * place)
    data[start : start + 300] = np.random.default_rng(0).bytes(300)
    path = tmp_path / "broken.mp4"
    path.write_bytes(data)
    try:
        every = load_video(path, num_frames=None, on_damage="check")[0]
    except VideoDecodeError:
        every = None
    for count in (1, 2, 20):
        try:
            frames, metadata = load_video(path, num_frames=count)
        except VideoDecodeError:
            assert every is None
            continue
        if every is not None:
            assert np.array_equal(frames, every[metadata.frames_indices])
        else:  # then none of what was needed is broken
            intact = load_video(closed, num_frames=None)[0]
            assert metadata.decoding == "seeking" and np.array_equal(frames, intact[metadata.frames_indices])


def test_what_a_decoder_makes_up_for_damage_is_that_of_decoding_from_the_start(tmp_path):
    options = {"x265-params": f"{X265}:open-gop=0:bframes=4"}
    path = write_clip(tmp_path / "hevc.mkv", codec="libx265", pictures=pictures(48), options=options)
    clean, intact = path.read_bytes(), load_video(path, num_frames=None)[0]
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    generator, compared = np.random.default_rng(0), 0
    for _ in range(40):
        start, size = places[generator.integers(len(places))]
        data = bytearray(clean)
        data[start + int(generator.integers(size // 3, size))] ^= 1 << int(generator.integers(8))
        try:
            every = load_video(bytes(data), num_frames=None, on_damage="check")[0]
            frames, metadata = load_video(bytes(data), num_frames=16)
        except VideoDecodeError:
            continue
        if len(every) == metadata.total_num_frames:
            expected, compared = every[metadata.frames_indices], compared + 1
            assert all(
                np.array_equal(frame, one) or np.array_equal(frame, intact[index])  # or the damage is in no wanted one
                for frame, one, index in zip(frames, expected, metadata.frames_indices, strict=True)
            )
    assert compared > 20


def test_threads_of_a_decoder_that_is_given_up_do_not_wait_for_python(tmp_path, monkeypatch):
    options = {"x264-params": f"{X264}:bframes=3:slices=4"}
    path = write_clip(tmp_path / "slices.mp4", pictures=pictures(48), options=options)
    clean, generator = path.read_bytes(), np.random.default_rng(0)
    monkeypatch.setattr(video_seeking, "decoding_threads", lambda: 4)

    def load_damaged():
        av.logging.set_level(av.logging.PANIC)  # from here on each thread asks Python whether to say something
        for place in generator.integers(100, len(clean) * 9 // 10, 80):
            size = int(generator.choice([3, 40, 300]))
            data = clean[:place] + generator.bytes(size) + clean[place + size :]
            for count in (1, 3, 6, 16):
                with suppress(VideoDecodeError):
                    load_video(data, num_frames=count)

    process = multiprocessing.get_context("fork").Process(target=load_damaged)
    process.start()
    process.join(60)
    process.kill()
    process.join()
    assert process.exitcode == 0


def test_the_cost_follows_what_is_wanted(tmp_path, monkeypatch):
    options = {"x264-params": f"{X264}:bframes=3"}
    path = write_clip(tmp_path / "long.mp4", pictures=pictures() * 10, options=options)
    decoded = []
    decode = video_io.load_pyav.__globals__["package_part"]("video_seeking").Seeker._run

    def counted(self, *args):
        for frame in decode(self, *args):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(video_io.load_pyav.__globals__["package_part"]("video_seeking").Seeker, "_run", counted)
    frames, metadata = load_video(path, num_frames=4)
    assert metadata.decoding == "seeking" and metadata.total_num_frames == 600
    assert 4 <= len(decoded) <= 4 * 12  # a group each at most


def test_a_repository_without_this_part_decodes_from_the_start(closed, monkeypatch):
    expected, _ = load_video(closed)
    monkeypatch.setitem(video_io.load_pyav.__globals__, "package_part", lambda name: None)
    frames, metadata = load_video(closed)
    assert metadata.decoding == "linear" and np.array_equal(frames, expected)
    monkeypatch.setattr(video_io, "package_part", lambda name: None)
    if available_video_backends()["decord"] is None:
        with pytest.raises(ImportError, match="'decord' needs the package bt_adapter_hf"):
            load_video(closed, backend="decord")
