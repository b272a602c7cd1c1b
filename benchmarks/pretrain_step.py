"""What a pretraining step costs: clips per second, share of the matmul rate, memory; and ways to save memory.

    python -m benchmarks.pretrain_step                            # CLIP-L/14, batch 52, T = 8, 70 % masked, on a GPU
    python -m benchmarks.pretrain_step --batch 208 --ways checkpointed cached
    python -m benchmarks.pretrain_step --size tiny --device cpu   # seconds

A step is what `bt-adapter pretrain --bf16` does once its batch is on the device: forward pass under autocast, backward
pass, clipping, AdamW. Reading and decoding videos is not in it, see benchmarks/loader.py. Weights and videos are
random. The ways take turns, so that a change of the machine's speed hits all of them.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig

from benchmarks.saved_memory import saved_memory
from bt_adapter_hf import BTAdapterConfig, BTAdapterForPreTraining
from bt_adapter_hf.training.cached_gradients import cached_gradient_step


SIZES = {
    "l14": {
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        "projection_dim": 768,
        "image_size": 224,
        "patch_size": 14,
        "K": 4,
        "matmul": 8192,
    },
    "tiny": {
        "text": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        "vision": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
        "projection_dim": 32,
        "image_size": 64,
        "patch_size": 16,
        "K": 2,
        "matmul": 256,
    },
}
WAYS = ("plain", "checkpointed", "cached", "compiled")
WEBVID_CLIPS = 2.5e6
TEXT_LENGTH = 64


def build(size: dict, mask: float) -> BTAdapterForPreTraining:
    clip = CLIPConfig(
        text_config=size["text"],
        vision_config={**size["vision"], "image_size": size["image_size"], "patch_size": size["patch_size"]},
        projection_dim=size["projection_dim"],
    ).to_dict()
    L = size["vision"]["num_hidden_layers"]
    tower = {
        "backbone": {**clip["vision_config"], "model_type": "clip_vision_model"},
        "adapter_layers": list(range(L - size["K"], L)),
    }
    return BTAdapterForPreTraining(
        BTAdapterConfig(
            text_config=clip["text_config"],
            vision_config=tower,
            projection_dim=size["projection_dim"],
            mask_ratio=mask,
        )
    ).train()


def random_batch(size: dict, B: int, T: int, device: str) -> dict[str, torch.Tensor]:
    side = size["image_size"]
    with torch.device(device):
        return {
            "input_ids": torch.randint(3, 49000, (B, TEXT_LENGTH)),
            "attention_mask": torch.ones(B, TEXT_LENGTH, dtype=torch.long),
            "pixel_values_videos": torch.randn(B, T, 3, side, side),
        }


def step_flops(size: dict, B: int, T: int, mask: float) -> int:
    """Of a plain step, forward and backward, counted on the meta device with attention written out.

    The frozen towers have no backward pass. Two clips are counted and scaled up; the contrast is left out.
    """
    with torch.device("meta"):
        model = build(size, mask)
    model.set_attn_implementation("eager")
    batch = random_batch(size, 2, T, "meta")
    with FlopCounterMode(display=False) as counter:
        features = model(**batch, return_loss=False)
        sum(features[name].sum() for name in ("video", "patches", "token_loss")).backward()
    return counter.get_total_flops() * B // 2


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def matmul_rate(n: int, device: str, repeats: int = 10) -> float:
    """FLOPs per second of the best of some bfloat16 products of n x n matrices: what the machine can do at most."""
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16).unbind()
    best = float("inf")
    for _ in range(repeats + 3):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / 5)
    return 2 * n**3 / best


def make_steps(
    model: BTAdapterForPreTraining, batch: dict[str, torch.Tensor], clips: int, device: str
) -> dict[str, Callable[[], None]]:
    """The ways to run a step; all of them on one model and one optimizer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-6, betas=(0.9, 0.98), weight_decay=0.05, fused=device != "cpu")

    class InHalf(torch.nn.Module):
        """The model under autocast in every call, as accelerate prepares it."""

        def forward(self, **inputs):
            with torch.autocast(device, torch.bfloat16):
                return model(**inputs)

    def plain():
        with torch.autocast(device, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()

    def checkpointed():
        model.activation_checkpointing_enable()
        try:
            plain()
        finally:
            model.activation_checkpointing_disable()

    def cached():
        cached_gradient_step(InHalf(), batch, clips, backward=torch.Tensor.backward, bare=model)

    def compiled():
        with torch.autocast(device, torch.bfloat16):
            loss = compiled_model()(**batch).loss
        loss.backward()

    @functools.cache
    def compiled_model():
        return torch.compile(model)

    def whole(gradients: Callable[[], None]) -> Callable[[], None]:
        def run():
            gradients()
            torch.nn.utils.clip_grad_norm_(trained, 5.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    ways = {"plain": plain, "checkpointed": checkpointed, "cached": cached, "compiled": compiled}
    return {name: whole(gradients) for name, gradients in ways.items()}


def peak_memory(model: torch.nn.Module, run: Callable[[], None], device: str) -> int:
    """Bytes: on a GPU all that was allocated at most, on the CPU the activations that autograd held at most."""
    if device == "cpu":
        with saved_memory(model) as memory:
            run()
        return memory["peak"]
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated()


def measure(
    model: torch.nn.Module, steps: dict[str, Callable[[], None]], repeats: int, device: str
) -> dict[str, tuple[float, int]]:
    """Median seconds and peak bytes of each way; a way that does not fit into memory is left out, and said so."""
    peaks, times = {}, {name: [] for name in steps}
    for name, run in steps.items():
        try:
            for _ in range(3):  # compilation, choice of kernels, the allocator's first growth, the optimizer's state
                run()
            peaks[name] = peak_memory(model, run, device)
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory")
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    for _ in range(repeats):
        for name in peaks:
            synchronize(device)
            start = time.perf_counter()
            steps[name]()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: (statistics.median(times[name]), peaks[name]) for name in peaks}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="l14")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=52, help="clips; 52 is the released batch per GPU")
    parser.add_argument("--clips", type=int, help="clips at a time of cached gradients (default: a quarter)")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--mask", type=float, default=0.7)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="(default: all; on a CPU all but compiled)")
    args = parser.parse_args(argv)
    size, device = SIZES[args.size], args.device
    ways = args.ways or (WAYS if device != "cpu" else WAYS[:-1])
    clips = args.clips or -(-args.batch // 4)

    torch.manual_seed(0)
    with torch.device(device):
        model = build(size, args.mask)
    batch = random_batch(size, args.batch, args.frames, device)
    flops = step_flops(size, args.batch, args.frames, args.mask)
    rate = matmul_rate(size["matmul"], device)
    name = torch.cuda.get_device_name() if device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"{args.size}, batch {args.batch}, T = {args.frames}, {args.mask:.0%} masked, bfloat16 autocast, "
        f"{trained / 1e6:.2f} M trained parameters; {name}, torch {torch.__version__}\n"
        f"{flops / args.batch / 1e12:.4f} TFLOP per clip, forward and backward; matmul of {size['matmul']}: "
        f"{rate / 1e12:.2f} TFLOP/s; cached: {clips} clips at a time"
    )
    steps = make_steps(model, batch, clips, device)
    results = measure(model, {way: steps[way] for way in ways}, args.repeats, device)
    if not results:
        raise SystemExit("No way fits into memory: try a smaller --batch.")
    base_seconds, base_memory = results.get("plain", next(iter(results.values())))
    memory_title = "peak MiB" if device != "cpu" else "saved MiB"
    print(
        f"{'':>12} {'s/step':>9} {'clips/s':>9} {'of matmul':>10} {'time':>6} {memory_title:>10} {'memory':>7} "
        f"{'hours':>8}"
    )
    for way, (seconds, memory) in results.items():
        per_second = args.batch / seconds
        print(
            f"{way:>12} {seconds:>9.4f} {per_second:>9.1f} {flops / seconds / rate:>10.1%} "
            f"{seconds / base_seconds:>6.2f} {memory / 2**20:>10.1f} {memory / base_memory:>7.2f} "
            f"{WEBVID_CLIPS / per_second / 3600:>8.1f}",
            flush=True,
        )
    print(
        "of matmul: FLOPs of the plain step over what the matmul would do in the time of this way; "
        f"hours: for {WEBVID_CLIPS / 1e6:g} M clips on this one device."
    )


if __name__ == "__main__":
    main()
