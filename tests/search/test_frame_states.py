"""Frames pass the frozen tower once for all windows that show them."""

import pytest
import torch

from bt_adapter_hf import BTAdapterModel
from bt_adapter_hf.search.frame_states import FrameStates
from tests import tiny_pairs


@pytest.fixture(scope="module")
def model() -> BTAdapterModel:
    torch.manual_seed(0)
    model = BTAdapterModel(tiny_pairs.model().config).eval()
    for parameter in model.vision_model.bt_adapter.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def test_windows_equal_clips_of_their_own(model, frames_seen):
    torch.manual_seed(0)
    size = model.config.vision_config.image_size
    frames = torch.randn(30, 3, size, size)
    windows = torch.arange(0, 27, 2)[:, None] + torch.arange(4)
    with torch.no_grad():
        expected = model.get_video_features(frames[windows]).pooler_output
    frames_seen.clear()
    states = FrameStates(model)
    features = []
    for start in range(0, 30, 10):  # as a film comes in
        states.add(frames[start : start + 10])
        ready = windows[(windows[:, -1] < len(states)) & (windows[:, -1] >= start)]
        features.append(states.features(ready))
        states.forget(start + 7)
    assert sum(frames_seen) == 30  # each once
    torch.testing.assert_close(torch.cat(features), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(IndexError, match="frames 0 to 3; there are 27 to 29"):
        states.features(windows[:1])
    with pytest.raises(IndexError):
        states.features(torch.tensor([[29, 30]]))


def test_a_film_that_stands_still_passes_once(model, frames_seen):
    torch.manual_seed(0)
    size = model.config.vision_config.image_size
    frames = torch.randn(2, 3, size, size)[[0, 0, 1, 0, 1, 1]]
    states = FrameStates(model)
    frames_seen.clear()
    states.add(frames)
    assert frames_seen == [2]
    with torch.enable_grad():  # where each frame passes by itself
        expected = model.get_video_features(frames[None]).pooler_output
    torch.testing.assert_close(states.features(torch.arange(6)[None]), expected, atol=1e-6, rtol=1e-5)


@pytest.fixture
def frames_seen(model):
    """How many frames each pass of the frozen tower had."""
    seen = []
    hook = model.vision_model.vision_model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    yield seen
    hook.remove()
