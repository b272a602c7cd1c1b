"""The weights of a model on the Hub: asked for again where it was busy, and compared with its hash of them."""

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .access import explain, retried


logger = logging.getLogger(__name__)


def fetch_weights(name: str, commit: str, **hub: Any) -> None:
    """Downloads the safetensors of a model that the cache lacks; of a repository without them it does nothing.

    transformers, which reads them from the cache then, gives up where the storage is busy, and loads what arrives.

    Args:
        commit: full id.
        hub: `token`, `cache_dir`.

    Raises:
        OSError: if they cannot be had, or differ from the Hub's hash also when downloaded again.
    """
    try:
        if _fetch(name, SAFE_WEIGHTS_NAME, commit, hub) is None:
            index = _fetch(name, SAFE_WEIGHTS_INDEX_NAME, commit, hub)
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index is not None else ()
            for shard in sorted(set(shards)):
                _fetch(name, shard, commit, hub)
    except (HTTPError, OSError) as error:
        raise OSError(f"The weights of {name} could not be fetched from the Hub: {explain(error, name)}") from error


def is_damaged(path: Path) -> bool:
    """Whether a file of the cache differs from what the Hub has: the cache calls a large one by its sha256."""
    if not path.is_symlink():
        return False
    expected = Path(os.readlink(path)).name
    if not re.fullmatch("[0-9a-f]{64}", expected):
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() != expected


def _fetch(name: str, file: str, commit: str, hub: dict[str, Any]) -> Path | None:
    """A file of the repository, None if it has none of this name. One that is in the cache is not looked at again."""
    cached = try_to_load_from_cache(name, file, cache_dir=hub.get("cache_dir"), revision=commit)
    if cached is not None:
        return Path(cached) if isinstance(cached, str) else None  # the cache knows of files that do not exist

    def download(force: bool = False) -> Path:
        return Path(hf_hub_download(name, file, revision=commit, force_download=force, **hub))

    try:
        path = retried(download, f"Downloading {file} of {name}")
        if is_damaged(path):
            logger.warning("%s of %s arrived damaged: downloading it again.", file, name)
            path = retried(lambda: download(force=True), f"Downloading {file} of {name}")
    except RemoteEntryNotFoundError:
        return None
    if is_damaged(path):
        path.resolve().unlink()  # or it would be found in the cache, and believed
        raise OSError(f"{file} arrived damaged twice, its sha256 differs: try later")
    return path
