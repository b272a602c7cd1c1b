"""Ask an InstructBLIP with a BT-Adapter about a video, or an image: 32 tokens, whatever the number of frames.

    pip install -c constraints.txt .  (in the clone of bt_adapter_hf)
    python examples/chat_instructblip.py clip.mp4 --question "What is the dog doing?" \\
        --model Salesforce/instructblip-vicuna-7b --bt-adapter my-adapter --dtype bfloat16
"""

import argparse

import torch
from transformers.image_utils import load_image

from bt_adapter_hf import BTAdapterInstructBlipForConditionalGeneration, BTAdapterInstructBlipProcessor


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--question", required=True)
    parser.add_argument("--model", required=True, help="an InstructBLIP, native or with its adapter")
    parser.add_argument("--bt-adapter", help="adapter folder or Hub id, for a native InstructBLIP")
    parser.add_argument("--num-frames", type=int, help="by default 64, or as saved")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args()

    model = BTAdapterInstructBlipForConditionalGeneration.from_pretrained(
        options.model, bt_adapter=options.bt_adapter, dtype=options.dtype
    ).to(options.device)
    model.eval()
    sampling = {} if options.num_frames is None else {"num_frames": options.num_frames}
    processor = BTAdapterInstructBlipProcessor.from_pretrained(options.model, **sampling)

    # The question without a placeholder: what is seen comes first, and the Q-Former reads the question too.
    is_image = options.file.lower().endswith((".png", ".jpg", ".jpeg", ".webp"))
    seen = {"images": [load_image(options.file)]} if is_image else {"videos": [options.file]}
    inputs = processor(text=options.question, **seen, return_tensors="pt").to(model.device, model.dtype)
    output = model.generate(**inputs, max_new_tokens=options.max_new_tokens, num_beams=5)
    if not model.language_model.config.is_encoder_decoder:  # Vicuna repeats the prompt, Flan-T5 does not
        output = output[:, inputs["input_ids"].shape[1] :]
    print(processor.post_process_image_text_to_text(output)[0])


if __name__ == "__main__":
    main()
