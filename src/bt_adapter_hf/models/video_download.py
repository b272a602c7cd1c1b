"""Download one video. Apart from the decoders, so that a process that only fetches does not import them."""

import urllib.error
import urllib.request
from http.client import HTTPException
from typing import BinaryIO

from .video_errors import EmptyVideoError, VideoDownloadError, VideoError


_CHUNK_BYTES = 1 << 20


def download(url: str, file: BinaryIO, max_bytes: int = 1 << 30, timeout: float = 30.0) -> None:
    """Write what an http(s) URL answers to `file`: at most `max_bytes`, with at most `timeout` seconds of silence.

    Raises:
        VideoDownloadError: it cannot be had, not completely, or is larger. `__cause__` is the client's error, if any.
        EmptyVideoError: the answer is empty.
    """
    received = 0
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "bt_adapter_hf"})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            declared = answer.headers.get("Content-Length")
            expected = int(declared) if declared is not None and declared.isdigit() else None
            if expected is not None and expected > max_bytes:
                raise VideoDownloadError(_too_large(url, f"{expected} bytes", max_bytes))
            while chunk := answer.read(_CHUNK_BYTES):
                received += len(chunk)
                if received > max_bytes:
                    raise VideoDownloadError(_too_large(url, f"more than {max_bytes} bytes", max_bytes))
                file.write(chunk)
    except VideoError:
        raise
    except urllib.error.HTTPError as error:
        raise VideoDownloadError(f"{url} could not be downloaded: HTTP {error.code} {error.reason}.") from error
    # URLError and timeouts are OSError; ValueError and HTTPException are malformed URLs and answers
    except (OSError, ValueError, HTTPException) as error:
        raise VideoDownloadError(f"{url} could not be downloaded: {getattr(error, 'reason', error)}.") from error
    if expected is not None and received < expected:
        raise VideoDownloadError(f"{url} broke off after {received} of {expected} bytes: download it again.")
    if received == 0:
        raise EmptyVideoError(f"{url} is empty (0 bytes).")


def _too_large(url: str, found: str, max_bytes: int) -> str:
    return f"{url} has {found}, the limit is {max_bytes}: raise `max_download_bytes` if that is intended."
