"""Masking and the three losses against naive ones; what learns and what does not."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bt_adapter_hf.models.modeling_bt_adapter_pretraining import (
    contrastive_loss,
    order_contrastive_loss,
    order_is_seen,
    other_orders,
    random_tube_mask,
)
from tests import tiny_pairs


def batch(B: int = 4, T: int = 3) -> dict:
    generator = torch.Generator().manual_seed(3)
    words = tiny_pairs.tokenizer()([f"red goes {i}" for i in range(B)], padding=True, return_tensors="pt")
    return {"pixel_values_videos": torch.randn(B, T, 3, 16, 16, generator=generator), **words}


def model(seed: int = 0, **overrides):
    torch.manual_seed(seed)
    made = tiny_pairs.model(**overrides)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "temporal.proj" in name or "video_cls" in name:
                parameter.normal_(std=0.3)
    return made


def test_tube_masks_drop_the_floor_of_the_share_drawn_per_video():
    mask = random_tube_mask(torch.arange(64), 256, 0.7)
    assert mask.shape == (64, 256) and (mask.sum(1) == 179).all()  # int(0.7 * 256)
    assert len({tuple(row.tolist()) for row in mask}) == 64
    assert (random_tube_mask(torch.arange(3), 196, 0.7).sum(1) == 137).all()
    # every patch is dropped about equally often
    assert ((random_tube_mask(torch.arange(4000), 16, 0.5).float().mean(0) - 0.5).abs() < 0.05).all()


def naive_contrast(x, y, temperature):
    x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    total = 0.0
    for a, b in ((x, y), (y, x)):
        for m in range(len(a)):
            scores = torch.stack([a[m] @ b[n] / temperature for n in range(len(b))])
            total -= (scores[m] - scores.logsumexp(0)) / len(a)
    return total


def test_contrastive_loss_is_the_sum_of_both_directions():
    x, y = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    torch.testing.assert_close(contrastive_loss(x, y, 0.1), naive_contrast(x, y, 0.1))
    assert contrastive_loss(x[:1], y[:1], 0.1) == 0


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_losses_equal_naive_ones(kind, masked):
    pretraining = model(mbta_loss=kind, temperature=0.1, vtc_weight=2.0, mbta_weight=3.0, mbca_weight=0.5).eval()
    inputs = batch()
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool) if masked else None
    output = pretraining(**inputs, bool_masked_pos=mask)

    tower = pretraining.vision_model
    states = tower(inputs["pixel_values_videos"], bool_masked_pos=mask, output_branch_states=True)
    project, head = pretraining.visual_projection, pretraining.mbta_head
    text = pretraining.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    distances, patch_means = [], []
    for b in range(4):
        kept = [p for p in range(4) if mask is None or not mask[b, p]]
        projected = []
        for t in range(3):
            for m, p in enumerate(kept):
                student, teacher = states.branch_patches[b, t, m], states.backbone_state[b, t, 1 + p]
                projected.append(project(student))
                if kind == "cosine":
                    student = head["norm"](head["linear"](student))
                    teacher = project(tower.vision_model.post_layernorm(teacher))
                    student, teacher = student / student.norm(), teacher / teacher.norm()
                else:
                    student, teacher = head["linear"](student), project(teacher)
                distances.append((student - teacher).square().sum())
        patch_means.append(torch.stack(projected).mean(0))
    video = project(states.pooler_output)
    torch.testing.assert_close(output.vtc_loss, naive_contrast(video, text, 0.1))
    torch.testing.assert_close(output.mbca_loss, naive_contrast(torch.stack(patch_means), text, 0.1))
    torch.testing.assert_close(output.mbta_loss, torch.stack(distances).mean())
    total = 2.0 * output.vtc_loss + 3.0 * output.mbta_loss + 0.5 * output.mbca_loss
    torch.testing.assert_close(output.loss, total)
    torch.testing.assert_close(output.video_embeds, video / video.norm(dim=1, keepdim=True))


def test_a_mask_is_drawn_in_training_only():
    pretraining, seen = model(mask_ratio=0.5), []
    pretraining.vision_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["bool_masked_pos"]), with_kwargs=True
    )
    torch.manual_seed(0)
    first = pretraining.train()(**batch()).loss
    torch.manual_seed(0)
    second = pretraining(**batch()).loss
    assert torch.equal(first, second)  # the mask and the dropped paths follow torch's generator
    pretraining.eval()(**batch())
    assert (seen[0].sum(1) == 2).all() and torch.equal(seen[0], seen[1]) and seen[2] is None


def test_only_branch_and_head_learn_and_all_of_them():
    pretraining = model(mask_ratio=0.5).train()
    assert not pretraining.text_model.training and not pretraining.vision_model.vision_model.training
    pretraining(**batch()).loss.backward()
    learning = {name for name, p in pretraining.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in pretraining.named_parameters() if "bt_adapter." in name or "mbta_" in name}
    assert all(p.grad is not None for name, p in pretraining.named_parameters() if name in learning)
    assert all(p.grad is None for name, p in pretraining.named_parameters() if name not in learning)


def test_losses_of_weight_zero_are_not_computed():
    pretraining = model(mbta_weight=0.0, mbca_weight=0.0).train()
    assert pretraining.mbta_head is None
    output = pretraining(**batch())
    assert output.mbta_loss is None and output.mbca_loss is None
    assert torch.equal(output.loss, output.vtc_loss)
    output.loss.backward()
    assert all(p.grad is not None for p in pretraining.parameters() if p.requires_grad)


def test_a_few_steps_lower_the_loss():
    pretraining = model(mask_ratio=0.5, temperature=0.1).train()
    optimizer = torch.optim.AdamW([p for p in pretraining.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(30):
        loss = pretraining(**batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses[-5:]) < 0.95 * min(losses[:5])


def test_mispaired_batches_are_refused():
    inputs = batch()
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:3]
    with pytest.raises(ValueError, match="found 4 texts, 3 videos"):
        model()(**inputs)


# ----------------------------------------------------------------------------------------------- several processes


CONTRASTS = ({}, {"order_negatives": "reversed_and_shuffled"})


def _gradients_of_rank(rank: int, world: int, port: int, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    inputs = {key: value.chunk(world)[rank] for key, value in _batch_with_opposites().items()}
    wrapped = [torch.nn.parallel.DistributedDataParallel(_without_chance(**fields)) for fields in CONTRASTS]
    results[rank] = [_gradients(one, inputs) for one in wrapped]
    dist.destroy_process_group()


def _batch_with_opposites() -> dict:
    """Only a contrast with other orders reads them, and the seeds are of shuffled frames alone."""
    inputs = batch()
    opposites = {
        "opposite_input_ids": inputs["input_ids"].roll(1, dims=0),
        "opposite_attention_mask": inputs["attention_mask"].roll(1, dims=0),
        "has_opposite": torch.tensor([True, False, True, True]),
    }
    return {**inputs, **opposites, "row_seeds": torch.arange(4)}


def _without_chance(**fields):
    pretraining = model(mask_ratio=0.0, temperature=0.1, **fields)
    for module in pretraining.modules():
        if hasattr(module, "rate"):
            module.rate = 0.0
    return pretraining.train()


def _gradients(wrapped, inputs) -> dict:
    wrapped(**inputs).loss.backward()
    return {name.removeprefix("module."): p.grad for name, p in wrapped.named_parameters() if p.requires_grad}


def test_two_processes_give_the_gradient_of_the_global_batch():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_gradients_of_rank, args=(2, port, results), nprocs=2)
        ranks = dict(results)
    for number, fields in enumerate(CONTRASTS):
        expected = _gradients(_without_chance(**fields), _batch_with_opposites())
        for name, gradient in expected.items():
            if name.endswith("k_proj.bias"):  # zero up to rounding
                continue
            for rank in range(2):
                bound = {"rtol": 1e-4, "atol": 1e-6 * gradient.abs().max().item()}
                torch.testing.assert_close(ranks[rank][number][name], gradient, **bound)


def naive_order_contrast(video, text, reversed, shuffled, opposite, usable, moves, paired, temperature):
    """Row by row, with only what is there in each sum."""
    unit = lambda x: torch.nn.functional.normalize(x, dim=-1)  # noqa: E731
    video, text, reversed, opposite = unit(video), unit(text), unit(reversed), unit(opposite)
    videos = [*video, *reversed[usable], *([] if shuffled is None else unit(shuffled)[moves])]
    texts = [*text, *opposite[paired]]
    pairs = [*zip(video, text, strict=True), *zip(reversed[paired], opposite[paired], strict=True)]
    to_text = [
        (x @ y / temperature) - torch.stack([x @ z / temperature for z in texts]).logsumexp(0) for x, y in pairs
    ]
    to_video = [
        (x @ y / temperature) - torch.stack([z @ y / temperature for z in videos]).logsumexp(0) for x, y in pairs
    ]
    return -torch.stack(to_text).mean() - torch.stack(to_video).mean()


@pytest.mark.parametrize("shuffles", (False, True))
def test_copies_in_another_order_are_wrong_clips_and_opposite_captions_wrong_texts(shuffles):
    video, text, reversed, shuffled, opposite = torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(2))
    usable = torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    moves = torch.tensor([1, 1, 1, 1, 1, 0]).bool()
    paired = torch.tensor([1, 0, 0, 1, 1, 0]).bool()
    distinct = torch.stack([usable, moves, paired], dim=1).float()
    shuffled = shuffled if shuffles else None
    expected = naive_order_contrast(video, text, reversed, shuffled, opposite, usable, moves, paired, 0.1)
    found = order_contrastive_loss(video, text, 0.1, reversed, shuffled, opposite, distinct)
    torch.testing.assert_close(found, expected)
    nothing = order_contrastive_loss(video, text, 0.1, reversed, shuffled, opposite, 0 * distinct)
    torch.testing.assert_close(nothing, contrastive_loss(video, text, 0.1))


def test_order_is_seen_in_movements_and_not_in_symmetric_or_still_clips():
    t = torch.linspace(0, 1, 8)
    noise = 1e-3 * torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(0))
    ways = [t, t**3, (t > 0.6).float(), (2 * t - 1).abs(), (6.2832 * t).cos(), 0 * t]  # the last three: symmetric
    clips = torch.stack(ways)[..., None] * torch.tensor([1.0, -1, 2, 0.5]) + 1 + noise
    orders = other_orders(torch.arange(6), 8)
    assert order_is_seen(clips, orders["reversed"]).tolist() == [True, True, True, False, False, False]
    assert order_is_seen(clips, orders["shuffled"])[[0, 5]].tolist() == [True, False]
    assert sorted(orders["shuffled"][0].tolist()) == list(range(8))
    assert orders["shuffled"].unique(dim=0).shape == (6, 8)  # each its own


def test_there_and_back_is_symmetric_at_random_times_too():
    """As training draws them: one frame somewhere in each of eight equal parts."""
    t = (torch.arange(8) + torch.rand(200, 8, generator=torch.Generator().manual_seed(0))) / 8
    place = torch.linspace(0, 1, 16)
    there, back = ((-100 * (place - way[..., None]).square()).exp() for way in (t, 1 - (2 * t - 1).abs()))
    backwards = other_orders(torch.arange(200), 8)["reversed"]
    assert order_is_seen(there, backwards, slack=1).all()
    assert order_is_seen(back, backwards).sum() > 60 and order_is_seen(back, backwards, slack=1).sum() <= 12
    # the model looks so where no caption says more
    reading, words = model(order_negatives="reversed").train(), batch(200)
    videos = back[:, :, None, None].expand(200, 8, 3, 16, 16)
    rows = reading(**{**words, "pixel_values_videos": videos}, return_loss=False)
    assert rows.distinct[:, 0].sum() <= 12


def test_symmetric_clips_are_not_pushed_away_from_their_reverse():
    pretraining = model(mask_ratio=0.5, order_negatives="reversed_and_shuffled").train()
    inputs = batch(4, 4)
    inputs["pixel_values_videos"][1] = inputs["pixel_values_videos"][1, [0, 1, 1, 0]]
    opposite = inputs["input_ids"].roll(1, dims=0)
    opposite[2] = inputs["input_ids"][2]  # a caption that is its own opposite: known to be symmetric
    known = torch.tensor([True, True, True, False])
    rows = pretraining(
        **inputs, opposite_input_ids=opposite, has_opposite=known, row_seeds=torch.arange(4), return_loss=False
    )
    assert rows.distinct[:, 0].tolist() == [1, 0, 0, 1]  # the reversed copy is a wrong clip
    assert rows.distinct[:, 2].tolist() == [1, 0, 0, 0]  # and belongs to the opposite caption
    again = pretraining(**{**inputs, "pixel_values_videos": inputs["pixel_values_videos"].flip(1)},
                        row_seeds=torch.arange(4), return_loss=False)  # fmt: skip
    torch.testing.assert_close(rows.reversed, again.video)  # the same masks
    pretraining.losses(rows).loss.backward()
    pretraining.eval()
    assert pretraining(**inputs, return_loss=False).reversed is None  # in training alone


def test_a_copy_shuffled_into_the_reverse_is_no_wrong_clip_of_the_opposite_caption():
    pretraining = model(order_negatives="reversed_and_shuffled").train()
    for T in (2, 3):
        inputs = {**batch(4, 4), "row_seeds": torch.arange(4) + 12}
        inputs["pixel_values_videos"] = torch.arange(T).float().view(1, T, 1, 1, 1).expand(4, T, 3, 16, 16).clone()
        rows = pretraining(**inputs, opposite_input_ids=inputs["input_ids"].roll(1, dims=0), return_loss=False)
        orders = other_orders(inputs["row_seeds"], T)["shuffled"].tolist()
        assert [T - 1 - t for t in range(T)] in orders
        third = [order not in ([*range(T)], [*range(T)][::-1]) for order in orders]
        assert rows.distinct[:, 1].tolist() == third and rows.distinct[:, 2].all()


def test_clips_of_one_frame_have_no_order_to_read():
    plain, inputs = model(mask_ratio=0.5).train(), {**batch(4, 1), "row_seeds": torch.arange(4)}
    reading = model(mask_ratio=0.5, order_negatives="reversed_and_shuffled").train()
    reading.load_state_dict(plain.state_dict())
    opposite = inputs["input_ids"].roll(1, dims=0)
    torch.testing.assert_close(reading(**inputs, opposite_input_ids=opposite).loss, plain(**inputs).loss)


def test_states_of_the_backbone_stand_in_for_pixels():
    pretraining = model(mask_ratio=0.5, order_negatives="reversed").train()
    inputs, seeds = batch(), torch.arange(4)
    expected = pretraining(**inputs, row_seeds=seeds)
    videos = inputs.pop("pixel_values_videos")
    states = pretraining.vision_model.encode_frames(videos, pretraining.config.vision_config.num_hidden_layers)
    torch.testing.assert_close(pretraining(**inputs, backbone_states=states, row_seeds=seeds).loss, expected.loss)
    with pytest.raises(ValueError, match="4 texts, 3 videos"):
        pretraining(**inputs, backbone_states={n: x[:3] for n, x in states.items()})
    with pytest.raises(ValueError, match="clips of one length"):
        pretraining(**inputs, pixel_values_videos=videos, frame_mask=torch.ones(videos.shape[:2]))
