"""Adapter files and verbs, on tiny models."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from bt_adapter_hf import (
    BTAdapterForPreTraining,
    BTAdapterModel,
    BTAdapterVisionModel,
    get_bt_adapter_model,
    load_bt_adapter,
    save_bt_adapter,
    unload_bt_adapter,
)
from bt_adapter_hf.adapters.files import CONFIG_NAME, WEIGHTS_NAME, AdapterError
from bt_adapter_hf.adapters.host_modules import find_tower


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}


def build(model_class, config, seed=0):
    torch.manual_seed(seed)
    model = model_class(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def vision(seed=0, depth=5, **sizes):
    return build(CLIPVisionModel, CLIPVisionConfig(**{**SIZES, **sizes}, num_hidden_layers=depth), seed)


def clip(seed=0) -> CLIPModel:
    text = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    text |= {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config={**SIZES, "num_hidden_layers": 5}, projection_dim=24)
    return build(CLIPModel, config, seed)


FAMILIES = {
    "clip": vision,
    "siglip": lambda: build(SiglipVisionModel, SiglipVisionConfig(**SIZES, num_hidden_layers=5)),
    "blip2": lambda: build(Blip2VisionModel, Blip2VisionConfig(**SIZES, num_hidden_layers=5)),
    "instructblip": lambda: build(InstructBlipVisionModel, InstructBlipVisionConfig(**SIZES, num_hidden_layers=5)),
}


def trained(model, layers=3, **fields):
    """`model` with a branch whose weights are all random."""
    model = get_bt_adapter_model(model, layers, **fields)
    torch.manual_seed(5)
    for parameter in find_tower(model).bt_adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Adapter of three layers for `clip()` and its vision model."""
    folder = tmp_path_factory.mktemp("adapter")
    save_bt_adapter(trained(vision_of_clip()), folder, base_model_name_or_path="org/clip", revision="abc")
    return folder


def vision_of_clip(seed=0):
    return clip(seed).vision_model


def snapshot(model):
    return (
        type(model),
        json.dumps(model.config.to_dict(), default=str, sort_keys=True),
        {
            name: (parameter, parameter.clone(), parameter.requires_grad)
            for name, parameter in model.named_parameters()
        },
        {name: module.training for name, module in model.named_modules()},
    )


def assert_untouched(model, before):
    after = snapshot(model)
    assert after[0] is before[0] and after[1] == before[1] and after[3] == before[3]
    assert after[2].keys() == before[2].keys()
    for name, (parameter, value, learns) in before[2].items():
        assert after[2][name][0] is parameter, name
        assert parameter.equal(value) and parameter.requires_grad == learns, name


@torch.no_grad()
def pooled(model, videos):
    if isinstance(model, BTAdapterModel):
        return model.get_video_features(videos).pooler_output
    return model(videos).pooler_output


@pytest.fixture
def videos():
    torch.manual_seed(9)
    return torch.randn(2, 4, 3, 16, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_load_unload_on_every_backbone(family, videos, tmp_path):
    model = trained(FAMILIES[family]())
    assert type(model) is BTAdapterVisionModel
    save_bt_adapter(model, tmp_path)
    base = FAMILIES[family]()
    before = snapshot(base)
    loaded = load_bt_adapter(base, tmp_path)
    assert loaded.vision_model is base
    for key, tensor in model.state_dict().items():
        assert tensor.equal(loaded.state_dict()[key]), key
    with torch.no_grad():
        found, expected = loaded(videos).last_hidden_state, model(videos).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad for p in loaded.bt_adapter.parameters())
    assert not any(p.requires_grad for p in base.parameters())
    assert unload_bt_adapter(loaded) is base
    assert_untouched(base, before)


def test_dual_encoder_shares_the_modules_of_clip(adapter, videos):
    base = clip().train()
    base.text_model.requires_grad_(False)
    before = snapshot(base)
    images = videos[:, 0]
    with torch.no_grad():
        native = base.eval().get_image_features(images).pooler_output
    base.train()
    model = load_bt_adapter(base, adapter)
    assert type(model) is BTAdapterModel and model.training
    for name in ("text_model", "visual_projection", "text_projection", "logit_scale"):
        assert getattr(model, name) is getattr(base, name)
    assert model.vision_model.vision_model is base.vision_model
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    model.eval()
    with torch.no_grad():
        assert model.get_image_features(images).pooler_output.equal(native)
    assert not pooled(model, videos).equal(native)
    assert unload_bt_adapter(model) is base
    assert_untouched(base, before)


def test_unloading_a_checkpoint_gives_a_native_clip(adapter, videos, tmp_path):
    load_bt_adapter(clip(), adapter).save_pretrained(tmp_path)
    model = BTAdapterModel.from_pretrained(tmp_path)
    base = unload_bt_adapter(model)
    assert type(base) is CLIPModel and base.vision_model is model.vision_model.vision_model
    assert base.state_dict().keys() == clip().state_dict().keys()
    assert all(tensor.equal(base.state_dict()[key]) for key, tensor in clip().state_dict().items())
    with torch.no_grad():
        native = base.get_image_features(videos[:, 0]).pooler_output
        assert native.equal(model.get_image_features(videos[:, 0]).pooler_output)


def test_file_format(adapter):
    content = json.loads((adapter / CONFIG_NAME).read_text())
    assert content["base_model_name_or_path"] == "org/clip" and content["revision"] == "abc"
    assert content["adapter_layers"] == [2, 3, 4] and content["extra_modules"] == []
    assert content["backbone"]["model_type"] == "clip_vision_model" and content["backbone"]["hidden_size"] == 32
    assert content["fingerprint"].keys() == {"embeddings", "positions", *(f"layers.{n}" for n in range(5))}
    assert {len(sketch) for sketch in content["fingerprint"].values()} == {8}
    keys = set(load_file(adapter / WEIGHTS_NAME))
    assert {"video_cls", "fusion_gate", "output_gate", "time_embedding.weight"} <= keys
    assert "layers.0.temporal.norm.weight" in keys
    assert not any("vision" in key or "bt_adapter" in key for key in keys)
    assert sorted(path.name for path in adapter.iterdir()) == [WEIGHTS_NAME, CONFIG_NAME]


def test_base_is_named_by_itself(adapter, tmp_path):
    clip().save_pretrained(tmp_path / "clip")
    model = get_bt_adapter_model(CLIPModel.from_pretrained(tmp_path / "clip"), 2)
    save_bt_adapter(model, tmp_path / "adapter")
    content = json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())
    assert content["base_model_name_or_path"] == str(tmp_path / "clip")


@pytest.mark.parametrize("part", ["model", "tower"])
def test_a_base_that_was_typed_as_a_relative_path_is_found_from_everywhere(tmp_path, monkeypatch, part):
    (tmp_path / "elsewhere").mkdir()
    clip().save_pretrained(tmp_path / "small" / "clip")
    monkeypatch.chdir(tmp_path)
    ours = BTAdapterModel.from_pretrained("small/clip", adapter_layers=[1, 2])
    model = get_bt_adapter_model(CLIPModel.from_pretrained("small/clip"), 2)
    if part == "tower":
        model = get_bt_adapter_model(CLIPVisionModel.from_pretrained("small/clip"), 2)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for attached in (model, ours) if part == "model" else (model,):
        save_bt_adapter(attached, tmp_path / "adapter")
        content = json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())
        assert content["base_model_name_or_path"] == str(tmp_path / "small" / "clip") and content["revision"] is None
        BTAdapterModel.from_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)  # named by hand
    save_bt_adapter(model, "adapter", base_model_name_or_path="small/clip")
    content = json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())
    assert content["base_model_name_or_path"] == str(tmp_path / "small" / "clip")


def test_config_fields_travel(tmp_path):
    model = trained(vision(), 2, fusion="sum", output_fusion="sum", max_frames=7, cls_position="last")
    save_bt_adapter(model, tmp_path)
    config = load_bt_adapter(vision(), tmp_path).config
    assert (config.fusion, config.output_fusion, config.max_frames, config.cls_position) == ("sum", "sum", 7, "last")


def test_stored_in_half_precision(tmp_path):
    model = trained(vision())
    save_bt_adapter(model, tmp_path, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS_NAME).values()} == {torch.float16}
    loaded = load_bt_adapter(vision(), tmp_path)
    assert loaded.bt_adapter.video_cls.dtype == torch.float32
    assert loaded.bt_adapter.video_cls.equal(model.bt_adapter.video_cls.half().float())
    assert load_bt_adapter(vision().bfloat16(), tmp_path).bt_adapter.video_cls.dtype == torch.bfloat16


def test_in_place_on_a_model_with_a_branch(adapter, caplog):
    load_bt_adapter(clip(), adapter)
    assert "replaced" not in caplog.text  # nothing was
    model = get_bt_adapter_model(clip(), 3, max_frames=5)
    tower = model.vision_model
    assert load_bt_adapter(model, adapter) is model and model.vision_model is tower
    assert f"The branch that the BTAdapterModel had is replaced by that of {adapter}" in caplog.text
    assert tower.bt_adapter.video_cls.equal(load_file(adapter / WEIGHTS_NAME)["video_cls"])
    assert tower.config.max_frames == 64 and model.config.vision_config is tower.config


def test_extra_modules(tmp_path):
    config = get_bt_adapter_model(clip(), 2).config
    model = BTAdapterForPreTraining(config)
    save_bt_adapter(model, tmp_path, extra_modules=["mbta_head"])
    torch.manual_seed(1)
    other = BTAdapterForPreTraining(config)
    other.vision_model.vision_model.load_state_dict(model.vision_model.vision_model.state_dict())
    assert not other.mbta_head["linear"].weight.equal(model.mbta_head["linear"].weight)
    load_bt_adapter(other, tmp_path)
    assert other.mbta_head["linear"].weight.equal(model.mbta_head["linear"].weight)
    with pytest.raises(AdapterError, match="'mbta_head'.*does not have"):
        load_bt_adapter(copy.deepcopy(model.vision_model.vision_model), tmp_path)


def test_no_other_module_comes_with_an_adapter(tmp_path):
    """The file would replace any weights of the model that it names."""
    model = BTAdapterForPreTraining(get_bt_adapter_model(clip(), 2).config)
    for path in ("text_model", "text_projection", "vision_model.vision_model.post_layernorm"):
        with pytest.raises(AdapterError, match=f"names '{path}' among extra_modules"):
            save_bt_adapter(model, tmp_path, extra_modules=[path])
    save_bt_adapter(model, tmp_path)
    state, config = load_file(tmp_path / WEIGHTS_NAME), json.loads((tmp_path / CONFIG_NAME).read_text())
    state["extra_modules.text_projection.weight"] = torch.zeros_like(model.text_projection.weight)
    save_file(state, tmp_path / WEIGHTS_NAME)
    host = BTAdapterForPreTraining(model.config)
    host.vision_model.vision_model.load_state_dict(model.vision_model.vision_model.state_dict())
    before = host.text_projection.weight.clone()
    with pytest.raises(AdapterError, match="text_projection.weight"):  # not named
        load_bt_adapter(host, tmp_path)
    (tmp_path / CONFIG_NAME).write_text(json.dumps({**config, "extra_modules": ["text_projection"]}))
    with pytest.raises(AdapterError, match="names 'text_projection' among extra_modules"):
        load_bt_adapter(host, tmp_path)
    assert host.text_projection.weight.equal(before)


def test_by_id_and_revision(adapter, tmp_path):
    """Out of the Hub client's cache, as a download leaves it."""
    commit, repository = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--org--adapter"
    shutil.copytree(adapter, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    where = {"cache_dir": tmp_path, "local_files_only": True}
    model = load_bt_adapter(clip(), "org/adapter", revision="v1", **where)
    assert model.vision_model.bt_adapter.video_cls.equal(load_file(adapter / WEIGHTS_NAME)["video_cls"])
    with pytest.raises(OSError, match="neither a folder nor an adapter"):
        load_bt_adapter(clip(), "org/adapter", revision="v2", **where)


# ------------------------------------------------------------------------------------------- the first layers only


def test_shallower_tower_takes_the_first_layers(videos, tmp_path):
    """The adapter of a 40-layer EVA on the 39 layers of BLIP-2 and InstructBLIP, in small."""
    deep = build(Blip2VisionModel, Blip2VisionConfig(**SIZES, num_hidden_layers=5))
    model = trained(deep, 3)
    save_bt_adapter(model, tmp_path)
    shallow = build(InstructBlipVisionModel, InstructBlipVisionConfig(**SIZES, num_hidden_layers=4))
    shallow.load_state_dict({k: v for k, v in deep.state_dict().items() if "layers.4." not in k})
    loaded = load_bt_adapter(shallow, tmp_path)
    assert loaded.config.adapter_layers == [2, 3] and len(loaded.bt_adapter.layers) == 2
    rates = [layer.spatial.drop_path.rate for layer in model.bt_adapter.layers]
    assert [layer.spatial.drop_path.rate for layer in loaded.bt_adapter.layers] == pytest.approx(rates[:2])
    with torch.no_grad():
        found = loaded(videos, output_hidden_states=-1).hidden_states[-1]
        expected = model(videos, output_hidden_states=-2).hidden_states[-2]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_first_layers_on_request(adapter, videos):
    whole, part = (
        load_bt_adapter(vision_of_clip(), adapter),
        load_bt_adapter(vision_of_clip(), adapter, adapter_layers=[2, 3]),
    )
    assert part.config.adapter_layers == [2, 3]
    with torch.no_grad():
        found = part(videos, output_hidden_states=-2).hidden_states[-2]
        torch.testing.assert_close(found, whole(videos, output_hidden_states=-2).hidden_states[-2])
    one = load_bt_adapter(vision_of_clip(), adapter, adapter_layers=[2])
    assert one.bt_adapter.fusion_gate is None and one(videos).pooler_output.isfinite().all()


# ------------------------------------------------------------------------------------------------------- refusals


def refused(model, folder, message, **kwargs):
    before = snapshot(model)
    with pytest.raises(AdapterError, match=message):
        load_bt_adapter(model, folder, **kwargs)
    assert_untouched(model, before)


def test_wrong_backbones_are_refused(adapter, caplog):
    refused(
        clip(seed=1), adapter, r"not those that .* was trained on: they differ by .*org/clip.*allow_backbone_mismatch"
    )
    refused(vision(hidden_size=64), adapter, "needs another backbone: hidden_size 32, the model's 64")
    refused(vision(intermediate_size=64), adapter, "intermediate_size 48, the model's 64")
    refused(FAMILIES["siglip"](), adapter, "model_type clip_vision_model, the model's siglip_vision_model")
    refused(vision(patch_size=4), adapter, "patch_size 8, the model's 4")
    model = load_bt_adapter(clip(seed=1), adapter, allow_backbone_mismatch=True)
    assert type(model) is BTAdapterModel


def test_wrong_layers_are_refused(adapter):
    refused(vision(depth=2), adapter, r"layers \[2, 3, 4\]; the model has 2 layers")
    refused(vision_of_clip(), adapter, r"\[3, 4\] is no start", adapter_layers=[3, 4])
    refused(vision_of_clip(), adapter, r"\[\] is no start", adapter_layers=[])
    base = vision_of_clip()
    refused(get_bt_adapter_model(base, 2), adapter, r"layers \[2, 3, 4\], the model's by \[3, 4\].*unload_bt_adapter")
    refused(get_bt_adapter_model(vision_of_clip(), 4), adapter, r"the model's by \[1, 2, 3, 4\]")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("video_cls"), r"1 missing \(video_cls\)"),
        (lambda s: s.update({"layers.3.temporal.norm.bias": torch.zeros(32)}), r"1 without a place"),
        (lambda s: s.update({"video_cls": torch.zeros(31)}), r"1 of another size \(video_cls\)"),
        (lambda s: [s.pop(key) for key in list(s) if key.startswith("layers.2.")], r"\d+ missing"),
    ],
)
def test_file_that_does_not_fit_its_config(adapter, tmp_path, change, message):
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / WEIGHTS_NAME)
    change(state)
    save_file(state, tmp_path / WEIGHTS_NAME)
    refused(clip(), tmp_path, message)


def test_damaged_folders(adapter, tmp_path):
    refused(clip(), tmp_path, f"holds no {CONFIG_NAME}")
    shutil.copy(adapter / CONFIG_NAME, tmp_path)
    refused(clip(), tmp_path, f"holds no {WEIGHTS_NAME}")
    content = (adapter / WEIGHTS_NAME).read_bytes()
    (tmp_path / WEIGHTS_NAME).write_bytes(content[: len(content) // 2])
    refused(clip(), tmp_path, "damaged or truncated")
    (tmp_path / CONFIG_NAME).write_text("{")
    refused(clip(), tmp_path, f"{CONFIG_NAME} is damaged, it is no JSON")
    (tmp_path / CONFIG_NAME).write_text('{"words": 1}')
    (tmp_path / WEIGHTS_NAME).write_bytes(content)
    refused(clip(), tmp_path, "damaged or of another version")
    config = json.loads((adapter / CONFIG_NAME).read_text())
    config["branch"]["new_field"] = 1
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    refused(clip(), tmp_path, "new_field")
    with pytest.raises(OSError, match="neither a folder nor an adapter"):
        load_bt_adapter(clip(), "org/never-downloaded", local_files_only=True)


def test_models_without_place_for_a_branch(adapter, tmp_path):
    text = CLIPTextModel(clip().config.text_config)
    for verb in (get_bt_adapter_model, lambda m: load_bt_adapter(m, adapter), lambda m: save_bt_adapter(m, tmp_path)):
        with pytest.raises(ValueError, match="CLIPTextModel has no vision model that takes a BT-Adapter"):
            verb(text)
    with pytest.raises(ValueError, match="has a BT-Adapter"):
        get_bt_adapter_model(get_bt_adapter_model(vision(), 2))
    with pytest.raises(ValueError, match="no BT-Adapter to save"):
        save_bt_adapter(vision(), tmp_path)
    with pytest.raises(ValueError, match="no BT-Adapter to unload"):
        unload_bt_adapter(vision())


@pytest.mark.slow
def test_full_size_adapter_is_small(tmp_path):
    """CLIP-L/14 with four layers in half precision: at most 145 MB."""
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24, patch_size=14
    )
    with torch.device("meta"):
        base = CLIPVisionModel(config)
    base = base.half().to_empty(device="cpu")
    model = BTAdapterVisionModel.from_backbone(base, 4)
    save_bt_adapter(model, tmp_path, dtype=torch.float16)
    assert 142e6 < (tmp_path / WEIGHTS_NAME).stat().st_size <= 145e6


@pytest.mark.parametrize("number", [None, 0, 5])
def test_how_many_frames_were_trained_goes_with_the_adapter(tmp_path, number):
    save_bt_adapter(BTAdapterVisionModel.from_backbone(vision(), 2, num_trained_frames=number), tmp_path)
    tower = find_tower(load_bt_adapter(vision(), tmp_path))
    assert tower.config.num_trained_frames == tower.bt_adapter.config.num_trained_frames == number
    content = json.loads((tmp_path / CONFIG_NAME).read_text())
    del content["branch"]["num_trained_frames"]  # an adapter file from before
    (tmp_path / CONFIG_NAME).write_text(json.dumps(content))
    assert find_tower(load_bt_adapter(vision(), tmp_path)).config.num_trained_frames == 0
