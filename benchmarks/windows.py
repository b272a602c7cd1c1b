"""What it costs that windows overlap by half, and how far their features are from those of each window alone.

    python benchmarks/windows.py                       # CLIP-B/32, a film of 80 s
    python benchmarks/windows.py --tower l14 --seconds 40 --repeat 1

Weights are random. Windows of 8 seconds with 8 frames, side by side and one every 4 seconds, by turns, on one thread;
seconds of processor time, decoding included.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from decode import make_clip
from index import TOWERS, by_turns, clip_of, encoder_of

from bt_adapter_hf.models.video_io import load_video
from bt_adapter_hf.search.encoding import VideoEncoder
from bt_adapter_hf.search.moments import Windows
from bt_adapter_hf.search.windows import EncodedMoments, encode_moments


def encode(encoder: VideoEncoder, path: str, stride: float) -> EncodedMoments:
    (film,) = encode_moments(encoder, [path], Windows(8, stride), workers=1)
    if film.error is not None:
        raise film.error
    return film


def difference(encoder: VideoEncoder, path: str, windows: int) -> float:
    """The largest of any number of a unit feature, over some windows, encoded as videos of their own."""
    film, (frames, metadata), largest = encode(encoder, path, 4), load_video(path, num_frames=None), 0.0
    times = np.array(metadata.timestamps)
    for number in np.linspace(0, len(film.moments) - 1, windows).astype(int):
        chosen = frames[[int(np.abs(times - second).argmin()) for second in film.moments[number].timestamps]]
        inputs = encoder.processor(videos=[chosen], do_sample_frames=False, return_tensors="pt")
        alone = encoder.model.get_video_features(**inputs).pooler_output[0]
        alone = torch.nn.functional.normalize(alone, dim=-1).numpy()
        largest = max(largest, float(np.abs(film.features[number] - alone).max()))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", default="b32", choices=TOWERS)
    parser.add_argument("--seconds", type=int, default=80)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "film.mp4")
        # Of equal frames the tower would see one, and cost too little.
        make_clip(Path(path), args.seconds, "libx264", 250, (640, 360), different=args.seconds)
        encoder = encoder_of(clip_of(args.tower), torch.float32)
        strides = {"side by side": 8, "overlapping by half": 4}
        columns = {name: lambda path, stride=stride: encode(encoder, path, stride) for name, stride in strides.items()}
        seconds = by_turns(columns, [path] * args.repeat, statistics.median)
        print(f"{args.tower}, a film of {args.seconds} s:")
        for name, stride in strides.items():
            windows = (args.seconds - 8) // stride + 1
            print(f"  {name:<20} {windows:4} windows {seconds[name]:8.2f} s")
        print(f"  ratio {seconds['overlapping by half'] / seconds['side by side']:.3f}")
        print(f"  features differ from those of windows alone by {difference(encoder, path, 3):.1e} at most")


if __name__ == "__main__":
    main()
