import argparse
import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bt_adapter_hf
from bt_adapter_hf.cli import main as main_module
from bt_adapter_hf.cli.main import COMMANDS, build_parser, main
from tests import clip_tools


def test_every_command_has_help_with_an_example(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as exit:
            main([name, "--help"])
        assert exit.value.code == 0
        out = capsys.readouterr().out
        assert f"bt-adapter {name}" in out.split("example", 1)[1]


def test_help_lists_every_command_and_is_quick_to_import():
    script = (
        "import sys\n"
        "from bt_adapter_hf.cli.main import build_parser\n"
        "print(build_parser().format_help())\n"
        "heavy = {'torch', 'transformers', 'av', 'PIL', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert re.search(rf"^ +{name}\b", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("argv", [[], ["fly"], ["env", "--fly"]])
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    assert "usage: bt-adapter" in capsys.readouterr().err


@pytest.fixture
def failing(monkeypatch):
    """Makes `bt-adapter env` raise what it is given."""

    def install(error: BaseException) -> None:
        def run(args: argparse.Namespace) -> int:
            raise error

        def parser_with_failure(commands):
            parser = build_parser(commands)
            parser.set_defaults(run=run)
            for action in parser._subparsers._group_actions:
                action.choices["env"].set_defaults(run=run)
            return parser

        monkeypatch.setattr(main_module, "build_parser", parser_with_failure)

    return install


@pytest.mark.parametrize("error", [ValueError("bad\n  value"), OSError("bad value")])
def test_user_errors_are_one_line(failing, capsys, error):
    failing(error)
    assert main(["env"]) == 1
    assert capsys.readouterr() == ("", "bt-adapter env: error: bad value\n")
    with pytest.raises(type(error)):
        main(["env", "--debug"])


def test_import_errors_point_to_a_remedy(failing, capsys):
    failing(ImportError("no module x"))
    assert main(["env"]) == 1
    assert capsys.readouterr().err.endswith("error: no module x (`bt-adapter env` tells what is broken)\n")
    failing(ImportError("x is missing: pip install -e '.[train]'"))
    assert main(["env"]) == 1
    assert capsys.readouterr().err.endswith("error: x is missing: pip install -e '.[train]'\n")


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"bt_adapter_hf {bt_adapter_hf.__version__}\n"


class OwnError(RuntimeError):
    """Raised on purpose: its text says what to do."""

    __module__ = "bt_adapter_hf.somewhere"


@pytest.mark.parametrize("error", [KeyError("bug"), RuntimeError("a\nb"), AssertionError(), ZeroDivisionError("x")])
def test_no_exception_leaves_a_command_as_a_traceback(failing, capsys, error):
    failing(error)
    assert main(["env"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), "Traceback" in err) == ("", 1, False)
    message = " ".join(str(error).split()) or "no message"
    assert err.startswith(f"bt-adapter env: error: {type(error).__name__}: {message} (at bt_adapter_hf/cli/main.py:")
    assert re.search(r", test_main.py:\d+\)", err)  # where it arose, outside of the package here
    assert "report this line with the output of `bt-adapter env`" in err and "--debug" in err
    with pytest.raises(type(error)):
        main(["env", "--debug"])


def test_errors_of_the_package_and_of_memory_need_no_report(failing, capsys):
    failing(OwnError("do this"))
    assert main(["env"]) == 1
    assert capsys.readouterr().err == "bt-adapter env: error: do this\n"
    failing(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"))
    assert main(["env"]) == 1
    assert capsys.readouterr().err == (
        "bt-adapter env: error: out of memory: CUDA out of memory. Tried to allocate 2 GiB. "
        "Give it less at once: a smaller batch, fewer frames\n"
    )


def test_a_full_disk_is_told_with_its_place(failing, capsys):
    failing(OSError(errno.ENOSPC, "No space left on device", "runs/x"))
    assert main(["env"]) == 1
    assert capsys.readouterr().err == (
        "bt-adapter env: error: no space is left on the disk for runs/x (No space left on device): make room, or "
        "choose another place\n"
    )


def test_interrupt(failing, capsys):
    failing(KeyboardInterrupt())
    assert main(["env"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_reader_of_the_output_may_leave():
    script = Path(sys.executable).with_name("bt-adapter")
    done = subprocess.run(["bash", "-c", f"'{script}' env --json | true"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "error" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", "--train", "t.csv", "--output-dir", "o", "--model"],
        ["finetune", "--train", "t.jsonl", "--output-dir", "o", "--model"],
        ["check-data", "t.csv", "--model"],
        ["convert", "x.pth", "o", "--base"],
        ["chat", "a.mp4", "-q", "what?", "--model"],
        ["index", "a.mp4", "-o", "i", "--model"],
        ["classify", "a.mp4", "--labels", "a,b", "--model"],
    ],
)
def test_a_model_that_is_not_there(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    clip_tools.write_clip(tmp_path / "a.mp4", count=4)
    (tmp_path / "t.csv").write_text("video,text\na.mp4,one\n")
    message = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": message}) + "\n")
    assert main([*arguments, "./nothere"]) == 1
    assert "there is no folder './nothere'" in capsys.readouterr().err
