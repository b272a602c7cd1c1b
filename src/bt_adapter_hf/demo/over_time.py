"""How well a text fits a video over time: windows of frames, and a plot with a cursor that follows the player."""

import html
from typing import NamedTuple

import numpy as np
import torch

from ..search.encoding import VideoEncoder
from ..search.frame_states import FrameStates


WINDOW = 2.0  # seconds that are looked at together
MOST_FRAMES = 192  # of a video; in a longer one the windows are longer too
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 240, 48, 30, 14


class Curve(NamedTuple):
    """Windows of frames: first and last second of each, and the cosine with the text."""

    starts: list[float]
    ends: list[float]
    cosines: list[float]

    @property
    def middles(self) -> list[float]:
        return [(start + end) / 2 for start, end in zip(self.starts, self.ends, strict=True)]


@torch.inference_mode()
def similarity_over_time(encoder: VideoEncoder, path: str, text: str) -> Curve:
    """Cosines of a text with windows of as many frames as the model takes, one after the other.

    Raises:
        VideoError: the video cannot be read.
        ValueError: the text is empty or too long.
    """
    (query,) = encoder.encode_texts([text])
    processor, T = encoder.processor, encoder.processor.video_processor.num_frames
    facts = processor(videos=[path], return_metadata=True, return_tensors="pt")["video_metadata"][0]
    count = max(T, min(MOST_FRAMES, round((facts.duration or WINDOW) / WINDOW * T)))
    inputs = processor(videos=[path], num_frames=count, sampling="centers", return_metadata=True, return_tensors="pt")
    seconds = [float(second) for second in inputs["video_metadata"][0].timestamps]
    windows = torch.arange(count - T + 1)[:, None] + torch.arange(T)
    states = FrameStates(encoder.model)
    states.add(inputs["pixel_values_videos"][0])
    features = torch.nn.functional.normalize(states.features(windows).float(), dim=-1).cpu().numpy()
    return Curve(
        [seconds[window[0]] for window in windows.tolist()],
        [seconds[window[-1]] for window in windows.tolist()],
        [float(cosine) for cosine in features @ query],
    )


def plot(curve: Curve, text: str) -> str:
    """The curve as SVG. A click goes to that moment; `data-left` and `data-scale` place the cursor by seconds."""
    times, values = np.array(curve.middles), np.array(curve.cosines)
    first, last = min(curve.starts), max(curve.ends)
    low, high = values.min(), max(values.max(), values.min() + 1e-3)
    scale = (WIDTH - LEFT - 10) / max(last - first, 1e-6)
    x = LEFT + (times - first) * scale
    y = TOP + (high - values) / (high - low) * (HEIGHT - TOP - BOTTOM)
    best = int(values.argmax())
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    label = html.escape(
        f"{text}: fits best from {curve.starts[best]:.1f} to {curve.ends[best]:.1f} s (cosine {values[best]:.2f})",
        quote=True,
    )
    ticks = "".join(
        f'<text x="{LEFT + (second - first) * scale:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{second:.1f} s</text>'
        for second in np.linspace(first, last, 5)
    )
    return (
        f'<svg class="over-time" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" '
        f'data-first="{first:.3f}" data-scale="{scale:.4f}" onclick="{_SEEK}">'
        f"<title>{label}</title>"
        f'<text x="4" y="{TOP + 10}">{high:.2f}</text><text x="4" y="{HEIGHT - BOTTOM}">{low:.2f}</text>{ticks}'
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - 10}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
        f'<polyline points="{points}"/><circle cx="{x[best]:.1f}" cy="{y[best]:.1f}" r="5"/>'
        f'<line class="cursor" x1="{LEFT}" x2="{LEFT}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg><p>{label}</p>'
    )


_SEEK = (
    "const box=this.getBoundingClientRect();"
    f"const x=(event.clientX-box.left)*{WIDTH}/box.width;"
    f"const video=this.parentElement.querySelector('video');"
    f"if(video)video.currentTime=Math.max(0,(x-{LEFT})/this.dataset.scale+ +this.dataset.first)"
)
# Of the player beside the plot: moves the cursor.
FOLLOW = (
    "const plot=this.parentElement.querySelector('svg.over-time');if(plot){"
    f"const x={LEFT}+(this.currentTime-plot.dataset.first)*plot.dataset.scale;"
    "const line=plot.querySelector('.cursor');line.setAttribute('x1',x);line.setAttribute('x2',x)}"
)
