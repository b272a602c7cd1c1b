"""Reading checkpoint files of others without running what may be hidden in them."""

import re
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or is not what it should be; the message says why and what to do."""


# What mmengine's training checkpoints hold besides tensors: the record of the run. These names are read as inert
# stand-ins, so that nothing of the file runs; any other name in a pickle is refused.
_RECORD_NAMES = re.compile(
    r"^(mmengine\.logging\.history_buffer\.HistoryBuffer|builtins\.getattr|__builtin__\.getattr"
    r"|numpy\.(core|_core)\.multiarray\.(_reconstruct|scalar)|numpy\.(ndarray|dtype)|numpy\.dtypes\.\w+DType)$"
)


class _Ignored:
    """Stands for an object of a training record. Takes any arguments and any state, and does nothing with them."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of a `.pth`, `.pt`, `.bin` or `.safetensors` file, on the CPU.

    A dict with the entry `state_dict`, as mmengine writes it, is unwrapped. Pickles are read with `weights_only=True`.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged, holds code, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "missing"
        raise FileNotFoundError(f"{path} is {kind}; a checkpoint file (.pth, .pt, .bin or .safetensors) is needed.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(_damaged(path, error)) from error
    content = _load_pickle(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds {_describe(content)}; a dict of tensors is needed.")
    other = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))]
    if other:
        raise CheckpointError(
            f"{path} is no state dict: {len(other)} of its {len(content)} entries are no tensors "
            f"({', '.join(map(repr, other[:3]))}). If the weights are inside one of them, pass that dict itself."
        )
    return content


def _load_pickle(path: Path):
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip archive, or a damaged one: the loader below tells which
        names = []
    stand_ins = nullcontext()
    if names and all(_RECORD_NAMES.match(name) for name in names):
        stand_ins = torch.serialization.safe_globals([(_Ignored, name) for name in names])
    try:
        with stand_ins:
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        blocked = re.search(r"(?:GLOBAL|Unsupported (?:class|global):?) ([\w.]+)", str(error))
        code = [name for name in names if not _RECORD_NAMES.match(name)] or ([blocked[1]] if blocked else [])
        if code:
            raise CheckpointError(
                f"{path} is refused: besides tensors its pickle names {', '.join(code[:3])}, which loading would run. If "
                "you trust its origin, load it yourself, and pass its state dict, or save that as .safetensors."
            ) from error
        raise CheckpointError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return (
        f"{path} ({path.stat().st_size} bytes) cannot be read as a checkpoint: {reason} It is truncated, damaged, or "
        "another kind of file: compare its size or checksum with the original, and download it again."
    )


def _describe(content) -> str:
    return "an empty dict" if content == {} else f"a {type(content).__name__}"
