"""A cache on the disk of what the frozen backbone makes of videos, so that training decodes and encodes each once.

The folder holds `frozen_states.json` (what was computed, and how), shards of safetensors with the states of some
videos each, and `broken_videos*.jsonl`. A shard appears whole or not at all: a run that is killed is gone on with.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..adapters.fingerprint import CAST_DISTANCE, backbone_fingerprint, distances, xclip_fingerprint
from ..adapters.host_modules import execution_device, find_tower
from ..adapters.writing import PARTIAL, written_whole
from ..data.archives import MediaArchives
from ..data.conversations import read_media
from ..data.decoding_process import DecodingProcess
from ..hub.machine import available_cores, torch_threads
from ..models.modeling_xclip_frames import XCLIPFramesModel
from ..models.video_errors import VideoError, VideoNotFoundError


if TYPE_CHECKING:
    from ..models.processing_bt_adapter_chat import BTAdapterChatProcessorMixin


logger = logging.getLogger(__name__)

PLAN_NAME = "frozen_states.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
# A shard is closed at so many bytes or videos; what is lost when a run is killed.
SHARD_BYTES, SHARD_VIDEOS = 1 << 29, 256
_FP8_MAX = 448.0
_SCALE = ".scale"
_ENDS = 1 << 16  # bytes at either end of a file that tell it from others
# Fields of the video processor that change what the backbone sees.
_PIXEL_FIELDS = (
    "num_frames", "sampling", "do_sample_frames", "video_backend", "on_damage", "background", "do_resize", "size",
    "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std",
)  # fmt: skip


def video_key(video: str, archives: MediaArchives | None = None) -> str:
    """Names a video by its content: its size and both ends of the file. A URL is its own name; a member of archives
    is named by its own name and the content of the archives.

    Raises:
        VideoError: if there is no such file.
    """
    if "://" in video:
        return video
    if archives is not None:
        return hashlib.sha256("\n".join([video, *map(video_key, archives.paths)]).encode()).hexdigest()
    try:
        with open(video, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            ends = [file.read(_ENDS)]
            file.seek(max(0, size - _ENDS))
            ends.append(file.read(_ENDS))
    except OSError as error:
        raise VideoNotFoundError(f"{video} cannot be read: {error.strerror or error}") from error
    return hashlib.sha256(b"".join([str(size).encode(), *ends])).hexdigest()


def frozen_tower(model: PreTrainedModel) -> PreTrainedModel:
    """The tower whose states are kept: of an X-CLIP all, of a BT-Adapter what its branch reads."""
    found = [module for module in model.modules() if isinstance(module, XCLIPFramesModel)]
    return found[0] if found else find_tower(model)


def selected_states(model: PreTrainedModel) -> int | list[int]:
    """Which of the tower's hidden states the model reads: LLaVA says so; a Q-Former reads the last."""
    layer = getattr(model.config, "vision_feature_layer", None)
    return -1 if layer is None else layer


def describe_states(model: PreTrainedModel, processor: "BTAdapterChatProcessorMixin", dtype: str) -> dict[str, Any]:
    """What the states of a model are: content of `frozen_states.json`.

    Raises:
        ValueError: if the dtype is unknown, the backbone learns, or the processor draws other frames each time.
    """
    if dtype not in DTYPES:
        raise ValueError(f"The dtype of frozen states is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    tower, rules = frozen_tower(model), processor.video_processor
    if not tower.backbone_is_frozen():
        raise ValueError("The image backbone learns: its states change, and cannot be computed before.")
    if rules.sampling == "jitter":
        raise ValueError(
            'The processor draws other frames each time (sampling="jitter"), and frozen states hold one choice of '
            'them: use "centers" or "uniform".'
        )
    states = tower.needed_states(selected_states(model))
    if isinstance(tower, XCLIPFramesModel):
        tokens, fingerprint = 1, xclip_fingerprint(tower)
    else:
        size, patch = rules.crop_size, tower.config.patch_size
        tokens = tower.family.num_cls + (size["height"] // patch) * (size["width"] // patch)
        fingerprint = backbone_fingerprint(tower.vision_model, states[-1])
    description = {
        "version": 1,
        "dtype": dtype,
        "states": states,
        "shape": [processor.num_clips, len(states), rules.num_frames, tokens, tower.config.hidden_size],
        "pixels": {name: getattr(rules, name) for name in _PIXEL_FIELDS},
        "fingerprint": fingerprint,
    }
    return json.loads(json.dumps(description, default=str))  # as it is read


def check_description(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises:
    ValueError: if the states in a folder are not those that are wanted, naming what differs.
    """
    other = [
        f"{name} {found.get(name)}, here {wanted[name]}"
        for name in ("version", "dtype", "states", "shape")
        if found.get(name) != wanted[name]
    ]
    pixels = found.get("pixels", {})
    other += [f"{k} {pixels.get(k)}, here {value}" for k, value in wanted["pixels"].items() if pixels.get(k) != value]
    reference = found.get("fingerprint", {})
    if wanted["fingerprint"].keys() != reference.keys():
        other.append("a fingerprint of other parts of the backbone")
    else:
        apart = distances(wanted["fingerprint"], reference)
        other += [f"other weights in the backbone ({part})" for part in apart if apart[part] > CAST_DISTANCE]
    if other:
        raise ValueError(
            f"The frozen states in {folder} are not those of this model and processor: {'; '.join(other)}. Choose "
            "another folder, or delete this one to have them computed anew."
        )


def read_description(folder: Path) -> dict[str, Any]:
    path = folder / PLAN_NAME
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no frozen states: {path} cannot be read ({error}).") from error


def _index_shards(folder: Path) -> dict[str, Path]:
    """Key of each video -> the shard that holds it."""
    index = {}
    for path in sorted(folder.glob("states-*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                index.update({key: path for key in file.keys() if not key.endswith(_SCALE)})  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and it is computed anew.") from error
    return index


@dataclass
class StatesPlan:
    """What there is to compute, and what it takes.

    Attributes:
        folder: of the cache.
        description: content of `frozen_states.json`.
        videos: number of distinct videos asked for.
        missing: {key: path or URL} of the videos whose states are not there yet.
        broken: {path or URL: reason} of files that cannot be read at all.
        free_bytes: on the disk.
        archives: that hold the videos, if any do.
    """

    folder: Path
    description: dict[str, Any]
    videos: int
    missing: dict[str, str]
    broken: dict[str, str]
    free_bytes: int
    archives: MediaArchives | None = None

    @cached_property
    def bytes_per_video(self) -> int:
        *rows, width = self.description["shape"]
        scale = 4 if self.description["dtype"] == "fp8" else 0
        tokens = torch.Size(rows).numel()
        return tokens * (width * DTYPES[self.description["dtype"]].itemsize + scale)

    @property
    def bytes_to_write(self) -> int:
        return self.bytes_per_video * len(self.missing)

    def __str__(self) -> str:
        clips, states, T, tokens, width = self.description["shape"]
        return (
            f"frozen states of {self.videos} videos in {self.folder}: {states} states x {clips * T} frames x {tokens} "
            f"tokens x {width} in {self.description['dtype']} are {_size(self.bytes_per_video)} per video; "
            f"{len(self.missing)} videos to encode, {_size(self.bytes_to_write)}, with {_size(self.free_bytes)} free"
        )


def _size(count: int) -> str:
    return f"{count / 10**9:.2f} GB" if count >= 10**8 else f"{count / 10**6:.2f} MB"


def plan_states(
    folder: str | os.PathLike,
    model: PreTrainedModel,
    processor: "BTAdapterChatProcessorMixin",
    videos: Iterable[str],
    dtype: str = "bf16",
    archives: MediaArchives | None = None,
) -> StatesPlan:
    """Finds out what is missing in a cache, which need not be there yet. Nothing is written.

    Args:
        folder: of the cache.
        model, processor: of the training; the backbone is frozen.
        videos: paths and URLs.
        dtype: "bf16"; "fp8", half of it, with a scale per token; or "fp32".
        archives: that hold the videos, if any do, as the `archives` of the table.

    Raises:
        ValueError: if the folder holds the states of another model or processor, or the disk has too little room.
    """
    folder = Path(folder)
    description = describe_states(model, processor, dtype)
    index = {}
    # a hidden file is being written by another process, or was by one that was killed
    if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        check_description(folder, read_description(folder), description)
        index = _index_shards(folder)
    missing, broken, count = {}, {}, 0
    for video in dict.fromkeys(videos):
        count += 1
        try:
            key = video_key(video, archives)
        except VideoError as error:
            broken[video] = str(error)
            continue
        if key not in index:
            missing.setdefault(key, video)
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    plan = StatesPlan(folder, description, count, missing, broken, shutil.disk_usage(there).free, archives)
    if plan.bytes_to_write > plan.free_bytes:
        raise ValueError(f"Too little room for the {plan}: use fp8, fewer frames, another disk, or no cache.")
    return plan


def build_states(
    plan: StatesPlan,
    model: PreTrainedModel,
    processor: "BTAdapterChatProcessorMixin",
    *,
    workers: int = 0,
    process: int = 0,
    processes: int = 1,
    progress: Callable[[Iterable], Iterable] = iter,
    item_timeout: float | None = 60.0,
) -> dict[str, str]:
    """Computes what is missing, each of several processes its share. What is finished stays when a run is killed.

    Args:
        plan: see [`plan_states`].
        model: on its device.
        workers: processes that decode.
        process, processes: the rank of this one, and how many there are.
        progress: around what is gone through.
        item_timeout: seconds that one video may take; see `InstructionDataset`.

    Returns:
        {path or URL: reason} of the videos that cannot be used; also in `broken_videos*.jsonl` in the folder.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    with written_whole(plan.folder / PLAN_NAME) as file:
        file.write_text(json.dumps(plan.description, indent=2) + "\n")
    for path in plan.folder.glob(f".states-{process:03d}-*{PARTIAL}"):  # of a killed run
        path.unlink()
    own = [(key, video) for key, video in plan.missing.items() if _share(key, processes) == process]
    pixels = _Pixels(own, processor, plan.archives, item_timeout)
    loader = torch.utils.data.DataLoader(pixels, batch_size=None, num_workers=workers)
    broken = dict(plan.broken) if process == 0 else {}
    shard: dict[str, torch.Tensor] = {}
    size = 0
    tower = frozen_tower(model)
    device, select = execution_device(tower.vision_model), selected_states(model)
    for (key, video), pixels in zip(own, progress(loader), strict=True):
        if isinstance(pixels, str):
            broken[video] = pixels
            continue
        with torch_threads(available_cores() - workers):
            states = tower.encode_frames(pixels.to(device, tower.dtype), select)
        entry = _pack(key, torch.stack(list(states.values()), dim=1).cpu(), plan.description["dtype"])
        shard.update(entry)
        size += sum(tensor.nbytes for tensor in entry.values())
        if size >= SHARD_BYTES or len(shard) >= SHARD_VIDEOS:
            _write_shard(plan.folder, process, shard)
            shard, size = {}, 0
    if shard:
        _write_shard(plan.folder, process, shard)
    rank = f"-rank{process}" if process else ""
    lines = [json.dumps({"video": video, "reason": reason}) + "\n" for video, reason in broken.items()]
    with written_whole(plan.folder / f"broken_videos{rank}.jsonl") as file:
        file.write_text("".join(lines))
    for video, reason in broken.items():
        logger.warning("Skipped %s: %s", video, reason)
    return broken


def _share(key: str, processes: int) -> int:
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % processes


class _Pixels(torch.utils.data.Dataset):
    """Pixels (clips, T, 3, H, W) of each video; of one that cannot be used the reason."""

    def __init__(
        self,
        videos: Sequence[tuple[str, str]],
        processor: "BTAdapterChatProcessorMixin",
        archives: MediaArchives | None,
        item_timeout: float | None,
    ):
        self.videos, self.processor, self.archives = videos, processor, archives
        self._decode = self._load if item_timeout is None else DecodingProcess(self._load, item_timeout)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            return torch.from_numpy(self._decode(self.videos[index][1]))
        except VideoError as error:
            return str(error)

    def _load(self, video: str) -> np.ndarray:
        found = read_media(video, self.archives)
        return self.processor(videos=[found], return_tensors="pt")["pixel_values_videos"].numpy()


def _pack(key: str, states: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    if dtype != "fp8":
        return {key: states.to(DTYPES[dtype]).contiguous()}
    states = states.float()
    scale = states.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / _FP8_MAX  # per token
    return {key: (states / scale).to(DTYPES[dtype]).contiguous(), key + _SCALE: scale}


def _write_shard(folder: Path, process: int, shard: dict[str, torch.Tensor]) -> None:
    numbers = [int(re.findall(r"\d+", path.stem)[-1]) for path in folder.glob(f"states-{process:03d}-*.safetensors")]
    path = folder / f"states-{process:03d}-{max(numbers, default=-1) + 1:05d}.safetensors"
    with written_whole(path) as file:
        save_file(shard, file, metadata={"format": "pt"})


class FrozenStates:
    """The states of videos in a folder that [`build_states`] has filled.

    Args:
        folder: of the cache.
        model, processor: of the training.
        archives: that hold the videos, if any do, as the `archives` of the table.

    Raises:
        ValueError: if there are none, or they are those of another model or processor.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        model: PreTrainedModel,
        processor: "BTAdapterChatProcessorMixin",
        archives: MediaArchives | None = None,
    ):
        self.folder, self.archives = Path(folder), archives
        description = read_description(self.folder)
        wanted = describe_states(model, processor, description.get("dtype"))
        check_description(self.folder, description, wanted)
        self.states: list[int] = description["states"]
        self._shape, self._dtype = description["shape"], description["dtype"]
        self._shards = _index_shards(self.folder)
        self._broken: dict[str, str] = {}
        for path in self.folder.glob("broken_videos*.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                self._broken[record["video"]] = record["reason"]

    def __len__(self) -> int:
        return len(self._shards)

    def load(self, videos: Sequence[str]) -> dict[int, torch.Tensor]:
        """States of videos, one after the other: {index: (clips, T, N, D)}, in float32 or bfloat16.

        Raises:
            VideoError: if a video could not be used when the states were computed, or its file is gone.
            ValueError: if its states are not there.
        """
        whole = torch.cat([self._load_one(video) for video in videos])
        return {index: whole[:, place] for place, index in enumerate(self.states)}

    def blank(self) -> dict[int, torch.Tensor]:
        """Zeros in place of the states of a video of one frame per clip, in the dtype of the others."""
        clips, _, _, tokens, width = self._shape
        dtype = DTYPES["bf16" if self._dtype == "fp8" else self._dtype]
        return {index: torch.zeros(clips, 1, tokens, width, dtype=dtype) for index in self.states}

    def _load_one(self, video: str) -> torch.Tensor:
        key = video_key(video, self.archives)
        if key not in self._shards:
            if video in self._broken:
                raise VideoError(self._broken[video])
            raise ValueError(
                f"{self.folder} holds no states of {video}: it was changed or added since. Compute what is missing "
                "(`bt-adapter finetune --cache-states`, or plan_states and build_states)."
            )
        with safe_open(self._shards[key], framework="pt") as file:
            states = file.get_tensor(key)
            if states.dtype != DTYPES["fp8"]:
                return states
            return (states.float() * file.get_tensor(key + _SCALE)).to(torch.bfloat16)
