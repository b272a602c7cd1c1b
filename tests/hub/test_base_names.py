"""What a publication says of a base model that was a folder: nothing. Names of the Hub stay."""

import json

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText

from bt_adapter_hf import (
    BTAdapterLlavaForConditionalGeneration,
    load_bt_adapter,
    lora_config,
    save_bt_adapter,
)
from bt_adapter_hf.adapters.files import AdapterError
from bt_adapter_hf.hub.push import push_to_hub
from tests.chat import saved_hosts


pytestmark = [
    pytest.mark.filterwarnings("ignore:Warnings while validating metadata"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),  # of peft
]
SUMMARY = {"kind": "instruction tuning", "revision": None, "steps": 1, "total_steps": 1, "finished": True}


@pytest.fixture
def made(hub, tmp_path, monkeypatch):
    """Folders with an adapter, LoRA and a whole model of the host in `llava/native`, named so, seen from elsewhere."""
    saved_hosts.save("llava", tmp_path / "llava")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = BTAdapterLlavaForConditionalGeneration.from_pretrained("llava/native", bt_adapter="llava/adapter")
    torch.manual_seed(0)
    save_bt_adapter(model, "adapter")
    model.save_pretrained("whole")
    peft.get_peft_model(model, lora_config(model, r=2, init_lora_weights=False)).save_pretrained("lora")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def published(hub, name) -> dict[str, str]:
    return {path: data.decode() for path, data in hub.files(name).items() if path.endswith((".json", ".md"))}


def check(hub, name, folder) -> None:
    """No file names a folder, nor the repository of a stranger; and who names the model has the adapter."""
    files = published(hub, name)
    assert not [path for path, text in files.items() if str(folder) in text or "llava/native" in text]
    card = ModelCard(files["README.md"])
    assert card.data.get("base_model") is None and "not known to be on the Hub" in card.text
    if "config.json" in files:
        return
    assert "Load the model yourself" in card.text and "derive from" not in card.text
    native = AutoModelForImageTextToText.from_pretrained(folder / "llava" / "native")
    again = load_bt_adapter(native, name).state_dict()
    native = AutoModelForImageTextToText.from_pretrained(folder / "llava" / "native")
    here = load_bt_adapter(native, folder / name.rpartition("/")[2]).state_dict()
    assert again.keys() == here.keys() and all(tensor.equal(again[key]) for key, tensor in here.items())
    with pytest.raises(AdapterError, match="names no base model: load the model that it belongs to"):
        BTAdapterLlavaForConditionalGeneration.from_pretrained(name)


def test_a_base_that_was_a_folder_is_named_nowhere(hub, made, caplog):
    native = str(made / "llava" / "native")
    for name in ("adapter", "lora", "whole"):
        summary = {**SUMMARY, "model": native, "data": {"train": {"source": f"{made}/clips/train.jsonl", "rows": 1}}}
        (made / name / "run_summary.json").write_text(json.dumps(summary))
        for file in {"bt_adapter_config.json", "adapter_config.json"} & {
            path.name for path in (made / name).iterdir()
        }:
            assert json.loads((made / name / file).read_text())["base_model_name_or_path"] == native
        caplog.clear()
        push_to_hub(made / name, f"tester/{name}")
        assert f"names no base model: {native} is a folder of this machine" in caplog.text
        check(hub, f"tester/{name}", made)
        assert (
            json.loads(published(hub, f"tester/{name}")["run_summary.json"])["data"]["train"]["source"]
            == "train.jsonl"
        )
    model = BTAdapterLlavaForConditionalGeneration.from_pretrained(native)
    push_to_hub(model, "tester/in-memory")
    check(hub, "tester/in-memory", made)


def test_a_name_without_a_commit_is_not_taken_for_a_repository(hub, made, caplog):
    """Older versions kept the path that was typed."""
    for name in ("adapter", "lora"):
        for file in {"bt_adapter_config.json", "adapter_config.json"} & {
            path.name for path in (made / name).iterdir()
        }:
            content = json.loads((made / name / file).read_text())
            (made / name / file).write_text(json.dumps({**content, "base_model_name_or_path": "llava/native"}))
        (made / name / "run_summary.json").write_text(json.dumps({**SUMMARY, "model": "llava/native"}))
        push_to_hub(made / name, f"tester/{name}")
        assert not [request for request in hub.requests() if "llava/native" in request.path]
        assert "'llava/native' is recorded without a commit of the Hub" in caplog.text
        check(hub, f"tester/{name}", made)
    (made / "whole" / "run_summary.json").write_text(json.dumps({**SUMMARY, "model": "llava/native"}))
    push_to_hub(made / "whole", "tester/whole")
    check(hub, "tester/whole", made)


def test_an_id_of_the_hub_stays_whatever_lies_in_the_current_folder(hub, made, monkeypatch, caplog):
    monkeypatch.chdir(made)  # where llava/native is a folder
    commit = "a" * 40
    for file in ("bt_adapter_config.json", "adapter_config.json"):  # peft names no commit
        content = json.loads((made / "lora" / file).read_text()) | {"base_model_name_or_path": "llava/native"}
        content["revision"] = commit if file == "bt_adapter_config.json" else None
        (made / "lora" / file).write_text(json.dumps(content))
    push_to_hub(made / "lora", "tester/lora")
    files = published(hub, "tester/lora")
    for file in ("bt_adapter_config.json", "adapter_config.json"):
        assert json.loads(files[file])["base_model_name_or_path"] == "llava/native"
    assert ModelCard(files["README.md"]).data.base_model == "llava/native" and "names no base model" not in caplog.text
