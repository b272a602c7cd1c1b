"""Encoding films by windows: each frame is decoded and passes the frozen tower once, the branch runs per window."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch

from ..hub.machine import decoding_pool, decoding_workers
from ..models.video_errors import VideoDecodeError, VideoError
from .encoding import EncodedVideo, PreparedVideo, VideoEncoder, unit_rows
from .film import Film
from .frame_states import FrameStates
from .moments import Windows, pick_frames


MAX_WINDOWS = 1_000_000  # of one film; a day of windows each tenth of a second


class Moment(NamedTuple):
    """A window: seconds where it starts and ends, and of its frames."""

    start: float
    end: float
    timestamps: list[float]


class EncodedMoments(NamedTuple):
    """One file: L2-normalised float32 features (moments, P), the moments, and facts of the video; or its error."""

    path: str
    features: np.ndarray | None
    moments: list[Moment]
    facts: dict[str, Any]
    error: VideoError | None


class Plan(NamedTuple):
    """What is to be encoded of a film; anew if a second one comes, for then the first was made of a wrong count."""

    moments: list[Moment]
    frames: np.ndarray  # (moments, T) numbers into the frames that follow
    facts: dict[str, Any]


def encode_moments(
    encoder: VideoEncoder, paths: Sequence[str], windows: Windows, batch_size: int = 8, workers: int | None = None
) -> Iterator[EncodedMoments | EncodedVideo]:
    """Features of the windows of videos, in the order of `paths`; a video shorter than a window comes as a whole.

    A file that cannot be read comes back with its error; nothing else is swallowed.

    Args:
        batch_size: windows' worth of frames that are decoded, and pass the model, at once.
        workers: videos that are decoded at the same time; by default one per two cores, at most 4.
    """
    settings = encoder.settings
    if settings["video_backend"] != "pyav":
        raise ValueError(f"moments are decoded with 'pyav'; the processor says '{settings['video_backend']}'.")
    if not settings["do_sample_frames"]:
        raise ValueError("moments have num_frames frames each; the processor says do_sample_frames=False: set it.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1.")
    workers = decoding_workers() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers={workers}: expected at least 1.")
    whole: list[PreparedVideo] = []  # videos that are shorter than a window, one after the other
    with decoding_pool(workers) as pool:
        remaining = iter(paths)
        films: deque[_Film] = deque()
        try:
            while True:
                ahead = islice(remaining, workers + 1 - len(films))
                films.extend(_Film(path, read_film(encoder, path, windows, batch_size), pool) for path in ahead)
                film = films.popleft() if films else None
                if film is not None and isinstance(film.first, PreparedVideo):
                    whole.append(film.first)
                    if len(whole) < batch_size:
                        continue
                    film = None
                elif film is None and not whole:
                    return
                if whole:
                    yield from encoder.encode_batch(whole)
                    whole = []
                if film is not None:
                    yield _encode(encoder, film)
        finally:
            for film in films:
                film.future.cancel()


class _Film:
    """What `read_film` yields for one video, one step ahead of who asks for it, in a thread."""

    def __init__(self, path: str, steps: Iterator, pool: ThreadPoolExecutor):
        self.path, self._steps, self._pool = path, steps, pool
        self.future: Future = pool.submit(next, steps, None)

    @property
    def first(self) -> Any:
        """What comes next, which stays; None where reading it fails, as going over it will show."""
        return None if self.future.exception() else self.future.result()

    def __iter__(self) -> Iterator:
        while (step := self.future.result()) is not None:
            self.future = self._pool.submit(next, self._steps, None)
            yield step


@torch.inference_mode()
def _encode(encoder: VideoEncoder, film: _Film) -> EncodedMoments:
    states, plan, features = FrameStates(encoder.model), None, []
    try:
        for step in film:
            if isinstance(step, Plan):
                states, plan, features = FrameStates(encoder.model), step, []
                continue
            with encoder.stopwatch("tower"):
                states.add(step)
                done = sum(map(len, features))
                ready = plan.frames[done:][plan.frames[done:, -1] < len(states)]
                if len(ready):
                    found = states.features(torch.from_numpy(ready))
                    features.append(unit_rows(found, [film.path] * len(ready)))
                    done += len(ready)
            if done < len(plan.frames):
                states.forget(int(plan.frames[done, 0]))
    except VideoError as error:
        return EncodedMoments(film.path, None, [], {}, error)
    return EncodedMoments(film.path, np.concatenate(features), plan.moments, plan.facts, None)


def read_film(encoder: VideoEncoder, path: str, windows: Windows, batch_size: int) -> Iterator[Any]:
    """Of a film its plan, then its frames (F, 3, H, W) in order; of a shorter video what the processor makes of it."""
    processor, settings, stopwatch = encoder.processor.video_processor, encoder.settings, encoder.stopwatch
    with stopwatch("decode"):
        film = Film(path, settings["on_damage"], tuple(settings["background"]))
    with closing(film):
        while True:
            if not windows.fits(film.duration):
                yield encoder.prepare(path)
                return
            frame_count = len(film.times)
            plan, frames = _plan(film, windows, settings["num_frames"], settings["sampling"] == "centers")
            reading = film.read(frames, batch_size * settings["num_frames"])
            for number in count():
                with stopwatch("decode"):
                    pictures = next(reading, None)
                if pictures is None:
                    break
                if number == 0:
                    plan.facts["height"], plan.facts["width"] = pictures.shape[1:3]
                    yield plan
                with stopwatch("preprocess"):
                    inputs = processor(videos=[pictures], do_sample_frames=False, return_tensors="pt")
                yield inputs["pixel_values_videos"][0]
            if len(film.times) == frame_count:
                return


def _plan(film: Film, windows: Windows, num_frames: int, centred: bool) -> tuple[Plan, np.ndarray]:
    """The plan of a film, and the numbers of the frames that it needs, increasing."""
    if film.duration / windows.stride > MAX_WINDOWS:
        raise VideoDecodeError(
            f"{film.path} is {film.duration:g} s long and would have more than {MAX_WINDOWS:,} windows: "
            "a damaged duration, or a longer stride is called for."
        )
    grid, starts, step = windows.plan(film.duration, num_frames)
    points = np.array(starts)[:, None] + step * np.arange(num_frames)  # (windows, T)
    shown = pick_frames(film.times, (points + step / 2 * centred) * grid)
    frames, places = np.unique(shown, return_inverse=True)
    moments = [
        Moment(start * grid, min(film.duration, start * grid + windows.window), film.times[row].round(3).tolist())
        for start, row in zip(starts, shown, strict=True)
    ]
    facts = {"duration": film.duration, "fps": film.fps, "total_num_frames": len(film.times)}
    return Plan(moments, places.reshape(shown.shape), facts), frames
