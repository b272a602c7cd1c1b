"""One table of several results, for people: markdown for a model card, or a page with plots."""

import html
import io
from collections.abc import Sequence

from ..hub.result_files import HEADLINES, NamedResult, cell, headlines, markdown_table, p_values, score_rows
from ..import_utils import require_package


# What of a protocol a reader compares first; the rest is in the result files.
COMPARED = (
    *("model", "data", "data_revision", "video_processor", "max_text_length", "templates", "paragraph"),
    *("dual_softmax", "num_clips", "decoding", "judge", "judge_prompts", "shuffle_draws", "seed"),
)


def markdown_report(results: Sequence[NamedResult]) -> str:
    """A section for each task: scores with intervals and controls, paired tests, what differs, what failed."""
    sections = []
    for task in dict.fromkeys(result.content["task"] for result in results):
        of_task = [result for result in results if result.content["task"] == task]
        lines = [f"## {task}", "", *markdown_table(score_rows(of_task)), ""]
        lines += [f"- {note}" for note in _notes(of_task)]
        differing = _protocol_rows(of_task)
        if len(differing) > 1:
            lines += ["", *markdown_table(differing)]
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def html_report(results: Sequence[NamedResult]) -> str:
    """The same as a page of its own, with a plot for each task. Nothing on it is loaded from elsewhere."""
    require_package("matplotlib", "eval")
    parts = []
    for task in dict.fromkeys(result.content["task"] for result in results):
        of_task = [result for result in results if result.content["task"] == task]
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in _notes(of_task))
        parts.append(f"<h2>{html.escape(task)}</h2>{_plot(of_task)}{_html_table(score_rows(of_task))}<ul>{notes}</ul>")
        differing = _protocol_rows(of_task)
        if len(differing) > 1:
            parts.append(_html_table(differing))
    style = (
        "body{font-family:sans-serif;margin:2em;max-width:75em}table{border-collapse:collapse;margin:1em 0}"
        "td,th{border-bottom:1px solid #ccc;padding:.3em .8em;text-align:right;vertical-align:top}"
        "td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}"
    )
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>bt-adapter eval</title>'
        f"<style>{style}</style></head><body><h1>Evaluation</h1>{''.join(parts)}</body></html>\n"
    )


def _notes(results: Sequence[NamedResult]) -> list[str]:
    notes = []
    for result in results:
        content = result.content
        for name, test in content.get("against_frame_average", {}).items():
            if name in HEADLINES:
                p = p_values(test["p_bootstrap"], test["p_mcnemar"])
                notes.append(f"{result.name}, {name}: {cell(test['difference'])} above frame-averaged CLIP ({p})")
        counts = ", ".join(f"{count} {what}" for what, count in content["items"].items())
        failed = content["failed"]["items"]
        notes.append(f"{result.name}: over {counts}" + (f"; {failed} could not be used" if failed else ""))
        if content["protocol"].get("dual_softmax"):
            notes.append(f"{result.name}: scores are weighed by all queries at once (dual softmax)")
        unjudged = content.get("unjudged", {})  # not in what an older release wrote
        if unjudged.get("answers"):
            share = f"{unjudged['answers']} of {unjudged['of']}"
            notes.append(f"{result.name}: {share} answers got no score from the judge and are not in its means")
    if len({result.content["protocol"].get("data_fingerprint") for result in results}) > 1:
        notes.append("The results are not over the same data: their differences say little.")
    notes.append("In brackets 95 % intervals over videos.")
    return notes


def _protocol_rows(results: Sequence[NamedResult]) -> list[list[str]]:
    """Of several results what differs, of one what was done."""
    rows = [["", *(result.name for result in results)]]
    for name in COMPARED:
        values = [result.content["protocol"].get(name) for result in results]
        if isinstance(values[0], dict):
            keys = dict.fromkeys(key for value in values for key in value or {})
            nested = {f"{name}.{key}": [(value or {}).get(key) for value in values] for key in keys}
        else:
            nested = {name: values}
        for label, each in nested.items():
            differs = any(value != each[0] for value in each)
            if differs or (len(results) == 1 and name != "video_processor" and each[0] is not None):
                rows.append([label, *("" if value is None else str(value) for value in each)])
    return rows


def _html_table(rows: list[list[str]]) -> str:
    def line(row: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    return f"<table>{line(rows[0], 'th')}{''.join(line(row, 'td') for row in rows[1:])}</table>"


def _plot(results: Sequence[NamedResult]) -> str:
    """The first score of the task, or the average of all, as SVG: bars for the model and its controls with intervals,
    and chance as a line."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    names = headlines(results)
    score = "average" if "average" in names else names[0]
    shown = list(dict.fromkeys(what for result in results for what, _ in result.rows))
    figure = Figure(figsize=(2 + 1.3 * len(shown), 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes, width = figure.subplots(), 0.8 / len(results)
    for number, result in enumerate(results):
        scores = {what: scores[score] for what, scores in result.rows if score in scores}
        places = [shown.index(what) + (number - (len(results) - 1) / 2) * width for what in scores]
        values = [found["value"] for found in scores.values()]
        below = [found["value"] - found["low"] for found in scores.values()]
        above = [found["high"] - found["value"] for found in scores.values()]
        axes.bar(places, values, width, yerr=[below, above], capsize=3, label=result.name)
        if score in result.content["chance"]:
            axes.axhline(result.content["chance"][score], linestyle="--", color="grey", linewidth=1)
    axes.set_xticks(range(len(shown)), shown)
    axes.set_ylabel(score)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=4)
    with io.StringIO() as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
        svg = file.getvalue()
    return svg[svg.index("<svg") :]
