"""Teach a chat model from your own videos: a folder of clips and a file of conversations about them.

    pip install -c constraints.txt '.[train]'  (in the clone of bt_adapter_hf)
    python examples/finetune_own_videos.py videos/train.jsonl --output-dir tuned

`train.jsonl` has one conversation per line, of any number of turns; paths start from its folder:
    {"messages": [{"role": "user", "content": [{"type": "video", "path": "clip1.mp4"},
                                               {"type": "text", "text": "What happens?"}]},
                  {"role": "assistant", "content": "A dog catches a frisbee."}]}

The branch and the projector learn, the rest of the model stays. Without --model the small chat model inside the
package is tuned; for a real one: --model llava-hf/llava-1.5-7b-hf --bt-adapter my-adapter --learning-rate 2e-5. Then:
    bt-adapter chat videos/clip1.mp4 --model tuned
"""

import argparse

import torch
from transformers import set_seed

from bt_adapter_hf import BTAdapterLlavaForConditionalGeneration, BTAdapterLlavaProcessor
from bt_adapter_hf.assets import default_chat_model_path
from bt_adapter_hf.data.instructions import (
    InstructionCollator,
    InstructionDataset,
    load_instructions,
    longest_conversation,
)
from bt_adapter_hf.training.instruction_tuning import InstructionArguments, InstructionTrainer, prepare_for_tuning


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--model", default=str(default_chat_model_path()))
    parser.add_argument("--bt-adapter", help="adapter folder or Hub id, for a native LLaVA")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()

    args = InstructionArguments(
        output_dir=options.output_dir,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        dataloader_num_workers=options.workers,
        bf16=torch.cuda.is_available(),
        logging_steps=10,
        report_to="none",
    )
    set_seed(args.seed)
    model = BTAdapterLlavaForConditionalGeneration.from_pretrained(
        options.model, bt_adapter=options.bt_adapter, dtype=torch.bfloat16 if args.bf16 else torch.float32
    )
    model = prepare_for_tuning(model)
    processor = BTAdapterLlavaProcessor.from_pretrained(options.model)

    table = load_instructions(options.table)
    trainer = InstructionTrainer(
        model=model,
        args=args,
        train_dataset=InstructionDataset(table, processor, max_length=longest_conversation(model.config, processor)),
        data_collator=InstructionCollator(processor),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()  # the whole model, for BTAdapterLlavaForConditionalGeneration.from_pretrained
    if trainer.broken_items.get("train"):
        print(f"{trainer.broken_items['train']} rows were skipped, see broken_items.jsonl in {options.output_dir}")
    print(f"ask it: bt-adapter chat VIDEO --model {options.output_dir}")


if __name__ == "__main__":
    main()
