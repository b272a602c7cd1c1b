"""Trained files shipped with the package."""

from importlib.resources import files
from pathlib import Path


def default_model_path() -> Path:
    """Folder of the moving-digits model, for `AutoModel.from_pretrained`. Raises `FileNotFoundError` when absent."""
    return _folder("moving-digits")


def default_chat_model_path() -> Path:
    """Folder of the moving-digits chat model, a [`BTAdapterLlavaForConditionalGeneration`] and its processor.

    Raises `FileNotFoundError` when absent.
    """
    return _folder("moving-digits-chat")


def _folder(name: str) -> Path:
    path = Path(str(files(__package__))) / name
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"the model shipped with bt_adapter_hf is not at '{path}': the installation is incomplete. Reinstall the "
            "package, or name a model with --model."
        )
    return path
