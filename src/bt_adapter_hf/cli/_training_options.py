"""The options that `bt-adapter pretrain` and `bt-adapter finetune` share, and the training arguments made of them."""

import argparse
import dataclasses
import difflib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from ._options import add_device_option, path, real_number, whole_number


# Options with a name of their own, and the fields of the training arguments that they set.
TRAINING_OPTIONS = {
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "activation_checkpointing": "activation_checkpointing",
    "epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "learning_rate": "learning_rate",
    "lr_multipliers": "lr_multipliers",
    "workers": "dataloader_num_workers",
    "bf16": "bf16",
    "logging_steps": "logging_steps",
    "save_steps": "save_steps",
    "eval_steps": "eval_steps",
    "seed": "seed",
    "report_to": "report_to",
    "max_broken": "max_broken",
    "chunk_rows": "chunk_rows",
    "max_disk": "max_disk",
    "push_to_hub": "hub_model_id",
}


# Fields that --set may not name: the commands would not see the value.
_OWN_OPTIONS = {"output_dir": "--output-dir", "resume_from_checkpoint": "--resume"}


def add_run_options(parser: argparse.ArgumentParser, model: str) -> None:
    parser.add_argument("--model", required=True, type=path, metavar="ID_OR_PATH", help=model)
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--output-dir", required=True, type=path, metavar="DIR", help="where model and checkpoints go")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--json", action="store_true", help="print what run_summary.json holds, as JSON")
    add_device_option(parser)
    parser.add_argument(
        "--push-to-hub",
        type=path,
        metavar="REPO_ID",
        help="upload the finished model to this repository (private: --set hub_private_repo=true)",
    )


def add_table_options(parser: argparse._ActionsContainer) -> None:
    """How (video, text) tables are read; see `open_table`."""
    parser.add_argument(
        "--media-root",
        type=path,
        metavar="DIR",
        help="where relative paths start: a folder, or .zip and .tar archives (default: folder of the table)",
    )
    parser.add_argument("--video-column", metavar="NAME", help="default: video, file_name, path or video_path")
    parser.add_argument("--text-column", metavar="NAME", help="default: text, caption(s) or sentence(s)")
    parser.add_argument("--dataset-config", metavar="NAME", help="configuration of a Hub dataset")
    parser.add_argument("--dataset-revision", metavar="NAME", help="branch, tag or commit of a Hub dataset")


def add_on_damage(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--on-damage",
        choices=("raise", "salvage"),
        help="leave out a video that is cut or damaged, or use the frames before the damage (default: as the model "
        "says)",
    )


def add_training_options(
    parser: argparse.ArgumentParser, *, learning_rate: str, epochs: int, multipliers: str
) -> argparse._ArgumentGroup:
    """A group with the options of `TRAINING_OPTIONS` that are not about data; the arguments are the defaults to show.

    They themselves stand in the training arguments.
    """
    group = parser.add_argument_group("training")
    group.add_argument("--batch-size", type=whole_number(), metavar="N", help="items per device and step (default: 8)")
    group.add_argument("--eval-batch-size", type=whole_number(), metavar="N", help="(default: 8)")
    group.add_argument("--gradient-accumulation-steps", type=whole_number(), metavar="N", help="(default: 1)")
    group.add_argument(
        "--activation-checkpointing",
        action="store_true",
        default=None,
        help="compute activations of what is trained a second time instead of keeping them: less memory, more time",
    )
    group.add_argument(
        "--epochs", type=real_number(0, above=True), metavar="N", help=f"passes over the table (default: {epochs})"
    )
    group.add_argument("--max-steps", type=whole_number(), metavar="N", help="instead of --epochs")
    group.add_argument(
        "--learning-rate", type=real_number(0), metavar="LR", help=f"base rate (default: {learning_rate})"
    )
    group.add_argument(
        "--lr-multipliers",
        type=multipliers_of_parts,
        metavar="JSON",
        help=f'rates of parts, as {{"bt_adapter.": 10}} (default: {multipliers})',
    )
    group.add_argument(
        "--workers", type=whole_number(0), metavar="N", help="processes that decode, per device (default: 0)"
    )
    group.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="mixed precision in bfloat16 (default: on GPUs that compute in it)",
    )
    group.add_argument("--logging-steps", type=whole_number(), metavar="N", help="(default: 10)")
    group.add_argument(
        "--save-steps", type=whole_number(), metavar="N", help="steps between checkpoints (default: 500)"
    )
    group.add_argument(
        "--eval-steps", type=whole_number(), metavar="N", help="steps between evaluations (default: at the end)"
    )
    group.add_argument("--seed", type=whole_number(0), metavar="N", help="(default: 42)")
    group.add_argument("--report-to", metavar="NAME", help="tensorboard, wandb, ..., if installed (default: none)")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other field of the training arguments, such as --set warmup_steps=0.05; may be repeated",
    )
    return group


def add_data_limits(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--max-broken", type=real_number(0, 1), metavar="SHARE", help="broken items that stop the run (default: 0.1)"
    )
    parser.add_argument(
        "--chunk-rows",
        type=whole_number(),
        metavar="N",
        help="rows that are shuffled among each other (default: 10000)",
    )
    parser.add_argument(
        "--max-disk",
        type=size_in_bytes,
        metavar="SIZE",
        help="disk space for rows of a remote or packed table, which come and go, such as 20GB; training and "
        "validation table may take that much each (default: 50GB)",
    )


def add_item_timeout(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--item-timeout",
        type=seconds_or_none,
        default=60.0,
        metavar="S",
        help="seconds after which reading a video or image is given up, 0 for no limit (default: 60)",
    )


def multipliers_of_parts(text: str) -> str:
    """The text, of an object with a finite number of at least 0 for each name."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error}).") from error
    numbers = content.values() if isinstance(content, dict) else [None]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < math.inf for n in numbers):
        raise argparse.ArgumentTypeError(
            f'{text!r} is no JSON object with a number of at least 0 for each name, such as {{"bt_adapter.": 10}}.'
        )
    return text


def seconds_or_none(text: str) -> float | None:
    """Seconds, and None for "0"."""
    return real_number(0)(text) or None


def size_in_bytes(text: str) -> int:
    """`"20GB"`, `"512MiB"` or plain bytes."""
    units = {"": 1, "B": 1}
    units |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
    units |= {f"{letter}iB".upper(): 1024**power for power, letter in enumerate("KMGT", 1)}
    number = text.strip().upper().rstrip("KMGTIB ")
    try:
        size = int(float(number) * units[text.strip().upper()[len(number) :].strip()])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size of at least one byte; expected bytes, or a number with KB, MB, GB or TB."
        )
    return size


def training_arguments(args: argparse.Namespace, cls: type, options: Mapping[str, str] = TRAINING_OPTIONS, **fixed):
    """A `cls` (training arguments) from the options and from `--set`, with values as transformers reads them.

    Args:
        options: names of options and of the fields that they set, where given.
        fixed: further fields; a list becomes several words.

    Raises:
        ValueError: for an unknown name or a value of another type.
    """
    import torch
    from transformers import HfArgumentParser

    values: dict[str, Any] = {
        field: getattr(args, option) for option, field in options.items() if getattr(args, option) is not None
    }
    if args.eval_steps is not None:
        values["eval_strategy"] = "steps"
    if args.push_to_hub is not None:
        values["push_to_hub"] = True
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    for assignment in args.set:
        name, equals, value = assignment.partition("=")
        name = name.replace("-", "_")
        if not equals:
            raise ValueError(f"--set {assignment}: expected NAME=VALUE.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            # the value stays out of it: it may be a token
            raise ValueError(f"--set {name}: there is no such field. Nearest: {', '.join(close) or 'none'}.")
        if name in _OWN_OPTIONS:
            raise ValueError(f"--set {name}: that is {_OWN_OPTIONS[name]}.")
        if value.lstrip().startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                raise ValueError(f"--set {name}: the value is no JSON ({error}).") from error
        values[name] = value
    values = {"logging_steps": 10} | values
    values |= _device_fields(args.device, values)
    if values.get("eval_strategy", "no") != "no" and args.validation is None:
        raise ValueError("Evaluation during training needs --validation.")
    argv = ["--output_dir", args.output_dir]
    for name, value in {**values, **fixed}.items():
        argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    parser = HfArgumentParser(cls, exit_on_error=False)
    try:
        (parsed,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except argparse.ArgumentError as error:
        raise ValueError(f"training option: {error}") from error
    if args.device is not None and torch.device(args.device).type != parsed.device.type:
        raise ValueError(f"--device {args.device}: there is no such device here; there is {parsed.device}.")
    return parsed


def _device_fields(device: str | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that put training on a device, and its precision where none was asked for: bfloat16 on GPUs that have it.

    Args:
        device: value of --device.
        values: of the other fields.
    """
    import torch

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    kind = None
    if device is not None:
        try:
            kind, index = torch.device(device).type, torch.device(device).index or 0
        except RuntimeError as error:
            raise ValueError(f"--device {device}: expected cpu, cuda, cuda:1 or mps.") from error
        if kind != "cpu" and processes > 1:
            raise ValueError(f"--device {device}: each of the {processes} processes takes a device of its own.")
        if kind == "cuda":  # the only one that is seen, before any is looked for: Trainer takes all that it sees
            seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            if seen and index >= len(seen):
                raise ValueError(f"--device {device}: CUDA_VISIBLE_DEVICES shows {len(seen)} GPUs.")
            os.environ["CUDA_VISIBLE_DEVICES"] = seen[index] if seen else str(index)
    asked = [str(values.get("use_cpu", "")), os.environ.get("ACCELERATE_USE_CPU", "")]
    on_cpu = kind == "cpu" or any(text.lower() in ("1", "true", "yes") for text in asked)
    on_cpu = on_cpu or not torch.accelerator.is_available()
    fields: dict[str, Any] = {"use_cpu": True} if on_cpu else {}
    if not {"bf16", "fp16"} & values.keys() and not on_cpu and torch.cuda.is_available():
        fields["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    return fields
