"""GIF question answering at full size, on the meta device: parameters, what is trained, bytes in 4 bits.

    python benchmarks/gif_qa_sizes.py

X-CLIP base of 16 frames in front of Llama 3.2 3B; nothing is loaded or computed.
"""

import peft
import torch
from torch import nn
from transformers import LlamaConfig

from bt_adapter_hf import (
    BTAdapterGifQAConfig,
    BTAdapterGifQAForConditionalGeneration,
    XCLIPFramesConfig,
    lora_config,
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


def main() -> None:
    print(f"{'connector':<12}{'parameters':>12}{'trained':>12}{'share':>8}{'4-bit GB':>10}{'full tuning GB':>16}")
    for connector in ("mlp", "attention", "qformer"):
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
        small = linear * BITS / 8 + 2 * (total - linear) + 16 * trained
        full = 16 * (total - count(model.vision_model)) + 2 * count(model.vision_model)
        print(
            f"{connector:<12}{total / 1e9:10.3f} G{trained / 1e6:10.1f} M{trained / total:8.2%}{small / 1e9:10.2f}"
            f"{full / 1e9:16.1f}"
        )


if __name__ == "__main__":
    main()
