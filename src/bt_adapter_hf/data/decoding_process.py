"""Runs a function in a forked child, so that a decoder that hangs or crashes can be cut off.

A decoder that hangs in C may hold the interpreter's lock, and then no thread, signal or timer of its own process can
stop it. Data loader workers may not start processes through `multiprocessing`, hence the plain fork.
"""

import ctypes
import gc
import mmap
import os
import pickle
import signal
import struct
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np
import torch

from ..models.video_errors import VideoDecodeError, VideoTimeoutError


# Arrays up to this size in sum go through shared memory; only what is used of it takes any.
SHARED_BYTES = 1 << 26
PR_SET_PDEATHSIG = 1  # of Linux's prctl: a signal for the child when its parent ends


class DecodingProcess:
    """Calls `function` in a child process, which is started on the first call and again after it was cut off.

    The child is a copy of the process at its first call, so it sees what `function` refers to as it was then. It ends
    with its parent. An instance that was inherited through a fork, or unpickled, starts a child of its own.

    Args:
        function: called with picklable arguments; its result is pickled; numpy arrays without a copy.
        timeout: seconds that a call may take.

    Raises:
        ValueError: a timeout that is not positive, or a system without fork.
    """

    def __init__(self, function: Callable[..., Any], timeout: float):
        if not timeout > 0:
            raise ValueError(f"item_timeout={timeout} must be a number of seconds above 0, or None for no limit.")
        if not hasattr(os, "fork"):
            raise ValueError(
                f"item_timeout={timeout}: reading a video can be cut off only where processes can fork, which they "
                f"cannot on {sys.platform}. Use item_timeout=None."
            )
        self.function, self.timeout = function, timeout
        self._child: _Child | None = None

    def __call__(self, *args: Any) -> Any:
        """The result of `function(*args)`.

        Raises:
            VideoTimeoutError: it took too long and was cut off.
            VideoDecodeError: it took its process down.
            Exception: what `function` raises.
        """
        if self._child is None or not self._child.usable():
            self.close()
            self._child = _Child(self.function)
        try:
            failed, answer = self._child.call(args, self.timeout)
        except TimeoutError:
            self.close()
            raise VideoTimeoutError(f"Reading it took longer than {self.timeout:g} s and was cut off.") from None
        except (EOFError, ConnectionError):
            how = self._child.end()
            self._child = None
            raise VideoDecodeError(f"Reading it ended the process that decodes ({how}).") from None
        except BaseException:  # an interrupt: the answer to come belongs to no later call
            self.close()
            raise
        if failed:
            raise answer
        return answer

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_child": None}


class _Child:
    def __init__(self, function: Callable[..., Any]):
        self.owner = os.getpid()
        self.pipe, theirs = Pipe()
        self.shared = mmap.mmap(-1, SHARED_BYTES)
        with warnings.catch_warnings():
            # Python 3.12 warns of forks beside threads. The child computes in one thread and touches no accelerator,
            # like a data loader worker.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            try:
                self.pipe.close()
                _serve(function, theirs, self.shared, self.owner)
            finally:
                os._exit(1)  # without the clean-up of the parent, which this is a copy of
        theirs.close()
        # Not __del__: of objects that refer to each other the pipe may be closed first, and its number be another's.
        self.end = weakref.finalize(self, _kill, self.pid, self.owner)

    def usable(self) -> bool:
        """Whether it is this process's own child, and alive."""
        return self.owner == os.getpid() and os.waitpid(self.pid, os.WNOHANG) == (0, 0)

    def call(self, args: tuple, timeout: float) -> tuple[bool, Any]:
        _send(self.pipe, args, self.shared)
        if not self.pipe.poll(timeout):
            raise TimeoutError
        return _receive(self.pipe, self.shared)


def _kill(pid: int, owner: int) -> str:
    """End a child of this process, and say how it ended."""
    if owner != os.getpid():
        return "it belongs to another process"
    try:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    except (ChildProcessError, ProcessLookupError):  # already waited for
        return "gone"
    code = os.waitstatus_to_exitcode(status)
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _serve(function: Callable[..., Any], pipe: Connection, shared: mmap.mmap, parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before that
            return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what was copied stays shared with the parent
    torch.set_num_threads(1)
    while True:
        try:
            args = _receive(pipe, shared)
        except EOFError:
            return
        try:
            answer = False, function(*args)
        except Exception as error:
            error.add_note("".join(traceback.format_exception(error)))
            answer = True, error
        try:
            _send(pipe, answer, shared)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            _send(pipe, (True, RuntimeError(f"{answer[1]!r} cannot be handed over: {error}")), shared)


def _send(pipe: Connection, value: Any, shared: mmap.mmap) -> None:
    """Pickle; the content of arrays goes to the shared memory as far as it fits, and through the pipe after that."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    contents = [buffer.raw() for buffer in buffers]
    places = list(_places([content.nbytes for content in contents]))
    for content, (start, stop) in zip(contents, places, strict=True):
        if stop <= len(shared):
            shared[start:stop] = content
    pipe.send_bytes(struct.pack(f"<{len(contents)}q", *(content.nbytes for content in contents)))
    pipe.send_bytes(head)
    for content, (_, stop) in zip(contents, places, strict=True):
        if stop > len(shared):
            pipe.send_bytes(content)


def _receive(pipe: Connection, shared: mmap.mmap) -> Any:
    sizes = [size for (size,) in struct.iter_unpack("<q", pipe.recv_bytes())]
    head = pipe.recv_bytes()
    buffers = []
    for start, stop in _places(sizes):
        if stop <= len(shared):
            buffers.append(np.frombuffer(shared, np.uint8, stop - start, start).copy())
        else:
            buffers.append(np.empty(stop - start, np.uint8))
            pipe.recv_bytes_into(buffers[-1])
    return pickle.loads(head, buffers=buffers)


def _places(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Start and stop of pieces of these sizes, one after the other."""
    return pairwise(accumulate(sizes, initial=0))
