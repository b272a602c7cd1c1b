"""Pretrain a BT-Adapter branch on your own videos, in Python.

    pip install -c constraints.txt '.[train]'  (in the clone of bt_adapter_hf)
    python examples/pretrain.py --model openai/clip-vit-large-patch14 --train videos/train --validation videos/val \\
        --output-dir my-adapter

`videos/train` and `videos/val` are folders of video files, each with a metadata.jsonl in it, one line per video:
    {"file_name": "clip1.mp4", "text": "a dog catches a frisbee"}

`bt-adapter pretrain` does the same with more options; on several GPUs start either with torchrun.
"""

import argparse
from pathlib import Path

from transformers import set_seed

from bt_adapter_hf.data.pairs import PairCollator, PairDataset, load_table
from bt_adapter_hf.training.arguments import BTAdapterTrainingArguments
from bt_adapter_hf.training.starting_point import load_starting_point
from bt_adapter_hf.training.trainer import BTAdapterTrainer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-6)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()

    # Everything of `transformers.TrainingArguments` works here; the defaults are the released pretraining's.
    args = BTAdapterTrainingArguments(
        output_dir=options.output_dir,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        dataloader_num_workers=options.workers,
        bf16=options.bf16,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=10,
    )
    set_seed(args.seed)

    # CLIP stays frozen; the branch starts from copies of its last four layers. Config fields are keyword arguments.
    model, processor = load_starting_point(options.model, num_frames=8, mask_ratio=0.7)

    trainer = BTAdapterTrainer(
        model=model,
        args=args,
        train_dataset=PairDataset(load_table(options.train), processor, training=True, seed=args.seed),
        eval_dataset=PairDataset(load_table(options.validation), processor, training=False),
        data_collator=PairCollator(processor),
        processing_class=processor,
    )
    # After an interruption the same command goes on from the last checkpoint.
    trainer.train(resume_from_checkpoint=any(Path(args.output_dir).glob("checkpoint-*")))
    metrics = trainer.evaluate()
    trainer.save_model()  # the full model and the processor, for AutoModel.from_pretrained(args.output_dir)

    for name in ("t2v_R1", "t2v_R5", "v2t_R1", "shuffled_t2v_R1", "reversed_t2v_R1"):
        print(f"{name:>16} {metrics[f'eval_{name}']:5.1f} %")


if __name__ == "__main__":
    main()
