"""The id of `<video>` in a model that is made of a native checkpoint: that which its tokenizer gives it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from transformers import PreTrainedConfig


def video_token_id(native: PreTrainedConfig, source: str | os.PathLike, hub: Mapping[str, Any]) -> int | None:
    """The id of `<video>` in the tokenizer of a native checkpoint, or that it gets there as the next that is added.

    None where the checkpoint has no `tokenizer.json`.

    Args:
        native: the checkpoint's config, or one of ours for it.
        source: folder or id of the checkpoint.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`.
    """
    subfolder = hub.get("subfolder") or ""
    try:
        path = Path(source, subfolder, "tokenizer.json")
        if not os.path.isdir(source):
            names = ("revision", "token", "cache_dir", "local_files_only")
            options = {name: hub[name] for name in names if hub.get(name) is not None}
            path = Path(hf_hub_download(str(source), "tokenizer.json", subfolder=subfolder or None, **options))
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
    except (EntryNotFoundError, FileNotFoundError, HFValidationError):
        return None
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())}
    free = max(len(tokenizer["model"]["vocab"]), *(taken + 1 for taken in added.values()), 0)
    return added.get("<video>", max(free, (native.image_token_index or 0) + 1))
