"""The text of a model card: facts of a folder and of `run_summary.json`, in words and tables."""

import json
import re
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .contents import Contents, read_json


CONTROLS = ("shuffled", "reversed", "one_frame", "frame_average", "blind")
_UNMEASURED = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time", "pairs")


def is_hub_id(name: Any) -> bool:
    """Whether a name has the form of one on the Hub. That it came from there its commit tells."""
    name = hub_name(name)
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not _is_file(name)


def is_hub_source(source: Any, revision: str | None) -> bool:
    """Whether a table is one of the Hub's: these are read at a commit, and a path here has none."""
    return is_hub_id(source) and (bool(revision) or str(source).startswith("hf://"))


def hub_name(source: Any) -> str:
    """`org/name` of "hf://datasets/org/name@main/train/*.tar"; other names as they are."""
    match = re.match(r"hf://(?:datasets/)?([^/@]+/[^/@]+)", str(source))
    return match[1] if match else str(source)


def _is_file(name: str) -> bool:
    return name.lower().endswith((".jsonl", ".json", ".csv", ".tsv", ".parquet", ".tar", ".zip"))


# ------------------------------------------------------------------------------------------------------------- figures


def measured(summary: dict[str, Any]) -> dict[str, float]:
    """Metrics of the evaluation of the finished model; times and counts are none."""
    metrics = {key.removeprefix("eval_"): value for key, value in (summary.get("metrics") or {}).items()}
    return {
        key: round(value, 4)
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in _UNMEASURED
    }


def figures(summary: dict[str, Any]) -> tuple[list[tuple], list[tuple]]:
    """(rows of results, rows of controls)"""
    results, controls = [], []
    for key, value in measured(summary).items():
        control = next((name for name in CONTROLS if key.startswith(f"{name}_")), None)
        if control is None:
            results.append((metric_name(key), value))
        else:
            label = control.replace("_", " ")
            controls.append((f"{label}: {metric_name(key.removeprefix(f'{control}_'))}", value))
    return results, controls


def metric_name(key: str) -> str:
    """For people."""
    directions = {"t2v": "text to video", "v2t": "video to text"}
    names = {"MdR": "median rank", "MnR": "mean rank"}
    direction, _, rest = key.partition("_")
    if direction not in directions:
        return key.replace("_", " ")
    recall = re.fullmatch(r"R(\d+)", rest)
    return f"{directions[direction]}, " + (f"R@{recall[1]} (%)" if recall else names.get(rest, rest))


def metric_type(key: str) -> str:
    """For the metadata."""
    recall = re.fullmatch(r"(?:t2v|v2t)_R(\d+)", key)
    return f"recall_at_{recall[1]}" if recall else key.lower()


def protocol(summary: dict[str, Any]) -> str:
    """How the figures came about."""
    validation, metrics = parts(summary).get("validation", {}), summary.get("metrics") or {}
    data = summary.get("data") or {}
    said = []
    if validation.get("source"):
        said.append(f"on {_describe_part(validation)}")
    if metrics.get("eval_pairs"):
        said.append(f"among {metrics['eval_pairs']} pairs")
    if data.get("num_frames"):
        said.append(f"{data['num_frames']} frames per video")
    if summary.get("steps") is not None:
        said.append(f"after {_count_of(summary['steps'], 'step')}")
    if (summary.get("training") or {}).get("seed") is not None:
        said.append(f"seed {summary['training']['seed']}")
    text = f"Measured {', '.join(said)}."
    if data.get("group_by_caption"):
        text += " Rows with the same caption are right answers for each other."
    return text


# ---------------------------------------------------------------------------------------------------------------- text


def what(contents: Contents) -> str:
    """What it is, in a sentence."""
    branch = (
        "[BT-Adapter](https://arxiv.org/abs/2309.15785), a branch beside a frozen image tower that reads the order "
    )
    branch += "of the frames"
    if not contents.layers and contents.kind in ("chat model", "LoRA adapter"):
        parts = "a frozen X-CLIP, frame by frame, a connector and a language model that answers questions about GIFs"
        return f"LoRA and the connector of {parts}." if contents.kind == "LoRA adapter" else f"A{parts[1:]}."
    return {
        "dual encoder": f"Features of videos and of texts in one space, for search and zero-shot labels: {branch}.",
        "tower": f"A video tower: {branch}.",
        "chat model": f"A chat model that answers questions about videos and images: {branch}.",
        "adapter": f"The branch alone, without the model that it belongs to, of a {branch}.",
        "LoRA adapter": f"LoRA, a branch and what else was trained, without the model that they belong to: {branch}.",
        "processor": "What turns videos, images and texts into the inputs of a BT-Adapter model.",
    }[contents.kind]


def sizes(folder: Path, contents: Contents) -> list[tuple[str, Any]]:
    """Rows of the table of sizes."""
    rows = []
    if contents.kind == "processor":
        rows.append(("class", f"`{contents.config.get('processor_class')}`"))
    else:
        if contents.config.get("architectures"):
            rows.append(("class", ", ".join(f"`{name}`" for name in contents.config["architectures"])))
        if "backbone" in contents.tower or "backbone" in contents.config:
            rows += _tower_rows(contents.backbone, contents.layers, contents.tower)
    weights = sorted(folder.glob("*.safetensors"))
    if weights:
        counts = [_count(path) for path in weights]
        rows.append(("parameters in the files", f"{sum(counts):,}"))
        rows.append(("size of the files", f"{sum(path.stat().st_size for path in weights) / 1e6:.1f} MB"))
    frames = _num_frames(folder)
    if frames is not None:
        rows.append(("frames per video", f"{frames}, unless asked otherwise"))
    return rows


def _tower_rows(backbone: dict[str, Any], layers: list[int], branch: dict[str, Any]) -> list[tuple[str, Any]]:
    names = {"num_hidden_layers": "layers", "hidden_size": "wide", "image_size": "pixels", "patch_size": "per patch"}
    sizes = ", ".join(f"{backbone[key]} {name}" for key, name in names.items() if key in backbone)
    tower = ("image tower", f"`{backbone['model_type']}`, {sizes}")
    if not layers:
        return [tower]
    return [
        tower,
        ("branch", f"K = {len(layers)} layers, fed by the image tower's layers {', '.join(map(str, layers))}"),
        ("rows of the time table", branch.get("max_frames")),
    ]


def _count(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 (not a dict)


def _num_frames(folder: Path) -> int | None:
    path = folder / "processor_config.json"
    return read_json(path).get("video_processor", {}).get("num_frames") if path.is_file() else None


def base_model(base: tuple[str | None, str | None], is_local: bool, kind: str) -> str:
    """The base model, with its revision; of an adapter without one, that its user names it.

    Args:
        is_local: the files name one that is not known to be on the Hub.
    """
    name, revision = base
    if not name and kind in ("adapter", "LoRA adapter"):
        said = "One that is not known to be on the Hub." if is_local else "The files do not name one."
        return (
            f"{said} Load the model yourself, and put this into it with `load_bt_adapter`, which refuses an image "
            "tower with other weights than those of the training."
        )
    if not name and not is_local:
        return "The files do not name one."
    if not is_hub_id(name):
        return "A checkpoint that is not known to be on the Hub."
    at = f", at revision `{revision}`" if revision else "; its revision was not recorded"
    return f"[{name}](https://huggingface.co/{name}){at}."


def parts(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Tables of the run, by "train" and "validation"."""
    data = summary.get("data") or {}
    return {name: data[name] for name in ("train", "validation") if isinstance(data.get(name), dict)}


def public(source: Any, revision: str | None = None) -> str:
    """A name for a source: of a path here its last part, for the rest is nobody's business."""
    source = str(source)
    return source if is_hub_source(source, revision) or "://" in source else Path(source).name


def _describe_part(part: dict[str, Any]) -> str:
    source = part.get("source")
    name = f"[{hub_name(source)}](https://huggingface.co/datasets/{hub_name(source)})"
    text = name if is_hub_source(source, part.get("revision")) else f"`{public(source)}` (not on the Hub)"
    if part.get("revision"):
        text += f" at revision `{part['revision']}`"
    if part.get("rows") is not None:
        text += f", {_count_of(part['rows'], 'row')}"
    if part.get("fingerprint"):
        text += f", fingerprint `{part['fingerprint']}`"
    return text


def data_section(summary: dict[str, Any]) -> str:
    """What it was trained on."""
    tables = parts(summary)
    if not tables:
        return "The files do not tell what it was trained on."
    lines = [f"- {name}: {_describe_part(part)}" for name, part in tables.items() if part.get("source")]
    for name, count in (summary.get("broken_items") or {}).items():
        if count:
            lines.append(f"- {count} items of the {name} part could not be used")
    return "\n".join(lines)


def recipe(summary: dict[str, Any]) -> str:
    """How it was trained, in a sentence."""
    if not summary:
        return "The files do not tell how it was trained."
    text = f"{(summary.get('kind') or 'Training').capitalize()} with `bt_adapter_hf`"
    if summary.get("steps") is not None:
        text += f", {_count_of(summary['steps'], 'step')}"
    if summary.get("trained_parameters") is not None:
        text += f" of {summary['trained_parameters']:,} parameters"
    if summary.get("processes"):
        text += f" on {_count_of(summary['processes'], 'process')}"
    if summary.get("device"):
        text += f" ({summary['device']})"
    if summary.get("seconds") is not None:
        text += f" in {summary['seconds']:,.0f} s"
    if summary.get("train_loss") is not None:
        text += f"; mean training loss {summary['train_loss']:.4g}"
    return text + "."


def settings(summary: dict[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Tables of all settings of the run: (title, rows)."""
    data = {key: value for key, value in (summary.get("data") or {}).items() if not isinstance(value, dict)}
    tables = (
        ("Model", summary.get("config")),
        ("Data", data),
        ("Training", summary.get("training")),
        ("Versions", summary.get("versions")),
    )
    return [
        (title, [(f"`{key}`", _plain(value)) for key, value in content.items() if value is not None])
        for title, content in tables
        if content
    ]


def _plain(value: Any) -> str:
    if isinstance(value, str) and Path(value).is_absolute():
        value = public(value)
    if isinstance(value, dict | list):
        value = json.dumps(value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def limits(contents: Contents, summary: dict[str, Any], results: bool) -> list[str]:
    """What a user should know before."""
    if contents.kind == "processor":
        return ["It fits the model that it was saved with."]
    said = [
        "Only what stands under Figures has been measured; anything else is unknown."
        if results
        else "Nothing has been measured: test it on your own videos before you rely on it."
    ]
    if summary.get("finished") is False:
        said.append(f"The run was not finished: {summary.get('steps')} of {summary.get('total_steps')} steps.")
    said.append("It has the errors and biases of its base model and of its training data.")
    if contents.tower.get("num_trained_frames"):
        trained = contents.tower["num_trained_frames"]
        said.append(f"It was trained on up to {trained} frames per video; for other numbers times are interpolated.")
    if contents.kind == "dual encoder":
        said.append(f"Texts have at most {contents.config['text_config']['max_position_embeddings']} tokens.")
    return said


def licence(licence: str | None, base: tuple[str | None, str | None], with_code: bool) -> str:
    """Of the weights, and of the code where it is there."""
    said = f"The weights: {licence}." if licence else "Whoever published the weights has stated no licence for them."
    if is_hub_id(base[0]):
        said += f" They derive from {base[0]}, whose licence holds for what comes from it."
    return said + (" The code in this repository is that of bt_adapter_hf, Apache-2.0." if with_code else "")


def _count_of(number: int, thing: str) -> str:
    plural = {"process": "processes"}.get(thing, f"{thing}s")
    return f"{number:,} {thing if number == 1 else plural}"
