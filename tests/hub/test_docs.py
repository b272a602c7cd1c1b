"""docs/hub.md, as it stands, against the Hub of the tests."""

import re
import shlex
import shutil
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import HfApi

from bt_adapter_hf import BTAdapterLlavaForConditionalGeneration, BTAdapterModel, lora_config, save_bt_adapter
from bt_adapter_hf.cli.main import main
from bt_adapter_hf.hub.push import push_to_hub
from tests import tiny_pairs
from tests.chat import saved_hosts
from tests.hub.server import TOKEN


PAGE = (Path(__file__).parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")
LLAVA = "llava-hf/llava-1.5-7b-hf"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Warnings while validating metadata"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
]


def blocks(title: str) -> list[tuple[str, str]]:
    """(language, code) of a section."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)


def run(code: list[tuple[str, str]], names: dict) -> None:
    for language, text in code:
        if language == "python":
            exec(compile(text, "docs/hub.md", "exec"), names)
            continue
        for line in filter(None, text.splitlines()):
            program, *arguments = shlex.split(line, comments=True)
            if program == "bt-adapter":
                assert main(arguments) == 0, line
            else:
                assert line == "hf auth login"  # asks for a token, which the tests have in HF_TOKEN


@pytest.fixture
def me(hub):
    """The account of the page."""
    hub.users[TOKEN] = "me"
    return hub


def test_publish(me, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_checkpoint, "my-run")
    model = BTAdapterModel.from_pretrained(tiny_checkpoint)
    run(blocks("Publish"), {"model": model, "processor": tiny_pairs.processor()})
    assert len(me.history("me/bt-adapter-clip-l14")) == 3  # the first, of the command, and of the call
    assert me.head("me/bt-adapter-clip-l14", "experiment") != me.head("me/bt-adapter-clip-l14")


def test_load(me, tmp_path):
    native, _ = saved_hosts.save("llava", tmp_path / "llava")
    me.put_files(LLAVA, native)
    chat = BTAdapterLlavaForConditionalGeneration.from_pretrained(LLAVA)
    save_bt_adapter(chat, tmp_path / "adapter")
    torch.manual_seed(0)
    peft.get_peft_model(chat, lora_config(chat, r=2)).save_pretrained(tmp_path / "lora")
    push_to_hub(BTAdapterModel(tiny_pairs.model().config), "me/clip")
    save_bt_adapter(BTAdapterModel.from_pretrained("me/clip"), tmp_path / "adapter-of-a-clip")
    for name in ("adapter", "lora", "adapter-of-a-clip"):
        push_to_hub(tmp_path / name, f"me/{name}")
    HfApi().create_tag("me/adapter", tag="v1")
    names: dict = {}
    run(blocks("Load"), names)
    assert isinstance(names["model"], peft.PeftModel) and isinstance(names["clip"], BTAdapterModel)
