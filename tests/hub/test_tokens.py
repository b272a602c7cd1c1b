"""The token is where it must be, in the header of requests to the Hub, and nowhere else."""

import copy
import json
import logging
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from bt_adapter_hf import get_bt_adapter_model, load_bt_adapter, save_bt_adapter
from bt_adapter_hf.data.sources import load_table
from bt_adapter_hf.hub.push import push_to_hub
from tests import tiny_pairs
from tests.hub.clients import run_python
from tests.hub.server import OTHER_TOKEN, TOKEN
from tests.hub.video_datasets import Clips, put


ADAPTER, DATA = "tester/adapter", "tester/clips"
WRONG = "hf_ThisTokenIsUnknownToTheHub0123456789"


@pytest.fixture
def clip() -> CLIPModel:
    torch.manual_seed(0)
    return CLIPModel(tiny_pairs.clip_config()).eval()


@pytest.fixture
def adapter_folder(clip, tmp_path) -> Path:
    folder = tmp_path / "adapter"
    save_bt_adapter(get_bt_adapter_model(copy.deepcopy(clip), 2), folder, base_model_name_or_path="tester/base")
    return folder


@pytest.fixture
def nowhere(hub, tmp_path, caplog, capfd, monkeypatch) -> Callable[[str], None]:
    """Checks that a token is in no log record, output, file of this test, or file on the Hub."""
    caplog.set_level(logging.DEBUG)
    loud = [logging.getLogger(name) for name in ("bt_adapter_hf", "huggingface_hub", "transformers", "datasets")]
    for logger in loud:
        monkeypatch.setattr(logger, "level", logging.DEBUG)
        monkeypatch.setattr(logger, "propagate", True)

    def check(token: str) -> None:
        assert [r for r in hub.log if r.headers.get("authorization") == f"Bearer {token}"], "it was not even used"
        out, err = capfd.readouterr()
        for text in (caplog.text, out, err, *(str(record.__dict__) for record in caplog.records)):
            assert token not in text
        for path in tmp_path.rglob("*"):
            assert not path.is_file() or token.encode() not in path.read_bytes(), path
        for repository in hub.repositories.values():
            for commit in repository.commits.values():
                assert token not in f"{commit.title} {commit.message}"
                assert not [name for name, file in commit.files.items() if token.encode() in file.data]
        assert hub.leaks == []

    return check


def fails(action: Callable[[], object], token: str) -> None:
    """Runs an action that must fail, and looks for the token in all that a traceback would show."""
    with pytest.raises(Exception) as caught:  # noqa: B017 (which error it is, is tested elsewhere)
        action()
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    error = caught.value
    while error is not None:
        shown += str(getattr(error, "args", "")) + str(getattr(error, "__notes__", ""))
        error = error.__cause__ or error.__context__
    assert token not in shown


@pytest.mark.parametrize("token", [TOKEN, WRONG], ids=["valid", "wrong"])
def test_push(hub, nowhere, monkeypatch, adapter_folder, token):
    monkeypatch.setattr("bt_adapter_hf.hub.access.RETRY_WAITS", [0.05])
    monkeypatch.setenv("HF_TOKEN", token)
    if token == TOKEN:
        push_to_hub(adapter_folder, ADAPTER)
        for kind in ("disk_full", "forbidden", "unavailable"):
            where = {"disk_full": "/uploads/"}.get(kind, "/commit/")
            fault = hub.fail(kind, where, times=-1)
            (adapter_folder / "README.md").write_text(f"# {kind}\n")
            hub.storage.clear()
            fails(lambda: push_to_hub(adapter_folder, ADAPTER), token)
            assert fault.hits
            fault.times = fault.hits
    else:
        fails(lambda: push_to_hub(adapter_folder, ADAPTER), token)
    nowhere(token)


def test_a_token_that_is_passed_is_no_safer_in_the_text(hub, nowhere, adapter_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRONG)
    pushed = push_to_hub(adapter_folder, ADAPTER, token=TOKEN)
    assert TOKEN not in repr(pushed)
    fails(lambda: push_to_hub(adapter_folder, ADAPTER, token=f"{TOKEN}\n"), TOKEN)
    fails(lambda: push_to_hub(adapter_folder, ADAPTER, token=WRONG), WRONG)
    nowhere(TOKEN)
    nowhere(WRONG)


def test_a_token_in_a_file_is_not_published(hub, adapter_folder):
    (adapter_folder / "README.md").write_text(f"export HF_TOKEN={TOKEN}\n")
    with pytest.raises(ValueError, match="README.md holds a token") as caught:
        push_to_hub(adapter_folder, ADAPTER)
    assert TOKEN not in str(caught.value)
    assert not hub.repositories or len(hub.history(ADAPTER)) == 1


@pytest.mark.parametrize("name", ["README.md", "run_summary.json", "chat_template.jinja", "vocab.txt", "notes.yaml"])
@pytest.mark.parametrize("token", [OTHER_TOKEN, "api_org_" + "a1" * 17], ids=["of a user", "of an organisation"])
@pytest.mark.parametrize("around", ["{}", '{{"HF_TOKEN": "{}"}}', "https://user:{}@host/\n", "export TOKEN_{}_\n"])
def test_somebody_elses_token_in_a_file_is_not_published(hub, adapter_folder, name, token, around):
    text = around.format(token)
    if name == "run_summary.json":
        text = json.dumps({"steps": 1, "note": text})
    (adapter_folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} holds a token of the Hub") as caught:
        push_to_hub(adapter_folder, ADAPTER, include=[name])
    assert token not in str(caught.value)
    assert not hub.repositories or len(hub.history(ADAPTER)) == 1


def test_what_only_looks_like_a_token_is_published(hub, adapter_folder):
    words = ["hf_hub_download", "hf_short123", "shf_" + "a" * 34, "api_org_name", "a" * 40, "hf-" + "a" * 34]
    (adapter_folder / "vocab.txt").write_text("\n".join(words))
    assert "vocab.txt" in push_to_hub(adapter_folder, ADAPTER).files


@pytest.mark.parametrize("token", [TOKEN, WRONG], ids=["valid", "wrong"])
def test_pull(hub, nowhere, monkeypatch, clip, adapter_folder, token):
    monkeypatch.setattr("bt_adapter_hf.hub.access.RETRY_WAITS", [0.05])
    monkeypatch.setenv("HF_TOKEN", token)
    hub.create(ADAPTER, private=True)
    hub.put_files(ADAPTER, adapter_folder)
    if token == TOKEN:
        load_bt_adapter(copy.deepcopy(clip), ADAPTER)
        fails(lambda: load_bt_adapter(copy.deepcopy(clip), ADAPTER, revision="nowhere"), token)
    fails(lambda: load_bt_adapter(copy.deepcopy(clip), "tester/nothing"), token)
    nowhere(token)


@pytest.mark.parametrize("token", [TOKEN, WRONG], ids=["valid", "wrong"])
def test_stream(hub, nowhere, monkeypatch, tmp_path, tmp_path_factory, token):
    monkeypatch.setenv("HF_TOKEN", token)
    put(hub, Clips(tmp_path_factory.mktemp("clips")), "tars", DATA)
    hub.repositories["dataset", DATA].private = True
    if token == TOKEN:
        table = load_table(DATA)
        store = table.use_store(tmp_path / "store")
        assert table.pair(0)[0]
        nowhere(token)  # while it is open
        store.close()
        fails(lambda: load_table(DATA, revision="nowhere"), token)
    fails(lambda: load_table("tester/nothing"), token)
    nowhere(token)


def test_the_command_in_a_fresh_process(hub, nowhere, hf_home, adapter_folder):
    """Once with success, once refused, with every logger at its loudest."""
    hub.fail("forbidden", "tester/refused/commit/", times=-1)
    code = (
        "import logging; logging.basicConfig(level=logging.DEBUG)\n"
        "from bt_adapter_hf.cli.main import main\n"
        f"statuses = [main(['push', {str(adapter_folder)!r}, name]) for name in ({ADAPTER!r}, 'tester/refused')]\n"
        "assert statuses == [0, 1], statuses"
    )
    done = run_python(code, hub, hf_home)
    assert "files published" in done.stdout and "403" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    nowhere(TOKEN)
