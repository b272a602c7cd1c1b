"""A tiny CLIP with its processor, and a folder of tiny clips with captions, all made in code."""

import json
import os
from pathlib import Path

import av
import numpy as np
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPTokenizer

from bt_adapter_hf import BTAdapterConfig, BTAdapterForPreTraining, BTAdapterProcessor, BTAdapterVideoProcessor


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (60, 80, 230), "grey": (120, 120, 120)}


def tokenizer() -> CLIPTokenizer:
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=24)


def processor(num_frames: int = 4) -> BTAdapterProcessor:
    size = {"height": 16, "width": 16}
    video_processor = BTAdapterVideoProcessor(size={"shortest_edge": 16}, crop_size=size, num_frames=num_frames)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    return BTAdapterProcessor(image_processor, video_processor, tokenizer())


def clip_config() -> CLIPConfig:
    words = tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": len(words),
        "max_position_embeddings": 24,
        "projection_dim": 12,
        # the original CLIP rule of pooling, as in OpenAI's checkpoints
        "eos_token_id": 2,
        "bos_token_id": 0,
        "pad_token_id": 1,
    }
    vision = {**sizes, "image_size": 16, "patch_size": 8, "projection_dim": 12}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)


def model(vision: dict | None = None, **overrides) -> BTAdapterForPreTraining:
    config = clip_config().to_dict()
    backbone = {**config["vision_config"], "model_type": "clip_vision_model"}
    tower = {"backbone": backbone, "adapter_layers": [1, 2], **(vision or {})}
    fields = {"text_config": config["text_config"], "vision_config": tower, "projection_dim": 12, **overrides}
    return BTAdapterForPreTraining(BTAdapterConfig(**fields))


def write_clip(path: Path, colour: tuple[int, int, int], step: int, frames: int = 6, side: int = 32) -> None:
    """An mp4 of a square that moves by `step` pixels per frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for t in range(frames):
            image = np.full((side, side, 3), 15, np.uint8)
            left = (4 + step * t) % (side - 10)
            image[10:20, left : left + 10] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_table(folder: Path, rows: int = 8) -> Path:
    """`folder/metadata.jsonl` with `rows` clips, captions "a red square goes right 0", ..."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(rows):
        name = list(COLOURS)[i % len(COLOURS)]
        direction, step = (("right", 2), ("left", -2))[i // len(COLOURS) % 2]
        write_clip(folder / f"clip{i}.mp4", COLOURS[name], step)
        lines.append({"file_name": f"clip{i}.mp4", "text": f"{name} goes {direction} {i}"})
    path = folder / "metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def shard_on_the_cpu() -> None:
    """Under a config with FSDP: accelerate offers it to accelerators only, though all it calls runs on the CPU too.

    To be called between the training arguments, which reset the state, and the trainer.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        from accelerate import DistributedType, PartialState

        PartialState().distributed_type = DistributedType.MULTI_GPU
