"""The notebooks, from their first cell to the last, which shows a picture."""

import ast
from pathlib import Path

import pytest
from PIL import Image


FOLDER = Path(__file__).parents[2] / "notebooks"
SMALLER = {"train_a_branch.py": {"CLIPS, EPOCHS = 720, 10": "CLIPS, EPOCHS = 36, 1"}}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.py")))
def test_runs_and_ends_with_a_picture(name, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    source = (FOLDER / name).read_text(encoding="utf-8")
    for old, new in SMALLER.get(name, {}).items():
        assert old in source
        source = source.replace(old, new)
    *cells, last = source.split("\n# %%\n")
    names: dict = {}
    for cell in cells:
        exec(compile(cell, name, "exec"), names)
    *lines, shown = ast.parse(last).body
    exec(compile(ast.Module(lines, []), name, "exec"), names)
    assert isinstance(eval(compile(ast.Expression(shown.value), name, "eval"), names), Image.Image)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_is_a_notebook_for_jupytext(path):
    jupytext = pytest.importorskip("jupytext")
    cells = jupytext.read(path).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ") and cells[-1].cell_type == "code"
