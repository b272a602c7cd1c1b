"""Loading from the Hub: adapters with their base, pinned, offline, and through faults."""

import argparse
import json
import shutil

import pytest
import torch
from huggingface_hub import HfApi
from transformers import CLIPModel

from bt_adapter_hf import (
    BTAdapterLlavaForConditionalGeneration,
    BTAdapterLlavaProcessor,
    BTAdapterModel,
    BTAdapterVisionModel,
    load_bt_adapter,
    lora_config,
    save_bt_adapter,
)
from bt_adapter_hf.adapters.files import AdapterError
from bt_adapter_hf.cli.chat import find_model
from bt_adapter_hf.hub.push import push_to_hub
from tests import tiny_pairs
from tests.chat import saved_hosts, tiny_hosts
from tests.hub.clients import run_python


pytestmark = [
    pytest.mark.filterwarnings("ignore:Warnings while validating metadata"),  # the Hub's, of a card without a licence
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),  # of peft
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Retries without waiting."""
    monkeypatch.setattr("bt_adapter_hf.hub.access.RETRY_WAITS", [0.01, 0.01, 0.01])


def clip(seed: int = 0) -> CLIPModel:
    torch.manual_seed(seed)
    return CLIPModel(tiny_pairs.clip_config()).eval()


@pytest.fixture(scope="module")
def llava_files(tmp_path_factory):
    return saved_hosts.save("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture
def llava(hub, llava_files):
    """A LLaVA on the Hub, and the adapter that was tuned in it: "org/llava" and "org/adapter"."""
    native, adapter = llava_files
    hub.create("org/llava")
    hub.put_files("org/llava", {path.name: path.read_bytes() for path in native.iterdir()})
    model = BTAdapterLlavaForConditionalGeneration.from_pretrained("org/llava", bt_adapter=adapter)
    publish_adapter(hub, model, "org/adapter", adapter.parent / "tuned")
    return model


def publish_adapter(hub, model, repo_id, folder) -> dict:
    save_bt_adapter(model, folder)
    hub.create(repo_id)
    hub.put_files(repo_id, {path.name: path.read_bytes() for path in folder.iterdir()})
    return json.loads((folder / "bt_adapter_config.json").read_text())


@pytest.fixture
def of_clip(hub, tmp_path):
    """A CLIP on the Hub, and an adapter pretrained on it: "tester/clip" and "tester/clip-adapter"."""
    clip().save_pretrained(tmp_path / "clip")
    hub.create("tester/clip")
    hub.put_files("tester/clip", {path.name: path.read_bytes() for path in (tmp_path / "clip").iterdir()})
    model = BTAdapterModel.from_pretrained("tester/clip", adapter_layers=[1, 2])
    tiny_hosts.stir(model.vision_model.bt_adapter)
    publish_adapter(hub, model, "tester/clip-adapter", tmp_path / "adapter")
    return model


def same(model, other) -> None:
    assert type(model) is type(other)
    state = other.state_dict()
    assert all(tensor.equal(state[key]) for key, tensor in model.state_dict().items())


# ------------------------------------------------------------------------------------------- an adapter finds its base


def test_an_adapter_alone_brings_its_base(hub, llava, tmp_path):
    pinned = hub.head("org/llava")
    config = json.loads(hub.files("org/adapter")["bt_adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/llava", pinned)
    other = tiny_hosts.llava()
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    hub.put_files("org/llava", {"model.safetensors": (tmp_path / "other" / "model.safetensors").read_bytes()})
    assert hub.head("org/llava") != pinned  # the base has moved on, and the adapter stays with its own
    again = BTAdapterLlavaForConditionalGeneration.from_pretrained("org/adapter")
    same(llava, again)
    assert again._loaded_from == ("org/llava", pinned)
    assert not any(p.requires_grad for p in again.model.vision_tower.vision_model.parameters())
    again, info = BTAdapterLlavaForConditionalGeneration.from_pretrained("org/adapter", output_loading_info=True)
    same(llava, again)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_an_adapter_brings_its_processor(hub, llava, llava_files, tmp_path):
    processor = BTAdapterLlavaProcessor.from_pretrained(llava_files[0], num_frames=6)
    processor.save_pretrained(tmp_path / "processor")
    hub.put_files("org/adapter", {path.name: path.read_bytes() for path in (tmp_path / "processor").iterdir()})
    options = {"revision": None, "num_frames": None, "num_clips": None, "files": ["a.mp4"]}
    for names in ({"model": "org/llava", "bt_adapter": "org/adapter"}, {"model": "org/adapter", "bt_adapter": None}):
        found, _ = find_model(argparse.Namespace(**options, **names))
        assert found.video_processor.num_frames == 6


def test_dual_encoder_and_tower_of_an_adapter(hub, of_clip, caplog):
    same(of_clip, BTAdapterModel.from_pretrained("tester/clip-adapter"))
    same(of_clip.vision_model, BTAdapterVisionModel.from_pretrained("tester/clip-adapter"))
    assert "newly initialised" not in caplog.text
    first = BTAdapterVisionModel.from_pretrained("tester/clip-adapter", adapter_layers=[1])
    assert first.config.adapter_layers == [1]
    layer = of_clip.vision_model.bt_adapter.layers[0].state_dict()
    assert all(tensor.equal(layer[key]) for key, tensor in first.bt_adapter.layers[0].state_dict().items())


def test_a_folder_does_as_well(hub, of_clip, tmp_path):
    same(of_clip, BTAdapterModel.from_pretrained(tmp_path / "adapter"))


def test_an_adapter_of_another_model_says_so(hub, of_clip):
    with pytest.raises(AdapterError, match="was saved from a bt_adapter with the weights of tester/clip"):
        BTAdapterLlavaForConditionalGeneration.from_pretrained("tester/clip-adapter")


def test_lora_names_the_two_steps(hub, llava, tmp_path):
    import peft

    push_to_hub(peft.get_peft_model(llava, lora_config(llava, r=2)), "tester/lora")
    pinned = hub.head("org/llava")
    with pytest.raises(
        AdapterError, match=f"from_pretrained.'org/llava', revision='{pinned}'.*load_bt_adapter.model, 'tester/lora'"
    ):
        BTAdapterLlavaForConditionalGeneration.from_pretrained("tester/lora")


def test_a_model_that_is_neither_keeps_its_error(hub):
    hub.create("org/empty")
    for load in (BTAdapterLlavaForConditionalGeneration, BTAdapterModel):
        with pytest.raises(OSError, match="org/empty"):
            load.from_pretrained("org/empty")
        with pytest.raises(OSError, match="org/nothing"):
            load.from_pretrained("org/nothing")


# ---------------------------------------------------------------------------------------------------- revisions, cache


def test_the_commit_is_recorded_whatever_revision_was_named(hub, of_clip, tmp_path):
    first = hub.head("tester/clip")
    hub.put_files("tester/clip", {"notes.txt": b"later"})
    HfApi().create_tag("tester/clip", tag="v1", revision=first)
    for revision, expected in (("v1", first), (None, hub.head("tester/clip")), (first, first)):
        model = BTAdapterModel.from_pretrained("tester/clip", revision=revision)
        assert publish_adapter(hub, model, f"org/at-{revision}", tmp_path / str(revision))["revision"] == expected
    native = CLIPModel.from_pretrained("tester/clip")
    config = publish_adapter(hub, load_bt_adapter(native, "tester/clip-adapter"), "org/native", tmp_path / "native")
    assert (config["base_model_name_or_path"], config["revision"]) == ("tester/clip", hub.head("tester/clip"))


def test_adapter_revision(hub, of_clip, tmp_path):
    first = hub.head("tester/clip-adapter")
    tiny_hosts.stir(of_clip.vision_model.bt_adapter, seed=9)
    save_bt_adapter(of_clip, tmp_path / "later")
    hub.put_files("tester/clip-adapter", {path.name: path.read_bytes() for path in (tmp_path / "later").iterdir()})
    same(of_clip, load_bt_adapter(CLIPModel.from_pretrained("tester/clip"), "tester/clip-adapter"))
    old = load_bt_adapter(CLIPModel.from_pretrained("tester/clip"), "tester/clip-adapter", revision=first)
    same(old, BTAdapterModel.from_pretrained("tester/clip-adapter", revision=first))
    assert not old.state_dict()["vision_model.bt_adapter.video_cls"].equal(
        of_clip.state_dict()["vision_model.bt_adapter.video_cls"]
    )
    with pytest.raises(OSError, match="tester/clip-adapter has no revision 'v9'"):
        load_bt_adapter(clip(), "tester/clip-adapter", revision="v9")


def test_offline_after_one_load(hub, llava, hf_home):
    """In fresh processes: one that loads, one without the Hub that loads the same."""
    import peft

    push_to_hub(peft.get_peft_model(llava, lora_config(llava, r=2, init_lora_weights=False)), "tester/lora")
    code = """
from transformers import AutoModelForImageTextToText
from bt_adapter_hf import BTAdapterLlavaForConditionalGeneration as Llava, BTAdapterLlavaProcessor, load_bt_adapter
BTAdapterLlavaProcessor.from_pretrained("org/llava")
for model in (
    Llava.from_pretrained("org/adapter"),
    Llava.from_pretrained("org/llava", bt_adapter="org/adapter"),
    load_bt_adapter(AutoModelForImageTextToText.from_pretrained("org/llava"), "tester/lora"),
):
    print(sum(p.double().sum().item() for p in model.parameters()))
"""
    online = run_python(code, hub, hf_home)
    before = len(hub.requests())
    offline = run_python(code, hub, hf_home, HF_HUB_OFFLINE="1")
    assert offline.stdout == online.stdout and len(hub.requests()) == before
    alone, named, lora = map(float, offline.stdout.split())
    assert alone == named != lora


def test_a_warm_cache_downloads_nothing(hub, llava, monkeypatch):
    BTAdapterLlavaForConditionalGeneration.from_pretrained("org/adapter")
    before = len(hub.requests())
    BTAdapterLlavaForConditionalGeneration.from_pretrained("org/adapter")
    later = hub.requests()[before:]
    assert not [request for request in later if request.method == "GET" and "/resolve/" in request.path]
    assert not [request for request in later if request.port == "storage"]


# ------------------------------------------------------------------------------------------------- gated, gone, faults


def test_a_base_that_does_not_come_is_named(hub, llava, tmp_path, hf_home, monkeypatch):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("bt_adapter_config.json", "bt_adapter.safetensors"):
        (adapter / name).write_bytes(hub.files("org/adapter")[name])
    shutil.rmtree(hf_home / "hub")
    load = BTAdapterLlavaForConditionalGeneration.from_pretrained

    hub.create("org/gated", gated=True)
    change(adapter, base_model_name_or_path="org/gated", revision=None)
    with pytest.raises(
        OSError, match=rf"is org/gated, and org/gated is gated: accept its conditions at {hub.url}/org/gated"
    ):
        load(adapter)
    change(adapter, base_model_name_or_path="org/gone")
    with pytest.raises(OSError, match="is org/gone, and org/gone does not exist on the Hub, or it is private"):
        load(adapter)
    change(adapter, base_model_name_or_path="org/llava", revision="a" * 40)
    with pytest.raises(OSError, match="is org/llava, and org/llava has no revision 'a{40}'"):
        load(adapter)
    change(adapter, base_model_name_or_path=None)
    with pytest.raises(AdapterError, match="names no base model"):
        load(adapter)
    # the way out that the text names
    native = type(tiny_hosts.llava()).from_pretrained("org/llava")
    assert isinstance(load_bt_adapter(native, adapter), BTAdapterLlavaForConditionalGeneration)


def change(folder, **fields) -> None:
    path = folder / "bt_adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


ADAPTER_FILE = r"bt_adapter\.safetensors"


@pytest.mark.parametrize(
    "kind, path",
    [
        ("unavailable", ADAPTER_FILE),
        ("refused", ADAPTER_FILE),
        ("flip", ADAPTER_FILE),
        ("cut", ADAPTER_FILE),
        ("reset", ADAPTER_FILE),
        ("unavailable", "/api/models/tester/clip-adapter"),
        ("refused", "/api/models/tester/clip-adapter"),
    ],
)
def test_what_passes_is_tried_again(hub, of_clip, kind, path):
    fault = hub.fail(kind, path, method="GET", times=1)
    same(of_clip, load_bt_adapter(clip(), "tester/clip-adapter"))
    assert fault.hits == 1


@pytest.mark.parametrize(
    "kind, path, said",
    [
        (
            "unavailable",
            "/api/models/tester/clip-adapter",
            "the Hub did not serve tester/clip-adapter .503 Service Unavailable",
        ),
        ("forbidden", "storage", r"the Hub refused access to tester/clip-adapter \(403\)"),
        ("wrong_token", "/api/models/tester/clip-adapter", r"the Hub refused the token \(401\)"),
        ("refused", "/api/models/tester/clip-adapter", r"could not be reached for tester/clip-adapter"),
        ("short", ADAPTER_FILE, "Consistency check failed"),
        ("flip", ADAPTER_FILE, "is not the file that the Hub has: its sha256 differs"),
    ],
)
def test_what_does_not_pass_is_one_clear_error(hub, of_clip, kind, path, said):
    port = {"port": "storage"} if path == "storage" else {}
    hub.fail(kind, "" if port else path, times=-1, **port)
    before = clip()
    state = {key: tensor.clone() for key, tensor in before.state_dict().items()}
    with pytest.raises((OSError, AdapterError), match=said):
        load_bt_adapter(before, "tester/clip-adapter")
    assert all(tensor.equal(state[key]) for key, tensor in before.state_dict().items())
    # nothing of it is left: the next load is whole
    hub.faults.clear()
    same(of_clip, load_bt_adapter(before, "tester/clip-adapter"))


def test_whole_models_are_explained_too(hub, of_clip, llava, hf_home):
    shutil.rmtree(hf_home / "hub")
    hub.create("org/closed", gated=True)
    hub.put_files("org/closed", {"config.json": b"{}"})
    for load in (BTAdapterModel, BTAdapterVisionModel, BTAdapterLlavaForConditionalGeneration):
        with pytest.raises(OSError, match="org/closed could not be (loaded|fetched).*: org/closed is gated"):
            load.from_pretrained("org/closed")
        with pytest.raises(OSError, match="tester/clip is no folder, .* loaded: tester/clip has no revision 'v9'"):
            load.from_pretrained("tester/clip", revision="v9")
    hub.fail("wrong_token", "", port="hub", times=-1)
    for load in (BTAdapterModel, BTAdapterVisionModel, BTAdapterLlavaForConditionalGeneration):
        with pytest.raises(OSError, match=r"tester/clip is no folder, .* loaded: the Hub refused the token \(401\)"):
            load.from_pretrained("tester/clip")


def test_a_damaged_cache_is_found(hub, of_clip, hf_home):
    load_bt_adapter(clip(), "tester/clip-adapter")
    path = next((hf_home / "hub").rglob("snapshots/*/bt_adapter.safetensors")).resolve()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterError, match="sha256 differs"):
        load_bt_adapter(clip(), "tester/clip-adapter", local_files_only=True)
    same(of_clip, load_bt_adapter(clip(), "tester/clip-adapter"))  # fetched again
