import pytest
import torch
from transformers.utils import logging

from bt_adapter_hf.evaluation.controls import (
    control_features,
    control_metrics,
    frame_average_features,
    middle_frame,
    reverse_frames,
    shuffle_frames,
)
from tests import tiny_pairs


def clips(batch=6, frames=5):
    """Every frame holds its own number, so orders can be read off."""
    numbers = torch.arange(batch * frames, dtype=torch.float32).view(batch, frames, 1, 1, 1)
    return numbers.expand(batch, frames, 3, 2, 2).contiguous()


def test_shuffling_permutes_every_clip_anew_and_never_leaves_it():
    videos = clips(batch=40, frames=3)
    shuffled = shuffle_frames(videos, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shuffled.sort(dim=1).values, videos)
    orders = {tuple((row - row.min()).int().tolist()) for row in shuffled[:, :, 0, 0, 0]}
    assert (0, 1, 2) not in orders and len(orders) == 5  # all permutations of three frames but one
    again = shuffle_frames(videos, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shuffled, again) and not torch.equal(shuffled, shuffle_frames(videos, generator=None))


def test_two_frames_are_always_swapped_and_one_frame_stays():
    videos = clips(batch=3, frames=2)
    assert torch.equal(shuffle_frames(videos), videos.flip(1)) and torch.equal(reverse_frames(videos), videos.flip(1))
    single = clips(batch=3, frames=1)
    assert torch.equal(shuffle_frames(single), single)


def test_padding_is_left_alone():
    videos, mask = clips(batch=2, frames=4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    for changed in (shuffle_frames(videos, mask), reverse_frames(videos, mask)):
        assert torch.equal(changed[1, 2:], videos[1, 2:]) and torch.equal(changed[1, :2], videos[1, :2].flip(0))
    assert torch.equal(middle_frame(videos, mask), torch.stack([videos[0, 2:3], videos[1, 1:2]]))
    average = frame_average_features(lambda images: images[:, :1, 0, 0] + 1, videos, mask)
    assert average.shape == (2, 1)
    with pytest.raises(ValueError, match="right-padded"):
        reverse_frames(videos, mask.flip(1))
    with pytest.raises(ValueError, match="frame_mask must have shape"):
        reverse_frames(videos, mask[:, :2])


def test_frame_average_is_the_mean_of_normalised_image_features():
    torch.manual_seed(0)
    videos, weight = torch.randn(2, 3, 3, 4, 4), torch.randn(48, 7)
    encode = lambda images: images.flatten(1) @ weight  # noqa: E731
    expected = torch.zeros(2, 7)
    for b in range(2):
        for t in range(3):
            feature = encode(videos[b, t][None])[0]
            expected[b] += feature / feature.norm() / 3
    torch.testing.assert_close(frame_average_features(encode, videos), expected)


def test_controls_tell_a_model_of_motion_from_one_of_frames():
    """Clips come in pairs with the same frames in opposite order: only a model that reads the order can tell."""
    torch.manual_seed(0)
    forward = torch.randn(10, 6, 3, 2, 2)
    videos = torch.cat([forward, forward.flip(1)])
    order = torch.arange(6.0).view(1, 6, 1)

    def motion(clips, mask=None):
        frames = clips.flatten(2)
        return torch.cat([frames.mean(1), (frames * (order[:, : frames.shape[1]] - 2.5)).mean(1)], dim=1)

    def still(clips, mask=None):
        return torch.cat([clips.flatten(2).mean(1), torch.zeros(len(clips), 12)], dim=1)

    texts, names = motion(videos), ("shuffled", "reversed", "one_frame")
    features = {
        encode.__name__: {"intact": encode(videos), **dict(control_features(encode, videos, controls=names, draws=2))}
        for encode in (motion, still)
    }
    assert list(features["motion"]) == ["intact", "shuffled_0", "shuffled_1", "reversed", "one_frame"]
    reads_order = control_metrics(texts, features["motion"])
    assert reads_order["intact_t2v_R1"] == 100 and reads_order["reversed_t2v_R1"] == 0
    assert reads_order["shuffled_t2v_R1"] < 60
    reads_frames = control_metrics(texts, features["still"])
    for control in ("shuffled", "reversed"):
        assert reads_frames[f"{control}_t2v_MnR"] == pytest.approx(reads_frames["intact_t2v_MnR"], abs=0.5)


def test_bad_controls():
    with pytest.raises(ValueError, match="Unknown controls \\['blind'\\]"):
        list(control_features(lambda v, m: v, clips(), controls=["blind"]))
    with pytest.raises(ValueError, match="needs encode_images"):
        list(control_features(lambda v, m: v, clips(), controls=["frame_average"]))
    with pytest.raises(ValueError, match="\\(B, T, C, H, W\\)"):
        shuffle_frames(torch.zeros(2, 3, 4, 4))


def test_our_own_control_of_one_frame_warns_of_nothing(caplog):
    model = tiny_pairs.model().eval()
    model.config.vision_config.num_trained_frames = 8
    logging.get_logger("bt_adapter_hf").warning_once.__func__.cache_clear()

    def encode(videos, frame_mask):
        return model.get_video_features(videos, frame_mask=frame_mask).pooler_output

    with torch.no_grad():
        assert dict(control_features(encode, torch.zeros(1, 8, 3, 16, 16), controls=["one_frame"]))
        assert not caplog.records
        encode(torch.zeros(1, 2, 3, 16, 16), None)
    assert "interpolated to 2" in caplog.text
