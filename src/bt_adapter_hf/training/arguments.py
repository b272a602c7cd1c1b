"""Training arguments with the released pretraining values as defaults."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from transformers import TrainingArguments

from ..evaluation.controls import check_controls


# Released multipliers (longest match wins): temporal blocks and gates x100, the rest of the branch and the head x10.
RELEASED_LR_MULTIPLIERS = {
    "bt_adapter.": 10.0,
    "mbta_head.": 10.0,
    "bt_adapter.layers.*.temporal.": 100.0,
    "bt_adapter.fusion_gate": 100.0,
    "bt_adapter.output_gate": 100.0,
}


_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


@dataclass
class ResumableArguments(TrainingArguments):
    """Fields of every `ResumableTrainer`.

    Args:
        lr_multipliers (`dict[str, float]`, *optional*):
            Factors on the learning rate by parameter name: a key matches where it occurs in the name (`*` stands for
            anything between two dots), and the longest key that matches wins; without a match the factor is 1. JSON
            on a command line. None by default.
        max_broken (`float`, *optional*, defaults to 0.1):
            Largest share of unusable items (missing or broken files, rows without text) before the run stops.
        chunk_rows (`int`, *optional*, defaults to 10000):
            Rows are shuffled inside chunks of at least this many, and a fetched table needs room for two chunks.
        max_disk (`int`, *optional*, defaults to 50 GB):
            Bytes that the fetched rows of a table that is not on the local disk may take up.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "lr_multipliers"]

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "The batches hold more than the model takes."}
    )
    lr_multipliers: dict | str | None = field(
        default=None, metadata={"help": "Learning rate factors by parameter name, as JSON."}
    )
    max_broken: float = field(default=0.1, metadata={"help": "Largest share of broken items before the run stops."})
    chunk_rows: int = field(default=10_000, metadata={"help": "Smallest number of rows shuffled among each other."})
    max_disk: int = field(default=50 * 10**9, metadata={"help": "Bytes for fetched rows on the local disk."})

    def __post_init__(self):
        super().__post_init__()
        if self.lr_multipliers is None:
            self.lr_multipliers = {}
        if not isinstance(self.lr_multipliers, dict):
            raise ValueError(f"lr_multipliers must be a dict or a JSON object, got {self.lr_multipliers!r}.")
        for pattern, factor in self.lr_multipliers.items():
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
                raise ValueError(f"lr_multipliers[{pattern!r}]={factor!r} must be a number >= 0, and finite.")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not self.num_train_epochs > 0 and self.max_steps < 1:
            raise ValueError(f"num_train_epochs={self.num_train_epochs} must be above 0.")
        for name in ("learning_rate", "max_grad_norm", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a number of at least 0.")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}={value} must be a finite number.")
        if not 0 <= self.max_broken <= 1:
            raise ValueError(f"max_broken={self.max_broken} must be a share between 0 and 1.")
        if self.chunk_rows < 1:
            raise ValueError(f"chunk_rows={self.chunk_rows} must be at least 1.")
        if self.max_disk < 1:
            raise ValueError(f"max_disk={self.max_disk} must be a positive number of bytes.")


@dataclass
class BTAdapterTrainingArguments(ResumableArguments):
    """`ResumableArguments` with other defaults and a few fields more.

    The defaults are those of the released CLIP-L/14 pretraining: AdamW with betas 0.9 and 0.98, weight decay 0.05 on
    every trained parameter, a base learning rate of 2e-6 with the multipliers below, gradients clipped at norm 5, one
    epoch. Its global batch was 8 x 52 clips of 8 frames.

    The schedule is a cosine to zero after a warm-up over the first tenth. The released one rises from 0.05 of the peak
    over the first half of its single epoch and then follows a cosine of so long a period (4.5 epochs) that the rate
    ends at 0.97 of the peak: `lr_scheduler_type="cosine_warmup_with_min_lr", warmup_steps=0.5,
    lr_scheduler_kwargs={"warmup_lr_rate": 0.05, "num_cycles": 1 / 18, "min_lr_rate": 0.0}`.

    What is contrasted with what: each clip with the texts of all clips that are in the same step on any process, so
    `per_device_train_batch_size` times the number of processes. `gradient_accumulation_steps` does not enlarge that:
    every micro-batch is contrasted with itself alone, and their gradients are averaged. What does is a larger
    `per_device_train_batch_size`, and where its activations do not fit, `cached_gradient_batch_size`.

    With the released gate scale (`output_gate_scale=1e4`) the gradient of the output gate alone can exceed the norm
    that is clipped at: all other gradients are then divided by the same factor, which the log gives as `clipped_by`.

    Args:
        lr_multipliers (`dict[str, float]`, *optional*):
            As in `ResumableArguments`; the released factors by default.
        eval_controls (`list[str]`, *optional*, defaults to `["shuffled", "reversed"]`):
            Temporal controls in every evaluation, out of `shuffled`, `reversed`, `one_frame`, `frame_average`: recall
            with the order of the frames, or all but one of them, taken away. An empty list for none.
        eval_shuffle_draws (`int`, *optional*, defaults to 1):
            How many times `shuffled` permutes every clip anew; the metrics are averaged.
        cached_gradient_batch_size (`int`, *optional*):
            Clips per forward pass with a graph: activations of so many clips are in memory, and the gradient is that
            of the whole `per_device_train_batch_size` at the cost of a second forward pass. None to run the batch as
            it is.
        frame_counts (`list[int]`, *optional*):
            Numbers of frames per clip that the model is to serve: one of them is drawn for every step, and the clips
            of that step keep so many of their frames. The data set gives clips of the largest. None to take the clips
            as they come.
    """

    learning_rate: float = field(default=2e-6, metadata={"help": "Base learning rate; see lr_multipliers."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Beta2 of AdamW."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay on every trained parameter."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Gradient norm to clip at; 0 for none."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of passes over the training table."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up steps, or below 1 their share of all steps."})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Drop the last, smaller batch: few clips make a weak contrast."}
    )
    hub_strategy: str = field(
        default="end",
        metadata={"help": "When to push to the Hub: end, every_save, checkpoint or all_checkpoints."},
    )

    lr_multipliers: dict | str | None = field(
        default=None,
        metadata={"help": "Learning rate factors by parameter name, as JSON; the released ones by default."},
    )
    eval_controls: list[str] = field(
        default_factory=lambda: ["shuffled", "reversed"],
        metadata={"help": "Temporal controls: shuffled, reversed, one_frame, frame_average."},
    )
    eval_shuffle_draws: int = field(default=1, metadata={"help": "Permutations of every clip in 'shuffled'."})
    cached_gradient_batch_size: int | None = field(
        default=None, metadata={"help": "Clips per forward pass with a graph, to fit a large contrastive batch."}
    )
    frame_counts: list[int] | None = field(
        default=None, metadata={"help": "Numbers of frames, one of which is drawn for every step."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DDP looks for parameters without a gradient; there are none."}
    )

    def __post_init__(self):
        if self.lr_multipliers is None:
            self.lr_multipliers = dict(RELEASED_LR_MULTIPLIERS)
        super().__post_init__()
        check_controls(self.eval_controls)
        if self.eval_shuffle_draws < 1:
            raise ValueError(f"eval_shuffle_draws={self.eval_shuffle_draws} must be at least 1.")
        if self.frame_counts is not None and (not self.frame_counts or min(self.frame_counts) < 1):
            raise ValueError(f"frame_counts={self.frame_counts} must be numbers of at least 1, or None.")
        if self.cached_gradient_batch_size is not None:
            if self.cached_gradient_batch_size < 1:
                raise ValueError(
                    f"cached_gradient_batch_size={self.cached_gradient_batch_size} must be at least 1, or None."
                )
            if self.torch_compile:
                raise ValueError(
                    "cached_gradient_batch_size does not work with torch_compile: compiled, a pass without a graph "
                    "may draw other dropout than one with a graph. Use one of the two."
                )


@dataclass
class InstructionArguments(ResumableArguments):
    """`ResumableArguments` with the values of the released tuning as defaults.

    These are AdamW with a learning rate of 2e-5 for the projector and the branch alike, without weight decay, a cosine
    after a warm-up over 3 % of the steps, gradients clipped at norm 1, and three epochs. The released global batch was
    8 x 1 conversations.

    Args:
        adapter_only (`bool`, *optional*, defaults to `False`):
            Write only the branch and the projector at the end, as an adapter for `load_bt_adapter`, and not the whole
            model.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "Base learning rate; see lr_multipliers."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay on every trained parameter."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Number of passes over the training table."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps, or below 1 their share of all steps."})
    hub_strategy: str = field(default="end", metadata={"help": "When to push to the Hub."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DDP looks for parameters without a gradient; there are none."}
    )
    adapter_only: bool = field(default=False, metadata={"help": "Write the branch and the projector only."})
