"""Videos for a server that has no BT-Adapter: stock vLLM with the native LLaVA, by precomputed image embeddings.

    pip install -c constraints.txt .  (in the clone of bt_adapter_hf)
    python examples/video_embeds_for_vllm.py a.mp4 b.gif --output embeds.safetensors \\
        --model llava-hf/llava-1.5-7b-hf --bt-adapter my-adapter

A video of a BT-Adapter is one image's worth of tokens, so to the server it is an image that was encoded before. Each
tensor of the file is (1, tokens, width of the language model). Where vLLM is installed (it was not run here):

    from safetensors.torch import load_file
    from vllm import LLM

    llm = LLM(model="llava-hf/llava-1.5-7b-hf", enable_mm_embeds=True)
    prompt = "USER: <image>\\nWhat happens? ASSISTANT:"
    llm.generate({"prompt": prompt, "multi_modal_data": {"image": load_file("embeds.safetensors")["a.mp4"]}})

Without --model the small chat model inside the package is used. tests/examples/test_serving_examples.py holds the
shapes, and that the prompt embeddings are those of this package, bit by bit.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from bt_adapter_hf import BTAdapterLlavaForConditionalGeneration, BTAdapterLlavaProcessor
from bt_adapter_hf.assets import default_chat_model_path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="+")
    parser.add_argument("--output", default="embeds.safetensors")
    parser.add_argument("--model", default=str(default_chat_model_path()))
    parser.add_argument("--bt-adapter", help="adapter folder or Hub id, for a native LLaVA")
    parser.add_argument("--num-frames", type=int, help="frames per video (default: as the model says)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    model = BTAdapterLlavaForConditionalGeneration.from_pretrained(
        options.model, bt_adapter=options.bt_adapter, dtype=options.dtype
    ).to(options.device)
    model.eval()
    frames = {} if options.num_frames is None else {"num_frames": options.num_frames}
    processor = BTAdapterLlavaProcessor.from_pretrained(options.model, **frames)
    embeds = {}
    for video in options.videos:
        pixels = processor.video_processor([video], return_tensors="pt")["pixel_values_videos"]
        with torch.inference_mode():
            (tokens,) = model.get_video_features(pixels.to(model.device, model.dtype)).pooler_output
        embeds[Path(video).name] = tokens[None].cpu().contiguous()  # (1, tokens, width)
        print(f"{video}: {tuple(embeds[Path(video).name].shape)} {tokens.dtype}")
    save_file(embeds, options.output)


if __name__ == "__main__":
    main()
