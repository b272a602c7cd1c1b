"""Folders of the wrong kind: what they hold, and what was expected in their place."""

import json

import pytest

from bt_adapter_hf.adapters.files import AdapterError
from bt_adapter_hf.assets import default_chat_model_path, default_model_path
from bt_adapter_hf.cli.main import main
from bt_adapter_hf.hub import access
from bt_adapter_hf.hub.kinds import holding
from bt_adapter_hf.hub.source import resolve_adapter


FILES = {
    "no file at all": {},
    "a checkpoint of a training run": {"trained.safetensors": "\x02\0\0\0\0\0\0\0{}"},
    "a training run that has not come to its end": {"checkpoint-500/x": ""},
    "a processor and no model": {"processor_config.json": "{}", "a.json": "{}"},
    "only a.mp4, b.mp4, c.mp4 and more": {f"{name}.mp4": "" for name in "abcd"},
    "an index of videos": {"index.json": "{}", "part-00000.safetensors": "\x02\0\0\0\0\0\0\0{}"},
    "LoRA of peft without a branch": {"adapter_config.json": "{}"},
    "LoRA with a branch": {"adapter_config.json": "{}", "bt_adapter_config.json": "{}"},
    "an adapter of a model of type 'bt_adapter_llava'": {
        "bt_adapter_config.json": '{"model_type": "bt_adapter_llava"}'
    },
    "a config.json without the type of a model": {"config.json": "{}"},
    "a model of type 'bert'": {"config.json": '{"model_type": "bert"}'},
}


@pytest.fixture(params=list(FILES))
def folder(request, tmp_path):
    """(what it holds in words, the folder)"""
    for name, content in FILES[request.param].items():
        path = tmp_path / "it" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "it").mkdir(exist_ok=True)
    return request.param, tmp_path / "it"


def error_of(argv, capsys) -> str:
    assert main(list(map(str, argv))) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1, told
    return told


def test_commands_say_what_a_folder_holds(folder, tmp_path, capsys):
    said, path = folder
    assert holding(path).startswith(said)
    (tmp_path / "t.csv").write_text("video,text\na.mp4,one\n")
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    expected = {
        "a CLIP": [
            ["pretrain", "--train", tmp_path / "t.csv", "--output-dir", tmp_path / "o", "--model", path],
            ["check-data", tmp_path / "t.csv", "--model", path],
        ],
        "a chat model": [
            ["finetune", "--train", tmp_path / "t.jsonl", "--output-dir", tmp_path / "o", "--model", path],
            ["check-data", tmp_path / "t.jsonl", "--model", path],
        ],
        "a dual encoder": [["convert", path, tmp_path / "x.pth", "--to", "original"]],
    }
    if not said.startswith(("an adapter", "LoRA")):
        expected["a dual encoder"].append(["index", tmp_path / "t.csv", "-o", tmp_path / "i", "--model", path])
        with pytest.raises(AdapterError) as error:
            resolve_adapter(path)
        assert f"it holds {said}" in str(error.value)
    for kind, commands in expected.items():
        for command in commands:
            told = error_of(command, capsys)
            assert f"'{path}' holds {said}" in told and kind in told.partition("expected")[2], told


def test_a_chat_model_is_no_dual_encoder(tmp_path, capsys):
    told = error_of(["convert", default_chat_model_path(), tmp_path / "x.pth", "--to", "original"], capsys)
    assert "holds a chat model with its adapter in of type 'bt_adapter_llava'; expected a dual encoder" in told
    told = error_of(["chat", "-q", "a", "--bt-adapter", default_model_path()], capsys)
    assert "has an adapter in: leave out --bt-adapter" in told
    assert not (tmp_path / "x.pth").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["index", "a.mp4", "-o", "i", "--model"],
        ["chat", "a.mp4", "-q", "a", "--model"],
        ["chat", "a.mp4", "-q", "a", "--bt-adapter"],
        ["eval", "retrieval", "--data", "t.csv", "-o", "o", "--model"],
    ],
)
def test_a_name_of_nothing_is_told_at_once(argv, monkeypatch, capsys):
    """Without a question to the Hub: an id has a namespace."""

    def ask(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(access, "get_session", ask)
    for name in ("missing-name", "./missing", "a/b/c"):
        told = error_of([*argv, name], capsys)
        assert f"{argv[-1]}: there is no folder '{name}': it does not exist" in told


def test_push_of_a_folder_that_is_not_there(capsys):
    assert "'missing' does not exist; expected the folder" in error_of(["push", "missing", "me/name"], capsys)


def test_without_a_network_one_question_is_asked(monkeypatch, capsys):
    """The Hub's client would ask for minutes."""
    monkeypatch.setattr(access.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(access, "is_offline_mode", lambda: False)
    monkeypatch.setattr(access.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(access.time, "sleep", lambda seconds: None)
    told = error_of(["chat", "-q", "a", "--model", "org/name"], capsys).splitlines()[-1]
    assert "no folder 'org/name', and http://127.0.0.1:9 could not be reached" in told
