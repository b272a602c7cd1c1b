"""`bt-adapter push` against a Hub on this machine."""

import json
import shutil
import socket
import subprocess
import sys

import pytest

from bt_adapter_hf import BTAdapterModel
from bt_adapter_hf.cli import main as cli
from tests.hub.clients import run_python
from tests.hub.conftest import hf_home, hub  # noqa: F401 (fixtures)


pytestmark = pytest.mark.filterwarnings("ignore:Warnings while validating metadata")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("bt_adapter_hf.hub.access.RETRY_WAITS", [0.01])


def test_push_and_load(hub, tiny_checkpoint, capsys):  # noqa: F811
    argv = ["push", str(tiny_checkpoint), "tester/pushed", "--license", "mit", "--language", "en"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert f"files published: {hub.url}/tester/pushed/commit/{hub.head('tester/pushed')}" in out
    assert BTAdapterModel.from_pretrained("tester/pushed")._loaded_from[1] == hub.head("tester/pushed")
    card = hub.files("tester/pushed")["README.md"].decode()
    assert "license: mit" in card and "language: en" in card


def test_what_is_left_out_is_listed_and_can_be_named(hub, tiny_checkpoint, tmp_path, capsys):  # noqa: F811
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "run")
    for name in ("LICENSE", "passwords.txt"):
        (folder / name).write_text("x")
    assert cli.main(["push", str(folder), "tester/some", "--include", "LICENSE"]) == 0
    assert "left out: passwords.txt (--include" in capsys.readouterr().out
    assert "LICENSE" in hub.files("tester/some") and "passwords.txt" not in hub.files("tester/some")
    assert cli.main(["push", str(folder), "tester/some", "--include", "nope"]) == 1
    assert "holds no file 'nope', which was to be included" in capsys.readouterr().err


def test_dry_run_lists_and_asks_nobody(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    def connect(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "run")
    (folder / "passwords.txt").write_text("x")
    argv = ["push", str(folder), "tester/dry", "--dry-run"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out.splitlines()
    listed = [line.strip() for line in out if line.startswith("  ")]
    assert out[0] == f"{len(listed)} files would be published as tester/dry:"
    assert {"README.md", "config.json", "model.safetensors", "modeling_bt_adapter.py"} <= set(listed)
    assert out[-1].startswith("left out: passwords.txt (") and "passwords.txt" not in listed
    assert cli.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["files"], found["commit"], found["url"]) == (listed, None, None)
    (folder / "README.md").write_text(f"hf_{'a' * 34}")
    assert cli.main(argv) == 1
    assert "README.md holds a token of the Hub" in capsys.readouterr().err


def test_json_branch_pull_request_private_message(hub, tiny_checkpoint, tmp_path, capsys):  # noqa: F811
    (tiny_checkpoint / "optimizer.pt").write_bytes(b"x")
    argv = ["push", str(tiny_checkpoint), "tester/more", "--json"]
    try:
        assert cli.main([*argv, "--private", "--without-code", "--message", "Mine"]) == 0
        first = json.loads(capsys.readouterr().out)
        assert first["commit"] == hub.head("tester/more") and first["left_out"] == ["optimizer.pt"]
        assert hub.history("tester/more")[0].title == "Mine" and "modeling_bt_adapter.py" not in first["files"]
        assert cli.main([*argv, "--revision", "with-code"]) == 0
        branch = json.loads(capsys.readouterr().out)
        assert hub.head("tester/more", "with-code") == branch["commit"]
        assert "modeling_bt_adapter.py" in branch["files"]
        assert cli.main([*argv, "--pr"]) == 0
        assert json.loads(capsys.readouterr().out)["pull_request"] == 1
        assert hub.head("tester/more") == first["commit"]
    finally:
        (tiny_checkpoint / "optimizer.pt").unlink()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["{empty}", "tester/x"], "it is no model, adapter or processor"),
        (["{model}", "someone/x"], "the Hub refused access to someone/x (403)"),
        (["{model}", "a/b/c"], "Repo id must be in the form"),
        (
            ["{model}", "tester/busy"],
            "the Hub did not serve tester/busy (503 Service Unavailable), also when asked again",
        ),
    ],
)
def test_one_clear_line_on_errors(hub, tiny_checkpoint, tmp_path, capsys, arguments, said):  # noqa: F811
    hub.fail("unavailable", "tester/busy/commit", times=-1)
    (tmp_path / "empty").mkdir()
    arguments = [text.format(empty=tmp_path / "empty", model=tiny_checkpoint) for text in arguments]
    assert cli.main(["push", *arguments]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bt-adapter push: error:")]
    assert len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("README.md", b"\xff\xfe", "run/README.md is not text in UTF-8"),
        ("run_summary.json", b"[]", "run/run_summary.json holds a list, expected an object"),
        ("run_summary.json", b'{"data": [1]}', "run/run_summary.json is damaged: data is [1], expected an object"),
        ("config.json", b"{", "run/config.json is damaged"),
    ],
)
def test_what_is_damaged_is_found_before_anything_is_done(hub, tiny_checkpoint, tmp_path, capsys, name, content, said):  # noqa: F811
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "run")
    (folder / name).write_bytes(content)
    assert cli.main(["push", str(folder), "tester/damaged", "--without-code"]) == 1
    assert said in capsys.readouterr().err and not hub.repositories


def test_a_retry_is_told_once(hub, tiny_checkpoint, hf_home):  # noqa: F811
    hub.fail("unavailable", "/preupload/")
    hub.fail("unavailable", "/commit/")
    code = f"from bt_adapter_hf.cli.main import main\nmain(['push', {str(tiny_checkpoint)!r}, 'tester/retried'])"
    lines = run_python(code, hub, hf_home).stderr.splitlines()
    for said in ("503 thrown while requesting POST", "Committing to tester/retried: 503 Service Unavailable"):
        assert len([line for line in lines if said in line]) == 1, lines


def test_help_has_examples_and_imports_no_torch():
    code = (
        "import sys\nfrom bt_adapter_hf.cli.main import build_parser\n"
        "print(build_parser(('push',)).parse_args(['push', 'a', 'b/c']).folder, 'torch' in sys.modules)\n"
        "build_parser(('push',)).parse_args(['push', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("a False") and "examples:" in done.stdout and done.returncode == 0
