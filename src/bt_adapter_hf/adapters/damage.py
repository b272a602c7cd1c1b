"""Files of a model that are not what their names say: told before a library meets them, in words."""

import json
import re
from pathlib import Path


_JSON = frozenset(
    """config.json generation_config.json bt_adapter_config.json adapter_config.json processor_config.json
    preprocessor_config.json video_preprocessor_config.json tokenizer.json tokenizer_config.json
    special_tokens_map.json added_tokens.json vocab.json model.safetensors.index.json""".split()
)
_WEIGHTS = re.compile(  # a copy under another name is not loaded
    r"(model(\.\w+)?(-\d{5}-of-\d{5})?|bt_adapter|adapter_model|trained)\.safetensors|pytorch_model.*\.bin|tokenizer\.model"
)
_POINTER = b"version https://git-lfs"
_PARSED_BYTES = 1 << 20  # of larger JSON only the ends are looked at


def damage_of(path: Path) -> str | None:
    """What is wrong with a file of weights or of JSON, and what to do; None where beginning, size and end fit.

    Raises:
        OSError: if it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(len(_POINTER))
    if head == _POINTER:
        return f"{path} is a pointer of Git LFS and not the file itself: fetch it with `git lfs pull`, or download it"
    if size == 0:
        return f"{path} is empty: download or save it again"
    if path.suffix == ".safetensors":
        return _damage_of_weights(path, size)
    return _damage_of_json(path, size) if path.suffix == ".json" else None


def check_whole(folder: Path) -> None:
    """Looks at the files that a model, an adapter or a processor in a folder is loaded from.

    Raises:
        ValueError: if one of them is damaged, with what to do.
    """
    for path in sorted(folder.iterdir(), key=lambda path: (path.suffix != ".json", path.name)):
        loaded = path.name in _JSON or _WEIGHTS.fullmatch(path.name)
        if loaded and path.is_file() and (damage := damage_of(path)):
            raise ValueError(f"{damage}.")


def _damage_of_weights(path: Path, size: int) -> str | None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            header = None
        else:
            try:
                header = json.loads(file.read(length))
            except ValueError:
                header = None
    if not isinstance(header, dict):
        return f"{path} ({size} bytes) is damaged or truncated, or no safetensors file: download or save it again"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        return f"{path} is damaged or truncated, it has {size} of {expected} bytes: download or save it again"
    return None


def _damage_of_json(path: Path, size: int) -> str | None:
    if size > _PARSED_BYTES:
        with path.open("rb") as file:
            first = file.read(64).strip()[:1]
            file.seek(-64, 2)
            last = file.read().strip()[-1:]
        whole = first + last == b"{}"
        return None if whole else f"{path} is damaged or truncated, it is no JSON object: download or save it again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"{path} is damaged, it is no JSON ({error}): download or save it again"
    if not isinstance(content, dict):
        return f"{path} holds a {type(content).__name__}, expected an object of fields: download or save it again"
    return None
