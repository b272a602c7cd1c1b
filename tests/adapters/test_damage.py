"""Files that are not what they are called: one sentence, wherever models, adapters and processors are loaded."""

import json

import pytest
import torch
from safetensors.torch import save_file

from bt_adapter_hf.adapters.damage import check_whole, damage_of
from bt_adapter_hf.cli.main import main


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def whole(tmp_path):
    """A model's folder with one tensor of 400 bytes."""
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "tokenizer.json").write_text(json.dumps({"a": "x" * (1 << 20)}))
    return tmp_path


def test_a_whole_folder_passes(whole):
    check_whole(whole)
    assert damage_of(whole / "model.safetensors") is damage_of(whole / "tokenizer.json") is None


@pytest.mark.parametrize(
    "name, damage, said",
    [
        ("model.safetensors", lambda data: POINTER, "is a pointer of Git LFS .* `git lfs pull`"),
        ("tokenizer.json", lambda data: POINTER, "is a pointer of Git LFS"),
        ("model.safetensors", lambda data: data[:-50], r"is damaged or truncated, it has \d+ of \d+ bytes: download"),
        ("model.safetensors", lambda data: data[:20], "is damaged or truncated, or no safetensors"),
        ("model.safetensors", lambda data: b"no weights at all", "is damaged or truncated, or no safetensors"),
        ("model.safetensors", lambda data: b"", "is empty"),
        ("config.json", lambda data: b"[1]", "config.json holds a list, expected an object"),
        ("config.json", lambda data: b"{not", "config.json is damaged, it is no JSON"),
        ("config.json", lambda data: b"\xff\xfe", "config.json is damaged, it is no JSON"),
        ("tokenizer.json", lambda data: data[:-5], "tokenizer.json is damaged or truncated"),
    ],
)
def test_damage_is_told(name, damage, said, whole, capsys):
    (whole / name).write_bytes(damage((whole / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{name} .*|{said}") as error:
        check_whole(whole)
    assert error.match(said)
    commands = (
        ["chat", "a.mp4", "-q", "what?", "--model", whole],
        ["chat", "a.mp4", "-q", "what?", "--bt-adapter", whole],
        ["index", "a.mp4", "-o", whole / "i", "--model", whole],
        ["finetune", "--train", "t.jsonl", "--output-dir", whole / "o", "--model", whole],
        ["convert", "a.pth", whole / "o", "--base", whole],
        ["push", whole, "me/name"],
    )
    for command in commands:
        assert main([str(part) for part in command]) == 1
        told = capsys.readouterr().err
        assert str(error.value).rstrip(".") in told and told.count("\n") == 1
    assert not (whole / "o").exists()
