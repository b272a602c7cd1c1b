"""`chat` as a user runs it: the shipped model for what it says, tiny random hosts for the rest."""

import argparse
import io
import json
import shutil
import socket
import struct
import zlib

import numpy as np
import peft
import pytest
import torch
from PIL import Image

from bt_adapter_hf import (
    BTAdapterLlavaForConditionalGeneration,
    BTAdapterLlavaProcessor,
    lora_config,
    save_bt_adapter,
)
from bt_adapter_hf.cli._training import chat_processor
from bt_adapter_hf.cli.chat import find_model
from bt_adapter_hf.cli.main import main
from tests import clip_tools, tiny_pairs
from tests.chat import saved_hosts
from tests.chat.tiny_hosts import PATCHES, QUERIES


HOSTS = {"llava": PATCHES, "instructblip": QUERIES, "blip-2": QUERIES}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """(native checkpoint, adapter) by type."""
    return {name: saved_hosts.save(name, tmp_path_factory.mktemp(name)) for name in HOSTS}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two videos and an image."""
    folder = tmp_path_factory.mktemp("files")
    paths = clip_tools.write_clip(folder / "a.mp4", count=12), clip_tools.write_gif(folder / "b.gif"), folder / "c.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(paths[2])
    return [str(path) for path in paths]


def chat(*argv) -> int:
    return main(["chat", *map(str, argv), "--device", "cpu"])


def error_of(argv: list, capsys) -> str:
    """Runs a command that must fail with exactly one line on stderr, and returns it."""
    assert chat(*argv) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("name", HOSTS)
def test_every_host_answers_about_videos_and_images(name, hosts, files, capsys):
    native, adapter = hosts[name]
    argv = [*files, "--model", native, "--bt-adapter", adapter, "--num-frames", 4, "--max-new-tokens", 5]
    argv += ["--question", "what happens ?", "-q", "where is the red square ?"]
    assert chat(*argv, "--json") == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert [file["kind"] for file in told["files"]] == ["video", "video", "image"]
    assert [len(file.get("frames", [])) for file in told["files"]] == [4, 4, 0]
    assert told["visual_tokens"] == 3 * HOSTS[name]
    assert [turn["question"] for turn in told["answers"]] == ["what happens ?", "where is the red square ?"]
    assert all(turn["answer"] for turn in told["answers"])
    line = f"video of 4 frames, video of 4 frames, image: {told['visual_tokens']} visual tokens of"
    assert captured.err.splitlines()[-1].startswith(line)
    # the same for people
    assert chat(*argv) == 0
    assert capsys.readouterr().out.splitlines() == [turn["answer"] for turn in told["answers"]]


@torch.no_grad()
def test_the_answer_is_the_models(hosts, files, capsys):
    native, adapter = hosts["llava"]
    assert (
        chat(files[0], "--model", native, "--bt-adapter", adapter, "-q", "what happens ?", "--max-new-tokens", 5) == 0
    )
    model = BTAdapterLlavaForConditionalGeneration.from_pretrained(native, bt_adapter=adapter)
    processor = BTAdapterLlavaProcessor.from_pretrained(native)
    message = [{"type": "video", "path": files[0]}, {"type": "text", "text": "what happens ?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": message}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert capsys.readouterr().out.strip() == processor.post_process_image_text_to_text(output)[0]


def test_clips_multiply_the_tokens(hosts, files, capsys):
    native, adapter = hosts["llava"]
    argv = [files[0], "--model", native, "--bt-adapter", adapter, "-q", "what ?", "--max-new-tokens", 2, "--json"]
    assert chat(*argv, "--num-frames", 2, "--num-clips", 3) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["visual_tokens"] == 3 * PATCHES and len(told["files"][0]["frames"]) == 6


def test_a_conversation_from_a_pipe(hosts, files, capsys, monkeypatch):
    native, adapter = hosts["llava"]
    argv = [files[0], "--model", native, "--bt-adapter", adapter, "--num-frames", 4, "--max-new-tokens", 4]
    assert chat(*argv, "-q", "what happens ?", "-q", "where ?") == 0
    asked = capsys.readouterr().out
    typed = io.BytesIO(b"what happens ?\n\nwhat \xff ?\nwhere ?\n")  # one is no text
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, encoding="utf-8"))
    assert chat(*argv) == 0
    captured = capsys.readouterr()
    assert captured.out == asked and r"the question holds \xff" in captured.err


def test_an_image_needs_no_adapter(hosts, files, capsys):
    assert chat(files[2], "--model", hosts["llava"][0], "-q", "what ?", "--max-new-tokens", 2) == 0
    assert capsys.readouterr().out.strip()


def test_bad_input_ends_in_one_line(hosts, files, tiny_checkpoint, tmp_path, capsys):
    native, adapter = hosts["llava"]
    model = ["--model", native, "--bt-adapter", adapter]
    ask = ["-q", "what ?"]
    assert "'no.mp4' is not a file" in error_of([files[0], "no.mp4", files[1], *model, *ask], capsys)
    many = ["no.mp4", files[0], "none.png", *model, *ask]
    assert "'no.mp4', 'none.png' are no files, 2 of 3" in error_of(many, capsys)
    assert "is not a file" in error_of([tmp_path, *model, *ask], capsys)
    for name in ("broken.mp4", "broken.png"):
        (tmp_path / name).write_bytes(b"not what it is called")
        assert name in error_of([files[0], tmp_path / name, *model, *ask], capsys)
    assert "has no adapter" in error_of([files[0], "--model", native, *ask], capsys)
    assert "type 'bt_adapter'" in error_of([files[0], "--model", tiny_checkpoint, *ask], capsys)
    assert "no-such-model" in error_of([files[0], "--model", "./no-such-model", *ask], capsys)
    assert "--question is empty" in error_of([files[0], *model, "-q", " "], capsys)
    assert r"a --question holds \xff, which" in error_of([files[0], *model, "-q", "a \udcff"], capsys)
    assert "--json needs" in error_of([files[0], *model, "--json"], capsys)


def test_a_conversation_longer_than_the_context_is_answered_with_a_warning(hosts, files, capsys):
    """As by the native model: rotary positions go on."""
    native, adapter = hosts["llava"]
    argv = [*[files[0]] * 12, "--model", native, "--bt-adapter", adapter, "--num-frames", 2, "-q", "what ?"]
    assert chat(*argv, "--max-new-tokens", 1) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft asks for it
def test_an_adapter_brings_its_model(hosts, files, tmp_path, capsys):
    native, adapter = hosts["llava"]
    argv = ["-q", "what happens ?", "--num-frames", 4, "--max-new-tokens", 4]
    assert chat(files[0], "--model", native, "--bt-adapter", adapter, *argv) == 0
    answer = capsys.readouterr().out
    model = BTAdapterLlavaForConditionalGeneration.from_pretrained(native, bt_adapter=adapter)
    save_bt_adapter(model, tmp_path / "adapter")
    tuned = peft.get_peft_model(model, lora_config(model, r=2))
    tuned.save_pretrained(tmp_path / "lora")
    for folder in ("adapter", "lora"):
        assert chat(files[0], "--model", tmp_path / folder, *argv) == 0
        captured = capsys.readouterr()
        assert captured.out == answer and f"is an adapter of '{native}'" in captured.err
    assert "--bt-adapter names another" in error_of(
        [files[0], "--model", tmp_path / "lora", "--bt-adapter", adapter, *argv], capsys
    )
    assert "names no model" in error_of([files[0], "--model", adapter, *argv], capsys)
    (tmp_path / "empty").mkdir()
    assert "neither a model" in error_of([files[0], "--model", tmp_path / "empty", *argv], capsys)


@pytest.mark.parametrize("name", HOSTS)
def test_the_processor_that_was_tuned_with_an_adapter_is_taken(name, hosts, tmp_path):
    """By chat and evaluation, and by a training that goes on; of an adapter without one the number of frames is."""

    def found(adapter, **given):
        args = {"model": str(native), "bt_adapter": str(adapter), "revision": None, "on_damage": None, **given}
        asked = {"num_frames": None, "num_clips": None, "files": ["a.mp4"], **args}
        frames = {key: value for key, value in given.items() if key == "num_frames"}
        both = find_model(argparse.Namespace(**asked))[0], chat_processor(argparse.Namespace(**args), **frames)[0]
        assert len({(p.video_processor.num_frames, p.chat_template) for p in both}) == 1
        return both[0]

    native, adapter = hosts[name]
    default = found(adapter)
    assert default.video_processor.num_frames == 64  # the adapter says nothing of frames
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((folder / "bt_adapter_config.json").read_text())
    config["branch"]["num_trained_frames"] = 5
    (folder / "bt_adapter_config.json").write_text(json.dumps(config))
    assert found(folder).video_processor.num_frames == 5
    tiny_pairs.processor().save_pretrained(folder)  # of a dual encoder
    assert found(folder).video_processor.num_frames == 5
    default.video_processor.num_frames, default.chat_template = 6, default.chat_template + "{# tuned #}"
    default.save_pretrained(folder)
    assert found(folder).video_processor.num_frames == 6
    assert found(folder).chat_template == default.chat_template
    assert found(folder, num_frames=3).video_processor.num_frames == 3


def test_every_file_that_cannot_be_used_is_named_and_counted(hosts, files, tmp_path, capsys):
    native, adapter = hosts["llava"]
    bomb = tmp_path / "bomb.png"
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    ihdr = b"IHDR" + head
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr)))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it never answers
        slow = f"http://127.0.0.1:{silent.getsockname()[1]}/slow.png"
        argv = [files[0], bomb, slow, files[2], "--model", native, "--bt-adapter", adapter, "-q", "what ?"]
        error = error_of([*argv, "--item-timeout", 1], capsys)
    assert "2 of 4 files" in error and "bomb.png cannot be read" in error and slow in error
