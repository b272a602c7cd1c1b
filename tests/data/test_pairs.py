import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from bt_adapter_hf import load_video
from bt_adapter_hf.data.broken import BrokenItemsError, BrokenItemsLog
from bt_adapter_hf.data.pairs import PairCollator, PairDataset, load_opposites, load_table, random_crop_box
from tests import tiny_pairs


@pytest.fixture(scope="module")
def processor():
    return tiny_pairs.processor()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return tiny_pairs.write_table(tmp_path_factory.mktemp("clips")).parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


# Items and batches


def test_validation_items_are_what_the_processor_makes(clips, processor):
    dataset = PairDataset(load_table(clips), processor, training=False)
    item = dataset[3]
    expected = processor.video_processor(videos=[clips / "clip3.mp4"], return_tensors="pt")["pixel_values_videos"][0]
    assert torch.equal(item["pixel_values_videos"], expected) and expected.shape == (4, 3, 16, 16)
    assert (item["text"], item["pair_id"], item["broken"]) == ("grey goes right 3", 3, [])
    assert len(PairDataset(load_table(clips), processor, training=False, num_frames=2)[0]["pixel_values_videos"]) == 2


def test_training_chance_depends_on_seed_epoch_and_index_only(clips, processor):
    def pixels(seed, epoch, index, **options):
        dataset = PairDataset(load_table(clips), processor, training=True, seed=seed, **options)
        dataset[5]  # what was asked before must not matter
        return dataset[epoch, index]["pixel_values_videos"]

    for options in ({}, {"crop_scale": (0.3, 1.0)}):
        reference = pixels(0, 1, 2, **options)
        assert torch.equal(reference, pixels(0, 1, 2, **options))
        others = [pixels(seed, epoch, 2, **options) for seed, epoch in ((0, 2), (0, 3), (1, 1), (2, 1))]
        assert sum(not torch.equal(reference, other) for other in others) >= 2


def test_jitter_draws_the_released_training_indices(clips, processor):
    dataset = PairDataset(load_table(clips), processor, training=True, seed=3)
    generator = np.random.default_rng([3, 0, 1])
    generator.integers(1)  # the caption
    frames, _ = load_video(clips / "clip1.mp4", num_frames=4, sampling="jitter", generator=generator)
    expected = processor.video_processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
    assert torch.equal(dataset[1]["pixel_values_videos"], expected["pixel_values_videos"][0])


def test_one_crop_box_for_all_frames(tmp_path, processor):
    tiny_pairs.write_clip(tmp_path / "still.mp4", (250, 250, 250), step=0)
    (tmp_path / "t.jsonl").write_text(json.dumps({"video": "still.mp4", "text": "x"}))
    dataset = PairDataset(load_table(tmp_path / "t.jsonl"), processor, training=True, crop_scale=(0.1, 0.5))
    crops = []
    for epoch in range(4):
        frames = dataset[epoch, 0]["pixel_values_videos"]
        assert (frames - frames[:1]).abs().max() < 0.15  # the same picture four times, up to the codec
        crops.append(frames[0])
    assert (crops[0] - crops[1]).abs().max() > 0.5


def test_random_crop_boxes():
    generator = np.random.default_rng(0)
    boxes = np.array([random_crop_box(90, 120, (0.08, 1.0), generator) for _ in range(2000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 90).all() and (left + width <= 120).all()
    areas, aspects = height * width / (90 * 120), width / height
    assert areas.min() < 0.1 and areas.max() > 0.85 and 0.7 < aspects.min() < 0.8 and 1.25 < aspects.max() < 1.42
    assert random_crop_box(10, 1000, (1.0, 1.0), generator) == (0, 495, 10, 10)  # nothing fits: the centre square


def test_caption_lists(clips, processor, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"video": str(clips / "clip0.mp4"), "text": ["one", "two", "three"]}))
    table = load_table(tmp_path / "t.jsonl")
    training = PairDataset(table, processor, training=True)
    seen = set()
    for epoch in range(20):
        seen.add(training[epoch, 0]["text"])
    assert seen == {"one", "two", "three"}
    assert PairDataset(table, processor, training=False)[0]["text"] == "one"


def test_group_by_caption(clips, processor, tmp_path):
    lines = [{"video": str(clips / f"clip{i}.mp4"), "text": text} for i, text in enumerate(["b", "a", "b", "b"])]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    table = load_table(tmp_path / "t.jsonl")
    grouped = PairDataset(table, processor, training=False, group_by_caption=True)
    assert [grouped[i]["pair_id"] for i in range(4)] == [0, 1, 0, 0]
    assert [PairDataset(table, processor, training=False)[i]["pair_id"] for i in range(4)] == [0, 1, 2, 3]


def test_batches(clips, processor):
    dataset = PairDataset(load_table(clips), processor, training=False)
    batch = PairCollator(processor)([dataset[0], dataset[1]])
    assert batch["pixel_values_videos"].shape == (2, 4, 3, 16, 16) and batch["pair_ids"].tolist() == [0, 1]
    expected = processor.tokenizer(["red goes right 0", "green goes right 1"], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    short = PairCollator(processor, max_text_length=6)([dataset[0]])
    assert short["input_ids"].shape == (1, 6) and short["input_ids"][0, -1] == processor.tokenizer.eos_token_id


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing_and_see_the_epoch(clips, processor, workers):
    dataset = PairDataset(load_table(clips), processor, training=True, crop_scale=(0.3, 1.0))
    pairs = [(epoch, row) for epoch in range(2) for row in range(8)]
    options = {"batch_size": 4, "sampler": pairs, "collate_fn": PairCollator(processor)}
    expected = list(torch.utils.data.DataLoader(dataset, **options))
    found = list(torch.utils.data.DataLoader(dataset, num_workers=workers, **options))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a["pixel_values_videos"], b["pixel_values_videos"])
        assert torch.equal(a["input_ids"], b["input_ids"])
    assert not torch.equal(found[0]["pixel_values_videos"], found[2]["pixel_values_videos"])


def test_bad_options(clips, processor):
    table = load_table(clips)
    with pytest.raises(ValueError, match="num_frames=0"):
        PairDataset(table, processor, training=True, num_frames=0)
    with pytest.raises(ValueError, match="0 < smallest <= largest <= 1"):
        PairDataset(table, processor, training=True, crop_scale=(0.5, 2.0))
    with pytest.raises(ValueError, match="training only"):
        PairDataset(table, processor, training=False, crop_scale=(0.5, 1.0))
    with pytest.raises(ValueError, match="tokenizer's limit of 24"):
        PairCollator(processor, max_text_length=77)


# Broken items


@pytest.fixture
def damaged(clips, tmp_path):
    """Eight rows of which four cannot be used: no file, no bytes, garbage, no text."""
    folder = tmp_path / "damaged"
    shutil.copytree(clips, folder)
    (folder / "clip1.mp4").unlink()
    (folder / "clip2.mp4").write_bytes(b"")
    (folder / "clip4.mp4").write_bytes(b"not a video at all" * 50)
    records = rows(folder)
    records[6]["text"] = " "
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_items_are_replaced_and_reported(damaged, processor, workers):
    dataset = PairDataset(load_table(damaged), processor, training=True)
    loader = torch.utils.data.DataLoader(dataset, 4, collate_fn=PairCollator(processor), num_workers=workers)
    batches = list(loader)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4]
    assert [batch["pair_ids"].tolist() for batch in batches] == [[0, -1, -1, 3], [-1, 5, -1, 7]]
    reasons = {record["index"]: record["reason"] for batch in batches for record in batch["broken"]}
    assert set(reasons) == {1, 2, 4, 6}
    assert "does not exist" in reasons[1] and "0 bytes" in reasons[2] and reasons[4] and "no text" in reasons[6]
    again = list(loader)
    assert all(
        torch.equal(a["pixel_values_videos"], b["pixel_values_videos"]) for a, b in zip(batches, again, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_table_without_a_usable_item_stops(tmp_path, processor, workers):
    lines = [{"video": f"absent{i}.mp4", "text": "x"} for i in range(5)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    dataset = PairDataset(load_table(tmp_path / "t.jsonl"), processor, training=True)
    loader = torch.utils.data.DataLoader(dataset, 2, collate_fn=PairCollator(processor), num_workers=workers)
    with pytest.raises(BrokenItemsError, match=r"^None of 5 items .*absent0.mp4 \(row 0\): .* does not exist"):
        list(loader)


def record(index: int) -> dict:
    return {"source": "t", "index": index, "video": f"{index}.mp4", "reason": "It is cut."}


def test_log_counts_each_item_once_and_survives_a_restart(tmp_path, caplog):
    path = tmp_path / "out" / "broken.jsonl"
    log = BrokenItemsLog(path, "train", items=1000)
    log.add([], 8)
    assert not path.exists()
    log.add([record(3), record(5)], 8)
    log.add([record(3)], 8)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"part": "train", **record(3)},
        {"part": "train", **record(5)},
    ]
    assert caplog.text.count("Skipped 3.mp4 (row 3): It is cut.") == 1
    resumed = BrokenItemsLog(path, "train", items=1000, seen=24)
    assert len(resumed.broken) == 2 and len(BrokenItemsLog(path, "eval", items=9).broken) == 0
    resumed.add([record(5), record(7)], 8)
    assert len(path.read_text().splitlines()) == 3


def test_log_stops_at_the_share(tmp_path):
    log = BrokenItemsLog(tmp_path / "broken.jsonl", "train", items=1000, max_broken=0.1)
    log.add([record(i) for i in range(10)], 10)  # ten of the first hundred are allowed
    with pytest.raises(
        BrokenItemsError, match="11 of 20 items seen of t are broken, more than the allowed share of 10%"
    ):
        log.add([record(10)], 10)
    late = BrokenItemsLog(tmp_path / "late.jsonl", "train", items=1000, max_broken=0.1, seen=400)
    late.add([record(i) for i in range(40)], 0)
    small = BrokenItemsLog(tmp_path / "small.jsonl", "train", items=10, max_broken=0.1)
    small.add([record(0)], 2)
    with pytest.raises(BrokenItemsError, match="2 of 4 items"):
        small.add([record(1)], 2)
    assert len((tmp_path / "small.jsonl").read_text().splitlines()) == 2  # the last one is listed too
    with pytest.raises(ValueError, match="between 0 and 1"):
        BrokenItemsLog(tmp_path / "x.jsonl", "train", items=10, max_broken=5)


def test_opposite_captions_stand_beside_those_of_the_batch(clips, processor, tmp_path):
    dataset = PairDataset(load_table(clips), processor, training=False)
    items = [dataset[row] for row in range(3)]
    texts = [item["text"] for item in items]
    table = tmp_path / "opposites.jsonl"
    rows = [{"text": texts[0], "opposite": "gray left"}, {"text": texts[1], "opposite": texts[1]}]
    rows += [{"text": texts[2], "opposite": None}]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    opposites = load_opposites(table)
    assert opposites == {texts[0]: "gray left", texts[1]: texts[1]}
    plain, batch = PairCollator(processor)(items), PairCollator(processor, opposites=opposites)(items)
    tokens = processor.tokenizer(["gray left", *texts[1:]], padding=True, return_tensors="pt")
    assert torch.equal(batch["opposite_input_ids"], tokens["input_ids"])
    assert torch.equal(batch["opposite_attention_mask"], tokens["attention_mask"])
    assert batch["has_opposite"].tolist() == [True, True, False]
    # of one length, so that a caption that is its own opposite is seen to be
    assert torch.equal(batch["input_ids"][1], batch["opposite_input_ids"][1])
    assert "opposite_input_ids" not in plain


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "has no row"),
        ('{"text": "a"}\n', "has no row"),
        ('{"opposite": "a"}\n', "row 1: expected an object"),
        ('{"text": "a", "opposite": "b"}\nnot json\n', "row 2: expected an object"),
        ('{"text": "a", "opposite": 3}\n', "must be strings, found 'a', 3"),
        ('{"text": "a", "opposite": "b"}\n{"text": "a", "opposite": "c"}\n', "'a' has two opposites, 'b' and 'c'"),
        (None, "cannot be read"),
    ],
)
def test_opposites_that_cannot_be_read(lines, message, tmp_path):
    if lines is not None:
        (tmp_path / "opposites.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        load_opposites(tmp_path / "opposites.jsonl")
