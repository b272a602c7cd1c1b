"""Whole conversions: which model comes out, what it takes from a base, and what is refused."""

import math

import pytest
import torch
from transformers import Blip2VisionModel, CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from bt_adapter_hf import BTAdapterForPreTraining, BTAdapterModel, BTAdapterVisionModel
from bt_adapter_hf.conversion import (
    CheckpointError,
    convert_original_checkpoint,
    convert_to_original,
    plan_conversion,
    read_llava_projector,
)
from tests.parity.golden import Golden


@pytest.fixture(scope="module")
def dual() -> Golden:
    return Golden("pretrain_losses")


@pytest.fixture(scope="module")
def clip(dual) -> CLIPModel:
    torch.manual_seed(1)
    return CLIPModel(dual.base)


def branch_file(golden: Golden, layers: int) -> dict[str, torch.Tensor]:
    """As LLaVA's tuning writes btadapter_weight.bin: the names with `btadapter`, the first three layers, no gates."""
    kept = {}
    for key, tensor in golden.weights.items():
        parts = key.split(".")
        if "btadapter" in key and (not parts[0].endswith("_layers") or int(parts[1]) < layers):
            kept[f"model.vision_tower.{key}"] = tensor
    return kept


def test_full_checkpoint_gives_a_dual_encoder(dual, tmp_path):
    torch.save({"state_dict": dual.weights, "meta": {}}, tmp_path / "epoch_1.pth")
    model = convert_original_checkpoint(tmp_path / "epoch_1.pth", dual.base)
    assert type(model) is BTAdapterModel and not model.training
    assert model.config.vision_config.adapter_layers == [2, 3, 4, 5]
    assert (model.config.vision_config.fusion, model.config.vision_config.output_fusion) == ("gate", "gate")
    assert model.config.vision_config.mask_order == "tube" and model.config.mbta_pairing == "matched"
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    back = convert_to_original(model)
    assert dual.weights.keys() - back.keys() == {key for key in dual.weights if key.startswith("extra_proj")}
    assert all(back[key].equal(dual.weights[key]) for key in back)
    model.save_pretrained(tmp_path / "out")
    again = BTAdapterModel.from_pretrained(tmp_path / "out")
    assert all(tensor.equal(again.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_alignment_head_is_kept_on_request(dual):
    model = convert_original_checkpoint(dual.weights, dual.base, model_class=BTAdapterForPreTraining)
    assert type(model) is BTAdapterForPreTraining
    back = convert_to_original(model)
    assert back.keys() == dual.weights.keys() and all(back[key].equal(tensor) for key, tensor in dual.weights.items())


def test_tower_out_of_a_full_checkpoint(dual):
    plan = plan_conversion(dual.weights, dual.base, model_class=BTAdapterVisionModel)
    assert any("text tower" in note for note in plan.notes) and any("alignment head" in note for note in plan.notes)
    tower = plan.build()
    assert type(tower) is BTAdapterVisionModel
    back = convert_to_original(tower, "backbone.")
    assert all(back[key].equal(dual.weights[key]) for key in back)


def test_the_callers_tensors_stay_the_callers(dual):
    model = convert_original_checkpoint(dual.weights, dual.base)
    with torch.no_grad():
        model.vision_model.bt_adapter.time_embedding.weight.zero_()
    assert dual.weights["backbone.btadapter_time_embed.weight"].abs().sum() > 0


def test_tower_file_takes_text_from_the_base(clip):
    golden = Golden("hf_norm")
    model = convert_original_checkpoint(golden.weights, clip)
    assert type(model) is BTAdapterModel
    assert model.text_projection.weight.equal(clip.text_projection.weight)
    assert model.visual_projection.weight.equal(golden.weights["visual_projection.weight"])
    own = model.vision_model.vision_model.embeddings.patch_embedding.weight
    assert own.equal(golden.weights["patch_embedding.weight"])
    assert model.logit_scale.equal(clip.logit_scale)


def test_llava_branch_file_attaches_below_the_last_layer(dual, clip, caplog):
    golden = Golden("llava_norm")
    weights = branch_file(golden, layers=3)
    tower = convert_original_checkpoint(weights, clip.vision_model)
    assert tower.config.adapter_layers == [2, 3, 4]
    assert tower.bt_adapter.fusion_gate.count_nonzero() == 0 and tower.config.fusion == "gate"
    assert tower.vision_model is not clip.vision_model
    for key, tensor in tower.vision_model.state_dict().items():
        assert tensor.equal(clip.vision_model.state_dict()[key])
    back = convert_to_original(tower, "model.vision_tower.")
    assert all(back[key].equal(tensor) for key, tensor in weights.items())


def test_llavas_cached_tower_does_not_overwrite_the_first_layers(clip):
    """The released loader puts the cached tower's layers 0..2 onto the backbone's layers 0..2."""
    golden = Golden("llava_norm")
    weights = branch_file(golden, layers=3)
    weights |= {f"model.vision_tower.{key}": golden.weights[key] for key in ("balance1", "balance2")}
    for key, tensor in golden.weights.items():
        for cached in range(3):
            if key.startswith(f"layers.{cached + 2}."):
                weights[f"model.vision_tower.layers.{cached}." + key.split(".", 2)[2]] = tensor
    tower = convert_original_checkpoint(weights, clip.vision_model)
    layers = tower.vision_model.encoder.layers
    assert layers[0].mlp.fc1.weight.equal(clip.vision_model.encoder.layers[0].mlp.fc1.weight)
    assert layers[3].mlp.fc1.weight.equal(golden.weights["layers.3.mlp.fc1.weight"])


def test_base_by_path(clip, tmp_path):
    clip.save_pretrained(tmp_path / "clip")
    model = convert_original_checkpoint(branch_file(Golden("llava_norm"), layers=3), tmp_path / "clip")
    assert type(model) is BTAdapterModel
    own = model.vision_model.vision_model.encoder.layers[5].mlp.fc1.weight
    assert own.equal(clip.vision_model.encoder.layers[5].mlp.fc1.weight)


def test_eva_branch_on_a_tower_without_the_last_layer():
    golden = Golden("eva")
    config = golden.base
    config.num_hidden_layers = 4  # as the towers of BLIP-2 have 39 of the 40
    torch.manual_seed(0)
    base = Blip2VisionModel(config)
    branch = {key: tensor for key, tensor in golden.weights.items() if "btadapter" in key}
    plan = plan_conversion(branch, base, adapter_layers=[1, 2, 3, 4])
    assert any("first 3 branch layers" in note for note in plan.notes)
    tower = plan.build()
    assert tower.config.adapter_layers == [1, 2, 3] and len(tower.bt_adapter.layers) == 3
    assert tower.config.fusion == tower.config.output_fusion == "sum"
    rates = [layer.spatial.drop_path.rate for layer in tower.bt_adapter.layers]
    assert rates == pytest.approx([0, 0.1 / 3, 0.2 / 3])


def test_eva_branch_on_the_real_depths():
    """40 and 39 layers: nobody needs to say which layers feed the released branch."""
    golden = Golden("eva")
    branch = {key: tensor for key, tensor in golden.weights.items() if "btadapter" in key}
    for depth, layers in ((40, [36, 37, 38, 39]), (39, [36, 37, 38])):
        config = golden.base
        config.num_hidden_layers = depth
        assert plan_conversion(branch, Blip2VisionModel(config)).config.adapter_layers == layers


def test_eva_dual_encoder():
    """EVA's tower with EVA-CLIP's text tower, as one checkpoint: searched with, and pretrained further."""
    pytest.importorskip("open_clip")
    from open_clip.transformer import TextTransformer

    golden = Golden("eva")
    torch.manual_seed(0)
    text = TextTransformer(context_length=12, vocab_size=50, width=64, heads=1, layers=2, output_dim=36).eval()
    weights = {f"backbone.{key}": tensor for key, tensor in golden.weights.items()}
    weights |= {f"text_backbone.{key}": t for key, t in text.state_dict().items() if key != "attn_mask"}
    model = convert_original_checkpoint(weights, golden.base)
    assert type(model) is BTAdapterModel and model.visual_projection.bias is not None
    ids = torch.randint(1, 48, (2, 12))
    ids[:, 7] = 49
    videos = golden.inputs["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(model.get_text_features(ids).pooler_output, text(ids), atol=1e-5, rtol=1e-5)
        found = model.get_video_features(videos).pooler_output
    torch.testing.assert_close(found, golden.outputs["eval.video_embed"], atol=1e-5, rtol=0)
    back = convert_to_original(model)
    assert back.keys() == weights.keys() and all(back[key].equal(tensor) for key, tensor in weights.items())

    learner = convert_original_checkpoint(weights, golden.base, model_class=BTAdapterForPreTraining).train()
    output = learner(ids, videos)
    output.loss.backward()
    assert output.mbta_loss is None  # as released: EVA learns without token alignment
    assert all(p.grad is not None for p in learner.vision_model.bt_adapter.parameters())


def test_released_zero_shot_configs_ignore_the_gates(dual):
    plan = plan_conversion(dual.weights, dual.base, fusion="sum", output_fusion="sum")
    assert sum("is left out" in note for note in plan.notes) == 2
    assert plan.build().vision_model.bt_adapter.fusion_gate is None


def test_heads_are_inferred_for_openai_sizes_only():
    golden = Golden("hf_norm")
    with pytest.raises(CheckpointError, match="number of attention heads.*base="):
        convert_original_checkpoint(golden.weights)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("layers.3.mlp.fc1.weight"), r"1 tensors are missing:\n.*layers\.3\.mlp\.fc1\.weight"),
        (lambda w: w.pop("balance2"), r"1 tensors are missing:\n.*balance2"),
        (lambda w: w.pop("btadapter_cls_token"), r"1 tensors are missing:\n  btadapter_cls_token"),
        (lambda w: w.update({"layerz.1.x": torch.ones(1)}), r"1 tensors of 221 that no released.*\n  layerz\.1\.x"),
        (
            lambda w: w.update({"layers.3.mlp.fc9.bias": torch.ones(1)}),
            r"1 tensors have no place in the model:\n  layers\.3\.mlp\.fc9",
        ),
        (
            lambda w: w.update({"layers.3.mlp.fc1.weight": torch.ones(3, 3)}),
            r"1 tensors are of another size:\n  layers\.3\.mlp\.fc1\.weight: \(3, 3\), the model needs \(72, 48\)",
        ),
        (
            lambda w: [w.pop(key) for key in list(w) if key.startswith("layers.5.")],
            r"16 tensors are missing:\n  layers\.5\.layer_norm1\.bias[\s\S]*and 11 more",
        ),
        (
            lambda w: [w.pop(key) for key in list(w) if "btadapter_T_layers.3." in key],
            r"12 tensors are missing:",
        ),
    ],
)
def test_half_matching_checkpoints_are_refused(change, message, clip):
    golden = Golden("hf_norm")
    weights = dict(golden.weights)
    change(weights)
    for base in (golden.base, clip.vision_model):  # a base with weights fills no holes of a whole tower
        with pytest.raises(CheckpointError, match=message):
            convert_original_checkpoint(weights, base)


def test_other_models_are_refused(clip, dual):
    with pytest.raises(CheckpointError, match="holds no BT-Adapter"):
        convert_original_checkpoint(clip.state_dict(), dual.base)
    with pytest.raises(CheckpointError, match="LLaVA's projector file.*btadapter_weight.bin"):
        convert_original_checkpoint({"model.mm_projector.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match="without a backbone: pass base="):
        convert_original_checkpoint(branch_file(Golden("llava_norm"), 3))
    with pytest.raises(CheckpointError, match="eva kind and the base is a clip_vision_model"):
        convert_original_checkpoint(Golden("eva").weights, dual.base)
    wide = CLIPVisionConfig(**{**dual.meta["clip_config"]["vision"], "hidden_size": 64})
    with pytest.raises(CheckpointError, match="of another size"):
        convert_original_checkpoint(Golden("hf_norm").weights, wide)
    with pytest.raises(CheckpointError, match="names 3 layers"):
        convert_original_checkpoint(Golden("hf_norm").weights, wide, adapter_layers=[1, 2, 3])


def test_unknown_config_fields_are_refused(dual):
    with pytest.raises(ValueError, match="fuzion: no such field in the configuration of BTAdapterModel"):
        convert_original_checkpoint(dual.weights, dual.base, fuzion="sum")
    with pytest.raises(ValueError, match="mask_ratio: no such field in the configuration of BTAdapterVisionModel"):
        convert_original_checkpoint(dual.weights, dual.base, model_class=BTAdapterVisionModel, mask_ratio=0.5)


def test_projector_of_llava_is_handed_out():
    tensors = {"model.mm_projector.weight": torch.ones(2, 3), "model.mm_projector.bias": torch.ones(2)}
    assert read_llava_projector(tensors).keys() == {"mm_projector.weight", "mm_projector.bias"}
    golden = Golden("hf_norm")
    plan = plan_conversion({**golden.weights, **tensors}, golden.base)
    assert plan.projector["mm_projector.weight"] is tensors["model.mm_projector.weight"]
    with pytest.raises(CheckpointError, match="holds no mm_projector"):
        read_llava_projector(golden.weights)


def test_full_size_names_need_no_base():
    """Sizes, heads included, come from the weights for OpenAI's own widths."""
    config = CLIPConfig(
        text_config={"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1,
                     "vocab_size": 9, "max_position_embeddings": 7, "bos_token_id": 0, "eos_token_id": 2},
        vision_config={"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
                       "image_size": 16, "patch_size": 8},
        projection_dim=24,
    )  # fmt: skip
    torch.manual_seed(0)
    clip = CLIPModel(config)
    tower = BTAdapterVisionModel.from_backbone(CLIPVisionModel(clip.vision_model.config), 2)
    weights = {f"backbone.{key}": t for key, t in convert_to_original(tower, "").items()}
    weights["backbone.visual_projection.weight"] = clip.visual_projection.weight.detach()
    for key, tensor in clip.text_model.state_dict().items():
        weights[f"text_backbone.text_model.{key}"] = tensor
    weights["text_backbone.text_projection.weight"] = clip.text_projection.weight.detach()
    model = convert_original_checkpoint(weights)
    assert model.config.vision_config.backbone.num_attention_heads == 2
    assert model.config.text_config.num_attention_heads == 1
    videos = torch.randn(1, 2, 3, 16, 16)
    with torch.no_grad():
        expected = clip.visual_projection(tower.eval()(videos).pooler_output)
        torch.testing.assert_close(model.get_video_features(videos).pooler_output, expected)


def test_half_precision_files_stay_in_half_precision():
    golden = Golden("hf_norm")
    weights = {key: tensor.half() for key, tensor in golden.weights.items()}
    tower = convert_original_checkpoint(weights, golden.base)
    assert tower.dtype == torch.float16
    back = convert_to_original(tower)
    assert all(back[key].equal(weights[key]) for key in back)
    assert convert_original_checkpoint(weights, golden.base, dtype=torch.float32).dtype == torch.float32
