"""Which base model a publication names: one of the Hub by its id, and none that was a folder of a machine."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..adapters.files import CONFIG_NAME, PEFT_CONFIG_NAME, SUMMARY_NAME
from .card_text import is_hub_id


# file -> its field with the name of a base model
_FIELDS = {
    CONFIG_NAME: "base_model_name_or_path",
    PEFT_CONFIG_NAME: "base_model_name_or_path",
    SUMMARY_NAME: "model",
    "config.json": None,
}


def is_of_hub(name: str | None, revision: str | None, files: Iterable[Path] = ()) -> bool:
    """Whether a base model is one of the Hub: folders are recorded by their absolute paths.

    They were once recorded by the path that was typed, and "llava/native" may be the repository of somebody else. So a
    name without a commit is none of the Hub where such a folder lies here, or in a folder that one of `files` lies in.
    """
    if not name or os.path.isabs(name):
        return False
    places = {Path.cwd(), *(place for file in files for place in file.resolve().parents)}
    return bool(revision) or (is_hub_id(name) and not any(Path(place, name).is_dir() for place in places))


def without_local_names(files: Mapping[str, Path | bytes]) -> tuple[dict[str, bytes], list[str]]:
    """The files, by their path, that name folders of this machine, without those; and the base models among them.

    A base model that was a folder becomes null, of other paths in `run_summary.json` the last part stays.
    """
    found = {name: _object(content) for name, content in files.items() if PurePosixPath(name).name in _FIELDS}
    found = {name: content for name, content in found.items() if content is not None}
    commits: dict[str, str] = {}  # a file of peft names the base without its commit
    for name, content in found.items():
        if (base := content.get(_FIELDS[PurePosixPath(name).name])) and content.get("revision"):
            commits[base] = content["revision"]
    changed, bases = {}, []
    paths = [content for content in files.values() if isinstance(content, Path)]
    for name, content in found.items():
        field = _FIELDS[PurePosixPath(name).name]
        base = content.get(field)
        after = _named(content) if field is None else dict(content)
        if base and not is_of_hub(base, commits.get(base), paths):
            bases.append(base)
            after |= {field: None, "revision": None}
        if field == "model":
            after = _last_parts(after)
        if after != content:
            changed[name] = json.dumps(after, indent=2).encode() + b"\n"
    return changed, sorted(set(bases))


def what_is_missing(bases: list[str], repo_id: str) -> str:
    """For the log: why the published files name no base model, and what to do."""
    said = f"{repo_id} names no base model: "
    if all(map(os.path.isabs, bases)):
        said += f"{', '.join(bases)} is a folder of this machine."
    else:
        said += (
            f"'{', '.join(bases)}' is recorded without a commit of the Hub and is no id of it, or also the name of a "
            f'folder here. If it is a repository, write its commit as "revision" into {CONFIG_NAME} or '
            f"{SUMMARY_NAME}, and push again."
        )
    return f"{said} An adapter is loaded into a model that its user names: load_bt_adapter(model, '{repo_id}')."


def _object(content: Path | bytes) -> dict[str, Any] | None:
    try:
        read = json.loads(content if isinstance(content, bytes) else content.read_bytes())
    except ValueError:  # told by others
        return None
    return read if isinstance(read, dict) else None


def _named(value: Any) -> Any:
    """A config without what transformers notes in nested ones: where each was loaded from."""
    if isinstance(value, dict):
        return {key: "" if key == "_name_or_path" else _named(part) for key, part in value.items()}
    return [_named(part) for part in value] if isinstance(value, list) else value


def _last_parts(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _last_parts(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_last_parts(part) for part in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
