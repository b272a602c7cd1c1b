"""Tiny random hosts as a user finds them, in folders: a native checkpoint with its processor, and an adapter."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Blip2Processor, InstructBlipProcessor, LlavaProcessor

from bt_adapter_hf import BTAdapterVisionModel, save_bt_adapter
from tests.chat import tiny_hosts


def save(name: str, folder: Path) -> tuple[Path, Path]:
    """Writes `folder/native` and `folder/adapter` for "llava", "instructblip" or "blip-2" and returns them."""
    make = {"llava": tiny_hosts.llava, "instructblip": tiny_hosts.instructblip, "blip-2": tiny_hosts.blip2}[name]
    model, native, adapter = make(), folder / "native", folder / "adapter"
    _say_words_only(model.lm_head if name == "llava" else model.language_model.lm_head)
    model.save_pretrained(native)
    if name == "llava":
        processor = LlavaProcessor(
            tiny_hosts.image_processor(),
            tiny_hosts.tokenizer(),
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    elif name == "instructblip":
        processor = InstructBlipProcessor(
            tiny_hosts.blip_image_processor(),
            tiny_hosts.tokenizer(),
            qformer_tokenizer=tiny_hosts.tokenizer(extra=()),
            num_query_tokens=tiny_hosts.QUERIES,
        )
    else:
        processor = Blip2Processor(
            tiny_hosts.blip_image_processor(), tiny_hosts.tokenizer(), num_query_tokens=tiny_hosts.QUERIES
        )
    processor.save_pretrained(native)
    tower = BTAdapterVisionModel.from_backbone(model.model.vision_tower if name == "llava" else model.vision_model)
    tiny_hosts.stir(tower.bt_adapter)
    save_bt_adapter(tower, adapter)
    return native, adapter


def save_minigpt4_parts(folder: Path) -> dict[str, Path]:
    """The pieces that MiniGPT-4 is put together from: folders and the authors' kind of `.pth`."""
    native, adapter = save("blip-2", folder)
    language_model, projection = folder / "llama", folder / "minigpt4.pth"
    torch.manual_seed(3)
    speech = AutoModelForCausalLM.from_config(tiny_hosts.text_config())
    _say_words_only(speech.lm_head)
    speech.save_pretrained(language_model)
    tokens = tiny_hosts.tokenizer(extra=())
    tokens.add_tokens(["###"])
    tokens.save_pretrained(language_model)
    torch.save({"model": {"llama_proj.weight": torch.randn(32, 16), "llama_proj.bias": torch.randn(32)}}, projection)
    return {
        "vision_qformer": native,
        "language_model": language_model,
        "projection": projection,
        "bt_adapter": adapter,
    }


def _say_words_only(lm_head: torch.nn.Linear) -> None:
    """Random weights would say padding, placeholders and ids without a word, all of which decode to nothing."""
    words = slice(4, 4 + len(tiny_hosts.WORDS))
    kept = lm_head.weight.data[words].clone()
    lm_head.weight.data.zero_()
    lm_head.weight.data[words] = kept
