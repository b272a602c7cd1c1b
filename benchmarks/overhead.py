"""What the branch costs: time and FLOPs of the tower beside the plain backbone, and of masked beside full training.

    python benchmarks/overhead.py                              # CLIP-L/14, T = 1, 8 and 64, float32 and bfloat16
    python benchmarks/overhead.py --backbone b16 --frames 8    # quicker
    python benchmarks/overhead.py --device cuda
    python benchmarks/overhead.py --temporal joint             # a rival of the branch, forward pass only

Weights are random. The runs that a ratio compares alternate, so that a change of the machine's speed hits both.
"""

import argparse
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from bt_adapter_hf import BTAdapterVisionModel
from bt_adapter_hf.baselines.towers import KINDS, BaselineVisionModel
from bt_adapter_hf.models.modeling_bt_adapter_pretraining import random_tube_mask


BACKBONES = {
    "l14": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "b16": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}
PATCH_SIZE = {"l14": 14, "b16": 16}


def build(name: str, temporal: str | None = None) -> BTAdapterVisionModel:
    backbone = CLIPVisionModel(CLIPVisionConfig(**BACKBONES[name], patch_size=PATCH_SIZE[name])).eval()
    if temporal is None:
        return BTAdapterVisionModel.from_backbone(backbone, drop_path_rate=0.0)
    fields = {"joint": {"frozen": False}, "branch": {"fusion": "sum", "drop_path_rate": 0.0}}.get(temporal, {})
    return BaselineVisionModel.from_backbone(backbone, temporal=temporal, **fields)


def seconds(runs: dict, repeats: int, device: str) -> dict[str, float]:
    """Medians of alternating runs, after one warm-up each."""
    times = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device != "cpu":
                torch.accelerator.synchronize()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def forward_flops(name: str, T: int, temporal: str | None = None) -> tuple[int, int]:
    """Of backbone and tower, counted on the meta device with attention written out."""
    with torch.device("meta"):
        model = build(name, temporal)
        model.set_attn_implementation("eager")
        video = torch.empty(1, T, 3, 224, 224)
        with torch.no_grad():
            return flops(lambda: model.vision_model(video[0])), flops(lambda: model(video))


def forward_table(args):
    print("\nforward pass of one video: tower against the plain backbone on the same frames")
    print(
        f"{'T':>3} {'dtype':>9} {'backbone s':>11} {'tower s':>9} {'time ratio':>11} {'FLOP ratio':>11} {'of it':>6}"
    )
    model = build(args.backbone, args.temporal).to(args.device)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        for T in args.frames:
            video = torch.randn(1, T, 3, 224, 224, device=args.device, dtype=dtype)
            with torch.inference_mode():
                took = seconds(
                    {
                        # the native model on the same chunks of frames as the tower's
                        "backbone": lambda v=video: [
                            model.vision_model(chunk) for chunk in v[0].split(model.config.frames_per_chunk)
                        ],
                        "tower": lambda v=video: model(v),
                    },
                    args.repeats,
                    args.device,
                )
            base, whole = forward_flops(args.backbone, T, args.temporal)
            ratio, flop_ratio = took["tower"] / took["backbone"], whole / base
            print(
                f"{T:>3} {str(dtype)[6:]:>9} {took['backbone']:>11.3f} {took['tower']:>9.3f} {ratio:>11.3f} "
                f"{flop_ratio:>11.3f} {ratio / flop_ratio:>6.3f}",
                flush=True,
            )


def saved_bytes(run) -> int:
    """Memory that autograd keeps for the backward pass; each storage counts once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def masked_table(args, B: int = 2, T: int = 8, ratio: float = 0.7):
    print(
        f"\nthe branch in training, forward and backward, {B} videos of {T} frames, {ratio:.0%} of the patches dropped"
    )
    print(
        f"{'dtype':>9} {'full s':>8} {'masked s':>9} {'time':>6} {'FLOPs':>6} "
        f"{'full MiB':>9} {'masked MiB':>11} {'memory':>7}"
    )
    model = build(args.backbone).to(args.device).train()
    branch, layers, depth = model.bt_adapter, model.config.adapter_layers, model.config.num_hidden_layers
    weights = sum(p.numel() for p in branch.parameters())
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        video = torch.randn(B * T, 3, 224, 224, device=args.device, dtype=dtype)
        states, _ = model._run_backbone(video, set(), output_attentions=False)
        states = {n: x.unflatten(0, (B, T)) for n, x in states.items()}
        position = model._position_embeddings(video, False)
        mask = random_tube_mask(torch.arange(B, device=args.device), len(position) - 1, ratio)

        def loss(masked, states=states, position=position, mask=mask):
            out = branch([states[i + 1] for i in layers], states[depth], position, mask if masked else None)
            return out.patches.float().square().mean() + out.joined.float().square().mean()

        def step(masked, loss=loss):
            branch.zero_grad(set_to_none=True)
            loss(masked).backward()

        took = seconds({"full": lambda: step(False), "masked": lambda: step(True)}, args.repeats, args.device)
        model.set_attn_implementation("eager")
        count = {masked: flops(lambda m=masked: step(m)) for masked in (False, True)}
        model.set_attn_implementation("sdpa")
        size = weights * dtype.itemsize  # the weights are kept too, masked or not
        full, part = (saved_bytes(lambda m=masked: loss(m)) - size for masked in (False, True))
        print(
            f"{str(dtype)[6:]:>9} {took['full']:>8.3f} {took['masked']:>9.3f} {took['masked'] / took['full']:>6.3f} "
            f"{count[True] / count[False]:>6.3f} {full / 2**20:>9.0f} {part / 2**20:>11.0f} {part / full:>7.3f}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=BACKBONES, default="l14")
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--temporal", choices=KINDS, help="a baseline of bt_adapter_hf.baselines in place of the branch"
    )
    args = parser.parse_args()
    with torch.device("meta"):
        model = build(args.backbone, args.temporal)
    branch = sum(p.numel() for p in model.bt_adapter.parameters())
    backbone = sum(p.numel() for p in model.vision_model.parameters())
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{args.backbone}: backbone {backbone / 1e6:.2f} M parameters, branch {branch / 1e6:.2f} M; {device}, "
        f"torch {torch.__version__}"
    )
    forward_table(args)
    if args.temporal is None:
        masked_table(args)


if __name__ == "__main__":
    main()
