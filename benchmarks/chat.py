"""Prefill of a video question: LLaVA with a BT-Adapter beside LLaVA-NeXT-Video, time and peak memory.

    python benchmarks/chat.py --device cuda                    # 7B shapes in bfloat16, 64 against 32 frames
    python benchmarks/chat.py --device cuda --load-in-4bit     # the language models in 4 bit
    python benchmarks/chat.py --size tiny                      # seconds on a CPU: shows that it runs, nothing else

Weights are random. The two models answer in turn, so that a change of the machine's speed hits both.
"""

import argparse
import gc
import statistics
import tempfile
import time

import torch
from transformers import (
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
)

from bt_adapter_hf import BTAdapterLlavaConfig, BTAdapterLlavaForConditionalGeneration


SIZES = {
    "7b": (
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    ),
    "tiny": (
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
    ),
}
IMAGE_TOKEN, VIDEO_TOKEN, QUESTION_TOKENS = 32000, 32001, 64


def configs(size: str):
    text, vision = SIZES[size]
    text = {**text, "vocab_size": 32064, "max_position_embeddings": 8192, "pad_token_id": 0}
    vision = {**vision, "image_size": 336, "patch_size": 14}
    shared = {"image_token_index": IMAGE_TOKEN, "video_token_index": VIDEO_TOKEN}
    ours = BTAdapterLlavaConfig(text_config=LlamaConfig(**text), vision_config=CLIPVisionConfig(**vision), **shared)
    theirs = LlavaNextVideoConfig(
        text_config=LlamaConfig(**text), vision_config=CLIPVisionConfig(**vision), spatial_pool_stride=2, **shared
    )
    return ours, theirs


def build(model_class, config, args):
    """A random model on the device; in 4 bit by way of a saved copy, as users load one."""
    with torch.device(args.device):
        torch.set_default_dtype(torch.bfloat16)
        model = model_class(config)
        torch.set_default_dtype(torch.float32)
    if not args.load_in_4bit:
        return model.eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            # full paths: patterns are matched from the start of a module's name
            llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        )
        return model_class.from_pretrained(
            folder, quantization_config=quantization, dtype=torch.bfloat16, device_map=args.device
        ).eval()


def prefill(model, frames: int, device: str):
    """A function that runs one prefill, and the number of visual tokens."""
    video = torch.randn(1, frames, 3, 336, 336, device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        tokens = sum(len(x.flatten(0, -2)) for x in model.model.get_video_features(video).pooler_output)
    prompt = torch.full((1, tokens + QUESTION_TOKENS), 5, device=device)
    prompt[:, 1 : 1 + tokens] = VIDEO_TOKEN

    @torch.inference_mode()
    def run():
        model(input_ids=prompt, pixel_values_videos=video, logits_to_keep=1, use_cache=True)

    return run, tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--baseline-frames", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    cuda = args.device == "cuda"

    ours, theirs = configs(args.size)
    models = {
        "BT-Adapter-LLaVA": (build(BTAdapterLlavaForConditionalGeneration, ours, args), args.frames),
        "LLaVA-NeXT-Video": (build(LlavaNextVideoForConditionalGeneration, theirs, args), args.baseline_frames),
    }
    runs = {name: prefill(model, frames, args.device) for name, (model, frames) in models.items()}
    times, memory = {name: [] for name in runs}, {}
    for repeat in range(args.repeats + 1):
        for name, (run, _) in runs.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
                memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
            if repeat:
                times[name].append(time.perf_counter() - start)

    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.size}, {'4 bit' if args.load_in_4bit else 'bfloat16'}; {device}, torch {torch.__version__}")
    columns = f"{'frames':>6} {'visual tokens':>13} {'model GiB':>10} {'activations GiB':>16} {'prefill s':>10}"
    print(f"{'':<18} {columns} ratio")
    reference = statistics.median(times["LLaVA-NeXT-Video"])
    for name, (model, frames) in models.items():
        took = statistics.median(times[name])
        peak = f"{memory[name]:.2f}" if cuda else "-"
        print(
            f"{name:<18} {frames:>6} {runs[name][1]:>13} {model.get_memory_footprint() / 2**30:>10.2f} {peak:>16} "
            f"{took:>10.3f} {took / reference:.2f}"
        )
    branch = sum(p.numel() for p in models["BT-Adapter-LLaVA"][0].model.vision_tower.bt_adapter.parameters())
    print(f"the branch has {branch / 1e6:.2f} M parameters")


if __name__ == "__main__":
    main()
