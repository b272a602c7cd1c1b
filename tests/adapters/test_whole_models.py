"""A folder with a whole model, from `save_pretrained` or a pretraining run, taken as an adapter: its branch."""

import json

import pytest
import torch
from transformers import CLIPModel

from bt_adapter_hf import (
    BTAdapterLlavaForConditionalGeneration,
    BTAdapterModel,
    load_bt_adapter,
    save_bt_adapter,
    unload_bt_adapter,
)
from bt_adapter_hf.adapters.files import AdapterError
from bt_adapter_hf.adapters.host_modules import find_tower
from bt_adapter_hf.adapters.whole_models import read_config
from tests import tiny_pairs
from tests.adapters.test_verbs import refused
from tests.chat import tiny_hosts


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return CLIPModel(tiny_pairs.clip_config()).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, clip):
    """A run of pretraining on `clip`, its dual encoder, its tower, one in several files, and its adapter."""
    folder = tmp_path_factory.mktemp("whole")
    model = tiny_pairs.model()
    model.vision_model.vision_model.load_state_dict(clip.vision_model.state_dict())
    tiny_hosts.stir(model.vision_model.bt_adapter)
    model.save_pretrained(folder / "run")
    (folder / "run" / "run_summary.json").write_text(json.dumps({"model": "org/clip", "revision": "abc"}))
    BTAdapterModel.from_pretrained(folder / "run").save_pretrained(folder / "dual")
    model.vision_model.save_pretrained(folder / "tower")
    model.save_pretrained(folder / "shards", max_shard_size="20kB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 2
    save_bt_adapter(model.vision_model, folder / "adapter")
    return folder


@pytest.mark.parametrize("kind", ["run", "dual", "tower", "shards"])
def test_the_branch_of_a_whole_model(clip, folders, kind):
    model = load_bt_adapter(CLIPModel(clip.config).eval(), folders / kind, allow_backbone_mismatch=True)
    expected = load_bt_adapter(CLIPModel(clip.config).eval(), folders / "adapter", allow_backbone_mismatch=True)
    for name, parameter in find_tower(expected).bt_adapter.named_parameters():
        assert parameter.equal(find_tower(model).bt_adapter.get_parameter(name)), name
    assert read_config(folders / kind).fingerprint == read_config(folders / "adapter").fingerprint
    named = (read_config(folders / kind).base_model_name_or_path, read_config(folders / kind).revision)
    assert named == (("org/clip", "abc") if kind == "run" else (str(folders / kind), None))


def test_a_dual_encoder_without_its_branch_is_the_native_model_on_disk_too(clip, folders, tmp_path):
    native = unload_bt_adapter(BTAdapterModel.from_pretrained(folders / "dual"))
    native.save_pretrained(tmp_path)
    assert not hasattr(native.config, "temperature")  # of ours, and none of CLIP's
    again = CLIPModel.from_pretrained(tmp_path)
    for name, value in clip.vision_model.state_dict().items():
        assert again.vision_model.state_dict()[name].equal(value), name


def test_another_backbone_is_refused_all_the_same(folders):
    torch.manual_seed(7)
    refused(CLIPModel(tiny_pairs.clip_config()), folders / "dual", "they differ by .*allow_backbone_mismatch")


def test_a_chat_model_takes_it_while_loading(tmp_path):
    native = tiny_hosts.llava()
    native.save_pretrained(tmp_path / "native")
    from bt_adapter_hf import BTAdapterVisionModel

    tower = BTAdapterVisionModel.from_backbone(native.model.vision_tower)
    tiny_hosts.stir(tower.bt_adapter)
    tower.save_pretrained(tmp_path / "tower")
    save_bt_adapter(tower, tmp_path / "adapter")
    one, two = (
        BTAdapterLlavaForConditionalGeneration.from_pretrained(tmp_path / "native", bt_adapter=tmp_path / kind)
        for kind in ("tower", "adapter")
    )
    for name, parameter in find_tower(one).bt_adapter.named_parameters():
        assert parameter.equal(find_tower(two).bt_adapter.get_parameter(name)), name


def test_what_is_neither_is_said(tmp_path, clip):
    model = CLIPModel(clip.config)
    tiny_hosts.llava().save_pretrained(tmp_path / "chat")
    refused(model, tmp_path / "chat", "holds no bt_adapter_config.json.*A whole model is loaded with")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(AdapterError, match="config.json is damaged"):
        load_bt_adapter(model, tmp_path / "broken")
