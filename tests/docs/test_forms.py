"""Commands that pages show as a form, in `text` blocks (what is in `bash` is run): each would be taken."""

import re
import shlex
from pathlib import Path

import pytest

from bt_adapter_hf.cli import _training_options, finetune
from bt_adapter_hf.cli.main import build_parser


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands() -> list[tuple[str, list[str]]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:text)?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"\s*(\$ )?(bt-adapter|python) ", line) and " ..." not in line:
                    found.append((page.name, shlex.split(line.replace("$ ", ""), comments=True)))
    return found


FORMS = commands()


@pytest.mark.parametrize(("page", "words"), FORMS, ids=[f"{page}: {' '.join(words[:3])}" for page, words in FORMS])
def test_would_be_taken(page, words):
    program, first, *rest = words
    if program == "bt-adapter":
        build_parser([first]).parse_args([first, *rest])
        return
    path = ROOT / (f"{rest.pop(0).replace('.', '/')}.py" if first == "-m" else first)
    source = path.read_text(encoding="utf-8")
    if '"finetune"' in source:  # and what is left over is given to that
        source += Path(_training_options.__file__).read_text(encoding="utf-8")
        source += Path(finetune.__file__).read_text(encoding="utf-8")
    for option in (word for word in rest if word.startswith("--")):
        assert f'"{option}"' in source, f"{page}: {option}"


def test_there_are_some():
    assert len(FORMS) > 15
