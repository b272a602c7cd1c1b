"""A short tuning of a tiny LLaVA, as one process of several or alone.

`run_tuning.py HOST TABLE OUTPUT '{"lora": true}'`. Keys of the options: `lora`, `states` (a folder of frozen states),
`resume`, and any field of `InstructionArguments`. What was logged goes to `log.json`, the result to `final`.
"""

import json
import sys
from pathlib import Path

from bt_adapter_hf.adapters.host_modules import find_tower
from bt_adapter_hf.training.frozen_states import FrozenStates
from bt_adapter_hf.training.instruction_tuning import InstructionTrainer
from tests.tiny_instructions import Host, make_trainer
from tests.training.run_pretraining import launch as launch_script


def run(host: Host, table: Path, output: Path, lora: bool = False, states: str | None = None, **options):
    resume = options.pop("resume", False)
    model = host.model()
    for module in find_tower(model).bt_adapter.modules():  # processes draw on their own what is dropped
        if hasattr(module, "rate"):
            module.rate = 0.0
    trainer: InstructionTrainer = make_trainer(
        host,
        table,
        output,
        model=model,
        lora={"r": 2, "lora_alpha": 4} if lora else None,
        states=None if states is None else FrozenStates(states, model, host.processor()),
        **{"per_device_train_batch_size": 1, "max_steps": 3, "optim": "sgd", **options},
    )
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(output / "final")
    if trainer.is_world_process_zero():
        log = {"history": trainer.state.log_history, "distributed": str(trainer.accelerator.distributed_type)}
        (output / f"log{'-resumed' * resume}.json").write_text(json.dumps(log))
    return trainer


def launch(config: str, processes: int, host: Host, table: Path, output: Path, **options) -> dict:
    """What rank 0 logged in a run under `accelerate launch` with a config of ours, on the CPU."""
    return launch_script(config, processes, host.folder, table, output, script=__file__, **options)


if __name__ == "__main__":
    folder, table, output = map(Path, sys.argv[1:4])
    run(Host("llava", folder, saved=True), table, output, **json.loads(sys.argv[4])).accelerator.end_training()
