"""transformers' pipelines for chat models, with images and videos, of each host."""

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

from bt_adapter_hf import (
    BTAdapterInstructBlipForConditionalGeneration,
    BTAdapterInstructBlipProcessor,
    BTAdapterLlavaForConditionalGeneration,
    BTAdapterLlavaProcessor,
    BTAdapterMiniGPT4ForConditionalGeneration,
    BTAdapterMiniGPT4Processor,
)
from tests import clip_tools
from tests.chat import saved_hosts


HOSTS = {
    "llava": (BTAdapterLlavaForConditionalGeneration, BTAdapterLlavaProcessor),
    "instructblip": (BTAdapterInstructBlipForConditionalGeneration, BTAdapterInstructBlipProcessor),
    "blip-2": (BTAdapterMiniGPT4ForConditionalGeneration, BTAdapterMiniGPT4Processor),
}


@pytest.mark.parametrize("name", HOSTS)
def test_pipelines_answer_about_images_and_videos(name, tmp_path):
    model_class, processor_class = HOSTS[name]
    native, adapter = saved_hosts.save(name, tmp_path)
    model = model_class.from_pretrained(native, bt_adapter=adapter)
    processor = processor_class.from_pretrained(native, num_frames=4)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "ours")
    clip = str(clip_tools.write_clip(tmp_path / "clip.mp4", count=12, fps=4))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    parts = [{"type": "video", "path": clip}, {"type": "image", "path": str(tmp_path / "a.png")}]
    chats = [[{"role": "user", "content": [part, {"type": "text", "text": "what happens ?"}]}] for part in parts]
    options = {"max_new_tokens": 4, "return_full_text": False}
    told = []
    for task in ("image-text-to-text", "any-to-any"):
        ask = pipeline(task, model=str(tmp_path / "ours"))
        assert type(ask.model) is model_class
        told.append([answer[0]["generated_text"] for answer in ask(text=chats, **options)])
        told.append([ask(text=chat, **options)[0]["generated_text"] for chat in chats])
    inputs = processor.apply_chat_template(
        chats[0], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert told[0][0].strip() == processor.post_process_image_text_to_text(output)[0] != ""
    assert all(answers == told[0] for answers in told)
