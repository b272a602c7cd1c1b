"""Ask a LLaVA with a BT-Adapter about videos and images.

    pip install -c constraints.txt .  (in the clone of bt_adapter_hf)
    python examples/chat_llava.py clip1.mp4 clip2.gif --question "How does it move?"
    python examples/chat_llava.py clip.mp4 photo.jpg --question "What is the dog doing?" \\
        --model llava-hf/llava-1.5-7b-hf --bt-adapter my-adapter --dtype bfloat16

Without --model the small chat model inside the package is used, which knows moving digits only. Each file is asked
about by itself; `bt-adapter chat` shows several at once and keeps a conversation.
"""

import argparse

import torch

from bt_adapter_hf import BTAdapterLlavaForConditionalGeneration, BTAdapterLlavaProcessor
from bt_adapter_hf.assets import default_chat_model_path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--question", required=True)
    parser.add_argument("--model", default=str(default_chat_model_path()))
    parser.add_argument("--bt-adapter", help="adapter folder or Hub id, for a native LLaVA")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args()

    model = BTAdapterLlavaForConditionalGeneration.from_pretrained(
        options.model, bt_adapter=options.bt_adapter, dtype=options.dtype
    ).to(options.device)
    model.eval()
    processor = BTAdapterLlavaProcessor.from_pretrained(options.model)

    # One conversation per file, in one batch: images and videos of any length together.
    conversations = []
    for file in options.files:
        kind = "image" if file.lower().endswith((".png", ".jpg", ".jpeg", ".webp")) else "video"
        parts = [{"type": kind, "path": file}, {"type": "text", "text": options.question}]
        conversations.append([{"role": "user", "content": parts}])
    inputs = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    ).to(model.device, model.dtype)
    output = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
    answers = processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
    for file, answer in zip(options.files, answers, strict=True):
        print(f"{file}: {answer}")


if __name__ == "__main__":
    main()
