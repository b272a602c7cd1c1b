"""Configs: defaults, checks, and reading native checkpoints' configs."""

import pytest
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPVisionConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    LlavaConfig,
    SiglipVisionConfig,
)

from bt_adapter_hf import BTAdapterConfig, BTAdapterLlavaConfig, BTAdapterVisionConfig


def test_defaults_are_the_released_ones():
    config = BTAdapterVisionConfig(backbone=CLIPVisionConfig(num_hidden_layers=24))
    assert config.adapter_layers == [20, 21, 22, 23]
    assert (config.fusion_gate_scale, config.output_gate_scale, config.max_frames) == (100, 10000, 64)
    assert (config.temporal_layer_norm_eps, config.spatial_layer_norm_eps) == (1e-5, 1e-5)
    config = BTAdapterVisionConfig(backbone=SiglipVisionConfig(num_hidden_layers=2))
    assert config.adapter_layers == [0, 1]
    assert config.temporal_layer_norm_eps == config.backbone.layer_norm_eps == 1e-6


def test_sizes_are_those_of_the_backbone():
    config = BTAdapterVisionConfig(backbone=CLIPVisionConfig(hidden_size=48, num_attention_heads=4, image_size=32))
    assert (config.hidden_size, config.num_attention_heads, config.image_size) == (48, 4, 32)
    assert config.num_hidden_layers == 12


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"adapter_layers": [12]}, "between 0 and 11"),
        ({"adapter_layers": []}, "at least one backbone layer"),
        ({"adapter_layers": [3, 2]}, "ascending order"),
        ({"adapter_layers": [3, 3]}, "without repeats"),
        ({"fusion": "product"}, "fusion"),
        ({"max_frames": 0}, "max_frames=0 must be at least 1"),
        ({"max_frames": "many"}, "max_frames"),
        ({"drop_path_rate": 1.0}, r"must be in \[0, 1\)"),
        ({"token_fusion": "gate", "output_fusion": "sum"}, 'output_fusion="gate"'),
        ({"backbone": {"model_type": "vit"}}, "'vit'; supported are clip_vision_model"),
    ],
)
def test_bad_tower_values_are_named(fields, message):
    with pytest.raises(Exception, match=message):
        BTAdapterVisionConfig(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mask_ratio": 1.0}, r"mask_ratio=1.0 must be in \[0, 1\)"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"mbca_weight": -1.0}, "must not be negative"),
        ({"mbta_loss": "l1"}, "mbta_loss"),
    ],
)
def test_bad_dual_encoder_values_are_named(fields, message):
    with pytest.raises(Exception, match=message):
        BTAdapterConfig(**fields)


def test_round_trip_through_auto_config(tmp_path):
    config = BTAdapterConfig(
        vision_config=BTAdapterVisionConfig(
            backbone=SiglipVisionConfig(num_hidden_layers=5), adapter_layers=[2, 4], gate_on="branch"
        ),
        temperature=0.05,
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is BTAdapterConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    tower = BTAdapterVisionConfig.from_pretrained(tmp_path)
    assert tower.adapter_layers == [2, 4] and tower.backbone.model_type == "siglip_vision_model"


def test_a_native_clip_config_becomes_ours_and_takes_fields_of_both_levels(tmp_path):
    CLIPConfig(vision_config={"num_hidden_layers": 6}, projection_dim=32).save_pretrained(tmp_path)
    config = BTAdapterConfig.from_pretrained(tmp_path, adapter_layers=[1, 5], mask_ratio=0.5)
    assert (config.vision_config.adapter_layers, config.mask_ratio, config.projection_dim) == ([1, 5], 0.5, 32)
    assert config.vision_config.backbone.num_hidden_layers == 6
    assert BTAdapterVisionConfig.from_pretrained(tmp_path).adapter_layers == [2, 3, 4, 5]
    with pytest.raises(Exception, match="between 0 and 5"):
        BTAdapterConfig.from_pretrained(tmp_path, adapter_layers=[6])


def test_a_native_vision_config_object_is_wrapped():
    config = BTAdapterConfig(vision_config=CLIPVisionConfig(num_hidden_layers=3))
    assert config.vision_config.adapter_layers == [0, 1, 2]


def test_sizes_can_be_set(tmp_path):
    config = BTAdapterVisionConfig(backbone=SiglipVisionConfig(num_hidden_layers=5))
    config.image_size = 336
    config.hidden_size = 96
    assert (config.backbone.image_size, config.backbone.hidden_size) == (336, 96)
    config.save_pretrained(tmp_path)
    assert BTAdapterVisionConfig.from_pretrained(tmp_path).image_size == 336
    assert BTAdapterVisionConfig.from_pretrained(tmp_path, image_size=448).backbone.image_size == 448
    eva = BTAdapterVisionConfig(backbone=InstructBlipVisionConfig())
    assert eva.num_channels == 3


@pytest.mark.parametrize("native", [False, True])
def test_a_dict_for_a_sub_config_changes_what_it_names(tmp_path, native):
    text = {"hidden_size": 96, "num_attention_heads": 4, "vocab_size": 99}
    vision = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 6, "image_size": 32}
    clip = CLIPConfig(text_config=text, vision_config=vision)
    clip.save_pretrained(tmp_path)
    if not native:
        BTAdapterConfig.from_pretrained(tmp_path, gate_on="branch").save_pretrained(tmp_path)

    def load(**fields):
        return BTAdapterConfig.from_pretrained(tmp_path, **fields)

    plain = load()
    config = load(text_config={"max_position_embeddings": 20})
    assert (config.text_config.hidden_size, config.text_config.vocab_size) == (96, 99)
    assert config.text_config.max_position_embeddings == 20
    assert config.vision_config.to_dict() == plain.vision_config.to_dict()
    for fields in ({"image_size": 64, "max_frames": 16}, {"backbone": {"image_size": 64}, "max_frames": 16}):
        tower = load(vision_config=fields).vision_config
        assert (tower.image_size, tower.max_frames) == (64, 16)
        assert (tower.hidden_size, tower.gate_on) == (48, plain.vision_config.gate_on)
        assert tower.backbone.model_type == "clip_vision_model" and tower.adapter_layers == [2, 3, 4, 5]
    assert load(vision_config={"max_frames": 16}, max_frames=32).vision_config.max_frames == 32
    whole = load(vision_config=CLIPVisionConfig(num_hidden_layers=2)).vision_config  # a config replaces
    assert (whole.num_hidden_layers, whole.hidden_size) == (2, 768)
    assert load(text_config=plain.text_config.to_dict()).text_config.to_dict() == plain.text_config.to_dict()
    again = load(vision_config=plain.vision_config.to_dict()).vision_config
    assert again.to_dict() == plain.vision_config.to_dict()


def test_hosts_merge_sub_configs_too(tmp_path):
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 6}
    LlavaConfig(vision_config=CLIPVisionConfig(**sizes), text_config=LlamaConfig(**sizes)).save_pretrained(tmp_path)
    config = BTAdapterLlavaConfig.from_pretrained(tmp_path, text_config={"vocab_size": 77})
    assert (config.text_config.hidden_size, config.text_config.vocab_size) == (48, 77)
    config.save_pretrained(tmp_path)
    for fields in ({"vision_config": {"image_size": 64, "max_frames": 16}}, {"max_frames": 16}):
        config = BTAdapterLlavaConfig.from_pretrained(tmp_path, **fields)
        assert (config.vision_config.hidden_size, config.vision_config.max_frames) == (48, 16)
        assert config.vision_config.image_size == (64 if "vision_config" in fields else 224)


def test_how_many_frames_were_trained_is_kept(tmp_path):
    assert BTAdapterVisionConfig().num_trained_frames == 0
    for number in (None, 0, 8):
        BTAdapterConfig(vision_config=BTAdapterVisionConfig(num_trained_frames=number)).save_pretrained(tmp_path)
        assert BTAdapterConfig.from_pretrained(tmp_path).vision_config.num_trained_frames == number
    with pytest.raises(Exception, match="num_trained_frames=9 must be between 0 and max_frames=8, or None"):
        BTAdapterVisionConfig(num_trained_frames=9, max_frames=8)
