"""Cached gradients against the gradient of the whole batch, in one process and over two."""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from benchmarks.saved_memory import saved_memory
from bt_adapter_hf.models.modeling_bt_adapter_pretraining import BTAdapterPreTrainingFeatures
from bt_adapter_hf.training.cached_gradients import cached_gradient_step
from tests import tiny_pairs


LOSSES = ("loss", "vtc_loss", "mbta_loss", "mbca_loss")


def make_model(drop_path_rate: float = 0.0, **overrides):
    """In double precision, as the batch: any difference of the method shows there. In single, sums of the same terms
    in another order differ by their rounding alone, on one CPU more than on another."""
    torch.manual_seed(0)
    model = tiny_pairs.model(vision={"drop_path_rate": drop_path_rate}, mask_ratio=0.5, **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "temporal.proj" in name or "video_cls" in name:
                parameter.normal_(std=0.3)
    return model.double().train()


def make_batch(B: int = 8, T: int = 4) -> dict:
    generator = torch.Generator().manual_seed(3)
    words = tiny_pairs.tokenizer()([f"red goes {i}" for i in range(B)], padding=True, return_tensors="pt")
    videos = torch.randn(B, T, 3, 16, 16, generator=generator, dtype=torch.float64)
    return {"pixel_values_videos": videos, **words}


def in_single(model, batch):
    return model.float(), {**batch, "pixel_values_videos": batch["pixel_values_videos"].float()}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(found, expected, relative=1e-11):
    """A value is a sum over at most 8 x 4 x 5 tokens, through some ten layers: 160 * 10 * 2**-53 = 2e-13, and room for
    terms that cancel."""
    assert found.keys() == expected.keys() and len(found) > 20
    for name, gradient in found.items():
        if not name.endswith("k_proj.bias"):  # is zero, but for rounding
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error <= relative, f"{name}: {error:.1e}"


@pytest.mark.parametrize("clips", [2, 3, 8])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"mbta_loss": "mse", "mbta_weight": 1.0},
        {"mbta_pairing": "released", "mbca_weight": 0.0},
        {"order_negatives": "reversed_and_shuffled"},
    ],
)
def test_gradient_of_the_whole_batch(overrides, clips):
    """3 of 8 clips at a time: the last ones are 2."""
    model, batch = make_model(**overrides), make_batch()
    batch |= {"opposite_input_ids": batch["input_ids"].roll(1, dims=0), "has_opposite": torch.arange(8) % 3 > 0}
    torch.manual_seed(1)
    output = model(**batch)
    output.loss.backward()
    expected, state = gradients(model), torch.get_rng_state()
    model.zero_grad()
    torch.manual_seed(1)
    found = cached_gradient_step(model, batch, clips, backward=torch.Tensor.backward)
    assert_equal_gradients(gradients(model), expected)
    for name in LOSSES:
        if name in output:
            torch.testing.assert_close(found[name], output[name], rtol=1e-12, atol=0)
    torch.testing.assert_close(found.video_embeds, output.video_embeds)
    assert not found.loss.requires_grad and torch.equal(torch.get_rng_state(), state)
    alone = make_model(**overrides)  # a contrast of 2 is another loss
    assert alone(**{name: x[:2] for name, x in batch.items()}).vtc_loss < 0.8 * found.vtc_loss


def test_dropped_paths_are_those_of_the_features():
    model, batch = make_model(drop_path_rate=0.6), make_batch()
    batch["row_seeds"] = torch.arange(8)
    parts = [slice(0, 3), slice(3, 6), slice(6, 8)]
    rows = [model(**{name: x[part] for name, x in batch.items()}, return_loss=False) for part in parts]
    model.losses(
        BTAdapterPreTrainingFeatures(**{name: torch.cat([row[name] for row in rows]) for name in rows[0]})
    ).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    cached_gradient_step(model, batch, 3, backward=torch.Tensor.backward)
    assert_equal_gradients(gradients(model), expected)
    model.zero_grad()
    batch["row_seeds"] = torch.arange(8, 16)
    cached_gradient_step(model, batch, 3, backward=torch.Tensor.backward)
    with pytest.raises(AssertionError):
        assert_equal_gradients(gradients(model), expected, relative=0.1)


def test_states_of_the_backbone_in_place_of_pixels():
    model, batch = make_model(), {**make_batch(), "row_seeds": torch.arange(8)}
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    states = model.vision_model.encode_frames(batch.pop("pixel_values_videos"), 3)
    cached_gradient_step(model, {**batch, "backbone_states": states}, 3, backward=torch.Tensor.backward)
    assert_equal_gradients(gradients(model), expected)


def test_a_text_tower_that_learns_learns_the_same():
    model, batch = make_model(), make_batch()
    model.text_projection.requires_grad_(True)
    torch.manual_seed(1)
    model(**batch).loss.backward()
    expected = gradients(model)
    assert "text_projection.weight" in expected
    model.zero_grad()
    torch.manual_seed(1)
    cached_gradient_step(model, batch, 3, backward=torch.Tensor.backward)
    assert_equal_gradients(gradients(model), expected)


def test_a_quarter_of_the_activation_memory():
    model, batch = in_single(make_model(), make_batch(B=16))
    with saved_memory(model) as whole:
        model(**batch).loss.backward()
    with saved_memory(model) as cached:
        cached_gradient_step(model, batch, 4, backward=torch.Tensor.backward)
    assert cached["peak"] < 0.27 * whole["peak"]  # a quarter, and the rows of all clips


@pytest.mark.parametrize("outer", [False, True])
def test_in_half_precision(outer):
    """Autocast around each forward pass, as accelerate has it, or around the whole step."""
    model, batch = in_single(make_model(), make_batch())

    def autocast(enabled=True):
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled)

    torch.manual_seed(1)
    with autocast():
        loss = model(**batch).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    forward = model.forward

    def forward_in_half(*args, **kwargs):
        with autocast():
            return forward(*args, **kwargs)

    if not outer:
        model.forward = forward_in_half
    torch.manual_seed(1)
    with autocast(outer):
        cached_gradient_step(model, batch, 3, backward=torch.Tensor.backward)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name in found:
        if not name.endswith("k_proj.bias"):
            assert torch.nn.functional.cosine_similarity(found[name].flatten(), expected[name].flatten(), 0) > 0.99


def test_a_gradient_scaler_sees_one_scaled_loss():
    model, batch = make_model(), make_batch()
    torch.manual_seed(1)
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    torch.manual_seed(1)
    cached_gradient_step(model, batch, 3, backward=lambda loss: scaler.scale(loss).backward(), scale=0.5)
    assert_equal_gradients({name: g / 512 for name, g in gradients(model).items()}, expected)


def test_no_clips_at_a_time():
    with pytest.raises(ValueError, match="at least 1 clip at a time"):
        cached_gradient_step(make_model(), make_batch(), 0, backward=torch.Tensor.backward)


# Two processes


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, batch = _with_seeds()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    reductions = 0

    def count(state, bucket):
        nonlocal reductions
        reductions += bucket.is_last()
        return allreduce_hook(state, bucket)

    wrapped.register_comm_hook(None, count)
    rows = slice(4 * rank, 4 * rank + 4)
    mine = {name: x[rows] for name, x in batch.items()}
    output = cached_gradient_step(
        wrapped, mine, 3, backward=torch.Tensor.backward, no_sync=wrapped.no_sync, bare=model
    )
    result = {"gradients": gradients(model), "reductions": reductions}
    result["losses"] = {name: output[name] for name in LOSSES}
    torch.save(result, Path(folder, f"rank{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def _with_seeds():
    return make_model(drop_path_rate=0.6), {**make_batch(), "row_seeds": torch.arange(8)}


def test_two_processes_give_the_gradient_of_one(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bt_adapter_hf.training.cached_gradients"])
    processes = [context.Process(target=_work, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    model, batch = _with_seeds()
    output = model(**batch)
    output.loss.backward()
    expected = gradients(model)
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for result in results:
        assert_equal_gradients(result["gradients"], expected)
        assert result["reductions"] == 1
        torch.testing.assert_close(result["losses"]["vtc_loss"], output.vtc_loss, rtol=1e-12, atol=0)
    mean = sum(result["losses"]["mbta_loss"] for result in results) / 2
    torch.testing.assert_close(mean, output.mbta_loss, rtol=1e-12, atol=0)
