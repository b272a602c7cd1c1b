"""Model cards, filled from the files of a folder and from nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from . import card_text as text
from .base_names import is_of_hub
from .card_example import example, example_without_package
from .contents import CHAT_CLASSES, SUMMARY_NAME, Contents, read_json
from .result_files import NamedResult, card_results, card_section


TEMPLATE = Path(__file__).parents[1] / "assets" / "model-card" / "template.md"
# A card that ends with this line is written anew by the next push; any other is its author's, and kept.
MARKER = (
    "<!-- Written by bt_adapter_hf from the files of this repository. Delete this line to keep your own edits. -->"
)
_UNMEASURED = "Nothing has been measured with these weights."
_UNFILLED = "# Model Card for Model ID"  # title of the template that peft and huggingface_hub leave in a folder


def is_generated(text: str) -> bool:
    """Whether a README is a card that this package wrote, or a template that nobody has filled in."""
    return MARKER in text or _UNFILLED in text


def model_card(
    folder: Path,
    repo_id: str,
    *,
    own: str | None = None,
    base: tuple[str | None, str | None] = (None, None),
    with_code: bool = False,
    summary: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    results: Sequence[NamedResult] = (),
) -> ModelCard:
    """The card of a folder.

    Args:
        folder: of a model, adapter or processor.
        repo_id: where it goes, for the name and the example.
        own: a README of the user's. It is kept; metadata that it lacks are added.
        base: name and revision of the base model, for a model whose files do not tell.
        with_code: whether the repository carries the code of its classes.
        summary: content of `run_summary.json`; by default that of the folder.
        metadata: fields of `huggingface_hub.ModelCardData`, such as `license` and `language`; they take precedence.
        results: of `bt-adapter eval`; see `read_results`.
    """
    contents = Contents.of(folder)
    if summary is None:
        summary = _read_summary(folder / SUMMARY_NAME) if (folder / SUMMARY_NAME).is_file() else {}
    if contents.config.get("base_model_name_or_path"):
        base = contents.config["base_model_name_or_path"], contents.config.get("revision")
    elif summary.get("model"):
        base = summary["model"], summary.get("revision")
    if base[0] and base[0] == summary.get("model"):  # a file of peft names it without its commit
        base = base[0], base[1] or summary.get("revision")
    is_local = bool(base[0]) and not is_of_hub(*base, Path(folder).glob("*.json"))
    base = (None, None) if is_local else base
    data = _metadata(contents, repo_id, base, summary, results)
    data |= {key: value for key, value in (metadata or {}).items() if value is not None}
    if own is not None:
        try:
            card = ModelCard(own)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"The metadata at the top of README.md cannot be read: {error}") from error
        for key, value in data.items():
            if card.data.get(key) is None:
                setattr(card.data, key, value)
        return card
    measured, controls = text.figures(summary)
    return ModelCard.from_template(
        ModelCardData(**data),
        template_path=str(TEMPLATE),
        name=repo_id.rpartition("/")[2],
        what=text.what(contents),
        sizes=text.sizes(folder, contents),
        base=text.base_model(base, is_local, contents.kind),
        example=example(contents, repo_id, base, (folder / "processor_config.json").is_file()),
        example_without_package=example_without_package(contents, repo_id) if with_code else None,
        data=text.data_section(summary),
        recipe=text.recipe(summary),
        settings=text.settings(summary),
        figures=text.protocol(summary) if measured else "" if results else _UNMEASURED,
        results=measured,
        controls=controls,
        evaluation=card_section(results) if results else None,
        limits=text.limits(contents, summary, bool(measured or results)),
        licence=text.licence(data.get("license"), base, with_code),
        marker=MARKER,
    )


def _read_summary(path: Path) -> dict[str, Any]:
    path = path.resolve()  # of a folder that is described, the user's own
    summary = read_json(path)
    for name in ("data", "metrics", "training", "config", "versions", "broken_items"):
        if not isinstance(summary.get(name), dict | None):
            raise ValueError(f"{path} is damaged: {name} is {summary[name]!r}, expected an object.")
    return summary


# ------------------------------------------------------------------------------------------------------------ metadata


def _metadata(
    contents: Contents, repo_id: str, base: tuple, summary: dict[str, Any], evaluated: Sequence[NamedResult]
) -> dict[str, Any]:
    adapter = contents.kind in ("adapter", "LoRA adapter")
    chat = contents.kind == "chat model" or contents.model_type in CHAT_CLASSES
    data = {"library_name": {"adapter": "bt_adapter_hf", "LoRA adapter": "peft"}.get(contents.kind, "transformers")}
    data["tags"] = ["bt-adapter", "video"]
    if contents.kind == "chat model":
        data["pipeline_tag"] = "image-text-to-text"  # of transformers' pipelines the one that loads one of ours
    if text.is_hub_id(base[0]) and base[0] != repo_id:
        data |= {"base_model": base[0], "base_model_relation": "adapter" if adapter else "finetune"}
    parts = [part for part in text.parts(summary).values() if part.get("source")]
    sources = [part["source"] for part in parts if text.is_hub_source(part["source"], part.get("revision"))]
    if sources:
        data["datasets"] = sorted({text.hub_name(source) for source in sources})
    results = _eval_results(summary, chat) + card_results(evaluated)
    if results:
        data |= {"model_name": repo_id.rpartition("/")[2], "eval_results": results}
    return data


def _eval_results(summary: dict[str, Any], chat: bool) -> list[EvalResult]:
    validation = text.parts(summary).get("validation", {})
    source, revision = validation.get("source"), validation.get("revision")
    name = text.public(source, revision) if source else "validation part"
    if validation.get("rows"):
        name += f" ({validation['rows']} rows)"
    task = ("video-text-to-text", "Video question answering") if chat else ("text-to-video-retrieval", "Retrieval")
    return [
        EvalResult(
            task_type=task[0],
            task_name=task[1],
            dataset_name=name,
            dataset_type=text.hub_name(source) if text.is_hub_source(source, revision) else "private",
            dataset_revision=revision,
            metric_type=text.metric_type(key),
            metric_name=text.metric_name(key),
            metric_value=value,
        )
        for key, value in text.measured(summary).items()
        if not key.startswith(text.CONTROLS)
    ]
