"""GIF question answering at full size, on the meta device: parameters, what is trained, bytes in 4 bits.

    python benchmarks/gif_qa_sizes.py              # X-CLIP base before Llama 3.2 3B; nothing is loaded or computed
    python benchmarks/gif_qa_sizes.py --measure    # and the peak memory of steps on a smaller one, on the CPU

`--measure` trains each way in a process of its own, with a Llama of 62 M in front of a tiny X-CLIP: its peak less what
it had before the model was there.
"""

import argparse
import gc
import resource
import subprocess
import sys
import tempfile

import peft
import torch
from torch import nn
from transformers import LlamaConfig

from bt_adapter_hf import (
    BTAdapterGifQAConfig,
    BTAdapterGifQAForConditionalGeneration,
    XCLIPFramesConfig,
    lora_config,
    quantization_config,
)


LLAMA_3B = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}  # fmt: skip
XCLIP = {"patch_size": 16, "num_frames": 16, "hidden_size": 768, "num_hidden_layers": 12}
# NF4: 4 bits, a scale of 8 bits for 64 values, and one of 32 bits for 256 scales
BITS = 4 + 8 / 64 + 32 / (64 * 256)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def sizes(connector: str) -> dict[str, float]:
    """Parameters, those that are trained, and bytes: weights in 4 bits, these with LoRA and what Adam keeps of it, and
    of full tuning."""
    config = BTAdapterGifQAConfig(
        vision_config=XCLIPFramesConfig(backbone=XCLIP), text_config=LlamaConfig(**LLAMA_3B), connector=connector
    )
    with torch.device("meta"):
        model = BTAdapterGifQAForConditionalGeneration(config)
        total = count(model)
        head = model.get_output_embeddings()
        linear = sum(
            module.weight.numel()
            for module in model.language_model.modules()
            if isinstance(module, nn.Linear) and module is not head
        )
        wrapped = peft.get_peft_model(model, lora_config(model, r=16, init_lora_weights=False))
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    # weights: 4 bits and, of what is not quantized, bfloat16; what is trained, its gradient and Adam's two in fp32
    weights = linear * BITS / 8 + 2 * (total - linear)
    full = 16 * (total - count(model.vision_model)) + 2 * count(model.vision_model)
    return {
        "parameters": total,
        "trained": trained,
        "weights": weights,
        "tuning": weights + 16 * trained,
        "full": full,
    }


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(way: str) -> None:
    """Three steps of 4 GIFs of 16 frames in this process."""
    torch.set_num_threads(1)
    backbone = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
                "mit_hidden_size": 64, "mit_num_attention_heads": 4, "num_frames": 16}  # fmt: skip
    text = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12,
            "vocab_size": 4000}  # fmt: skip
    config = BTAdapterGifQAConfig(
        vision_config=XCLIPFramesConfig(backbone=backbone), text_config=LlamaConfig(**text), video_token_index=3
    )
    with tempfile.TemporaryDirectory() as folder:
        if way == "lora":  # loaded as a user loads it; a child process writes it, whose memory is not ours
            code = f"from benchmarks.gif_qa_sizes import save; save({config.to_dict()!r}, {folder!r})"
            subprocess.run([sys.executable, "-c", code], check=True)
        gc.collect()
        before = peak()
        if way == "lora":
            quantized = quantization_config(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            )
            model = BTAdapterGifQAForConditionalGeneration.from_pretrained(folder, quantization_config=quantized)
            model = peft.get_peft_model(model, lora_config(model, r=16))
        else:
            model = BTAdapterGifQAForConditionalGeneration(config)
    model.train()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning)
    ids = torch.tensor([[*[3] * 16, *range(10, 26)]] * 4)
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids, pixel_values_videos=torch.randn(4, 16, 3, 32, 32)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = sum(parameter.numel() for parameter in learning)
    print(f"{trained} {count(model)} {peak() - before}")


def save(config: dict, folder: str) -> None:
    config = BTAdapterGifQAConfig.from_dict(config)
    BTAdapterGifQAForConditionalGeneration(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="?", const="both", choices=("both", "lora", "full"), help="see above")
    args = parser.parse_args()
    if args.measure in ("lora", "full"):
        measure(args.measure)
        return
    titles = f"{'weights GB':>12}{'LoRA GB':>10}{'full tuning GB':>16}"
    print(f"{'connector':<12}{'parameters':>12}{'trained':>12}{'share':>8}{titles}")
    for connector in ("mlp", "attention", "qformer"):
        found = sizes(connector)
        share = found["trained"] / found["parameters"]
        print(
            f"{connector:<12}{found['parameters'] / 1e9:10.3f} G{found['trained'] / 1e6:10.1f} M{share:8.2%}"
            f"{found['weights'] / 1e9:12.2f}{found['tuning'] / 1e9:10.2f}{found['full'] / 1e9:16.1f}"
        )
    if args.measure:
        results = {}
        for way in ("full", "lora"):
            command = [sys.executable, "-m", "benchmarks.gif_qa_sizes", "--measure", way]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[way] = [int(word) for word in output.split()[-3:]]
        total = results["full"][1]
        print(f"\n{'measured':<12}{'parameters':>12}{'trained':>12}{'share':>8}{'peak memory':>15}")
        for way, (trained, _, memory) in results.items():
            print(
                f"{way:<12}{total / 1e6:10.1f} M{trained / 1e6:10.2f} M{trained / total:8.2%}{memory / 1e6:12.0f} MB"
            )


if __name__ == "__main__":
    main()
