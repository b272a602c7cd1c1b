import json

import pytest
import torch
from PIL import Image
from transformers import set_seed

from bt_adapter_hf.data.broken import BrokenItem, count_reasons, read_broken
from bt_adapter_hf.data.pairs import PairCollator, PairDataset, load_table
from bt_adapter_hf.training.arguments import BTAdapterTrainingArguments
from bt_adapter_hf.training.report import describe_table, mean_loss, plot_losses, write_run_summary
from bt_adapter_hf.training.trainer import BTAdapterTrainer
from tests import tiny_pairs


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def trainer(tmp_path):
    folder = tiny_pairs.write_table(tmp_path / "clips", rows=12).parent
    (folder / "clip3.mp4").unlink()
    (folder / "clip7.mp4").unlink()
    set_seed(0)
    processor, table = tiny_pairs.processor(), load_table(folder)
    args = BTAdapterTrainingArguments(
        output_dir=tmp_path / "out",
        per_device_train_batch_size=4,
        max_steps=6,
        logging_steps=4,
        save_steps=4,
        report_to="none",
        use_cpu=True,
        max_broken=1.0,
        lr_scheduler_type="linear",
        hub_token="secret",
    )
    return BTAdapterTrainer(
        model=tiny_pairs.model(),
        args=args,
        train_dataset=PairDataset(table, processor, training=True, item_timeout=None),
        data_collator=PairCollator(processor),
        processing_class=processor,
    )


def summarise(trainer, **changes):
    described = {"kind": "pretraining", "model": "some/clip", "revision": "abc", "config": {"mask_ratio": 0.7}}
    data = {"train": describe_table(trainer.train_dataset.table)}
    return write_run_summary(trainer, **{**described, "data": data, "seconds": 1.26, **changes})


def test_the_summary_of_a_run(trainer, tmp_path):
    result = trainer.train()
    summary = summarise(trainer, metrics={"eval_t2v_R1": 12.5})
    written = (tmp_path / "out" / "run_summary.json").read_text()
    assert json.loads(written) == json.loads(json.dumps(summary)) and "secret" not in written
    assert summary["finished"] and summary["error"] is None
    assert (summary["steps"], summary["total_steps"], summary["seconds"]) == (6, 6, 1.3)
    assert summary["train_loss"] == pytest.approx(result.training_loss)
    table = trainer.train_dataset.table
    assert summary["data"]["train"] == {"source": table.source, "rows": 12, "fingerprint": table.fingerprint}
    training = summary["training"]
    assert training["seed"] == 42 and training["per_device_train_batch_size"] == 4 and training["max_broken"] == 1.0
    assert training["lr_scheduler_type"] == "linear" and training["lr_multipliers"]["bt_adapter."] == 10
    assert training["save_steps"] == 4 and "output_dir" not in training and "label_smoothing_factor" not in training
    assert summary["broken_items"] == {"train": 2}
    assert summary["broken_reasons"] == {"train": {"<path> does not exist.": 2}}
    trained = [p.numel() for p in trainer.model.parameters() if p.requires_grad]
    assert summary["trained_parameters"] == sum(trained)
    assert summary["processes"] == 1 and summary["device"] == "cpu"
    assert summary["speed"]["clips"] == 24 and summary["speed"]["clips_per_second"] > 0
    assert summary["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert summary["metrics"] == {"eval_t2v_R1": 12.5}


def test_a_resumed_run_is_one_run(trainer, tmp_path):
    trainer.train()
    whole = summarise(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    resumed = summarise(trainer)
    assert resumed["steps"] == 6 and resumed["train_loss"] == whole["train_loss"]
    assert resumed["broken_items"] == whole["broken_items"]
    assert resumed["speed"]["clips"] == 8  # since it was resumed


def test_an_unfinished_run_says_so(trainer):
    summary = summarise(trainer, error="interrupted")
    assert not summary["finished"] and summary["error"] == "interrupted"
    assert summary["train_loss"] is None and summary["speed"] == {}


def test_mean_loss_weighs_entries_by_their_steps():
    history = [{"loss": 4.0, "step": 10}, {"eval_loss": 9.0, "step": 10}, {"loss": 1.0, "step": 15}]
    assert mean_loss(history) == pytest.approx((4.0 * 10 + 1.0 * 5) / 15)
    assert mean_loss([{"train_loss": 1.0, "step": 3}]) is None


def test_broken_items_of_all_processes(tmp_path):
    def item(index, reason):
        return BrokenItem(source="table", index=index, video=f"clip {index}.mp4", reason=reason)

    missing = [item(i, f"/data/my clips/clip {i}.mp4 does not exist.") for i in (1, 2)]
    cut = item(7, "/data/clip 7.mp4 ends early; 12 frames are readable (x).")
    files = {"broken_items.jsonl": [("train", missing[0]), ("train", cut), ("eval", item(1, "it has no text"))]}
    files["broken_items-rank1.jsonl"] = [("train", missing[0]), ("train", missing[1])]  # met by both
    for name, records in files.items():
        lines = [json.dumps({"part": part, **record}) + "\n" for part, record in records]
        (tmp_path / name).write_text("".join(lines))
    broken = read_broken(tmp_path)
    assert {part: len(records) for part, records in broken.items()} == {"train": 3, "eval": 1}
    reasons = count_reasons(broken["train"])
    assert list(reasons.values()) == [2, 1] and list(reasons)[0].endswith("does not exist.")
    assert "clip" not in "".join(reasons) and "N frames are readable" in list(reasons)[1]
    assert read_broken(tmp_path / "elsewhere") == {}


def log_history(evaluations: bool) -> list[dict]:
    history = []
    for step in range(10, 60, 10):
        history.append({"loss": 100 / step, "vtc_loss": 50 / step, "lr_x1": 1e-5, "lr_x10": 1e-4, "step": step})
        if evaluations:
            history.append({"eval_loss": 80 / step, "eval_t2v_R1": step, "eval_shuffled_t2v_R1": 5, "step": step})
    return [*history, {"train_loss": 3.0, "train_runtime": 1.0, "step": 50}]


def test_the_plot(tmp_path, monkeypatch):
    monkeypatch.setenv("DISPLAY", "nowhere:9")
    drawn = []
    from matplotlib.axes import Axes

    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axes, x, y, **k: (drawn.append((k["label"], x, y)), plot(axes, x, y, **k))
    )
    plot_losses(log_history(evaluations=True), tmp_path / "losses.png")
    names = [name for name, _, _ in drawn]
    assert names == ["loss", "vtc_loss", "eval_loss", "lr_x1", "lr_x10", "eval_t2v_R1", "eval_shuffled_t2v_R1"]
    assert drawn[0][1:] == ((10, 20, 30, 40, 50), (10.0, 5.0, 100 / 30, 2.5, 2.0))
    with_recall = Image.open(tmp_path / "losses.png")
    assert len(with_recall.convert("RGB").getcolors(1 << 24)) > 50
    plot_losses(log_history(evaluations=False), tmp_path / "losses.png")
    assert Image.open(tmp_path / "losses.png").height < with_recall.height
    assert [path.name for path in tmp_path.iterdir()] == ["losses.png"]


def test_nothing_to_plot(tmp_path):
    with pytest.raises(ValueError, match="the log holds no loss"):
        plot_losses([{"train_loss": 1.0, "step": 1}], tmp_path / "losses.png")
    assert not list(tmp_path.iterdir())
