import copy
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, set_seed

from bt_adapter_hf import BTAdapterForPreTraining, BTAdapterProcessor, load_bt_adapter
from bt_adapter_hf.data.broken import BrokenItemsError
from bt_adapter_hf.data.pairs import PairCollator, PairDataset, load_table
from bt_adapter_hf.evaluation.controls import reverse_frames, shuffle_frames
from bt_adapter_hf.evaluation.retrieval import retrieval_metrics
from bt_adapter_hf.hub.machine import torch_threads
from bt_adapter_hf.training import resumable
from bt_adapter_hf.training.arguments import RELEASED_LR_MULTIPLIERS, BTAdapterTrainingArguments
from bt_adapter_hf.training.checkpoint import last_checkpoint, load_trained, save_trained
from bt_adapter_hf.training.observability import describe
from bt_adapter_hf.training.resumable import lr_multiplier, parameter_groups
from bt_adapter_hf.training.trainer import BTAdapterTrainer
from tests import tiny_pairs


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return tiny_pairs.write_table(tmp_path_factory.mktemp("clips"), rows=16).parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def make_trainer(clips, output_dir, *, model=None, validation=True, **options) -> BTAdapterTrainer:
    set_seed(0)
    processor = tiny_pairs.processor()
    table = load_table(clips)
    arguments = {
        "output_dir": output_dir,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 6,
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return BTAdapterTrainer(
        model=model or tiny_pairs.model(),
        args=BTAdapterTrainingArguments(**arguments),
        train_dataset=PairDataset(table, processor, training=True, seed=0),
        eval_dataset=PairDataset(table, processor, training=False) if validation else None,
        data_collator=PairCollator(processor),
        processing_class=processor,
    )


def logged(trainer, *names):
    return [tuple(entry[name] for name in names) for entry in trainer.state.log_history if names[0] in entry]


# Parameter groups


def test_longest_matching_key_wins():
    keys = {"bt_adapter.": 10, "bt_adapter.layers.*.temporal.": 100, "bt_adapter.output_gate": 7}
    assert lr_multiplier("vision_model.bt_adapter.layers.11.temporal.attn.q_proj.weight", keys) == 100
    assert lr_multiplier("vision_model.bt_adapter.layers.0.spatial.mlp.fc1.bias", keys) == 10
    assert lr_multiplier("vision_model.bt_adapter.output_gate", keys) == 7
    assert lr_multiplier("text_projection.weight", keys) == 1


def test_groups_hold_every_trained_parameter_once_with_the_released_rates(tmp_path):
    model = tiny_pairs.model()
    args = BTAdapterTrainingArguments(output_dir=tmp_path)
    groups = parameter_groups(model, args)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(trained) == len(rate)
    for name, parameter in trained.items():
        fast = ".temporal." in name or name.endswith("_gate")
        assert rate[id(parameter)] == pytest.approx(2e-4 if fast else 2e-5), name
    assert all(group["weight_decay"] == 0.05 for group in groups)
    for key in RELEASED_LR_MULTIPLIERS:
        assert any(lr_multiplier(name, {key: 5}) == 5 for name in trained), f"{key} matches no parameter"
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model, args)


def test_schedule_moves_all_groups_alike(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, validation=False, max_steps=4, warmup_steps=0.5)
    trainer.train()
    rates = [rate for (rate,) in logged(trainer, "learning_rate")]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 5e-4])  # of the slowest group, x10
    assert trainer.optimizer.param_groups[1]["lr"] == pytest.approx(10 * trainer.optimizer.param_groups[0]["lr"])


# Training


def test_only_the_branch_and_head_learn_and_each_loss_is_logged(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        learned = "bt_adapter." in name or "mbta_head." in name
        if not name.endswith("k_proj.bias"):  # has no gradient
            assert torch.equal(before[name], parameter) != learned, name
    entries = logged(trainer, "loss", "vtc_loss", "mbta_loss", "mbca_loss")
    assert len(entries) == 6
    for loss, vtc, mbta, mbca in entries:
        assert loss == pytest.approx(vtc + 0.1 * mbta + 0.1 * mbca, rel=1e-5)


def test_the_log_says_of_how_many_clips_the_opposite_is_known(clips, tmp_path):
    model = tiny_pairs.model(order_negatives="reversed")
    trainer = make_trainer(clips, tmp_path, model=model, validation=False, max_steps=4, logging_steps=4)
    texts = [text for (text,) in trainer.train_dataset.table.texts()]
    trainer.data_collator.opposites = {text: "another" for text in texts[:4]}
    trainer.train()
    assert logged(trainer, "known_opposites") == [(0.25,)]
    (entry,) = (entry for entry in trainer.state.log_history if "known_opposites" in entry)
    assert "  opposites known of 25%  " in describe(entry)


def test_losses_are_averaged_over_the_window(clips, tmp_path):
    every = make_trainer(clips, tmp_path / "a", validation=False)
    every.train()
    third = make_trainer(clips, tmp_path / "b", validation=False, logging_steps=3)
    third.train()
    means = np.array(logged(every, "vtc_loss", "mbta_loss", "loss")).reshape(2, 3, 3).mean(axis=1)
    np.testing.assert_allclose(np.array(logged(third, "vtc_loss", "mbta_loss", "loss")), means, rtol=1e-5)


def test_accumulation_averages_the_gradients_of_its_parts(clips, tmp_path):
    """Two micro-batches in one step: the gradient is the mean of theirs, and so is the logged loss."""
    gradients = {}

    class Recording(BTAdapterTrainer):
        def _clip_grad_norm(self, model):
            gradients[self.args.output_dir] = {
                name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
            }
            return super()._clip_grad_norm(model)

    model = tiny_pairs.model(mask_ratio=0.0, vision={"drop_path_rate": 0.0})
    trainer = make_trainer(
        clips, str(tmp_path), model=model, validation=False, max_steps=1, gradient_accumulation_steps=2, warmup_steps=0
    )
    trainer.__class__ = Recording
    batches = list(trainer.get_train_dataloader())[:2]
    expected, losses = {}, []
    model.train()
    for batch in batches:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values_videos")}
        loss = model(**inputs).loss
        losses.append(loss.item())
        loss.backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                expected[name] = expected.get(name, 0) + p.grad / 2
        model.zero_grad()
    trainer.train()
    found = gradients[str(tmp_path)]
    assert found.keys() == expected.keys() and len(found) > 20
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_text_config_is_left_as_it_was(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, validation=False, max_steps=1)
    trainer.train()
    config = trainer.model.config.text_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 2, 1)


def test_a_table_smaller_than_a_batch(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, per_device_train_batch_size=17)
    with pytest.raises(
        ValueError, match="The training table has 16 rows, fewer than one batch over all processes .17."
    ):
        trainer.train()


# Evaluation


def test_evaluation_is_retrieval_over_all_features(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, per_device_eval_batch_size=5, eval_controls=["reversed", "frame_average"])
    metrics = trainer.evaluate()
    loader = torch.utils.data.DataLoader(trainer.eval_dataset, 16, collate_fn=trainer.data_collator)
    batch = next(iter(loader))
    model = trainer.model.eval()
    with torch.no_grad():
        text = model.get_text_features(batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
        videos = batch["pixel_values_videos"]
        intact = model.get_video_features(videos).pooler_output
        reverse = model.get_video_features(reverse_frames(videos)).pooler_output
        frames = torch.nn.functional.normalize(model.get_image_features(videos.flatten(0, 1)).pooler_output, dim=-1)
    expected = {f"eval_{name}": value for name, value in retrieval_metrics(text, intact).items()}
    expected["eval_reversed_t2v_R1"] = retrieval_metrics(text, reverse)["t2v_R1"]
    expected["eval_reversed_v2t_R1"] = retrieval_metrics(text, reverse)["v2t_R1"]
    average = retrieval_metrics(text, frames.unflatten(0, (16, 4)).mean(1))
    expected["eval_frame_average_t2v_R1"] = average["t2v_R1"]
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["eval_pairs"] == 16 and np.isfinite(metrics["eval_loss"])
    assert "eval_shuffled_t2v_R1" not in metrics
    assert trainer.state.log_history[-1]["eval_t2v_R1"] == metrics["eval_t2v_R1"]


def test_evaluation_repeats_itself_and_does_not_disturb_training(clips, tmp_path):
    with_evaluation = make_trainer(clips, tmp_path / "a", eval_strategy="steps", eval_steps=2, eval_shuffle_draws=2)
    with_evaluation.train()
    first, second = with_evaluation.evaluate(), with_evaluation.evaluate()
    same = [name for name in first if "_R" in name or "loss" in name]
    assert {name: first[name] for name in same} == {name: second[name] for name in same}
    without = make_trainer(clips, tmp_path / "b", validation=False)
    without.train()
    assert len(logged(with_evaluation, "eval_shuffled_t2v_R1")) >= 3
    assert logged(with_evaluation, "loss")[0] == logged(without, "loss")[0]


def test_shuffled_clips_are_drawn_from_the_seed(clips, tmp_path):
    """The permutations of every draw and batch are those of one generator, which the seed of the run starts."""
    found = {}
    for seed in (42, 43):
        options = {"per_device_eval_batch_size": 6, "eval_controls": ["shuffled"], "eval_shuffle_draws": 2}
        trainer = make_trainer(clips, tmp_path, seed=seed, **options)
        prediction = trainer.predict(trainer.eval_dataset)
        again = trainer.predict(trainer.eval_dataset).predictions
        found[seed] = prediction.predictions
        assert all(np.array_equal(found[seed][name], again[name]) for name in again)
    generator, expected = torch.Generator().manual_seed(42), {"shuffled_0": [], "shuffled_1": []}
    for batch in torch.utils.data.DataLoader(trainer.eval_dataset, 6, collate_fn=trainer.data_collator):
        for features in expected.values():
            videos = shuffle_frames(batch["pixel_values_videos"], None, generator)
            with torch.no_grad():
                features.append(trainer.model.eval().get_video_features(videos).pooler_output)
    for name, features in expected.items():
        np.testing.assert_allclose(found[42][name], torch.cat(features).numpy(), rtol=1e-4, atol=1e-5)
        assert np.abs(found[42][name] - found[43][name]).max() > 1e-3
    assert np.abs(found[42]["shuffled_0"] - found[42]["shuffled_1"]).max() > 1e-3


def test_pretraining_raises_recall(clips, tmp_path):
    """Eight distinct clips can be learned by heart; the frozen CLIP knows none of them."""
    # without mask and stochastic depth: 0.30 to 0.47 of the mean rank before, with five seeds
    model = tiny_pairs.model(mask_ratio=0.0, vision={"drop_path_rate": 0.0})
    options = {"max_steps": 60, "learning_rate": 3e-4, "logging_steps": 20, "per_device_train_batch_size": 16}
    trainer = make_trainer(clips, tmp_path, model=model, **options)
    before = trainer.evaluate()["eval_t2v_MnR"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_t2v_MnR"] < 0.6 * before
    losses = [loss for (loss,) in logged(trainer, "vtc_loss")]
    assert losses[-1] < 0.8 * losses[0]


# Checkpoints


def test_checkpoints_hold_only_what_is_trained(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, save_strategy="steps", save_steps=3, validation=False)
    trainer.train()
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    folder = tmp_path / "checkpoint-3"
    with safe_open(folder / "trained.safetensors", framework="pt") as file:
        assert set(file.keys()) == trained
    assert not list(folder.glob("model*")) and last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")


def test_the_final_model_is_complete_and_loads_anywhere(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model()
    batch = next(iter(trainer.get_eval_dataloader()))
    expected = trainer.model.eval().get_video_features(batch["pixel_values_videos"]).pooler_output
    for cls in (AutoModel, BTAdapterForPreTraining):
        model = cls.from_pretrained(tmp_path).eval()
        assert torch.equal(model.get_video_features(batch["pixel_values_videos"]).pooler_output, expected)
    processor = BTAdapterProcessor.from_pretrained(tmp_path)
    again = processor.video_processor(videos=[clips / "clip0.mp4"], return_tensors="pt")["pixel_values_videos"]
    assert torch.equal(again[0], batch["pixel_values_videos"][0])


def test_the_branch_is_left_as_an_adapter_too(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model()
    branch = trainer.model.vision_model.bt_adapter.state_dict()
    saved = load_file(tmp_path / "adapter" / "bt_adapter.safetensors")
    assert saved.keys() == branch.keys() and all(torch.equal(saved[name], branch[name]) for name in branch)
    backbone = trainer.model.vision_model.vision_model.eval()
    tower = load_bt_adapter(copy.deepcopy(backbone), tmp_path / "adapter").eval()
    batch = next(iter(trainer.get_eval_dataloader()))["pixel_values_videos"]
    trainer.model.eval()
    assert torch.equal(tower(batch).pooler_output, trainer.model.vision_model(batch).pooler_output)


def test_saving_is_tried_before_the_first_step(clips, tmp_path):
    """What is not serialisable in a config is found by saving alone."""
    trainer = make_trainer(clips, tmp_path, max_steps=2)
    trainer.model.config.text_config.note = object()
    with pytest.raises(ValueError, match="could not be saved in the end, as a rehearsal showed .*Nothing was trained"):
        trainer.train()
    assert trainer.state.global_step == 0 and not list(tmp_path.glob(".rehearsal*"))


def test_best_checkpoint_is_loaded_at_the_end(clips, tmp_path):
    trainer = make_trainer(
        clips,
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="t2v_MnR",
        greater_is_better=False,
        learning_rate=3e-2,
    )
    trainer.train()
    assert trainer.evaluate()["eval_t2v_MnR"] == min(value for (value,) in logged(trainer, "eval_t2v_MnR"))


def test_a_half_written_checkpoint_is_passed_over(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, save_strategy="steps", save_steps=2, validation=False, max_steps=4)
    trainer.train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"epo')
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        make_trainer(clips, tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(tmp_path):
    torch.manual_seed(0)
    model = tiny_pairs.model()
    save_trained(model, tmp_path)
    other = tiny_pairs.model()
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    with pytest.raises(ValueError, match="other frozen weights"):
        load_trained(other, tmp_path)
    smaller = tiny_pairs.model(mbta_weight=0.0)
    with pytest.raises(ValueError, match="of another run: of .* 0 are missing .* 4 are unknown here"):
        load_trained(smaller, tmp_path)
    (tmp_path / "trained.safetensors").write_bytes((tmp_path / "trained.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read .* use an earlier checkpoint"):
        load_trained(model, tmp_path)
    with pytest.raises(ValueError, match="holds no trained.safetensors"):
        load_trained(model, tmp_path / "absent")
    assert all(torch.equal(before[name], p) for name, p in other.named_parameters())


# Broken items


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_items_are_counted_and_left_out_of_recall(workers, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(resumable, "available_cores", lambda: 3)
    threads = set()
    folder = tmp_path / "damaged"
    shutil.copytree(clips, folder)
    (folder / "clip5.mp4").write_bytes(b"")
    options = {"dataloader_num_workers": workers, "max_steps": 8, "eval_strategy": "epoch"}
    trainer = make_trainer(folder, tmp_path / "out", **options)
    step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: threads.add(torch.get_num_threads()) or step(*args, **kwargs)
    with torch_threads(torch.get_num_threads()):
        torch.set_num_threads(2 if workers else 1)
        trainer.train()
    assert threads == {1}  # what two workers leave of three cores
    assert trainer.broken_items == {"train": 1, "eval": 1}
    assert [pairs for (pairs,) in logged(trainer, "eval_pairs")] == [15, 15]
    lines = [json.loads(line) for line in (tmp_path / "out" / "broken_items.jsonl").read_text().splitlines()]
    assert sorted((line["part"], line["index"]) for line in lines) == [("eval", 5), ("train", 5)]
    assert all("0 bytes" in line["reason"] for line in lines)
    again = make_trainer(folder, tmp_path / "out", **options)
    again.train()
    assert len((tmp_path / "out" / "broken_items.jsonl").read_text().splitlines()) == 2  # the list of the new run


def test_too_many_broken_items_stop_the_run(clips, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(clips, folder)
    for i in (2, 3, 11):
        (folder / f"clip{i}.mp4").unlink()
    with pytest.raises(BrokenItemsError, match=r"[23] of \d+ items seen of .* more than the allowed share of 10%"):
        make_trainer(folder, tmp_path / "out", validation=False).train()
    make_trainer(folder, tmp_path / "out", validation=False, max_broken=0.2).train()
