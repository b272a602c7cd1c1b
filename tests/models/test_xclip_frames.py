"""X-CLIP as a tower of frames: transformers' own numbers, and nothing out of frames that are padding."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, LlavaConfig, LlavaForConditionalGeneration

from bt_adapter_hf import XCLIPFramesConfig, XCLIPFramesModel
from tests.chat import tiny_gif_qa, tiny_hosts


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xclip")
    native = tiny_gif_qa.xclip()
    native.save_pretrained(folder)
    return native, folder


@torch.no_grad()
def test_the_mean_of_the_states_is_the_feature_of_xclip(saved, tmp_path):
    native, folder = saved
    tower = XCLIPFramesModel.from_pretrained(folder).eval()
    video = torch.randn(3, 4, 3, 32, 32)
    found = tower(video)
    assert found.last_hidden_state.shape == (3, 4, 16)
    torch.testing.assert_close(found.pooler_output, native.get_video_features(video).pooler_output, rtol=0, atol=0)
    tower.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()  # registered
    assert type(again) is XCLIPFramesModel and AutoConfig.from_pretrained(tmp_path).num_frames == 4
    torch.testing.assert_close(again(video).last_hidden_state, found.last_hidden_state, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_frames_that_are_padding_have_no_influence(attention):
    tower = tiny_gif_qa.tower()
    tower.set_attn_implementation(attention)
    video = torch.randn(3, 4, 3, 32, 32)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    whole, masked = tower(video).last_hidden_state, tower(video, frame_mask=mask)
    torch.testing.assert_close(masked.last_hidden_state[0], whole[0])
    assert (masked.last_hidden_state[1, :2] - whole[1, :2]).abs().max() > 1e-3
    # a tower that was made for two frames sees the same
    short = XCLIPFramesModel(XCLIPFramesConfig(backbone={**tiny_gif_qa.VISION, "num_frames": 2})).eval()
    state = tower.state_dict()
    state["mit.position_embedding"] = state["mit.position_embedding"][:, :2]
    short.load_state_dict(state)
    alone = short(video[1:2, :2])
    torch.testing.assert_close(masked.last_hidden_state[1, :2], alone.last_hidden_state[0])
    torch.testing.assert_close(masked.pooler_output[1], alone.pooler_output[0])
    for value in (torch.nan, 1e4):
        video[1, 2:] = value
        video[2, 3] = value
        again = tower(video, frame_mask=mask)
        for row, length in ((1, 2), (2, 3)):
            torch.testing.assert_close(
                again.last_hidden_state[row, :length], masked.last_hidden_state[row, :length], rtol=0, atol=0
            )


def test_another_number_of_frames_is_an_error():
    tower = tiny_gif_qa.tower()
    for T in (2, 8, 5):  # 8 would be two videos to transformers
        with pytest.raises(ValueError, match=r"takes \(B, 4, 3, H, W\)"):
            tower(torch.zeros(1, T, 3, 32, 32))
    with pytest.raises(ValueError, match="5|shape"):
        tower(torch.zeros(4, 3, 32, 32))
    with pytest.raises(ValueError, match="without any frame"):
        tower(torch.zeros(1, 4, 3, 32, 32), frame_mask=torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"\(B, T\) = \(1, 4\)"):
        tower(torch.zeros(1, 4, 3, 32, 32), frame_mask=torch.ones(1, 3))


def test_loading_is_strict(saved, tmp_path):
    native, folder = saved
    with pytest.raises(ValueError, match=r"another shape|missing"):
        config = XCLIPFramesConfig.from_pretrained(folder)
        config.backbone.num_frames = 8
        XCLIPFramesModel.from_pretrained(folder, config=config)
    del native.mit
    native.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing from the checkpoint:\n  mit\."):
        XCLIPFramesModel.from_pretrained(tmp_path)


@torch.no_grad()
def test_llavas_own_class_takes_the_tower():
    config = LlavaConfig(
        vision_config=XCLIPFramesConfig(backbone=tiny_gif_qa.VISION),
        text_config=tiny_hosts.text_config(),
        image_token_index=18,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, *[18] * 4, 5, 6]])
    assert model(input_ids=ids, pixel_values=torch.randn(1, 4, 3, 32, 32)).logits.shape == (1, 7, 32)
