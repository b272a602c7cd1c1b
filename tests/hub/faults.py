"""What can go wrong between a client and a Hub, to be switched on for chosen requests."""

import re
from dataclasses import dataclass


# How a request is answered: instead of what was asked for, ...
ANSWERS = {
    "unavailable": {"status": 503},
    "too_many": {"status": 429, "retry_after": 0},
    "forbidden": {"status": 403},
    "disk_full": {"status": 507, "method": "PUT", "port": "storage"},
    "wrong_token": {"status": 401},
    "missing_revision": {"status": 404},
    "refused": {},  # the connection is closed: nothing was done, nothing is answered
    "hangs": {"seconds": 60.0},  # nothing is answered, for a time
    "lost": {},  # the connection is closed after the action: it was done, the answer is lost
}
# ... or what happens to the content of a file on its way.
BODIES = {
    "cut": {},  # the connection ends in the middle, in order
    "reset": {},  # the connection breaks in the middle
    "stall": {"seconds": 60.0},  # nothing comes any more after the middle, for a time
    "slow": {"seconds": 1.0},  # what is asked for takes that long
    "short": {},  # the storage has lost the end of the file, and says so: all lengths agree
    "flip": {},  # one byte is another
}


@dataclass
class Fault:
    """A fault, and the requests it happens to.

    Attributes:
        kind: a key of `ANSWERS` or `BODIES`.
        path: regular expression, searched in the path of a request.
        times: to how many requests it happens; -1 for all.
        method: of the request; any by default.
        port: "hub", "storage" or "cas"; any by default.
        at: where in a file: a byte, or a share of it.
        status, retry_after, seconds: see `ANSWERS` and `BODIES`.
        hits: to how many requests it has happened.
    """

    kind: str
    path: str = ""
    times: int = 1
    method: str | None = None
    port: str | None = None
    at: int | float = 0.5
    status: int | None = None
    retry_after: float | None = None
    seconds: float = 0.0
    hits: int = 0

    def happens_to(self, method: str, path: str, port: str) -> bool:
        return (
            self.hits != self.times
            and self.method in (None, method)
            and self.port in (None, port)
            and re.search(self.path, path) is not None
        )

    def place(self, size: int) -> int:
        return min(size, int(self.at * size) if isinstance(self.at, float) else self.at)

    def alter(self, data: bytes) -> bytes:
        """The file as the storage holds it under this fault."""
        place = self.place(len(data))
        if self.kind == "short":
            return data[:place]
        if self.kind == "flip":
            return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]
        return data
