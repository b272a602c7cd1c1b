"""What a few frames of a video cost: `load_video` beside plain decord and plain torchcodec.

    python benchmarks/decode.py                                  # H.264, 720p; 10 s, 5 and 60 minutes; 8 and 64 frames
    python benchmarks/decode.py --minutes 0.17 5 --codec libx264 libx265 libvpx-vp9 mpeg4 --group 25 250 --size 320 240
    python benchmarks/decode.py --memory                         # 8 frames of 4K

The clips are made for it: 20 s are encoded, and their packets repeated to the length. One thread each; every number is
the median of `--repeat` runs, which alternate, in seconds of processor time of this process, so that it hardly depends
on what else the machine does. "linear" is `load_video` with `on_damage="check"`, which decodes every frame; "scan" is
the part of `load_video` that reads the packets. The frames of all are compared with those of "linear"; a column says
how many differ, and the last line how many of ours over all files. A backend that will not read a file says so.

`--memory` prints how much more memory a fresh process has held at most than before: for the frames as `load_video`
returns them, and as the video processor makes them of the file.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import av
import numpy as np

from bt_adapter_hf import BTAdapterVideoProcessor
from bt_adapter_hf.models.video_backends import available_video_backends
from bt_adapter_hf.models.video_decoding import Source, open_container, scan_packets
from bt_adapter_hf.models.video_errors import VideoBackendError
from bt_adapter_hf.models.video_io import load_video, sample_frame_indices


SECONDS, RATE = 20, 25  # of what is encoded
SUFFIXES = {"libvpx-vp9": "webm", "mpeg4": "avi"}
FOUR_K = (3840, 2160)


def make_clip(
    path: Path, seconds: int, codec: str, group: int, size: tuple[int, int], different: int = SECONDS
) -> None:
    """Writes a clip, of which the first `different` seconds come again and again."""
    rng = np.random.default_rng(0)
    width, height = size
    picture = np.kron(rng.integers(0, 255, (height // 8, width // 4, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    options = {"g": str(group), "crf": "23"}
    if codec == "libx264":
        options |= {"preset": "veryfast", "bf": "3", "x264-params": "scenecut=0"}
    elif codec == "libx265":
        options = {"preset": "ultrafast", "x265-params": f"log-level=none:keyint={group}:scenecut=0:bframes=3"}
    elif codec == "mpeg4":
        options = {"g": str(group), "bf": "2", "qscale": "4"}
    elif codec == "libvpx-vp9":
        options = {"g": str(group), "deadline": "realtime", "cpu-used": "8", "b": "2000000"}
    packets = []
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(min(seconds, different) * RATE):
            frame = picture[:height, 2 * t % width : 2 * t % width + width].astype(np.int16)
            frame = frame + rng.integers(-6, 6, (height, width, 1), np.int16)
            frame = av.VideoFrame.from_ndarray(np.clip(frame, 0, 255).astype(np.uint8), format="rgb24")
            packets += stream.encode(frame)
        packets += stream.encode(None)
        stamps = [(packet.pts, packet.dts, packet.time_base) for packet in packets]
        for turn in range(max(1, seconds // different)):
            for packet, (pts, dts, base) in zip(packets, stamps, strict=True):
                copy = av.Packet(bytes(packet))
                copy.stream, copy.time_base, copy.is_keyframe = stream, base, packet.is_keyframe
                shift = round(turn * different / base)
                copy.pts, copy.dts = None if pts is None else pts + shift, dts + shift
                container.mux(copy)


def readers(path: str, count: int) -> dict[str, Callable[[], np.ndarray]]:
    def scan() -> None:
        source = Source(path, path)
        with open_container(source) as (container, stream):
            scan_packets(source, container, stream)

    def plain_decord() -> np.ndarray:
        import decord

        reader = decord.VideoReader(path, num_threads=1)
        return reader.get_batch(sample_frame_indices(len(reader), count)).asnumpy()

    def plain_torchcodec() -> np.ndarray:
        from torchcodec.decoders import VideoDecoder

        decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
        return decoder.get_frames_at(sample_frame_indices(len(decoder), count).tolist()).data.numpy()

    found = {
        "load_video": lambda: load_video(path, num_frames=count)[0],
        "scan": scan,
        "linear": lambda: load_video(path, num_frames=count, on_damage="check")[0],
    }
    usable = available_video_backends()
    for name, plain in (("decord", plain_decord), ("torchcodec", plain_torchcodec)):
        if usable[name] is None:
            found[f"load_video {name}"] = lambda name=name: load_video(path, num_frames=count, backend=name)[0]
            found[f"plain {name}"] = plain
    return found


def compare(path: str, count: int, repeat: int, skip: list[str]) -> tuple[int, int]:
    """Prints a line per way to read the file; returns how many frames of ours were compared, and how many differ."""
    columns = {name: run for name, run in readers(path, count).items() if name not in skip}
    seconds: dict[str, list[float]] = {name: [] for name in columns}
    frames, refused = {}, {}
    for _ in range(repeat):
        for name, run in columns.items():
            start = time.process_time()
            try:
                frames[name] = run()
            except VideoBackendError as error:
                refused[name] = str(error).split(": ", 1)[1].split(".")[0]
            seconds[name].append(time.process_time() - start)
    right = frames.get("linear", frames["load_video"])
    compared = wrong = 0
    for name in columns:
        if name in refused:
            print(f"  {name:22} not read: {refused[name]}", flush=True)
            continue
        differ = ""
        if frames[name] is not None:
            number = sum(not np.array_equal(a, b) for a, b in zip(frames[name], right, strict=True))
            differ = f"  {number} differ"
            if name.startswith("load_video"):
                compared, wrong = compared + count, wrong + number
        print(f"  {name:22} {statistics.median(seconds[name]):8.2f} s{differ}", flush=True)
    return compared, wrong


def highest() -> float:
    """MB that this process has held at most; `ru_maxrss` would begin with what its parent held."""
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) / 1024


def print_growth(what: str, path: str) -> None:
    """In a fresh process."""
    processor = BTAdapterVideoProcessor()
    processor(videos=[np.zeros((8, 64, 64, 3), np.uint8)], return_tensors="pt")
    before = highest()
    if what == "load_video":
        load_video(path, num_frames=8)
    else:
        processor(videos=[path], return_tensors="pt")
    print(f"{highest() - before:.0f}")


def memory(folder: str) -> None:
    path = Path(folder) / "4k.mp4"
    make_clip(path, 2, "libx264", 250, FOUR_K)
    frames = 8 * FOUR_K[0] * FOUR_K[1] * 3 / 2**20
    print(f"8 frames of {FOUR_K[0]}x{FOUR_K[1]}, H.264: {frames:.0f} MB as uint8")
    for what in ("load_video", "processor"):
        command = [sys.executable, __file__, "--growth", what, str(path)]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(f"  {what:12} {int(found):5} MB more than before, {int(found) / frames:.2f} of the frames", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1 / 6, 5, 60])
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 64])
    codecs = ["libx264", "libx265", "libvpx-vp9", "mpeg4"]
    parser.add_argument("--codec", nargs="+", default=["libx264"], choices=codecs, help="mpeg4 is in AVI")
    parser.add_argument("--group", type=int, nargs="+", default=[250], help="frames from one key frame to the next")
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 720))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], help="columns to leave out, such as 'linear'")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--growth", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.growth:
        return print_growth(*args.growth)
    compared = wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        if args.memory:
            return memory(folder)
        for codec, group, minutes in product(args.codec, args.group, args.minutes):
            path = Path(folder) / f"clip.{SUFFIXES.get(codec, 'mp4')}"
            make_clip(path, round(60 * minutes), codec, group, tuple(args.size))
            for count in args.frames:
                size = "x".join(map(str, args.size))
                print(f"{codec} {size}, {minutes:.3g} min, group {group}, {count} frames:")
                number, bad = compare(str(path), count, args.repeat, args.skip)
                compared, wrong = compared + number, wrong + bad
    print(f"wrong frames of ours over all files: {wrong} of {compared}")


if __name__ == "__main__":
    main()
