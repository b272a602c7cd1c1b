"""`Trainer(push_to_hub=True)`: what it publishes, and what happens when it cannot."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from safetensors.torch import load_file
from transformers import set_seed

from bt_adapter_hf import BTAdapterModel, BTAdapterProcessor
from bt_adapter_hf.cli.main import main
from bt_adapter_hf.data.pairs import PairCollator, PairDataset, load_table
from bt_adapter_hf.hub.push import PushError
from bt_adapter_hf.training.arguments import BTAdapterTrainingArguments
from bt_adapter_hf.training.trainer import BTAdapterTrainer
from tests import tiny_instructions, tiny_pairs
from tests.chat import saved_hosts
from tests.hub import metadata
from tests.hub.server import TOKEN


pytestmark = [
    pytest.mark.filterwarnings("ignore:Warnings while validating metadata"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),  # of peft
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return tiny_pairs.write_table(tmp_path_factory.mktemp("clips"), rows=8).parent


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Retries without waiting."""
    monkeypatch.setattr("bt_adapter_hf.hub.access.RETRY_WAITS", [0.01, 0.01, 0.01])


def make_trainer(clips, output_dir, **options) -> BTAdapterTrainer:
    set_seed(0)
    processor, table = tiny_pairs.processor(), load_table(clips)
    arguments = {
        "output_dir": output_dir,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "max_steps": 4,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "push_to_hub": True,
        "hub_model_id": "tester/trained",
        "hub_token": TOKEN,
        **options,
    }
    return BTAdapterTrainer(
        model=tiny_pairs.model(),
        args=BTAdapterTrainingArguments(**arguments),
        train_dataset=PairDataset(table, processor, training=True, seed=0),
        eval_dataset=PairDataset(table, processor, training=False),
        data_collator=PairCollator(processor),
        processing_class=processor,
    )


def titles(hub):
    return [
        commit.title for commit in reversed(hub.history("tester/trained")) if "initial" not in commit.title.lower()
    ]


def test_the_end_publishes_model_processor_and_card_and_nothing_else(hub, clips, tmp_path):
    trainer = make_trainer(clips, tmp_path / "run", hub_strategy="end")
    trainer.train()
    assert titles(hub) == []
    trainer.save_model()
    pushed = trainer.push_to_hub(license="mit")
    assert titles(hub) == ["Model save", "End of training"]
    assert hub.head("tester/trained") == pushed.commit
    files = hub.files("tester/trained")
    assert {"model.safetensors", "processor_config.json", "README.md", "modeling_bt_adapter.py"} <= files.keys()
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl")) or "/" in name]
    assert not [name for name, data in files.items() if TOKEN.encode() in data]
    here = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in here if path.name == "training_args.bin" or TOKEN.encode() in path.read_bytes()]
    model = BTAdapterModel.from_pretrained("tester/trained")
    expected = trainer.model.state_dict()
    assert all(tensor.equal(expected[key]) for key, tensor in model.state_dict().items())
    assert BTAdapterProcessor.from_pretrained("tester/trained").video_processor.num_frames == 4
    card = ModelCard(files["README.md"].decode())
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    logged = next(entry for entry in trainer.state.log_history if "eval_t2v_R1" in entry)
    assert metrics["recall_at_1"] == pytest.approx(logged["eval_t2v_R1"], abs=1e-4)
    assert card.data.license == "mit" and "4 steps" in card.text


def test_each_checkpoint_is_one_commit_and_can_be_resumed_from(hub, clips, tmp_path):
    trainer = make_trainer(clips, tmp_path / "run", hub_strategy="checkpoint")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "service-account.json").write_text("{}")
    trainer.train()
    assert not [name for name in hub.files("tester/trained") if "account" in name]
    assert titles(hub) == ["Training in progress, step 2", "Training in progress, step 4"]
    files = hub.files("tester/trained")
    state = {name.removeprefix("last-checkpoint/") for name in files if name.startswith("last-checkpoint/")}
    assert {"trained.safetensors", "optimizer.pt", "trainer_state.json", "data_state.json"} <= state
    assert "training_args.bin" not in state and not [name for name in files if TOKEN.encode() in files[name]]
    assert "processor_config.json" in files
    assert json.loads(files["last-checkpoint/trainer_state.json"])["global_step"] == 4

    # another machine goes on with what is on the Hub, as this one does
    first = next(c.oid for c in hub.history("tester/trained") if c.title.endswith("step 2"))
    folder = snapshot_download("tester/trained", revision=first, allow_patterns="last-checkpoint/*")
    shutil.copytree(f"{folder}/last-checkpoint", tmp_path / "elsewhere" / "checkpoint-2")
    again = make_trainer(clips, tmp_path / "elsewhere", push_to_hub=False)
    again.train(resume_from_checkpoint=True)
    for (name, p), q in zip(trainer.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=0, rtol=0, msg=name)


def test_a_checkpoint_that_cannot_be_pushed_stops_the_run(hub, clips, tmp_path):
    trainer = make_trainer(clips, tmp_path / "run", hub_strategy="every_save")
    hub.fail("unavailable", "/commit/", times=-1)
    with pytest.raises(PushError, match="503 Service Unavailable.*Nothing was published"):
        trainer.train()
    assert trainer.state.global_step == 2 and titles(hub) == []
    # the checkpoint is whole: the run goes on when the Hub is back
    hub.faults.clear()
    again = make_trainer(clips, tmp_path / "run", hub_strategy="every_save")
    again.train(resume_from_checkpoint=True)
    assert titles(hub) == ["Training in progress, step 4"]


def test_a_checkpoint_is_pushed_again_where_the_hub_was_busy(hub, clips, tmp_path):
    trainer = make_trainer(clips, tmp_path / "run", hub_strategy="every_save", max_steps=2)
    fault = hub.fail("unavailable", "/commit/", times=2)
    lost = hub.fail("lost", "/commit/", times=1)
    trainer.train()
    assert fault.hits == 2 and lost.hits == 1
    assert titles(hub) == ["Training in progress, step 2"]


def test_no_training_without_a_repository(hub, clips, tmp_path):
    with pytest.raises(PushError, match="push_to_hub=True, and the Hub refused.*Nothing was trained"):
        make_trainer(clips, tmp_path, hub_model_id="someone-else/trained")
    with pytest.raises(ValueError, match="blocking=False would let a push fail unseen"):
        make_trainer(clips, tmp_path).push_to_hub(blocking=False)


def test_the_card_tells_of_this_run_and_keeps_the_users_own(hub, clips, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# My model\n\nMy words.\n")
    (folder / "run_summary.json").write_text(json.dumps({"kind": "pretraining", "steps": 999, "metrics": {}}))
    trainer = make_trainer(clips, folder, hub_strategy="end", eval_strategy="no", max_steps=2)
    trainer.train()
    trainer.push_to_hub()
    files = hub.files("tester/trained")
    card = ModelCard(files["README.md"].decode())
    assert "My words." in card.text and card.data.license == "cc-by-4.0"
    assert card.data.library_name == "transformers" and "bt-adapter" in card.data.tags
    assert "run_summary.json" not in files  # it is of another run
    # without it, the one of the facts; on the Hub the user's stays
    (folder / "README.md").unlink()
    (folder / "run_summary.json").write_text(json.dumps({"kind": "pretraining", "steps": 2, "train_loss": 1.25}))
    trainer.push_to_hub()
    assert "mean training loss 1.25" in (folder / "README.md").read_text()
    files = hub.files("tester/trained")
    assert "My words." in files["README.md"].decode() and "run_summary.json" in files
    hub.put_files("tester/trained", {"README.md": (folder / "README.md").read_bytes()})
    (folder / "run_summary.json").write_text(json.dumps({"kind": "pretraining", "steps": 2, "train_loss": 1.5}))
    trainer.push_to_hub()
    assert "mean training loss 1.5" in hub.files("tester/trained")["README.md"].decode()


@pytest.mark.parametrize(
    "options", [[], ["--adapter-only"], ["--lora", "--lora-r", "2"]], ids=["whole", "adapter", "lora"]
)
def test_what_finetune_publishes(hub, tmp_path, monkeypatch, capsys, options):
    """By itself and with `bt-adapter push` the same, with a card that is right and whose example runs."""
    native, adapter = saved_hosts.save("llava", tmp_path / "llava")
    hub.put_files("tester/llava", native)
    table = tiny_instructions.write_table(tmp_path / "clips", rows=4)
    argv = ["finetune", "--model", "tester/llava", "--bt-adapter", adapter, "--train", table, "--validation", table]
    argv += ["--output-dir", tmp_path / "tuned", "--batch-size", 2, "--num-frames", 4, "--max-steps", 1, *options]
    argv += ["--set", "use_cpu=true", "--push-to-hub", "tester/trained"]
    assert main([*map(str, argv)]) == 0
    assert titles(hub) == ["Model save"]
    assert main(["push", str(tmp_path / "tuned"), "tester/by-hand"]) == 0
    files, by_hand = hub.files("tester/trained"), hub.files("tester/by-hand")
    by_hand["README.md"] = by_hand["README.md"].replace(b"by-hand", b"trained")
    assert by_hand == files
    assert not [name for name, data in files.items() if TOKEN.encode() in data or name.endswith((".bin", ".pt"))]

    text = files["README.md"].decode()
    assert metadata.problems(text, "model") == ([], ["no license"])
    card = ModelCard(text)
    whole = not options
    relation, library = ("finetune", "transformers") if whole else ("adapter", "bt_adapter_hf")
    assert (card.data.base_model, card.data.base_model_relation) == ("tester/llava", relation)
    assert card.data.library_name == ("peft" if "--lora" in options else library)
    assert (
        card.data.pipeline_tag == ("image-text-to-text" if whole else None) and hub.head("tester/llava") in card.text
    )
    summary = json.loads((tmp_path / "tuned" / "run_summary.json").read_text())
    (result,) = card.data.eval_results
    assert (result.task_type, result.metric_type) == ("video-text-to-text", "loss")
    assert result.metric_value == pytest.approx(summary["metrics"]["eval_loss"], abs=1e-4)
    assert ("The code in this repository" in text) == ("trust_remote_code" in text) == whole

    tiny_pairs.write_clip(tmp_path / "video.mp4", (220, 40, 40), step=2)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    example = re.search(r"installed:\n\n```python\n(.*?)```", text, re.DOTALL)[1]
    names = {}
    exec(compile(example, "card", "exec"), names)
    shown = capsys.readouterr()
    assert "ASSISTANT" in shown.out and "MISSING" not in shown.err
    found = dict(names["model"].named_parameters())
    trained = load_file(tmp_path / "tuned" / "checkpoint-1" / "trained.safetensors")
    assert trained and all(tensor.equal(found[name]) for name, tensor in trained.items())
