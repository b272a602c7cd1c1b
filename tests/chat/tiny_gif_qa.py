"""Tiny random models of GIF question answering: X-CLIP or a BT-Adapter of 4 frames of 32 pixels, and any small LLM."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    Qwen2Config,
    XCLIPConfig,
    XCLIPModel,
)

from bt_adapter_hf import (
    BTAdapterGifQAConfig,
    BTAdapterGifQAForConditionalGeneration,
    BTAdapterGifQAProcessor,
    BTAdapterVisionModel,
    XCLIPFramesConfig,
    XCLIPFramesModel,
)
from bt_adapter_hf.models.processing_bt_adapter_gif_qa import xclip_video_processor
from tests.chat import tiny_hosts


VISION = {
    **{name: size for name, size in tiny_hosts.SIZES.items() if name != "num_hidden_layers"},
    "num_hidden_layers": 2,
    "mit_hidden_size": 16,
    "mit_intermediate_size": 20,
    "mit_num_attention_heads": 2,
    "num_frames": 4,
}
TEXT = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
QFORMER = {**tiny_hosts.QFORMER, "encoder_hidden_size": 16}


def xclip() -> XCLIPModel:
    torch.manual_seed(0)
    return XCLIPModel(XCLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=16)).eval()


def language_config(kind: str = "llama"):
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=192, bos_token_id=1, eos_token_id=2,
            initializer_range=0.2,
        )  # fmt: skip
    if kind == "qwen2":
        return Qwen2Config(
            vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=192, tie_word_embeddings=True, bos_token_id=1,
            eos_token_id=2, initializer_range=0.2,
        )  # fmt: skip
    return tiny_hosts.text_config()


def processor(config: BTAdapterGifQAConfig, num_frames: int | None = None) -> BTAdapterGifQAProcessor:
    if config.frames_per_group is None:
        videos = tiny_hosts.video_processor(num_frames or 4)
    else:
        videos = xclip_video_processor(config.vision_config)
        videos.num_frames = num_frames or videos.num_frames
    return BTAdapterGifQAProcessor(
        videos,
        tiny_hosts.tokenizer(),
        frames_per_group=config.frames_per_group,
        tokens_per_group=config.tokens_per_group,
    )


def model(
    connector: str = "mlp", language: str = "llama", tower: str = "xclip", **fields
) -> BTAdapterGifQAForConditionalGeneration:
    torch.manual_seed(1)
    if tower == "xclip":
        vision = XCLIPFramesConfig(backbone=VISION)
    else:
        clip = CLIPVisionModel(CLIPVisionConfig(**tiny_hosts.SIZES))
        vision = BTAdapterVisionModel.from_backbone(clip, output_fusion="sum").config
    if connector == "qformer":
        fields.setdefault("qformer_config", {**QFORMER, "encoder_hidden_size": vision.hidden_size})
    config = BTAdapterGifQAConfig(
        vision_config=vision,
        text_config=language_config(language),
        connector=connector,
        num_query_tokens=3,
        video_token_index=19,
        initializer_range=0.2,
        **fields,
    )
    made = BTAdapterGifQAForConditionalGeneration(config).eval()
    if tower == "xclip":  # transformers' start is too small for frames to matter
        with torch.no_grad():
            for parameter in made.vision_model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return made


def save_components(folder: Path, language: str = "llama") -> dict[str, Path]:
    """`folder/xclip` and `folder/llm`, as a user finds them."""
    xclip().save_pretrained(folder / "xclip")
    torch.manual_seed(3)
    speech = AutoModelForCausalLM.from_config(language_config(language))
    speech.save_pretrained(folder / "llm")
    tokens = tiny_hosts.tokenizer(extra=())
    tokens.save_pretrained(folder / "llm")
    return {"tower": folder / "xclip", "language_model": folder / "llm"}


def tower() -> XCLIPFramesModel:
    return model().vision_model


def write_gif(path: Path, frames: int = 6, seed: int = 0, delays: list[int] | int = 100) -> Path:
    """A GIF of a square that moves, 40 x 36 pixels."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(60, 255, 3)
    pictures = []
    for t in range(frames):
        frame = np.zeros((36, 40, 3), np.uint8)
        frame[8:20, 3 * t % 28 : 3 * t % 28 + 10] = colour
        pictures.append(Image.fromarray(frame))
    pictures[0].save(path, save_all=frames > 1, append_images=pictures[1:], duration=delays, loop=0)
    return path
