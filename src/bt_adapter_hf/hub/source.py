"""Where an adapter comes from, a folder or the Hub, and the base model that it names."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ResolvedRevision, is_offline_mode, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, RemoteEntryNotFoundError
from transformers import PreTrainedConfig

from ..adapters.files import (
    CONFIG_NAME,
    PEFT_CONFIG_NAME,
    PEFT_WEIGHTS_NAME,
    WEIGHTS_NAME,
    AdapterConfig,
    AdapterError,
    is_peft_folder,
)
from ..adapters.whole_models import is_whole_model
from ..models.compat_bt_adapter import resolve_revision
from .access import check_folder, check_token, explain, http_cause, retried
from .kinds import holding
from .weights import fetch_weights, is_damaged


logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "chat_template.jinja", "additional_chat_templates/*"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "qformer_tokenizer/*"),
)
ADAPTER_FILES = (CONFIG_NAME, WEIGHTS_NAME, PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME, *PROCESSOR_FILES)
MODEL_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json")
_HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only")
_OTHER_WEIGHTS = ("variant", "subfolder", "state_dict", "gguf_file")  # options that ask for others than the usual file


def resolve_adapter(
    adapter: str | os.PathLike,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    whole_models: bool = True,
) -> Path:
    """The folder of an adapter; one on the Hub is downloaded, all its files from one commit.

    A repository without an adapter gives a whole model, out of which a branch can be taken, if `whole_models`.

    The weights of a download are compared with the Hub's hash of them, and fetched again where they differ.

    Raises:
        OSError: if there is no such folder, and the Hub does not give it; the text says why.
        AdapterError: if it arrived damaged twice.
    """
    try:
        check_folder(os.fspath(adapter))
    except ValueError as error:
        raise AdapterError(str(error)) from error
    folder = Path(adapter)
    if folder.is_dir():
        if not ((folder / CONFIG_NAME).is_file() or is_peft_folder(folder) or is_whole_model(folder)):
            raise AdapterError(
                f"'{adapter}' holds no {CONFIG_NAME}, so it is no BT-Adapter: it holds {holding(folder)}. Expected an "
                "adapter, or a dual encoder or tower with a branch. A whole model is loaded with "
                "AutoModel.from_pretrained, and a released checkpoint is converted with `bt-adapter convert`."
            )
        return folder
    check_token(token)

    def download(patterns: Sequence[str], force: bool = False) -> Path:
        folder = snapshot_download(
            str(adapter),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force,
            allow_patterns=patterns,
        )
        return Path(folder)

    patterns = ADAPTER_FILES
    try:
        folder = retried(lambda: download(patterns), f"Downloading {adapter}")
        if whole_models and not any((folder / name).is_file() for name in (CONFIG_NAME, PEFT_CONFIG_NAME)):
            patterns = MODEL_FILES
            folder = retried(lambda: download(patterns), f"Downloading {adapter}")
        damaged = _damaged(folder)
        if damaged and not local_files_only:
            logger.warning("%s of %s arrived damaged: downloading it again.", damaged, adapter)
            folder = retried(lambda: download(patterns, force=True), f"Downloading {adapter}")
            damaged = _damaged(folder)
    except (HTTPError, OSError, HFValidationError) as error:
        raise OSError(
            f"{adapter} is neither a folder nor an adapter that could be fetched from the Hub: "
            f"{explain(error, str(adapter), revision)}"
        ) from error
    if damaged:
        raise AdapterError(
            f"{damaged} of {adapter} is not the file that the Hub has: its sha256 differs. Delete {folder} and load "
            "the adapter again."
        )
    return folder


def from_hub(load: Callable[[], Result], name: str | os.PathLike, revision: str | None) -> Result:
    """What `load` returns, tried again where the Hub was busy.

    Raises:
        OSError: for what the Hub said, in a sentence; other errors are as they were.
    """
    try:
        return retried(load, f"Loading {name}")
    except OSError as error:
        cause = http_cause(error)
        if cause is None or isinstance(cause, RemoteEntryNotFoundError):
            raise
        raise OSError(
            f"{name} is no folder, and could not be loaded: {explain(error, str(name), revision)}"
        ) from error


def model_type_of(name: str | os.PathLike, revision: str | None = None) -> str | None:
    """The type of the model of this name; None where there is no model, for [`wrong_kind`] to say what there is.

    Raises:
        OSError, ValueError: there is nothing of this name, or its config.json is damaged.
    """
    name = os.fspath(name)
    check_folder(name)
    config = from_hub(lambda: PreTrainedConfig.get_config_dict(name, revision=revision)[0], name, revision)
    return config.get("model_type")


def find_adapter(name: str | os.PathLike, hub: Mapping[str, Any]) -> tuple[Path, AdapterConfig] | None:
    """Folder and config of the adapter that is called so; None if there is none.

    Args:
        name: folder or id, of a repository without a config.json.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`.
    """
    arguments = {key: hub[key] for key in (*_HUB_ARGUMENTS, "revision") if hub.get(key) is not None}
    try:
        folder = resolve_adapter(name, whole_models=False, **arguments)
    except (OSError, AdapterError):
        return None  # the caller has an error of its own, of the same cause
    if (folder / CONFIG_NAME).is_file():
        return folder, AdapterConfig.read(folder)
    if is_peft_folder(folder):  # LoRA of a model without a branch
        content = json.loads((folder / PEFT_CONFIG_NAME).read_text(encoding="utf-8"))
        return folder, AdapterConfig.of_peft(content)
    return None


def base_of(folder: Path, name: str | os.PathLike, adapter: AdapterConfig) -> tuple[str, str | None]:
    """Name and revision of the base model, to be loaded as a whole with the adapter.

    Raises:
        AdapterError: if the adapter names none, or brings LoRA, which is loaded in two steps.
    """
    base, revision = adapter.base_model_name_or_path, adapter.revision
    if not base:
        raise AdapterError(
            f"{name} is an adapter that names no base model: load the model that it belongs to, then call "
            "load_bt_adapter(model, adapter)."
        )
    if is_peft_folder(folder):
        at = f", revision={revision!r}" if revision else ""
        raise AdapterError(
            f"{name} brings LoRA with a branch, for {base}. Load that model with AutoModelForImageTextToText."
            f"from_pretrained({base!r}{at}), then call load_bt_adapter(model, {str(name)!r}), which restores all that "
            "was trained."
        )
    return base, revision


@contextlib.contextmanager
def naming_base(name: str | os.PathLike, base: str, revision: str | None) -> Iterator[None]:
    """Makes errors in loading a base model say which one it is, why it did not come, and what to do."""
    try:
        yield
    except OSError as error:
        why = explain(error, base, revision) if http_cause(error) else f"{base} could not be loaded ({error})"
        raise OSError(
            f"The base model of the adapter {name} is {base}, and {why.rstrip('.')}. Or load another copy of these "
            "weights and put the adapter into it: load_bt_adapter(model, adapter)."
        ) from error


def pinned(name: str | os.PathLike | None, options: Mapping[str, Any]) -> str | None:
    """The revision of a call of `from_pretrained`, resolved to the commit that it stands for, if it can be found out.

    The usual weights of that commit are in the cache then, whole.
    """
    if name is not None:
        check_folder(os.fspath(name))
    check_token(options.get("token"))
    arguments = {key: options[key] for key in _HUB_ARGUMENTS if options.get(key) is not None}
    revision = resolve_revision(name, options.get("revision"), **arguments)
    local = arguments.pop("local_files_only", False) or is_offline_mode()
    if isinstance(revision, ResolvedRevision) and not local and not any(options.get(key) for key in _OTHER_WEIGHTS):
        fetch_weights(str(name), revision.resolved, **arguments)
    return revision


def _damaged(folder: Path) -> str | None:
    """The name of a weights file that differs from the Hub's hash of it."""
    return next((path.name for path in sorted(folder.glob("*.safetensors")) if is_damaged(path)), None)
