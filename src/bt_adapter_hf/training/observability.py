"""What a training run says about itself: speed, waiting for data, learning rates, memory, skipped items."""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length

from ..data.broken import BrokenItemsLog
from .arguments import ResumableArguments


GIB = 2**30


class ObservabilityMixin:
    """Mixed into a `Trainer`: adds to each entry of the training log, so that every `report_to` receives it too.

    - `clips_per_second`: clips of all processes over the time spent in training steps;
    - `data_wait`: share of that time (0-1) in which the process that waits most had no batch to work on;
    - `lr_x1`, `lr_x10`, ...: the learning rate of each parameter group, by its factor on `args.learning_rate`
      (`learning_rate` is that of the first group, as in `Trainer`);
    - `clipped_steps`, `clipped_by`: share (0-1) of the steps whose gradient was cut to `args.max_grad_norm`, and by
      what factor these were shrunk (geometric mean; 1 where none was);
    - `skipped_items`: distinct broken items met so far by any process;
    - `gpu_memory_gib`, `gpu_memory_peak_gib`: allocated tensors, of the fullest device, on CUDA only. The peak is that
      since the start.

    Time for evaluation and checkpoints does not count. The values cover the steps since the previous entry; the last
    step always gets an entry.

    Attributes:
        speed: the same over all entries so far of this process's `train()`: `clips`, `seconds`,
            `clips_per_second`, `data_wait`, and `gpu_memory_peak_gib` on CUDA. Empty before the first entry.
    """

    args: ResumableArguments
    _broken_logs: dict[str, BrokenItemsLog]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_StepObserver(self))
        if self.pop_callback(ProgressCallback) is not None:  # none with `disable_tqdm`, another one in a notebook
            self.add_callback(TrainingProgress())
        self.speed: dict[str, float] = {}
        self._totals = [0.0, 0.0, 0.0]  # clips, seconds, seconds of waiting
        self._learning_rates: dict[str, float] = {}
        self._skipped: set[tuple[str, int]] = set()  # of all processes: source and row
        self._restart_window()

    def _restart_window(self) -> None:
        self._clips, self._waited, self._between_steps = 0, 0.0, 0.0
        self._norms: list[torch.Tensor | float] = []  # of the gradient of each step, before clipping
        self._window_start = self._step_end = time.perf_counter()

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        self._between_steps += time.perf_counter() - self._step_end  # evaluation, checkpoints
        return super().get_batch_samples(self._timed(epoch_iterator), num_batches, device)

    def _timed(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            self._clips += len(batch["input_ids"])
            yield batch

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None:  # DeepSpeed may not know it yet
            self._norms.append(norm.detach() if isinstance(norm, torch.Tensor) else norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._clips:  # the end of a logging window, on every process
            logs |= self._observe()
            self._restart_window()
        super().log(logs, start_time)

    def _observe(self) -> dict[str, float]:
        cuda = self.args.device.type == "cuda"
        memory = torch.cuda.memory_allocated() / GIB if cuda else 0.0
        peak = torch.cuda.max_memory_allocated() / GIB if cuda else 0.0
        # The wait for other processes is none for data: the times are taken before `gather`.
        seconds = time.perf_counter() - self._window_start - self._between_steps
        own = [self._clips, seconds, self._waited, memory, peak]
        every = self.accelerator.gather(torch.tensor([own], dtype=torch.float32, device=self.args.device)).double()
        clips = every[:, 0].sum().item()
        seconds, waited, memory, peak = every[:, 1:].amax(0).tolist()
        self._totals = [old + new for old, new in zip(self._totals, (clips, seconds, waited), strict=True)]
        self.speed = {"clips": int(self._totals[0]), "seconds": self._totals[1], **_rates(*self._totals)}
        gpu = {"gpu_memory_gib": memory, "gpu_memory_peak_gib": peak} if cuda else {}
        if cuda:
            self.speed["gpu_memory_peak_gib"] = peak
        return {
            **_rates(clips, seconds, waited),
            **self._learning_rates,
            **clipping([float(norm) for norm in self._norms], self.args.max_grad_norm),
            "skipped_items": self._count_skipped(),
            **gpu,
        }

    def _count_skipped(self) -> int:
        own = self._broken_logs["train"].broken if "train" in self._broken_logs else {}
        self._skipped.update(gather_object([item for item in own if item not in self._skipped]))
        return len(self._skipped)


def _rates(clips: float, seconds: float, waited: float) -> dict[str, float]:
    return {"clips_per_second": clips / seconds, "data_wait": waited / seconds}


def clipping(norms: Sequence[float], limit: float) -> dict[str, float]:
    """What clipping at `limit` did to gradients of these norms; nothing where there is no limit.

    Returns:
        clipped_steps: share of them above the limit, in 0-1; those that are not finite are left out.
        clipped_by: geometric mean of norm / limit over these, by which all gradients of such a step are divided.
    """
    norms = [norm for norm in norms if math.isfinite(norm)]
    if not norms or not limit:
        return {}
    above = [norm / limit for norm in norms if norm > limit]
    by = math.exp(sum(map(math.log, above)) / len(above)) if above else 1.0
    return {"clipped_steps": len(above) / len(norms), "clipped_by": by}


class _StepObserver(TrainerCallback):
    """Notes what is gone by the time of the log: when the step ended, and the learning rates it was made with."""

    def __init__(self, trainer: ObservabilityMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.speed, self.trainer._totals, self.trainer._skipped = {}, [0.0, 0.0, 0.0], set()
        self.trainer._restart_window()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        base = args.learning_rate
        self.trainer._learning_rates = {
            f"lr_x{group['initial_lr'] / base:g}": float(group["lr"])
            for group in optimizer.param_groups
            if base and "initial_lr" in group  # set by the schedulers of torch and transformers
        }

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._step_end = time.perf_counter()
        if state.global_step >= state.max_steps:
            control.should_log = True


class TrainingProgress(ProgressCallback):
    """A bar over the steps on stderr where that is a terminal, and one line per log entry everywhere."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", disable=None, dynamic_ncols=True
            )

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if state.is_world_process_zero and has_length(eval_dataloader):
            if self.prediction_bar is None:
                self.prediction_bar = tqdm(
                    total=len(eval_dataloader), desc="evaluation", leave=False, disable=None, dynamic_ncols=True
                )
            self.prediction_bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            if line := describe(logs):
                tqdm.write(f"step {state.global_step}/{state.max_steps}  {line}", file=sys.stderr)


def describe(logs: dict[str, float]) -> str:
    """One readable line of a log entry; empty for the figures of the whole run that `Trainer` logs at the end."""
    if "loss" in logs:
        parts = [f"epoch {logs['epoch']:.2f}", *_named(logs, [k for k in logs if k == "loss" or k.endswith("_loss")])]
        if "known_opposites" in logs:
            parts.append(f"opposites known of {logs['known_opposites']:.0%}")
        parts += _named(logs, [k for k in logs if k.startswith("lr_x")] or ["learning_rate"])
        if "clips_per_second" in logs:
            parts += [f"{logs['clips_per_second']:.4g} clips/s", f"waiting for data {logs['data_wait']:.0%}"]
        if logs.get("clipped_steps"):
            parts.append(f"clipped {logs['clipped_steps']:.0%} of steps by {logs['clipped_by']:.3g}")
        if "gpu_memory_peak_gib" in logs:
            parts.append(f"GPU {logs['gpu_memory_gib']:.1f} GiB, peak {logs['gpu_memory_peak_gib']:.1f}")
        if logs.get("skipped_items"):
            parts.append(f"skipped {logs['skipped_items']}")
        return "  ".join(parts)
    scores = {k.removeprefix("eval_"): value for k, value in logs.items() if k.startswith("eval_")}
    names = [name for name in scores if not name.endswith(("runtime", "per_second"))]
    return "  ".join(["evaluation", *_named(scores, names)]) if names else ""


def _named(logs: dict[str, float], keys: Iterable[str]) -> list[str]:
    return [f"{key} {logs[key]:.4g}" for key in keys]
