"""One training step in other ways: activations checkpointed, in half precision, compiled."""

import pytest
import torch

from benchmarks.saved_memory import saved_memory
from bt_adapter_hf.models.modeling_bt_adapter_branch import BTAdapterLayer
from tests import tiny_pairs
from tests.training.run_pretraining import run
from tests.training.test_cached_gradients import assert_equal_gradients, gradients, make_batch, make_model


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return tiny_pairs.write_table(tmp_path_factory.mktemp("clips"), rows=8).parent


def logged(trainer, *names):
    return [tuple(entry[name] for name in names) for entry in trainer.state.log_history if names[0] in entry]


def step(model, batch, **inputs):
    torch.manual_seed(1)
    model.zero_grad()
    output = model(**batch, **inputs)
    output.loss.backward()
    return output


# Activation checkpointing


def test_only_branch_layers_are_checkpointed_and_the_gradients_are_the_same():
    model, batch = make_model(drop_path_rate=0.5), make_batch()
    with saved_memory(model) as plain:
        loss = step(model, batch).loss
    expected = gradients(model)
    model.activation_checkpointing_enable()
    checkpointed = []
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = lambda forward, *args, module=module, function=function: (
                checkpointed.append(module),
                function(forward, *args),
            )[1]
    with saved_memory(model) as less:
        assert step(model, batch).loss == loss
    assert_equal_gradients(gradients(model), expected, relative=0)
    assert checkpointed == list(model.vision_model.bt_adapter.layers)
    assert all(isinstance(layer, BTAdapterLayer) for layer in checkpointed)
    assert less["peak"] < 0.75 * plain["peak"]  # K inputs and one layer, instead of K layers; here K is 2
    checkpointed.clear()
    model.eval()
    with torch.no_grad():
        model(**batch)
    assert not checkpointed


def test_trainer_switches_it_on(clips, tmp_path):
    plain = run(clips, tmp_path / "plain", batch=4, max_steps=3, eval_strategy="no", save_strategy="no")
    options = {"activation_checkpointing": True, "eval_strategy": "no", "save_strategy": "no"}
    checkpointed = run(clips, tmp_path / "checkpointed", batch=4, max_steps=3, **options)
    assert checkpointed.model.is_activation_checkpointing
    assert logged(checkpointed, "loss", "grad_norm") == logged(plain, "loss", "grad_norm")


# Cached gradients and half precision


def test_cached_gradients_in_the_trainer(clips, tmp_path):
    options = {"max_steps": 3, "eval_strategy": "no", "save_strategy": "no"}
    names = ("loss", "vtc_loss", "mbta_loss", "mbca_loss", "grad_norm", "learning_rate")
    plain = logged(run(clips, tmp_path / "a", batch=8, **options), *names)
    cached = logged(run(clips, tmp_path / "b", batch=8, cached_gradient_batch_size=3, **options), *names)
    for a, b in zip(plain, cached, strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    halved = logged(run(clips, tmp_path / "c", batch=8, bf16=True, **options), *names)
    both = logged(run(clips, tmp_path / "d", batch=8, bf16=True, cached_gradient_batch_size=3, **options), *names)
    assert [row[2] for row in halved] == pytest.approx([row[2] for row in plain], rel=0.01) and halved != plain
    assert [row[2] for row in both] == pytest.approx([row[2] for row in halved], rel=0.01) and both != cached


def test_contrast_keeps_its_digits_under_autocast():
    """At a temperature of 0.01 logits in bfloat16 would be off by up to 0.2."""
    from bt_adapter_hf.models.modeling_bt_adapter_pretraining import contrastive_loss

    x, y = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0)).unbind()
    y = x + 0.5 * y
    expected = contrastive_loss(x, y, 0.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(x, y, 0.01), expected)


def test_a_scaled_loss_in_half_precision():
    """float16 with a gradient scaler, as TrainingArguments(fp16=True) does it on a GPU."""
    model, batch = make_model(), make_batch()
    step(model, batch)
    expected = gradients(model)
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.float16):
        loss = model(**batch).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    found = gradients(model)
    for name in found:
        if not name.endswith("k_proj.bias"):
            assert torch.nn.functional.cosine_similarity(found[name].flatten(), expected[name].flatten(), 0) > 0.99
    scaler.step(optimizer)


# Compiled


def compiled_step(backend, **inputs):
    model, batch = make_model(), make_batch()
    output = step(model, batch, **inputs)  # first of all: transformers installs its hooks in the first call
    expected = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(step(compiled, batch, **inputs).loss, output.loss, rtol=1e-5, atol=0)
    assert_equal_gradients(gradients(model), expected, relative=1e-4)


def test_the_step_is_one_graph():
    """No value of the mask is read back on the way: a graph break would be an error."""
    compiled_step("eager")


@pytest.mark.slow
def test_compiled_step_learns_the_same():
    mask = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)).argsort(dim=1) < 2
    compiled_step("inductor", bool_masked_pos=mask, kept_patches=2)


@pytest.mark.slow
def test_compiled_by_the_trainer(clips, tmp_path):
    options = {"max_steps": 3, "eval_strategy": "no", "save_strategy": "no"}
    plain = run(clips, tmp_path / "plain", batch=4, **options)
    compiled = run(clips, tmp_path / "compiled", batch=4, torch_compile=True, **options)
    for a, b in zip(logged(plain, "loss", "grad_norm"), logged(compiled, "loss", "grad_norm"), strict=True):
        assert b == pytest.approx(a, rel=1e-3)
    assert (tmp_path / "compiled" / "final" / "model.safetensors").is_file()


def test_compiled_and_cached_is_refused(tmp_path):
    from bt_adapter_hf.training.arguments import BTAdapterTrainingArguments

    with pytest.raises(ValueError, match="cached_gradient_batch_size does not work with torch_compile"):
        BTAdapterTrainingArguments(output_dir=tmp_path, torch_compile=True, cached_gradient_batch_size=2)
    with pytest.raises(ValueError, match="cached_gradient_batch_size=0 must be at least 1"):
        BTAdapterTrainingArguments(output_dir=tmp_path, cached_gradient_batch_size=0)
