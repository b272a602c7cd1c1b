"""Images of conversations, wherever they lie; whatever is wrong with one of them is a `VideoError` with its name."""

import base64
import binascii
import io
import os
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import image_utils

from .video_decoding import fetch
from .video_errors import MAX_BYTES, MAX_SECONDS, VideoAccessError, VideoNotFoundError, item_errors


def load_image(source: Any, name: str | None = None, timeout: float = MAX_SECONDS) -> Image.Image:
    """An RGB image the right way up, as transformers' `load_image` gives it.

    Args:
        source: path, http(s), `file://` or `data:` URL, base64, bytes, or a PIL image that may not be read yet.
        name: in errors, in place of the source.
        timeout: seconds that a download may take in all.

    Raises:
        VideoError: it cannot be had, or is no image.
    """
    name = _name(source) if name is None else name
    with item_errors(name):
        image = source if isinstance(source, Image.Image) else Image.open(_open(source, name, timeout))
        return image_utils.load_image(read_image(image))


def read_image(image: Image.Image) -> Image.Image:
    """The image itself, read by now: it may have been opened only.

    Raises:
        VideoError: it cannot be read.
    """
    with item_errors(_name(image)):
        image.load()
        return image


def read_source(source: Any) -> Any:
    """`file://` and `data:` URLs to paths and bytes, all else as it is.

    Raises:
        VideoError: the URL cannot be read.
    """
    if isinstance(source, str) and source.startswith("file://"):
        return urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
    if isinstance(source, str) and source.startswith("data:"):
        with item_errors(_name(source)):
            kind, comma, content = source.partition(",")
            if not comma:
                raise ValueError("it has no comma before its content")
            content = urllib.parse.unquote_to_bytes(content)
            try:
                return base64.b64decode(content) if kind.endswith(";base64") else content
            except binascii.Error as error:
                raise ValueError(f"its content is no base64 ({error})") from error
    return source


def _open(source: Any, name: str, timeout: float) -> io.BytesIO | Path:
    source = read_source(source)
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        content = io.BytesIO()
        fetch(source, content, MAX_BYTES, timeout)
        return io.BytesIO(content.getvalue())
    if isinstance(source, str) and not source.strip():
        raise VideoNotFoundError("The path of an image is empty.")
    if os.path.isfile(source):
        return Path(source)
    if os.path.exists(source):  # a pipe would wait for ever
        raise VideoAccessError(f"{name} is not a file.")
    try:
        return io.BytesIO(base64.b64decode(source, validate=True))
    except (binascii.Error, ValueError, TypeError):  # then it was meant as a path
        raise VideoNotFoundError(f"{name} does not exist.") from None


def _name(source: Any) -> str:
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or "an image without a name"
    if isinstance(source, bytes):
        return f"an image of {len(source)} bytes"
    name = os.fsdecode(source)
    return name if len(name) <= 200 else f"{name[:40]}..."
