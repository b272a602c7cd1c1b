"""Features of all clips of an evaluation under every temporal control: decoded once, kept as they come.

A run that was interrupted goes on where it stopped, on any number of processes; what it makes does not depend on
either, for the chance of a clip is a function of the seed and the clip's name.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from ..adapters.writing import written_whole
from ..data.decoding_process import DecodingProcess
from ..models.modeling_bt_adapter import BTAdapterModel
from ..models.video_errors import VideoError
from ..search.encoding import VideoEncoder
from .controls import CONTROLS, check_controls, control_features


PROTOCOL_NAME = "protocol.json"
FULL = "full"  # the clip as it is, beside the names of `CONTROLS`


@dataclass
class ClipFeatures:
    """Unit features (P,) of clips, by condition and name, and why the others have none.

    Conditions are "full", and those of `control_features`: "shuffled_0", ..., "reversed", "one_frame",
    "frame_average".
    """

    features: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def stacked(self, condition: str, names: Sequence[str]) -> np.ndarray:
        """(names, P) under one condition."""
        return np.stack([self.features[condition][name] for name in names])


class OtherRunError(ValueError):
    """The folder holds results of another run."""


def encode_clips(
    encoder: VideoEncoder,
    names: Sequence[str],
    read: Callable[[str], str | bytes],
    folder: Path,
    protocol: dict[str, Any],
    *,
    controls: Sequence[str] = CONTROLS,
    draws: int = 3,
    seed: int = 0,
    batch_size: int = 8,
    workers: int = 0,
    item_timeout: float | None = 60.0,
    progress: Callable[[int], None] = lambda done: None,
) -> ClipFeatures:
    """Encodes every clip once per condition, from one decoding.

    Args:
        names: of the clips, each once.
        read: a clip's path, or the bytes of its file; raises `VideoError` where it cannot be had.
        folder: of this run, which keeps the features.
        protocol: what decides the features, for `folder`: a run with another one is refused.
        controls, draws: see `control_features`.
        seed: of the shuffled frames.
        workers: processes that decode; 0 decodes here.
        item_timeout: seconds for one clip, see `DecodingProcess`.
        progress: called with the number of clips done, in this process.

    Returns:
        Of all clips and processes, in every process.

    Raises:
        OtherRunError: `folder` is of another run.
        ValueError: a name twice, or an unknown control.
    """
    check_controls(controls)
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise ValueError(f"The clip {twice} is there twice.")
    protocol = {**protocol, "controls": list(controls), "shuffle_draws": draws, "seed": seed}
    rank, processes, wait = _processes()
    if rank == 0:
        claim(folder, protocol)
    wait()
    done = read_features(folder)
    known = done.features.get(FULL, {}).keys()  # failures are tried again
    mine = [name for name in sorted(set(names) - known)][rank::processes]
    clips = _Clips(encoder, mine, read, item_timeout)
    loader = DataLoader(clips, batch_size, num_workers=workers, collate_fn=list)
    for batch in loader:
        _write_part(folder, *_encode(encoder, batch, controls, draws, seed))
        progress(len(batch))
    wait()
    done = read_features(folder)
    done.failed = {name: reason for name, reason in done.failed.items() if name not in done.features.get(FULL, {})}
    return done


def claim(folder: Path, protocol: dict[str, Any]) -> None:
    """Makes the folder this run's, or finds that it is.

    Raises:
        OtherRunError: it is of a run with another protocol; the message names the fields that differ.
    """
    path = folder / PROTOCOL_NAME
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(protocol))
        differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        if differing:
            shown = "; ".join(f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} now" for name in differing[:4])
            raise OtherRunError(f"{folder} holds an evaluation with other settings ({shown}). Use another folder.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(protocol, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_features(folder: Path) -> ClipFeatures:
    """What all processes have written so far."""
    found = ClipFeatures()
    for path in sorted((folder / "features").glob("*.safetensors")):
        with safe_open(path, "np") as file:
            header = file.metadata()
            names = json.loads(header["names"])
            found.failed |= json.loads(header["failed"])
            for condition in file.keys():  # noqa: SIM118  (no dict)
                values = file.get_tensor(condition)
                found.features.setdefault(condition, {}).update(zip(names, values, strict=True))
    return found


class _Clips(Dataset):
    """(name, pixels (T, 3, H, W) or the reason why there are none) of each clip."""

    def __init__(
        self,
        encoder: VideoEncoder,
        names: Sequence[str],
        read: Callable[[str], str | bytes],
        item_timeout: float | None,
    ):
        self.names, self.read, self.processor = names, read, encoder.processor
        self._load = self._load_clip
        if item_timeout is not None:
            self._load = DecodingProcess(self._load_clip, item_timeout)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> tuple[str, torch.Tensor | str]:
        name = self.names[number]
        try:
            return name, torch.from_numpy(self._load(name))
        except VideoError as error:
            return name, str(error) or repr(error)

    def _load_clip(self, name: str) -> np.ndarray:
        inputs = self.processor(videos=[self.read(name)], return_tensors="pt")
        return inputs["pixel_values_videos"][0].numpy()


@torch.inference_mode()
def _encode(
    encoder: VideoEncoder,
    batch: list[tuple[str, torch.Tensor | str]],
    controls: Sequence[str],
    draws: int,
    seed: int,
) -> tuple[list[str], dict[str, torch.Tensor], dict[str, str]]:
    """Names, features (names, P) by condition, and reasons of failures.

    One clip at a time, so that its features do not depend on its neighbours; its frames pass the frozen backbone once
    for all conditions that only change their order.
    """
    names: list[str] = []
    rows: dict[str, list[torch.Tensor]] = {}
    failed: dict[str, str] = {}
    for name, pixels in batch:
        if isinstance(pixels, str):
            failed[name] = pixels
            continue
        names.append(name)
        generator = torch.Generator().manual_seed(_seed_of(name, seed))
        for condition, feature in _features_of(encoder.model, pixels, controls, draws, generator):
            rows.setdefault(condition, []).append(torch.nn.functional.normalize(feature.float(), dim=-1).cpu())
    return names, {condition: torch.cat(values) for condition, values in rows.items()}, failed


def _features_of(
    model: BTAdapterModel, pixels: torch.Tensor, controls: Sequence[str], draws: int, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """The clip (T, 3, H, W) under each condition, (1, P) each."""
    frames = pixels.to(model.device, model.dtype)
    tower, place = model.vision_model, torch.arange(len(frames))[None, :, None, None, None]  # as a video of numbers
    states = tower.encode_frames(frames[None])

    def encode_order(order: torch.Tensor, frame_mask: None = None) -> torch.Tensor:
        order = order.flatten().to(frames.device)
        chosen = {layer: state[:, order] for layer, state in states.items()}
        return model.visual_projection(tower(backbone_states=chosen, return_dict=True).pooler_output)

    def encode_images(order: torch.Tensor) -> torch.Tensor:
        return model.get_image_features(frames[order.flatten().to(frames.device)]).pooler_output

    yield FULL, encode_order(place)
    yield from control_features(
        encode_order, place, controls=controls, encode_images=encode_images, draws=draws, generator=generator
    )


def _seed_of(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogateescape")).digest()[:7])


def _write_part(folder: Path, names: list[str], features: dict[str, torch.Tensor], failed: dict[str, str]) -> None:
    parts = folder / "features"
    parts.mkdir(exist_ok=True)
    first = (names or list(failed))[0]
    name = hashlib.sha256(first.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    with written_whole(parts / f"{name}.safetensors") as temporary:
        save_file(features, temporary, {"names": json.dumps(names), "failed": json.dumps(failed)})


def _processes() -> tuple[int, int, Callable[[], None]]:
    """Rank, number of processes, and what waits for all of them."""
    if "RANK" not in os.environ:  # of torchrun and accelerate launch
        return 0, 1, lambda: None
    from accelerate import PartialState

    state = PartialState()
    return state.process_index, state.num_processes, state.wait_for_everyone
