"""`bt-adapter pretrain`: pretrain the branch on a table of videos and captions."""

import argparse
import time
from typing import Any

from ._options import path, real_number, whole_number
from ._training import begin, end, find_checkpoint, only_run, open_table, run_training, text_limit
from ._training_options import (
    TRAINING_OPTIONS,
    add_data_limits,
    add_item_timeout,
    add_on_damage,
    add_run_options,
    add_table_options,
    add_training_options,
)


EPILOG = """\
example:
  bt-adapter pretrain --model openai/clip-vit-large-patch14 --train videos/train --validation videos/val.csv \\
      --output-dir my-adapter --batch-size 52 --workers 8 --eval-steps 500

  videos/train is a folder of video files with a metadata.jsonl in it, one line per video:
      {"file_name": "clip1.mp4", "text": "a dog catches a frisbee"}

The output folder gets the finished model and its processor (load it with AutoModel.from_pretrained, or use it with
`bt-adapter index --model`), the branch alone in the folder adapter (for `bt-adapter finetune --bt-adapter`),
checkpoints to go on from with --resume, run_summary.json, losses.png, and broken_items.jsonl where something could not
be used. Ctrl-C saves a checkpoint and stops.

Tables with the bytes of the videos in them (.parquet, .tar) and remote ones are streamed through a bounded folder:
  bt-adapter pretrain --train 'hf://datasets/org/clips/train-*.tar' --max-disk 100GB ...

Check the table first: bt-adapter check-data videos/train --model openai/clip-vit-large-patch14
On several GPUs: torchrun --nproc-per-node 8 -m bt_adapter_hf.cli.main pretrain ...
"""

# Options of the model; the left column is as in the configs.
CONFIG_OPTIONS = (
    (
        "mask_ratio",
        real_number(0, 1, below=True),
        "share of the patches hidden from the branch in training (default: 0.7)",
    ),
    ("vtc_weight", real_number(0), "weight of video-text contrast (default: 1)"),
    ("mbta_weight", real_number(0), "weight of masked branching token alignment (default: 0.1)"),
    ("mbca_weight", real_number(0), "weight of masked branching cross-modal alignment (default: 0.1)"),
    ("temperature", real_number(0, above=True), "temperature of the contrastive losses (default: 0.01)"),
    ("fusion", str, "how the branch takes in the backbone: gate or sum (default: gate)"),
    ("output_fusion", str, "how branch and backbone are combined at the end: gate or sum (default: gate)"),
    ("gate_on", str, "which side the gates multiply: backbone or branch (default: backbone)"),
    ("drop_path_rate", real_number(0, 1, below=True), "stochastic depth of the last branch layer (default: 0.1)"),
    ("time_embedding_init_std", real_number(0), "standard deviation of fresh time embeddings (default: 1)"),
    ("fusion_gate_scale", real_number(), "factor on the gate inside the branch (default: 100)"),
    (
        "output_gate_scale",
        real_number(),
        "factor on the gate at the end (default: 10000; its gradient may fill the norm that is clipped at, and shrink "
        "all others by what the log calls clipped_by)",
    ),
    (
        "order_negatives",
        str,
        "contrast each clip with its reversed copy too, or with reversed_and_shuffled copies (default: none)",
    ),
    ("max_frames", whole_number(), "rows of the time embedding table; longer videos interpolate (default: 64)"),
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
    add_run_options(parser, model="CLIP or BT-Adapter model to start from")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--train",
        required=True,
        type=path,
        metavar="TABLE",
        help="table with videos or their paths and URLs (.jsonl, .json, .csv, .tsv, .parquet, also a quoted pattern), "
        "WebDataset .tar, folder with metadata.jsonl, or Hub dataset; remote ones are streamed",
    )
    data.add_argument("--validation", type=path, metavar="TABLE", help="table to measure recall on")
    add_table_options(data)
    data.add_argument("--train-split", default="train", metavar="NAME", help="of a Hub dataset (default: train)")
    data.add_argument("--validation-split", default="validation", metavar="NAME", help="(default: validation)")
    data.add_argument(
        "--num-frames",
        type=whole_number(),
        nargs="+",
        metavar="T",
        help="frames per clip (default: 8); of several numbers one is drawn for every step",
    )
    data.add_argument(
        "--max-text-length", type=whole_number(), metavar="N", help="longest caption in tokens (default: 64)"
    )
    data.add_argument(
        "--crop-scale",
        type=real_number(0, 1, above=True),
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
        "--opposites",
        metavar="FILE",
        help='rows of json with "text" and "opposite", what a clip of that caption shows when it is played backwards; '
        "for --order-negatives",
    )
    add_data_limits(data)
    add_item_timeout(data)
    add_on_damage(data)

    adapter = parser.add_argument_group(
        "branch and losses", "The defaults are for a CLIP; a model that has a branch goes on with what it has."
    )
    layers = adapter.add_mutually_exclusive_group()
    layers.add_argument("--num-adapter-layers", type=whole_number(), metavar="K", help="branch layers (default: 4)")
    layers.add_argument(
        "--adapter-layers", type=whole_number(0), nargs="+", metavar="I", help="backbone layers that feed them"
    )
    for name, kind, description in CONFIG_OPTIONS:
        adapter.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=name.upper(), help=description)

    training = add_training_options(parser, learning_rate="2e-6", epochs=1, multipliers="the released ones")
    training.add_argument(
        "--cached-gradient-batch-size",
        type=whole_number(),
        metavar="N",
        help="clips whose activations are in memory at once, for a --batch-size that does not fit: the same gradient, "
        "with a second forward pass",
    )
    training.add_argument(
        "--eval-controls",
        nargs="*",
        metavar="NAME",
        help="any of shuffled, reversed, one_frame, frame_average (default: shuffled reversed)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with only_run(args.output_dir):
        return train(args)


def train(args: argparse.Namespace) -> int:
    started = time.time()
    checkpoint = find_checkpoint(args)
    from ..training.arguments import BTAdapterTrainingArguments

    options = {**TRAINING_OPTIONS, "cached_gradient_batch_size": "cached_gradient_batch_size"}
    lists = {"eval_controls": args.eval_controls} if args.eval_controls else {}
    if args.num_frames is not None and len(args.num_frames) > 1:
        lists["frame_counts"] = args.num_frames
    packages = ("accelerate", "datasets", "matplotlib")
    training_args = begin(args, BTAdapterTrainingArguments, packages, options, **lists)
    if args.eval_controls == []:
        training_args.eval_controls = []

    from ..adapters.files import lasting_name
    from ..data.pairs import PairCollator, PairDataset, load_opposites
    from ..models.compat_bt_adapter import resolve_revision
    from ..training.report import describe_table
    from ..training.starting_point import check_kind
    from ..training.trainer import BTAdapterTrainer

    args.revision = resolve_revision(args.model, args.revision)  # one commit for model and processor
    check_kind(args.model, args.revision)  # before a table is opened, which may be far away
    tables = {"train": open_table(args, args.train, args.train_split)}
    if args.validation:
        tables["validation"] = open_table(args, args.validation, args.validation_split)
    model, processor = load_model(args)
    opposites = None
    if args.opposites is not None:
        if model.config.order_negatives == "none":  # what a pretrained model was trained with goes on
            raise ValueError("--opposites are read with --order-negatives reversed or reversed_and_shuffled only.")
        try:
            opposites = load_opposites(args.opposites)
        except ValueError as error:
            raise ValueError(f"--opposites: {error}") from error
    if args.on_damage is not None:
        processor.video_processor.on_damage = args.on_damage
    max_text_length = text_limit(args.max_text_length, processor.tokenizer, model.config)
    validation = None
    if args.validation:
        validation = PairDataset(
            tables["validation"],
            processor,
            training=False,
            group_by_caption=args.group_by_caption,
            item_timeout=args.item_timeout,
        )
    trainer = BTAdapterTrainer(
        model=model,
        args=training_args,
        train_dataset=PairDataset(
            tables["train"],
            processor,
            training=True,
            seed=training_args.seed,
            crop_scale=args.crop_scale,
            item_timeout=args.item_timeout,
        ),
        eval_dataset=validation,
        data_collator=PairCollator(processor, max_text_length, opposites),
        processing_class=processor,
    )
    tower = model.config.vision_config
    summary = run_training(
        trainer,
        checkpoint,
        started,
        kind="pretraining",
        model=lasting_name(args.model),
        revision=getattr(args.revision, "resolved", args.revision),
        config={
            "adapter_layers": tower.adapter_layers,
            **{name: getattr(tower, name, getattr(model.config, name, None)) for name, _, _ in CONFIG_OPTIONS},
        },
        data={
            "num_frames": processor.video_processor.num_frames,
            "frame_counts": training_args.frame_counts,
            "max_text_length": max_text_length,
            "crop_scale": args.crop_scale,
            "group_by_caption": args.group_by_caption,
            "opposites": None if opposites is None else len(opposites),
            **{part: describe_table(table) for part, table in tables.items()},
        },
    )
    return end(trainer, summary, lambda: print_result(summary, args.output_dir), args.json)


def load_model(args: argparse.Namespace):
    """The model and processor that the options describe."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.utils import logging

    from ..training.starting_point import load_starting_point

    fields = {name: getattr(args, name) for name, _, _ in CONFIG_OPTIONS if getattr(args, name) is not None}
    if args.adapter_layers is not None:
        fields["adapter_layers"] = args.adapter_layers
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report names every tensor of the fresh branch
    try:
        return load_starting_point(
            args.model,
            revision=args.revision,
            num_frames=max(args.num_frames) if args.num_frames else None,
            num_adapter_layers=args.num_adapter_layers,
            **fields,
        )
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error
    finally:
        logging.set_verbosity(verbosity)


def print_result(summary: dict[str, Any], output_dir: str) -> None:
    metrics = summary["metrics"]
    if metrics:
        print(f"recall over {metrics['eval_pairs']} validation pairs, in percent:")
        for direction, name in (("t2v", "text to video"), ("v2t", "video to text")):
            values = "  ".join(f"R@{k} {metrics[f'eval_{direction}_R{k}']:5.1f}" for k in (1, 5, 10))
            print(f"  {name}  {values}  median rank {metrics[f'eval_{direction}_MdR']:g}")
        for control in ("shuffled", "reversed", "one_frame", "frame_average"):
            if f"eval_{control}_t2v_R1" in metrics:
                print(f"  control {control}: text to video R@1 {metrics[f'eval_{control}_t2v_R1']:.1f}")
    print(f"model, run_summary.json and losses.png: {output_dir}")
