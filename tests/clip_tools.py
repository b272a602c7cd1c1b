"""Tiny videos for tests, made on the spot: every frame carries its number in its pixels."""

from fractions import Fraction

import av
import numpy as np
from PIL import Image


SIDE = 64  # pixels; a 4 x 4 grid of black and white squares spells the number of the frame in binary


def numbered_picture(number: int) -> np.ndarray:
    """uint8 `(64, 64, 3)`."""
    bits = np.array([(number >> bit) & 1 for bit in range(16)], dtype=np.uint8).reshape(4, 4)
    return np.repeat(np.kron(bits, np.full((16, 16), 255, np.uint8))[:, :, None], 3, axis=2)


def read_numbers(frames: np.ndarray) -> list[int]:
    """The numbers of frames `(T, 64, 64, 3)`; the middle of each square survives lossy coding."""
    grids = frames[:, 8::16, 8::16].mean(axis=-1) > 127
    return [int(sum(1 << bit for bit in np.flatnonzero(grid.reshape(-1)))) for grid in grids]


def write_clip(
    path, count=30, codec="libx264", fps=10, stamps=None, pictures=None, options=None, matrix=None, **kwargs
):
    """Encode numbered pictures. `stamps`: milliseconds of each frame; `kwargs` go to the container."""
    pictures = [numbered_picture(number) for number in range(count)] if pictures is None else pictures
    with av.open(str(path), "w", **kwargs) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "argb" if codec == "qtrle" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000) if stamps else Fraction(1, fps)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba" if picture.shape[2] == 4 else "rgb24")
            frame.pts = stamps[number] if stamps else number
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_gif(path, count=12, duration=100):
    """Numbered pictures as GIF; `duration` in milliseconds, one value or one per frame."""
    pictures = [Image.fromarray(numbered_picture(number)) for number in range(count)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    return path
