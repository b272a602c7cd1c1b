"""Two processes with DDP on the CPU against one process with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = """
import json, sys
from pathlib import Path
from transformers import set_seed
from bt_adapter_hf.data.pairs import PairCollator, PairDataset, load_table
from bt_adapter_hf.training.arguments import BTAdapterTrainingArguments
from bt_adapter_hf.training.trainer import BTAdapterTrainer
from tests import tiny_pairs

clips, out, batch, resume = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "resume"
set_seed(0)
processor = tiny_pairs.processor()
args = BTAdapterTrainingArguments(
    output_dir=out, per_device_train_batch_size=batch, per_device_eval_batch_size=batch - 1, learning_rate=1e-4,
    max_steps=5, logging_steps=1, eval_strategy="steps", eval_steps=5, save_steps=3, use_cpu=True, disable_tqdm=True,
    warmup_steps=0, eval_controls=["reversed"],
)
table = load_table(clips)
trainer = BTAdapterTrainer(
    # neither mask nor stochastic depth, which processes draw on their own
    model=tiny_pairs.model(mask_ratio=0.0, vision={"drop_path_rate": 0.0}),
    args=args,
    train_dataset=PairDataset(table, processor, training=True),
    eval_dataset=PairDataset(table, processor, training=False),
    data_collator=PairCollator(processor),
    processing_class=processor,
)
trainer.train(resume_from_checkpoint=resume or None)
trainer.save_model(out / "final")
if trainer.is_world_process_zero():
    (out / f"log{'-resumed' * resume}.json").write_text(json.dumps(trainer.state.log_history))
"""


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Log histories: one process with batches of 8, two with 4 each, and those two resumed from step 3."""
    from tests import tiny_pairs

    folder = tmp_path_factory.mktemp("processes")
    clips = tiny_pairs.write_table(folder / "clips", rows=18).parent
    (clips / "clip6.mp4").write_bytes(b"")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    runs = [([], "one", 8, "fresh"), (torchrun, "two", 4, "fresh"), (torchrun, "two", 4, "resume")]
    for launcher, name, batch, mode in runs:
        command = [sys.executable, *launcher, str(script), str(clips), str(folder / name), str(batch), mode]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr[-4000:]
        if mode == "fresh" and name == "two":
            for checkpoint in (folder / "two").glob("checkpoint-5"):
                checkpoint.rename(folder / "last")
    found = {name: json.loads((folder / name / "log.json").read_text()) for name in ("one", "two")}
    found["resumed"] = json.loads((folder / "two" / "log-resumed.json").read_text())
    found["folder"] = folder
    return found


def values(log, *names):
    return [tuple(entry[name] for name in names) for entry in log if names[0] in entry]


@pytest.mark.slow
def test_two_processes_learn_what_one_does(logs):
    names = ("loss", "vtc_loss", "mbta_loss", "mbca_loss", "grad_norm")
    one, two = values(logs["one"], *names), values(logs["two"], *names)
    assert len(one) == 5
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=2e-4)


@pytest.mark.slow
def test_recall_is_over_the_features_of_all_processes(logs):
    names = [f"eval_{kind}t2v_R1" for kind in ("", "reversed_")] + ["eval_v2t_MnR", "eval_t2v_MnR", "eval_pairs"]
    (one,), (two,) = values(logs["one"], *names), values(logs["two"], *names)
    assert two == pytest.approx(one, rel=1e-6) and two[-1] == 17  # one of 18 is broken


@pytest.mark.slow
def test_two_processes_resume_where_they_were(logs):
    names = ("loss", "vtc_loss", "mbta_loss", "grad_norm", "learning_rate", "step")
    for a, b in zip(values(logs["two"], *names), values(logs["resumed"], *names), strict=True):
        assert b == pytest.approx(a, rel=1e-6)


@pytest.mark.slow
def test_each_process_lists_what_it_met(logs):
    lines = [line for path in (logs["folder"] / "two").glob("broken_items*.jsonl") for line in path.open()]
    assert {json.loads(line)["index"] for line in lines} == {6}
    assert (logs["folder"] / "two" / "final" / "model.safetensors").is_file()
