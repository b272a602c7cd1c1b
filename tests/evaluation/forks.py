"""Runs a function in processes that know of each other, as under torchrun, by forking: nothing is imported anew."""

import os
import signal
import socket
import traceback
from collections.abc import Callable


def in_processes(function: Callable[[], None], processes: int = 2) -> list[int]:
    """Exit codes of the processes: 0, 1 after an exception, or minus the signal that ended it."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            try:
                if processes > 1:
                    _join(rank, processes, port)
                function()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _join(rank: int, processes: int, port: int) -> None:
    from accelerate import PartialState

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    PartialState._reset_state()


def killed_after(calls: int) -> Callable[[int], None]:
    """A `progress` that ends its process at so many calls."""
    seen = []

    def progress(_: int) -> None:
        seen.append(_)
        if len(seen) == calls:
            os.kill(os.getpid(), signal.SIGKILL)

    return progress
