"""Instruction tuning: what learns, the loss, resuming, and what is written at the end."""

import itertools
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Config, set_seed

from bt_adapter_hf import (
    BTAdapterLlavaForConditionalGeneration,
    BTAdapterLlavaProcessor,
    get_bt_adapter_model,
    load_bt_adapter,
    quantization_config,
)
from bt_adapter_hf.adapters.host_modules import find_tower
from bt_adapter_hf.assets import default_chat_model_path
from bt_adapter_hf.data.broken import BrokenItemsError
from bt_adapter_hf.data.instructions import InstructionCollator, InstructionDataset, load_instructions
from bt_adapter_hf.data.moving_digits import MOTIONS, opposite, write_clips
from bt_adapter_hf.training.frozen_states import FrozenStates, build_states, plan_states
from bt_adapter_hf.training.instruction_tuning import (
    InstructionArguments,
    InstructionTrainer,
    prepare_for_tuning,
    projector_path,
)
from tests import tiny_instructions
from tests.chat import tiny_hosts
from tests.tiny_instructions import Host, losses, make_trainer


# peft asks transformers by names that the latter deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

LORA = {"r": 2, "lora_alpha": 4}


@pytest.fixture(scope="module", params=list(tiny_instructions.CLASSES))
def host(request, tmp_path_factory):
    return Host(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return Host("llava", tmp_path_factory.mktemp("llava-alone"))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return tiny_instructions.write_table(tmp_path_factory.mktemp("clips"))


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# -------------------------------------------------------------------------------------------------------- what learns


def test_branch_and_projector_learn_and_nothing_else(host, table, tmp_path):
    trainer = make_trainer(host, table, tmp_path, max_steps=2)
    before = values(trainer.model)
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    projector = projector_path(trainer.model)
    learning = {name for name in before if ".bt_adapter." in f".{name}" or name.startswith(projector)}
    assert changed <= learning and any(name.startswith(projector) for name in changed)
    # biases of the keys have no effect, and others move less than float32 shows
    still = {name for name in learning - changed if not name.endswith("k_proj.bias")}
    assert not still, still
    assert len(losses(trainer)) == 2


def test_lora_learns_with_them_and_comes_back_whole(host, table, tmp_path):
    trainer = make_trainer(host, table, tmp_path, lora=LORA, max_steps=3)
    before = values(trainer.model)
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    for part in ("lora_B", ".bt_adapter.", projector_path(trainer.model.get_base_model()).rpartition(".")[2]):
        assert any(part in name for name in changed), part
    trainer.save_model()
    assert {path.name for path in tmp_path.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "bt_adapter_config.json",
        "processor_config.json",
    }
    again = load_bt_adapter(host.model(), tmp_path).eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    assert batch.pop("broken") == []
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, trainer.model(**batch).logits)


def test_rates_of_parts(llava, table, tmp_path):
    """0 leaves a part as it is, as the released tuning leaves the gate."""
    rates = {"bt_adapter.fusion_gate": 0, "multi_modal_projector": 10}
    trainer = make_trainer(llava, table, tmp_path, max_steps=1, lr_multipliers=rates)
    before = values(trainer.model)
    trainer.train()
    gate = "model.vision_tower.bt_adapter.fusion_gate"
    assert torch.equal(before[gate], trainer.model.get_parameter(gate))
    assert sorted(group["initial_lr"] for group in trainer.optimizer.param_groups) == pytest.approx([0, 1e-3, 1e-2])


def test_defaults_are_those_of_the_released_tuning(tmp_path):
    args = InstructionArguments(output_dir=tmp_path, use_cpu=True)
    found = (args.learning_rate, args.num_train_epochs, args.warmup_steps, args.weight_decay, args.max_grad_norm)
    assert found == (2e-5, 3, 0.03, 0, 1.0)
    assert args.lr_scheduler_type == "cosine" and args.lr_multipliers == {} and "adamw" in args.optim


def test_half_precision_with_what_learns_in_float32(llava, table, tmp_path):
    model = llava.model(dtype=torch.bfloat16)
    trainer = make_trainer(llava, table, tmp_path, model=model, bf16=True, max_steps=2)
    dtypes = {(p.requires_grad, p.dtype) for p in trainer.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    trainer.train()
    expected = make_trainer(llava, table, tmp_path / "whole", max_steps=2)
    expected.train()
    assert losses(trainer) == pytest.approx(losses(expected), rel=0.05)
    trainer.save_model()
    again = llava.model_class.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_qlora(tmp_path, table, monkeypatch):
    pytest.importorskip("bitsandbytes")
    text = tiny_hosts.text_config()  # as wide as bitsandbytes' blocks
    for name, value in {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}.items():
        setattr(text, name, value)
    monkeypatch.setattr(tiny_hosts, "text_config", lambda: text)
    host = Host("llava", tmp_path / "host")
    options = {"quantization_config": quantization_config(load_in_4bit=True), "dtype": torch.bfloat16}
    with pytest.raises(ValueError, match="language model is quantized: it takes LoRA"):
        prepare_for_tuning(host.model(**options))
    model = host.model(**options)
    trainer = make_trainer(host, table, tmp_path / "out", model=model, lora=LORA, bf16=True, max_steps=2)
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    again = load_bt_adapter(host.model(**options), tmp_path / "out")
    assert isinstance(again, peft.PeftModel)


# ----------------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_the_mean_over_the_tokens_of_answers(host, table, tmp_path):
    """Not over conversations, whose answers differ in length."""
    trainer = make_trainer(host, table, tmp_path, max_steps=1)
    trainer.model.eval()
    items = [trainer.train_dataset[i] for i in range(2)]
    total = count = 0
    for item in items:
        batch = trainer.data_collator([item])
        batch.pop("broken")
        labels = batch.pop("labels")[0]
        with torch.no_grad():
            logits = trainer.model(**batch).logits[0]
        for place in range(1, len(labels)):
            if labels[place] != -100:
                total -= torch.log_softmax(logits[place - 1].float(), dim=-1)[labels[place]].item()
                count += 1
    batch = trainer.data_collator(items)
    batch.pop("broken")
    assert count == (batch["labels"] != -100).sum()
    with torch.no_grad():
        assert trainer.model(**batch).loss.item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("name", ["llava", "instructblip"])
def test_accumulation_is_the_whole_batch(name, table, tmp_path):
    host, found = Host(name, tmp_path / "host"), {}
    for accumulated in (1, 4):
        model = host.model()
        find_tower(model).bt_adapter.apply(lambda m: setattr(m, "rate", 0.0) if hasattr(m, "rate") else None)
        trainer = make_trainer(
            host, table, tmp_path / str(accumulated), model=model, max_steps=2, optim="sgd",
            per_device_train_batch_size=4 // accumulated, gradient_accumulation_steps=accumulated,
        )  # fmt: skip
        trainer.train()
        found[accumulated] = losses(trainer), values(trainer.model)
    assert found[4][0] == pytest.approx(found[1][0], rel=1e-5)
    for key, value in found[1][1].items():
        torch.testing.assert_close(found[4][1][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora", [None, LORA])
def test_activation_checkpointing_changes_nothing(llava, table, tmp_path, lora):
    found = []
    for checkpointing in (False, True):
        options = {"max_steps": 2, "activation_checkpointing": checkpointing}
        trainer = make_trainer(llava, table, tmp_path / str(checkpointing), lora=lora, **options)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_evaluation_measures_the_loss(llava, table, tmp_path):
    trainer = make_trainer(
        llava, table, tmp_path, validation=table, eval_strategy="steps", eval_steps=6, learning_rate=1e-2
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged[-1] < before


def test_words_and_images_alone_are_learned_from_too(host, tmp_path):
    """Each in a batch of its own: the loss is that of the batch, though a blank video goes with it."""
    path = tiny_instructions.write_mixed_table(tmp_path / "mixed", ["text", "image", "video", "text"])
    trainer = make_trainer(host, path, tmp_path / "out", max_steps=4, per_device_train_batch_size=1, learning_rate=0)
    trainer.model.train()
    found = {}
    for row, kind in enumerate(["text", "image", "video"]):
        batch = trainer.data_collator([trainer.train_dataset[row]])
        assert batch.pop("broken") == []
        learned = trainer.compute_loss(trainer.model, {**batch, "broken": []})
        learned.backward()
        found[kind] = [p.grad for p in trainer.model.parameters() if p.requires_grad]
        assert all(gradient is not None for gradient in found[kind]), kind
        trainer.model.zero_grad()
        with torch.no_grad():
            plain = trainer.model(**batch).loss.item()
        assert learned.item() == pytest.approx(plain, rel=1e-5) or kind == "video", kind  # whose paths drop out
    assert all(not gradient.any() for gradient in found["text"])  # nothing of what is said depends on what is seen
    assert any(gradient.any() for gradient in found["image"])  # the projector
    trainer.train()
    assert len(losses(trainer)) == 4 and not any(trainer.broken_items.values())


@pytest.mark.parametrize(
    "options", [{"activation_checkpointing": True}, {"lora": LORA, "activation_checkpointing": True}, {"lora": LORA}]
)
def test_mixtures_with_every_switch(options, llava, tmp_path):
    path = tiny_instructions.write_mixed_table(tmp_path / "mixed", ["text", "image", "video", "text"])
    trainer = make_trainer(llava, path, tmp_path / "out", max_steps=4, per_device_train_batch_size=1, **options)
    trainer.train()
    assert len(losses(trainer)) == 4


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("lora", [None, LORA])
def test_resumes_with_the_same_losses(llava, table, tmp_path, lora):
    whole = make_trainer(llava, table, tmp_path / "whole", lora=lora)
    whole.train()
    options = {"lora": lora, "save_strategy": "steps", "save_steps": 2}
    cut = make_trainer(llava, table, tmp_path / "cut", **options)
    cut.train()
    for step in (4, 6):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}")
    files = {path.name for path in (tmp_path / "cut" / "checkpoint-2").iterdir()}
    assert "trained.safetensors" in files and not any(name.startswith(("model", "adapter_")) for name in files)
    saved = load_file(tmp_path / "cut" / "checkpoint-2" / "trained.safetensors")
    assert saved.keys() == {name for name, p in cut.model.named_parameters() if p.requires_grad}
    again = make_trainer(llava, table, tmp_path / "cut", **options)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(whole)  # the log of before comes with the checkpoint
    for (name, a), (_, b) in zip(again.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_other_settings_are_refused_at_resume(llava, table, tmp_path):
    """Of LoRA those, too, that no shape tells apart."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(llava, table, tmp_path, lora={"r": 2, "lora_alpha": 4}, **options).train()
    with pytest.raises(ValueError, match="lora_alpha=4, now 8"):
        make_trainer(llava, table, tmp_path, lora={"r": 2, "lora_alpha": 8}, **{**options, "max_steps": 2}).train(True)
    trainer = make_trainer(llava, table, tmp_path, lora={"r": 2, "lora_alpha": 4}, **{**options, "max_steps": 2})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_another_table_is_refused_at_resume(llava, table, tmp_path):
    make_trainer(llava, table, tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=2).train()
    other = table.with_name("other.jsonl")
    other.write_text("".join(itertools.islice(table.open(), 6)))
    with pytest.raises(ValueError, match="fingerprint"):
        make_trainer(llava, other, tmp_path / "out").train(resume_from_checkpoint=True)


# ----------------------------------------------------------------------------------------------------- what is written


def test_the_whole_model_and_the_adapter_alone(host, table, tmp_path):
    trainer = make_trainer(host, table, tmp_path / "whole", max_steps=2)
    trainer.train()
    trainer.save_model()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    batch.pop("broken")
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**batch).logits
        whole = host.model_class.from_pretrained(tmp_path / "whole")
        trained, loaded = trainer.model.state_dict(), whole.state_dict()
        assert trained.keys() == loaded.keys() and all(torch.equal(trained[key], loaded[key]) for key in trained)
        # the same weights at other addresses: sums of some hundred terms may be rounded otherwise
        torch.testing.assert_close(whole(**batch).logits, expected, atol=1e-5, rtol=1e-5)
        trainer.args.adapter_only = True
        trainer.save_model(tmp_path / "adapter")
        files = {path.name for path in (tmp_path / "adapter").iterdir()}
        assert {"bt_adapter.safetensors", "bt_adapter_config.json", "processor_config.json"} <= files
        assert "model.safetensors" not in files
        plugged = host.model_class.from_pretrained(host.native, bt_adapter=tmp_path / "adapter")
        assert torch.equal(plugged(**batch).logits, expected)
    processor = host.processor_class.from_pretrained(tmp_path / "whole")
    assert processor.video_processor.num_frames == 4


def test_broken_items_are_counted_and_stop_the_run(llava, table, tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(table.parent, folder)
    (folder / "clip1.mp4").write_bytes(b"no video")
    trainer = make_trainer(llava, folder / "train.jsonl", tmp_path / "out", max_steps=4, max_broken=0.2)
    trainer.train()
    (record,) = [json.loads(line) for line in (tmp_path / "out" / "broken_items.jsonl").open()]
    assert record["index"] == 1 and record["video"].endswith("clip1.mp4")
    assert trainer.broken_items == {"train": 1}
    for name in ("clip2.mp4", "clip3.mp4"):
        (folder / name).unlink()
    with pytest.raises(BrokenItemsError, match="of 8 items seen"):
        make_trainer(llava, folder / "train.jsonl", tmp_path / "out", max_steps=4, max_broken=0.2).train()


def test_models_that_cannot_be_tuned(llava, table, tmp_path):
    with pytest.raises(ValueError, match="is no chat model with a BT-Adapter"):
        prepare_for_tuning(tiny_hosts.llava())
    t5 = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=32, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="is a t5, an encoder with a decoder"):
        prepare_for_tuning(get_bt_adapter_model(tiny_hosts.instructblip(t5)))
    with pytest.raises(ValueError, match="adapter_only would leave LoRA out"):
        make_trainer(llava, table, tmp_path, lora=LORA, adapter_only=True)


# -------------------------------------------------------------------------------------------------- that it is learned


def conversations(folder: Path, split: str, clips: int, seed: int):
    """A table in which every motion is called by the name of its opposite."""
    write_clips(folder, split, clips, seed=seed, formats=("mp4",))
    rows = []
    for line in (folder / "metadata.jsonl").open():
        facts = json.loads(line)
        question = [{"type": "video", "path": facts["file_name"]}, {"type": "text", "text": "How does it move?"}]
        answer = f"it {MOTIONS[opposite(facts['motion'])]}"
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_instructions(path)


@torch.inference_mode()
def share_right(model, processor, table) -> float:
    messages = [table.messages(row) for row in range(len(table))]
    inputs = processor.apply_chat_template(
        [m[:1] for m in messages], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    output = model.eval().generate(**inputs, max_new_tokens=16, do_sample=False)
    answers = processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
    return sum(a == m[1]["content"][0]["text"] for a, m in zip(answers, messages, strict=True)) / len(messages)


@pytest.mark.slow
def test_a_few_clips_change_what_the_model_says(tmp_path):
    """Sixteen steps on the model inside the package, whose language model stays: it is what is seen that changes."""
    pytest.importorskip("sklearn")
    processor = BTAdapterLlavaProcessor.from_pretrained(default_chat_model_path())
    model = BTAdapterLlavaForConditionalGeneration.from_pretrained(default_chat_model_path(), dtype=torch.float32)
    seen, unseen = conversations(tmp_path / "a", "train", 24, 1), conversations(tmp_path / "b", "test", 12, 7)
    assert share_right(model, processor, unseen) == 0
    model = prepare_for_tuning(model)
    plan = plan_states(tmp_path / "states", model, processor, seen.videos(), "bf16")
    build_states(plan, model, processor)
    set_seed(0)
    trainer = InstructionTrainer(
        model=model,
        args=InstructionArguments(
            output_dir=tmp_path / "out", max_steps=16, per_device_train_batch_size=6, learning_rate=2e-3,
            warmup_steps=0, logging_steps=4, save_strategy="no", use_cpu=True, disable_tqdm=True, report_to="none",
        ),
        train_dataset=InstructionDataset(
            seen, processor, max_length=1024, states=FrozenStates(tmp_path / "states", model, processor)
        ),
        data_collator=InstructionCollator(processor),
        processing_class=processor,
    )  # fmt: skip
    trainer.train()
    found = losses(trainer)
    assert found[-1] < 0.1 * found[0]
    assert share_right(model, processor, seen) == 1
    assert share_right(model, processor, unseen) >= 0.8
