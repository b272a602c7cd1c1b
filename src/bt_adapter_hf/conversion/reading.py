"""Reading checkpoint files of others without running what may be hidden in them."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..adapters.damage import damage_of


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or is not what it should be; the message says why and what to do."""


# What mmengine's training checkpoints hold besides tensors: the record of the run. These names are read as inert
# stand-ins, so that nothing of the file runs; any other name in a pickle is refused.
_RECORD_NAMES = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(f"numpy.dtypes.{name}DType" for name in ("Float64", "Float32", "Int64", "Int32", "UInt32")),
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
        with torch.serialization.safe_globals([(_Ignored, name) for name in _RECORD_NAMES]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        blocked = re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) ([\w.]+)", str(error))
        if blocked:
            raise CheckpointError(
                f"{path} is refused: besides tensors its pickle names {blocked[1]}, which loading would run. If you "
                "trust its origin, take its tensors out where it was made, save them as .safetensors, and convert "
                "that file."
            ) from error
        raise CheckpointError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    if damage := damage_of(path):
        return f"{damage}."
    text = str(error).partition("WeightsUnpickler error:")[2] or str(
        error
    )  # what precedes it is advice to run the file
    reason = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return (
        f"{path} ({path.stat().st_size} bytes) cannot be read as a checkpoint ({reason.rstrip('.')}). It is "
        "truncated, damaged, or another kind of file: compare its size or checksum with the original, and fetch it "
        "again."
    )


def _describe(content) -> str:
    return "an empty dict" if content == {} else f"a {type(content).__name__}"
