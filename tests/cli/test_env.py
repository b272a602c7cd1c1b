import json
import re
import subprocess
import sys

import pytest
import torch
import transformers

from bt_adapter_hf.cli import env
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

    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"transformers     {transformers.__version__}\n" in out
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
