"""The rivals: what each of them is, that they learn, are saved and loaded, and stand in a chat model."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel

from bt_adapter_hf import get_bt_adapter_model, save_bt_adapter
from bt_adapter_hf.baselines.towers import BaselineForPreTraining, BaselineVisionModel, baseline_of
from bt_adapter_hf.training.arguments import BTAdapterTrainingArguments
from bt_adapter_hf.training.trainer import BTAdapterTrainer
from tests import tiny_pairs
from tests.chat import tiny_hosts


FIELDS = {
    "frame_average": {},
    "st_pooling": {},
    "joint": {"frozen": False},
    "separate": {},
    "branch": {"fusion": "sum", "output_gate_scale": 1.0, "drop_path_rate": 0.0},
}


@pytest.fixture(scope="module")
def start():
    torch.manual_seed(0)
    return tiny_pairs.model().eval()


def rival(start, kind: str, **fields) -> BaselineForPreTraining:
    return baseline_of(start, temporal=kind, adapter_layers=[1, 2], **{**FIELDS[kind], **fields})


def clips(B: int = 3, T: int = 4) -> torch.Tensor:
    return torch.randn(B, T, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def frames_of(start, videos: torch.Tensor) -> torch.Tensor:
    """The native model on each frame: last hidden states (B, T, 1+N, D)."""
    native = start.vision_model.vision_model
    return native(videos.flatten(0, 1)).last_hidden_state.unflatten(0, videos.shape[:2])


@torch.no_grad()
def test_frame_averages_are_those_of_the_native_model(start):
    videos, norm = clips(), start.vision_model.vision_model.post_layernorm
    states = frames_of(start, videos)
    output = rival(start, "frame_average").eval().vision_model(videos)
    torch.testing.assert_close(output.pooler_output, norm(states[:, :, 0]).mean(dim=1))
    torch.testing.assert_close(output.last_hidden_state, states.mean(dim=1))


@torch.no_grad()
def test_pooling_over_space_and_time_gives_t_and_n_tokens(start):
    videos = clips()
    patches = frames_of(start, videos)[:, :, 1:]
    output = rival(start, "st_pooling").eval().vision_model(videos)
    assert output.last_hidden_state.shape == (3, 4 + 4, 16)
    torch.testing.assert_close(output.last_hidden_state[:, :4], patches.mean(dim=2))
    torch.testing.assert_close(output.last_hidden_state[:, 4:], patches.mean(dim=1))


@torch.no_grad()
def test_separate_attention_starts_as_frame_averaging_and_leaves_images_alone(start):
    videos = clips()
    fresh = rival(start, "separate", frozen=True).eval()
    averaged = rival(start, "frame_average").eval()
    torch.testing.assert_close(fresh.vision_model(videos).pooler_output, averaged.vision_model(videos).pooler_output)
    for block in fresh.vision_model.bt_adapter.layers:
        block.proj.weight.normal_()
    changed = fresh.vision_model(videos).pooler_output
    assert not torch.allclose(changed, averaged.vision_model(videos).pooler_output)
    assert not torch.allclose(changed, fresh.vision_model(videos.flip(1)).pooler_output)  # it reads order
    images = videos[:, 0]
    assert torch.equal(fresh.get_image_features(images).pooler_output, start.get_image_features(images).pooler_output)


@torch.no_grad()
def test_joint_attention_is_the_encoder_over_all_tokens_at_once(start):
    videos = clips()
    model = rival(start, "joint").eval()
    tower, time = model.vision_model.vision_model, model.vision_model.bt_adapter.time_embedding.weight[:4]
    embedded = tower.embeddings(videos.flatten(0, 1)).unflatten(0, (3, 4))
    x = [embedded[:, 0, :1], *(embedded[:, t, 1:] + time[t] for t in range(4))]
    x = tower.encoder(inputs_embeds=tower.pre_layrnorm(torch.cat(x, dim=1))).last_hidden_state
    output = model.vision_model(videos)
    assert output.last_hidden_state.shape == (3, 1 + 4 * 4, 16)
    torch.testing.assert_close(output.last_hidden_state, x)
    torch.testing.assert_close(output.pooler_output, tower.post_layernorm(x[:, 0]))


def test_the_lone_branch_sees_the_backbone_once(start):
    model = rival(start, "branch").eval()
    states = {n: x.requires_grad_() for n, x in model.vision_model.encode_frames(clips()).items()}
    output = model.vision_model(backbone_states=states, output_branch_states=True)
    output.branch_patches.square().sum().backward()
    assert sorted(states) == [2, 3]
    assert states[2].grad.abs().sum() > 0 and states[3].grad is None
    assert output.pooler_output.shape == (3, 16)  # joined with the backbone at the end


@pytest.mark.parametrize("kind", FIELDS)
def test_cached_states_and_unequal_lengths_give_what_pixels_give(start, kind):
    tower, videos = rival(start, kind).eval().vision_model, clips()
    with torch.no_grad():
        expected = tower(videos).pooler_output
        states = tower.encode_frames(videos, tower.config.num_hidden_layers)
        torch.testing.assert_close(tower(backbone_states=states).pooler_output, expected)
        mask = torch.ones(3, 4, dtype=torch.long)
        mask[1, 2:] = 0
        alone = tower(videos[1:2, :2])
        if kind in ("joint", "st_pooling"):  # as many tokens as frames: they cannot stand in one tensor
            with pytest.raises(ValueError, match=r"videos of \[2, 4\] frames"):
                tower(videos, frame_mask=mask)
            return
        torch.testing.assert_close(tower(videos, frame_mask=mask).pooler_output[1:2], alone.pooler_output)


def test_the_benchmark_counts_rivals():
    from benchmarks.overhead import forward_flops

    backbone, averaged = forward_flops("b16", 2, "frame_average")
    _, joint = forward_flops("b16", 2, "joint")
    _, separate = forward_flops("b16", 2, "separate")
    _, branch = forward_flops("b16", 2)
    assert averaged == backbone < separate < branch and joint > backbone


@pytest.mark.parametrize("kind", FIELDS)
def test_a_saved_rival_is_the_same_when_it_is_loaded(start, kind, tmp_path):
    model = rival(start, kind).eval()
    model.save_pretrained(tmp_path / "pretraining")
    again = BaselineForPreTraining.from_pretrained(tmp_path / "pretraining").eval()
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    model.vision_model.save_pretrained(tmp_path / "tower")
    tower = AutoModel.from_pretrained(tmp_path / "tower").eval()
    assert isinstance(tower, BaselineVisionModel)
    with torch.no_grad():
        expected = model.vision_model(clips()).pooler_output
        assert torch.equal(tower(clips()).pooler_output, expected)
        assert torch.equal(again.vision_model(clips()).pooler_output, expected)


def test_the_trainer_trains_rivals(start, tmp_path):
    from bt_adapter_hf.data.pairs import PairCollator, PairDataset, load_table

    processor = tiny_pairs.processor()
    data = PairDataset(load_table(tiny_pairs.write_table(tmp_path / "clips", 4)), processor, training=True, seed=0)
    for kind, frozen in (("separate", True), ("joint", False)):
        model = rival(start, kind, frozen=frozen)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        arguments = BTAdapterTrainingArguments(
            str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, warmup_steps=0,
            report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, lr_multipliers={},
        )  # fmt: skip
        BTAdapterTrainer(
            model=model, args=arguments, train_dataset=data, data_collator=PairCollator(processor)
        ).train()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert any(name.startswith("vision_model.bt_adapter.") for name in moved)
        assert any(name.startswith("vision_model.vision_model.") for name in moved) is not frozen
        assert not any(name.startswith(("text_", "visual_projection")) for name in moved)


@torch.no_grad()
@pytest.mark.parametrize("kind", FIELDS)
def test_pictures_of_another_size(start, kind):
    tower = rival(start, kind).eval().vision_model
    output = tower(torch.randn(2, 4, 3, 24, 24), interpolate_pos_encoding=True)
    assert output.pooler_output.shape == (2, 16)
    assert output.last_hidden_state.shape[1] == {"joint": 1 + 4 * 9, "st_pooling": 4 + 9}.get(kind, 1 + 9)


def test_a_rival_is_no_adapter(start, tmp_path):
    """Its branch would be loaded as a BT-Adapter, which takes in the backbone, or not at all."""
    model = rival(start, "branch")
    with pytest.raises(ValueError, match="this tower is a BaselineVisionModel"):
        save_bt_adapter(model, tmp_path / "adapter")
    arguments = BTAdapterTrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True, lr_multipliers={})
    BTAdapterTrainer(model=model, args=arguments).save_model()
    assert (tmp_path / "run" / "model.safetensors").is_file() and not (tmp_path / "run" / "adapter").exists()


@torch.no_grad()
def test_pooling_gives_a_chat_model_t_and_n_tokens():
    host = get_bt_adapter_model(tiny_hosts.llava()).eval()
    backbone, video = host.model.vision_tower.vision_model, tiny_hosts.video()
    tower = BaselineVisionModel.from_backbone(backbone, temporal="st_pooling").eval()
    host.model.vision_tower = tower
    patches = tower.vision_model(video[0], output_hidden_states=True).hidden_states[-2][:, 1:]  # (T, N, D)
    expected = host.model.multi_modal_projector(torch.cat([patches.mean(dim=1), patches.mean(dim=0)]))
    torch.testing.assert_close(host.model.get_video_features(video).pooler_output[0], expected)


@torch.no_grad()
def test_a_rival_stands_in_a_chat_model():
    host = get_bt_adapter_model(tiny_hosts.llava()).eval()
    images = host.model.get_image_features(tiny_hosts.images()).pooler_output[0]
    rival = BaselineVisionModel.from_backbone(
        host.model.vision_tower.vision_model, temporal="separate", adapter_layers=[3, 4]
    )
    tiny_hosts.stir(rival.bt_adapter)
    host.model.vision_tower = rival.eval()
    video = tiny_hosts.video()
    tokens = host.model.get_video_features(video).pooler_output[0]
    assert tokens.shape == images.shape
    assert not torch.allclose(tokens, host.model.get_video_features(video.flip(1)).pooler_output[0])
    assert torch.equal(host.model.get_image_features(tiny_hosts.images()).pooler_output[0], images)


def test_settings_that_do_not_fit_are_named(start):
    for kind, fields, words in (
        ("joint", {"frozen": True}, "set frozen=False"),
        ("separate", {"adapter_layers": [0, 1]}, r"such as \[1, 2\]"),
        ("branch", {"fusion": "gate"}, 'fusion="sum"'),
    ):
        with pytest.raises(StrictDataclassError, match=words):
            baseline_of(start, **{"temporal": kind, "adapter_layers": [1, 2], **FIELDS[kind], **fields})
    for field in ("mbta_weight", "mbca_weight"):
        with pytest.raises(ValueError, match="no branch to align"):
            rival(start, "separate", **{field: 0.1})
    with pytest.raises(ValueError, match="adapter_layer, temporl: no field"):
        baseline_of(start, temporl="separate", adapter_layer=[1, 2])
    with pytest.raises(ValueError, match="mask_ratio=0"):
        model = rival(start, "separate", mask_ratio=0.5).train()
        model(torch.ones(2, 3, dtype=torch.long), clips(2))
