"""The dual encoder: features and loss, every loading route, strictness, code that travels with a checkpoint."""

import copy
import inspect
import logging
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, CLIPModel, CLIPVisionModel
from transformers.utils import logging as transformers_logging

from bt_adapter_hf import BTAdapterForPreTraining, BTAdapterModel, BTAdapterVisionModel, get_bt_adapter_model
from bt_adapter_hf.hub.push import save_with_code
from tests import tiny_pairs
from tests.chat import tiny_hosts


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(tiny_pairs.clip_config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dual_folder(clip_folder, tmp_path_factory):
    """A dual encoder whose branch has learned something (nothing in it is as initialised)."""
    torch.manual_seed(1)
    model = BTAdapterModel.from_pretrained(clip_folder, adapter_layers=[1, 2])
    with torch.no_grad():
        for parameter in model.vision_model.bt_adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path_factory.mktemp("dual")
    model.save_pretrained(folder)
    return folder


def videos(B: int = 3, T: int = 4) -> torch.Tensor:
    return torch.randn(B, T, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def texts() -> dict:
    return dict(tiny_pairs.tokenizer()(["red goes right", "b", "green 12"], padding=True, return_tensors="pt"))


# ------------------------------------------------------------------------------------------------ what it computes


@torch.no_grad()
def test_images_and_texts_are_those_of_the_clip_model(clip_folder):
    clip, dual = CLIPModel.from_pretrained(clip_folder), BTAdapterModel.from_pretrained(clip_folder)
    images = videos()[:, 0]
    assert torch.equal(dual.get_image_features(images).pooler_output, clip.get_image_features(images).pooler_output)
    ours, theirs = dual.get_text_features(**texts()), clip.get_text_features(**texts())
    assert torch.equal(ours.pooler_output, theirs.pooler_output)


@torch.no_grad()
def test_logits_and_loss_follow_from_the_features(dual_folder):
    model = BTAdapterModel.from_pretrained(dual_folder)
    output = model(pixel_values_videos=videos(), **texts(), return_loss=True)
    video = model.get_video_features(videos()).pooler_output
    text = model.get_text_features(**texts()).pooler_output
    video, text = video / video.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(output.video_embeds, video)
    torch.testing.assert_close(output.text_embeds, text)
    logits = model.logit_scale.exp() * video @ text.T
    torch.testing.assert_close(output.logits_per_video, logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(output.logits_per_text, output.logits_per_video.T)
    rows, columns = logits.log_softmax(1).diagonal().mean(), logits.log_softmax(0).diagonal().mean()
    torch.testing.assert_close(output.loss, -(rows + columns) / 2)
    assert model(pixel_values_videos=videos(), **texts()).loss is None


@torch.no_grad()
def test_frame_mask_reaches_the_tower(dual_folder):
    model = BTAdapterModel.from_pretrained(dual_folder)
    frame_mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    batch = model.get_video_features(videos(), frame_mask=frame_mask).pooler_output
    alone = model.get_video_features(videos()[:1, :2]).pooler_output
    torch.testing.assert_close(batch[:1], alone, atol=1e-6, rtol=0)


def test_everything_learns_when_asked(dual_folder):
    model = BTAdapterModel.from_pretrained(dual_folder).train()
    model(pixel_values_videos=videos(), **texts(), return_loss=True).loss.backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set()
    assert not any(p.requires_grad for p in model.vision_model.vision_model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("cls", [BTAdapterModel, BTAdapterForPreTraining])
def test_pickle_and_deepcopy_after_a_forward_pass(cls, dual_folder):
    model = cls.from_pretrained(dual_folder)
    expected = model(pixel_values_videos=videos(), **texts()).video_embeds
    model.get_text_features(**texts(), output_hidden_states=True)
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), model):
        assert torch.equal(copied(pixel_values_videos=videos(), **texts()).video_embeds, expected)
        assert len(copied.get_text_features(**texts(), output_hidden_states=True).hidden_states) == 4


@torch.no_grad()
def test_text_embeddings_can_be_resized(dual_folder):
    model = BTAdapterModel.from_pretrained(dual_folder)
    expected, size = model.get_text_features(**texts()).pooler_output, model.config.text_config.vocab_size
    model.resize_token_embeddings(size + 5, mean_resizing=False)
    assert model.get_input_embeddings().weight.shape[0] == model.config.text_config.vocab_size == size + 5
    assert torch.equal(model.get_text_features(**texts()).pooler_output, expected)


def test_the_main_input_is_an_argument():
    for cls in (BTAdapterModel, BTAdapterForPreTraining, BTAdapterVisionModel):
        assert cls.main_input_name in inspect.signature(cls.forward).parameters


# -------------------------------------------------------------------------------------------------- loading routes


def bit_equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_save_and_load_is_bit_equal(dual_folder, tmp_path):
    model = BTAdapterModel.from_pretrained(dual_folder)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for folder in ("whole", "shards"):
        again = AutoModel.from_pretrained(tmp_path / folder)
        assert type(again) is BTAdapterModel
        assert bit_equal(again.state_dict(), model.state_dict())


def test_saved_names_are_those_of_clip_plus_the_branch(clip_folder, dual_folder):
    clip, dual = load_file(clip_folder / "model.safetensors"), load_file(dual_folder / "model.safetensors")
    new = {key for key in dual if key.startswith("vision_model.bt_adapter.")}
    assert dual.keys() - clip.keys() == new and new
    assert all(torch.equal(clip[key], dual[key]) for key in clip)


def test_clip_to_dual_says_what_is_new(clip_folder, caplog):
    transformers_logging.get_logger("bt_adapter_hf").propagate = True
    with caplog.at_level(logging.WARNING):
        model, info = BTAdapterModel.from_pretrained(clip_folder, adapter_layers=[2], output_loading_info=True)
    assert info["missing_keys"] and all(key.startswith("vision_model.bt_adapter.") for key in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    layer, source = model.vision_model.bt_adapter.layers[0], model.vision_model.vision_model.encoder.layers[2]
    assert torch.equal(layer.spatial.mlp.fc1.weight, source.mlp.fc1.weight)
    assert not layer.temporal.proj.weight.any()


def test_dual_to_tower_and_back(dual_folder, tmp_path):
    dual, tower = BTAdapterModel.from_pretrained(dual_folder), BTAdapterVisionModel.from_pretrained(dual_folder)
    assert bit_equal(tower.state_dict(), dual.vision_model.state_dict())
    tower.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is BTAdapterVisionModel and bit_equal(again.state_dict(), tower.state_dict())
    # a tower alone does not make a dual encoder: the texts would be random
    with pytest.raises(ValueError, match="tensors missing from the checkpoint"):
        BTAdapterModel.from_pretrained(tmp_path, config=dual.config)


def test_tower_from_clip_checkpoints(clip_folder, tmp_path):
    clip = CLIPModel.from_pretrained(clip_folder)
    tower = BTAdapterVisionModel.from_pretrained(clip_folder)
    assert bit_equal(tower.vision_model.state_dict(), clip.vision_model.state_dict())
    CLIPVisionModel.from_pretrained(clip_folder).save_pretrained(tmp_path)
    tower = BTAdapterVisionModel.from_pretrained(tmp_path)
    assert bit_equal(tower.vision_model.state_dict(), clip.vision_model.state_dict())


def test_dual_back_to_clip(clip_folder, dual_folder):
    clip = CLIPModel.from_pretrained(clip_folder)
    again = CLIPModel.from_pretrained(dual_folder, config=clip.config)
    assert bit_equal(again.state_dict(), clip.state_dict())


def test_pretraining_model_to_dual_and_back(dual_folder, tmp_path):
    model = BTAdapterForPreTraining.from_pretrained(dual_folder)
    model.save_pretrained(tmp_path)
    dual = AutoModel.from_pretrained(tmp_path)
    assert type(dual) is BTAdapterModel
    assert bit_equal(dual.state_dict(), BTAdapterModel.from_pretrained(dual_folder).state_dict())
    assert bit_equal(BTAdapterForPreTraining.from_pretrained(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loading(clip_folder, dual_folder, dtype):
    for folder in (clip_folder, dual_folder):
        model = BTAdapterModel.from_pretrained(folder, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model.get_video_features(videos().to(dtype)).pooler_output.isfinite().all()


def test_device_map(dual_folder, tmp_path):
    model = BTAdapterModel.from_pretrained(dual_folder, device_map="cpu")
    expected = model.get_video_features(videos()).pooler_output
    # Too little memory for the whole model: the rest of it stays on disk and is fetched as it is needed.
    spread = BTAdapterModel.from_pretrained(
        dual_folder, device_map="auto", max_memory={"cpu": 60_000}, offload_folder=tmp_path
    )
    assert {"cpu", "disk"} == set(spread.hf_device_map.values())
    assert spread.vision_model.bt_adapter.layers[1].temporal.proj.weight.device.type == "meta"
    torch.testing.assert_close(spread.get_video_features(videos()).pooler_output, expected, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------ strictness


def edited(folder, target, edit) -> str:
    """A copy of a checkpoint with its tensors changed by `edit`."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def test_half_a_branch_is_refused(dual_folder, tmp_path):
    key = "vision_model.bt_adapter.layers.0.temporal.proj.weight"
    with pytest.raises(ValueError, match=rf"1 tensors missing from the checkpoint:\n  {key}"):
        BTAdapterModel.from_pretrained(edited(dual_folder, tmp_path / "a", lambda t: t.pop(key)))


def test_a_missing_backbone_tensor_is_refused(clip_folder, tmp_path):
    key = "vision_model.encoder.layers.1.mlp.fc1.weight"
    with pytest.raises(ValueError, match="1 tensors missing") as error:
        BTAdapterModel.from_pretrained(edited(clip_folder, tmp_path / "a", lambda t: t.pop(key)))
    assert "nearest" not in str(error.value)  # nothing is left over in the checkpoint; a tensor is not its own nearest


def test_a_tensor_without_a_place_is_refused_with_the_nearest_name(dual_folder, tmp_path):
    def misspell(tensors):
        tensors["vision_model.bt_adapter.fusion_gates"] = tensors.pop("vision_model.bt_adapter.fusion_gate")

    with pytest.raises(ValueError, match=r"without a place in the model:\n.*fusion_gates \(nearest: .*fusion_gate\)"):
        BTAdapterModel.from_pretrained(edited(dual_folder, tmp_path / "a", misspell))


def test_fewer_adapter_layers_than_the_checkpoint_has_is_refused(dual_folder):
    with pytest.raises(ValueError, match="without a place in the model"):
        BTAdapterModel.from_pretrained(dual_folder, adapter_layers=[2])


def test_another_width_is_refused(dual_folder, tmp_path):
    def widen(tensors):
        tensors["vision_model.bt_adapter.video_cls"] = torch.zeros(17)

    folder = edited(dual_folder, tmp_path / "a", widen)
    text = r"1 tensors of another shape:\n.*video_cls: \(17,\) in the checkpoint, \(16,\) in the model\nSet the sizes"
    for options in ({}, {"ignore_mismatched_sizes": True}):  # a tensor of random numbers is no answer either way
        with pytest.raises(ValueError, match=text):
            BTAdapterModel.from_pretrained(folder, **options)
    with pytest.raises(
        ValueError, match=r"time_embedding.weight: \(64, 16\) in .*, \(9, 16\) in .*\nSet max_frames to"
    ):
        BTAdapterModel.from_pretrained(dual_folder, max_frames=9)


def test_bad_inputs_are_named(dual_folder):
    model = BTAdapterModel.from_pretrained(dual_folder)
    with pytest.raises(ValueError, match="25 tokens long and the text tower takes 24"):
        model.get_text_features(torch.ones(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="For images call get_image_features"):
        model.get_video_features(videos()[:, 0])
    with pytest.raises(ValueError, match="For videos call get_video_features"):
        model.get_image_features(videos())
    with pytest.raises(ValueError, match="found 3 texts and 2 videos"):
        model(pixel_values_videos=videos(2), **texts(), return_loss=True)


# ----------------------------------------------------------------------------------------------- code that travels


def test_a_saved_directory_loads_where_the_package_is_absent(dual_folder, tmp_path):
    model, folder = BTAdapterModel.from_pretrained(dual_folder), tmp_path / "with_code"
    save_with_code(folder, model, tiny_pairs.processor())
    expected = model.get_video_features(videos()).pooler_output.detach()
    save_file({"videos": videos(), "expected": expected}, tmp_path / "io.safetensors")
    tower = tmp_path / "tower"
    save_with_code(tower, BTAdapterVisionModel.from_pretrained(dual_folder))
    code = f"""
import sys
sys.modules["bt_adapter_hf"] = None  # as if it were not installed
import numpy as np, torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor
io = load_file({str(tmp_path / "io.safetensors")!r})
model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
torch.testing.assert_close(model.get_video_features(io["videos"]).pooler_output, io["expected"], atol=1e-6, rtol=0)
tower = AutoModel.from_pretrained({str(tower)!r}, trust_remote_code=True)
torch.testing.assert_close(tower(io["videos"]).pooler_output, model.vision_model(io["videos"]).pooler_output)
processor = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)
inputs = processor(videos=np.zeros((9, 20, 20, 3), np.uint8), text="red", return_tensors="pt")
print(type(model).__module__.split(".")[0], model(**inputs).logits_per_video.shape)
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "transformers_modules torch.Size([1, 1])"


def test_plain_saves_carry_no_code(dual_folder, tmp_path):
    save_with_code(tmp_path / "with_code", BTAdapterModel.from_pretrained(dual_folder), tiny_pairs.processor())
    BTAdapterModel.from_pretrained(tmp_path / "with_code").save_pretrained(tmp_path / "plain")
    tiny_pairs.processor().save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert type(AutoProcessor.from_pretrained(tmp_path / "plain")).__name__ == "BTAdapterProcessor"


def test_the_tower_comes_out_of_a_dual_encoder_put_together_in_memory(clip_folder, tmp_path):
    """Its saved names differ from those of one that was loaded; the tower is saved and loaded on as any other."""
    model = get_bt_adapter_model(CLIPModel.from_pretrained(clip_folder), 2)
    tiny_hosts.stir(model.vision_model.bt_adapter)
    model.save_pretrained(tmp_path / "dual")
    tower = BTAdapterVisionModel.from_pretrained(tmp_path / "dual")
    tower.save_pretrained(tmp_path / "tower")
    again = BTAdapterVisionModel.from_pretrained(tmp_path / "tower")
    whole = BTAdapterModel.from_pretrained(tmp_path / "dual").vision_model
    for found in (tower, again, whole):
        state = found.state_dict()
        assert all(tensor.equal(state[name]) for name, tensor in model.vision_model.state_dict().items())
