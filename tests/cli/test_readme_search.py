"""README.md's part on searching, as it stands."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from bt_adapter_hf.cli.main import main
from bt_adapter_hf.cli.quickstart import CLIPS, SEED
from bt_adapter_hf.data.moving_digits import write_clips


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.split("\n## Search your own videos\n")[1].split("\n## ")[0]


@pytest.fixture
def home(clips, tmp_path, monkeypatch) -> Path:
    """A user's folder: videos in `videos`, and two clips where the commands run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copy(clips / "red.mp4", "clip.mp4")
    shutil.copy(clips / "grey.gif", "other.gif")
    return tmp_path


def test_the_commands(home, tiny_checkpoint, capsys):
    shutil.copytree(tiny_checkpoint, home / "my-adapter")
    (commands,) = re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)
    for line in commands.splitlines():
        assert main(shlex.split(line, comments=True)[1:]) == 0, line
    assert (home / "hits.png").is_file() and (home / "videos.index" / "skipped.jsonl").is_file()
    assert "green.mp4" in capsys.readouterr().out
    shutil.rmtree(home / "videos.index")  # of another model
    (command,) = re.findall(r"`bt-adapter (index .*?)`", SECTION)
    assert main(shlex.split(command)) == 0


def test_the_snippet_prints_what_it_says(home, capsys):
    pytest.importorskip("sklearn")
    write_clips(home / "bt-adapter-quickstart" / "clips", "test", CLIPS, SEED)
    (code,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    (printed,) = re.findall(r"```\n(tensor.*?)```", SECTION, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})

    def numbers(text: str) -> list[float]:
        return [float(number) for number in re.findall(r"\d\.\d+", text)]

    assert numbers(capsys.readouterr().out) == pytest.approx(numbers(printed), abs=2e-3)
