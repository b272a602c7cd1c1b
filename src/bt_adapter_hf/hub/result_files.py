"""Result files of `bt-adapter eval`: reading them, and their table, for cards and reports."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from .card_text import hub_name, is_hub_source, metric_name, metric_type, public


RESULT_NAME = "result.json"
FIELDS = ("task", "scores", "controls", "chance", "items", "protocol", "failed")
HEADLINES = (  # what a table shows
    *("t2v_R1", "t2v_R5", "t2v_R10", "v2t_R1", "top1", "top5", "pair", "group"),
    *("exact", "relaxed", "judged", "judge_score"),
    *("correctness", "detail", "context", "temporal", "consistency", "average"),
)
CONTROL_NAMES = {
    "frame_average": "frame-averaged CLIP",
    "one_frame": "one frame only",
    "shuffled": "frames shuffled",
    "reversed": "frames reversed",
    "blind": "no video",
}
MODEL = "model"
_SCORE = ("value", "low", "high")
_P_VALUES = ("p_bootstrap", "p_mcnemar")
TASKS = {  # of the Hub, and for people
    "retrieval": ("text-to-video-retrieval", "Retrieval"),
    "recognition": ("video-classification", "Zero-shot recognition"),
    "temporal": ("video-text-to-text", "Texts that only the order of the frames tells apart"),
    "qa": ("video-text-to-text", "Video question answering"),
    "chat-bench": ("video-text-to-text", "Video conversation, scored by a judge"),
}


@dataclass(frozen=True)
class NamedResult:
    """A result file and what it is called in the table."""

    name: str
    content: dict[str, Any]

    @property
    def rows(self) -> list[tuple[str, dict[str, dict[str, float]]]]:
        """(what was shown, scores), the model first."""
        controls = [(CONTROL_NAMES.get(name, name), scores) for name, scores in self.content["controls"].items()]
        return [(MODEL, self.content["scores"]), *controls]


def read_results(paths: Sequence[str | Path], names: Sequence[str] | None = None) -> list[NamedResult]:
    """Result files, or the folders that hold them.

    Args:
        names: for the table; by default those of the folders.

    Raises:
        ValueError: there are none, one is no result file, or there is another number of names.
    """
    if not paths:
        raise ValueError("Name one or more result files, or the folders that hold them.")
    if names is not None and len(names) != len(paths):
        raise ValueError(f"There are {len(names)} names for {len(paths)} results.")
    results = []
    for number, path in enumerate(map(Path, paths)):
        file = path / RESULT_NAME if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{path} is no result file, and no folder with a {RESULT_NAME}.")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        problem = _problem(content)
        if problem is not None:
            raise ValueError(f"{file} is no result of `bt-adapter eval`: {problem}.")
        name = names[number] if names else (file.resolve().parent.name if file.name == RESULT_NAME else file.stem)
        results.append(NamedResult(name, content))
    return results


def _problem(content: Any) -> str | None:
    """Why this is no result file."""
    if not isinstance(content, dict):
        return f"it holds no object but {str(content)[:40]!r}"
    missing = [name for name in FIELDS if name not in content]
    if missing:
        return f"it has no {', '.join(missing)}"
    tests = content.get("against_frame_average", {})
    wrong = {
        "task": not isinstance(content["task"], str),
        "scores": not _are_scores(content["scores"]) or not set(HEADLINES) & set(content["scores"]),
        "controls": not _is_map(content["controls"], _are_scores),
        "chance": not _is_map(content["chance"], _is_number),
        "items": not _is_map(content["items"], _is_number),
        "protocol": not isinstance(content["protocol"], dict),
        "failed": not isinstance(content["failed"], dict) or not _is_number(content["failed"].get("items")),
        "unjudged": not _is_unjudged(content.get("unjudged", {})),
        "against_frame_average": not _is_map(tests, _is_test),
    }
    named = next((name for name, is_wrong in wrong.items() if is_wrong), None)
    return named and f"its {named!r} is not as that command writes it: {str(content[named])[:80]}"


def _is_map(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(is_right, value.values()))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_scores(value: Any) -> bool:
    return _is_map(
        value, lambda score: isinstance(score, dict) and all(_is_number(score.get(name)) for name in _SCORE)
    )


def _is_unjudged(value: Any) -> bool:
    return isinstance(value, dict) and (not value or all(_is_number(value.get(name)) for name in ("answers", "of")))


def _is_test(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _are_scores({"": value.get("difference")})
        and all(name in value and (value[name] is None or _is_number(value[name])) for name in _P_VALUES)
    )


def p_values(bootstrap: float | None, mcnemar: float | None) -> str:
    """What paired tests found, for people."""
    said = ["too few videos for a bootstrap test" if bootstrap is None else f"paired bootstrap p = {bootstrap:.2g}"]
    return ", ".join(said + ([] if mcnemar is None else [f"McNemar p = {mcnemar:.2g}"]))


def headlines(results: Sequence[NamedResult]) -> list[str]:
    """The scores that a table of these results shows."""
    return [name for name in HEADLINES if any(name in result.content["scores"] for result in results)]


def score_rows(results: Sequence[NamedResult]) -> list[list[str]]:
    """A head, and a row for each result, each of its controls, and chance."""
    columns = headlines(results)
    rows = [["", *columns]]
    for result in results:
        for shown, scores in result.rows:
            label = result.name if shown == MODEL else f"– {shown}"
            rows.append([label, *(cell(scores.get(column)) for column in columns)])
        chance = result.content["chance"]
        if chance:
            rows.append(["– (chance)", *(f"{chance[column]:.1f}" if column in chance else "" for column in columns)])
    return rows


def cell(score: dict[str, float] | None) -> str:
    """ "93.3 [86.9, 100.0]"."""
    return "" if score is None else f"{score['value']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, the first row its head."""
    cleaned = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in rows]
    head, *body = [f"| {' | '.join(row)} |" for row in cleaned]
    return [head, "|---" * len(rows[0]) + "|", *body]


def card_section(results: Sequence[NamedResult]) -> str:
    """The tables of a model card, each with what it was measured on."""
    parts = []
    for result in results:
        protocol, counts = result.content["protocol"], result.content["items"]
        said = [f"on {_data(protocol)}", "over " + ", ".join(f"{count} {what}" for what, count in counts.items())]
        rules = protocol.get("video_processor")
        if isinstance(rules, dict) and rules.get("num_frames"):
            said.append(f"{rules['num_frames']} frames per video")
        if protocol.get("templates"):
            said.append("templates " + ", ".join(f'"{template}"' for template in protocol["templates"]))
        said += [words for name, words in (("dual_softmax", "dual softmax"),) if protocol.get(name)]
        said += [f"judge {_judge(protocol['judge'])}"] if protocol.get("judge") else []
        failed = result.content["failed"]["items"]
        said += [f"{failed} could not be used"] if failed else []
        unjudged = result.content.get("unjudged", {})  # of what an older release wrote
        said += [f"{unjudged['answers']} answers without a score"] if unjudged.get("answers") else []
        title = TASKS.get(result.content["task"], ("", result.content["task"]))[1]
        rows = score_rows([NamedResult(MODEL, result.content)])
        parts.append(
            f"{title}, {'; '.join(said)}; in brackets 95 % intervals over videos:\n\n"
            + "\n".join(markdown_table(rows))
        )
    return "\n\n".join(parts)


def card_results(results: Sequence[NamedResult]) -> list[EvalResult]:
    """The model's own headline scores, for the metadata of a card."""
    found = []
    for result in results:
        protocol = result.content["protocol"]
        task = TASKS.get(result.content["task"], ("video-text-to-text", result.content["task"]))
        source, revision = protocol.get("data"), protocol.get("data_revision")
        found += [
            EvalResult(
                task_type=task[0],
                task_name=task[1],
                dataset_name=public(source, revision),
                dataset_type=hub_name(source) if is_hub_source(source, revision) else "private",
                dataset_revision=revision,
                metric_type=metric_type(name),
                metric_name=metric_name(name),
                metric_value=round(result.content["scores"][name]["value"], 4),
            )
            for name in headlines([result])
        ]
    return found


def _judge(name: Any) -> str:
    """Of a folder on this machine its last part, for the rest is nobody's business."""
    return public(name) if str(name).startswith(("/", ".", "~")) else str(name)


def _data(protocol: dict[str, Any]) -> str:
    name = f"`{public(protocol.get('data'), protocol.get('data_revision'))}`"
    return name + (f" at revision `{protocol['data_revision']}`" if protocol.get("data_revision") else "")
