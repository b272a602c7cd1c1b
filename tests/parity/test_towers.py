"""Video towers: the retrieval tower of the release, its EVA variant, and LLaVA's tower."""

import pytest
import torch

from bt_adapter_hf.conversion import convert_original_checkpoint
from tests.parity.golden import Golden, cases, patch_major


EMBED, STATE = {"absolute": 1e-5}, {"of_maximum": 2e-6}


def run(tower, pixel_values, **kwargs):
    """Output with the branch's states, and the output of the first branch layer in released order."""
    first = {}

    def keep(module, args, output):
        first["state"] = torch.cat([output[1], patch_major(output[0])], dim=1)

    handle = tower.bt_adapter.layers[0].register_forward_hook(keep)
    with torch.no_grad():
        output = tower(pixel_values, output_branch_states=True, **kwargs)
    handle.remove()
    return output, first["state"]


def branch_state(output):
    return torch.cat([output.branch_cls, patch_major(output.branch_patches)], dim=1)


@pytest.mark.parametrize("case", [*cases("hf_"), *cases("eva")])
def test_retrieval_tower(case, compare):
    golden = Golden(case)
    W, pixel_values = golden.weights, golden.inputs["pixel_values"]
    tower = convert_original_checkpoint(W, golden.base, mask_order="released")
    name = "head" if "head.weight" in W else "visual_projection"
    bias = W.get(f"{name}.bias", torch.zeros(len(W[f"{name}.weight"])))

    def project(x):
        return x @ W[f"{name}.weight"].t() + bias

    runs = {"eval": (pixel_values, None), "image": (pixel_values[:, :1], None)}
    runs["mask"] = (pixel_values, golden.inputs["tube_mask"])
    if "random_mask" in golden.inputs:
        runs["randmask"] = (pixel_values, golden.inputs["random_mask"])
    compared = 0
    for kind, (pixels, mask) in runs.items():
        expected = {k.removeprefix(f"{kind}."): v for k, v in golden.outputs.items() if k.startswith(f"{kind}.")}
        if not expected:
            continue
        output, first = run(tower, pixels, bool_masked_pos=mask)
        final = output.backbone_state.flatten(0, 1)
        joined = output.backbone_state[:, :, 0], output.branch_cls
        if "balance1" in W:
            gate = torch.sigmoid(1e4 * W["balance1"])
            joined = gate * joined[0] + (1 - gate) * joined[1]
        else:
            joined = joined[0] + joined[1]
        norm = tower.vision_model.post_layernorm
        found = {
            "video_embed": (project(output.pooler_output), EMBED),
            "cls_per_frame": (norm(joined).flatten(0, 1), EMBED),
            "per_frame_embed": (project(norm(joined)), EMBED),
            "branch_text_feature": (project(output.branch_patches).mean(dim=(1, 2)), EMBED),
            "branch_last": (branch_state(output), STATE),
            "branch_after_first": (first, STATE),
            "clip_last": (final, STATE),
        }
        if "clip_first" in expected:
            entry = tower.config.adapter_layers[0] + 1
            with torch.no_grad():
                states = tower.vision_model(pixels.flatten(0, 1), output_hidden_states=True).hidden_states
            found["clip_first"] = (states[entry], STATE)
        for quantity in expected:
            compare(case, f"{kind} {quantity}", found[quantity][0], expected[quantity], **found[quantity][1])
            compared += 1
    assert compared == len(golden.outputs)


@pytest.mark.parametrize("case", cases("llava_"))
def test_llava_tower(case, compare):
    golden = Golden(case)
    options = {"cls_position": "last", "temporal_window": "released"}
    tower = convert_original_checkpoint(golden.weights, golden.base, **options)
    L = tower.config.num_hidden_layers
    # The tower that LLaVA trains with: three backbone layers under new numbers, three branch layers.
    cached_weights = {}
    for key in golden.meta.get("train_keys", golden.weights):
        number = key.split(".")[1] if key.startswith("layers.") else None
        source = key if number is None else key.replace(f".{number}.", f".{int(number) + L - 4}.", 1)
        if key in golden.meta.get("train_keys", ()):
            cached_weights[f"model.vision_tower.{key}"] = golden.weights[source]
    cached = None
    if cached_weights:
        cached = convert_original_checkpoint(cached_weights, tower.vision_model, **options)
        assert cached.config.adapter_layers == tower.config.adapter_layers[:3]
    compared = 0
    for key, pixel_values in golden.inputs.items():
        tag = key.removesuffix("pixel_values")
        videos = pixel_values[None] if pixel_values.ndim == 4 else pixel_values
        with torch.no_grad():
            output = tower(videos, output_hidden_states=[-2, -3], output_branch_states=True)
            native = tower.vision_model(videos.flatten(0, 1), output_hidden_states=True).hidden_states
        found = {
            "full.h-2": (output.hidden_states[-2], EMBED),
            "full.h-3": (output.hidden_states[-3], EMBED),
            "full.h-1.clip": (output.backbone_state.flatten(0, 1), STATE),
            "full.h-1.branch": (branch_state(output), STATE),
            "infer_tokens": (output.hidden_states[-2][0], EMBED),
            "cached": (native[L - 4], STATE),
        }
        if f"{tag}train.h-1" in golden.outputs:
            trained = cached or convert_original_checkpoint(golden.weights, golden.base, **options)
            both = torch.cat([videos, videos.flip(1)])
            with torch.no_grad():
                states = trained(both, output_hidden_states=-2).hidden_states[-2]
            found |= {"train.h-1": (states[:1], EMBED), "train.h-1.batch2": (states, EMBED)}
        for quantity, expected in golden.outputs.items():
            if not quantity.startswith(tag):
                continue
            short = quantity.removeprefix(tag)
            if short == "full.pooler":  # the release leaves the mean over the frames to the caller
                compare(case, quantity, output.pooler_output[0], expected.mean(dim=0), **EMBED)
            else:
                compare(case, quantity, found[short][0], expected, **found[short][1])
            compared += 1
    assert compared == len(golden.outputs)
