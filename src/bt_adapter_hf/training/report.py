"""What a run leaves behind besides the model: `run_summary.json` and a plot of its log, `losses.png`."""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from .. import __version__
from ..adapters.writing import written_whole
from ..data.broken import count_reasons, read_broken
from ..data.instructions import InstructionTable
from ..data.sources import PairTable
from ..hub.card import SUMMARY_NAME
from ..import_utils import require_package
from .resumable import ResumableTrainer


PLOT_NAME = "losses.png"
# Fields of `TrainingArguments` that a reader looks for, whether or not they were changed.
TRAINING_FIELDS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "bf16",
    "seed",
    "dataloader_num_workers",
)
# They say where and how often something is written, not how it is trained; the token is a secret.
_LEFT_OUT = {
    "output_dir", "logging_dir", "run_name", "hub_token", "hub_model_id", "report_to", "disable_tqdm", "debug",
    "do_eval",
}  # fmt: skip


def write_run_summary(
    trainer: ResumableTrainer,
    *,
    kind: str,
    model: str,
    revision: str | None,
    config: dict[str, Any],
    data: dict[str, Any],
    seconds: float,
    metrics: dict[str, float] | None = None,
    error: str | None = None,
) -> dict[str, Any]:
    """Write `run_summary.json` into the output folder of the run (the main process only), and return it.

    Args:
        kind: "pretraining" or "instruction tuning".
        model, revision: what training started from; the revision is a commit where the model is on the Hub.
        config: fields of the model.
        data: the tables (see `describe_table`) and how their items are made.
        seconds: wall time of this command.
        metrics: of the evaluation of the finished model.
        error: why the run is not finished, such as "interrupted"; None where it is.

    The summary also holds: `finished` and `error`; `steps` made and `total_steps` planned; `train_loss`, the mean of
    the logged losses; `clipping`, the share of steps whose gradient was clipped and by how much (see
    `ObservabilityMixin`); `speed` (see there), which like `seconds` covers the time since the run was last started or
    resumed; `broken_items` and `broken_reasons`, counts by part ("train", "eval") over the whole run,
    of all processes that write to this folder; `processes`, `device` and `versions`.
    """
    broken = read_broken(trainer.args.output_dir)
    summary = {
        "kind": kind,
        "finished": error is None,
        "error": error,
        "model": model,
        "revision": revision,
        "config": config,
        "data": data,
        "training": _training_fields(trainer.args),
        "processes": trainer.args.world_size,
        "device": device_name(trainer.args.device),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "total_steps": trainer.state.max_steps,
        "train_loss": mean_loss(trainer.state.log_history),
        "clipping": mean_clipping(trainer.state.log_history),
        "metrics": metrics or {},
        "broken_items": {part: len(records) for part, records in broken.items()},
        "broken_reasons": {part: count_reasons(records) for part, records in broken.items()},
        "seconds": round(seconds, 1),
        "speed": {name: round(value, 4) for name, value in trainer.speed.items()},
        "versions": versions(),
    }
    if trainer.is_world_process_zero():
        with written_whole(Path(trainer.args.output_dir) / SUMMARY_NAME) as file:
            file.write_text(_to_json(summary))
    return summary


def describe_table(table: PairTable | InstructionTable) -> dict[str, Any]:
    """Source, rows and fingerprint of a table, for `data` of the summary; its commit where it is on the Hub."""
    described = {"source": table.source, "rows": len(table), "fingerprint": table.fingerprint}
    if table.revision is not None:
        described["revision"] = table.revision
    return described


def mean_loss(log_history: list[dict[str, float]]) -> float | None:
    """The logged losses, weighted by the steps each of them stands for; None where nothing was logged."""
    total, last = 0.0, 0
    for entry in log_history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / last if last else None


def mean_clipping(log_history: list[dict[str, float]]) -> dict[str, float]:
    """`clipped_steps` and `clipped_by` over a whole run; empty where nothing is clipped or logged."""
    steps = clipped = logarithms = last = 0
    for entry in log_history:
        if "clipped_steps" in entry:
            window = entry["step"] - last
            steps += window
            clipped += window * entry["clipped_steps"]
            logarithms += window * entry["clipped_steps"] * math.log(entry["clipped_by"])
            last = entry["step"]
    if not steps:
        return {}
    by = math.exp(logarithms / clipped) if clipped else 1.0
    return {"clipped_steps": round(clipped / steps, 4), "clipped_by": round(by, 4)}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str]:
    packages = {}
    for name in ("torch", "transformers", "huggingface_hub", "accelerate", "datasets", "peft", "bitsandbytes", "av"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {"bt_adapter_hf": __version__, "python": platform.python_version(), **packages}


def plot_losses(log_history: list[dict[str, float]], path: str | os.PathLike) -> None:
    """Draw losses, learning rates and, where there are evaluations, recall over the steps, as a png file.

    Args:
        log_history: of `trainer.state`.

    Raises:
        ImportError: without matplotlib.
        ValueError: if no loss was logged.
    """
    require_package("matplotlib", "train")
    from matplotlib.figure import Figure  # without pyplot no display is looked for

    panels = {
        "loss": _series(log_history, lambda key: key.endswith("loss") and key != "train_loss"),
        "learning rate": _series(log_history, lambda key: key.startswith("lr_x")),
        "recall at 1, in percent": _series(log_history, lambda key: key.startswith("eval_") and key.endswith("_R1")),
    }
    if not panels["loss"]:
        raise ValueError("There is nothing to plot: the log holds no loss.")
    panels = {title: series for title, series in panels.items() if series}
    figure = Figure(figsize=(9, 3.2 * len(panels)), layout="constrained")
    for axes, (title, series) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for name, points in series.items():
            # A line needs two points, and evaluations are few.
            marker = "o" if len(points) == 1 or name.startswith("eval_") else None
            axes.plot(*zip(*points, strict=True), label=name, marker=marker)
        axes.set(ylabel=title, xlabel="step")
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        axes.grid(alpha=0.3)
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _series(log_history: list[dict[str, float]], wanted: Callable[[str], bool]) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for entry in log_history:
        for key, value in entry.items():
            if wanted(key):
                series.setdefault(key, []).append((entry["step"], value))
    return series


def _training_fields(args: TrainingArguments) -> dict[str, Any]:
    """The usual fields, our own ones, and all others that differ from their defaults."""
    values = args.to_dict()
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    names = [name for name in values if name in TRAINING_FIELDS or name not in inherited]
    # Those without a default are filled in by transformers itself.
    unset = (None, dataclasses.MISSING)
    names += [name for name in values if name not in names and values[name] != defaults[name] not in unset]
    return {name: values[name] for name in names if name not in _LEFT_OUT}


def _to_json(summary: dict[str, Any]) -> str:
    return json.dumps(summary, indent=2, default=str) + "\n"
