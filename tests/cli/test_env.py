import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from bt_adapter_hf.cli import _versions, env
from bt_adapter_hf.cli.main import main


def test_report_of_a_healthy_environment(capsys):
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert report["packages"]["transformers"] == {"version": transformers.__version__, "error": None}
    assert report["builds"]["torch"] == torch.__version__
    assert report["builds"]["torchvision"].startswith(report["packages"]["torchvision"]["version"].partition("+")[0])
    assert report["video_decoders"]["pyav"] is None
    assert report["devices"][0].startswith("cpu")
    assert report["precision"]["dtype"] in ("float32", "bfloat16") and report["precision"]["reason"]
    assert report["chat"] == "answers"
    assert report["versions"]["transformers"]["installed"] == transformers.__version__
    assert report["versions"]["transformers"]["range"].startswith(">=5.23")

    assert main(["env"]) == 0
    out = capsys.readouterr().out
    state = env._describe(report["versions"]["transformers"])
    assert re.search(rf"^transformers +{re.escape(transformers.__version__)} +{re.escape(state)}$", out, re.MULTILINE)
    assert re.search("^precision +(float32|bfloat16) on [^:]+: .+$", out, re.MULTILINE)
    assert re.search("^chat model +answers$", out, re.MULTILINE)
    assert "decoders         pyav" in out
    assert out.endswith("no problem found\n")


def test_a_torchvision_that_does_not_fit_torch_is_named_with_the_fix(tmp_path):
    """The same files and the same error as the CUDA build of torchvision beside a CPU-only torch."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (package / "version.py").write_text("__version__ = '0.28.0+cu130'\n")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from bt_adapter_hf.cli.main import main\n"
        "sys.exit(main(['env', *sys.argv[1:]]))"
    )
    done = subprocess.run([sys.executable, "-c", script, "--json"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    (problem,) = json.loads(done.stdout)["problems"]
    assert problem.startswith(f"torchvision (0.28.0+cu130) does not fit torch ({torch.__version__})")
    assert "operator torchvision::nms does not exist" in problem
    assert "pip uninstall -y torch torchvision && pip install torch torchvision" in problem
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "PROBLEM: torchvision (0.28.0+cu130) does not fit torch" in done.stdout
    assert "Traceback" not in done.stderr


# What torchcodec 0.14 says, shortened: one block per FFmpeg version that it tries.
TORCHCODEC_MESSAGE = """Could not load libtorchcodec. Likely causes:
          1. FFmpeg is not properly installed in your environment.
[start of libtorchcodec loading traceback]
FFmpeg version 8:
OSError: {first}
The above exception was the direct cause of the following exception:
OSError: Could not load this library: /x/torchcodec/libtorchcodec_core8.so
FFmpeg version 5:
OSError: {second}
[end of libtorchcodec loading traceback]."""


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (
            "libavutil.so.60: cannot open shared object file: No such file or directory",
            "libavutil.so.57: cannot open shared object file: No such file or directory",
            "FFmpeg's libraries are missing.*apt-get install ffmpeg",
        ),
        (
            "libnvrtc.so.13: cannot open shared object file: No such file or directory",
            "libnvrtc.so.13: cannot open shared object file: No such file or directory",
            "CUDA build and CUDA's libraries are missing.*libnvrtc.*pip install torch torchvision torchcodec",
        ),
        (
            "libavutil.so.60: cannot open shared object file: No such file or directory",
            "/x/torchcodec/libtorchcodec_core5.so: undefined symbol: _ZN3c1013MessageLoggerC1E",
            "built for another torch.*undefined symbol.*pip install torch torchvision torchcodec",
        ),
    ],
)
def test_why_torchcodec_does_not_load(first, second, expected):
    cause = env._torchcodec_cause(TORCHCODEC_MESSAGE.format(first=first, second=second))
    assert re.search(expected, cause), cause


def test_each_version_is_compared_with_the_tested_one_and_the_range(monkeypatch):
    tested = {"torch": "2.14.1", "transformers": "5.24.0", "tokenizers": "0.23.3", "peft": "0.21.2", "av": "18.1.0"}
    installed = {
        "torch": "2.14.1+cpu", "transformers": "6.0.0", "tokenizers": "0.23.1", "peft": "0.22.0",
        "ftfy": "6.3.1", "av": "18.1", "something-else": "1.0",
    }  # fmt: skip
    monkeypatch.setattr(_versions, "tested_versions", lambda: tested)
    monkeypatch.setattr(_versions, "installed_versions", lambda: installed)
    compared = _versions.compare_versions()
    assert {name: entry["state"] for name, entry in compared.items()} == {
        "torch": "as tested",
        "transformers": "out of range",
        "tokenizers": "older than tested",
        "peft": "newer than tested",
        "ftfy": "not tested",
        "av": "as tested",
    }
    assert compared["transformers"]["range"] == ">=5.23,<6"
    assert env._describe(compared["tokenizers"]) == "older than tested (0.23.3)"

    monkeypatch.setattr(env, "_chat_error", lambda: pytest.fail("not tried where a version is out of range"))
    report = env.environment_report()
    assert report["problems"] == [
        "transformers 6.0.0 is out of the range that bt_adapter_hf takes. Fix: pip install 'transformers>=5.23,<6'"
    ]
    assert report["chat"].startswith("not tried")
    (note,) = [note for note in report["notes"] if "than tested" in note]
    assert "peft 0.22.0 (0.21.2)" in note and "something-else" not in note and "torch 2" not in note
    assert re.search(r"pip install -c .*/assets/constraints\.txt peft tokenizers transformers$", note)


def test_every_package_of_the_parts_for_users_is_told():
    users = ("train", "eval", "search", "quickstart", "quantization", "torchcodec", "demo")
    parts = {
        re.match(r"[\w-]+", line)[0]: re.search(r"extra == .(\w+)", line)[1]
        for line in importlib.metadata.requires("bt_adapter_hf")
        if re.search(rf"extra == .({'|'.join(users)})\b", line)
    }
    assert len(parts) > 8 and parts.keys() <= env.PURPOSES.keys()


def test_what_is_not_installed_says_what_it_is_for(capsys):
    packages = {name: {"version": None, "error": None} for name in (*env.PURPOSES, "torch")}
    empty = {"bt_adapter_hf": "1", "python": "3", "platform": "x", "packages": packages, "builds": {}, "versions": {}}
    lists = dict.fromkeys(("devices", "problems", "notes"), [])
    env._print_report({**empty, **lists, "precision": None, "video_decoders": {}, "chat": "answers"})
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["scikit-learn"].endswith("not installed; for the digits of quickstart (pip install '.[quickstart]')")
    assert lines["decord"].endswith("not installed; for another decoder") and "not installed" not in lines["torch"]


def test_no_problem_is_not_found_while_chat_is_broken(monkeypatch, capsys):
    """As with the transformers that renamed a field of an output class: all imports work, and a video ends in an
    error."""
    from bt_adapter_hf.models.modeling_bt_adapter_llava import BTAdapterLlavaModel

    def renamed(*args, **kwargs):
        raise TypeError("got an unexpected keyword argument 'image_hidden_states'\nand more")

    monkeypatch.setattr(BTAdapterLlavaModel, "forward", renamed)
    assert main(["env"]) == 1
    out = capsys.readouterr().out
    assert re.search("^chat model +fails$", out, re.MULTILINE)
    assert "PROBLEM: the chat model inside the package does not answer" in out
    assert "(TypeError: got an unexpected keyword argument 'image_hidden_states')" in out
    assert "no problem found" not in out


def test_the_tested_versions_lie_in_the_ranges_and_are_all_of_them():
    """constraints.txt, which the package holds: each pin within its range, each direct and indirect package pinned."""
    tested, allowed = _versions.tested_versions(), _versions.allowed_versions()
    assert Path(__file__).parents[2].joinpath("constraints.txt").read_text() == _versions.CONSTRAINTS.read_text()
    for name, requirement in allowed.items():
        assert name in tested, f"{name}: `bash .ci/refresh-constraints`; if it is gone, pip install -e '.[test]'"
        assert requirement.specifier.contains(tested[name]), (name, tested[name])
    # of those that are installed in the tested version: another one may need others
    installed = _versions.installed_versions()
    needed, seen = {("bt-adapter-hf", "test")}, set()
    while needed:
        name, extra = needed.pop()
        seen.add((name, extra))
        if name != "bt-adapter-hf" and installed.get(name) != tested[name]:
            continue
        for line in importlib.metadata.requires(name) or []:
            requirement = _versions.Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                required = _versions.canonicalize_name(requirement.name)
                assert required in tested, f"{name} needs {required}: run `bash .ci/refresh-constraints`"
                needed |= {(required, wanted) for wanted in ("", *requirement.extras)} - seen
