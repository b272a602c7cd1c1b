"""The models inside the package in native form, and conversations about quickstart's clips, to train on offline.

    bt-adapter quickstart
    python examples/small_models.py small

Writes small/clip (a CLIPModel), small/llava (a LlavaForConditionalGeneration with the same image tower, which has
never seen a video) and small/chats.jsonl. README's section on training shows the commands that go on from here.
"""

import argparse
import json
from pathlib import Path

from bt_adapter_hf import (
    BTAdapterLlavaForConditionalGeneration,
    BTAdapterLlavaProcessor,
    BTAdapterModel,
    BTAdapterProcessor,
    unload_bt_adapter,
)
from bt_adapter_hf.assets import default_chat_model_path, default_model_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--clips", type=Path, default=Path("bt-adapter-quickstart/clips"))
    args = parser.parse_args()
    if not (args.clips / "metadata.jsonl").is_file():
        parser.error(f"{args.clips} holds no metadata.jsonl: run `bt-adapter quickstart` first, or name --clips.")

    dual = BTAdapterModel.from_pretrained(default_model_path())
    unload_bt_adapter(dual).save_pretrained(args.output / "clip")
    processor = BTAdapterProcessor.from_pretrained(default_model_path())
    processor.image_processor.save_pretrained(args.output / "clip")
    processor.tokenizer.save_pretrained(args.output / "clip")

    chat = BTAdapterLlavaForConditionalGeneration.from_pretrained(default_chat_model_path())
    unload_bt_adapter(chat).save_pretrained(args.output / "llava")
    BTAdapterLlavaProcessor.from_pretrained(default_chat_model_path()).save_pretrained(args.output / "llava")

    with (args.output / "chats.jsonl").open("w", encoding="utf-8") as file:
        for line in (args.clips / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            video = {"type": "video", "path": str((args.clips / row["file_name"]).resolve())}
            question = {"role": "user", "content": [video, {"type": "text", "text": "What happens?"}]}
            answer = {"role": "assistant", "content": row["text"]}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")


if __name__ == "__main__":
    main()
