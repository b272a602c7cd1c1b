"""Renaming, in both directions, on the released weights of every golden case."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from bt_adapter_hf.conversion import CheckpointError
from bt_adapter_hf.conversion.names import Layout, rename_from_released, rename_to_released
from tests.parity.golden import Golden, cases


@pytest.mark.parametrize("case", [c for p in ("hf_", "eva", "llava_", "pretrain_losses", "text") for c in cases(p)])
def test_round_trip_is_byte_identical(case):
    weights = Golden(case).weights
    renamed = rename_from_released(weights)
    assert not renamed.unknown
    back = rename_to_released(renamed.state, renamed.layout)
    assert back.keys() == weights.keys()
    for key, tensor in weights.items():
        assert back[key].dtype == tensor.dtype and back[key].shape == tensor.shape, key
        assert back[key].contiguous().numpy().tobytes() == tensor.contiguous().numpy().tobytes(), key


@pytest.mark.parametrize("prefix", ["backbone.", "model.vision_tower.", "model.vision_tower.backbone."])
def test_prefixes_are_stripped_and_restored(prefix):
    weights = {prefix + key: tensor for key, tensor in Golden("hf_norm").weights.items()}
    renamed = rename_from_released(weights)
    assert renamed.layout.tower_prefix == prefix
    assert renamed.state.keys() == rename_from_released(Golden("hf_norm").weights).state.keys()
    assert rename_to_released(renamed.state, renamed.layout).keys() == weights.keys()


def test_older_spelling():
    weights = Golden("hf_norm").weights
    older = {key.replace("btadapter", "timesFPN"): tensor for key, tensor in weights.items()}
    assert any("timesFPN" in key for key in older)
    assert rename_from_released(older).state.keys() == rename_from_released(weights).state.keys()


def test_eva_attention_bias():
    """EVA has no key bias: zero on our side, gone on the way back."""
    weights = Golden("eva").weights
    renamed = rename_from_released(weights)
    bias = renamed.state["vision_model.vision_model.encoder.layers.1.self_attn.qkv.bias"]
    q, k, v = bias.chunk(3)
    assert q.equal(weights["blocks.1.attn.q_bias"]) and v.equal(weights["blocks.1.attn.v_bias"])
    assert k.count_nonzero() == 0


def test_projector_file_of_llava():
    tensors = {"model.mm_projector.weight": torch.ones(4, 3), "model.mm_projector.bias": torch.ones(4)}
    renamed = rename_from_released({**tensors, "model.embed_tokens.weight": torch.ones(9, 4)})
    assert sorted(renamed.projector) == ["embed_tokens.weight", "mm_projector.bias", "mm_projector.weight"]
    assert not renamed.state and not renamed.unknown


def test_mixed_families_and_prefixes_are_refused():
    clip, eva = Golden("hf_norm").weights, Golden("eva").weights
    with pytest.raises(CheckpointError, match="mixes families"):
        rename_from_released({**clip, **eva})
    with pytest.raises(CheckpointError, match="mixes prefixes"):
        rename_from_released({**clip, **{f"backbone.{key}": tensor for key, tensor in clip.items()}})


def test_key_without_released_name():
    with pytest.raises(CheckpointError, match="no counterpart"):
        rename_to_released({"vision_model.head.weight": torch.ones(1)}, Layout())


def test_eva_clip_text_tower():
    """open_clip's text tower of EVA-CLIP computes what CLIPTextModel computes with its weights."""
    pytest.importorskip("open_clip")
    from open_clip.transformer import TextTransformer

    torch.manual_seed(0)
    theirs = TextTransformer(context_length=12, vocab_size=50, width=32, heads=4, layers=2, output_dim=24).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    weights = {f"text_backbone.{key}": t for key, t in theirs.state_dict().items() if key != "attn_mask"}
    renamed = rename_from_released(weights)
    assert not renamed.unknown and renamed.layout.family == "eva"
    back = rename_to_released(renamed.state, renamed.layout)
    assert back.keys() == weights.keys() and all(back[key].equal(t) for key, t in weights.items())

    config = CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=12, hidden_act="gelu", bos_token_id=48, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    ours = CLIPTextModel(config).eval()
    projection = renamed.state.pop("text_projection.weight")
    ours.load_state_dict({key.removeprefix("text_model."): t for key, t in renamed.state.items()})
    ids = torch.randint(1, 48, (3, 12))
    ids[:, 0] = 48
    for row, end in enumerate((5, 11, 8)):
        ids[row, end], ids[row, end + 1 :] = 49, 0
    with torch.no_grad():
        expected, found = theirs(ids), ours(input_ids=ids).pooler_output @ projection.t()
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
