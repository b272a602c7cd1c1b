"""examples/video_embeds_for_vllm.py: what a server with the native LLaVA is given."""

import runpy
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from bt_adapter_hf import BTAdapterLlavaForConditionalGeneration, BTAdapterLlavaProcessor
from tests import clip_tools
from tests.chat import saved_hosts, tiny_hosts


EXAMPLE = Path(__file__).parents[2] / "examples" / "video_embeds_for_vllm.py"


def test_a_native_llava_answers_from_the_embeddings(tmp_path, monkeypatch, capsys):
    """Placed where the prompt has its image, they are the prompt embeddings that ours has, and give its logits."""
    native_folder, adapter = saved_hosts.save("llava", tmp_path)
    clip = clip_tools.write_clip(tmp_path / "clip.mp4", count=12)
    output = tmp_path / "embeds.safetensors"
    argv = [clip, "--output", output, "--model", native_folder, "--bt-adapter", adapter]
    argv += ["--num-frames", 4, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, argv)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    embeds = load_file(output)["clip.mp4"]
    width = tiny_hosts.text_config().hidden_size
    assert embeds.shape == (1, tiny_hosts.PATCHES, width) and str(tuple(embeds.shape)) in capsys.readouterr().out

    ours = BTAdapterLlavaForConditionalGeneration.from_pretrained(native_folder, bt_adapter=adapter).eval()
    processor = BTAdapterLlavaProcessor.from_pretrained(native_folder, num_frames=4)
    question = {"type": "text", "text": "what happens ?"}
    message = [{"role": "user", "content": [{"type": "video", "path": str(clip)}, question]}]
    inputs = processor.apply_chat_template(
        message, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    seen = {}
    ours.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(ours=kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        expected = ours(**inputs).logits

    native = LlavaForConditionalGeneration.from_pretrained(native_folder).eval()
    image_token = native.config.image_token_id
    ids = torch.where(inputs["input_ids"] == processor.video_token_id, image_token, inputs["input_ids"])
    native_processor = AutoProcessor.from_pretrained(native_folder)
    assert native_processor.tokenizer.convert_tokens_to_ids("<image>") == image_token
    with torch.no_grad():
        # As a server does it: the words from the table, the embeddings where the image stands.
        prompt = native.get_input_embeddings()(ids)
        prompt = prompt.masked_scatter((ids == image_token)[..., None].expand_as(prompt), embeds)
        logits = native(inputs_embeds=prompt, attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(prompt, seen["ours"]) and torch.equal(logits, expected)
