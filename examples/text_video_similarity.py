"""How well do these sentences describe these videos? Text and video features of a BT-Adapter dual encoder.

    pip install -c constraints.txt .  (in the clone of bt_adapter_hf)
    python examples/text_video_similarity.py clip1.mp4 clip2.gif \\
        --texts "a red seven moves from the left to the right" "a red seven moves from the right to the left"

Without --model the small model inside the package is used, which knows moving digits only; name another by Hub id or
folder for videos of the real world.
"""

import argparse

import torch
from transformers import AutoModel, AutoProcessor

import bt_adapter_hf  # noqa: F401 (makes AutoModel know the model)
from bt_adapter_hf.assets import default_model_path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="+")
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--model", default=str(default_model_path()))
    options = parser.parse_args()

    model = AutoModel.from_pretrained(options.model).eval()
    processor = AutoProcessor.from_pretrained(options.model)
    # Any length, size and format; videos of unequal length are padded, and frame_mask tells the model where.
    inputs = processor(videos=options.videos, text=options.texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = model(**inputs)
    similarity = output.video_embeds @ output.text_embeds.T  # cosine, (videos, texts)
    for video, row in zip(options.videos, similarity.tolist(), strict=True):
        for text, value in zip(options.texts, row, strict=True):
            print(f"{value:.3f}  {video}  {text}")


if __name__ == "__main__":
    main()
