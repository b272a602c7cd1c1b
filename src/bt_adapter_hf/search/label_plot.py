"""A picture of labels: for each clip bars for its best labels, and for the same clip played backwards."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..adapters.writing import printable, written_whole
from .encoding import VideoEncoder


_MARGIN, _NAMES, _BAR, _ROW, _WIDTH = 48, 420, 560, 46, 1120
_PAPER, _INK, _GREY, _LINE, _FORWARD, _BACKWARD, _TRACK = (
    "#fbfaf7", "#1d1d1f", "#6b6973", "#e3e0d8", "#2f5fd0", "#b8651b", "#e6e6ea",
)  # fmt: skip


class LabelledClip(NamedTuple):
    """A clip's labels, the best first, with their probability, and with that of the clip played backwards."""

    path: str
    labels: list[str]
    probabilities: list[float]
    reversed_probabilities: list[float]


@torch.inference_mode()
def both_ways(encoder: VideoEncoder, path: str | os.PathLike) -> np.ndarray:
    """Unit features of a clip and of the same frames in the opposite order: float32 (2, P).

    Raises:
        VideoError: it cannot be read.
    """
    frames = encoder.processor(videos=[os.fspath(path)], return_tensors="pt")["pixel_values_videos"]  # (1, T, 3, H, W)
    videos = torch.cat([frames, frames.flip(1)]).to(encoder.model.device, encoder.model.dtype)
    features = encoder.model.get_video_features(videos).pooler_output
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()


def label_both_ways(
    encoder: VideoEncoder, path: str | os.PathLike, labels: Sequence[str], texts: np.ndarray, top: int | None = None
) -> LabelledClip:
    """Scores of a clip and of its reverse.

    Args:
        texts: (labels, P) unit features of the labels, with their template.
        top: how many labels; by default all.
    """
    forward, backward = both_ways(encoder, path)
    best = encoder.label_scores(forward, texts)[:top]
    other = {i: probability for i, probability, _ in encoder.label_scores(backward, texts)}
    order = [i for i, _, _ in best]
    return LabelledClip(
        os.fspath(path), [labels[i] for i in order], [p for _, p, _ in best], [other[i] for i in order]
    )


def write_label_plot(path: str | os.PathLike, clips: Sequence[LabelledClip]) -> None:
    """Writes a PNG, replaced at once when it is complete."""
    with written_whole(path) as file:
        draw_label_plot(clips).save(file, format="PNG")


def draw_label_plot(clips: Sequence[LabelledClip]) -> Image.Image:
    """The picture that `write_label_plot` writes."""
    height = 110 + sum(64 + _ROW * len(clip.labels) for clip in clips)
    picture = Image.new("RGB", (_WIDTH, height), _PAPER)
    draw = ImageDraw.Draw(picture)
    x = _MARGIN
    for colour, text in ((_FORWARD, "as it is"), (_BACKWARD, "played backwards")):
        draw.rounded_rectangle((x, 42, x + 18, 60), 4, colour)
        draw.text((x + 28, 38), text, _INK, _font(20))
        x += 28 + int(_font(20).getlength(text)) + 40
    y = 84
    for clip in clips:
        draw.line((_MARGIN, y, _WIDTH - _MARGIN, y), _LINE)
        draw.text((_MARGIN, y + 16), _fitting(Path(clip.path).name, 20, _NAMES + _BAR), _INK, _font(20))
        y += 52
        for label, forward, backward in zip(clip.labels, clip.probabilities, clip.reversed_probabilities, strict=True):
            draw.text((_MARGIN, y + 6), _fitting(label, 18, _NAMES - 20), _GREY, _font(18))
            _bar(draw, y, forward, _FORWARD)
            _bar(draw, y + 19, backward, _BACKWARD)
            y += _ROW
        y += 12
    return picture


def _bar(draw: ImageDraw.ImageDraw, y: int, share: float, colour: str) -> None:
    x = _MARGIN + _NAMES
    draw.rounded_rectangle((x, y, x + _BAR - 70, y + 15), 4, _TRACK)
    if (filled := round((_BAR - 70) * share)) >= 4:
        draw.rounded_rectangle((x, y, x + filled, y + 15), 4, colour)
    draw.text((x + _BAR - 60, y - 2), f"{share:.0%}", colour, _font(16))


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _fitting(text: str, size: int, width: int) -> str:
    """`text`, its end left out where it is wider than `width`."""
    text = printable(text)
    if _font(size).getlength(text) <= width:
        return text
    while text and _font(size).getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
