"""Conversations about GIFs at addresses: in TGIF-QA's tables, fetched in bounded disk, resumed to the same losses."""

import json

import pytest

from bt_adapter_hf.data.addresses import Addresses
from bt_adapter_hf.data.conversations import UnusableRow, load_instructions, visuals_of
from bt_adapter_hf.data.instructions import InstructionCollator, InstructionDataset
from bt_adapter_hf.training.arguments import InstructionArguments
from bt_adapter_hf.training.instruction_tuning import InstructionTrainer, prepare_for_tuning
from tests.chat import tiny_gif_qa
from tests.data.packed import file_server


def write_questions(folder, gifs, suffix=".csv"):
    lines = ["gif_name\tquestion\tanswer"]
    lines += [f"{gif}\twhat happens ?\t{'left' if n % 2 else 'right'}" for n, gif in enumerate(gifs)]
    path = folder / f"Train_frameqa_question{suffix}"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_table_of_tgif_qa_is_a_table_of_conversations(tmp_path):
    tiny_gif_qa.write_gif(tmp_path / "a.gif")
    table = load_instructions(write_questions(tmp_path, ["a", "b", ""]))
    assert not table.needs_store and table.shard_rows == [3]
    messages = table.messages(0)
    assert visuals_of(messages, "video") == [str(tmp_path / "a.gif")]
    assert visuals_of(table.messages(1), "video") == [str(tmp_path / "b.gif")]  # which is not there
    assert messages[0]["content"][1]["text"] == "what happens ?"
    assert messages[1]["content"][0]["text"] == "right"
    with pytest.raises(UnusableRow, match="no gif_name"):
        table.messages(2)
    with pytest.raises(ValueError, match="gif_name, question and answer"):
        (tmp_path / "x.csv").write_text("video,text\na.mp4,dog\n")
        load_instructions(tmp_path / "x.csv")


def test_a_list_of_addresses(tmp_path):
    links = tmp_path / "tgif-v1.0.tsv"
    links.write_text("https://38.media.tumblr.com/ab/tumblr_x_400.gif\ta man jumps\nhttps://a.b/tumblr_y.gif\ta cat\n")
    table = load_instructions(write_questions(tmp_path, ["tumblr_x_400", "tumblr_y.gif", "gone"]), media_root=links)
    assert table.needs_store
    assert visuals_of(table.messages(0), "video") == ["https://38.media.tumblr.com/ab/tumblr_x_400.gif"]
    assert visuals_of(table.messages(1), "video") == ["https://a.b/tumblr_y.gif"]
    with pytest.raises(UnusableRow, match="gone is not in the list of addresses"):
        table.messages(2)
    links.write_text("a dog\n")
    with pytest.raises(ValueError, match="line 1 .* 'a'; expected an http"):
        Addresses.read(links)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A table about 32 GIFs at addresses, of which one is gone and one is broken, with the list of them."""
    folder = tmp_path_factory.mktemp("served")
    names = [f"gif{n}" for n in range(32)]
    for n, name in enumerate(names):
        path = tiny_gif_qa.write_gif(folder / f"{name}.gif", frames=3, seed=n)
        path.write_bytes(path.read_bytes() + bytes(20_000))  # what follows the end of a GIF is not read
    (folder / "gif5.gif").write_bytes(b"GIF89a")
    with file_server(folder) as (address, *_):
        (folder / "links.tsv").write_text("".join(f"{address}/{name}.gif\ttext\n" for name in names))
        (folder / "gif7.gif").unlink()
        yield write_questions(folder, names), folder / "links.tsv"


def make_trainer(served, output, monkeypatch, **options):
    from bt_adapter_hf.data import readers

    monkeypatch.setattr(readers, "ROWS_PER_SHARD", 8)
    table, links = served
    model = prepare_for_tuning(tiny_gif_qa.model("mlp"))
    processor = tiny_gif_qa.processor(model.config)
    table = load_instructions(table, media_root=links)
    assert table.shard_rows == [8] * 4
    arguments = {
        "per_device_train_batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0, "logging_steps": 1,
        "save_strategy": "no", "num_train_epochs": 1, "use_cpu": True, "disable_tqdm": True, "report_to": "none",
        "chunk_rows": 8, "max_broken": 0.5, "max_disk": 350_000, **options,
    }  # fmt: skip
    return InstructionTrainer(
        model=model,
        args=InstructionArguments(output_dir=str(output), **arguments),
        train_dataset=InstructionDataset(table, processor, max_length=100, item_timeout=None),
        data_collator=InstructionCollator(processor),
        processing_class=processor,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_training_in_bounded_disk_and_resumed_inside_a_chunk(served, tmp_path, monkeypatch):
    from transformers import TrainerCallback

    sizes = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("shard-*.rows")))
            control.should_training_stop = state.global_step == self.stop

    whole = make_trainer(served, tmp_path / "whole", monkeypatch)
    watch = Watch()
    watch.stop = None
    whole.add_callback(watch)
    whole.train()
    assert len(losses(whole)) == 8 and max(sizes) <= 350_000 < 0.6 * 30 * 20_000
    assert not list(tmp_path.rglob("shard-*.rows"))
    broken = [json.loads(line) for line in (tmp_path / "whole" / "broken_items.jsonl").read_text().splitlines()]
    assert {record["index"] for record in broken} == {5, 7}
    assert any("404" in record["reason"] for record in broken)
    # stopped after three steps: in the middle of the second chunk of two steps
    first = make_trainer(served, tmp_path / "parts", monkeypatch, save_strategy="steps", save_steps=3)
    watch = Watch()
    watch.stop = 3
    first.add_callback(watch)
    first.train()
    second = make_trainer(served, tmp_path / "parts", monkeypatch, save_strategy="steps", save_steps=100)
    second.train(resume_from_checkpoint=True)
    assert losses(second) == pytest.approx(losses(whole), rel=1e-5)
