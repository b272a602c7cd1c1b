import signal

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments

from bt_adapter_hf.training.interruption import StopAtInterrupt
from tests import tiny_pairs


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """In the background of a shell Ctrl-C is ignored from the start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class PressCtrlC(TrainerCallback):
    def __init__(self, times: int):
        self.times = times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)  # to this thread: two by kill may arrive as one


def train(output_dir, times: int) -> tuple[Trainer, StopAtInterrupt]:
    stop = StopAtInterrupt()
    processor = tiny_pairs.processor()
    texts = processor(text=["a"] * 2, padding=True, return_tensors="pt")
    inputs = {**texts, **processor(videos=[[tiny_frame()] * 4] * 2, return_tensors="pt")}
    args = TrainingArguments(
        output_dir=output_dir, max_steps=5, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        tiny_pairs.model(), args, train_dataset=[0] * 8, data_collator=lambda _: dict(inputs),
        callbacks=[stop, PressCtrlC(times)],
    )  # fmt: skip
    try:
        trainer.train()
    finally:
        stop.restore()
    return trainer, stop


def tiny_frame():
    import numpy as np

    return np.zeros((16, 16, 3), np.uint8)


def test_once_ends_after_the_step_with_a_checkpoint(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    trainer, stop = train(tmp_path, times=1)
    assert stop.interrupted and trainer.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()
    assert signal.getsignal(signal.SIGINT) is before


def test_twice_ends_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, times=2)
    assert signal.getsignal(signal.SIGINT) is before and not list(tmp_path.glob("checkpoint-*"))


def test_without_an_interrupt_nothing_changes(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    trainer, stop = train(tmp_path, times=0)
    assert not stop.interrupted and trainer.state.global_step == 5 and signal.getsignal(signal.SIGINT) is before
