"""Scores of the recipe in `scores.csv`, and their table in docs/gif_qa.md between its marks.

python -m recipes.moving_digits_gif_qa.table    # the table from the file, without a run
"""

import csv
from pathlib import Path
from typing import Any


SCORES = Path(__file__).parent / "scores.csv"
DOCS = Path(__file__).parents[2] / "docs" / "gif_qa.md"
MARKS = ("<!-- scores.csv of recipes/moving_digits_gif_qa -->", "<!-- end of scores.csv -->")
COLUMNS = (
    "gifs", "encoder", "connector", "frames", "control", "frameqa", "action", "transition", "count_mse", "mse_of_mean",
    "trained",
)  # fmt: skip
NAMES = {"xclip": "X-CLIP", "bt": "BT-Adapter", "mlp": "MLP", "attention": "attention", "qformer": "Q-Former"}


def write_scores(rows: list[dict[str, Any]]) -> None:
    with SCORES.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_scores() -> list[dict[str, str]]:
    with SCORES.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def markdown(rows: list[dict[str, str]]) -> str:
    """The table; of the controls what changes."""
    lines = [
        "| GIFs | encoder | connector | frames | | FrameQA | Action | Transition | Count, error² | of the mean |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        system = [row["gifs"], NAMES[row["encoder"]], NAMES[row["connector"]], row["frames"]]
        cells = [*(system if not row["control"] else [""] * 4), row["control"]]
        cells += [row[name] for name in ("frameqa", "action", "transition", "count_mse", "mse_of_mean")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def document(text: str) -> str:
    """The page with the table of the file between its marks."""
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{markdown(read_scores())}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def write_table() -> None:
    DOCS.write_text(document(DOCS.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write_table()
