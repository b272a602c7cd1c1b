"""The site: every page in the navigation, every link to something, every picture with a text in its place.

`mkdocs build --strict`, which .ci/run does, looks at anchors and docstrings besides.
"""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md"))
MADE_BY_THE_BUILD = ("reference/commands.md",)
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(?:#[^)]*)?\)")


def test_navigation():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"([\w/.]+\.md)$", settings.partition("\nnav:\n")[2], re.MULTILINE)
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in PAGES} | {*MADE_BY_THE_BUILD}
    assert sorted(listed) == sorted({*listed})
    assert {name for name in listed if not name.startswith("repository/")} == pages
    for name in listed:
        if name.startswith("repository/"):
            assert (ROOT / name.removeprefix("repository/")).is_file()


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for is_picture, label, link in LINK.findall(text):
        target = (page.parent / link).resolve()
        made = (
            target.is_relative_to(ROOT / "docs") and target.relative_to(ROOT / "docs").as_posix() in MADE_BY_THE_BUILD
        )
        assert target.exists() or made, f"{page.name}: {link}"
        assert label or not is_picture, f"{page.name}: {link} has no text in its place"


def test_reference_names_what_is_there():
    import importlib

    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            module, _, attribute = name.rpartition(".")
            path = ROOT / "src" / Path(*name.split("."))
            if not path.with_suffix(".py").is_file():
                assert hasattr(importlib.import_module(module), attribute), f"{page.name}: {name}"


def test_public_names_are_in_the_reference():
    """Each is named by a page, or stands in a module that one shows whole."""
    import bt_adapter_hf

    shown = set(re.findall(r"^::: bt_adapter_hf\.(\S+)$", "\n".join(p.read_text() for p in PAGES), re.MULTILINE))
    hidden = [
        name
        for name, module in bt_adapter_hf._MODULE_OF.items()
        if module not in shown and f"{module}.{name}" not in shown
    ]
    assert hidden == []
