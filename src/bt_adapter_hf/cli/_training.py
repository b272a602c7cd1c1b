"""What `bt-adapter pretrain` and `bt-adapter finetune` share: options, and a run from its start to its summary."""

import argparse
import dataclasses
import difflib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._options import real_number, whole_number


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


def add_run_options(parser: argparse.ArgumentParser, model: str) -> None:
    parser.add_argument("--model", required=True, metavar="ID_OR_PATH", help=model)
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="where model and checkpoints go")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument(
        "--push-to-hub",
        metavar="REPO_ID",
        help="upload the finished model to this repository (private: --set hub_private_repo=true)",
    )


def add_table_options(parser: argparse._ActionsContainer) -> None:
    """How (video, text) tables are read; see `open_table`."""
    parser.add_argument(
        "--media-root",
        metavar="DIR",
        help="where relative paths start: a folder, or .zip and .tar archives (default: folder of the table)",
    )
    parser.add_argument("--video-column", metavar="NAME", help="default: video, file_name, path or video_path")
    parser.add_argument("--text-column", metavar="NAME", help="default: text, caption(s) or sentence(s)")
    parser.add_argument("--dataset-config", metavar="NAME", help="configuration of a Hub dataset")
    parser.add_argument("--dataset-revision", metavar="NAME", help="branch, tag or commit of a Hub dataset")


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
        "--lr-multipliers", metavar="JSON", help=f'rates of parts, as {{"bt_adapter.": 10}} (default: {multipliers})'
    )
    group.add_argument(
        "--workers", type=whole_number(0), metavar="N", help="processes that decode, per device (default: 0)"
    )
    group.add_argument("--bf16", action="store_true", default=None, help="mixed precision in bfloat16")
    group.add_argument("--logging-steps", type=whole_number(), default=10, metavar="N", help="(default: 10)")
    group.add_argument(
        "--save-steps", type=whole_number(), metavar="N", help="steps between checkpoints (default: 500)"
    )
    group.add_argument(
        "--eval-steps", type=whole_number(), metavar="N", help="steps between evaluations (default: at the end)"
    )
    group.add_argument("--seed", type=whole_number(0), metavar="N", help="(default: 42)")
    group.add_argument("--report-to", metavar="NAME", help="tensorboard, wandb, ... (default: none)")
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
        help="seconds after which reading a video is given up, 0 for no limit (default: 60)",
    )


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


def open_table(args: argparse.Namespace, source: str, split: str):
    """The (video, text) table that the options describe."""
    from ..data.pairs import load_table

    return load_table(
        source,
        media_root=args.media_root,
        video_column=args.video_column,
        text_column=args.text_column,
        split=split,
        config_name=args.dataset_config,
        revision=args.dataset_revision,
    )


def chat_processor(args: argparse.Namespace, **fields: Any):
    """The processor of the chat model that `--model` names, and the middle of the names of its classes.

    Args:
        fields: of the video processor, such as `num_frames`.

    Raises:
        ValueError: for a model of another kind.
    """
    from transformers import AutoConfig

    import bt_adapter_hf

    from .chat import HOSTS

    model_type = AutoConfig.from_pretrained(args.model, revision=args.revision).model_type
    if model_type not in HOSTS:
        raise ValueError(f"'{args.model}' holds a model of type '{model_type}'; expected one of {', '.join(HOSTS)}.")
    cls = getattr(bt_adapter_hf, f"BTAdapter{HOSTS[model_type]}Processor")
    return cls.from_pretrained(args.model, revision=args.revision, **fields), HOSTS[model_type]


def text_limit(wanted: int | None, tokenizer, config) -> int:
    """Longest caption in tokens: 64 as released, or what the text tower takes where that is less.

    Raises:
        ValueError: for a `wanted` length that it does not take.
    """
    limit = min(tokenizer.model_max_length, config.text_config.max_position_embeddings)
    if wanted is None:
        return min(64, limit)
    if not 0 < wanted <= limit:
        raise ValueError(f"--max-text-length {wanted}: the text tower takes 1 to {limit} tokens.")
    return wanted


def training_arguments(args: argparse.Namespace, cls: type, options: Mapping[str, str] = TRAINING_OPTIONS, **fixed):
    """A `cls` (training arguments) from the options and from `--set`, with values as transformers reads them.

    Args:
        options: names of options and of the fields that they set, where given.
        fixed: further fields; a list becomes several words.

    Raises:
        ValueError: for an unknown name or a value of another type.
    """
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
        values[name] = value
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
    return parsed


def find_checkpoint(args: argparse.Namespace) -> str | None:
    """The checkpoint to resume from, if any; makes the output folder.

    Raises:
        ValueError: `--resume` without a checkpoint, or checkpoints without `--resume`.
    """
    from ..training.checkpoint import last_checkpoint

    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = last_checkpoint(output_dir)
    if args.resume and checkpoint is None:
        raise ValueError(f"--resume: {output_dir} holds no complete checkpoint.")
    if not args.resume and any(output_dir.glob("checkpoint-*")):
        raise ValueError(f"{output_dir} holds checkpoints of an earlier run: add --resume, or choose another folder.")
    return checkpoint


def run_training(trainer, checkpoint: str | None, started: float, **described: Any) -> dict[str, Any]:
    """Train, evaluate where there is validation data, save the model; write summary and plot however it ends.

    Args:
        trainer: a `ResumableTrainer`.
        checkpoint: to resume from.
        started: `time.time()` of the command's start.
        described: `kind`, `model`, `revision`, `config` and `data` of `write_run_summary`.

    Returns:
        the summary; its `error` is "interrupted" after one Ctrl-C.
    """
    from ..data.chunk_store import ChunkStoreError
    from ..training.checkpoint import last_checkpoint
    from ..training.interruption import StopAtInterrupt

    stop = StopAtInterrupt()
    trainer.add_callback(stop)
    metrics, error = {}, None

    def report() -> dict[str, Any]:
        from ..training.report import write_run_summary

        seconds = time.time() - started
        summary = write_run_summary(trainer, seconds=seconds, metrics=metrics, error=error, **described)
        plot(trainer)
        return summary

    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        if stop.interrupted:
            error = "interrupted"
        else:
            if trainer.eval_dataset is not None:
                metrics = trainer.evaluate()
            summary = report()  # before the model, which may be uploaded with it
            trainer.save_model()
            return summary
    except BaseException as failure:
        interrupted = isinstance(failure, KeyboardInterrupt)
        error = "interrupted" if interrupted else f"{type(failure).__name__}: {failure}"
        if trainer.state.max_steps:  # it had begun
            try:
                report()
            except OSError as second:  # no space left, perhaps; the first error is the one to show
                print(f"the run summary could not be written: {second}", file=sys.stderr)
        if interrupted and trainer.is_world_process_zero():
            found = last_checkpoint(trainer.args.output_dir)
            print(f"--resume would go on from {found or 'nothing: no checkpoint is complete'}", file=sys.stderr)
        if isinstance(failure, ChunkStoreError):
            raise ValueError(str(failure)) from failure
        raise
    finally:
        stop.restore()
    return report()


def plot(trainer) -> None:
    """losses.png beside the model, once some loss has been logged."""
    from ..training.report import PLOT_NAME, plot_losses

    if trainer.is_world_process_zero() and any("loss" in entry for entry in trainer.state.log_history):
        plot_losses(trainer.state.log_history, Path(trainer.args.output_dir) / PLOT_NAME)


def print_interrupted(summary: Mapping[str, Any], output_dir: str) -> None:
    print(
        f"stopped after step {summary['steps']} of {summary['total_steps']}; the same command with --resume goes on "
        f"from the checkpoint in {output_dir}",
        file=sys.stderr,
    )


def print_skipped(summary: Mapping[str, Any], output_dir: str) -> None:
    """What could not be used, by reason."""
    for part, reasons in summary["broken_reasons"].items():
        print(f"{summary['broken_items'][part]} items ({part}) could not be used:", file=sys.stderr)
        for reason, count in list(reasons.items())[:5]:
            print(f"  {count:>6}  {reason}", file=sys.stderr)
        print(f"  each is listed in {Path(output_dir) / 'broken_items*.jsonl'}", file=sys.stderr)
