"""The three pretraining losses with their gradients, in one process, and the text tower."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from bt_adapter_hf import BTAdapterForPreTraining
from bt_adapter_hf.conversion import convert_original_checkpoint
from bt_adapter_hf.conversion.names import rename_from_released
from bt_adapter_hf.models.modeling_bt_adapter_pretraining import random_tube_mask
from tests.parity.golden import FOLDER, Golden, cases, patch_major


RELEASED = {
    "model_class": BTAdapterForPreTraining,
    "mask_order": "released",
    "mbta_pairing": "released",
    "drop_path_rate": 0.0,
}


@pytest.mark.parametrize("case", cases("pretrain_losses"))
def test_losses_and_gradients(case, compare):
    golden = Golden(case)
    model = convert_original_checkpoint(golden.weights, golden.base, **RELEASED).train()
    input_ids, pixel_values = golden.inputs["input_ids"].long(), golden.inputs["pixel_values"]
    mask = golden.inputs["tube_mask"]
    output = model(input_ids, pixel_values, bool_masked_pos=mask)
    losses = {
        "NCE_loss": output.vtc_loss,
        "branch_text_nce_loss": model.config.mbca_weight * output.mbca_loss,
        "clip_branch_mask_mse_loss": model.config.mbta_weight * output.mbta_loss,
    }
    for name, loss in losses.items():
        compare(case, name, loss, golden.meta["scalars"][f"loss.{name}"], relative=1e-6)

    released = golden.released_name()
    learning = {released[name]: p for name, p in model.named_parameters() if p.requires_grad}
    assert learning.keys() == set(golden.meta["trainable"])
    for name, loss in {**losses, "total": output.loss}.items():
        grads = torch.autograd.grad(loss, list(learning.values()), retain_graph=True, allow_unused=True)
        grads = dict(zip(learning, grads, strict=True))
        norms = {
            key.removeprefix(f"gradnorm.{name}."): value
            for key, value in golden.meta["scalars"].items()
            if key.startswith(f"gradnorm.{name}.") and "k_proj.bias" not in key
        }
        assert norms
        for key, norm in norms.items():
            found = 0.0 if grads[key] is None else grads[key].norm()
            if norm == 0:
                assert found == 0, key
            else:
                compare(case, f"gradient norms of {name}", found, norm, relative=1e-5)
        for key, expected in golden.outputs.items():
            if key.startswith(f"grad.{name}."):
                key = key.removeprefix(f"grad.{name}.")
                compare(case, f"gradient of {key}", grads[key].flatten(), expected.flatten(), relative=1e-5)

    with torch.no_grad():
        states = model.get_video_features(pixel_values, bool_masked_pos=mask, output_branch_states=True)
        text = model.get_text_features(input_ids)
    compare(case, "video_embed", states.pooler_output, golden.outputs["video_embed"], absolute=1e-5)
    compare(case, "text_embed", text.pooler_output, golden.outputs["text_embed"], absolute=1e-5)
    compare(case, "text_tokens", text.last_hidden_state, golden.outputs["text_tokens"], absolute=1e-5)
    branch = torch.cat([states.branch_cls, patch_major(states.branch_patches)], dim=1)
    compare(case, "branch_last", branch, golden.outputs["branch_last"], of_maximum=2e-6)
    compare(case, "clip_last", states.backbone_state.flatten(0, 1), golden.outputs["clip_last"], of_maximum=2e-6)


@pytest.mark.parametrize("case", cases("text"))
def test_text_tower_pools_at_the_largest_id(case, compare):
    golden = Golden(case)
    state = rename_from_released(golden.weights).state
    config = CLIPTextConfig(**golden.meta["clip_config"]["text"], bos_token_id=0, eos_token_id=2, pad_token_id=0)
    model = CLIPTextModel(config).eval()
    projection = state.pop("text_projection.weight")
    model.load_state_dict({key.removeprefix("text_model."): tensor for key, tensor in state.items()})
    ids = golden.inputs["input_ids"].long()
    with torch.no_grad():
        output, short = model(input_ids=ids), model(input_ids=ids[:, :-2])
    compare(case, "text_tokens", output.last_hidden_state, golden.outputs["text_tokens"], absolute=1e-5)
    compare(case, "text_embed", output.pooler_output @ projection.t(), golden.outputs["text_embed"], absolute=1e-5)
    expected = golden.outputs["text_embed_short"]
    compare(case, "text_embed_short", short.pooler_output @ projection.t(), expected, absolute=1e-5)


def test_tube_masks_drop_as_many_patches():
    import json

    for row in json.loads((FOLDER / "tube_masks.json").read_text())["rows"]:
        mask = random_tube_mask(torch.arange(row["B"]), row["P"], row["ratio"])
        assert mask.sum(dim=1).tolist() == [row["masked_per_frame"]] * row["B"]
