"""The packets of an mp4 file by its index: when each is shown, without reading what it holds.

FFmpeg has read where the packets lie and when they are decoded; how much later each is shown is in a table that it
keeps to itself. A part of the package that `trust_remote_code` does not bring along.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .video_decoding import Source


MAX_TABLES = 1 << 28  # bytes
HEAD = 32  # bytes of a packet, which tell what it is in all but a few
BLOCK, SPARSE = 1 << 22, 1 << 14  # where packets are larger than this on average, each head is read by itself


class Index(NamedTuple):
    """All packets of a stream in the order of the file; int64 arrays."""

    places: np.ndarray  # bytes from the start of the file
    sizes: np.ndarray
    dts: np.ndarray
    pts: np.ndarray  # up to a constant
    keys: np.ndarray  # bool


def read_index(source: Source, stream: Any) -> Index | None:
    """None where the index does not tell everything: edit lists, fragments, files that are cut, several settings."""
    rows = np.array([(e.pos, e.size, e.timestamp, e.flags) for e in stream.index_entries], np.int64).reshape(-1, 4)
    places, sizes, dts, flags = rows.T
    if not 0 < len(rows) == stream.frames or (flags & 2).any():  # some are missing or hidden
        return None
    if (sizes <= 0).any() or (places < 0).any() or (places + sizes).max() > source.size() or (np.diff(dts) <= 0).any():
        return None
    delays = _delays(source, stream.id, len(rows))
    return None if delays is None else Index(places, sizes, dts, dts + delays, (flags & 1).astype(bool))


def heads(source: Source, index: Index) -> np.ndarray:
    """uint8 (packets, HEAD): the first bytes of each, zeros behind its end."""
    order = np.argsort(index.places, kind="stable")
    places, found = index.places[order], np.zeros((len(order), HEAD), np.uint8)
    with source.opened() as file:
        file = getattr(file, "raw", file)  # what a buffer would read ahead is not needed

        def read(start: int, size: int) -> np.ndarray:
            file.seek(start)
            return np.frombuffer(file.read(size).ljust(size, b"\0"), np.uint8)

        position = 0
        while position < len(order):
            start = places[position]
            packets = slice(position, np.searchsorted(places, start + BLOCK))
            if packets.stop - position > BLOCK // SPARSE:
                block = read(start, int(places[packets.stop - 1] - start) + HEAD)
                found[order[packets]] = np.lib.stride_tricks.sliding_window_view(block, HEAD)[places[packets] - start]
            else:
                for number in order[packets].tolist():
                    found[number] = read(index.places[number], HEAD)
            position = packets.stop
    found[np.arange(HEAD) >= index.sizes[:, None]] = 0
    return found


def has_all(source: Source, stream: Any) -> bool:
    """Whether the tables have all packets that are declared; it is an edit list then that leaves some out."""
    table = _inside(_tables(source, stream.id), b"stsz")
    return table is not None and int.from_bytes(table[8:12], "big") == stream.frames


def _delays(source: Source, track: int, count: int) -> np.ndarray | None:
    """How long after its decoding each packet is shown."""
    tables = _tables(source, track)
    described = _inside(tables, b"stsd")
    if not described or described[4:8] != b"\0\0\0\1":  # settings that change on the way
        return None
    table = _inside(tables, b"ctts")
    if table is None:
        return np.zeros(count, np.int64)
    runs = 8 * int.from_bytes(table[4:8], "big")  # bytes; others may follow
    if len(table) < 8 + runs:
        return None
    runs = np.frombuffer(table[8 : 8 + runs], ">i4").reshape(-1, 2)  # signed, as FFmpeg reads either version
    if (runs[:, 0] < 0).any() or runs[:, 0].sum(dtype=np.int64) != count:
        return None
    return np.repeat(runs[:, 1].astype(np.int64), runs[:, 0])


def _tables(source: Source, track: int) -> bytes:
    """What the file says of the packets of a track; nothing where it is not found."""
    movie = next((body for kind, body in _boxes_of_file(source) if kind == b"moov"), b"")
    for kind, trak in _boxes(movie):
        header = _inside(trak, b"tkhd") if kind == b"trak" else None
        if header and int.from_bytes(header[20:24] if header[0] else header[12:16], "big") == track:
            return _inside(trak, b"mdia", b"minf", b"stbl") or b""
    return b""


def _inside(data: bytes, *path: bytes) -> bytes | None:
    for name in path:
        data = next((body for kind, body in _boxes(data) if kind == name), None)
        if data is None:
            return None
    return data


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 0
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        if size < 8:  # none of those that are looked for is so large that its size is written elsewhere
            return
        yield data[position + 4 : position + 8], data[position + 8 : position + size]
        position += size


def _boxes_of_file(source: Source) -> Iterator[tuple[bytes, bytes]]:
    """The outermost ones; only tables are read."""
    end, position = source.size(), 0
    with source.opened() as file:
        while position + 8 <= end:
            file.seek(position)
            head = file.read(16)
            size, start = int.from_bytes(head[:4], "big"), 8
            if size == 1:
                size, start = int.from_bytes(head[8:16], "big"), 16
            if size < start:  # up to the end of the file
                return
            body = b""
            if head[4:8] == b"moov" and size <= MAX_TABLES:
                file.seek(position + start)
                body = file.read(size - start)
            yield head[4:8], body
            position += size
