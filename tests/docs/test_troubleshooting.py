"""docs/troubleshooting.md: each text that it explains is one that the package says."""

import ast
import re
from pathlib import Path

import pytest

import bt_adapter_hf


PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
TEXTS = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)


def _said() -> str:
    """All texts in the code, f-strings with a gap where a value stands."""
    texts = []
    for path in Path(bt_adapter_hf.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n\n".join(texts)


SAID = _said()


@pytest.mark.parametrize("text", TEXTS)
def test_the_package_says_so(text):
    assert text in SAID


def test_each_once():
    assert len(TEXTS) > 30 and len({*TEXTS}) == len(TEXTS)
