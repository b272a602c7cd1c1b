"""`bt-adapter finetune`: teach a chat model with an adapter from conversations about videos."""

import argparse
import sys
import time
from typing import Any

from ..import_utils import require_package
from ._options import path, progress, real_number, whole_number
from ._training import begin, chat_processor, chat_type, end, find_checkpoint, only_run, run_training
from ._training_options import (
    TRAINING_OPTIONS,
    add_data_limits,
    add_item_timeout,
    add_on_damage,
    add_run_options,
    add_training_options,
)
from .chat import check_place


EPILOG = """\
examples:
  bt-adapter finetune --model llava-hf/llava-1.5-7b-hf --bt-adapter my-adapter/adapter \\
      --train videos/train.jsonl --output-dir tuned --batch-size 1 --workers 4
  ... --lora --load-in-4bit                       on a small card
  ... --cache-states states --cache-dtype fp8     decode and encode each video once, on the disk

  videos/train.jsonl has one conversation per line, with paths from its folder:
      {"messages": [{"role": "user", "content": [{"type": "video", "path": "clip1.mp4"},
                                                 {"type": "text", "text": "What happens?"}]},
                    {"role": "assistant", "content": "A dog catches a frisbee."}]}
  VideoChatGPT-100K's json works as it is, also from the Hub, with --media-root for the folder or the archives of its
  videos: --train hf://datasets/MBZUAI/VideoInstruct-100K/VideoInstruct100K.json --media-root 'videos/*.zip'

The output folder gets the finished model and its processor (bt-adapter chat --model tuned), checkpoints to go on from
with --resume, run_summary.json, losses.png, and broken_items.jsonl where something could not be used. With --lora it
gets LoRA, branch and projector (bt-adapter chat --model BASE --bt-adapter tuned). Ctrl-C saves a checkpoint and stops.

Check the table first: bt-adapter check-data videos/train.jsonl --model llava-hf/llava-1.5-7b-hf
On several GPUs: torchrun --nproc-per-node 8 -m bt_adapter_hf.cli.main finetune ...
"""

OPTIONS = {
    **TRAINING_OPTIONS,
    "adapter_only": "adapter_only",
}
LORA_OPTIONS = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "finetune",
        help="teach a chat model from conversations about videos",
        description="Instruction tuning: the branch and the projector learn, and with --lora the language model too. "
        "Conversations about videos, about images and of words alone may be mixed. Defaults are those of the released "
        "tuning.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_options(
        parser,
        model="LLaVA, InstructBLIP or MiniGPT-4, native or with its adapter in; or a model of GIF question answering",
    )
    parser.add_argument(
        "--bt-adapter",
        "--adapter",
        type=path,
        metavar="ID_OR_PATH",
        help="adapter for a native model (default: a fresh branch, warm-started)",
    )

    data = parser.add_argument_group("data")
    data.add_argument(
        "--train",
        required=True,
        type=path,
        metavar="TABLE",
        help=".jsonl or .json file of conversations, or a .csv of TGIF-QA, local or hf://datasets/...",
    )
    data.add_argument("--validation", type=path, metavar="TABLE", help="table to measure the loss on")
    data.add_argument(
        "--media-root",
        type=path,
        metavar="DIR",
        help="where relative paths start: a folder, or .zip and .tar archives; or a .tsv with the addresses of the "
        "videos (default: folder of the table)",
    )
    data.add_argument(
        "--dataset-revision", metavar="NAME", help="branch, tag or commit of the tables, if they are on the Hub"
    )
    data.add_argument(
        "--num-frames",
        type=whole_number(),
        metavar="T",
        help="frames per video (default: as the adapter's processor says, its training, or the model's processor)",
    )
    add_data_limits(data)
    add_item_timeout(data)
    add_on_damage(data)
    data.add_argument(
        "--augment",
        action="store_true",
        help="crop, mirror and recolour the training videos at random, all frames of one alike; none is mirrored "
        "whose conversation names a side",
    )
    data.add_argument(
        "--cache-states",
        type=path,
        metavar="DIR",
        help="keep the frozen backbone's states of all videos there, so that each is decoded and encoded once; their "
        "size is shown first",
    )
    data.add_argument(
        "--cache-dtype", default="bf16", choices=("bf16", "fp8", "fp32"), help="of these states (default: bf16)"
    )

    learning = parser.add_argument_group("what learns")
    learning.add_argument(
        "--lora", action="store_true", help="LoRA on the language model, beside branch and projector"
    )
    learning.add_argument("--lora-r", type=whole_number(), default=16, metavar="R", help="its rank (default: 16)")
    learning.add_argument(
        "--lora-alpha", type=whole_number(), default=32, metavar="A", help="its scale times R (default: 32)"
    )
    learning.add_argument("--lora-dropout", type=real_number(0, 1), default=0.0, metavar="P", help="(default: 0)")
    learning.add_argument(
        "--load-in-4bit", action="store_true", help="quantize the language model (QLoRA); needs --lora"
    )
    learning.add_argument(
        "--adapter-only",
        action="store_true",
        default=None,
        help="write the branch and the projector as an adapter, not the whole model",
    )
    add_training_options(parser, learning_rate="2e-5", epochs=3, multipliers="none")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.load_in_4bit and not args.lora:
        raise ValueError("--load-in-4bit: a quantized language model takes LoRA; add --lora.")
    if args.augment and args.cache_states is not None:
        raise ValueError(
            "--augment changes the videos each time, and --cache-states keeps what was made of them once."
        )
    if args.lora and args.adapter_only:
        raise ValueError("--adapter-only would leave LoRA out; with --lora nothing but what was trained is written.")
    with only_run(args.output_dir):
        return train(args)


def train(args: argparse.Namespace) -> int:
    started = time.time()
    checkpoint = find_checkpoint(args)
    check_adapter(args)
    from ..training.arguments import InstructionArguments

    if args.load_in_4bit:
        require_package("bitsandbytes", "quantization")
    packages = ("accelerate", "matplotlib", *(["peft"] if args.lora else []))
    training_args = begin(args, InstructionArguments, packages, OPTIONS)

    from ..adapters.files import lasting_name
    from ..data.augmentation import ClipAugmentation
    from ..data.instructions import InstructionCollator, InstructionDataset, load_instructions, longest_conversation
    from ..training.instruction_tuning import InstructionTrainer, prepare_for_tuning
    from ..training.report import describe_table

    sources = {"train": args.train, **({"validation": args.validation} if args.validation else {})}
    tables = {
        part: load_instructions(source, media_root=args.media_root, revision=args.dataset_revision)
        for part, source in sources.items()
    }
    model, processor = load_model(args, training_args, resumed=checkpoint is not None)
    lora = {field: getattr(args, option) for option, field in LORA_OPTIONS.items()} if args.lora else None
    model = prepare_for_tuning(model, lora)
    states = None
    if args.cache_states is not None:
        states = cached_states(args, training_args, model, processor, list(tables.values()))
    datasets = {
        part: InstructionDataset(
            table,
            processor,
            max_length=longest_conversation(model.config, processor),
            seed=training_args.seed,
            states=states,
            augment=ClipAugmentation() if args.augment and part == "train" else None,
            item_timeout=args.item_timeout,
        )
        for part, table in tables.items()
    }
    trainer = InstructionTrainer(
        model=model,
        args=training_args,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("validation"),
        data_collator=InstructionCollator(processor),
        processing_class=processor,
    )
    rules = processor.video_processor
    summary = run_training(
        trainer,
        checkpoint,
        started,
        kind="instruction tuning",
        model=lasting_name(args.model),
        revision=getattr(args.revision, "resolved", args.revision),
        config={"bt_adapter": lasting_name(args.bt_adapter), "lora": lora, "load_in_4bit": args.load_in_4bit},
        data={
            "num_frames": rules.num_frames,
            "sampling": rules.sampling,
            "num_clips": processor.num_clips,
            "cache_dtype": args.cache_dtype if states is not None else None,
            **{part: describe_table(table) for part, table in tables.items()},
        },
    )
    return end(trainer, summary, lambda: print_result(args, summary), args.json)


def check_adapter(args: argparse.Namespace) -> None:
    """Whether training can start from the model and the adapter that the options name.

    Raises:
        ValueError: it cannot.
    """
    from ..adapters.files import is_peft_folder
    from ..hub.source import resolve_adapter

    model_type = chat_type(args)
    if args.bt_adapter is None:
        return
    folder = resolve_adapter(args.bt_adapter)
    if is_peft_folder(folder):
        raise ValueError(
            f"--bt-adapter {args.bt_adapter} brings LoRA, and training does not go on from that. Merge it into its "
            "model in Python, load_bt_adapter(AutoModelForImageTextToText.from_pretrained("
            f"'{args.model}'), '{args.bt_adapter}').merge_and_unload().save_pretrained('merged'), with its processor, "
            f"AutoProcessor.from_pretrained('{args.bt_adapter}').save_pretrained('merged'); then --model merged "
            "without --bt-adapter. (A run that was stopped goes on with --resume.)"
        )
    check_place(args.model, model_type, folder)


def load_model(args: argparse.Namespace, training_args, resumed: bool = False):
    """The chat model that the options describe, on the device of the training, and its processor.

    Args:
        resumed: a checkpoint brings what was trained, so that a fresh branch is nothing to tell.
    """
    import torch
    from transformers.utils import logging

    import bt_adapter_hf

    from ..adapters import strictness
    from ..models.compat_bt_adapter import resolve_revision

    args.revision = resolve_revision(args.model, args.revision)  # one commit for model and processor
    processor, host = chat_processor(args, **({} if args.num_frames is None else {"num_frames": args.num_frames}))
    options: dict[str, Any] = {"dtype": torch.bfloat16 if training_args.bf16 else torch.float32}
    if args.load_in_4bit:
        options["quantization_config"] = bt_adapter_hf.quantization_config(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
        options["device_map"] = {"": training_args.device}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report names every tensor of a fresh branch
    if resumed:
        strictness.logger.setLevel(logging.ERROR)
    try:
        model = getattr(bt_adapter_hf, f"BTAdapter{host}ForConditionalGeneration").from_pretrained(
            args.model, revision=args.revision, bt_adapter=args.bt_adapter, **options
        )
    finally:
        logging.set_verbosity(verbosity)
        strictness.logger.setLevel(logging.NOTSET)
    return model if args.load_in_4bit else model.to(training_args.device), processor


def cached_states(args: argparse.Namespace, training_args, model, processor, tables):
    """The frozen states of all videos in the tables; what is missing is computed, each process its share."""
    from accelerate import PartialState

    from ..training.frozen_states import FrozenStates, build_states, plan_states

    videos = [video for table in tables for video in table.videos()]
    archives = tables[0].archives  # --media-root is the same for all
    plan = plan_states(args.cache_states, model, processor, videos, args.cache_dtype, archives)
    if training_args.process_index == 0:
        print(plan, file=sys.stderr if args.json else sys.stdout, flush=True)
    build_states(
        plan,
        model,
        processor,
        workers=training_args.dataloader_num_workers,
        process=training_args.process_index,
        processes=training_args.world_size,
        progress=lambda items: progress(items, len(items), "frozen states"),
        item_timeout=args.item_timeout,
    )
    PartialState().wait_for_everyone()
    return FrozenStates(args.cache_states, model, processor, archives)


def print_result(args: argparse.Namespace, summary: dict[str, Any]) -> None:
    if "eval_loss" in summary["metrics"]:
        print(f"validation loss {summary['metrics']['eval_loss']:.4f}")
    plugged = args.lora or args.adapter_only
    use = f"--model {args.model} --bt-adapter {args.output_dir}" if plugged else f"--model {args.output_dir}"
    print(f"run_summary.json and losses.png: {args.output_dir}   try it: bt-adapter chat VIDEO {use}")
