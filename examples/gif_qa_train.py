"""Train GIF question answering: a frozen X-CLIP, a connector, and a language model in 4 bits with LoRA.

    pip install -c constraints.txt '.[train,quantization]'  (in the clone of bt_adapter_hf)
    python examples/gif_qa_train.py --train tgif-qa/Train_frameqa_question.csv --media-root gifs --output-dir gif-qa
    python examples/gif_qa_train.py ... --media-root tgif-v1.0.tsv --max-disk 20GB   # GIFs fetched, and given up again

The first time the model is put together from its pieces, in OUTPUT_DIR/base (--connector qformer or attention: from
others). What is trained, LoRA and the connector, is in OUTPUT_DIR afterwards. Options that are not below go to
`bt-adapter finetune --model OUTPUT_DIR/base`, with --lora --load-in-4bit unless --lora is among them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from bt_adapter_hf import BTAdapterGifQAForConditionalGeneration, BTAdapterGifQAProcessor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", default="microsoft/xclip-base-patch16-16-frames")
    parser.add_argument(
        "--language-model",
        default="HuggingFaceTB/SmolLM2-1.7B-Instruct",
        help="any causal one, such as meta-llama/Llama-3.2-3B-Instruct (gated: accept its licence, and log in)",
    )
    parser.add_argument("--connector", default="mlp", choices=("mlp", "attention", "qformer"))
    parser.add_argument("--output-dir", required=True, type=Path)
    options, finetune = parser.parse_known_args()  # what it does not know is for `bt-adapter finetune`

    base = options.output_dir / "base"
    parts = {"tower": options.tower, "language_model": options.language_model}
    wanted, made_of = {**parts, "connector": options.connector}, base / "made_of.json"
    if (base / "processor_config.json").is_file():
        made = json.loads(made_of.read_text())
        if made != wanted:
            sys.exit(f"error: {base} is made of {made}; now it is {wanted}. Take another --output-dir.")
    else:
        model = BTAdapterGifQAForConditionalGeneration.from_components(**wanted)
        processor = BTAdapterGifQAProcessor.from_components(model.config, **parts)
        model.save_pretrained(base)
        made_of.write_text(json.dumps(wanted))
        processor.save_pretrained(base)
    given = ["--lora", "--load-in-4bit", *finetune] if "--lora" not in finetune else finetune
    if any(options.output_dir.glob("checkpoint-*")):  # interrupted: it goes on
        given.append("--resume")
    command = [sys.executable, "-m", "bt_adapter_hf.cli.main", "finetune", "--model", str(base)]
    sys.exit(subprocess.run([*command, "--output-dir", str(options.output_dir), *given]).returncode)


if __name__ == "__main__":
    main()
