"""Reading a film of any length: when each of its frames is shown, then the wanted ones, a few at a time."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np

from ..models.video_decoding import (
    FrameCollector,
    Painter,
    damaged,
    decoded_frames,
    import_pyav,
    load_picture_file,
    open_container,
    picture_kind,
    scan_packets,
)
from ..models.video_errors import EmptyVideoError, VideoDecodeError, item_errors
from ..models.video_io import file_source
from ..models.video_seeking import Seeker


class Film:
    """A video file, open for reading; to be closed.

    The frames are those that `load_video` gives, but memory does not grow with the length of the film (other than of a
    GIF, which PIL reads as a whole).

    Args:
        path: of the file.
        on_damage, background: as of `load_video`.

    Attributes:
        times: seconds of each frame from the first one.
        fps: None where the file does not say.
        duration: seconds; None where the file says too little.

    Raises:
        VideoError: the file cannot be read; `read` raises these as well.
    """

    def __init__(self, path: str, on_damage: str, background: tuple[int, int, int]):
        self.path, self.on_damage, self.background = path, on_damage, background
        self._open = ExitStack()
        self._pictures = self._seeker = None
        with item_errors(path):
            self._source = file_source(path)
            if picture_kind(self._source):
                collect = partial(FrameCollector, np.arange, None)
                self._pictures, metadata = load_picture_file(self._source, collect, on_damage, background)
                self.times, self.fps = np.array(metadata.timestamps), metadata.fps
                self.duration = metadata.duration
                return
            container, stream = self._open.enter_context(open_container(self._source))
            with self._open.pop_all() as opened:  # closed after an error
                self._seeker = Seeker(container, stream)
                scan = self._seeker.read_index(self._source) if on_damage != "check" else None
                scan = scan or scan_packets(self._source, container, stream, self._seeker.visit)
                self._open = opened.pop_all()
            if scan.damage:
                damaged(path, scan.damage, scan.frames, on_damage)
            if scan.frames == 0:
                raise EmptyVideoError(f"{path} has a video stream without frames.")
            if scan.damage or on_damage == "check":
                self._seeker = None
            self._timed, self._painter = scan.timed, Painter(stream, path, background)
            self.fps = scan.fps
            self._set_times(np.array(scan.times))

    def close(self) -> None:
        self._open.close()

    def read(self, frames: np.ndarray, at_once: int) -> Iterator[np.ndarray]:
        """Frames by number, increasing, as uint8 (up to `at_once`, H, W, 3).

        If their count turns out to be another than `times` says, `times` is set anew, and what was read is not to be
        used: read again.
        """
        with item_errors(self.path):
            parts = np.split(frames, range(at_once, len(frames), at_once))
            for number, part in enumerate(parts):
                if self._pictures is not None:
                    yield self._pictures[part]
                    continue
                collector = FrameCollector(lambda total, part=part: part, None, len(self.times))
                found = self._seeker and self._seeker.decode(collector, self._painter, self.path)
                if found is None:
                    yield from self._read_on(np.concatenate(parts[number:]), at_once)
                    return
                yield found.frames

    def at(self, seconds: Sequence[float], at_once: int = 8) -> np.ndarray:
        """The frames that are nearest to these times, uint8 (T, H, W, 3)."""
        while True:
            count = len(self.times)
            nearest = [int(np.abs(self.times - second).argmin()) for second in seconds]
            frames, places = np.unique(nearest, return_inverse=True)
            pictures = list(self.read(frames, at_once))
            if len(self.times) == count:
                return np.concatenate(pictures)[places]

    def _read_on(self, frames: np.ndarray, at_once: int) -> Iterator[np.ndarray]:
        """From the first frame to the last, so that their count is certain."""
        av = import_pyav()
        wanted, times, error = iter(frames.tolist()), [], None
        following, pictures, shape = next(wanted), [], None
        with open_container(self._source) as (container, stream):
            painter = Painter(stream, self.path, self.background)
            try:
                for index, frame in enumerate(decoded_frames(container, stream, self.path)):
                    times.append(frame.time or 0.0)
                    if index == following:
                        pictures.append(painter.paint(frame))
                        shape = shape or pictures[0].shape
                        if pictures[-1].shape != shape:
                            raise VideoDecodeError(f"{self.path} changes its frame size at frame {index}: re-encode.")
                        following = next(wanted, None)
                        if len(pictures) == at_once:
                            yield np.stack(pictures)
                            pictures = []
            except av.error.FFmpegError as caught:
                error = f"decoding stops after frame {len(times)} with '{caught.strerror}'"
        if error:
            damaged(self.path, error, len(times), self.on_damage)
        if not times:
            raise EmptyVideoError(f"{self.path}: none of {len(self.times)} packets decodes to a frame.")
        if len(times) != len(self.times):
            found = np.array(times) - times[0] if self._timed else np.arange(len(times)) / (self.fps or 1)
            self._set_times(found)
        elif pictures:
            yield np.stack(pictures)

    def _set_times(self, times: np.ndarray) -> None:
        self.times = times
        self.duration = None if self.fps is None else float(times[-1] + 1 / self.fps)
