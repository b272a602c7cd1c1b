"""A picture of search hits: for each its score and the very frames that the model saw."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..adapters.writing import printable, written_whole
from ..models.video_errors import VideoError
from .film import Film
from .index import Hit, VideoIndex
from .moments import span_text


_KINDS = {".png": "PNG picture", ".html": "page"}
MAX_FRAMES = 8  # of a video that was sampled more densely, as many spread evenly are shown

_MARGIN = 56
_GAP = 6
_TEXT_WIDTH = 340  # the column of rank, score and name
_STRIP_WIDTH = 1080
_MAX_FRAME_HEIGHT = 180
_PAPER, _INK, _GREY, _LINE, _ACCENT, _TRACK, _ALARM = (
    "#fbfaf7", "#1d1d1f", "#77757f", "#e3e0d8", "#2f5fd0", "#e6e6ea", "#b3261e",
)  # fmt: skip


class _Strip(NamedTuple):
    frames: list[Image.Image]  # all of one size
    seconds: list[float]
    error: str | None


def check_sheet_path(path: str | os.PathLike, what: str = "contact sheet", kinds: tuple[str, ...] = (".png",)) -> None:
    """Raise `ValueError` or `OSError`, before any work, when no such file can be written to `path`."""
    path = Path(path)
    if path.suffix.lower() not in kinds:
        raise ValueError(
            f"the {what} '{path}' is a {' or '.join(_KINDS[kind] for kind in kinds)}: give it a name that ends in "
            f"{' or '.join(kinds)}."
        )
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder; name a file for the {what}.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder '{path.absolute().parent}' for the {what} does not exist.")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise OSError(
            f"the {what} cannot be written to '{path.absolute().parent}': {error.strerror or error}."
        ) from error


def write_contact_sheet(
    path: str | os.PathLike, query: str, hits: Sequence[Hit], index: VideoIndex, floor: float
) -> None:
    """Write a PNG with one row per hit: rank, score, file, duration, and the frames the model saw with their times.

    Args:
        path: the PNG; replaced at once when it is complete.
        query: the text that was searched.
        floor: cosine at which the score bar is empty (`VideoIndex.median_score`); the best hit fills it.
    """
    sheet = draw_contact_sheet(query, hits, index, floor)
    with written_whole(path) as file:
        sheet.save(file, format="PNG")


def draw_contact_sheet(query: str, hits: Sequence[Hit], index: VideoIndex, floor: float) -> Image.Image:
    """The picture that `write_contact_sheet` writes."""
    strips = [load_strip(hit, index.info["settings"]) for hit in hits]
    row_heights = [max(124, strip.frames[0].height + 26 if strip.frames else 0) + 36 for strip in strips]
    title = _wrap(printable(query), _font(40), _TEXT_WIDTH + _STRIP_WIDTH)
    header = 104 + 50 * len(title)
    width = _MARGIN + _TEXT_WIDTH + _STRIP_WIDTH + _MARGIN
    sheet = Image.new("RGB", (width, header + sum(row_heights) + 64), _PAPER)
    draw = ImageDraw.Draw(sheet)

    y = 44
    for line in title:
        draw.text((_MARGIN, y), line, _INK, _font(40))
        y += 50
    model = index.info["model"] or "moving-digits"
    model = Path(model).name if os.path.isabs(model) else model  # of a Hub id the owner counts, of a folder the name
    model = printable(model)
    draw.text(
        (_MARGIN, y + 4),
        f"{len(hits)} of {len(index)} {'videos' if index.info['moments'] is None else 'moments'}  ·  {model}",
        _GREY,
        _font(18),
    )

    best = hits[0].score if hits else floor
    y = header
    for hit, strip, height in zip(hits, strips, row_heights, strict=True):
        draw.line((_MARGIN, y, width - _MARGIN, y), _LINE)
        _draw_facts(draw, y + 18, hit, fill=(hit.score - floor) / (best - floor) if best > floor else 1.0)
        _draw_strip(sheet, draw, _MARGIN + _TEXT_WIDTH, y + 18, strip)
        y += height
    draw.line((_MARGIN, y, width - _MARGIN, y), _LINE)
    note = (
        "Bar: cosine from the median video of the index (empty) to the best hit (full). Frames: those the model saw."
    )
    draw.text((_MARGIN, y + 18), note, _GREY, _font(15))
    return sheet


def load_strip(hit: Hit, settings: dict) -> _Strip:
    """The frames of a hit that the model saw, at most `MAX_FRAMES` of them, as small pictures of one size."""
    seconds = hit.row["timestamps"]
    try:
        with closing(Film(hit.row["path"], settings["on_damage"], tuple(settings["background"]))) as film:
            frames = film.at(seconds)
    except VideoError as error:  # moved or damaged since it was indexed: the sheet says so in its place
        return _Strip([], [], printable(" ".join(str(error).split())))
    chosen = np.linspace(0, len(frames) - 1, min(MAX_FRAMES, len(frames))).round().astype(int)
    height, width = frames.shape[1:3]
    cell = (_STRIP_WIDTH - _GAP * (len(chosen) - 1)) / len(chosen)
    scale = min(cell / width, _MAX_FRAME_HEIGHT / height)
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    pictures = [Image.fromarray(frames[i]).resize(size, Image.Resampling.LANCZOS) for i in chosen]
    return _Strip(pictures, [seconds[i] for i in chosen], None)


def _draw_facts(draw: ImageDraw.ImageDraw, y: int, hit: Hit, fill: float) -> None:
    draw.text((_MARGIN, y - 6), str(hit.rank), _INK, _font(44))
    x, width = _MARGIN + 64, _TEXT_WIDTH - 64 - 36
    path = Path(hit.row["path"])
    draw.text((x, y), _shorten(printable(path.name), _font(20), width), _INK, _font(20))
    start, end, duration = hit.row["start"], hit.row["end"], hit.row["duration"]
    if start > 0 or end != duration:  # a moment
        facts = [span_text(start, end)]
    else:
        facts = [f"{duration:.1f} s"] if duration is not None else []
    facts += [
        f"{hit.row['width']} x {hit.row['height']}",
        _shorten(printable(path.parent.name) + "/", _font(16), width // 2),
    ]
    draw.text((x, y + 29), "  ·  ".join(facts), _GREY, _font(16))
    draw.rounded_rectangle((x, y + 66, x + width, y + 74), 4, _TRACK)
    filled = round(width * min(1.0, max(0.0, fill)))
    if filled >= 8:
        draw.rounded_rectangle((x, y + 66, x + filled, y + 74), 4, _ACCENT)
    draw.text((x, y + 82), f"cosine {hit.score:.3f}", _ACCENT, _font(16))


def _draw_strip(sheet: Image.Image, draw: ImageDraw.ImageDraw, x: int, y: int, strip: _Strip) -> None:
    if strip.error is not None:
        for i, line in enumerate(_wrap(strip.error, _font(18), _STRIP_WIDTH)[:4]):
            draw.text((x, y + 26 * i), line, _ALARM, _font(18))
        return
    for picture, second in zip(strip.frames, strip.seconds, strict=True):
        sheet.paste(picture, (x, y))
        draw.text(
            (x + picture.width / 2, y + picture.height + 6),
            _clock(second, strip.seconds[-1]),
            _GREY,
            _font(15),
            anchor="ma",
        )
        x += picture.width + _GAP


def _clock(seconds: float, last: float) -> str:
    """A time in a video, as fine as frames that end at `last` need."""
    if last < 60:
        return f"{seconds:.{2 if last < 2 else 1}f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # the TrueType face that comes with Pillow


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text` with its middle left out, so that its end stays readable: "holiday...0012.mp4"."""
    if font.getlength(text) <= width:
        return text
    keep = len(text) - 1
    while keep > 2 and font.getlength(f"{text[: keep // 2]}...{text[-(keep - keep // 2) :]}") > width:
        keep -= 1
    return f"{text[: keep // 2]}...{text[-(keep - keep // 2) :]}"


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = _shorten(longer, font, width)
        else:
            lines.append(_shorten(word, font, width))
    return lines
