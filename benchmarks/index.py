"""What `bt-adapter index` costs beside the loops that a user would write instead.

    python benchmarks/index.py                                            # B/32 and L/14; 10 s, 5 and 60 minutes
    python benchmarks/index.py --tower b32 --minutes 0.1667 --videos 8 --gifs 16

Weights are random, clips are those of `benchmarks/decode.py`. The loops have no branch, so ours does more: plain
decord and transformers' CLIPModel, PyAV from the first frame to the last and open_clip, and sentence-transformers'
CLIP on decord's frames. Each is run once per video, by turns, on one thread; every number is videos per second of
processor time (user and system) of this process, so that it hardly depends on what else the machine does, and is per
core.

`--gifs N` makes N animations, every second one held by eights, the others still at their end, so that
half of the frames looked at are equal, and compares the index with equal frames recognised and not.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from decode import make_clip
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from bt_adapter_hf import BTAdapterModel, BTAdapterProcessor, BTAdapterVideoProcessor, get_bt_adapter_model
from bt_adapter_hf.import_utils import import_error
from bt_adapter_hf.models import modeling_bt_adapter_vision
from bt_adapter_hf.models.video_io import sample_frame_indices
from bt_adapter_hf.search.encoding import VideoEncoder


TOWERS = {  # width, width of the MLP, layers, heads, side of a patch
    "tiny": (32, 64, 4, 2, 32),
    "b32": (768, 3072, 12, 12, 32),
    "l14": (1024, 4096, 24, 16, 14),
}
OPEN_CLIP = {"b32": "ViT-B-32", "l14": "ViT-L-14"}
FRAMES = 8


def make_gif(path: Path, seed: int) -> None:
    """32 frames; with an odd seed they are held by eights, with an even one the last 20 stand still.

    8 frames are looked at, one of every 4, and 4 of them differ. FFmpeg writes it: PIL leaves equal frames out.
    """
    rng = np.random.default_rng(seed)
    pictures = [np.kron(rng.integers(0, 255, (14, 14, 3), np.uint8), np.ones((16, 16, 1), np.uint8))]
    for _ in range(31):
        pictures.append(np.roll(pictures[-1], 5, axis=1))
    with av.open(path, "w") as container:
        stream = container.add_stream("gif", rate=10, width=224, height=224, pix_fmt="rgb8")
        for n in range(32):
            picture = pictures[n // 8 * 8 if seed % 2 else min(n, 12)]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture).reformat(format="rgb8")))
        container.mux(stream.encode())


def clip_of(tower: str) -> CLIPModel:
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    vision = dict(zip(names, TOWERS[tower], strict=True))
    config = CLIPConfig(text_config=text, vision_config={**vision, "image_size": 224}, projection_dim=512)
    torch.manual_seed(0)
    return CLIPModel(config).eval()


def encoder_of(clip: CLIPModel, dtype: torch.dtype) -> VideoEncoder:
    model: BTAdapterModel = get_bt_adapter_model(clip, min(4, clip.config.vision_config.num_hidden_layers)).eval()
    processor = BTAdapterProcessor.__new__(BTAdapterProcessor)
    processor.video_processor = BTAdapterVideoProcessor(num_frames=FRAMES)
    return VideoEncoder(model.to(dtype), _Videos(processor.video_processor), None)


class _Videos:
    """A processor without texts."""

    def __init__(self, video_processor: BTAdapterVideoProcessor):
        self.video_processor = video_processor

    def __call__(self, **kwargs):
        return self.video_processor(**kwargs)


def loops(tower: str, clip: CLIPModel) -> dict[str, Callable[[str], None]]:
    """The loops that a user would write, of the packages that are there: one video to the mean of its frames."""
    from decord import VideoReader

    pictures = CLIPImageProcessorPil()

    def decord_frames(path: str) -> np.ndarray:
        reader = VideoReader(path, num_threads=1)
        return reader.get_batch(sample_frame_indices(len(reader), FRAMES)).asnumpy()

    def decord_clip(path: str) -> None:
        pixels = pictures(list(decord_frames(path)), return_tensors="pt")["pixel_values"]
        clip.get_image_features(pixel_values=pixels).pooler_output.mean(0)

    found = {"decord + CLIPModel": decord_clip}
    if tower in OPEN_CLIP and import_error("open_clip") is None:
        import open_clip

        model, _, transform = open_clip.create_model_and_transforms(OPEN_CLIP[tower])
        model.eval()

        def pyav_open_clip(path: str) -> None:
            with av.open(path) as container:
                container.streams.video[0].codec_context.thread_count = 1
                frames = [frame.to_image() for frame in container.decode(video=0)]
            chosen = [frames[index] for index in sample_frame_indices(len(frames), FRAMES)]
            model.encode_image(torch.stack([transform(image) for image in chosen])).mean(0)

        found["PyAV + open_clip"] = pyav_open_clip
    if tower in OPEN_CLIP and import_error("sentence_transformers") is None:
        found["sentence-transformers"] = sentence_transformers(clip, decord_frames)
    return found


def sentence_transformers(clip: CLIPModel, frames: Callable[[str], np.ndarray]) -> Callable[[str], None]:
    """Its CLIP with our random weights, which needs a folder with a tokenizer."""
    from sentence_transformers import SentenceTransformer
    from transformers import CLIPProcessor, CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        vocab = {token: n for n, token in enumerate(["a", "a</w>", "<|startoftext|>", "<|endoftext|>"])}
        clip.save_pretrained(folder)
        CLIPProcessor(CLIPImageProcessorPil(), CLIPTokenizer(vocab=vocab, merges=[])).save_pretrained(folder)
        model = SentenceTransformer(folder, device="cpu")
    return lambda path: model.encode([Image.fromarray(frame) for frame in frames(path)]).mean(0)


def ours(encoder: VideoEncoder) -> Callable[[str], None]:
    def run(path: str) -> None:
        (video,) = encoder.encode_videos([path], workers=1)
        if video.error is not None:
            raise video.error

    return run


def by_turns(
    columns: dict[str, Callable[[str], None]], paths: list[str], mean: Callable[[list[float]], float]
) -> dict[str, float]:
    """Seconds of processor time per video, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in columns}
    for path in [paths[0], *paths]:
        for name, run in columns.items():
            start = time.process_time()
            run(path)
            seconds[name].append(time.process_time() - start)
    return {name: mean(values[1:]) for name, values in seconds.items()}


def print_table(title: str, seconds: dict[str, float], base: str) -> None:
    print(f"\n{title}\n  {'':28} videos/s  of {base}")
    for name, value in seconds.items():
        print(f"  {name:28} {1 / value:8.3f}  {seconds[base] / value:6.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", nargs="+", default=["b32", "l14"], choices=TOWERS)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1 / 6, 5, 60])
    parser.add_argument("--videos", type=int, default=3, help="runs of each column")
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="of ours: float32, bfloat16")
    parser.add_argument("--skip", nargs="*", default=[], help="columns to leave out, such as 'PyAV + open_clip'")
    parser.add_argument("--gifs", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        clips = {minutes: Path(folder) / f"{minutes:.3g}.mp4" for minutes in args.minutes}
        for minutes, path in clips.items():
            make_clip(path, round(60 * minutes), "libx264", 250, (1280, 720))
        gifs = [Path(folder) / f"{seed}.gif" for seed in range(args.gifs)]
        for seed, path in enumerate(gifs):
            make_gif(path, seed)
        for tower in args.tower:
            clip = clip_of(tower)
            plain = {name: run for name, run in loops(tower, clip).items() if name not in args.skip}
            encoders = {dtype: encoder_of(clip_of(tower), getattr(torch, dtype)) for dtype in args.dtype}
            for minutes, path in clips.items():
                columns = {f"ours, {dtype}": ours(encoder) for dtype, encoder in encoders.items()}
                for encoder in encoders.values():
                    encoder.stopwatch.seconds.clear()
                seconds = by_turns(columns | plain, [str(path)] * args.videos, statistics.median)
                print_table(f"{tower}, {minutes:.3g} min, {FRAMES} frames:", seconds, "decord + CLIPModel")
                for dtype, encoder in encoders.items():
                    shares = (f"{stage} {share:.0%}" for stage, share in encoder.stopwatch.shares().items())
                    print(f"  {dtype}: {', '.join(shares)}")
            if gifs:
                run, recognised = ours(encoders[args.dtype[0]]), modeling_bt_adapter_vision._distinct

                def each_by_itself(path: str) -> None:
                    modeling_bt_adapter_vision._distinct = lambda frames: (frames, None)
                    try:
                        run(path)  # noqa: B023  (called in this turn of the loop only)
                    finally:
                        modeling_bt_adapter_vision._distinct = recognised  # noqa: B023

                columns = {"equal frames once": run, "every frame": each_by_itself}
                title = f"{tower}, {len(gifs)} GIFs with holds and stills:"
                print_table(title, by_turns(columns, list(map(str, gifs)), statistics.mean), "every frame")


if __name__ == "__main__":
    main()
