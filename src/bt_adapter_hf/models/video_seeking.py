"""Decodes what the wanted frames need, each from the key frame before it, instead of everything from the first frame.

The pictures are those that decoding from the start gives, or the file is left to that: it is sought in only where each
packet is known to make one frame, where key frames are what they say, and where every wanted frame then comes out.
A part of the package that `trust_remote_code` does not bring along.
"""

import logging
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .video_decoding import FrameCollector, Painter, Scan, Source, frame_rate, import_pyav, packet_times, scan_packets
from .video_mp4_index import HEAD, heads, read_index


logger = logging.getLogger(__name__)

_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
_PROGRESSIVE = 1  # of FFmpeg's field orders
NOT_ONE_FRAME = "a packet does not make one frame"


def decoding_threads() -> int:
    """As many as torch has where one video is loaded by itself; one in workers, each of which has its own."""
    return torch.get_num_threads() if threading.current_thread() is threading.main_thread() else 1


class Seeker:
    """Looks at the packets of one file as they are scanned, and then decodes from key frames if that is safe.

    Args:
        container, stream: as PyAV has opened them; `visit` gets each packet of the stream.
    """

    def __init__(self, container: Any, stream: Any):
        self.container, self.stream = container, stream
        self.stamps: list[int] = []  # presentation time of each packet, in decoding order
        self.targets: list[int] = []  # what to seek to for each packet
        self.entries: list[int] = []  # packets that decoding can start at
        # as the index of mp4 is; that of matroska is in order of presentation
        self.in_order_of_decoding = container.format.name == _CONTAINERS[0]
        context = stream.codec_context
        extradata = context.extradata or b""
        self.look = {"h264": _Avc, "hevc": _Hevc, "vp8": _Vp8, "vp9": _Vp9, "av1": _Av1, "libdav1d": _Av1}.get(
            context.name
        )
        self.problem = None
        if container.format.name not in _CONTAINERS or self.look is None:
            self.problem = f"{context.name} in {container.format.name} is read from the start"
        elif stream.metadata.get("alpha_mode") == "1":
            self.problem = "alpha comes from another decoder"
        elif context.name == "h264" and context.field_order != _PROGRESSIVE:
            self.problem = "fields may be packets of their own"
        else:
            self.look = self.look(extradata)

    def scan(self, source: Source) -> Scan:
        return self.read_index(source) or scan_packets(source, self.container, self.stream, self.visit)

    def read_index(self, source: Source) -> Scan | None:
        """What the index of an mp4 file says of its packets, of which the first bytes are read; None: scan them."""
        if self.problem is not None or not self.in_order_of_decoding or not isinstance(self.look, _Nals):
            return None
        index = read_index(source, self.stream)
        if index is None:
            return None
        with source.opened() as file:
            for number in np.flatnonzero(index.keys | ~self.look.shown(heads(source, index))).tolist():
                file.seek(index.places[number])
                if not self._take(memoryview(file.read(index.sizes[number])), bool(index.keys[number]), number):
                    self.problem = NOT_ONE_FRAME
                    return None
        first = next(self.container.demux(self.stream))
        if first.pts is None or first.dts != index.dts[0]:
            self.problem = "its packets are not those of its index"
        self.stamps = (index.pts + ((first.pts or 0) - index.pts[0])).tolist()
        self.targets = index.dts.tolist()
        name, codec = self.container.format.name, self.stream.codec_context.name
        times = packet_times(self.stamps, float(self.stream.time_base))
        return Scan(name, codec, len(times), 0, frame_rate(self.stream), times, True, None)

    def _take(self, data: memoryview, key: bool, number: int) -> bool:
        """Notes whether decoding can start at a packet; whether it makes one frame."""
        try:
            shown, entry = self.look(data, key)
        except IndexError:
            shown, entry = False, False
        if entry:
            self.entries.append(number)
        return shown

    def visit(self, packet: Any) -> None:
        if self.problem is not None:
            return
        pts = packet.pts
        target = packet.dts if self.in_order_of_decoding else pts
        if pts is None or target is None or packet.is_discard or packet.is_corrupt:
            self.problem = "a packet has no time, is hidden by an edit list, or is damaged"
        elif packet.has_sidedata("new_extradata"):
            self.problem = "the codec's settings change on the way"
        else:
            if not self._take(memoryview(packet), packet.is_keyframe, len(self.stamps)):
                self.problem = NOT_ONE_FRAME
            self.stamps.append(pts)
            self.targets.append(target)

    def decode(self, collector: FrameCollector, painter: Painter, name: str) -> FrameCollector | None:
        """The wanted frames; None where decoding from the start is called for."""
        if self.problem is None:
            self.problem = self._check(collector.indices)
        if self.problem is None:
            av = import_pyav()
            context = self.stream.codec_context
            if not context.is_open:  # by an earlier part of the same film
                context.thread_type, context.thread_count = "FRAME", decoding_threads()
                # what it would make up for what is damaged depends on what came before, and on its threads
                context.options = {"err_detect": "explode"}
            try:
                self.problem = self._decode(painter, collector, name)
            except (av.error.FFmpegError, OSError) as error:
                self.problem = f"seeking ends with {error}"
            finally:
                context.skip_frame = "DEFAULT"
                context.flush_buffers()  # threads still at work could wait for Python, and Python for their end
        if self.problem is not None:
            logger.debug("%s is decoded from its start: %s.", name, self.problem)
            return None
        return collector

    def _check(self, indices: np.ndarray) -> str | None:
        if len(set(self.stamps)) < len(self.stamps):
            return "two packets have the same time"
        if not self.entries or self.entries[0] != 0 or self.stamps[0] != min(self.stamps):
            return "it does not begin with a key frame"
        if len(np.unique(indices)) == len(self.stamps):
            return "all frames are wanted"
        if not self._in_order:
            return "times jump back"
        if self.look.parameters not in (0, len(self.entries)):
            return "only some key frames bring the codec's settings along"
        return None

    @cached_property
    def _in_order(self) -> bool:
        """Whether times could be those of a decoder's output; within a group only decoding tells."""
        stamps, entries = np.array(self.stamps), np.array(self.entries)
        if not isinstance(self.look, _Nals):  # shown as they are decoded
            return bool((np.diff(stamps) > 0).all())
        latest, earliest = np.maximum.accumulate(stamps), np.minimum.accumulate(stamps[::-1])[::-1]
        # all before a key frame is shown before it, all from the one after it on is shown after it
        starts, nexts = entries[:-1], entries[1:]
        ordered = (latest[nexts - 1] < stamps[nexts]).all() and (earliest[nexts] > stamps[starts]).all()
        # a decoder keeps so many frames back, and no packet brings one that is shown earlier than that
        places, depth = np.argsort(np.argsort(stamps)), self.stream.codec_context.reorder_depth
        return bool(ordered and (np.arange(len(stamps)) - places).max() <= depth)

    def _decode(self, painter: Painter, collector: FrameCollector, name: str) -> str | None:
        """Returns what stands against it."""
        place = {stamp: index for index, stamp in enumerate(self.stamps)}
        shown = sorted(self.stamps)
        runs: dict[int, dict[int, int]] = {}  # entry -> the wanted frames that start there: packet -> frame
        for frame in np.unique(collector.indices).tolist():
            packet = place[shown[frame]]
            entry = bisect_right(self.entries, packet) - 1
            while (
                self.stamps[self.entries[entry]] > shown[frame]
            ):  # shown before its key frame, it needs the one before
                entry -= 1
            runs.setdefault(self.entries[entry], {})[packet] = frame
        for entry, wanted in runs.items():
            frames = {self.stamps[packet]: frame for packet, frame in wanted.items()}
            latest = None
            for decoded in self._run(entry, wanted, place):
                if decoded is None:
                    return "seeking leads elsewhere"
                if latest is not None and decoded.pts is not None and decoded.pts <= latest:
                    return "times jump back"
                latest = decoded.pts
                if decoded.is_corrupt:
                    return "a frame is damaged"
                if decoded.pts in frames:
                    collector.add(frames.pop(decoded.pts), painter.paint(decoded), name)
            if frames:
                return "a wanted frame does not come out"
        return None

    def _run(self, entry: int, wanted: Iterable[int], place: dict[int, int]) -> Iterator[Any]:
        """Frames from a key frame on, to the last one wanted; None where packets are not those that were scanned."""
        context, last, expected = self.stream.codec_context, max(wanted), entry
        self.container.seek(self.targets[entry], stream=self.stream)
        for packet in self.container.demux(self.stream):
            index = place.get(packet.pts)
            if index is None or index > expected:
                yield None
                return
            if index < expected:
                continue
            # what no other frame refers to need not be decoded; of HEVC this is true only within a temporal layer
            context.skip_frame = "NONREF" if context.name == "h264" and index not in wanted else "DEFAULT"
            yield from context.decode(packet)
            if index == last:
                yield from context.decode(None)
                return
            expected += 1
        yield None


class _Packets:
    """Called with each packet: whether it makes one frame, and whether decoding can start at it.

    Attributes:
        parameters: number of such starts that bring the codec's settings along.
    """

    parameters = 0

    def __init__(self, extradata: bytes):
        pass


class _Nals(_Packets):
    """H.264 and HEVC, as units with their length in front."""

    length_at: int

    def __init__(self, extradata: bytes):
        self.length_size = (extradata[self.length_at] & 3) + 1 if extradata[:1] == b"\1" else 0

    def units(self, data: memoryview) -> Iterator[int]:
        """Where they start."""
        position, width, end = 0, self.length_size, len(data)
        while width and position < end:
            start = position + width
            yield start
            position = start + int.from_bytes(data[position:start], "big")

    def shown(self, heads: np.ndarray) -> np.ndarray:
        """uint8 (packets, HEAD) -> bool (packets,): a picture was found; it may be further on in the others."""
        found, positions, width = np.zeros(len(heads), bool), np.zeros(len(heads), np.int64), self.length_size
        left = np.arange(len(heads))
        while width and len(left):
            left = left[positions[left] + width < HEAD]
            starts = positions[left]
            sizes = sum(heads[left, starts + i].astype(np.int64) << 8 * (width - 1 - i) for i in range(width))
            pictures = np.isin(self.kind(heads[left, starts + width]), list(self.pictures)) & (sizes > 0)
            found[left[pictures]] = True
            positions[left] += width + sizes
            left = left[~pictures]
        return found

    def __call__(self, data: memoryview, key: bool) -> tuple[bool, bool]:
        kinds = {self.kind(data[start]) for start in self.units(data)}
        entry = key and bool(kinds & self.starts)
        self.parameters += entry and self.settings in kinds
        return bool(kinds & self.pictures), entry


class _Avc(_Nals):
    length_at, pictures, starts, settings = 4, {1, 5}, {5}, 8

    @staticmethod
    def kind(head: int) -> int:
        return head & 31


class _Hevc(_Nals):
    length_at, pictures, starts, settings = 21, set(range(32)), set(range(16, 22)), 34

    @staticmethod
    def kind(head: int) -> int:
        return head >> 1 & 63

    def __call__(self, data: memoryview, key: bool) -> tuple[bool, bool]:
        shown, entry = super().__call__(data, key)
        return shown and not any(self.drops(data, start) for start in self.units(data)), entry

    def drops(self, data: memoryview, start: int) -> bool:
        """Whether frames of other packets are not shown: around a cut, or because a key frame says so."""
        kind = self.kind(data[start])
        return kind in (16, 17, 18, 36, 37) or (kind in self.starts and bool(data[start + 2] & 0x40))


class _Vp8(_Packets):
    def __call__(self, data: memoryview, key: bool) -> tuple[bool, bool]:
        return bool(data[0] >> 4 & 1), key and not data[0] & 1


class _Vp9(_Packets):
    def __call__(self, data: memoryview, key: bool) -> tuple[bool, bool]:
        heads = [self.head(data[start]) for start in self.starts(data)]
        one = heads[-1][0] and not any(shown for shown, _ in heads[:-1])
        return one, key and heads[0][1]

    @staticmethod
    def starts(data: memoryview) -> list[int]:
        """Where the frames of a packet begin: several lie in a superframe, which has an index at its end."""
        mark = data[-1]
        count, width = (mark & 7) + 1, (mark >> 3 & 3) + 1
        index = len(data) - 2 - count * width
        if mark & 0xE0 != 0xC0 or index < 0 or data[index] != mark:
            return [0]
        sizes = [int.from_bytes(data[at : at + width], "little") for at in range(index + 1, len(data) - 1, width)]
        return [sum(sizes[:number]) for number in range(count)]

    @staticmethod
    def head(first: int) -> tuple[bool, bool]:
        """Whether a frame is shown, and whether it is a key frame."""
        bits = first << 1 if first & 0x30 == 0x30 else first  # profile 3 has one more bit
        if bits & 8:  # one from before is shown
            return True, False
        return bool(bits & 2), not bits & 4


class _Av1(_Packets):
    def __call__(self, data: memoryview, key: bool) -> tuple[bool, bool]:
        shown, first, position = 0, None, 0
        while position < len(data):
            head = data[position]
            position += 2 if head & 4 else 1
            size = len(data) - position
            if head & 2:
                size = shift = 0
                while True:
                    size |= (data[position] & 127) << shift
                    shift += 7
                    position += 1
                    if data[position - 1] < 128:
                        break
            if head >> 3 & 15 in (3, 6):  # a frame, or the head of one
                bits = data[position]
                shown += bool(bits & 0x80 or bits & 0x10)
                first = bits if first is None else first
            position += size
        return shown == 1, key and first is not None and not first & 0xE0
