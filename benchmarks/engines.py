"""Engines for the frozen image model on a CPU, beside torch as it is: time, and what becomes of the features.

    pip install openvino onnxruntime onnx onnxscript        # those that are there are measured
    python benchmarks/engines.py                            # CLIP-L/14 shapes, random weights
    python benchmarks/engines.py --tower b32 --repeat 5

One thread. An engine computes the hidden states that the branch reads, of the frames of a video, and torch the branch.
Each runs by turns with eager float32; times are the lowest of the processor seconds of this process. The agreement is
that of the normalised features of videos with eager float32: the lowest cosine at these shapes, and, with the weights
of the moving-digits model inside the package, how many of the ten nearest clips of each caption stay.
"""

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from index import TOWERS, clip_of
from transformers.utils.logging import disable_progress_bar

from bt_adapter_hf import BTAdapterModel, get_bt_adapter_model
from bt_adapter_hf.assets import default_model_path
from bt_adapter_hf.data.moving_digits import all_captions, clip
from bt_adapter_hf.hub.dual_encoder import load_dual_encoder
from bt_adapter_hf.hub.machine import machine_dtype
from bt_adapter_hf.import_utils import import_error


Engine = Callable[[torch.Tensor], list[torch.Tensor]]  # frames (F, 3, H, W) -> states (F, C+N, D)


class Backbone(torch.nn.Module):
    """The frozen CLIP tower with the hidden states that the branch reads, for engines that take a graph."""

    def __init__(self, model: BTAdapterModel):
        super().__init__()
        self.tower = model.vision_model.vision_model
        self.numbers = model.vision_model.needed_states(model.config.vision_config.num_hidden_layers)

    def forward(self, frames: torch.Tensor) -> list[torch.Tensor]:
        x = self.tower.pre_layrnorm(self.tower.embeddings(frames))
        found = []
        for number, layer in enumerate(self.tower.encoder.layers, start=1):
            x = layer(x, attention_mask=None)
            if number in self.numbers:
                found.append(x)
        return found


def eager(backbone: Backbone, frames: torch.Tensor) -> Engine:
    return backbone


def bfloat16(backbone: Backbone, frames: torch.Tensor) -> Engine:
    half = backbone.bfloat16()
    return lambda frames: half(frames.bfloat16())


def compiled(backbone: Backbone, frames: torch.Tensor) -> Engine:
    torch._dynamo.reset()
    torch._inductor.config.freezing = True
    engine = torch.compile(backbone, fullgraph=True)
    with torch.no_grad():  # freezing takes weights without gradients, and no tensors of inference mode
        engine(frames)
    return engine


def openvino(precision: str) -> Callable[[Backbone, torch.Tensor], Engine]:
    def build(backbone: Backbone, frames: torch.Tensor) -> Engine:
        import openvino as ov

        model = ov.convert_model(backbone, example_input=frames, input=[tuple(frames.shape)])
        settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        run = ov.Core().compile_model(model, "CPU", settings)
        return lambda frames: [torch.from_numpy(x.copy()) for x in run(frames.numpy()).values()]

    return build


def onnxruntime(int8: bool) -> Callable[[Backbone, torch.Tensor], Engine]:
    def build(backbone: Backbone, frames: torch.Tensor) -> Engine:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "float32.onnx"
            torch.onnx.export(backbone, (frames,), path, dynamo=True, external_data=True, verbose=False)
            if int8:
                from onnxruntime.quantization import quantize_dynamic

                path, plain = Path(folder) / "int8.onnx", path
                quantize_dynamic(plain, path, per_channel=True, use_external_data_format=True)
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda frames: [torch.from_numpy(x) for x in session.run(None, {name: frames.numpy()})]

    return build


ENGINES = {  # name -> (packages, how it is made)
    "eager float32": ([], eager),
    "eager bfloat16": ([], bfloat16),
    "torch.compile float32": ([], compiled),
    "OpenVINO float32": (["openvino"], openvino("f32")),
    "OpenVINO bfloat16": (["openvino"], openvino("bf16")),
    "ONNX Runtime float32": (["onnxruntime", "onnxscript"], onnxruntime(False)),
    "ONNX Runtime int8": (["onnxruntime", "onnxscript"], onnxruntime(True)),
}


def features(model: BTAdapterModel, backbone: Backbone, engine: Engine, videos: torch.Tensor) -> np.ndarray:
    """(V, T, 3, H, W) -> (V, P), unit rows; the branch is torch's in float32."""
    rows = []
    for frames in videos:
        states = dict(zip(backbone.numbers, (x[None].float() for x in engine(frames)), strict=True))
        pooled = model.vision_model(backbone_states=states, return_dict=True).pooler_output
        rows.append(torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1))
    return torch.cat(rows).numpy()


def smooth_videos(count: int, frames: int, size: int) -> torch.Tensor:
    """(count, frames, 3, size, size), normalised as pictures are, each a picture that moves."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(count, 3, size // 16, size // 16, generator=generator)
    pictures = torch.nn.functional.interpolate(pictures, size=(size, size), mode="bicubic")
    return torch.stack([pictures.roll(8 * t, dims=3) for t in range(frames)], dim=1)


def digits(clips: int) -> tuple[BTAdapterModel, torch.Tensor, np.ndarray]:
    """The model inside the package, clips of its world as it takes them, and the features of all captions."""
    model, processor, _ = load_dual_encoder(default_model_path())
    films = [clip("test", 0, number)[0] for number in range(clips)]
    videos = processor(videos=films, return_tensors="pt")["pixel_values_videos"]
    inputs = processor(text=all_captions(), padding=True, return_tensors="pt")
    texts = model.eval().get_text_features(**inputs).pooler_output
    return model, videos, torch.nn.functional.normalize(texts, dim=-1).numpy()


def nearest(texts: np.ndarray, videos: np.ndarray) -> list[set[int]]:
    return [set(row[:10].tolist()) for row in np.argsort(-(texts @ videos.T), axis=1, kind="stable")]


def measured(name: str, tower: str, repeat: int, frames: int, clips: int) -> Iterator[str]:
    build = ENGINES[name][1]
    with torch.no_grad():
        model = get_bt_adapter_model(clip_of(tower), min(4, TOWERS[tower][2])).eval()
        videos = smooth_videos(2, frames, 224)
        plain = Backbone(model).eval()
        expected = features(model, plain, plain, videos)
        other = Backbone(get_bt_adapter_model(clip_of(tower), min(4, TOWERS[tower][2]))).eval()
        engine = build(other, videos[0])
        found = features(model, plain, engine, videos)
        seconds: dict[str, list[float]] = {"eager": [], "engine": []}
        for _ in range(repeat + 1):
            for key, run in (("eager", plain), ("engine", engine)):
                start = time.process_time()
                run(videos[0])
                seconds[key].append(time.process_time() - start)
        base, took = (min(values[1:]) for values in seconds.values())
        yield f"{base:9.2f} {took:9.2f} {base / took:7.2f}x {(expected * found).sum(-1).min():11.6f}"
        model, videos, texts = digits(clips)
        plain = Backbone(model).eval()
        expected = features(model, plain, plain, videos)
        engine = build(Backbone(load_dual_encoder(default_model_path())[0]).eval(), videos[0])
        found = features(model, plain, engine, videos)
        pairs = list(zip(nearest(texts, expected), nearest(texts, found), strict=True))
        same = sum(a == b for a, b in pairs) / len(pairs)
        kept = sum(len(a & b) for a, b in pairs) / (10 * len(pairs))
        yield f" {(expected * found).sum(-1).min():11.6f} {same:9.1%} {kept:9.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", default="l14", choices=TOWERS)
    parser.add_argument("--engine", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--layers", type=int, help="of the tower, fewer than it has: for machines with little time")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--clips", type=int, default=120, help="of moving digits")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()
    torch.set_num_threads(1)
    if args.layers:
        TOWERS[args.tower] = (*TOWERS[args.tower][:2], args.layers, *TOWERS[args.tower][3:])
    dtype, why = machine_dtype(torch.device("cpu"))
    print(f"{args.tower}, {TOWERS[args.tower][2]} layers, {args.frames} frames; torch {torch.__version__}")
    print(f"--dtype auto is {dtype} here: {why}")
    print(f"{'':23} eager s  engine s    gain  min. cosine | digits: cosine  same ten  of them")
    for name in args.engine:
        missing = [package for package in ENGINES[name][0] if import_error(package) is not None]
        if missing:
            print(f"{name:22} not measured: {', '.join(missing)} is not installed")
            continue
        print(f"{name:22}", end="", flush=True)
        for part in measured(name, args.tower, args.repeat, args.frames, args.clips):
            print(part, end="", flush=True)
        print(flush=True)


if __name__ == "__main__":
    main()
