"""A short pretraining run, as one process of several or alone: `run_pretraining.py CLIPS OUTPUT '{"batch": 4}'`.

Keys of the options: `batch` per process, `resume`, and any field of `BTAdapterTrainingArguments`. What was logged goes
to `log.json` or `log-resumed.json`, the features of the clips to `features.npz`, the model to `final`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from transformers import set_seed

from bt_adapter_hf.data.pairs import PairCollator, PairDataset, load_table
from bt_adapter_hf.training.arguments import BTAdapterTrainingArguments
from bt_adapter_hf.training.trainer import BTAdapterTrainer
from tests import tiny_pairs


ROOT = Path(__file__).parents[2]


def run(clips: Path, output: Path, batch: int, resume: bool = False, **options) -> BTAdapterTrainer:
    set_seed(0)
    processor = tiny_pairs.processor()
    args = BTAdapterTrainingArguments(
        output_dir=output,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch - 1,
        **{
            "learning_rate": 1e-4,
            "max_steps": 5,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 5,
            "save_steps": 3,
            "use_cpu": True,
            "disable_tqdm": True,
            "warmup_steps": 0,
            "eval_controls": ["reversed", "frame_average"],
            **options,
        },
    )
    tiny_pairs.shard_on_the_cpu()
    table = load_table(clips)
    trainer = BTAdapterTrainer(
        model=tiny_pairs.model(mask_ratio=0.5, vision={"drop_path_rate": 0.4}),
        args=args,
        train_dataset=PairDataset(table, processor, training=True),
        eval_dataset=PairDataset(table, processor, training=False),
        data_collator=PairCollator(processor),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(output / "final")
    found = trainer.predict(trainer.eval_dataset)
    if trainer.is_world_process_zero():
        np.savez(output / "features.npz", ids=found.label_ids, **found.predictions)
        log = {"history": trainer.state.log_history, "distributed": str(trainer.accelerator.distributed_type)}
        log["parameters"] = sorted({type(p).__name__ for p in trainer.model.parameters()})
        (output / f"log{'-resumed' * resume}.json").write_text(json.dumps(log))
    return trainer


def launch(config: str, processes: int, *paths: Path, script: str = __file__, **options) -> dict:
    """What rank 0 logged in a run of a script under `accelerate launch` with a config of ours, on the CPU.

    Args:
        paths: of the script, the output folder as the last one.
    """
    output = paths[-1]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(output.parent / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--config_file", str(ROOT / "examples" / "accelerate_configs" / f"{config}.yaml")]
    command += ["--main_process_port", "0", script, *map(str, paths), json.dumps(options)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-6000:]
    return json.loads((output / f"log{'-resumed' * options.get('resume', False)}.json").read_text())


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[3])).accelerator.end_training()
