"""Tune a LLaVA with a BT-Adapter on VideoChatGPT-100K, or on your own conversations; LoRA and 4 bits if wanted.

    pip install -c constraints.txt '.[train]'  (in the clone of bt_adapter_hf)
    python examples/finetune_llava.py --model llava-hf/llava-1.5-7b-hf --bt-adapter my-adapter \\
        --train hf://datasets/MBZUAI/VideoInstruct-100K/VideoInstruct100K.json --media-root activitynet.zip \\
        --output-dir tuned --workers 8
    torchrun --nproc-per-node 8 examples/finetune_llava.py ...      # on eight GPUs, as released
    python examples/finetune_llava.py ... --lora --load-in-4bit    # on a small one

Without --model the small chat model inside the package is tuned. The defaults are those of the released tuning.
`bt-adapter finetune` does the same with more options.
"""

import argparse
from pathlib import Path

import torch
from transformers import set_seed

from bt_adapter_hf import BTAdapterLlavaForConditionalGeneration, BTAdapterLlavaProcessor, quantization_config
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
    parser.add_argument("--model", default=str(default_chat_model_path()))
    parser.add_argument("--bt-adapter", help="adapter folder or Hub id, for a native LLaVA")
    parser.add_argument("--train", required=True)
    parser.add_argument("--media-root", help="folder or archives of the videos; by default the folder of the table")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--num-frames", type=int, help="by default 64, or as saved")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--load-in-4bit", action="store_true", help="needs --lora")
    options = parser.parse_args()

    args = InstructionArguments(
        output_dir=options.output_dir,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        dataloader_num_workers=options.workers,
        bf16=torch.cuda.is_available(),
        activation_checkpointing=True,
        logging_steps=10,
        report_to="none",
    )
    set_seed(args.seed)
    loading = {"dtype": torch.bfloat16 if args.bf16 else torch.float32}
    if options.load_in_4bit:  # of the language model alone
        loading |= {"quantization_config": quantization_config(load_in_4bit=True), "device_map": {"": args.device}}
    model = BTAdapterLlavaForConditionalGeneration.from_pretrained(
        options.model, bt_adapter=options.bt_adapter, **loading
    )
    # The branch and the projector learn, in float32; with LoRA the language model too.
    model = prepare_for_tuning(model, {"r": 16, "lora_alpha": 32} if options.lora else None)
    sampling = {} if options.num_frames is None else {"num_frames": options.num_frames}
    processor = BTAdapterLlavaProcessor.from_pretrained(options.model, **sampling)

    table = load_instructions(options.train, media_root=options.media_root)
    trainer = InstructionTrainer(
        model=model,
        args=args,
        train_dataset=InstructionDataset(table, processor, max_length=longest_conversation(model.config, processor)),
        data_collator=InstructionCollator(processor),
        processing_class=processor,
    )
    # After an interruption the same command goes on from the last checkpoint.
    trainer.train(resume_from_checkpoint=any(Path(args.output_dir).glob("checkpoint-*")))
    trainer.save_model()  # the whole model; with LoRA what was trained, for load_bt_adapter
    if trainer.is_world_process_zero():
        print(f"{trainer.state.global_step} steps, {trainer.broken_items.get('train', 0)} rows skipped")


if __name__ == "__main__":
    main()
