"""The index of an mp4 file says of its packets what reading them says, or nothing."""

import av
import numpy as np
import pytest

from bt_adapter_hf.models import video_decoding, video_mp4_index, video_seeking
from bt_adapter_hf.models.video_decoding import Source, open_container
from bt_adapter_hf.models.video_io import load_video
from bt_adapter_hf.models.video_mp4_index import HEAD, heads, read_index
from tests.clip_tools import write_clip
from tests.models.test_video_io import CLIPS
from tests.models.test_video_seeking import X264, X265, pictures, remuxed, same_as_linear


def index_and_packets(source: Source):
    with open_container(source) as (container, stream):
        index = read_index(source, stream)
        return index, [packet for packet in container.demux(stream) if packet.size], stream.codec_context.name


def agrees(source: Source) -> bool:
    index, packets, _ = index_and_packets(source)
    if index is None:
        return False
    assert len({packet.pts - pts for packet, pts in zip(packets, index.pts.tolist(), strict=True)}) == 1
    assert [packet.dts for packet in packets] == index.dts.tolist()
    assert [packet.is_keyframe for packet in packets] == index.keys.tolist()
    begin = [bytes(packet)[:HEAD].ljust(HEAD, b"\0") for packet in packets]
    assert [bytes(head) for head in heads(source, index)] == begin
    return True


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "clip.mp4"
    return write_clip(path, pictures=pictures(), options={"x264-params": f"{X264}:bframes=3:open-gop=1"})


@pytest.mark.parametrize("path", sorted([*CLIPS.glob("*.mp4"), *CLIPS.glob("*.mov")]), ids=lambda path: path.name)
def test_files_of_the_wild(path):
    try:
        agrees(Source(str(path), path.name))
    except (video_decoding.VideoError, av.error.FFmpegError):
        return  # no video that can be read at all


@pytest.mark.parametrize("sparse", [1, 1 << 14, 1 << 40])
def test_heads_by_blocks_and_one_by_one(clip, monkeypatch, sparse):
    monkeypatch.setattr(video_mp4_index, "SPARSE", sparse)
    monkeypatch.setattr(video_mp4_index, "BLOCK", 1 << 12)
    assert agrees(Source(str(clip), "clip"))
    assert agrees(Source(clip.read_bytes(), "bytes"))


@pytest.mark.parametrize(
    ("codec", "options", "movflags"),
    [
        ("libx264", {"x264-params": f"{X264}:bframes=3"}, "negative_cts_offsets"),
        ("libx264", {"x264-params": f"{X264}:bframes=0:aud=1"}, "faststart"),
        ("libx265", {"x265-params": f"{X265}:bframes=4:open-gop=1"}, "faststart"),
    ],
)
def test_frames_are_found_without_reading_the_packets(tmp_path, monkeypatch, codec, options, movflags):
    path = write_clip(
        tmp_path / "a.mp4", codec=codec, pictures=pictures(), options=options, container_options={"movflags": movflags}
    )
    assert agrees(Source(str(path), "a"))
    every = load_video(path, num_frames=None, on_damage="check")[0]
    monkeypatch.setattr(video_seeking, "scan_packets", None)  # nobody calls it
    frames, metadata = load_video(path, num_frames=5)
    assert metadata.decoding == "seeking" and metadata.total_num_frames == len(every)
    assert np.array_equal(frames, every[metadata.frames_indices])


def test_files_whose_index_does_not_tell_everything(clip, tmp_path):
    data = clip.read_bytes()
    cut = tmp_path / "cut.mp4"
    remuxed(clip, cut, container_options={"movflags": "faststart"})
    cut.write_bytes(cut.read_bytes()[:-3000])
    fragments = remuxed(clip, tmp_path / "f.mp4", container_options={"movflags": "frag_keyframe+empty_moov"})
    edited = bytearray(data)
    start = edited.index(b"elst")
    edited[start + 12 : start + 20] = (20000).to_bytes(4, "big") + (3000).to_bytes(4, "big")  # from a later time on
    table = bytearray(data)
    start = table.index(b"ctts")
    table[start + 12 : start + 16] = (2**31 - 1).to_bytes(4, "big")  # for more packets than there are
    for source in (str(cut), str(fragments), bytes(edited), bytes(table)):
        assert index_and_packets(Source(source, "?"))[0] is None


@pytest.mark.parametrize("more", [2, 4, 8])
def test_bytes_behind_a_table(clip, tmp_path, more):
    data, start = bytearray(clip.read_bytes()), 0
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"ctts"):
        start = data.index(name, start)
        size = int.from_bytes(data[start - 4 : start], "big")
        data[start - 4 : start] = (size + more).to_bytes(4, "big")
    data[start - 4 + size : start - 4 + size] = bytes(range(1, more + 1))
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    assert agrees(Source(str(path), "a"))
    assert same_as_linear(path) == {"seeking"}


@pytest.mark.parametrize("what", ["no picture", "garbage", "no length"])
def test_a_packet_that_makes_no_frame(clip, tmp_path, what):
    def change(number, packet):
        if number != 31:
            return packet
        payload = {"no picture": b"\0\0\0\5\6\5\1\0\x80", "garbage": bytes(range(1, 90)), "no length": bytes(8)}[what]
        other = av.Packet(payload)
        other.pts, other.dts, other.time_base = packet.pts, packet.dts, packet.time_base
        return other

    path = remuxed(clip, tmp_path / "a.mp4", change)
    with open_container(Source(str(path), "a")) as (container, stream):
        assert read_index(Source(str(path), "a"), stream) is not None  # which knows nothing of it
    try:
        load_video(path, num_frames=None, on_damage="check")
    except video_decoding.VideoError as error:
        with pytest.raises(type(error)):
            load_video(path)
        return
    assert same_as_linear(path) == {"linear"}
