"""A training run that records what it sees; also a script, to be launched on several processes and killed.

python tests/training/resume_run.py TABLE OUTPUT_DIR OPTIONS_AS_JSON
"""

import json
import os
import sys
import uuid
from pathlib import Path

from transformers import set_seed

from bt_adapter_hf.data.pairs import PairCollator, PairDataset, load_table
from bt_adapter_hf.training.arguments import BTAdapterTrainingArguments
from bt_adapter_hf.training.checkpoint import last_checkpoint
from bt_adapter_hf.training.trainer import BTAdapterTrainer
from tests import tiny_pairs


# what has to be the same in a run that was resumed; times are not
LOGGED = ("loss", "vtc_loss", "mbta_loss", "mbca_loss", "grad_norm", "learning_rate", "step", "epoch")
EVALUATED = ("eval_loss", "eval_t2v_MnR", "eval_shuffled_v2t_R1", "step", "epoch")


class RecordingTrainer(BTAdapterTrainer):
    """Appends (run, step, rows) of every batch to a file of its process, before it trains on it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._run = uuid.uuid4().hex

    def training_step(self, model, inputs, num_items_in_batch=None):
        line = json.dumps([self._run, self.state.global_step, inputs["pair_ids"].tolist()]) + "\n"
        file = os.open(
            seen_file(self.args.output_dir, self.args.process_index), os.O_CREAT | os.O_APPEND | os.O_WRONLY
        )
        os.write(file, line.encode())  # one write: a kill leaves a whole line or none
        os.close(file)
        return super().training_step(model, inputs, num_items_in_batch)


def seen_file(output_dir, rank=0) -> Path:
    return Path(output_dir) / f"seen-{rank}.jsonl"


def seen_rows(output_dir, processes=1) -> list[int]:
    """Rows in the order of training. A step that was repeated after a kill counts once, and must be the same."""
    of_ranks = []
    for rank in range(processes):
        runs: dict[str, dict[int, list[list[int]]]] = {}
        for line in seen_file(output_dir, rank).read_text().splitlines():
            run, step, rows = json.loads(line)
            runs.setdefault(run, {}).setdefault(step, []).append(rows)
        steps: dict[int, list[list[int]]] = {}
        for of_run in runs.values():
            for step, batches in of_run.items():
                assert all(a == b for a, b in zip(steps.get(step, []), batches, strict=False)), (step, batches)
            steps |= of_run
        assert sorted(steps) == list(range(min(steps), max(steps) + 1))
        of_ranks.append([batch for step in sorted(steps) for batch in steps[step]])
    return [row for batches in zip(*of_ranks, strict=True) for batch in batches for row in batch]


def make_trainer(table, output_dir, *, seed=0, item_seed=0, validation=False, **options) -> RecordingTrainer:
    set_seed(0)
    processor = tiny_pairs.processor()
    arguments = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": seed,
        **options,
    }
    pairs = load_table(table)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    return RecordingTrainer(
        model=tiny_pairs.model(),
        args=BTAdapterTrainingArguments(**arguments),
        train_dataset=PairDataset(pairs, processor, training=True, seed=item_seed),
        eval_dataset=PairDataset(load_table(table), processor, training=False) if validation else None,
        data_collator=PairCollator(processor),
        processing_class=processor,
    )


def logged(history, *names):
    return [tuple(entry[name] for name in names) for entry in history if names[0] in entry]


if __name__ == "__main__":
    table, output_dir, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    trainer = make_trainer(table, output_dir, **options)
    trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))
    if trainer.is_world_process_zero():
        Path(output_dir, "log.json").write_text(json.dumps(trainer.state.log_history))
