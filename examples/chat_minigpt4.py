"""Ask a MiniGPT-4 with a BT-Adapter about a video, or an image.

There is no MiniGPT-4 in Hugging Face form on the Hub; the first command puts one together from its public parts and
saves it, an ordinary checkpoint that the second command loads (and `bt-adapter chat` as well):

    pip install -c constraints.txt .  (in the clone of bt_adapter_hf)
    python examples/chat_minigpt4.py clip.mp4 --question "What is the dog doing?" --model minigpt4-vicuna-7b \\
        --vision-qformer Salesforce/blip2-flan-t5-xxl --language-model vicuna-7b-v0 \\
        --projection pretrained_minigpt4_7b.pth --bt-adapter my-adapter
    python examples/chat_minigpt4.py clip.mp4 --question "What is the dog doing?" --model minigpt4-vicuna-7b
"""

import argparse

import torch
from transformers import AutoTokenizer, Blip2Processor

from bt_adapter_hf import (
    BTAdapterMiniGPT4ForConditionalGeneration,
    BTAdapterMiniGPT4Processor,
    BTAdapterVideoProcessor,
)


def assemble(options: argparse.Namespace) -> None:
    """Writes model and processor to `options.model`."""
    model = BTAdapterMiniGPT4ForConditionalGeneration.from_components(
        vision_qformer=options.vision_qformer,
        language_model=options.language_model,
        projection=options.projection,
        bt_adapter=options.bt_adapter,
    )
    images = Blip2Processor.from_pretrained(options.vision_qformer).image_processor
    height, width = images.size["height"], images.size["width"]
    videos = BTAdapterVideoProcessor(
        size={"shortest_edge": height},
        crop_size={"height": height, "width": width},
        image_mean=list(images.image_mean),
        image_std=list(images.image_std),
        num_frames=64,
        sampling="centers",
    )
    tokenizer = AutoTokenizer.from_pretrained(options.language_model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    processor = BTAdapterMiniGPT4Processor(images, videos, tokenizer, num_query_tokens=model.config.num_query_tokens)
    model.save_pretrained(options.model)
    processor.save_pretrained(options.model)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--question", required=True)
    parser.add_argument("--model", required=True, help="folder of the model, written first where parts are given")
    parser.add_argument("--vision-qformer", help="BLIP-2 whose image tower and Q-Former are used")
    parser.add_argument("--language-model", help="Vicuna")
    parser.add_argument("--projection", help="the authors' .pth")
    parser.add_argument("--bt-adapter", help="adapter folder or Hub id")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args()
    if options.projection:
        assemble(options)

    model = BTAdapterMiniGPT4ForConditionalGeneration.from_pretrained(options.model, dtype="auto").to(options.device)
    model.eval()
    processor = BTAdapterMiniGPT4Processor.from_pretrained(options.model)
    kind = "image" if options.file.lower().endswith((".png", ".jpg", ".jpeg", ".webp")) else "video"
    parts = [{"type": kind, "path": options.file}, {"type": "text", "text": options.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    ).to(model.device, model.dtype)
    output = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
    print(processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])[0])


if __name__ == "__main__":
    main()
