"""Augmentation of whole clips in training: torchvision's transforms, one draw for all frames."""

import re

import numpy as np
import torch
from torchvision.transforms import v2


# Words whose meaning a mirror changes.
_SIDES = re.compile(r"\b(left|right|clockwise|counter-?clockwise)\w*", re.IGNORECASE)


class ClipAugmentation:
    """A random crop, a mirror and a change of colour, the same for all frames of a clip.

    A clip is not mirrored where what is said about it names a side: "left" would be wrong.

    Args:
        scale: range of the area of the crop, a share of the frame, resized to what it was; (1, 1) for none.
        flip: how often a clip is mirrored, 0 to 1.
        colour: how far brightness, contrast and saturation are changed, 0 to 1; hue a tenth of it.
        flip_sides: mirror also where a side is named.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.5, 1.0),
        flip: float = 0.5,
        colour: float = 0.2,
        flip_sides: bool = False,
    ):
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale={scale} must be two areas, 0 < smallest <= largest <= 1.")
        for name, value in (("flip", flip), ("colour", colour)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be between 0 and 1.")
        self.scale, self.flip, self.flip_sides = tuple(scale), flip, flip_sides
        self._colour = v2.ColorJitter(colour, colour, colour, colour / 10)

    def __call__(self, frames: np.ndarray, said: str, seed: int) -> np.ndarray:
        """uint8 frames (T, H, W, 3), as long and as large as they were; `seed` is all chance.

        Args:
            said: question and answers about the clip.
        """
        clip = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        flip = self.flip if self.flip_sides or not _SIDES.search(said) else 0.0
        crop = v2.RandomResizedCrop(clip.shape[-2:], self.scale, ratio=(3 / 4, 4 / 3), antialias=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for change in (crop, v2.RandomHorizontalFlip(flip), self._colour):
                clip = change(clip)
        return clip.permute(0, 2, 3, 1).numpy()
