"""LLaVA with a branch: native images, videos, mixed batches, generation, every loading route, strictness."""

import copy
import json
import logging
import tempfile

import accelerate
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from bt_adapter_hf import BTAdapterVisionConfig, BTAdapterVisionModel, llava_projector
from bt_adapter_hf.adapters.files import AdapterConfig, AdapterError
from bt_adapter_hf.adapters.fitting import fill_branch
from bt_adapter_hf.adapters.verbs import save_bt_adapter
from bt_adapter_hf.models.configuration_bt_adapter_chat import BTAdapterInstructBlipConfig, BTAdapterLlavaConfig
from bt_adapter_hf.models.modeling_bt_adapter_instructblip import BTAdapterInstructBlipForConditionalGeneration
from bt_adapter_hf.models.modeling_bt_adapter_llava import BTAdapterLlavaForConditionalGeneration
from tests.chat import tiny_hosts
from tests.chat.tiny_hosts import PATCHES, images, left_padded, prompt, right_padded, video


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """Folder of a native LLaVA checkpoint."""
    folder = tmp_path_factory.mktemp("llava")
    tiny_hosts.llava().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(native, tmp_path_factory):
    """Folder of an adapter for all last four layers of the host's image tower, with an output gate."""
    host = LlavaForConditionalGeneration.from_pretrained(native)
    tower = BTAdapterVisionModel.from_backbone(host.model.vision_tower)
    tiny_hosts.stir(tower.bt_adapter)
    folder = tmp_path_factory.mktemp("adapter")
    save_bt_adapter(tower, folder)
    return folder


@pytest.fixture(scope="module")
def model(native, adapter):
    return BTAdapterLlavaForConditionalGeneration.from_pretrained(native, bt_adapter=adapter)


@pytest.fixture
def log(caplog):
    transformers_logging.get_logger("bt_adapter_hf").propagate = True
    with caplog.at_level(logging.WARNING):
        yield caplog


def mixed_batch() -> dict:
    """Row 1: an image and a video of 3 frames. Row 2: a video of 5 frames."""
    rows = left_padded(prompt("image", 4, "video", 5), prompt(4, 5, 6, "video", 7))
    return {**rows, "pixel_values": images(), **right_padded(video(3), video(5, seed=4))}


def generate(model, **inputs):
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": [18, 19], **inputs}
    start = inputs["input_ids"].shape[1]
    return model.generate(**options)[:, start:]


# ------------------------------------------------------------------------------------------------ what it computes


@torch.no_grad()
def test_images_are_bit_equal_to_the_native_host(native, model):
    host = LlavaForConditionalGeneration.from_pretrained(native)
    inputs = {**left_padded(prompt("image", 4, "image", 5), prompt("image", 6)), "pixel_values": images(3)}
    assert torch.equal(model(**inputs).logits, host(**inputs).logits)
    assert torch.equal(generate(model, **inputs), generate(host, **inputs))
    words = left_padded(prompt(4, 5))
    assert torch.equal(model(**words).logits, host(**words).logits)


@torch.no_grad()
def test_a_video_is_the_fused_tokens_of_the_released_rule(model):
    """Half backbone, half branch, of the second-to-last layer, without the CLS (SEMANTICS: C(X, z))."""
    tower, clip = model.model.vision_tower, video(5)
    assert tower.config.adapter_layers == [1, 2, 3]
    output = tower(clip, output_hidden_states=[4], output_branch_states=True)
    backbone = tower.vision_model(clip[0], output_hidden_states=True).hidden_states[4]
    expected = (backbone.mean(dim=0)[1:] + output.branch_patches[0].mean(dim=0)) / 2
    features = model.get_video_features(clip).pooler_output
    assert len(features) == 1 and features[0].shape == (PATCHES, 32)
    torch.testing.assert_close(features[0], model.model.multi_modal_projector(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_released_order_with_the_cls_last(native, adapter, model):
    """As released: all tokens of a video, the CLS behind the patches. Images stay as LLaVA has them."""
    options = {"vision_feature_select_strategy": "full", "cls_position": "last"}
    full = BTAdapterLlavaForConditionalGeneration.from_pretrained(native, bt_adapter=adapter, **options)
    tokens = full.get_video_features(video()).pooler_output[0]
    assert len(tokens) == PATCHES + 1
    torch.testing.assert_close(tokens[:-1], model.get_video_features(video()).pooler_output[0], atol=1e-5, rtol=1e-5)
    host = LlavaForConditionalGeneration.from_pretrained(native, vision_feature_select_strategy="full")
    expected = host.get_image_features(images(), return_dict=True).pooler_output[0]
    assert torch.equal(full.get_image_features(images(), return_dict=True).pooler_output[0], expected)


@torch.no_grad()
def test_tokens_per_video_do_not_depend_on_frames_and_frames_matter(model):
    for T in (1, 4, 70):  # more than the time table, and than one chunk
        assert [len(f) for f in model.get_video_features(video(T)).pooler_output] == [PATCHES]
    clip = video(6)
    ids = prompt("video", 4)
    there, back = (model(input_ids=ids, pixel_values_videos=v).logits for v in (clip, clip.flip(1)))
    assert (there - back).abs().max() > 1e-2


def test_full_size_adapters_add_little():
    """LLaVA-7B and InstructBLIP-7B shapes: less than 1.5 % of the parameters."""
    llama = LlamaConfig(vocab_size=32064)
    clip = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    with torch.device("meta"):
        llava = BTAdapterLlavaForConditionalGeneration(
            BTAdapterLlavaConfig(vision_config=clip, text_config=llama, image_token_index=32000)
        )
        blip = BTAdapterInstructBlipForConditionalGeneration(
            BTAdapterInstructBlipConfig(text_config=llama, image_token_index=32000)
        )
    assert llava.model.vision_tower.config.adapter_layers == [20, 21, 22]
    assert blip.vision_model.config.adapter_layers == [36, 37, 38]
    for model, tower in ((llava, llava.model.vision_tower), (blip, blip.vision_model)):
        added = sum(p.numel() for p in tower.bt_adapter.parameters())
        assert added < 0.015 * (model.num_parameters() - added)


def test_at_224_pixels_a_video_has_256_tokens():
    config = BTAdapterLlavaConfig(
        vision_config=CLIPVisionConfig(**{**tiny_hosts.SIZES, "image_size": 224, "patch_size": 14}),
        text_config=tiny_hosts.text_config(),
        image_token_index=18,
    )
    model = BTAdapterLlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        features = model.get_video_features(torch.zeros(2, 3, 3, 224, 224)).pooler_output
    assert [feature.shape for feature in features] == [(256, 32)] * 2


@torch.no_grad()
def test_placeholders_are_filled_in_order(model):
    """Naive reference: embeddings put together by hand, run through the language model."""
    inputs = mixed_batch()
    embed = model.get_input_embeddings()
    image = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
    short, long = (model.get_video_features(v).pooler_output[0] for v in (video(3), video(5, seed=4)))
    word = {i: embed(torch.tensor([i])) for i in (0, 1, 4, 5, 6, 7)}
    first = torch.cat([word[1], image, word[4], short, word[5]])
    second = torch.cat([word[1], word[4], word[5], word[6], long, word[7]])
    second = torch.cat([word[0].expand(len(first) - len(second), -1), second])
    reference = model.lm_head(
        model.model.language_model(
            inputs_embeds=torch.stack([first, second]), attention_mask=inputs["attention_mask"]
        ).last_hidden_state
    )
    torch.testing.assert_close(model(**inputs).logits, reference, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_batch_of_unequal_videos_answers_as_each_alone(model):
    clips = [video(T, seed=T) for T in (4, 8, 13)]
    prompts = [prompt("video", 4), prompt(4, 5, 6, "video", 7), prompt(5, "video", 6)]
    batch = {**left_padded(*prompts), **right_padded(*clips)}
    together = model(**batch).logits
    answers = generate(model, **batch)
    for row, (ids, clip) in enumerate(zip(prompts, clips, strict=True)):
        alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": clip}
        torch.testing.assert_close(together[row, -ids.shape[1] :], model(**alone).logits[0], atol=1e-5, rtol=0)
        assert torch.equal(answers[row], generate(model, **alone)[0])


@torch.no_grad()
def test_released_tower_projector_and_llama(golden_splice):
    """The released chat model's language side, with LLaVA-1.0's single linear projector."""
    scalars, inputs, state, expected = golden_splice
    config = BTAdapterLlavaConfig(
        vision_config=CLIPVisionConfig(**{**tiny_hosts.SIZES, "hidden_size": 1024, "num_attention_heads": 4}),
        text_config=LlamaConfig(**scalars["llama_config"] | {"vocab_size": 67}, rms_norm_eps=1e-6),
        image_token_index=63,
        video_token_index=scalars["vocab"]["vid_patch"],
        projector_hidden_act="linear",
    )
    model = BTAdapterLlavaForConditionalGeneration(config).eval()
    model.model.multi_modal_projector.load_state_dict(llava_projector(state))
    language = {k: v for k, v in state.items() if "mm_projector" not in k and "inv_freq" not in k}
    model.model.language_model.load_state_dict(
        {key.removeprefix("model."): value for key, value in language.items() if key.startswith("model.")}
    )
    model.lm_head.load_state_dict({"weight": language["lm_head.weight"]})
    features = model.model.multi_modal_projector(inputs["video_features"])
    encoded = {"video": model.get_video_features(torch.zeros(1, 1, 3, 32, 32))}
    encoded["video"].pooler_output = list(features)
    output = model(input_ids=inputs["input_ids"], labels=inputs["labels"], mm_encoder_outputs=encoded)
    torch.testing.assert_close(output.logits, expected["logits"], atol=1e-5, rtol=1e-5)
    assert float(output.loss) == pytest.approx(scalars["scalars"]["loss"], rel=1e-6)


@pytest.fixture(scope="module")
def golden_splice():
    from pathlib import Path

    path = Path(__file__).parents[1] / "data" / "golden" / "llm_splice"
    tensors = load_file(path.with_suffix(".safetensors"))
    parts = {
        start: {k.removeprefix(f"{start}."): v for k, v in tensors.items() if k.startswith(f"{start}.")}
        for start in ("in", "sd", "out")
    }
    return json.loads(path.with_suffix(".json").read_text()), parts["in"], parts["sd"], parts["out"]


def test_only_a_single_linear_layer_is_a_llava_1_projector():
    with pytest.raises(ValueError, match="Expected mm_projector.weight"):
        llava_projector(
            {"model.mm_projector.0.weight": torch.zeros(4, 3), "model.mm_projector.0.bias": torch.zeros(4)}
        )


# -------------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_generation_with_cache_equals_generation_without(model, options):
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        answers.append(generate(model, **mixed_batch(), **options, use_cache=use_cache))
    assert answers[0].shape == (2 * options.get("num_return_sequences", 1), 6)
    assert torch.equal(*answers)


@torch.no_grad()
def test_beams_of_a_mixed_batch_are_those_of_its_rows(model):
    batch = generate(model, **mixed_batch(), num_beams=3)
    second = {"input_ids": prompt(4, 5, 6, "video", 7), "pixel_values_videos": video(5, seed=4)}
    assert torch.equal(batch[1:], generate(model, **second, num_beams=3))


@torch.no_grad()
def test_a_placeholder_beyond_the_vocabulary(native, adapter, model):
    far = BTAdapterLlavaForConditionalGeneration.from_pretrained(native, bt_adapter=adapter, video_token_index=99)
    inputs = mixed_batch()
    moved = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == 19, 99)}
    assert torch.equal(far(**moved).logits, model(**inputs).logits)
    assert torch.equal(generate(far, **moved), generate(model, **inputs))


def test_compiles_whole_after_one_eager_call(model):
    inputs = {"input_ids": prompt("image", 4, "video", 5), "pixel_values": images(), "pixel_values_videos": video(3)}
    with torch.no_grad():
        expected = model(**inputs).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
        tower = torch.compile(model.model.vision_tower, fullgraph=True, backend="eager")
        expected = model.model.vision_tower(video(3)).last_hidden_state
        torch.testing.assert_close(tower(video(3)).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------- training


def test_every_trainable_parameter_has_a_gradient(native, adapter):
    model = BTAdapterLlavaForConditionalGeneration.from_pretrained(native, bt_adapter=adapter).train()
    assert model.model.vision_tower.bt_adapter.output_gate is None
    assert not any(p.requires_grad for p in model.model.vision_tower.vision_model.parameters())
    inputs = {"input_ids": prompt("video", 4, 5), "pixel_values_videos": video(4)}
    model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 19, -100)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    branch = model.model.vision_tower.bt_adapter
    assert all(p.grad.abs().sum() > 0 for name, p in branch.named_parameters() if "k_proj.bias" not in name)


def test_branches_that_could_not_learn_are_refused():
    backbone = CLIPVisionConfig(**tiny_hosts.SIZES)
    for fields, message in (
        ({"adapter_layers": [2, 3, 4], "output_fusion": "sum"}, r"goes beyond layer 3.*use \[2, 3\]"),
        ({"adapter_layers": [2, 3]}, "only the pooled feature uses"),
        ({"adapter_layers": [2, 3], "output_fusion": "sum", "cls_position": "last"}, "drops the first token"),
    ):
        with pytest.raises(StrictDataclassClassValidationError, match=message):
            BTAdapterLlavaConfig(vision_config=BTAdapterVisionConfig(backbone=backbone, **fields))


# ---------------------------------------------------------------------------------------------------- loading routes


def bit_equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def hub_names(native, folder):
    """The key names of LLaVA checkpoints on the Hub: both native models nested once more."""
    state = load_file(native / "model.safetensors")
    old = {}
    for key, value in state.items():
        key = key.replace("vision_tower.", "vision_tower.vision_model.")
        old[key] = value
    assert "language_model.model.embed_tokens.weight" in old and "language_model.lm_head.weight" in old
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((native / "config.json").read_text())
    return folder


def new_names(native, folder):
    """The names of the modules in transformers 5."""
    state = LlavaForConditionalGeneration.from_pretrained(native).state_dict()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((native / "config.json").read_text())
    return folder


@pytest.mark.parametrize("layout", [hub_names, new_names])
def test_old_and_new_key_layouts(native, adapter, model, layout, tmp_path):
    folder = layout(native, tmp_path)
    loaded, info = BTAdapterLlavaForConditionalGeneration.from_pretrained(
        folder, bt_adapter=adapter, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert bit_equal(loaded.state_dict(), model.state_dict())


def test_a_native_checkpoint_gets_a_warm_started_branch(native, log):
    model, info = BTAdapterLlavaForConditionalGeneration.from_pretrained(native, output_loading_info=True)
    assert all(".bt_adapter." in key for key in info["missing_keys"]) and info["missing_keys"]
    assert "holds no model.vision_tower.bt_adapter" in log.text
    tower = model.model.vision_tower
    assert torch.equal(
        tower.bt_adapter.layers[2].spatial.mlp.fc1.weight, tower.vision_model.encoder.layers[3].mlp.fc1.weight
    )
    assert not tower.bt_adapter.layers[0].temporal.proj.weight.any()


def test_an_adapter_brings_its_tensors(native, adapter, model, log):
    state = load_file(adapter / "bt_adapter.safetensors")
    ours = model.model.vision_tower.bt_adapter.state_dict()
    assert ours.keys() == {k for k in state if k != "output_gate" and not k.startswith("layers.3.")}
    assert all(torch.equal(ours[key], state[key]) for key in ours)
    BTAdapterLlavaForConditionalGeneration.from_pretrained(native, bt_adapter=adapter, adapter_layers=[1, 2])
    assert "newly initialised" not in log.text and "LOAD REPORT" not in log.text


def test_an_adapter_saved_from_the_host_comes_back(native, model, tmp_path):
    tuned = copy.deepcopy(model)
    tiny_hosts.stir(tuned.model.multi_modal_projector)
    save_bt_adapter(tuned, tmp_path, extra_modules=["model.multi_modal_projector"])
    again = BTAdapterLlavaForConditionalGeneration.from_pretrained(native, bt_adapter=tmp_path)
    assert bit_equal(again.state_dict(), tuned.state_dict())


def test_saves_and_reloads_by_itself(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is BTAdapterLlavaConfig and config.vision_config.adapter_layers == [1, 2, 3]
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is BTAdapterLlavaForConditionalGeneration
    assert bit_equal(again.state_dict(), model.state_dict())
    assert not any(p.requires_grad for p in again.model.vision_tower.vision_model.parameters())


def test_a_checkpoint_that_lost_its_branch_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {key: value for key, value in load_file(path).items() if "bt_adapter" not in key}
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing from the checkpoint"):
        BTAdapterLlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_partial_checkpoints_are_refused(native, tmp_path):
    state = load_file(native / "model.safetensors")
    gone = "multi_modal_projector.linear_1.weight"
    save_file({k: v for k, v in state.items() if k != gone}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((native / "config.json").read_text())
    with pytest.raises(ValueError, match="1 tensors missing(.|\n)*multi_modal_projector.linear_1.weight"):
        BTAdapterLlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_adapters_of_other_towers_are_refused(native, adapter, tmp_path, log):
    host = LlavaForConditionalGeneration.from_pretrained(native)
    with torch.no_grad():
        for parameter in host.model.vision_tower.parameters():
            parameter.copy_(torch.randn_like(parameter))
    host.save_pretrained(tmp_path)
    load = BTAdapterLlavaForConditionalGeneration.from_pretrained
    with pytest.raises(AdapterError, match="not those that .* was trained on"):
        load(tmp_path, bt_adapter=adapter)
    load(tmp_path, bt_adapter=adapter, allow_backbone_mismatch=True)
    assert "Attached all the same" in log.text
    with pytest.raises(AdapterError, match="read.*image tower after layer 0"):
        load(native, bt_adapter=adapter, vision_feature_layer=1)


def test_an_adapter_for_a_model_that_has_one_is_refused(model, adapter, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a branch of its own"):
        BTAdapterLlavaForConditionalGeneration.from_pretrained(tmp_path, bt_adapter=adapter)


def test_the_plain_class_takes_our_tower(model, tmp_path):
    config = LlavaConfig(**{**model.config.to_dict(), "model_type": "llava"})
    plain = LlavaForConditionalGeneration(config).eval()
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(plain) is LlavaForConditionalGeneration
    assert type(plain.model.vision_tower) is BTAdapterVisionModel
    ids = {"input_ids": prompt("video", 4)}
    as_image = {"input_ids": prompt("image", 4)}
    with torch.no_grad():
        expected = model(**ids, pixel_values_videos=video(3)).logits
        torch.testing.assert_close(plain(**as_image, pixel_values=video(3)).logits, expected)
        assert torch.equal(
            generate(plain, **as_image, pixel_values=video(3)), generate(model, **ids, pixel_values_videos=video(3))
        )
    back = BTAdapterLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert bit_equal(back.state_dict(), model.state_dict())


@torch.no_grad()
def test_bfloat16(native, adapter):
    model = BTAdapterLlavaForConditionalGeneration.from_pretrained(native, bt_adapter=adapter, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in mixed_batch().items()}
    assert generate(model, **inputs).shape == (2, 6)


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["auto", "language model on disk", "tower on disk"])
def test_device_maps_and_offloading(model, native, adapter, device_map, tmp_path):
    parts = dict.fromkeys(
        ("model.vision_tower", "model.multi_modal_projector", "lm_head", "model.language_model"), "cpu"
    )
    source, options = native, {"bt_adapter": adapter}
    if device_map == "language model on disk":
        device_map = {**parts, "model.language_model": "disk"}
    elif device_map == "tower on disk":  # a branch that is in the checkpoint can be left there
        model.save_pretrained(tmp_path / "ours")
        source, options = tmp_path / "ours", {}
        device_map = {**parts, "model.vision_tower": "disk"}
    loaded = BTAdapterLlavaForConditionalGeneration.from_pretrained(
        source, **options, device_map=device_map, offload_folder=tempfile.mkdtemp(dir=tmp_path)
    )
    if device_map != "auto":
        assert any(parameter.is_meta for parameter in loaded.parameters())
    inputs = mixed_batch()
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    assert torch.equal(generate(loaded, **inputs), generate(model, **inputs))


def test_a_new_branch_on_the_disk_is_refused(native, adapter, tmp_path):
    device_map = {"model.vision_tower.vision_model": "cpu", "model.vision_tower.bt_adapter": "disk"}
    device_map |= dict.fromkeys(("model.multi_modal_projector", "model.language_model", "lm_head"), "cpu")
    with pytest.raises(ValueError, match="Keep model.vision_tower on a device"):
        BTAdapterLlavaForConditionalGeneration.from_pretrained(
            native, bt_adapter=adapter, device_map=device_map, offload_folder=tmp_path
        )


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": prompt("video", "video"), "pixel_values_videos": video()}, "32 video tokens .* 1 videos"),
        ({"input_ids": prompt("video", 4)}, "16 video tokens .* 0 videos"),
        ({"input_ids": prompt(4, 5), "pixel_values_videos": video()}, "0 video tokens .* 1 videos"),
        ({"input_ids": prompt("video", "image"), "pixel_values_videos": video()}, "16 image tokens .* 0 images"),
        ({"input_ids": prompt("video", 4), "pixel_values_videos": video()[0]}, r"expected \(V, T, 3, H, W\)"),
        ({"inputs_embeds": torch.zeros(1, 20, 32), "pixel_values_videos": video()}, "placeholders in input_ids"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_generation(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=2)


@torch.no_grad()
def test_an_adapter_into_an_offloaded_model(native, adapter, model):
    """As with `device_map="auto"` where a part does not fit on the accelerator: parameters wait in CPU memory."""
    fresh = BTAdapterLlavaForConditionalGeneration.from_pretrained(native)
    accelerate.cpu_offload(fresh, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in fresh.parameters())
    fill_branch(fresh, adapter, AdapterConfig.read(adapter))
    torch.testing.assert_close(fresh(**mixed_batch()).logits, model(**mixed_batch()).logits)


def test_a_dict_for_a_sub_config_changes_what_it_names(native, adapter):
    """As in transformers, also where the tower's other fields come from an adapter."""
    own = LlavaConfig.from_pretrained(native)
    for options in ({}, {"bt_adapter": adapter}):
        config = BTAdapterLlavaForConditionalGeneration.from_pretrained(
            native,
            text_config={"max_position_embeddings": 77},
            vision_config={"frames_per_chunk": 5, "attention_dropout": 0.5},
            **options,
        ).config
        assert config.text_config.max_position_embeddings == 77 and config.vision_config.frames_per_chunk == 5
        assert config.vision_config.backbone.attention_dropout == 0.5
        assert config.text_config.hidden_size == own.text_config.hidden_size
        assert config.vision_config.hidden_size == own.vision_config.hidden_size
