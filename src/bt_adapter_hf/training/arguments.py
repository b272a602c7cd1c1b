"""Training arguments with the released pretraining values as defaults."""

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


@dataclass
class BTAdapterTrainingArguments(TrainingArguments):
    """`TrainingArguments` of transformers with other defaults and a few fields more.

    The defaults are those of the released CLIP-L/14 pretraining: AdamW with betas 0.9 and 0.98, weight decay 0.05 on
    every trained parameter, a base learning rate of 2e-6 with the multipliers below, gradients clipped at norm 5, one
    epoch. Its global batch was 8 x 52 clips of 8 frames.

    The schedule is a cosine to zero after a warm-up over the first tenth. The released one warms up over the first
    half of its single epoch and then follows a cosine of so long a period that the rate ends at 0.97 of its peak:
    `warmup_steps=0.5, lr_scheduler_kwargs={"num_cycles": 1 / 18}` gives that curve (but for a warm-up that starts at 0
    instead of 0.05 of the peak).

    Gradient accumulation divides the losses as usual, but every micro-batch is contrasted with itself alone: it does
    not stand in for a larger contrastive batch.

    Args:
        lr_multipliers (`dict[str, float]`, *optional*):
            Factors on the learning rate by parameter name: a key matches where it occurs in the name (`*` stands for
            anything between two dots), and the longest key that matches wins; without a match the factor is 1. JSON
            on a command line. By default the released factors.
        eval_controls (`list[str]`, *optional*, defaults to `["shuffled", "reversed"]`):
            Temporal controls in every evaluation, out of `shuffled`, `reversed`, `one_frame`, `frame_average`: recall
            with the order of the frames, or all but one of them, taken away. An empty list for none.
        eval_shuffle_draws (`int`, *optional*, defaults to 1):
            How many times `shuffled` permutes every clip anew; the metrics are averaged.
        max_broken (`float`, *optional*, defaults to 0.1):
            Largest share of unusable items (missing or broken files, rows without text) before the run stops.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "lr_multipliers"]

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
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "The batches hold more than the model takes."}
    )
    hub_strategy: str = field(
        default="end",
        metadata={"help": "When to push to the Hub; checkpoints hold no full model to push on every save."},
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
    max_broken: float = field(default=0.1, metadata={"help": "Largest share of broken items before the run stops."})

    def __post_init__(self):
        super().__post_init__()
        if self.push_to_hub and self.hub_strategy == "every_save":
            raise ValueError(
                'hub_strategy="every_save" would push a repository without a model: checkpoints hold only what is '
                'trained. Use "end" for the finished model, or "checkpoint" to keep the last checkpoint there too.'
            )
        if self.lr_multipliers is None:
            self.lr_multipliers = dict(RELEASED_LR_MULTIPLIERS)
        if not isinstance(self.lr_multipliers, dict):
            raise ValueError(f"lr_multipliers must be a dict or a JSON object, got {self.lr_multipliers!r}.")
        for pattern, factor in self.lr_multipliers.items():
            if not isinstance(factor, int | float) or factor < 0:
                raise ValueError(f"lr_multipliers[{pattern!r}]={factor!r} must be a number >= 0.")
        check_controls(self.eval_controls)
        if self.eval_shuffle_draws < 1:
            raise ValueError(f"eval_shuffle_draws={self.eval_shuffle_draws} must be at least 1.")
        if not 0 <= self.max_broken <= 1:
            raise ValueError(f"max_broken={self.max_broken} must be a share between 0 and 1.")
