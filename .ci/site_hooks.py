"""What mkdocs.yml leaves to a hook: links that leave docs/, and the help of the commands.

Pages link to files of the repository as one does on GitHub, `../examples/pretrain.py`. On the site such a file stands
below `repository/`. A file that is not there is a warning, which `--strict` makes an error.
"""

import argparse
import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel


ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(?=[)#])")
PAGES = ("benchmarks/RESULTS.md",)  # what the navigation has of them


def _in_repository(src_uri: str) -> str:
    """The path in the repository of a page of the site."""
    return src_uri.removeprefix("repository/") if src_uri.startswith("repository/") else f"docs/{src_uri}"


def _target(src_uri: str, link: str) -> str:
    """The path in the repository of what a page links to; of a folder that has one, its README."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(_in_repository(src_uri)), link))
    return f"{path}/README.md" if (ROOT / path / "README.md").is_file() else path


def on_files(files, config):
    """Adds what pages link to outside docs/, and the page of the commands."""
    waiting, known = [(file.src_uri, Path(file.abs_src_path)) for file in files.documentation_pages()], set()
    for path in PAGES:
        waiting.append((f"repository/{path}", ROOT / path))
    while waiting:
        src_uri, page = waiting.pop()
        if src_uri.startswith("repository/"):
            level = InclusionLevel.UNDEFINED if _in_repository(src_uri) in PAGES else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, src_uri, abs_src_path=str(page), inclusion=level))
        if page.suffix != ".md":
            continue
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            path = _target(src_uri, link)
            if not path.startswith("docs/") and path not in known and (ROOT / path).is_file():
                known.add(path)
                if path not in PAGES:
                    waiting.append((f"repository/{path}", ROOT / path))
    files.append(File.generated(config, "reference/commands.md", content=_commands()))
    return files


def on_page_markdown(markdown, page, **_):
    here = posixpath.dirname(page.file.src_uri) or "."

    def link(found):
        path = _target(page.file.src_uri, found[1])
        there = path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"
        return posixpath.relpath(there, here)

    return LINK.sub(link, markdown)


def _commands() -> str:
    from bt_adapter_hf.cli.main import COMMANDS, build_parser

    os.environ["COLUMNS"] = "100"
    actions = build_parser()._subparsers._group_actions
    (subparsers,) = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    parts = ["# Commands", "What `--help` prints, of each."]
    for name in COMMANDS:
        parts.append(f"## bt-adapter {name}\n\n```text\n{subparsers.choices[name].format_help()}```")
    return "\n\n".join(parts) + "\n"
