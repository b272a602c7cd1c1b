"""The chat examples on tiny random hosts, as their headers say."""

import subprocess
import sys
from pathlib import Path

import pytest

from bt_adapter_hf.data.moving_digits import write_clips
from tests import clip_tools
from tests.chat import saved_hosts


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def clip(tmp_path):
    return clip_tools.write_clip(tmp_path / "clip.mp4", count=12)


def run(example: str, *argv, words: int = 4) -> str:
    command = [sys.executable, str(EXAMPLES / example), *map(str, argv)]
    command += ["--device", "cpu", "--max-new-tokens", str(words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_llava(clip, tmp_path):
    native, adapter = saved_hosts.save("llava", tmp_path)
    out = run("chat_llava.py", clip, "--question", "what happens ?", "--model", native, "--bt-adapter", adapter)
    name, answer = out.split(": ")
    assert name == str(clip) and answer


def test_llava_on_the_model_inside_the_package(tmp_path):
    pytest.importorskip("sklearn")
    write_clips(tmp_path, "test", 2, seed=5, formats=("mp4",))  # a red zero from left to right, and back
    there, back = sorted(tmp_path.glob("*.mp4"))
    out = run("chat_llava.py", there, back, "--question", "How does it move?", words=16)
    assert out.splitlines() == [
        f"{there}: it moves from the left to the right",
        f"{back}: it moves from the right to the left",
    ]


def test_instructblip(clip, tmp_path):
    native, adapter = saved_hosts.save("instructblip", tmp_path)
    argv = ["--question", "what happens ?", "--model", native, "--bt-adapter", adapter, "--num-frames", 4]
    assert run("chat_instructblip.py", clip, *argv)


def test_minigpt4_is_put_together_once(clip, tmp_path):
    parts = saved_hosts.save_minigpt4_parts(tmp_path)
    asked = [clip, "--question", "what happens ?", "--model", tmp_path / "minigpt4"]
    options = [text for name, path in parts.items() for text in (f"--{name.replace('_', '-')}", path)]
    answer = run("chat_minigpt4.py", *asked, *options)
    assert answer and run("chat_minigpt4.py", *asked) == answer
