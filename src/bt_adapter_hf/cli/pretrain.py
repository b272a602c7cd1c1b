"""`bt-adapter pretrain`: pretrain the branch on a table of videos and captions."""

import argparse
import dataclasses
import difflib
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

from ._options import quiet_transformers


EPILOG = """\
example:
  bt-adapter pretrain --model openai/clip-vit-large-patch14 --train videos/train --validation videos/val.csv \\
      --output-dir my-adapter --batch-size 52 --bf16 --workers 8 --eval-steps 500

  videos/train is a folder of video files with a metadata.jsonl in it, one line per video:
      {"file_name": "clip1.mp4", "text": "a dog catches a frisbee"}

The output folder gets the finished model and its processor (load it with AutoModel.from_pretrained, or use it with
`bt-adapter search --model`), checkpoints to go on from with --resume, pretrain_summary.json, and where something
could not be used broken_items.jsonl.

On several GPUs: torchrun --nproc-per-node 8 -m bt_adapter_hf.cli.main pretrain ...
"""

# Options of the model (left column: as in the configs), and of the training that have a name of their own here.
CONFIG_OPTIONS = (
    ("mask_ratio", float, "share of the patches hidden from the branch in training (default: 0.7)"),
    ("vtc_weight", float, "weight of video-text contrast (default: 1)"),
    ("mbta_weight", float, "weight of masked branching token alignment (default: 0.1)"),
    ("mbca_weight", float, "weight of masked branching cross-modal alignment (default: 0.1)"),
    ("temperature", float, "temperature of the contrastive losses (default: 0.01)"),
    ("fusion", str, "how the branch takes in the backbone: gate or sum (default: gate)"),
    ("output_fusion", str, "how branch and backbone are combined at the end: gate or sum (default: gate)"),
    ("gate_on", str, "which side the gates multiply: backbone or branch (default: backbone)"),
    ("drop_path_rate", float, "stochastic depth of the last branch layer (default: 0.1)"),
    ("time_embedding_init_std", float, "standard deviation of fresh time embeddings (default: 1)"),
    ("fusion_gate_scale", float, "factor on the gate inside the branch (default: 100)"),
    ("output_gate_scale", float, "factor on the gate at the end (default: 10000)"),
    ("max_frames", int, "rows of the time embedding table; longer videos interpolate (default: 64)"),
)
TRAINING_OPTIONS = {
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "epochs": "num_train_epochs",
    "workers": "dataloader_num_workers",
    "max_steps": "max_steps",
    "learning_rate": "learning_rate",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "logging_steps": "logging_steps",
    "save_steps": "save_steps",
    "eval_steps": "eval_steps",
    "bf16": "bf16",
    "seed": "seed",
    "report_to": "report_to",
    "max_broken": "max_broken",
}
# Written into the summary besides what the options above set.
SUMMARY_FIELDS = (
    *TRAINING_OPTIONS.values(),
    "lr_multipliers",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "eval_controls",
)


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "pretrain",
        help="pretrain the branch on videos with captions",
        description="Train the temporal branch on (video, caption) pairs; the CLIP it stands beside stays frozen. "
        "Defaults are those of the released pretraining.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="ID_OR_PATH", help="CLIP or BT-Adapter model to start from")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="where model and checkpoints go")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--train",
        required=True,
        metavar="TABLE",
        help=".jsonl, .json, .csv, .tsv or .parquet file, folder with metadata.jsonl or metadata.csv, or Hub dataset",
    )
    data.add_argument("--validation", metavar="TABLE", help="table to measure recall on")
    data.add_argument("--media-root", metavar="DIR", help="where relative paths start (default: folder of the table)")
    data.add_argument("--video-column", metavar="NAME", help="default: video, file_name, path or video_path")
    data.add_argument("--text-column", metavar="NAME", help="default: text, caption, captions, sentence or sentences")
    data.add_argument("--train-split", default="train", metavar="NAME", help="of a Hub dataset (default: train)")
    data.add_argument("--validation-split", default="validation", metavar="NAME", help="(default: validation)")
    data.add_argument("--dataset-config", metavar="NAME", help="configuration of a Hub dataset")
    data.add_argument("--num-frames", type=int, metavar="T", help="frames per clip (default: 8)")
    data.add_argument("--max-text-length", type=int, metavar="N", help="longest caption in tokens (default: 64)")
    data.add_argument(
        "--crop-scale",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="random resized crop of this share of the frame (released: 0.08 1; default: centre crop)",
    )
    data.add_argument(
        "--group-by-caption",
        action="store_true",
        help="in validation, rows with the same caption are right answers for each other",
    )
    data.add_argument(
        "--max-broken", type=float, metavar="SHARE", help="broken items that stop the run (default: 0.1)"
    )

    adapter = parser.add_argument_group("branch and losses")
    layers = adapter.add_mutually_exclusive_group()
    layers.add_argument("--num-adapter-layers", type=int, metavar="K", help="branch layers (default: 4)")
    layers.add_argument("--adapter-layers", type=int, nargs="+", metavar="I", help="backbone layers that feed them")
    for name, kind, description in CONFIG_OPTIONS:
        adapter.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=name.upper(), help=description)

    training = parser.add_argument_group("training")
    training.add_argument("--batch-size", type=int, metavar="N", help="clips per device and step (default: 8)")
    training.add_argument("--eval-batch-size", type=int, metavar="N", help="(default: 8)")
    training.add_argument("--gradient-accumulation-steps", type=int, metavar="N", help="(default: 1)")
    training.add_argument("--epochs", type=float, metavar="N", help="passes over the table (default: 1)")
    training.add_argument("--max-steps", type=int, metavar="N", help="instead of --epochs")
    training.add_argument("--learning-rate", type=float, metavar="LR", help="base rate (default: 2e-6)")
    training.add_argument(
        "--lr-multipliers", metavar="JSON", help='rates of parts, as {"bt_adapter.": 10} (default: the released ones)'
    )
    training.add_argument("--workers", type=int, metavar="N", help="processes that decode, per device (default: 0)")
    training.add_argument("--bf16", action="store_true", default=None, help="mixed precision in bfloat16")
    training.add_argument("--logging-steps", type=int, default=10, metavar="N", help="(default: 10)")
    training.add_argument("--save-steps", type=int, metavar="N", help="steps between checkpoints (default: 500)")
    training.add_argument(
        "--eval-steps", type=int, metavar="N", help="steps between evaluations (default: at the end)"
    )
    training.add_argument(
        "--eval-controls",
        nargs="*",
        metavar="NAME",
        help="any of shuffled, reversed, one_frame, frame_average (default: shuffled reversed)",
    )
    training.add_argument("--seed", type=int, metavar="N", help="(default: 42)")
    training.add_argument("--report-to", metavar="NAME", help="tensorboard, wandb, ... (default: none)")
    training.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other field of transformers' TrainingArguments, such as --set warmup_steps=0.05; may be repeated",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..import_utils import require_package

    for package in ("accelerate", "datasets"):
        require_package(package, "train")
    quiet_transformers()
    from transformers import set_seed

    from ..data.pairs import PairCollator, PairDataset
    from ..training.checkpoint import last_checkpoint
    from ..training.trainer import BTAdapterTrainer

    started = time.time()
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = last_checkpoint(output_dir)
    if args.resume and checkpoint is None:
        raise ValueError(f"--resume: {output_dir} holds no complete checkpoint.")
    if not args.resume and any(output_dir.glob("checkpoint-*")):
        raise ValueError(f"{output_dir} holds checkpoints of an earlier run: add --resume, or choose another folder.")
    training_args = training_arguments(args)
    set_seed(training_args.seed)  # of the fresh parts of the model
    model, processor = load_model(args)
    train_table = open_table(args, args.train, args.train_split)
    validation_table = open_table(args, args.validation, args.validation_split) if args.validation else None
    validation = None
    if validation_table is not None:
        validation = PairDataset(validation_table, processor, training=False, group_by_caption=args.group_by_caption)
    text_limit = min(processor.tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
    max_text_length = args.max_text_length if args.max_text_length is not None else min(64, text_limit)
    if not 0 < max_text_length <= text_limit:
        raise ValueError(f"--max-text-length {max_text_length}: the text tower takes 1 to {text_limit} tokens.")
    trainer = BTAdapterTrainer(
        model=model,
        args=training_args,
        train_dataset=PairDataset(
            train_table, processor, training=True, seed=training_args.seed, crop_scale=args.crop_scale
        ),
        eval_dataset=validation,
        data_collator=PairCollator(processor, max_text_length),
        processing_class=processor,
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate() if validation is not None else {}
    trainer.save_model()
    if trainer.is_world_process_zero():
        tower = model.config.vision_config
        summary = {
            "model": args.model,
            "revision": getattr(args.revision, "resolved", args.revision),
            "config": {
                "adapter_layers": tower.adapter_layers,
                **{name: getattr(tower, name, getattr(model.config, name, None)) for name, _, _ in CONFIG_OPTIONS},
            },
            "data": {
                "num_frames": processor.video_processor.num_frames,
                "max_text_length": max_text_length,
                "crop_scale": args.crop_scale,
                "group_by_caption": args.group_by_caption,
                **{
                    part: {"source": table.source, "rows": len(table), "fingerprint": table.rows._fingerprint}
                    for part, table in (("train", train_table), ("validation", validation_table))
                    if table is not None
                },
            },
            "training": {name: getattr(training_args, name) for name in SUMMARY_FIELDS},
            "processes": training_args.world_size,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "steps": result.global_step,
            "train_loss": result.training_loss,
            "metrics": metrics,
            "broken_items": trainer.broken_items,
            "seconds": round(time.time() - started, 1),
            "versions": versions(),
        }
        (output_dir / "pretrain_summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        print_result(summary, output_dir)
    return 0


def load_model(args: argparse.Namespace):
    """The model and processor that the options describe."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.utils import logging

    from ..compat_bt_adapter import resolve_revision
    from ..training.starting_point import load_starting_point

    args.revision = resolve_revision(args.model, args.revision)  # one commit for model and processor
    fields = {name: getattr(args, name) for name, _, _ in CONFIG_OPTIONS if getattr(args, name) is not None}
    if args.adapter_layers is not None:
        fields["adapter_layers"] = args.adapter_layers
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report names every tensor of the fresh branch
    try:
        return load_starting_point(
            args.model,
            revision=args.revision,
            num_frames=args.num_frames,
            num_adapter_layers=args.num_adapter_layers,
            **fields,
        )
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error
    finally:
        logging.set_verbosity(verbosity)


def open_table(args: argparse.Namespace, source: str, split: str):
    """The table that the options describe."""
    from ..data.pairs import load_table

    return load_table(
        source,
        media_root=args.media_root,
        video_column=args.video_column,
        text_column=args.text_column,
        split=split,
        config_name=args.dataset_config,
    )


def training_arguments(args: argparse.Namespace):
    """`BTAdapterTrainingArguments` from the options and from `--set`, with values as transformers reads them.

    Raises:
        ValueError: for an unknown name or a value of another type.
    """
    from transformers import HfArgumentParser

    from ..training.arguments import BTAdapterTrainingArguments

    values: dict[str, Any] = {
        field: getattr(args, option) for option, field in TRAINING_OPTIONS.items() if getattr(args, option) is not None
    }
    if args.lr_multipliers is not None:
        values["lr_multipliers"] = args.lr_multipliers
    if args.eval_steps is not None:
        values["eval_strategy"] = "steps"
    known = {field.name for field in dataclasses.fields(BTAdapterTrainingArguments) if field.init}
    for assignment in args.set:
        name, equals, value = assignment.partition("=")
        name = name.replace("-", "_")
        if not equals:
            raise ValueError(f"--set {assignment}: expected NAME=VALUE.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            raise ValueError(f"--set {assignment}: there is no such field. Nearest: {', '.join(close) or 'none'}.")
        values[name] = value
    if values.get("eval_strategy", "no") != "no" and args.validation is None:
        raise ValueError("Evaluation during training needs --validation.")
    argv = ["--output_dir", args.output_dir]
    for name, value in values.items():
        argv += [f"--{name}", str(value)]
    if args.eval_controls:
        argv += ["--eval_controls", *args.eval_controls]
    parser = HfArgumentParser(BTAdapterTrainingArguments, exit_on_error=False)
    try:
        (training_args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except argparse.ArgumentError as error:
        raise ValueError(f"training option: {error}") from error
    if args.eval_controls == []:
        training_args.eval_controls = []
    return training_args


def versions() -> dict[str, str]:
    import accelerate
    import datasets
    import torch
    import transformers

    from .. import __version__

    packages = {module.__name__: module.__version__ for module in (torch, transformers, accelerate, datasets)}
    return {"bt_adapter_hf": __version__, "python": platform.python_version(), **packages}


def print_result(summary: dict[str, Any], output_dir: Path) -> None:
    print(
        f"trained {summary['trained_parameters']:,} parameters for {summary['steps']} steps in {summary['seconds']} s"
    )
    metrics = summary["metrics"]
    if metrics:
        print(f"recall over {metrics['eval_pairs']} validation pairs, in percent:")
        for direction, name in (("t2v", "text to video"), ("v2t", "video to text")):
            values = "  ".join(f"R@{k} {metrics[f'eval_{direction}_R{k}']:5.1f}" for k in (1, 5, 10))
            print(f"  {name}  {values}  median rank {metrics[f'eval_{direction}_MdR']:g}")
        for control in ("shuffled", "reversed", "one_frame", "frame_average"):
            if f"eval_{control}_t2v_R1" in metrics:
                print(f"  control {control}: text to video R@1 {metrics[f'eval_{control}_t2v_R1']:.1f}")
    broken = sum(summary["broken_items"].values())
    if broken:
        print(f"{broken} items could not be used, see {output_dir / 'broken_items.jsonl'}", file=sys.stderr)
    print(f"model: {output_dir}   details: {output_dir / 'pretrain_summary.json'}")
