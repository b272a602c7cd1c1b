"""GIF file -> normalised tensor of 16 frames: this package's processor, transformers' own, and PIL alone.

    python benchmarks/gif_preprocess.py                    # on moving digits and on synthetic GIFs of usual sizes
    python benchmarks/gif_preprocess.py --gifs my/*.gif

One thread. "transformers" is what X-CLIP's model card does: all frames read by PIL (PyAV cannot seek in GIFs), 16 of
them given to the image processor that `AutoImageProcessor` has for X-CLIP, in its torchvision and in its PIL form.
"PIL" decodes the 16 frames and resizes nothing.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from transformers import CLIPImageProcessor, CLIPImageProcessorPil, VideoMAEImageProcessorPil

from bt_adapter_hf import XCLIPFramesConfig
from bt_adapter_hf.models.processing_bt_adapter_gif_qa import xclip_video_processor


T = 16


def synthetic(folder: Path) -> list[Path]:
    """GIFs of the sizes of TGIF's: pictures of moving blobs, with a palette per frame."""
    rng, paths = np.random.default_rng(0), []
    for number, (width, height, frames) in enumerate([(240, 180, 40), (250, 140, 60), (400, 300, 40), (500, 280, 30)]):
        y, x = np.mgrid[:height, :width]
        pictures = []
        for t in range(frames):
            wave = np.sin(x / 17 + t / 5) + np.cos(y / 13 - t / 7)
            frame = np.stack([wave * 60 + 128, np.roll(wave, 5 * t, 1) * 50 + 120, wave[::-1] * 40 + 100], axis=-1)
            noise = rng.integers(-6, 7, frame.shape)
            pictures.append(Image.fromarray(np.clip(frame + noise, 0, 255).astype(np.uint8)).quantize(128))
        path = folder / f"{number}-{width}x{height}x{frames}.gif"
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=70, loop=0)
        paths.append(path)
    return paths


def chosen(path: Path, convert: bool = True) -> list[Image.Image]:
    """16 uniform frames by PIL."""
    with Image.open(path) as gif:
        wanted = set(np.linspace(0, gif.n_frames - 1, T).astype(int).tolist())
        frames = [frame.convert("RGB") for t, frame in enumerate(ImageSequence.Iterator(gif)) if t in wanted]
    return (frames * T)[:T] if len(frames) < T else frames


def every_frame(path: Path) -> list[Image.Image]:
    with Image.open(path) as gif:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(gif)]
    return [frames[index] for index in np.linspace(0, len(frames) - 1, T).astype(int)]


def milliseconds(calls: dict[str, Callable[[Path], object]], path: Path, rounds: int) -> dict[str, float]:
    """The best of each; they take turns, so that what else the machine does meets all of them."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            start = time.process_time()
            call(path)
            best[name] = min(best[name], 1000 * (time.process_time() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gifs", nargs="+", type=Path, help="files (default: synthetic ones)")
    parser.add_argument("--rounds", type=int, default=12, help="calls of each, which take turns (default: 12)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ours = xclip_video_processor(XCLIPFramesConfig(backbone={"num_frames": T}))
    size = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    natives = {
        "CLIPImageProcessor": CLIPImageProcessor(**size),
        "CLIPImageProcessorPil": CLIPImageProcessorPil(**size),
        "VideoMAEImageProcessorPil": VideoMAEImageProcessorPil(**size),
    }

    def by_native(native, frames: list[Image.Image]):
        return native([frames] if "VideoMAE" in type(native).__name__ else frames, return_tensors="pt")

    whole: dict[str, Callable[[Path], object]] = {"this package": lambda path: ours(str(path), return_tensors="pt")}
    whole["PIL alone"] = chosen
    whole |= {
        name: lambda path, native=native: by_native(native, every_frame(path)) for name, native in natives.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = args.gifs or synthetic(Path(folder))
        arrays = {path: np.stack(chosen(path)) for path in paths}
        pictures = {path: chosen(path) for path in paths}
        pixels: dict[str, Callable[[Path], object]] = {
            "this package": lambda path: ours(arrays[path], return_tensors="pt")
        }
        pixels |= {
            name: lambda path, native=native: by_native(native, pictures[path]) for name, native in natives.items()
        }
        for title, calls in (("file to tensor", whole), ("frames to tensor", pixels)):
            print(f"{title + ', CPU ms, best':<30}" + "".join(f"{path.stem[-18:]:>20}" for path in paths))
            found = [milliseconds(calls, path, args.rounds) for path in paths]
            for name in calls:
                cells = (f"{times[name]:10.1f} ({times[name] / times['this package']:5.2f}x)" for times in found)
                print(f"{name:<30}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
