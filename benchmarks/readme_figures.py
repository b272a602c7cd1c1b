"""Regenerates the figures that README.md and docs/evaluation.md show, with the commands that they show them for.

python benchmarks/readme_figures.py --output figures   # prints every block, and where the page says otherwise
"""

import argparse
import contextlib
import io
import re
from pathlib import Path

from bt_adapter_hf.cli.main import main as command


ROOT = Path(__file__).parents[1]


def printed(*argv: str) -> str:
    """What a command of ours prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert command(list(argv)) == 0, argv
    return out.getvalue()


def numbers(text: str) -> list[list[float]]:
    """The rows of numbers of a table, in order."""
    rows = [[float(number) for number in re.findall(r"-?\d+\.\d+", line)] for line in text.splitlines()]
    return [row for row in rows if row]


def run_python(page: str, first: str, folder: Path) -> str:
    """What a block of Python that a page shows prints, in a folder that has the clips of quickstart."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(block(page, first, "python"), page, "exec"), {})
    return out.getvalue()


def block(page: str, first: str, language: str = "") -> str:
    """The block of a page whose first line begins so."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.search(rf"```{language}\n({re.escape(first)}.*?)```", text, re.DOTALL)[1]


def table(text: str, first: str, last: str) -> str:
    """The lines of what was printed from one that begins so to one that begins so."""
    start = text.index(f"\n{first}" if not text.startswith(first) else first)
    return text[start : text.index("\n", text.index(last, start))].strip("\n")


def figures(folder: Path) -> dict[str, tuple[str, str]]:
    """(what the page shows, what comes out now), by what it is."""
    clips = folder / "bt-adapter-quickstart"
    quickstart = printed("quickstart", "--output", str(clips)).replace("\n   ", "\n")  # is indented
    order = printed("eval", "temporal", "--data", "moving-digits-order", "--items", "60", "-o", str(folder / "order"))
    return {
        "README.md, moving digits": (block("README.md", "%  "), table(quickstart, "%  ", "(chance)")),
        "README.md, two clips and two texts": (
            block("README.md", "tensor("),
            run_python("README.md", "import torch\n", folder),
        ),
        "docs/evaluation.md, order": (
            block("docs/evaluation.md", "temporal  "),
            table(order, "temporal  ", "(chance)"),
        ),
    }


def difference(shown: str, now: str) -> float:
    """The largest difference of two tables of the same shape, in their unit."""
    pairs = zip(numbers(shown), numbers(now), strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for clips and results")
    for name, (shown, now) in figures(parser.parse_args().output).items():
        print(f"{name} (differs by at most {difference(shown, now):.1f}):\n{now}\n")
