"""Many video files and texts to features: what indexing and zero-shot labelling share."""

import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from ..adapters.fingerprint import VOLATILE, model_fingerprint, plain
from ..adapters.writing import no_character, printable
from ..assets import default_model_path
from ..hub.dual_encoder import load_dual_encoder
from ..hub.machine import available_cores, machine_dtype, torch_threads, usable_device
from ..models.modeling_bt_adapter import BTAdapterModel
from ..models.processing_bt_adapter import BTAdapterProcessor
from ..models.video_errors import VideoError
from ..models.video_io import load_video
from ..models.video_processing_bt_adapter import FITTED
from .pipeline import Stopwatch, in_order
from .table import describe_model


@dataclass
class VideoEncoder:
    """A dual encoder with its processor, on one device.

    Attributes:
        source: the Hub id or folder that both were loaded from; None for the model inside the package.
        revision: the commit on the Hub, where there is one.
        stopwatch: what the stages of `encode_videos` have taken.
    """

    model: BTAdapterModel
    processor: BTAdapterProcessor
    source: str | None
    revision: str | None = None
    stopwatch: Stopwatch = field(default_factory=Stopwatch, repr=False, compare=False)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike | None = None,
        *,
        revision: str | None = None,
        num_frames: int | None = None,
        on_damage: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
    ) -> "VideoEncoder":
        """Load model and processor.

        Args:
            source: Hub id or folder of a `BTAdapterModel` and its processor, or of an adapter of one; None for the
                moving-digits model inside the package.
            revision: branch, tag or commit on the Hub.
            num_frames: frames to sample per video instead of what the saved processor says.
            on_damage: "raise", "salvage" or "check", what is done with damaged files, instead of what the saved
                processor says.
            device: "cpu", "cuda", "cuda:1", "mps"; by default an accelerator where there is one.
            dtype: "float32", "bfloat16" or "float16"; "auto" is what the device computes fastest of the first two,
                see [`machine_dtype`].

        Raises:
            ValueError: the source holds a model of another kind (a plain CLIP has no trained branch), or a bad value.
            OSError: there is no model at the source.
        """
        name = os.fspath(default_model_path() if source is None else source)
        if os.path.isdir(name):
            name = os.path.abspath(name)  # an index outlives the working directory
        device = usable_device(device)
        if dtype == "auto":
            dtype, _ = machine_dtype(device)
        model, processor, commit = load_dual_encoder(name, revision, dtype=dtype)
        if num_frames is not None:
            if num_frames < 1:
                raise ValueError(f"num_frames={num_frames}: expected at least 1.")
            processor.video_processor.num_frames = num_frames
        if on_damage is not None:
            processor.video_processor.on_damage = on_damage
        return cls(model.to(device).eval(), processor, None if source is None else name, commit)

    @property
    def name(self) -> str:
        """For messages: the source and the dtype."""
        return describe_model(self.source, self.revision, str(self.model.dtype))

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which feature a video gets, apart from the weights: how it is sampled and preprocessed."""
        return plain(self.processor.video_processor.to_dict())

    def with_settings(self, settings: Mapping[str, Any]) -> "VideoEncoder":
        """The same model, sampling and preprocessing videos by the `settings` of another encoder.

        A video that is to be looked for in an index is encoded so with `index.info["settings"]`.
        """
        video = self.processor.video_processor
        processor = copy.copy(self.processor)
        processor.video_processor = type(video).from_dict({**video.to_dict(), **settings})
        return replace(self, processor=processor)

    def fingerprint(self) -> str:
        """Of the weights as they are in memory (so dtype counts), and of what the config says of their use."""
        return model_fingerprint(self.model)

    def fingerprints(self) -> dict[str, str]:
        """For an index: `features_fingerprint`, and `fingerprint`, which all fields of the config enter, also those
        that training alone reads: earlier versions know that one only."""
        return {
            "fingerprint": model_fingerprint(self.model, VOLATILE),
            "features_fingerprint": self.fingerprint(),
        }

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 64, max_length: int | None = None) -> np.ndarray:
        """Features of texts: float32 (texts, P), L2-normalised.

        Args:
            max_length: cut texts at so many tokens, start and end included; by default a text that is longer than the
                text tower takes is an error.

        Raises:
            ValueError: a text is empty, too long, or holds what is no character.
        """
        limit = self.model.config.text_config.max_position_embeddings
        cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
        features = []
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            for text in batch:
                if not text.strip():
                    raise ValueError("a text is empty.")
                if problem := no_character(text):
                    raise ValueError(f"the text '{printable(text[:40])}' {problem}.")
                length = len(self.processor.tokenizer(text, **cut)["input_ids"])
                if length > limit:
                    raise ValueError(
                        f"the text '{text[:40]}...' is {length} tokens long; this model takes {limit}: shorten it."
                    )
            inputs = self.processor(text=batch, padding=True, return_tensors="pt", **cut).to(self.model.device)
            features.append(unit_rows(self.model.get_text_features(**inputs).pooler_output, batch))
        return np.concatenate(features)

    def label_scores(self, video: np.ndarray, texts: np.ndarray) -> list[tuple[int, float, float]]:
        """Zero-shot labels, best first: (label's index, probability, cosine).

        Args:
            video: (P,) unit feature of one video.
            texts: (labels, P) unit features of the labels.
        """
        cosines = texts @ video
        logits = float(self.model.logit_scale.detach().float().exp()) * cosines.astype(np.float64)
        weights = np.exp(logits - logits.max())
        order = np.argsort(-cosines, kind="stable")
        return [(int(i), float(weights[i] / weights.sum()), float(cosines[i])) for i in order]

    def encode_videos(
        self, paths: Sequence[str], batch_size: int = 8, workers: int | None = None
    ) -> Iterator["EncodedVideo"]:
        """Features of video files, in the order of `paths`, decoded a few ahead in threads.

        A file that cannot be read comes back with its error instead of a feature; nothing else is swallowed.

        On a CPU each thread takes its videos all the way and computes with its share of the cores; an accelerator is
        fed by the threads. Threads of Python and of torch together are not more than the cores, unless `workers` are.
        What the stages have taken is in `stopwatch`.

        Args:
            batch_size: videos that pass the model at once, on a CPU in all threads together.
            workers: threads; by default one per core of a CPU, and at most 4 beside an accelerator.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1.")
        on_cpu, cores = self.model.device.type == "cpu", available_cores()
        workers = (cores if on_cpu else min(4, cores)) if workers is None else workers
        if workers < 1:
            raise ValueError(f"workers={workers}: expected at least 1.")
        workers = max(1, min(workers, len(paths)))
        with (
            torch_threads(cores // workers if on_cpu else 1),
            ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool,
        ):
            if on_cpu:
                size = max(1, batch_size // workers)
                batches = (paths[start : start + size] for start in range(0, len(paths), size))
                for encoded in in_order(pool, self._encode_paths, batches, workers + 1):
                    yield from encoded
            else:
                yield from self._encode_stream(in_order(pool, self.prepare, paths, batch_size + workers), batch_size)

    def _encode_paths(self, paths: Sequence[str]) -> list["EncodedVideo"]:
        return self.encode_batch([self.prepare(path) for path in paths])

    def encode_batch(self, batch: list["PreparedVideo"]) -> list["EncodedVideo"]:
        """What `prepare` made of a few videos, through the model at once."""
        return self._finish(*self._start(batch))

    def _encode_stream(self, prepared: Iterator["PreparedVideo"], batch_size: int) -> Iterator["EncodedVideo"]:
        """While the accelerator computes one batch, the next one is copied to it."""
        device = self.model.device
        copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        running = None
        while batch := list(islice(prepared, batch_size)):
            started = self._start(batch, copies)
            if running is not None:
                yield from self._finish(*running)
            running = started
        if running is not None:
            yield from self._finish(*running)

    def prepare(self, path: str) -> "PreparedVideo":
        """Decoded and preprocessed, or why not."""
        video = self.processor.video_processor
        fit = video.shrinker()

        def shrink(frame: np.ndarray) -> np.ndarray:
            with self.stopwatch("preprocess"):
                return fit(frame)

        try:
            with self.stopwatch("decode"):
                frames, metadata = load_video(
                    path,
                    num_frames=video.num_frames if video.do_sample_frames else None,
                    sampling=video.sampling,
                    backend=video.video_backend,
                    on_damage=video.on_damage,
                    background=video.background,
                    shrink=shrink,
                )
            with self.stopwatch("preprocess"):
                inputs = self.processor(videos=[frames], do_sample_frames=False, return_tensors="pt", **FITTED)
        except VideoError as error:
            return PreparedVideo(path, None, {}, error)
        return PreparedVideo(path, inputs["pixel_values_videos"][0], _describe(metadata), None)

    @torch.inference_mode()
    def _start(
        self, batch: list["PreparedVideo"], copies: "torch.cuda.Stream | None" = None
    ) -> tuple[list["PreparedVideo"], torch.Tensor | None]:
        """Features (good ones, P) of a batch, which an accelerator may not have computed yet."""
        videos = [video.pixels for video in batch if video.pixels is not None]
        if not videos:
            return batch, None
        device, dtype = self.model.device, self.model.dtype
        with self.stopwatch("transfer"):
            pixel_values, frame_mask = _pad(videos)
            if copies is None:
                pixel_values = pixel_values.to(device, dtype)
            else:
                with torch.cuda.stream(copies):
                    pixel_values = pixel_values.pin_memory().to(device, non_blocking=True)
                torch.cuda.current_stream(device).wait_stream(copies)
                pixel_values.record_stream(torch.cuda.current_stream(device))
        with self.stopwatch("tower"):
            output = self.model.get_video_features(pixel_values.to(dtype), frame_mask=frame_mask)
        return batch, output.pooler_output

    def _finish(self, batch: list["PreparedVideo"], features: torch.Tensor | None) -> list["EncodedVideo"]:
        rows = iter(())
        if features is not None:
            with self.stopwatch("tower"):  # an accelerator is waited for
                rows = iter(torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy())
        encoded = []
        for path, _, facts, error in batch:
            row = None if error else next(rows)
            if row is not None and not np.isfinite(row).all():
                row, error = None, not_finite(path)
            encoded.append(EncodedVideo(path, row, facts, error))
        return encoded


class FeatureError(VideoError):
    """What the model makes of a video is not a finite number."""


class PreparedVideo(NamedTuple):
    """One file: its frames (T, 3, H, W) and facts, or its error."""

    path: str
    pixels: torch.Tensor | None
    facts: dict[str, Any]
    error: VideoError | None


class EncodedVideo(NamedTuple):
    """One file: its L2-normalised float32 feature (P,) and facts (duration in seconds, width, ...), or its error."""

    path: str
    feature: np.ndarray | None
    facts: dict[str, Any]
    error: VideoError | None


def _pad(videos: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Videos (T_i, 3, H, W) -> (B, max T, 3, H, W), zeros after the last frame, and the mask (B, max T)."""
    lengths = torch.tensor([len(video) for video in videos])
    padded = torch.nn.utils.rnn.pad_sequence(videos, batch_first=True)
    return padded, torch.arange(padded.shape[1])[None] < lengths[:, None]


def unit_rows(features: torch.Tensor, names: Sequence[str]) -> np.ndarray:
    """(n, P) of any dtype and device -> float32 (n, P) of unit rows.

    Raises:
        FeatureError: one is not finite; it names what it is of.
    """
    features = torch.nn.functional.normalize(features.float(), dim=-1).cpu()
    bad = (~features.isfinite().all(-1)).nonzero().flatten().tolist()
    if bad:
        raise not_finite(names[bad[0]])
    return features.numpy()


def not_finite(name: str) -> FeatureError:
    return FeatureError(
        f"the model's feature of '{printable(name)}' is not finite: try --dtype float32; if it is so of all, the "
        "model's weights are damaged."
    )


def _describe(metadata: Any) -> dict[str, Any]:
    """Plain numbers of a video's metadata, for JSON."""
    facts = {name: getattr(metadata, name) for name in ("duration", "fps", "width", "height", "total_num_frames")}
    facts["timestamps"] = [round(float(second), 3) for second in metadata.timestamps]
    for name, value in facts.items():
        value = value.item() if isinstance(value, np.generic) else value
        facts[name] = None if isinstance(value, float) and not math.isfinite(value) else value
    return facts
