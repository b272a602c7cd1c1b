"""Everything that can be wrong with one video or image, by kind, and the limits of what is read."""

from collections.abc import Iterator
from contextlib import contextmanager


MAX_BYTES = 1 << 30  # of one video, wherever it is read from into memory
MAX_SECONDS = 120.0  # that a download may take


class VideoError(ValueError):
    """Base of every error that says something about one video or image (as opposed to a wrong option)."""


class VideoInputError(VideoError):
    """The object is not a video that can be used: wrong type or shape, no frames, mixed sizes, NaN, bad range."""


class VideoNotFoundError(VideoError, FileNotFoundError):
    """There is no file under this path."""


class VideoAccessError(VideoError, OSError):
    """The path exists but cannot be read: a folder, a device, no permission, an input/output error."""


class VideoDownloadError(VideoError, OSError):
    """The URL could not be downloaded completely, or is larger than allowed."""


class VideoDecodeError(VideoError):
    """The bytes are not a video that can be decoded."""


class EmptyVideoError(VideoDecodeError):
    """The source holds no bytes or no frames."""


class NoVideoStreamError(VideoDecodeError):
    """The file is readable media without a video stream (audio only)."""


class TruncatedVideoError(VideoDecodeError):
    """The video is cut or damaged: fewer frames decode than it declares. `on_damage="salvage"` keeps those."""


class VideoTimeoutError(VideoDecodeError):
    """Downloading or reading the video took longer than allowed, and was cut off."""


class VideoBackendError(VideoError):
    """The named backend is known not to read this file correctly."""


@contextmanager
def item_errors(name: str) -> Iterator[None]:
    """Whatever a library or the operating system raises about one item becomes that item's error, with its name."""
    try:
        yield
    except (VideoError, ImportError):
        raise
    except Exception as error:
        raise VideoDecodeError(f"{name} cannot be read: {sentence(error)}") from error


def sentence(error: BaseException) -> str:
    """The first line of what an error says, with one full stop."""
    lines = str(error).strip().splitlines() or [""]
    kind = "" if isinstance(error, OSError) and lines[0] else f"{type(error).__name__}: "
    return f"{kind}{lines[0]}".rstrip(" .:") + "."
