"""Publishing: every kind of repository, whole or not at all."""

import dataclasses
import hashlib
import json
import shutil

import peft
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from bt_adapter_hf import (
    BTAdapterForPreTraining,
    BTAdapterInstructBlipForConditionalGeneration,
    BTAdapterInstructBlipProcessor,
    BTAdapterLlavaForConditionalGeneration,
    BTAdapterLlavaProcessor,
    BTAdapterMiniGPT4ForConditionalGeneration,
    BTAdapterMiniGPT4Processor,
    BTAdapterModel,
    BTAdapterProcessor,
    BTAdapterVisionModel,
    load_bt_adapter,
    lora_config,
    save_bt_adapter,
)
from bt_adapter_hf.hub.contents import collect_files
from bt_adapter_hf.hub.push import PushError, push_to_hub
from tests import tiny_pairs
from tests.chat import saved_hosts, tiny_hosts


pytestmark = [
    pytest.mark.filterwarnings("ignore:Warnings while validating metadata"),  # the Hub's, of a card without a licence
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),  # of peft
]

HOSTS = {
    "llava": (BTAdapterLlavaForConditionalGeneration, BTAdapterLlavaProcessor),
    "instructblip": (BTAdapterInstructBlipForConditionalGeneration, BTAdapterInstructBlipProcessor),
    "blip-2": (BTAdapterMiniGPT4ForConditionalGeneration, BTAdapterMiniGPT4Processor),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Retries without waiting."""
    monkeypatch.setattr("bt_adapter_hf.hub.access.RETRY_WAITS", [0.01, 0.01, 0.01])


@pytest.fixture(scope="module")
def dual():
    torch.manual_seed(0)
    model = BTAdapterModel(tiny_pairs.model().config).eval()
    tiny_hosts.stir(model.vision_model.bt_adapter)
    return model


@pytest.fixture(scope="module", params=HOSTS)
def host(request, tmp_path_factory):
    """(chat model with an adapter, its processor, folder of the adapter, folder of the native model)"""
    native, adapter = saved_hosts.save(request.param, tmp_path_factory.mktemp(request.param))
    model_class, processor_class = HOSTS[request.param]
    model = model_class.from_pretrained(native, bt_adapter=adapter)
    return model, processor_class.from_pretrained(native, num_frames=4), adapter, native


def plain(processor) -> dict:
    """What it does, without the names of code that came with it."""
    content = json.loads(processor.to_json_string())
    content["video_processor"].pop("auto_map", None)
    content.pop("auto_map", None)
    return content


def same(model, other) -> None:
    assert type(model) is type(other)
    state = other.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(tensor.equal(state[key]) for key, tensor in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------- every kind


def test_dual_encoder_with_its_processor(hub, dual):
    pushed = push_to_hub(dual, "tester/dual", processor=tiny_pairs.processor(), card={"license": "mit"})
    assert [commit.title for commit in hub.history("tester/dual")].count("Upload dual encoder") == 1
    assert pushed.commit == hub.head("tester/dual") and pushed.url.endswith(pushed.commit)
    assert set(pushed.files) == set(hub.files("tester/dual")) - {".gitattributes"}
    again = BTAdapterModel.from_pretrained("tester/dual")
    same(dual, again)
    assert again._loaded_from == ("tester/dual", pushed.commit)
    processor = BTAdapterProcessor.from_pretrained("tester/dual")
    assert plain(processor) == plain(tiny_pairs.processor())


def test_pretraining_model_and_tower(hub, dual):
    pretraining = tiny_pairs.model()
    push_to_hub(pretraining, "tester/pretraining")
    same(pretraining, BTAdapterForPreTraining.from_pretrained("tester/pretraining"))
    assert type(BTAdapterModel.from_pretrained("tester/pretraining")) is BTAdapterModel
    push_to_hub(dual.vision_model, "tester/tower")
    same(dual.vision_model, BTAdapterVisionModel.from_pretrained("tester/tower"))


def test_chat_hosts_and_their_processors(hub, host):
    model, processor, _, _ = host
    push_to_hub(model, "tester/chat", max_shard_size="40KB")
    names = {name for name in hub.files("tester/chat") if name.endswith(".safetensors")}
    assert len(names) > 2 and "model.safetensors.index.json" in hub.files("tester/chat")
    same(model, type(model).from_pretrained("tester/chat"))
    # a processor into the same repository: the rest stays
    before = hub.files("tester/chat")
    push_to_hub(processor, "tester/chat")
    after = hub.files("tester/chat")
    assert before.items() <= after.items()
    again = type(processor).from_pretrained("tester/chat")
    assert plain(again) == plain(processor)
    for name in ("tokenizer", "qformer_tokenizer"):  # the latter InstructBLIP's, in a folder of its own
        if hasattr(processor, name):
            assert getattr(again, name).get_vocab() == getattr(processor, name).get_vocab()


def test_adapter_folder_without_the_base(hub, host):
    model, _, adapter, native = host
    pushed = push_to_hub(adapter, "tester/adapter")
    assert set(pushed.files) == {"README.md", "bt_adapter.safetensors", "bt_adapter_config.json"}
    again = type(model).from_pretrained(native, bt_adapter="tester/adapter")
    same(model, again)


def test_lora_with_the_branch(hub, host):
    model, _, adapter, native = host
    fresh = type(model).from_pretrained(native, bt_adapter=adapter)
    wrapped = peft.get_peft_model(fresh, lora_config(fresh, r=2, init_lora_weights=False)).eval()
    pushed = push_to_hub(wrapped, "tester/lora")
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    expected |= {"bt_adapter_config.json", "bt_adapter.safetensors"}  # the latter: the branch before tuning
    assert set(pushed.files) == expected
    hub.put_files("tester/native", native)
    again = load_bt_adapter(AutoModelForImageTextToText.from_pretrained("tester/native"), "tester/lora")
    same(wrapped, again)
    same(wrapped, load_bt_adapter(type(model).from_pretrained(native, bt_adapter=adapter), "tester/lora"))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in wrapped.named_parameters() if p.requires_grad
    }
    card = hub.files("tester/lora")["README.md"].decode()
    assert "library_name: peft" in card and "More Information Needed" not in card


def test_their_own_push_to_hub_works(hub, dual, host):
    """The method that transformers gives each class: no code and a bare card, and it loads with the package."""
    model, processor, _, _ = host
    for source, name in ((dual, "tester/a"), (dual.vision_model, "tester/b"), (model, "tester/c")):
        source.push_to_hub(name)
        same(source, type(source).from_pretrained(name))
    tiny_pairs.processor().push_to_hub("tester/a")
    assert plain(BTAdapterProcessor.from_pretrained("tester/a")) == plain(tiny_pairs.processor())
    processor.push_to_hub("tester/c")
    assert plain(type(processor).from_pretrained("tester/c")) == plain(processor)
    # ours over it: the card that says nothing is replaced, the code comes along
    push_to_hub(dual, "tester/a")
    assert "modeling_bt_adapter.py" in hub.files("tester/a")
    assert "automatically generated" not in hub.files("tester/a")["README.md"].decode()


# ------------------------------------------------------------------------------------------- what goes, and where


def test_of_a_folder_only_what_belongs_there(hub, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "run")
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "pytorch_model.bin",
        "broken_items.jsonl",
        "log.txt~",
        "evil.py",
        "service-account.json",
        "passwords.txt",
        "holiday.jpg",
        "notes.md",
        ".env",
        "model-backup.safetensors",
        "model.safetensors.orig",
        "Config.json",
    ):
        (folder / name).write_bytes(b"x")
    (folder / "qformer_tokenizer").mkdir()
    (folder / "qformer_tokenizer" / "secret.json").write_text("{}")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    (folder / "run_summary.json").write_text("{}")
    pushed = push_to_hub(folder, "tester/run", with_code=False)
    assert set(hub.files("tester/run")) - {".gitattributes"} == {
        "README.md", "config.json", "model.safetensors", "processor_config.json", "run_summary.json",
        "tokenizer.json", "tokenizer_config.json",
        "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
    }  # fmt: skip
    left_out = {
        "checkpoint-5",
        "training_args.bin",
        "optimizer.pt",
        "pytorch_model.bin",
        "broken_items.jsonl",
        "evil.py",
        "log.txt~",
        "trainer_state.json",
        "service-account.json",
        "passwords.txt",
        "holiday.jpg",
        "notes.md",
        ".env",
        "model-backup.safetensors",
        "model.safetensors.orig",
        "Config.json",
        "qformer_tokenizer",
        "qformer_tokenizer/secret.json",
    }
    assert set(pushed.left_out) == left_out


def test_what_is_named_is_published_too(hub, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "run")
    (folder / "images").mkdir()
    for name in ("LICENSE", "images/a.png", "images/b.png", "images/c.txt", "passwords.txt"):
        (folder / name).write_bytes(b"x")
    pushed = push_to_hub(folder, "tester/more", with_code=False, include=["LICENSE", "images/*.png"])
    assert {"LICENSE", "images/a.png", "images/b.png"} <= set(pushed.files)
    assert pushed.left_out == ["passwords.txt"] and not {"passwords.txt", "images/c.txt"} & set(pushed.files)
    (tmp_path / "outside.txt").write_text("x")
    (folder / "images" / "link.txt").symlink_to(tmp_path / "outside.txt")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    for name, said in (
        ("nope*", "holds no file 'nope\\*'"),
        ("../run/LICENSE", "is no path in"),
        ("images", "no file"),
        (".", "is no path in"),
        ("images/link.txt", "is a link to .*outside.txt, outside of the folder"),
    ):
        with pytest.raises(ValueError, match=said):
            push_to_hub(folder, "tester/more", include=[name])


def test_links_that_lead_out_are_refused(tiny_checkpoint, tmp_path):
    """But for those of the Hub's cache, where every file is a link to one beside the snapshots."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "models--a--b" / "snapshots" / "0123")
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (folder / "itself").symlink_to(folder / "itself")
    config = folder / "config.json"
    for place in ("models--a--b/blobs/1", "elsewhere"):
        (tmp_path / place).write_bytes(config.read_bytes())
        config.unlink()
        config.symlink_to(tmp_path / place)
        if place == "elsewhere":
            with pytest.raises(ValueError, match="config.json is a link to .*elsewhere, outside of the folder: copy"):
                collect_files(folder)
        else:
            files, left_out = collect_files(folder)
            assert "config.json" in files and left_out == ["itself"]


def test_branch_pull_request_and_privacy(hub, dual):
    first = push_to_hub(dual, "tester/places", private=True)
    assert HfApi().repo_info("tester/places").private
    tower = dual.vision_model
    branch = push_to_hub(tower, "tester/places", revision="tower", commit_message="The tower alone")
    assert hub.head("tester/places", "tower") == branch.commit != first.commit == hub.head("tester/places")
    same(tower, BTAdapterVisionModel.from_pretrained("tester/places", revision="tower"))
    request = push_to_hub(tower, "tester/places", create_pr=True)
    assert request.pull_request == 1 and request.url.endswith("/discussions/1")
    assert hub.head("tester/places") == first.commit
    same(tower, BTAdapterVisionModel.from_pretrained("tester/places", revision="refs/pr/1"))
    with pytest.raises(ValueError, match="revision or create_pr, not both"):
        push_to_hub(tower, "tester/places", create_pr=True, revision="tower")
    push_to_hub(tower, "tester/public")
    with pytest.raises(ValueError, match="exists and is public"):
        push_to_hub(tower, "tester/public", private=True)


def test_a_name_without_namespace_is_the_users(hub, dual):
    assert push_to_hub(dual.vision_model, "mine").repo_id == "tester/mine"


def test_weights_of_before_are_not_loaded_in_place_of_the_new(hub, dual):
    """`from_pretrained` takes model.safetensors before the shards."""
    push_to_hub(dual, "tester/again")
    torch.manual_seed(5)
    other = BTAdapterModel(dual.config)
    push_to_hub(other, "tester/again", max_shard_size="60KB")
    assert "model.safetensors" not in hub.files("tester/again")
    same(other, BTAdapterModel.from_pretrained("tester/again"))
    push_to_hub(dual, "tester/again")
    assert not [name for name in hub.files("tester/again") if "-of-" in name or "index" in name]
    same(dual, BTAdapterModel.from_pretrained("tester/again"))


def test_what_is_incomplete_or_foreign_is_refused(hub, tiny_checkpoint, host, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for source, message in (
        (folder, r"holds no model.safetensors.* Pickles such as pytorch_model.bin"),
        (host[3], "which is none of this package"),
        (tmp_path, "it is no model, adapter or processor"),
        (tmp_path / "nowhere", "is no folder"),
        (torch.nn.Linear(2, 2), "A Linear is no model or processor"),
    ):
        with pytest.raises(ValueError, match=message):
            push_to_hub(source, "tester/refused")
    both = shutil.copytree(host[2], tmp_path / "both")
    shutil.copy(tiny_checkpoint / "config.json", both)
    with pytest.raises(ValueError, match="holds a model and an adapter"):
        push_to_hub(both, "tester/refused")
    sharded = tmp_path / "sharded"
    BTAdapterModel.from_pretrained(tiny_checkpoint).save_pretrained(sharded, max_shard_size="60KB")
    next(sharded.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match="holds no model-00002-of-"):
        push_to_hub(sharded, "tester/refused")
    assert not hub.requests("refused")


# --------------------------------------------------------------------------------------------------------- interrupted


def contents(hub, repo_id):
    return hub.head(repo_id), {name: hashlib.sha256(data).hexdigest() for name, data in hub.files(repo_id).items()}


FOREVER = {"times": -1}


@pytest.mark.parametrize(
    "kind, path, said",
    [
        ("unavailable", "/commit/", r"503"),
        ("forbidden", "/commit/", "403"),
        ("refused", "/commit/", "could not be reached"),
        ("wrong_token", "/preupload/", "refused the token"),
        ("disk_full", "/uploads/", "disk full"),
    ],
)
def test_an_interrupted_push_leaves_the_remote_as_it_was(hub, dual, kind, path, said):
    push_to_hub(dual, "tester/kept")
    before = contents(hub, "tester/kept")
    hub.fail(kind, path, **FOREVER)
    torch.manual_seed(6)
    with pytest.raises(PushError, match=said) as error:
        push_to_hub(BTAdapterModel(dual.config), "tester/kept")
    assert contents(hub, "tester/kept") == before
    assert f"is as it was, at {before[0]}" in str(error.value) and "Nothing was published" in str(error.value)
    same(dual, BTAdapterModel.from_pretrained("tester/kept"))


def test_an_interrupted_first_push_says_what_is_there(hub, dual):
    hub.fail("unavailable", "/commit/", **FOREVER)
    with pytest.raises(PushError, match="Nothing was published.* tester/new was created for it"):
        push_to_hub(dual, "tester/new")
    assert set(hub.files("tester/new")) <= {".gitattributes"}
    push = hub.requests("/commit/")
    assert len(push) == 4  # the first try and three more


@pytest.mark.parametrize(
    "path, kind",
    [
        *(
            (path, kind)
            for path in ("/commit/", "/repos/create")
            for kind in ("unavailable", "too_many", "refused", "lost")
        ),
        ("/paths-info/", "unavailable"),
        ("/preupload/", "lost"),
        ("/uploads/", "lost"),
    ],
)
def test_what_passes_is_tried_again(hub, dual, kind, path):
    """Also where the answer is lost after the deed: no error, and one commit."""
    hub.fail(kind, path, times=2 if kind != "lost" else 1)
    pushed = push_to_hub(dual.vision_model, "tester/retried")
    titles = [commit.title for commit in hub.history("tester/retried")]
    assert titles.count("Upload tower") == 1 and hub.head("tester/retried") == pushed.commit
    same(dual.vision_model, BTAdapterVisionModel.from_pretrained("tester/retried"))


def test_a_pull_request_is_opened_once(hub, dual):
    push_to_hub(dual.vision_model, "tester/pr")
    hub.fail("lost", "/commit/")
    torch.manual_seed(7)
    pushed = push_to_hub(BTAdapterVisionModel(dual.vision_model.config), "tester/pr", create_pr=True)
    assert pushed.pull_request == 1
    assert len(HfApi().list_repo_refs("tester/pr", include_pull_requests=True).pull_requests) == 1


def test_a_change_by_someone_else_is_not_overwritten(hub, dual, monkeypatch):
    push_to_hub(dual, "tester/shared")
    create = HfApi.create_commit

    def slow(self, *args, **kwargs):
        monkeypatch.setattr(HfApi, "create_commit", create)
        hub.put_files("tester/shared", {"notes.txt": b"mine"})
        return create(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", slow)
    with pytest.raises(PushError, match="changed by someone else"):
        push_to_hub(dual.vision_model, "tester/shared")
    assert hub.files("tester/shared")["notes.txt"] == b"mine"
    same(dual, BTAdapterModel.from_pretrained("tester/shared"))


def test_hashes_are_compared_after_the_push(hub, dual, monkeypatch):
    """A Hub that keeps other bytes than it was sent."""
    create = HfApi.create_commit

    def altering(self, repo_id, *args, **kwargs):
        info = create(self, repo_id, *args, **kwargs)
        weights = bytearray(hub.files(repo_id)["model.safetensors"])
        weights[-1] ^= 1
        hub.put_files(repo_id, {"model.safetensors": bytes(weights)})
        return dataclasses.replace(info, oid=hub.head(repo_id))

    monkeypatch.setattr(HfApi, "create_commit", altering)
    with pytest.raises(PushError, match="differs from what was pushed: model.safetensors. Push again"):
        push_to_hub(dual, "tester/checked")


def test_adapter_saved_by_the_verb(hub, dual, tmp_path):
    save_bt_adapter(dual, tmp_path, base_model_name_or_path="openai/clip-vit-large-patch14", revision="a" * 40)
    push_to_hub(tmp_path, "tester/of-clip")
    saved = load_file(tmp_path / "bt_adapter.safetensors")
    assert saved and "base_model_relation: adapter" in hub.files("tester/of-clip")["README.md"].decode()
