"""What `bt-adapter pretrain` and `bt-adapter finetune` share: a run from its start to its summary."""

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ._options import quiet_transformers
from ._training_options import TRAINING_OPTIONS, training_arguments


LOCK_NAME = "run.lock"

logger = logging.getLogger(__name__)


def open_table(args: argparse.Namespace, source: str, split: str):
    """The (video, text) table that the options describe."""
    from ..data.pairs import load_table
    from ..import_utils import require_package

    require_package("datasets", "train")
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return load_table(
        source,
        media_root=args.media_root,
        video_column=args.video_column,
        text_column=args.text_column,
        split=split,
        config_name=args.dataset_config,
        revision=args.dataset_revision,
    )


def open_columns(args: argparse.Namespace, options: Sequence[str]) -> list:
    """The table that `--data` names, once for each column that one of these options names, in place of its texts.

    Raises:
        ValueError: as `load_table`, by the name of the option.
    """
    tables = []
    for option in options:
        column = argparse.Namespace(**{**vars(args), "text_column": getattr(args, option)})
        try:
            tables.append(open_table(column, args.data, args.split))
        except ValueError as error:
            said = str(error).replace("text_column", option).replace("text column", option.replace("_", " "))
            raise ValueError(said) from error
    return tables


def chat_processor(args: argparse.Namespace, **fields: Any):
    """The processor of the chat model that `--model` names, and the middle of the names of its classes.

    An adapter that `--bt-adapter` names may bring the processor that was tuned with it.

    Args:
        fields: of the video processor, such as `num_frames`.

    Raises:
        ValueError: for a model of another kind.
    """
    import bt_adapter_hf

    from ..hub.chat_processor import load_chat_processor
    from ..hub.source import resolve_adapter
    from .chat import HOSTS

    model_type, adapter = chat_type(args), getattr(args, "bt_adapter", None)
    folder = None if adapter is None else resolve_adapter(adapter)
    cls = getattr(bt_adapter_hf, f"BTAdapter{HOSTS[model_type]}Processor")
    if args.on_damage is not None:
        fields["on_damage"] = args.on_damage
    return load_chat_processor(cls, args.model, args.revision, folder, **fields), HOSTS[model_type]


def chat_type(args: argparse.Namespace) -> str:
    """Type of the chat model that `--model` names.

    Raises:
        ValueError: for a model of another kind.
    """
    from ..hub.kinds import wrong_kind
    from ..hub.source import model_type_of
    from .chat import HOSTS

    model_type = model_type_of(args.model, args.revision)
    if model_type not in HOSTS:
        raise wrong_kind(args.model, model_type, f"a chat model, of type {', '.join(HOSTS)}")
    return model_type


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


def begin(
    args: argparse.Namespace,
    arguments: type,
    packages: Sequence[str],
    options: Mapping[str, str] = TRAINING_OPTIONS,
    **fixed: Any,
):
    """What comes before the model: packages, training arguments, the seed of its fresh parts.

    Args:
        arguments: class of the training arguments.
        packages: that are needed.
        options, fixed: of `training_arguments`.
    """
    from ..import_utils import require_package

    for package in packages:
        require_package(package, "train")
    quiet_transformers()
    from transformers import set_seed

    training_args = training_arguments(args, arguments, options, **fixed)
    set_seed(training_args.seed)
    return training_args


@contextlib.contextmanager
def only_run(output_dir: str) -> Iterator[None]:
    """Makes the output folder, and holds its lock: of two runs into one folder each would take the other's files.

    Folders that were made and that nothing was written into, as by a run that was refused, are taken away at the end.

    Raises:
        ValueError: if another run writes there.
    """
    folder = Path(output_dir)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # the first of several processes holds the lock for all
        with _locked(folder) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext():
            yield
    finally:
        for path in made:
            if not path.is_dir() or any(path.iterdir()):
                break
            path.rmdir()


@contextlib.contextmanager
def _locked(output_dir: Path) -> Iterator[None]:
    lock = FileLock(output_dir / LOCK_NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"another run writes to {output_dir}: wait until it has ended, or choose another --output-dir."
        ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: FileLock sees that it is gone
        lock.release()


def find_checkpoint(args: argparse.Namespace) -> str | None:
    """The checkpoint to resume from, if any.

    Raises:
        ValueError: `--resume` without a checkpoint, or checkpoints without `--resume`.
    """
    from ..training.checkpoint import last_checkpoint

    output_dir = Path(args.output_dir)
    checkpoint = last_checkpoint(output_dir)
    if args.resume and checkpoint is None:
        if not any(output_dir.glob("checkpoint-*")):
            raise ValueError(f"--resume: {output_dir} holds no complete checkpoint.")
        # killed while it wrote its first one
        logger.warning("%s holds no complete checkpoint: the run starts from its beginning.", output_dir)
    if not args.resume and checkpoint is not None:
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
        if trainer.state.max_steps and trainer.optimizer is not None:  # it had begun
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


def end(trainer, summary: Mapping[str, Any], print_result: Callable[[], None], as_json: bool) -> int:
    """Say how it went, by `print_result` where the run came to its end, or the summary as JSON; the exit status."""
    output_dir = trainer.args.output_dir
    if trainer.is_world_process_zero():
        print_skipped(summary, output_dir)
        if not summary["finished"]:
            print_interrupted(summary, output_dir)
        if as_json:
            print(json.dumps(summary, indent=2))
        elif summary["finished"]:
            print(
                f"trained {summary['trained_parameters']:,} parameters for {summary['steps']} steps in "
                f"{summary['seconds']} s"
            )
            print_result()
    trainer.accelerator.end_training()  # one of several processes may abort at exit otherwise
    return 0 if summary["finished"] else 130


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
    """What could not be used: how much by reason, and the first three."""
    from ..data.broken import described, read_broken

    found = read_broken(Path(output_dir))
    for part, reasons in summary["broken_reasons"].items():
        print(f"{summary['broken_items'][part]} items ({part}) could not be used:", file=sys.stderr)
        for reason, count in list(reasons.items())[:5]:
            print(f"  {count:>6}  {reason}", file=sys.stderr)
        for item in found[part][:3]:
            print(f"  {described(item)}", file=sys.stderr)
        print(f"  each is listed in {Path(output_dir) / 'broken_items*.jsonl'}", file=sys.stderr)
