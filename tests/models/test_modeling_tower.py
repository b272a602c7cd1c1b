"""The tower: native images, the branch against a naive reference, unequal videos, hidden states, gradients."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.utils import logging

from bt_adapter_hf import BTAdapterVisionConfig, BTAdapterVisionModel
from bt_adapter_hf.models.modeling_bt_adapter_branch import hashed


SIZES = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.02,  # the EVA configs say 1e-10
}
FAMILIES = {
    "clip": (CLIPVisionModel, CLIPVisionConfig),
    "siglip": (SiglipVisionModel, SiglipVisionConfig),
    "instructblip": (InstructBlipVisionModel, InstructBlipVisionConfig),
    "blip2": (Blip2VisionModel, Blip2VisionConfig),
}


def backbone(family: str = "clip", **sizes):
    model_class, config_class = FAMILIES[family]
    return model_class(config_class(**{**SIZES, **sizes})).eval()


def tower(family: str = "clip", num_adapter_layers: int = 3, **fields) -> BTAdapterVisionModel:
    """A tower whose branch does something: everything that starts at zero is drawn at random."""
    torch.manual_seed(0)
    model = BTAdapterVisionModel.from_backbone(backbone(family), num_adapter_layers, **fields)
    with torch.no_grad():
        for name, parameter in model.bt_adapter.named_parameters():
            if "gate" in name:
                scale = getattr(model.config, f"{name}_scale")
                parameter.copy_(torch.randn_like(parameter) / scale)
            elif "temporal.proj" in name or name == "video_cls":
                parameter.normal_(std=0.2)
    return model.eval()


def videos(B: int = 2, T: int = 4) -> torch.Tensor:
    return torch.randn(B, T, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_bit_equal_to_the_native_model(family):
    native = backbone(family)
    model = BTAdapterVisionModel.from_backbone(native, num_adapter_layers=2)
    images = videos()[:, 0]
    ours = model(images, output_hidden_states=True)
    theirs = native(images, output_hidden_states=True)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert torch.equal(ours.pooler_output, theirs.pooler_output)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 6
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True))


# ----------------------------------------------------------------------------------- the branch, written out naively


def naive_tower(model: BTAdapterVisionModel, video: torch.Tensor, kept: list[int] | None = None):
    """One CLIP video (T, 3, H, W), frame by frame and patch by patch, with the default fields.

    Returns the pooled feature (D,) and, without a mask, the fused tokens (1+N, D).
    """
    clip, branch, config = model.vision_model, model.bt_adapter, model.config
    T = len(video)
    hidden = clip(video, output_hidden_states=True).hidden_states
    position = clip.embeddings.position_embedding.weight
    patches_kept = list(range(len(position) - 1)) if kept is None else kept
    fusion = torch.sigmoid(config.fusion_gate_scale * branch.fusion_gate)
    z, cls = None, None
    for j, number in enumerate(config.adapter_layers):
        layer, x = branch.layers[j], hidden[number + 1]
        mean_cls = sum(x[t, 0] for t in range(T)) / T
        fresh = {(t, p): x[t, 1 + p] for t in range(T) for p in patches_kept}
        if j == 0:
            time = branch.time_embedding.weight
            z = {(t, p): fresh[t, p] + position[1 + p] + time[t] for t, p in fresh}
            cls = (mean_cls + branch.video_cls + position[0]) / 2
        else:
            z = {key: fusion * fresh[key] + (1 - fusion) * z[key] for key in z}
            cls = fusion * mean_cls + (1 - fusion) * cls
        for p in patches_kept:
            line = torch.stack([z[t, p] for t in range(T)])
            update = layer.temporal.proj(layer.temporal.attn(hidden_states=layer.temporal.norm(line)[None])[0][0])
            for t in range(T):
                z[t, p] = z[t, p] + update[t]
        spatial, cls_updates, updates = layer.spatial, [], {}
        for t in range(T):
            tokens = torch.stack([cls] + [z[t, p] for p in patches_kept])
            out = spatial.attn(hidden_states=spatial.norm1(tokens)[None])[0][0]
            cls_updates.append(out[0])
            updates |= {(t, p): out[1 + m] for m, p in enumerate(patches_kept)}
        z = {key: z[key] + updates[key] for key in z}
        cls = cls + sum(cls_updates) / T
        z = {key: z[key] + spatial.mlp(spatial.norm2(z[key])) for key in z}
        cls = cls + spatial.mlp(spatial.norm2(cls))
    output = torch.sigmoid(config.output_gate_scale * branch.output_gate)
    final = hidden[-1]
    pooled = sum(clip.post_layernorm(output * final[t, 0] + (1 - output) * cls) for t in range(T)) / T
    if kept is not None:
        return pooled, None
    fused = [(sum(final[t, 0] for t in range(T)) / T + cls) / 2]
    for p in patches_kept:
        fused.append(sum(final[t, 1 + p] + z[t, p] for t in range(T)) / T / 2)
    return pooled, torch.stack(fused)


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 4])
def test_the_branch_equals_a_naive_one(T):
    model, video = tower(), videos(2, T)
    output = model(video)
    assert output.last_hidden_state.shape == (2, 17, 24)
    for b in range(2):
        pooled, fused = naive_tower(model, video[b])
        torch.testing.assert_close(output.pooler_output[b], pooled, atol=2e-6, rtol=0)
        torch.testing.assert_close(output.last_hidden_state[b], fused, atol=2e-6, rtol=0)


@torch.no_grad()
def test_a_tube_mask_equals_a_branch_that_never_saw_the_dropped_patches():
    model, video = tower(), videos()
    kept = [[0, 3, 7, 15], [1, 2, 8, 9]]
    masked = torch.ones(2, 16, dtype=torch.bool)
    for b in range(2):
        masked[b, kept[b]] = False
    output = model(video, bool_masked_pos=masked, output_branch_states=True)
    assert output.last_hidden_state is None and output.branch_patches.shape == (2, 4, 4, 24)
    for b in range(2):
        pooled, _ = naive_tower(model, video[b], kept[b])
        torch.testing.assert_close(output.pooler_output[b], pooled, atol=2e-6, rtol=0)
    # the same tubes, written frame by frame
    by_frame = model(video, bool_masked_pos=masked.repeat(1, 4)).pooler_output
    assert torch.equal(by_frame, output.pooler_output)
    # branch patch (t, m) says where it comes from
    expected = torch.tensor([[[t * 16 + p for p in kept[b]] for t in range(4)] for b in range(2)])
    assert torch.equal(output.branch_index, expected)


@torch.no_grad()
def test_masking_computes_nothing_for_dropped_tokens():
    model, seen = tower(), []
    for layer in model.bt_adapter.layers:
        layer.spatial.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[:, :11] = True
    model(videos(), bool_masked_pos=masked)
    assert seen == [2 * 4 * 5, 2 * 1] * 3  # kept patches, then the video CLS, per layer


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {"fusion": "sum"},
        {"output_fusion": "sum"},
        {"gate_on": "branch"},
        {"video_cls": "token"},
        {"pooling_order": "mean_then_norm"},
    ],
)
def test_each_variant_changes_the_pooled_feature(fields):
    assert not torch.allclose(tower()(videos()).pooler_output, tower(**fields)(videos()).pooler_output, atol=1e-4)


@torch.no_grad()
def test_gate_on_the_other_side_with_the_opposite_gate_is_the_same_function():
    model = tower()
    expected = model(videos())
    model.config.gate_on = "branch"
    model.bt_adapter.fusion_gate.neg_()
    model.bt_adapter.output_gate.neg_()
    torch.testing.assert_close(model(videos()).pooler_output, expected.pooler_output, atol=1e-6, rtol=0)


@torch.no_grad()
def test_fused_tokens_can_be_gated_and_carry_the_cls_last():
    first, last = tower()(videos()), tower(cls_position="last")(videos())
    assert torch.equal(first.last_hidden_state[:, 0], last.last_hidden_state[:, -1])
    assert torch.equal(first.last_hidden_state[:, 1:], last.last_hidden_state[:, :-1])
    gated = tower(token_fusion="gate")(videos())
    assert not torch.allclose(gated.last_hidden_state, first.last_hidden_state, atol=1e-3)


# ------------------------------------------------------------------------------------------- unequal and long videos


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_equals_its_members_one_by_one(family):
    model, video = tower(family), videos(4, 6)
    lengths = [3, 6, 1, 3]
    frame_mask = torch.tensor([[t < n for t in range(6)] for n in lengths])
    batch = model(video, frame_mask=frame_mask, output_hidden_states=True)
    for b, n in enumerate(lengths):
        alone = model(video[b : b + 1, :n], output_hidden_states=True)
        torch.testing.assert_close(batch.pooler_output[b], alone.pooler_output[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(batch.last_hidden_state[b], alone.last_hidden_state[0], atol=2e-6, rtol=0)
        for ours, theirs in zip(batch.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(ours[b], theirs[0], atol=2e-6, rtol=0)


@torch.no_grad()
def test_padding_may_hold_anything():
    model, video = tower(), videos(1, 4)
    frame_mask = torch.tensor([[1, 1, 0, 0]])
    expected = model(video, frame_mask=frame_mask).pooler_output
    video[:, 2:] = float("nan")
    assert torch.equal(model(video, frame_mask=frame_mask).pooler_output, expected)


@torch.no_grad()
def test_a_mask_of_ones_changes_nothing():
    model, video = tower(), videos()
    assert torch.equal(model(video, frame_mask=torch.ones(2, 4)).pooler_output, model(video).pooler_output)


@torch.no_grad()
def test_time_embeddings_beyond_the_table_are_interpolated():
    branch = tower(max_frames=4).bt_adapter
    table = branch.time_embedding.weight
    assert torch.equal(branch._time_embeddings(3, table.device), table[:3])
    long = branch._time_embeddings(7, table.device)
    torch.testing.assert_close(long[[0, 2, 4, 6]], table, atol=1e-6, rtol=0)
    torch.testing.assert_close(long[3], (table[1] + table[2]) / 2, atol=1e-6, rtol=0)
    assert tower(max_frames=4)(videos(1, 9)).pooler_output.isfinite().all()


@pytest.mark.parametrize("frames_per_chunk", [1, 3, 11, 100])
@pytest.mark.parametrize("learning", [True, False])
def test_frames_pass_in_chunks(frames_per_chunk, learning):
    model, whole = tower(frames_per_chunk=frames_per_chunk), tower()
    sizes, videos_at_once = [], []
    model.vision_model.embeddings.register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    model.bt_adapter.layers[0].register_forward_hook(lambda _, args, out: videos_at_once.append(len(out[0])))
    with torch.set_grad_enabled(learning):
        output, expected = model(videos(4, 5)), whole(videos(4, 5))
    assert max(sizes) <= frames_per_chunk and sum(sizes) == 20
    # what learns needs all videos at once; else at least one, and as many as the frames allow
    assert videos_at_once == (
        [4] if learning or frames_per_chunk == 100 else [2, 2] if frames_per_chunk == 11 else [1] * 4
    )
    torch.testing.assert_close(output.pooler_output, expected.pooler_output, atol=1e-6, rtol=0)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, atol=2e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------- hidden states


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_by_bool_int_and_list(family):
    model, video = tower(family), videos()
    every = model(video, output_hidden_states=True).hidden_states
    assert len(every) == 6 and all(state.shape == model(video).last_hidden_state.shape for state in every)
    one = model(video, output_hidden_states=-2).hidden_states
    assert [state is None for state in one] == [True, True, True, True, False, True]
    assert torch.equal(one[-2], every[-2])
    some = model(video, output_hidden_states=[0, -1]).hidden_states
    assert torch.equal(some[0], every[0]) and torch.equal(some[-1], every[-1]) and some[1] is None
    assert model(video).hidden_states is None
    # below the branch: the frame average of the backbone
    native = model.vision_model(video.flatten(0, 1), output_hidden_states=True).hidden_states
    for n in range(3):
        torch.testing.assert_close(every[n], native[n].unflatten(0, (2, 4)).mean(1), atol=1e-6, rtol=0)
    assert not torch.allclose(every[3], native[3].unflatten(0, (2, 4)).mean(1), atol=1e-2)


@torch.no_grad()
def test_last_hidden_state_is_the_last_entry_up_to_the_norm():
    clip, eva = tower("clip")(videos(), output_hidden_states=True), tower("blip2")
    assert torch.equal(clip.last_hidden_state, clip.hidden_states[-1])
    output = eva(videos(), output_hidden_states=True)
    expected = eva.vision_model.post_layernorm(output.hidden_states[-1])
    assert torch.equal(output.last_hidden_state, expected)


@torch.no_grad()
def test_a_branch_that_ends_below_the_top_is_fused_from_its_last_layer():
    model = tower(adapter_layers=[1, 3])
    output = model(videos(), output_hidden_states=True, output_branch_states=True)
    top = model.vision_model(videos().flatten(0, 1)).last_hidden_state.unflatten(0, (2, 4)).mean(1)
    branch = torch.cat([output.branch_cls, output.branch_patches.mean(1)], dim=1)
    torch.testing.assert_close(output.last_hidden_state, (top + branch) / 2, atol=1e-6, rtol=0)


@torch.no_grad()
def test_attentions_are_the_backbones_per_frame():
    model = tower(frames_per_chunk=3)
    model.set_attn_implementation("eager")
    attentions = model(videos(), output_attentions=True).attentions
    assert len(attentions) == 5 and attentions[0].shape == (8, 3, 17, 17)
    assert model(videos()).attentions is None
    frame_mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    some = model(videos(), frame_mask=frame_mask, output_attentions=True).attentions
    kept = attentions[2][frame_mask.flatten().bool()]
    torch.testing.assert_close(some[2], kept, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("of_backbone", [False, True])
def test_the_config_asks_for_attentions_and_hidden_states(of_backbone):
    model = tower()
    model.set_attn_implementation("eager")
    images = videos()[:, 0]
    plain, video = model(images), model(videos())
    assert plain.attentions is plain.hidden_states is video.attentions is video.hidden_states is None
    config = model.config.backbone if of_backbone else model.config
    config.output_attentions = config.output_hidden_states = True
    for pixels, rows in ((images, 2), (videos(), 8)):
        output = model(pixels)
        assert len(output.attentions) == 5 and output.attentions[0].shape == (rows, 3, 17, 17)
        assert len(output.hidden_states) == 6 and output.hidden_states[5].shape == (2, 17, 24)
        off = model(pixels, output_attentions=False, output_hidden_states=False)
        assert off.attentions is off.hidden_states is None
    assert torch.equal(model(images).pooler_output, plain.pooler_output)
    theirs = model.vision_model(images, output_attentions=True).attentions
    assert all(torch.equal(a, b) for a, b in zip(model(images).attentions, theirs, strict=True))
    states = model.encode_frames(videos())
    assert model(backbone_states=states, output_hidden_states=False).attentions is None  # there are none to give


@torch.no_grad()
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_hidden_states_of_other_image_sizes(family):
    model = tower(family)
    video = torch.randn(1, 2, 3, 48, 48)
    output = model(video, interpolate_pos_encoding=True, output_hidden_states=True)
    tokens = 36 + model.family.num_cls
    assert [tuple(x.shape) for x in output.hidden_states] == [(1, tokens, 24)] * 6
    one = model(video, interpolate_pos_encoding=True, output_hidden_states=[-1, 1])
    assert [n for n, x in enumerate(one.hidden_states) if x is not None] == [1, 5]
    for n in (1, 5):
        torch.testing.assert_close(one.hidden_states[n], output.hidden_states[n], atol=0, rtol=0)
    native = model.vision_model(video[0], interpolate_pos_encoding=True, output_hidden_states=True)
    torch.testing.assert_close(output.hidden_states[1], native.hidden_states[1].mean(0, keepdim=True))
    image = model(video[0], interpolate_pos_encoding=True)
    assert torch.equal(image.last_hidden_state, native.last_hidden_state)


@torch.no_grad()
def test_return_dict_false_gives_a_tuple():
    last_hidden_state, pooled = tower()(videos(), return_dict=False)
    assert last_hidden_state.shape == (2, 17, 24) and pooled.shape == (2, 24)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_other_image_sizes_by_interpolated_positions(family):
    model = tower(family)
    video = torch.randn(1, 2, 3, 48, 48)
    output = model(video, interpolate_pos_encoding=True)
    assert output.last_hidden_state.shape[1] == 36 + model.family.num_cls


# ------------------------------------------------------------------------------------- initialisation and learning


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_branch_starts_from_the_last_layers_and_ignores_time(family):
    native = backbone(family)
    model = BTAdapterVisionModel.from_backbone(native, num_adapter_layers=2)
    for layer, source in zip(model.bt_adapter.layers, native.encoder.layers[-2:], strict=True):
        for ours, theirs in (
            (layer.spatial.attn, source.self_attn),
            (layer.spatial.mlp, source.mlp),
            (layer.spatial.norm1, source.layer_norm1),
            (layer.spatial.norm2, source.layer_norm2),
        ):
            pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        assert not layer.temporal.proj.weight.any() and not layer.temporal.proj.bias.any()
    # With the time embeddings out of the way the order of the frames cannot matter yet.
    model.bt_adapter.time_embedding.weight.data.zero_()
    video = videos()
    forwards, backwards = model.eval()(video).pooler_output, model(video.flip(1)).pooler_output
    torch.testing.assert_close(forwards, backwards, atol=1e-6, rtol=0)


def test_time_embeddings_start_as_configured():
    torch.manual_seed(0)
    for std in (1.0, 0.5):
        model = BTAdapterVisionModel.from_backbone(backbone(), 2, time_embedding_init_std=std)
        assert abs(model.bt_adapter.time_embedding.weight.std().item() - std) < 0.05 * std


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_teaches_order_and_only_the_branch(family):
    torch.manual_seed(0)
    # gates of scale 1: a step of this size saturates the released ones, and only one side is left
    scales = {"fusion_gate_scale": 1.0, "output_gate_scale": 1.0}
    model = BTAdapterVisionModel.from_backbone(backbone(family), 2, drop_path_rate=0.0, **scales).train()
    frozen = {name: p.clone() for name, p in model.vision_model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    output = model(videos())
    (output.pooler_output.square().mean() + output.last_hidden_state.square().mean()).backward()
    assert all(p.grad is not None for p in model.bt_adapter.parameters())
    optimizer.step()
    assert all(torch.equal(p, frozen[name]) for name, p in model.vision_model.named_parameters())
    model.eval()
    assert not torch.allclose(model(videos()).pooler_output, model(videos().flip(1)).pooler_output, atol=1e-6)


def test_a_frozen_backbone_runs_without_a_graph_and_in_eval_mode():
    model = tower().train()
    assert not model.vision_model.training and model.bt_adapter.training
    graphs = []
    model.vision_model.encoder.layers[0].register_forward_hook(lambda _, args, out: graphs.append(out.requires_grad))
    model(videos()).pooler_output.sum().backward()
    assert graphs == [False]
    model.vision_model.requires_grad_(True)
    model.train()
    assert model.vision_model.training
    model(videos()).pooler_output.sum().backward()
    assert graphs == [False, True]
    assert model.vision_model.encoder.layers[0].mlp.fc1.weight.grad is not None


def test_activation_checkpointing_of_the_branch_changes_no_gradient():
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = tower(drop_path_rate=0.0).train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.bt_adapter.layers)
        model(videos()).pooler_output.square().sum().backward()
        return [p.grad for p in model.bt_adapter.parameters() if p.grad is not None]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)


def test_drop_path_rates_grow_over_the_layers_and_act_in_training_only():
    model = tower(num_adapter_layers=5, drop_path_rate=0.4)
    rates = [layer.spatial.drop_path.rate for layer in model.bt_adapter.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    drop = model.bt_adapter.layers[-1].temporal.drop_path
    x, row_seeds = torch.ones(4000, 2, 3), torch.arange(40)
    assert torch.equal(drop.eval()(x, None), x)
    dropped = drop.train()(x, row_seeds)
    rows = dropped[:, 0, 0]
    assert torch.equal(drop(x[100:200], row_seeds[1:2]), dropped[100:200])
    other = model.bt_adapter.layers[-1].spatial.drop_path.train()(x, row_seeds)
    for a, b in ((rows, other[:, 0, 0]), (rows[:100], rows[100:200]), (rows[:99], rows[1:100])):
        assert 0.3 < ((a == 0) == (b == 0)).float().mean() < 0.75  # 0.52 where the two have nothing to do with another
    assert (dropped == rows[:, None, None]).all()
    assert sorted(set(rows.tolist())) == pytest.approx([0.0, 1 / 0.6])
    assert abs((rows == 0).float().mean().item() - 0.4) < 0.04


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_backbones_attention_implementation_is_kept(name):
    native = backbone()
    native.set_attn_implementation(name)
    model = BTAdapterVisionModel.from_backbone(native, 2)
    assert native.config._attn_implementation == model.config._attn_implementation == name
    assert model.bt_adapter.layers[0].spatial.attn.config._attn_implementation == name


@torch.no_grad()
def test_attention_implementations_agree():
    model = tower()
    outputs = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.bt_adapter.layers[0].temporal.attn.config._attn_implementation == name
        outputs[name] = model(videos()).last_hidden_state
    torch.testing.assert_close(outputs["eager"], outputs["sdpa"], atol=2e-6, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_agrees():
    model = BTAdapterVisionModel.from_backbone(backbone(hidden_size=48), 2).eval()  # heads of at least 16
    expected = model(videos()).last_hidden_state
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(videos()).last_hidden_state, expected, atol=2e-6, rtol=0)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
def test_attention_implementations_agree_on_a_gpu(name):
    if name == "flash_attention_2":
        pytest.importorskip("flash_attn")
    model = BTAdapterVisionModel.from_backbone(backbone(hidden_size=48), 2).eval()
    expected = model(videos()).last_hidden_state
    model.to("cuda", torch.bfloat16).set_attn_implementation(name)
    output = model(videos().to("cuda", torch.bfloat16)).last_hidden_state
    torch.testing.assert_close(output.float().cpu(), expected, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_bfloat16():
    model, exact = tower().to(torch.bfloat16), tower()
    output = model(videos().to(torch.bfloat16))
    assert output.pooler_output.dtype == torch.bfloat16
    cosine = torch.cosine_similarity(output.pooler_output.float(), exact(videos()).pooler_output)
    assert cosine.min() > 0.995


def test_a_branch_in_float32_learns_beside_a_backbone_in_bfloat16():
    model, exact = tower().to(torch.bfloat16), tower()
    model.bt_adapter.float().load_state_dict(exact.bt_adapter.state_dict())
    output = model(videos().to(torch.bfloat16), output_hidden_states=True)
    assert {x.dtype for x in (output.pooler_output, output.last_hidden_state, *output.hidden_states)} == {
        torch.bfloat16
    }
    cosine = torch.cosine_similarity(output.pooler_output.float(), exact(videos()).pooler_output)
    assert cosine.min() > 0.995
    output.pooler_output.float().square().mean().backward()
    assert model.bt_adapter.video_cls.grad.dtype == torch.float32


def test_parameter_count_of_the_released_shape():
    with torch.device("meta"):
        config = CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
        )
        model = BTAdapterVisionModel(BTAdapterVisionConfig(backbone=config))
    count = sum(p.numel() for p in model.bt_adapter.parameters())
    assert round(count / 1e6, 2) == 71.45


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 4, 1, 32, 32), r"\(2, 4, 1, 32, 32\); expected images"),
        ((2, 3, 4, 32, 32), r"expected images \(B, 3, H, W\)"),
        ((2, 0, 3, 32, 32), "at least one frame"),
        ((3, 32, 32), r"\(3, 32, 32\)"),
    ],
)
def test_wrong_shapes_are_named(shape, message):
    with pytest.raises(ValueError, match=message):
        tower()(torch.zeros(shape))


def test_wrong_masks_are_named():
    model, video = tower(), videos()
    with pytest.raises(ValueError, match=r"frame_mask has shape \(2, 3\)"):
        model(video, frame_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="without any frame"):
        model(video, frame_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))
    with pytest.raises(ValueError, match="videos of one length"):
        model(video, frame_mask=torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]), bool_masked_pos=torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"bool_masked_pos has shape \(2, 15\)"):
        model(video, bool_masked_pos=torch.zeros(2, 15))
    with pytest.raises(ValueError, match="must keep the same number"):
        model(video, bool_masked_pos=torch.eye(2, 16).tril() * torch.tensor([[0], [1]]))
    with pytest.raises(ValueError, match="are left per video"):
        model(video, bool_masked_pos=torch.ones(2, 16))
    with pytest.raises(ValueError, match="the same in all frames"):
        model(video, bool_masked_pos=torch.eye(1, 64).repeat(2, 1))
    with pytest.raises(ValueError, match="are for videos"):
        model(video[:, 0], frame_mask=torch.ones(2, 4))


def test_from_backbone_refuses_other_models():
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    with pytest.raises(ValueError, match="ViTModel is not a vision model that takes a BT-Adapter"):
        BTAdapterVisionModel.from_backbone(ViTModel(ViTConfig(**SIZES)))
    sizes = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    clip = CLIPModel(CLIPConfig(text_config={**sizes, "num_attention_heads": 3, "vocab_size": 9}, vision_config=SIZES))
    with pytest.raises(ValueError, match="for a CLIPModel or LLaVA its vision model"):
        BTAdapterVisionModel.from_backbone(clip)
    with pytest.raises(ValueError, match="between 1 and 5"):
        BTAdapterVisionModel.from_backbone(backbone(), num_adapter_layers=6)


# ------------------------------------------------------------------------------------------------- time embeddings


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 9])
def test_other_lengths_interpolate_between_the_trained_rows(T):
    """Four of ten rows are trained; what stands in the others does not matter."""
    model = tower(max_frames=10, num_trained_frames=4)
    table = model.bt_adapter.time_embedding.weight
    expected = []
    for t in range(T):
        place = 3 * t / (T - 1) if T > 1 else 0.0
        low, high = math.floor(place), math.ceil(place)
        expected.append(table[low] + (place - low) * (table[high] - table[low]))
    found = model.bt_adapter._time_embeddings(T, table.device)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)
    pooled = model(videos(2, T)).pooler_output
    table[4:] = torch.nan
    assert torch.equal(model(videos(2, T)).pooler_output, pooled)


@torch.no_grad()
@pytest.mark.parametrize("number", [0, None])
def test_the_table_as_released(number):
    model = tower(max_frames=4, num_trained_frames=number)
    table = model.bt_adapter.time_embedding.weight
    for T in (1, 3, 4):
        assert torch.equal(model.bt_adapter._time_embeddings(T, table.device), table[:T])
    longer = model.bt_adapter._time_embeddings(7, table.device)
    torch.testing.assert_close(longer[::2], table, atol=1e-6, rtol=0)
    torch.testing.assert_close(longer[1], (table[0] + table[1]) / 2, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_number_of_frames_far_from_the_trained_is_said(caplog):
    logging.get_logger("bt_adapter_hf").propagate = True
    logging.get_logger("bt_adapter_hf").warning_once.__func__.cache_clear()
    model = tower(num_trained_frames=4)
    for T in (2, 4, 8):
        model(videos(1, T))
    tower(num_trained_frames=0)(videos(1, 9))
    assert not caplog.records
    model(videos(1, 9))
    model(videos(2, 9))
    assert caplog.text.count("were trained for 4 frames per video and are interpolated to 9") == 1
    model(videos(1, 1))
    assert "interpolated to 1: the order of events is told best with num_frames=4" in caplog.text


# ------------------------------------------------------------------------------------------------------ row seeds


def test_what_is_dropped_from_a_video_follows_from_its_seed_alone():
    model = tower(drop_path_rate=0.6).train()
    seeds = torch.tensor([5, 2**32 - 1])
    torch.manual_seed(1)
    both = model(videos(), row_seeds=seeds).pooler_output
    torch.manual_seed(2)
    for row in range(2):
        alone = model(videos()[row : row + 1], row_seeds=seeds[row : row + 1]).pooler_output
        torch.testing.assert_close(alone[0], both[row], atol=2e-6, rtol=0)
    assert not torch.allclose(model(videos(), row_seeds=seeds + 1).pooler_output, both, atol=1e-3)
    drawn = model(videos()).pooler_output
    assert not torch.allclose(drawn, model(videos()).pooler_output, atol=1e-3)
    torch.manual_seed(2)
    assert torch.equal(model(videos()).pooler_output, drawn)
    model.eval()
    assert torch.equal(model(videos(), row_seeds=seeds).pooler_output, model(videos()).pooler_output)


def test_unequal_videos_keep_their_seeds():
    model = tower(drop_path_rate=0.6).train()
    frame_mask, seeds = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), torch.tensor([3, 8])
    both = model(videos(), frame_mask=frame_mask, row_seeds=seeds).pooler_output
    alone = model(videos()[:1, :2], row_seeds=seeds[:1]).pooler_output
    torch.testing.assert_close(both[:1], alone, atol=2e-6, rtol=0)


def test_hashed_bits_are_even_and_independent():
    bits = hashed(torch.arange(300)[:, None], 7, torch.arange(300))
    assert bits.min() >= 0 and bits.max() < 2**32 and len(bits.unique()) > 89_900  # two of 90,000 may well agree
    ones = torch.stack([(bits >> n) & 1 for n in range(32)]).double()
    assert (ones.mean((1, 2)) - 0.5).abs().max() < 0.01  # 6 standard deviations of 90,000 draws
    flat = (bits.double() / 2**32 - 0.5).flatten()
    for shift in (1, 2, 300):
        assert (flat[:-shift] * flat[shift:]).mean().abs() * 12 < 0.02
    assert int(hashed(1, 2)) != int(hashed(2, 1)) and int(hashed(-1)) == int(hashed(2**32 - 1))


# --------------------------------------------------------------------------------------------- copies and replicas


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_pickle_and_deepcopy_after_a_forward_pass(family):
    model = tower(family)
    expected = model(videos(), output_hidden_states=True)
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), model):
        output = copied(videos(), output_hidden_states=True)
        assert torch.equal(output.pooler_output, expected.pooler_output)
        assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, expected.hidden_states, strict=True))
    layers = copied.vision_model.encoder.layers
    assert len(layers[0]._forward_hooks) == 1  # none was installed twice


def test_data_parallel_is_refused():
    with pytest.raises(RuntimeError, match="does not run under nn.DataParallel.*torchrun or accelerate"):
        tower()._replicate_for_data_parallel()
    # what nn.DataParallel calls of each module
    assert "module._replicate_for_data_parallel()" in inspect.getsource(torch.nn.parallel.replicate)


@torch.no_grad()
def test_the_released_window_averages_pairs_above_64_frames():
    model, long = tower(temporal_window="released"), torch.randn(1, 66, 3, 32, 32)
    assert model(long).last_hidden_state.shape == (1, 17, 24)
    states = model.bt_adapter._average_pairs(torch.arange(66.0).view(1, 66, 1, 1))
    assert states.flatten().tolist() == [2 * n + 0.5 for n in range(33)]
    with pytest.raises(ValueError, match="averages pairs of frames above 64 and got 65 frames"):
        model(long[:, :65])


def test_released_window_above_64_frames_averages_pairs():
    """The released tower of LLaVA, written out: the branch on states averaged over pairs of frames."""
    found, full = tower(temporal_window="released"), tower()
    full.load_state_dict(found.state_dict())
    config = found.config
    videos = torch.randn(1, 66, 3, config.image_size, config.image_size)
    with torch.no_grad():
        output = found(videos, output_branch_states=True)
        native = found.vision_model(videos[0], output_hidden_states=True).hidden_states
        pairs = [native[layer + 1].unflatten(0, (33, 2)).mean(1)[None] for layer in config.adapter_layers]
        position = found.vision_model.embeddings.position_embedding.weight
        expected = full.bt_adapter(pairs, native[-1][None], position)
    torch.testing.assert_close(output.branch_patches, expected.patches, atol=3e-5, rtol=0)
    torch.testing.assert_close(output.branch_cls, expected.video_cls, atol=3e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_frames_pass_the_backbone_once(family):
    model = tower(family)
    seen = []
    model.vision_model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    video = videos(3)  # three of four frames
    video = torch.stack([video[0][[0, 0, 1, 0]], video[1], video[0][[1, 1, 1, 1]]])  # held, moving, still
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    with torch.no_grad():
        output = model(video, frame_mask=mask, output_hidden_states=True)
        assert sum(seen) == 2 + 3
        model.encode_frames(video)
        assert seen[-1] == 2 + 4
        seen.clear()
        model(video, output_attentions=True)
        model.train()
        model.vision_model.train()
        model(video)
        model.eval()
    expected = model(video, frame_mask=mask, output_hidden_states=True)  # with gradients: each by itself
    assert seen == [12, 12, 8, 3]
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(output[name], expected[name], atol=1e-6, rtol=1e-5)
    for state, other in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, other, atol=1e-6, rtol=1e-5)
