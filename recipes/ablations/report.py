"""Tables with intervals and plots from the rows of finished runs, into docs/what_matters.md between its marks.

A score is a mean over seeds and test clips. Each row is compared with another of its table on the same clips and
seeds; the interval is of the paired bootstrap over test clips (95 %), and the differences of the single seeds stand
beside it. A difference *holds* where the interval leaves out 0 and all seeds agree in its sign, of three seeds at
least. A missing run is named and the row has no mean.
"""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bt_adapter_hf.evaluation.statistics import compare, mean_interval

from .settings import AGAINST_FIRST, BATCH, LONGER_STEPS, STEPS, TABLES, TITLES, words


DOCS = Path(__file__).parents[2] / "docs" / "what_matters.md"  # the plots are in the folder docs/what_matters
Row = dict[str, str]
Rows = dict[tuple[str, int], Row]


def hits(row: Row, score: str) -> np.ndarray:
    return np.array([int(bit) for bit in row[f"{score}_hits"]])


def of_setting(rows: Rows, name: str, seeds: int) -> tuple[dict[int, Row], list[int]]:
    """{seed: row}, and the seeds that are missing."""
    found = {seed: rows[name, seed] for seed in range(seeds) if (name, seed) in rows}
    return found, [seed for seed in range(seeds) if seed not in found]


def pooled(found: dict[int, Row], score: str) -> tuple[np.ndarray, list[int]]:
    """Hits of all seeds, and the clip of each."""
    values = [hits(row, score) for row in found.values()]
    return np.concatenate(values), [clip for one in values for clip in range(len(one))]


def score_cell(found: dict[int, Row], score: str) -> str:
    interval = mean_interval(*pooled(found, score)).scaled(100)
    return f"{interval.value:.1f} ({interval.low:.1f} to {interval.high:.1f})"


def difference_cell(found: dict[int, Row], other: dict[int, Row], score: str) -> str:
    first, clips = pooled(found, score)
    second, _ = pooled(other, score)
    result = compare(first, second, clips).difference.scaled(100)
    single = [100 * (hits(found[seed], score).mean() - hits(other[seed], score).mean()) for seed in found]
    same_sign = all(value > 0 for value in single) or all(value < 0 for value in single)
    holds = same_sign and len(single) >= 3 and (result.low > 0 or result.high < 0)
    each = ", ".join(f"{value:+.1f}" for value in single)
    return f"{result.value:+.1f} ({result.low:+.1f} to {result.high:+.1f}; {each}){' **holds**' if holds else ''}"


def mean(found: dict[int, Row], column: str) -> float:
    return float(np.mean([float(row[column]) for row in found.values()]))


def reached(found: dict[int, Row], percent: float) -> int | None:
    """Clips seen until the order on the way, averaged over seeds, is so high; None where it never is."""
    curves = [json.loads(row["curve"]) for row in found.values()]
    for seen in sorted(map(int, set.intersection(*map(set, curves)))):
        if np.mean([curve[str(seen)] for curve in curves]) >= percent:
            return seen
    return None


def clips_cell(found: dict[int, Row], percent: float) -> str:
    return "not reached" if (seen := reached(found, percent)) is None else f"{seen:,}"


def read_times(path: Path) -> dict[tuple[str, str], float]:
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {(row["setting"], row["start"]): float(row["seconds"]) for row in csv.DictReader(file)}


def table(name: str, rows: Rows, times: dict[tuple[str, str], float], seeds: int, folder: str) -> str:
    against = "the first row" if name in AGAINST_FIRST else "the row above"
    titles = [
        "",
        "order",
        f"order against {against}",
        "object",
        f"object against {against}",
        "R@1",
        "order at 16 frames",
    ]
    titles += ["learns", "step, s"]
    if name in ("order", "longer"):
        titles += ["clips to 75 %", "to 90 %"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    missing, done = [], {}
    for setting in TABLES[name]:
        found, lacking = of_setting(rows, setting, seeds)
        called = words(name, setting)
        if lacking:
            missing.append(f"{setting} (seed {', '.join(map(str, lacking))})")
            single = [
                ", ".join(f"seed {seed}: {100 * hits(row, score).mean():.1f}" for seed, row in found.items())
                for score in ("order", "object")
            ]
            cells = [called, single[0] or "not run", "", single[1], *[""] * (len(titles) - 4)]
            lines.append("| " + " | ".join(cells) + " |")
            continue
        done[setting] = found
        place = TABLES[name].index(setting)
        other = TABLES[name][0 if name in AGAINST_FIRST else place - 1] if place else None
        cells = [called]
        for score in ("order", "object"):
            cells += [score_cell(found, score)]
            cells += [difference_cell(found, done[other], score) if other in done else ""]
        cells += [f"{mean(found, 't2v_R1'):.1f}", f"{mean(found, 'order_long'):.1f}"]
        cells += [f"{100 * mean(found, 'trained') / mean(found, 'parameters'):.0f} %"]
        cells += [f"{seconds:.2f}" if (seconds := times.get((setting, "pixels"))) else ""]
        if name in ("order", "longer"):
            cells += [clips_cell(found, 75), clips_cell(found, 90)]
        lines.append("| " + " | ".join(cells) + " |")
    text = f"### {TITLES[name]}\n\n`python recipes/ablations/run.py -o build/ablations --only {name}`\n\n"
    text += "\n".join(lines) + "\n"
    if missing:
        text += f"\nMissing, and not averaged over: {'; '.join(missing)}.\n"
    if len(done) > 1:
        text += f"\n![{TITLES[name]}]({folder}/{name}.svg)\n"
    return text


def verdicts(rows: Rows, times: dict[tuple[str, str], float], seeds: int) -> str:
    """The questions that the paper's tables, and reading order, answer with yes or no."""

    def held(names: tuple[str, str], score: str) -> str:
        first, second = (of_setting(rows, name, seeds) for name in names)
        if first[1] or second[1]:
            return "not known yet"
        cell = difference_cell(first[0], second[0], score)
        answer = "not shown" if "holds" not in cell else "yes" if cell[0] == "+" else "no"
        return f"{answer}: {cell.removesuffix(' **holds**')}"

    steps = list(zip(TABLES["table6"][1:], TABLES["table6"][:-1], strict=True))
    lines = [
        f"- Table 6: does *{words('table6', upper)}* read order better than *{words('table6', lower)}*? "
        f"{held((upper, lower), 'order')}"
        for upper, lower in steps
    ]
    masked, (full, lacking) = of_setting(rows, "mask70", seeds), of_setting(rows, "mask0", seeds)
    answer = "not known yet"
    shares = [times.get((name, "states")) for name in ("mask70", "mask0")]
    if not masked[1] and not lacking and all(shares):
        lost, share = mean(full, "order") - mean(masked[0], "order"), shares[0] / shares[1]
        yes = lost <= 2 and share <= 0.5
        answer = f"{'yes' if yes else 'no'}: {-lost:+.1f} points at {share:.2f} of the time"
    lines.append(f"- Fig. 4: is a mask of 0.7 within 2 points of none, at half of the branch's step time? {answer}")
    (plain, lacking), (copies, lacking_too) = (of_setting(rows, name, seeds) for name in TABLES["longer"])
    answer = "not known yet"
    if not lacking and not lacking_too:
        seen, seen_without, all_clips = reached(copies, 90), reached(plain, 90), LONGER_STEPS * BATCH
        yes = seen is not None and 2 * seen <= (seen_without or all_clips)
        answer = (
            f"{'yes' if yes else 'no'}: of {all_clips:,} clips, 90 % with them: {clips_cell(copies, 90)}; "
            f"without: {clips_cell(plain, 90)}"
        )
    lines.append(f"- Reading order: 90 % order with half of the clips, by reversed copies? {answer}")
    return "\n".join(lines) + "\n"


def plot(name: str, rows: Rows, seeds: int, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "bt-adapter"  # the same file from the same rows
    from matplotlib import pyplot

    done = {}
    for setting in TABLES[name]:
        found, lacking = of_setting(rows, setting, seeds)
        if not lacking:
            done[setting] = found
    if len(done) < 2:
        return
    figure, axes = pyplot.subplots(figsize=(6, 0.5 * len(done) + 1.2))
    for height, found in enumerate(done.values()):
        for score, colour, shift in (("order", "tab:blue", 0.1), ("object", "tab:orange", -0.1)):
            interval = mean_interval(*pooled(found, score)).scaled(100)
            axes.plot([interval.low, interval.high], [height + shift] * 2, color=colour, linewidth=1.5)
            axes.plot(interval.value, height + shift, "o", color=colour, label=score if height == 0 else None)
            single = [100 * hits(row, score).mean() for row in found.values()]
            axes.plot(single, [height + shift] * len(single), "|", color=colour)
    axes.axvline(50, color="grey", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(done)), [words(name, setting) for setting in done])
    axes.invert_yaxis()
    axes.set_xlabel("%: mean and interval over clips; ticks are seeds; dotted: chance of order")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


def report(rows: Rows, times: Path, seeds: int, docs: Path = DOCS, shown: Sequence[str] = ()) -> str:
    """Writes the tables between the marks of a page, and plots into the folder beside it; returns the tables.

    Args:
        shown: tables that are printed.

    A page that is not there has nothing but the tables.
    """
    begin, end = "<!-- tables: written by recipes/ablations/run.py --report -->\n", "<!-- end of tables -->"
    old = docs.read_text(encoding="utf-8") if docs.is_file() else f"{begin}\n{end}\n"
    if begin not in old or end not in old:
        raise ValueError(f"{docs} has no marks {begin.strip()} and {end}, between which the tables stand.")
    folder = docs.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    took = read_times(times)
    wanted = {(setting, seed) for names in TABLES.values() for setting in names for seed in range(seeds)}
    rows = {key: row for key, row in rows.items() if key in wanted}
    hours = sum(float(row["cpu_seconds"]) for row in rows.values()) / 3600
    text = (
        f"{len(rows)} of {len(wanted)} runs, {STEPS} steps of {BATCH} clips each ({LONGER_STEPS:,} where it says so), "
        f"{seeds} seed{'s' * (seeds > 1)}; "
        f"{hours:.2f} hours of one core for the training and scoring of those there are. All scores in percent."
        f"{'' if took else ' Times of a step are missing: `--only times` measures them.'}\n\n"
    )
    tables = {name: table(name, rows, took, seeds, folder.name) for name in TABLES}
    text += verdicts(rows, took, seeds) + "\n" + "\n".join(tables.values())
    for name in TABLES:
        plot(name, rows, seeds, folder)
    marked = re.compile(re.escape(begin) + ".*?" + re.escape(end), flags=re.S)
    docs.write_text(marked.sub(lambda _: f"{begin}\n{text}\n{end}", old), encoding="utf-8")
    print("\n".join([*(tables[name] for name in shown), f"All tables: {docs}"]))
    return text
