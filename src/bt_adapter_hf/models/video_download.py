"""Download one file. Apart from the decoders, so that a process that only fetches does not import them; and not in the
code that travels with a repository, which whoever trusts it has to read."""

import socket
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any, BinaryIO

from .video_errors import MAX_BYTES, MAX_SECONDS, EmptyVideoError, VideoDownloadError, VideoError, VideoTimeoutError


_CHUNK_BYTES = 1 << 16


class _Connections(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens connections and cuts them when the time is up, whatever the server does.

    It may send a byte a second, headers too, and so never let a socket's own timeout pass.
    """

    handler_order = 400  # before what urllib has for other protocols, which no redirect leads to

    def __init__(self, seconds: float):
        urllib.request.HTTPSHandler.__init__(self)
        self.late, self._handles = False, list[socket.socket]()
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def http_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(self._connection, HTTPConnection), request)

    def https_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(self._connection, HTTPSConnection), request)

    def _refuse(self, request: urllib.request.Request) -> None:
        raise urllib.error.URLError(f"it leads to {request.full_url}, and only http(s) is followed")

    ftp_open = file_open = data_open = _refuse

    def _connection(self, kind: type[HTTPConnection], *args: Any, **kwargs: Any) -> HTTPConnection:
        connection = kind(*args, **kwargs)
        connection._create_connection = self._connect
        return connection

    def _connect(self, *args: Any, **kwargs: Any) -> socket.socket:
        connected = socket.create_connection(*args, **kwargs)
        self._handles.append(connected.dup())  # TLS takes the first one over
        if self.late:
            self._cut()
        return connected

    def _cut(self) -> None:
        self.late = True
        for handle in self._handles:
            with suppress(OSError):  # the server has closed it
                handle.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "_Connections":
        self._timer.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._timer.cancel()
        for handle in self._handles:
            handle.close()


def download(url: str, file: BinaryIO, max_bytes: int = MAX_BYTES, timeout: float = MAX_SECONDS) -> None:
    """Write what an http(s) URL answers to `file`: at most `max_bytes`, in at most `timeout` seconds in all.

    Raises:
        VideoDownloadError: it cannot be had, not completely, or is larger. `__cause__` is the client's error, if any.
        VideoTimeoutError: it was not complete in time.
        EmptyVideoError: the answer is empty.
    """
    received, expected = 0, None
    with _Connections(timeout) as connections:
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "bt_adapter_hf"})
            with urllib.request.build_opener(connections).open(request, timeout=timeout) as answer:
                declared = answer.headers.get("Content-Length")
                expected = int(declared) if declared is not None and declared.isdigit() else None
                if expected is not None and expected > max_bytes:
                    raise VideoDownloadError(_too_large(url, f"{expected} bytes", max_bytes))
                while chunk := answer.read1(_CHUNK_BYTES):
                    received += len(chunk)
                    if received > max_bytes:
                        raise VideoDownloadError(_too_large(url, f"more than {max_bytes} bytes", max_bytes))
                    file.write(chunk)
        except VideoError:
            raise
        except Exception as error:  # the client raises OSError, ValueError, HTTPException and others
            if connections.late or isinstance(getattr(error, "reason", error), TimeoutError):
                raise VideoTimeoutError(_too_late(url, timeout)) from error
            reason = str(getattr(error, "reason", None) or error or type(error).__name__)
            if isinstance(error, urllib.error.HTTPError):
                error.close()
                reason = f"HTTP {error.code} {reason}"
            raise VideoDownloadError(f"{url} could not be downloaded: {' '.join(reason.split())}.") from error
    if connections.late and received != expected:
        raise VideoTimeoutError(_too_late(url, timeout))
    if expected is not None and received < expected:
        raise VideoDownloadError(f"{url} broke off after {received} of {expected} bytes: download it again.")
    if received == 0:
        raise EmptyVideoError(f"{url} is empty (0 bytes).")


def _too_large(url: str, found: str, max_bytes: int) -> str:
    return f"{url} has {found}, the limit is {max_bytes}: raise `max_download_bytes` if that is intended."


def _too_late(url: str, seconds: float) -> str:
    return f"{url} took longer than {seconds:g} s to download and was cut off: raise `timeout` if it is that large."
