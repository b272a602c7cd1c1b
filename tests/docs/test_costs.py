"""docs/costs.md: what it calls computed, computed."""

import re
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from bt_adapter_hf import BTAdapterConfig, BTAdapterModel


PAGE = (Path(__file__).parents[2] / "docs" / "costs.md").read_text(encoding="utf-8")


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def linear_weights(layers) -> int:
    return sum(weight.numel() for name, weight in layers.named_parameters() if "norm" not in name)


def weights_row(name: str, llava, branch: int) -> str:
    linear = linear_weights(llava.model.language_model.layers)
    whole, small = count(llava) + branch, linear * 4.5 / 8 + 2 * (count(llava) - linear + branch)
    return f"({name}) | {2 * whole / 1e9:.1f} GB | {4 * whole / 1e9:.1f} GB | {small / 1e9:.1f} GB"


def test_parameters_and_bytes():
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14,
    }  # fmt: skip
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    clip = CLIPConfig(vision_config=vision, text_config=text, projection_dim=768).to_dict()
    tower = {"backbone": {**clip["vision_config"], "model_type": "clip_vision_model"}}
    with torch.device("meta"):
        dual = BTAdapterModel(
            BTAdapterConfig(text_config=clip["text_config"], vision_config=tower, projection_dim=768)
        )
        llava = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(**vision, image_size=336), text_config=LlamaConfig(vocab_size=32064)
            )
        )

    branch, backbone = count(dual.vision_model.bt_adapter), count(dual.vision_model.vision_model)
    assert f"{branch / 1e6:.2f} M beside {backbone / 1e6:.2f} M" in PAGE
    assert f"{2 * branch / 1e6:.0f} MB" in PAGE
    assert (
        f"text tower ({count(dual) / 1e9:.2f} G) | {2 * count(dual) / 1e9:.1f} GB | {4 * count(dual) / 1e9:.1f}"
        in PAGE
    )
    language = llava.model.language_model
    linear = linear_weights(language.layers)
    rest = count(llava) - linear
    assert f"has {count(llava) / 1e9:.2f} G parameters, of which {linear / 1e9:.2f} G" in PAGE
    assert f"{rest / 1e9:.2f} G (embeddings" in PAGE
    assert weights_row(f"{(count(llava) + branch) / 1e9:.2f} G", llava, branch) in PAGE
    with torch.device("meta"):
        big = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(**vision, image_size=336),
                text_config=LlamaConfig(
                    vocab_size=32064,
                    hidden_size=5120,
                    intermediate_size=13824,
                    num_hidden_layers=40,
                    num_attention_heads=40,
                ),
            )
        )
    assert weights_row(f"{(count(big) + branch) / 1e9:.1f} G", big, branch) in PAGE
    cache = 2 * language.config.num_hidden_layers * language.config.hidden_size * 2
    assert f"{cache / 2**20:.1f} MB per token" in PAGE and llava.config.image_seq_length == 576
    assert f"so {cache * 576 / 1e6:.0f} MB for a video" in PAGE
    assert f"{16 * branch / 1e9:.1f} GB (**computed**)" in PAGE


def test_measured_figures_are_in_the_results():
    results = (Path(__file__).parents[2] / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    for line in PAGE.split("\n\n"):
        if "**Measured**" in line or "(**measured**)" in line:
            assert re.search(r"\d", line)
    for figure in ("0.27 s", "1.37 s", "289", "7.3"):
        assert figure in results and figure in PAGE
