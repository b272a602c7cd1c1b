"""Features of all clips of an evaluation under every temporal control: decoded once, kept as they come.

A run that was interrupted goes on where it stopped, on any number of processes; what it makes does not depend on
either, for the chance of a clip is a function of the seed and the clip's name.
"""

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..adapters.writing import written_whole
from ..hub.machine import processes_now
from ..models.modeling_bt_adapter import BTAdapterModel
from ..models.video_processing_bt_adapter import FITTED
from ..search.encoding import FeatureError, VideoEncoder, unit_rows
from ..search.frame_states import FrameStates
from .controls import CONTROLS, check_controls, control_features
from .frames import Clip, ClipDecoder, read_clip


logger = logging.getLogger(__name__)

PROTOCOL_NAME = "protocol.json"
FULL = "full"  # the clip as it is, beside the names of `CONTROLS`
BLIND = "blind"  # no clip at all: what the texts alone give away
ALL_CONTROLS = (BLIND, *CONTROLS)


@dataclass
class ClipFeatures:
    """Unit features (P,) by condition and name of the video; the rows; and why the other rows have none.

    Conditions are "full", those of `control_features`: "shuffled_0", ..., "reversed", "one_frame", "frame_average";
    and "blind".
    """

    features: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    rows: dict[int, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)
    identities: dict[str, str | None] = field(default_factory=dict)

    def stacked(self, condition: str, names: Sequence[str]) -> np.ndarray:
        """(names, P) under one condition."""
        return np.stack([self.features[condition][name] for name in names])


class OtherRunError(ValueError):
    """The folder holds results of another run."""


def encode_clips(
    encoder: VideoEncoder,
    shards: Sequence[Iterable[Clip]],
    folder: Path,
    protocol: dict[str, Any],
    *,
    controls: Sequence[str] = CONTROLS,
    draws: int = 3,
    seed: int = 0,
    workers: int = 1,
    item_timeout: float | None = 60.0,
    progress: Callable[[int], None] = lambda rows: None,
) -> ClipFeatures:
    """Encodes every video once per condition, from one decoding.

    Args:
        shards: the rows. Several processes take whole shards where there are enough of them, else every n-th video.
        folder: of this run, which keeps the features.
        protocol: what decides the features, for `folder`: a run with another one is refused.
        controls, draws: see `control_features`; and "blind", a feature that all clips share, that of grey frames.
        seed: of the shuffled frames.
        workers: videos that are decoded at the same time, each in a process of its own.
        item_timeout: seconds for decoding one video, see `DecodingProcess`; None decodes in this process.
        progress: called with the number of rows done, in this process.

    Returns:
        Of all rows and processes, in every process.

    Raises:
        OtherRunError: `folder` is of another run.
        ValueError: an unknown control.
    """
    check_controls(controls, ALL_CONTROLS)
    of_frames = [control for control in controls if control != BLIND]
    protocol = {**protocol, "controls": of_frames, "shuffle_draws": draws, "seed": seed}
    rank, processes, wait = begin(folder, protocol)
    known = read_features(folder)
    names = known.identities
    todo = (
        clip
        for clip in own_clips(shards, rank, processes)
        if clip.row not in known.rows or names.get(clip.name) != clip.identity  # failures: once more
    )

    rules = encoder.processor.video_processor

    def load(video: str | bytes, backwards: bool, span: tuple[float, float] | None) -> np.ndarray:
        frames = read_clip(video, rules, backwards, span, shrink=rules.shrinker())
        return encoder.processor(videos=[frames], return_tensors="pt", **FITTED)["pixel_values_videos"][0].numpy()

    with ClipDecoder(load, workers, item_timeout) as decoder:
        while batch := list(islice(todo, 4 * workers)):
            _write_part(folder, batch, *_encode(encoder, batch, decoder, names, of_frames, draws, seed))
            progress(len(batch))
    wait()
    found = read_features(folder)
    if BLIND in controls:
        found.features[BLIND] = dict.fromkeys(found.features.get(FULL, ()), _blind_feature(encoder))
    return found


def begin(folder: Path, protocol: dict[str, Any]) -> tuple[int, int, Callable[[], None]]:
    """Claims the folder in one process; returns what `processes_now` does, when all may read it."""
    rank, processes, wait = processes_now()
    if rank == 0:
        claim(folder, protocol)
    wait()
    return rank, processes, wait


def claim(folder: Path, protocol: dict[str, Any]) -> None:
    """Makes the folder this run's, or finds that it is.

    Raises:
        OtherRunError: it is of a run with another protocol; the message names the fields that differ.
    """
    check_run(folder, protocol)
    path = folder / PROTOCOL_NAME
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(protocol, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_run(folder: Path, protocol: dict[str, Any], whole: bool = True) -> None:
    """Refuses a folder that is of a run with another protocol.

    Args:
        whole: else other fields may be there, too.

    Raises:
        OtherRunError: as of `claim`.
    """
    path = folder / PROTOCOL_NAME
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no settings")
    except (ValueError, RecursionError) as error:
        raise OtherRunError(
            f"{path} is damaged ({error}), so nobody knows what {folder} was made with: use another folder."
        ) from error
    found, wanted = _flat(found), _flat(json.loads(json.dumps(protocol)))
    names = found.keys() | wanted.keys() if whole else wanted.keys()
    differing = sorted(name for name in names if found.get(name) != wanted.get(name))
    if differing:
        shown = "; ".join(f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} now" for name in differing[:4])
        raise OtherRunError(f"{folder} holds an evaluation with other settings ({shown}). Use another folder.")


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of settings under names such as `video_processor.num_frames`."""
    nested = {name: value if isinstance(value, dict) else {"": value} for name, value in settings.items()}
    return {f"{name}.{key}".rstrip("."): value for name, values in nested.items() for key, value in values.items()}


def read_features(folder: Path) -> ClipFeatures:
    """What all processes have written so far. A damaged file is left out with a warning."""
    found = ClipFeatures()
    for path in sorted((folder / "features").glob("*.safetensors")):
        try:
            features, identities, rows = _read_part(path)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s), and its clips are encoded again", path, error)
            continue
        for condition, of_condition in features.items():
            found.features.setdefault(condition, {}).update(of_condition)
        found.identities |= identities
        for row, name, info, reason in rows:
            found.rows.pop(row, None)  # what came later holds
            found.failed.pop(row, None)
            if reason is None:
                found.rows[row] = name, info
            else:
                found.failed[row] = name, reason
    return found


def _read_part(path: Path) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, str | None], list[tuple]]:
    """Features by condition and name, identities by name, and rows, of one file."""
    with safe_open(path, "np") as file:
        header = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
        features = {
            condition: dict(zip(header["names"], file.get_tensor(condition), strict=True))
            for condition in file.keys()  # noqa: SIM118  (no dict)
        }
        return (
            features,
            dict(header["identities"]),
            [tuple(row) for row in header["rows"]],
        )


def own_clips(shards: Sequence[Iterable[Clip]], rank: int, processes: int) -> Iterator[Clip]:
    """The rows of one process: whole shards where there are enough of them, else those of every n-th video, so that
    no two processes read the same one."""
    if len(shards) >= processes:
        for shard in shards[rank::processes]:
            yield from shard
        return
    numbers: dict[str, int] = {}
    for shard in shards:
        for clip in shard:
            if numbers.setdefault(clip.name, len(numbers)) % processes == rank:
                yield clip


@torch.inference_mode()
def _encode(
    encoder: VideoEncoder,
    batch: list[Clip],
    decoder: ClipDecoder,
    known: dict[str, str | None],
    controls: Sequence[str],
    draws: int,
    seed: int,
) -> tuple[list[str], dict[str, np.ndarray], dict[str, str]]:
    """Names that are new, their features (names, P) by condition, and reasons of failures by name.

    One clip at a time, so that its features do not depend on its neighbours.
    """
    new: dict[str, Clip] = {}
    for clip in batch:
        if clip.name not in known or known[clip.name] != clip.identity:
            new.setdefault(clip.name, clip)
    names: list[str] = []
    rows: dict[str, list[np.ndarray]] = {}
    failed: dict[str, str] = {}
    for clip, pixels in decoder(new.values()):
        if isinstance(pixels, str):
            failed[clip.name] = pixels
            continue
        generator = torch.Generator().manual_seed(seed_of(clip.name, seed))
        features = order_features(encoder.model, torch.from_numpy(pixels)[None], controls, draws, generator)
        try:
            of_clip = {condition: unit_rows(feature, [clip.name]) for condition, feature in features}
        except FeatureError as error:
            failed[clip.name] = str(error)
            continue
        names.append(clip.name)
        for condition, feature in of_clip.items():
            rows.setdefault(condition, []).append(feature)
    known.update((name, new[name].identity) for name in names)
    return names, {condition: np.concatenate(values) for condition, values in rows.items()}, failed


def order_features(
    model: BTAdapterModel, videos: torch.Tensor, controls: Sequence[str], draws: int, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """Videos (B, T, 3, H, W) as they are ("full") and under each of `CONTROLS`: conditions, and features (B, P).

    Their frames pass the frozen backbone once for all conditions that only change the order.
    """
    frames = videos.flatten(0, 1).to(model.device, model.dtype)
    places = torch.arange(len(frames)).view(*videos.shape[:2], 1, 1, 1)  # as videos of numbers
    states = FrameStates(model)
    states.add(frames)

    def encode_order(order: torch.Tensor, frame_mask: None = None) -> torch.Tensor:
        return states.features(order.flatten(1))

    def encode_images(order: torch.Tensor) -> torch.Tensor:
        return model.get_image_features(frames[order.flatten().to(frames.device)]).pooler_output

    yield FULL, encode_order(places)
    yield from control_features(
        encode_order, places, controls=controls, encode_images=encode_images, draws=draws, generator=generator
    )


@torch.inference_mode()
def _blind_feature(encoder: VideoEncoder) -> np.ndarray:
    """Unit feature (P,) of frames that are zero once they are normalised, grey all over."""
    rules = encoder.processor.video_processor
    shape = (1, rules.num_frames, 3, rules.crop_size["height"], rules.crop_size["width"])
    video = torch.zeros(shape, device=encoder.model.device, dtype=encoder.model.dtype)
    feature = encoder.model.get_video_features(video).pooler_output
    return unit_rows(feature, ["grey frames"])[0]


def seed_of(name: str, seed: int) -> int:
    """The seed of a clip's chance."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogateescape")).digest()[:7])


def _write_part(
    folder: Path, batch: list[Clip], names: list[str], features: dict[str, np.ndarray], failed: dict[str, str]
) -> None:
    rows = [[clip.row, clip.name, clip.info, failed.get(clip.name)] for clip in batch]
    (folder / "features").mkdir(exist_ok=True)
    identities = {clip.name: clip.identity for clip in batch if clip.name in names}
    header = {"names": names, "rows": rows, "identities": identities}
    # in the order of writing
    with written_whole(folder / "features" / f"{time.time_ns():020d}-{uuid.uuid4().hex}.safetensors") as temporary:
        save_file(features, temporary, {key: json.dumps(value) for key, value in header.items()})


def is_main_process() -> bool:
    """Whether this process is to write and print results."""
    return processes_now()[0] == 0
