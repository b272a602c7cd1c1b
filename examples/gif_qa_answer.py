"""Ask a trained model of GIF question answering about GIFs.

    pip install -c constraints.txt '.[train]'  (in the clone of bt_adapter_hf)
    python examples/gif_qa_answer.py cat.gif dog.gif --question "What does it do?" --base gif-qa/base --tuned gif-qa

The GIFs are answered in one batch. `bt-adapter chat GIF --model gif-qa/base --bt-adapter gif-qa` keeps a conversation.
"""

import argparse

import torch

from bt_adapter_hf import (
    BTAdapterGifQAForConditionalGeneration,
    BTAdapterGifQAProcessor,
    VideoError,
    load_bt_adapter,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gifs", nargs="+")
    parser.add_argument("--question", required=True)
    parser.add_argument("--base", required=True, help="folder or Hub id of the model")
    parser.add_argument("--tuned", help="folder or Hub id of LoRA and connector, trained on it")
    parser.add_argument("--num-beams", type=int, default=1, help="1 is greedy")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    options = parser.parse_args()

    processor = BTAdapterGifQAProcessor.from_pretrained(options.base)
    chats = [
        [{"role": "user", "content": [{"type": "video", "path": gif}, {"type": "text", "text": options.question}]}]
        for gif in options.gifs
    ]
    try:  # before anything large is loaded
        inputs = processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
    except VideoError as error:
        parser.exit(1, f"{error}\n")
    model = BTAdapterGifQAForConditionalGeneration.from_pretrained(options.base)
    if options.tuned:
        model = load_bt_adapter(model, options.tuned)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    inputs = inputs.to(model.device, model.dtype)
    limits = {"max_new_tokens": options.max_new_tokens, "num_beams": options.num_beams, "do_sample": False}
    output = model.generate(**inputs, **limits)
    answers = processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
    for gif, answer in zip(options.gifs, answers, strict=True):
        print(f"{gif}: {answer}")


if __name__ == "__main__":
    main()
