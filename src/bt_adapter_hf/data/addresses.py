"""Conversations about videos at addresses: lists of addresses, and what a chunk store fetches for a table."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from .media import Media
from .readers import Record, ShardReader, slices


NOTHING_TO_FETCH = "The row names no address."


@dataclass
class Addresses:
    """A list of addresses, found by the names of the files.

    Attributes:
        source: the file.
        by_name: name of a file, without its ending -> address.
    """

    source: str
    by_name: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> "Addresses":
        """From a file with an address at the beginning of each line, such as TGIF's `tgif-v1.0.tsv`.

        Raises:
            ValueError: if a line begins with something else.
        """
        found = {}
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
            address = re.split(r"[\t ]", line.strip(), maxsplit=1)[0]
            if not address:
                continue
            if not is_address(address):
                raise ValueError(f"line {number} of {path} begins with {address[:80]!r}; expected an http(s) address")
            found[PurePosixPath(urlsplit(address).path).stem] = address
        return cls(str(path), found)


def is_address(path: str) -> bool:
    return path.startswith(("http://", "https://"))


class AddressReader(ShardReader):
    """What a `ChunkStore` fetches for a table of conversations: of each row the video at an address, if it names one.

    Args:
        rows: of the table.
        fingerprint: of the table.
        address_of: row -> the address, or None.
    """

    def __init__(self, rows: int, fingerprint: str, address_of: Callable[[int], str | None]):
        self.slices, self.fingerprint, self.address_of = slices(rows), fingerprint, address_of
        self.shard_rows = [len(rows) for rows in self.slices]

    def read_shard(self, shard: int, item_timeout: float | None = None) -> Iterator[tuple[int, Record]]:
        def named() -> Iterator[tuple[int, Record]]:
            for index, row in enumerate(self.slices[shard]):
                address = self.address_of(row)
                yield index, Record(None, address or "", [], None if address else NOTHING_TO_FETCH)

        yield from Media(None).fetch(named(), item_timeout)

    def texts(self) -> Iterator[list[str]]:
        return iter(())
