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


RESULTS = (Path(__file__).parents[2] / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def column(row: str, number: int) -> list[float]:
    """A number of each row of the results that begins so, by its place among those of the row."""
    rows = re.findall(rf"^\|?\s*{row}(.*)$", RESULTS, re.MULTILINE)
    return [float(re.findall(r"[\d.]+", line)[number]) for line in rows]


def test_measured_figures_are_in_the_results():
    ratios = [*column(r"[18] +float32", 2), *column(r"[18] +bfloat16", 2)]
    assert len(ratios) == 4 and f"{min(ratios):.2f} to {max(ratios):.2f} | measured" in PAGE
    (time,), (memory,) = column("bfloat16  ", 2), column("bfloat16  ", 6)
    assert f"{time:.2f} of its time and {memory:.2f} of its memory (**measured**)" in PAGE
    assert f"{time:.2f} of the branch's time and {memory:.2f} of its activations" in README
    (activations,) = column("bfloat16  ", 5)
    assert f"{activations:.0f} MiB for 2 videos" in PAGE and f"{activations * 52 / 2 / 1024:.1f} GiB at" in PAGE
    (step,), (states,) = column(r"from states in bf16 \|", 1), column(r"from states in bf16 \|", 3)
    assert f"{step:.2f} of the time per step, {states:.1f} MB per video at CLIP-B/16 (**measured**)" in PAGE
    faster = column("ONNX Runtime int8 ", 2)[0]
    near = column("ONNX Runtime int8 ", 5)[0]
    assert f"{1 / faster:.2f} of float32's time" in PAGE and f"same for {near:.0f} %" in PAGE
    five_minutes, hour = column("load_video ", 0)[-2:]
    assert f"{five_minutes:.2f} s of 5 minutes, {hour:.2f} s of an hour" in PAGE


def test_the_readme_has_the_same_figures():
    assert "71.45 M beside 303 M; as an adapter file in fp16 143 MB" in README and "71.45 M beside 303.18 M" in PAGE
    assert min(column(r"[18] +float32", 2)) <= 1.23 <= max(column(r"[18] +float32", 2)) and "1.23 times" in README
