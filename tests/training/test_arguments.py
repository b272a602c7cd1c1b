import pytest

from bt_adapter_hf.training.arguments import (
    RELEASED_LR_MULTIPLIERS,
    BTAdapterTrainingArguments,
    InstructionArguments,
)
from bt_adapter_hf.training.resumable import warn_of_warmup


def test_defaults_are_the_released_ones(tmp_path):
    args = BTAdapterTrainingArguments(output_dir=tmp_path)
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (2e-6, 0.9, 0.98, 1e-8)
    assert (args.weight_decay, args.max_grad_norm, args.num_train_epochs) == (0.05, 5.0, 1.0)
    assert args.lr_scheduler_type == "cosine" and args.get_warmup_steps(1000) == 100
    assert args.lr_multipliers == RELEASED_LR_MULTIPLIERS


def test_released_schedule_by_arguments(tmp_path):
    """Peak after half of the run, 0.97 of the peak at its end."""
    import torch
    from transformers import get_scheduler

    args = BTAdapterTrainingArguments(
        output_dir=tmp_path, warmup_steps=0.5, lr_scheduler_kwargs={"num_cycles": 1 / 18}
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(100),
        num_training_steps=100,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    rates = []
    for _ in range(101):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert max(rates) == rates[50] == 1.0 and rates[100] == pytest.approx(0.9698, abs=1e-4)


def test_survives_serialisation(tmp_path):
    args = BTAdapterTrainingArguments(output_dir=tmp_path, lr_multipliers='{"bt_adapter.": 3, "mbta_head.": 0.5}')
    assert args.lr_multipliers == {"bt_adapter.": 3, "mbta_head.": 0.5}
    again = BTAdapterTrainingArguments(**{name: args.to_dict()[name] for name in ("output_dir", "lr_multipliers")})
    assert again.lr_multipliers == args.lr_multipliers


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr_multipliers": {"bt_adapter.": -1}}, "must be a number >= 0"),
        ({"lr_multipliers": "fast"}, "must be a dict or a JSON object"),
        ({"eval_controls": ["blind"]}, "Unknown controls"),
        ({"eval_shuffle_draws": 0}, "at least 1"),
        ({"max_broken": 10}, "share between 0 and 1"),
    ],
)
def test_bad_values(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        BTAdapterTrainingArguments(output_dir=tmp_path, **options)


def test_a_run_within_its_warmup_is_told(tmp_path, caplog):
    args = InstructionArguments(output_dir=tmp_path, max_steps=1)
    warn_of_warmup(args, 1)
    assert "All 1 steps of the run lie in its warm-up (of 1)" in caplog.text and "nothing is learned" in caplog.text
    caplog.clear()
    warn_of_warmup(args, 2)
    args.warmup_steps = 0
    warn_of_warmup(args, 1)
    assert not caplog.records
    args.warmup_steps = 5
    warn_of_warmup(args, 4)
    assert "stays below its peak. Train" in caplog.text
