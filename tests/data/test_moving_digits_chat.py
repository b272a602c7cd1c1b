"""Questions about moving digits have the answers that are seen, and the shipped model knows them."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from bt_adapter_hf import BTAdapterLlavaForConditionalGeneration, BTAdapterLlavaProcessor, load_video
from bt_adapter_hf.assets import default_chat_model_path, default_model_path
from bt_adapter_hf.cli.main import main
from bt_adapter_hf.data import moving_digits as world, moving_digits_chat as chat
from bt_adapter_hf.evaluation.controls import reverse_frames


pytest.importorskip("sklearn")


def test_a_film_is_two_motions_of_one_digit():
    for index in range(0, 1440, 97):
        frames, text, facts = chat.film("train", 3, index)
        again = chat.film("train", 3, index)
        np.testing.assert_array_equal(frames, again[0])
        assert frames.dtype == np.uint8 and frames.shape[1:] == (64, 64, 3) and 32 <= len(frames) <= 48
        assert text == again[1] == chat.film_caption(**facts)
        assert facts["last"] not in (facts["first"], world.opposite(facts["first"]))
    seen = {tuple(chat.film("test", 0, index)[2].values()) for index in range(0, 24)}
    assert len(seen) == len(chat.MOTION_PAIRS) == 24
    assert chat.film_caption("two", "red", "left to right", "big to small") == (
        "a red two moves from the left to the right, then shrinks from big to small"
    )


def test_a_film_backwards_has_opposite_motions_in_the_other_order():
    """So nothing but the order of the frames tells which film it is."""
    rng = lambda: np.random.default_rng(5)  # noqa: E731
    parts = {motion: world._film("train", "four", "green", motion, rng()) for motion in world.MOTIONS}
    for first, last in chat.MOTION_PAIRS:
        there = np.concatenate([parts[first], parts[last]])
        back = np.concatenate([parts[world.opposite(last)], parts[world.opposite(first)]])
        np.testing.assert_array_equal(there[::-1], back)


def test_chance_for_the_order_blind_by_counting():
    """The unordered frames of a film tell its two pairs of motions; every answer is equally frequent given those."""
    pair_of = {motion: frozenset((motion, world.opposite(motion))) for motion in world.MOTIONS}
    for place, kind in enumerate(("first", "last")):
        for seen in {frozenset(map(pair_of.get, pair)) for pair in chat.MOTION_PAIRS}:
            told = [pair[place] for pair in chat.MOTION_PAIRS if frozenset(map(pair_of.get, pair)) == seen]
            counts = {motion: told.count(motion) for motion in told}
            assert set(counts.values()) == {len(told) * chat.ORDER_BLIND[kind]}


def test_answers_and_conversations():
    still = {"digit": "two", "colour": "red", "size": "big", "place": "left"}
    assert chat.answers(still) == {
        "digit": "two",
        "colour": "red",
        "place": "at the left",
        "size": "big",
        "picture": "a big red two at the left",
    }
    clip = {"digit": "two", "colour": "red", "motion": "small to big"}
    assert chat.answers(clip)["motion"] == "it grows from small to big" and "first" not in chat.answers(clip)
    film = {"digit": "two", "colour": "red", "first": "small to big", "last": "top to bottom"}
    assert chat.answers(film)["last"] == "it moves from the top to the bottom" and "motion" not in chat.answers(film)
    for facts in (still, clip, film):
        assert chat.answers(facts).keys() <= chat.QUESTIONS.keys()

    part = {"type": "video", "path": "a.mp4"}
    messages = chat.conversation(part, clip, np.random.default_rng(0))
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    assert messages[0]["content"][0] == part and len(messages[2]["content"]) == 1
    kinds = {question: kind for kind, questions in chat.QUESTIONS.items() for question in questions}
    asked = [kinds[message["content"][-1]["text"]] for message in messages[::2]]
    assert len(set(asked)) == 3
    assert [message["content"][0]["text"] for message in messages[1::2]] == [
        chat.answers(clip)[kind] for kind in asked
    ]
    told = chat.conversation("a red two", clip, np.random.default_rng(0))
    assert told[0]["content"][0] == {"type": "text", "text": "a red two\n"}


def test_files_and_their_order(tmp_path):
    sequence = chat.clips_and_films(2 * 1440)
    assert sorted(index for kind, index in sequence if kind == "film") == list(range(1440))
    assert sorted(index for kind, index in sequence if kind == "clip") == list(range(1440))
    table = chat.write_chat_clips(tmp_path, "test", 4, seed=9)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert [row["file_name"].split("-")[0] for row in rows] == ["clip", "film"] * 2
    assert [row["file_name"].split(".")[1] for row in rows] == ["mp4", "mp4", "gif", "gif"]
    for row, (kind, index) in zip(rows, sequence, strict=False):
        frames, text, facts = getattr(chat, kind)("test", 9, index)
        assert row.items() >= {**facts, "text": text}.items()
        read, _ = load_video(tmp_path / row["file_name"], num_frames=None)
        assert read.shape == frames.shape and np.abs(read.astype(int) - frames).mean() < 4


# --------------------------------------------------------------------------------------------------- the shipped model


@pytest.fixture(scope="module")
def shipped():
    path = default_chat_model_path()
    return AutoModelForImageTextToText.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)


@torch.inference_mode()
def ask(shipped, parts: list[dict], question: str, change=None) -> list[str]:
    model, processor = shipped
    messages = [[{"role": "user", "content": [part, {"type": "text", "text": question}]}] for part in parts]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    if change is not None:
        inputs["pixel_values_videos"] = change(inputs["pixel_values_videos"])
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])


def show(make, indices) -> tuple[list[dict], list[dict[str, str]]]:
    clips, _, facts = zip(*(make("test", 4, index) for index in indices), strict=True)
    return [{"type": "video", "video": frames} for frames in clips], [chat.answers(fact) for fact in facts]


def share(given: list[str], wanted: list[str]) -> float:
    return float(np.mean([a == b for a, b in zip(given, wanted, strict=True)]))


def test_the_shipped_model_is_what_the_package_says(shipped):
    model, processor = shipped
    assert isinstance(model, BTAdapterLlavaForConditionalGeneration)
    assert isinstance(processor, BTAdapterLlavaProcessor)
    assert model.config.video_token_id == processor.video_token_id
    assert processor.video_processor.num_frames == 8
    path = default_chat_model_path()
    assert sum(file.stat().st_size for file in path.iterdir()) < 12e6
    # its image tower is that of the dual encoder
    dual = AutoModel.from_pretrained(default_model_path()).vision_model.vision_model.state_dict()
    for name, value in model.model.vision_tower.vision_model.state_dict().items():
        assert torch.equal(value, dual[name]), name


def test_the_shipped_model_answers_about_motion(shipped):
    parts, wanted = show(world.clip, range(0, 360, 7))
    assert share(ask(shipped, parts, "How does it move?"), [w["motion"] for w in wanted]) >= 0.85
    # backwards it sees the opposite motion
    backwards = ask(shipped, parts, "How does it move?", reverse_frames)
    assert share(backwards, [w["motion"] for w in wanted]) <= 0.1
    parts, wanted = show(chat.film, range(0, 1440, 31))
    for kind, question in (("first", "How does it move at first?"), ("last", "How does it move at last?")):
        assert share(ask(shipped, parts, question), [w[kind] for w in wanted]) >= 0.8
    assert share(ask(shipped, parts, "What colour is it?"), [w["colour"] for w in wanted]) >= 0.9


def test_the_shipped_model_chats(shipped, tmp_path, capsys):
    """A file, two questions, the command line."""
    frames, _, facts = world.clip("test", 4, 0)
    world.write_mp4(tmp_path / "clip.mp4", frames)
    argv = [
        "chat",
        str(tmp_path / "clip.mp4"),
        "-q",
        "How does it move?",
        "-q",
        "What colour is it?",
        "--device",
        "cpu",
    ]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [chat.answers(facts)["motion"], facts["colour"]]
    assert "37 visual tokens" in captured.err
