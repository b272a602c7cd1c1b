"""Augmentation of clips: one draw for all frames, by the seed alone, and no mirror where a side is named."""

import numpy as np
import pytest
import torch

from bt_adapter_hf.data.augmentation import ClipAugmentation
from bt_adapter_hf.data.instructions import InstructionDataset, load_instructions
from tests.chat import tiny_gif_qa
from tests.data.test_addresses import write_questions


def frames(T=4):
    rng = np.random.default_rng(0)
    return np.repeat(rng.integers(0, 256, (1, 24, 32, 3), dtype=np.uint8), T, axis=0)


def test_all_frames_are_changed_alike_and_by_the_seed():
    augment, clip = ClipAugmentation(), frames()
    state = torch.random.get_rng_state()
    found = augment(clip, "a man jumps", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)  # no other chance is touched
    assert found.dtype == np.uint8 and found.shape == clip.shape
    assert (found == found[:1]).all() and (found != clip).any()
    assert (augment(clip, "a man jumps", seed=1) == found).all()
    assert (augment(clip, "a man jumps", seed=2) != found).any()


@pytest.mark.parametrize("said, mirrored", [("it jumps", True), ("it goes Left", False), ("upright rightward", False)])
def test_no_mirror_where_a_side_is_named(said, mirrored):
    augment, clip = ClipAugmentation(scale=(1, 1), flip=1.0, colour=0.0), frames()
    crop = augment(clip, "left", seed=3)  # the aspect of the crop is drawn too
    assert (augment(clip, said, seed=3) == (crop[:, :, ::-1] if mirrored else crop)).all()
    assert (ClipAugmentation((1, 1), 1.0, 0.0, flip_sides=True)(clip, said, 3) == crop[:, :, ::-1]).all()


def test_bad_numbers():
    for options, name in (({"scale": (0, 1)}, "scale"), ({"flip": 2}, "flip"), ({"colour": -1}, "colour")):
        with pytest.raises(ValueError, match=name):
            ClipAugmentation(**options)


def test_items_are_augmented_by_seed_and_epoch(tmp_path):
    tiny_gif_qa.write_gif(tmp_path / "a.gif", frames=6)
    processor = tiny_gif_qa.processor(tiny_gif_qa.model().config)
    table = load_instructions(write_questions(tmp_path, ["a"]))
    plain = InstructionDataset(table, processor, max_length=100, item_timeout=None)
    augmented = InstructionDataset(table, processor, max_length=100, item_timeout=None, augment=ClipAugmentation())
    pixels = [augmented[epoch, 0]["pixel_values_videos"] for epoch in (0, 0, 1)]
    assert torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[0], pixels[2])
    assert pixels[0].shape == plain[0, 0]["pixel_values_videos"].shape
    assert not torch.equal(pixels[0], plain[0, 0]["pixel_values_videos"])
