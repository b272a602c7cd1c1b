"""Files that the page plays: which may be fetched, how they are shown, and what is refused."""

import html
import os
import re
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from ..models.video_errors import VideoError


IMAGES = frozenset(".bmp .gif .jpeg .jpg .png .tif .tiff .webp".split())  # what a browser shows as an image
STILLS = IMAGES - {".gif"}
_KEPT = 4096  # files that can be fetched at a time; the oldest are forgotten


@dataclass(frozen=True)
class Limits:
    """What a visitor may send."""

    megabytes: int = 64
    seconds: float = 600.0
    files: int = 4  # of one message


class Clips:
    """Files of this machine under names that say nothing about where they lie. Only these can be fetched."""

    def __init__(self):
        self._paths: OrderedDict[str, str] = OrderedDict()

    def add(self, path: str) -> str:
        """The name under which a file can be fetched."""
        name = secrets.token_urlsafe(12)
        self._paths[name] = path
        if len(self._paths) > _KEPT:
            self._paths.popitem(last=False)
        return name

    def response(self, name: str):
        """The file, or the part of it that a player asks for."""
        from starlette.responses import FileResponse, PlainTextResponse

        path = self._paths.get(name)
        if path is None or not os.path.isfile(path):
            return PlainTextResponse("This clip is not here any more.", status_code=404)
        return FileResponse(path)

    def player(self, path: str, start: float | None = None, end: float | None = None, element: str = "") -> str:
        """HTML that shows a video or an image, from a moment on."""
        label = html.escape(Path(path).name, quote=True)
        source = f"clip/{self.add(path)}"
        if Path(path).suffix.lower() in IMAGES:
            return f'<img class="player" src="{source}" alt="{label}">'
        moment = "" if start is None else f"#t={start:.2f}" + ("" if end is None else f",{end:.2f}")
        handler = f' ontimeupdate="{element}"' if element else ""
        return (
            f'<video class="player" src="{source}{moment}" controls autoplay muted playsinline aria-label="{label}"'
            f"{handler}>This browser does not play {label}.</video>"
        )


def check_upload(path: str, limits: Limits) -> None:
    """Refuse a file that is longer than a visitor may send, before it is decoded.

    Raises:
        VideoError: it is.
    """
    import av

    if Path(path).suffix.lower() in IMAGES:
        return
    try:
        with av.open(path, metadata_errors="replace") as container:
            seconds = None if container.duration is None else container.duration / av.time_base
    except (av.FFmpegError, OSError):
        return  # decoding says what is wrong with it
    if seconds is not None and seconds > limits.seconds:
        raise VideoError(
            f"{Path(path).name} is {seconds:.0f} s long, and {limits.seconds:.0f} s are taken here: cut it first."
        )


def say(error: Exception) -> str:
    """What an error says, with the names of files and no folders of this machine."""
    text = " ".join(str(error).split())
    return re.sub(r"(?<![\w:/.])/(?:[^\s/'\":,()]+/)+([^\s/'\":,()]*)", r"\1", text)
