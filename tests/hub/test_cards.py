"""Model cards: filled from the files of a folder, valid, and never more than is known."""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import pipeline

from bt_adapter_hf import (
    BTAdapterLlavaForConditionalGeneration,
    BTAdapterLlavaProcessor,
    BTAdapterModel,
    lora_config,
    save_bt_adapter,
)
from bt_adapter_hf.hub.card import MARKER, model_card
from bt_adapter_hf.hub.push import push_to_hub
from bt_adapter_hf.hub.result_files import read_results
from tests import tiny_pairs
from tests.chat import saved_hosts
from tests.hub import metadata


ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Warnings while validating metadata"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
]
SUMMARY = {
    "kind": "pretraining",
    "finished": True,
    "model": "openai/clip-vit-large-patch14",
    "revision": "0" * 40,
    "config": {"adapter_layers": [20, 21, 22, 23], "mask_ratio": 0.7, "fusion": "gate"},
    "data": {
        "num_frames": 8,
        "crop_scale": None,
        "group_by_caption": True,
        "train": {"source": "org/captions", "revision": "d" * 40, "rows": 1000, "fingerprint": "f1f1"},
        "validation": {"source": "/home/me/secret-project/val.csv", "rows": 200, "fingerprint": "f2f2"},
    },
    "training": {"learning_rate": 2e-6, "seed": 42, "lr_multipliers": {"bt_adapter.": 10}, "optim": "adamw_torch"},
    "processes": 8,
    "trained_parameters": 71450000,
    "steps": 4807,
    "total_steps": 4807,
    "train_loss": 1.2345678,
    "metrics": {
        "eval_t2v_R1": 41.23456, "eval_t2v_R5": 70.5, "eval_v2t_R1": 40.0, "eval_t2v_MdR": 2.0, "eval_pairs": 200,
        "eval_shuffled_t2v_R1": 33.0, "eval_reversed_t2v_R1": 32.5, "eval_runtime": 12.0, "epoch": 1.0,
    },
    "broken_items": {"train": 3, "eval": 0},
    "seconds": 10800.5,
    "versions": {"bt_adapter_hf": "0.1.0", "torch": "2.13.0"},
}  # fmt: skip


@pytest.fixture
def run(tiny_checkpoint, tmp_path):
    """Output folder of a finished pretraining."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in tiny_checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "run_summary.json").write_text(json.dumps(SUMMARY))
    return folder


def section(card: ModelCard, title: str) -> str:
    return card.text.split(f"\n## {title}\n")[1].split("\n## ")[0].strip()


# ------------------------------------------------------------------------------------------------------------- facts


def test_all_facts_of_a_run_are_in_its_card(run):
    card = model_card(run, "org/bt-adapter-clip-l14", metadata={"license": "mit", "language": "en"})
    data = card.data.to_dict()
    assert data["base_model"] == "openai/clip-vit-large-patch14" and data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["org/captions"] and data["license"] == "mit" and data["language"] == "en"
    assert data["library_name"] == "transformers" and "pipeline_tag" not in data
    (index,) = data["model-index"]
    (result,) = index["results"]
    assert index["name"] == "bt-adapter-clip-l14"
    assert result["dataset"] == {"name": "val.csv (200 rows)", "type": "private"}
    found = {metric["name"]: (metric["type"], metric["value"]) for metric in result["metrics"]}
    assert found == {
        "text to video, R@1 (%)": ("recall_at_1", 41.2346),
        "text to video, R@5 (%)": ("recall_at_5", 70.5),
        "video to text, R@1 (%)": ("recall_at_1", 40.0),
        "text to video, median rank": ("t2v_mdr", 2.0),
    }
    assert "at revision `" + "0" * 40 in section(card, "Base model")
    tables = section(card, "Data")
    assert f"at revision `{'d' * 40}`, 1,000 rows, fingerprint `f1f1`" in tables and "3 items of the train" in tables
    recipe = section(card, "Recipe")
    for fact in (
        "4,807 steps of 71,450,000 parameters on 8 processes in 10,800 s; mean training loss 1.235",
        "| `mask_ratio` | 0.7 |",
        "| `learning_rate` | 2e-06 |",
        "| `seed` | 42 |",
        '| `lr_multipliers` | {"bt_adapter.": 10} |',
        "| `torch` | 2.13.0 |",
    ):
        assert fact in recipe, fact
    figures = section(card, "Figures")
    assert (
        "Measured on `val.csv` (not on the Hub), 200 rows, fingerprint `f2f2`, among 200 pairs, 8 frames per video, "
        "after 4,807 steps, seed 42. Rows with the same caption" in figures
    )
    assert (
        "| text to video, R@1 (%) | 41.2346 |" in figures and "| shuffled: text to video, R@1 (%) | 33.0 |" in figures
    )
    assert "runtime" not in figures
    # whose folders these are is nobody's business
    assert "secret-project" not in str(card)


def test_nothing_is_told_that_is_not_known(run):
    (run / "run_summary.json").unlink()
    card = model_card(run, "org/unknown")
    assert section(card, "Figures") == "Nothing has been measured with these weights."
    assert section(card, "Data") == "The files do not tell what it was trained on."
    assert section(card, "Recipe") == "The files do not tell how it was trained."
    assert section(card, "Base model") == "The files do not name one."
    assert "stated no licence" in section(card, "Licence")
    assert not {"model-index", "datasets", "base_model", "license"} & card.data.to_dict().keys()
    unmeasured = {**SUMMARY, "metrics": {}, "finished": False, "steps": 7}
    card = model_card(run, "org/unfinished", summary=unmeasured)
    assert "Nothing has been measured" in section(card, "Figures") and "model-index" not in card.data.to_dict()
    assert "7 of 4807 steps" in section(card, "Limits")


def test_results_name_the_task_and_the_data(run, kinds):
    """The task is that of the model, also in the card of a checkpoint, where the run's kind is not known yet."""
    validation = {"source": "org/captions", "revision": "d" * 40, "rows": 200}
    for folder, task in ((run, "text-to-video-retrieval"), (kinds["lora"], "video-text-to-text")):
        summary = {"metrics": {"eval_loss": 1.5}, "data": {"validation": validation}}
        (result,) = model_card(folder, "org/a", summary=summary).data.eval_results
        assert (result.task_type, result.metric_type, result.metric_value) == (task, "loss", 1.5)
        assert (result.dataset_type, result.dataset_revision) == ("org/captions", "d" * 40)


def test_every_table_is_whole(run):
    """Markdown tables need their two head lines right above the rows, and an empty line before."""
    for text in (str(model_card(run, "org/a", with_code=True)), str(model_card(run, "org/a", summary={}))):
        lines = text.splitlines()
        for number, line in enumerate(lines):
            if line.startswith("|---"):
                assert (
                    lines[number - 1].startswith("|") and lines[number - 2] == "" and lines[number + 1].startswith("|")
                )
            if line.startswith("|") and not lines[number - 1].startswith("|"):
                assert lines[number + 1].startswith("|---")
        assert not re.search(r"\n{4,}", text) and "{{" not in text and "{%" not in text and "None" not in text


# ---------------------------------------------------------------------------------------------------------- metadata


@pytest.fixture
def kinds(tmp_path, tiny_checkpoint, hub):
    """Folders of each kind. What they name as base is on the Hub."""
    native, _ = saved_hosts.save("llava", tmp_path / "llava")
    hub.create("tester/llava")
    hub.put_files("tester/llava", {path.name: path.read_bytes() for path in native.iterdir()})
    chat = BTAdapterLlavaForConditionalGeneration.from_pretrained("tester/llava")
    dual = BTAdapterModel.from_pretrained(tiny_checkpoint)
    processor = BTAdapterLlavaProcessor.from_pretrained(native, num_frames=4)
    push_to_hub(dual, "tester/base")
    of_dual = BTAdapterModel.from_pretrained("tester/base")
    folders = {name: tmp_path / name for name in ("dual", "tower", "chat", "processor", "adapter", "of-dual", "lora")}
    dual.save_pretrained(folders["dual"])
    tiny_pairs.processor().save_pretrained(folders["dual"])
    dual.vision_model.save_pretrained(folders["tower"])
    chat.save_pretrained(folders["chat"])
    processor.save_pretrained(folders["chat"])
    processor.save_pretrained(folders["processor"])
    save_bt_adapter(chat, folders["adapter"])
    save_bt_adapter(of_dual, folders["of-dual"])
    torch.manual_seed(0)
    peft.get_peft_model(chat, lora_config(chat, r=2)).save_pretrained(folders["lora"])
    return folders


def test_the_pipeline_that_a_card_names_works(hub, kinds, tmp_path):
    """And where none of transformers' pipelines loads what is there, the card names none."""
    tags = {}
    for name, folder in kinds.items():
        data = model_card(folder, f"tester/{name}").data
        tags[name] = data.pipeline_tag
        assert not {"feature-extraction", "any-to-any", "sentence-transformers"} & {data.library_name, *data.tags}
    assert tags.pop("chat") == "image-text-to-text" and not any(tags.values())
    push_to_hub(kinds["chat"], "tester/chat")
    tiny_pairs.write_clip(tmp_path / "video.mp4", (220, 40, 40), step=2)
    ask = pipeline("image-text-to-text", model="tester/chat")
    shown = {"image": Image.new("RGB", (40, 40), "red"), "video": str(tmp_path / "video.mp4")}
    for kind, content in shown.items():
        parts = [{"type": kind, kind: content}, {"type": "text", "text": "what happens ?"}]
        (answer,) = ask(text=[{"role": "user", "content": parts}], max_new_tokens=3, return_full_text=False)
        assert isinstance(answer["generated_text"], str)


def test_cards_of_all_kinds_are_valid_and_their_examples_run(hub, kinds, tmp_path, monkeypatch, capsys):
    tiny_pairs.write_clip(tmp_path / "video.mp4", (220, 40, 40), step=2)
    monkeypatch.chdir(tmp_path)
    relations = {}
    for name, folder in kinds.items():
        push_to_hub(folder, f"tester/{name}", card={"license": "apache-2.0"})
        text = hub.files(f"tester/{name}")["README.md"].decode()
        assert metadata.problems(text, "model") == ([], []), name
        card = ModelCard(text)
        card.validate()  # by the Hub
        relations[name] = (card.data.get("base_model"), card.data.get("base_model_relation"))
        example = re.search(r"installed:\n\n```python\n(.*?)```", text, re.DOTALL)[1]
        exec(compile(example, f"card of {name}", "exec"), {})
        assert capsys.readouterr().out.strip() or name == "processor", name
    assert relations["adapter"] == relations["lora"] == ("tester/llava", "adapter")
    assert relations["of-dual"] == ("tester/base", "adapter")
    assert relations["chat"] == relations["dual"] == (None, None)  # a folder does not tell where it came from


def test_a_model_in_memory_tells_its_base(hub, kinds):
    chat = BTAdapterLlavaForConditionalGeneration.from_pretrained("tester/llava")
    push_to_hub(chat, "tester/mine")
    card = ModelCard(hub.files("tester/mine")["README.md"].decode())
    assert card.data.base_model == "tester/llava" and card.data.get("base_model_relation") == "finetune"
    assert f"at revision `{hub.head('tester/llava')}`" in section(card, "Base model")


# ------------------------------------------------------------------------------------------------------- whose words


OWN = "---\nlicense: cc-by-4.0\ntags:\n- mine\n---\n\n# My model\n\nMy words, and a line of *mine*.\n"


def test_a_readme_of_the_user_is_kept_and_its_metadata_completed(hub, run):
    (run / "README.md").write_text(OWN)
    push_to_hub(run, "tester/own", card={"license": "mit"})
    text = hub.files("tester/own")["README.md"].decode()
    card = ModelCard(text)
    assert text.endswith("# My model\n\nMy words, and a line of *mine*.\n") and MARKER not in text
    assert card.data.license == "cc-by-4.0" and card.data.tags == ["mine"]
    assert card.data.base_model == "openai/clip-vit-large-patch14" and card.data.datasets == ["org/captions"]
    assert {result.metric_value for result in card.data.eval_results} == {41.2346, 70.5, 40.0, 2.0}
    assert (run / "README.md").read_text() == OWN


def test_a_readme_on_the_hub_is_kept_too(hub, run):
    push_to_hub(run, "tester/edited")
    first = hub.files("tester/edited")["README.md"].decode()
    assert MARKER in first
    (run / "run_summary.json").write_text(json.dumps({**SUMMARY, "metrics": {"eval_t2v_R1": 50.0}}))
    push_to_hub(run, "tester/edited")
    second = hub.files("tester/edited")["README.md"].decode()
    assert "| 50.0 |" in second and "41.2346" not in second  # a card of ours follows the facts
    hub.put_files("tester/edited", {"README.md": second.replace(MARKER, "I edited this.").encode()})
    (run / "run_summary.json").write_text(json.dumps(SUMMARY))
    push_to_hub(run, "tester/edited")
    assert "I edited this." in hub.files("tester/edited")["README.md"].decode()


def test_metadata_that_is_no_yaml_is_an_error(hub, run):
    (run / "README.md").write_text("---\nlicense: [\n---\n# x\n")
    with pytest.raises(ValueError, match="metadata at the top of README.md cannot be read"):
        push_to_hub(run, "tester/bad")
    assert ("model", "tester/bad") not in hub.repositories  # found before one is made


# ------------------------------------------------------------------------------------------------ cards of the recipes


CARDS = sorted(path for path in (ROOT / "model_cards").glob("*.md") if path.name not in ("README.md", "template.md"))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_cards_of_the_recipes_are_valid(path):
    text = path.read_text()
    errors, warnings = metadata.problems(text, "model")
    assert not errors and set(warnings) <= {"no license"}  # weights that are not there have none
    for title in ("Use", "Figures", "Limits", "Citation"):
        assert f"\n## {title}\n" in text, title
    if "model-index" not in ModelCard(text).data.to_dict():
        assert "Nothing has been measured" in section(ModelCard(text), "Figures")


def test_each_recipe_has_a_card():
    recipes = {folder.name for folder in (ROOT / "recipes").iterdir() if (folder / "README.md").is_file()}
    recipes -= {"ablations", "zero_shot_chat"}  # comparisons, and no model
    assert recipes <= {path.stem.replace("-", "_") for path in CARDS}


@pytest.mark.parametrize("name", ["moving_digits", "moving_digits_chat"])
def test_figures_of_a_card_are_those_of_its_recipe(name):
    recipe = (ROOT / "recipes" / name / "README.md").read_text()
    proven = {
        " ".join(row[0].split()): [float(value) for value in row[1].split()]
        for row in re.findall(r"^(\D+?)((?: +\d+\.\d)+)$", recipe, re.MULTILINE)
    }
    card = ModelCard((ROOT / "model_cards" / f"{name.replace('_', '-')}.md").read_text())
    rows = re.findall(r"^\| ([^|]+) \| ((?:\d+\.\d \|? ?)+)$", section(card, "Figures"), re.MULTILINE)
    assert len(rows) >= 5
    names = {"one frame": "one frame only", "frames shuffled (5 draws)": "frames shuffled", "chance": "(chance)"}
    names["order-blind at best"] = "(order-blind at best)"
    for label, values in rows:
        values = [float(value) for value in re.findall(r"\d+\.\d", values)]
        assert proven[names.get(label, label)][: len(values)] == values, label
    for result in card.data.eval_results:
        assert any(result.metric_value in values for values in proven.values())


def test_the_template_of_the_package_is_the_one_beside_the_cards():
    from bt_adapter_hf.hub.card import TEMPLATE

    assert (ROOT / "model_cards" / "template.md").read_text() == TEMPLATE.read_text()


def test_scores_of_result_files(tmp_path, tiny_checkpoint):
    """The card and its metadata hold what the files say, and no path of the user's."""
    score, control = {"value": 41.23, "low": 39.0, "high": 43.5}, {"value": 20.0, "low": 18.0, "high": 22.0}
    result = {
        "task": "retrieval",
        "scores": {"t2v_R1": score, "t2v_MnR": {"value": 3.0, "low": 2.0, "high": 4.0}},
        "controls": {"reversed": {"t2v_R1": control}},
        "chance": {"t2v_R1": 0.1},
        "items": {"videos": 1000},
        "protocol": {"data": "/home/me/secret/val.csv", "video_processor": {"num_frames": 12}, "dual_softmax": True},
        "failed": {"items": 3, "reasons": {}, "list": []},
    }
    (tmp_path / "msrvtt").mkdir()
    (tmp_path / "msrvtt" / "result.json").write_text(json.dumps(result))
    card = model_card(tiny_checkpoint, "me/tiny", results=read_results([tmp_path / "msrvtt"]))
    text = str(card)
    assert "| model | 41.2 [39.0, 43.5] |" in text and "| – frames reversed | 20.0 [18.0, 22.0] |" in text
    assert "Retrieval, on `val.csv`; over 1000 videos; 12 frames per video; dual softmax; 3 could not be used" in text
    assert "secret" not in text and "Nothing has been measured" not in text
    (found,) = card.data.eval_results
    assert (found.metric_type, found.metric_value, found.dataset_type) == ("recall_at_1", 41.23, "private")
    assert "model-index" in card.data.to_dict() and "Nothing has been measured" in str(
        model_card(tiny_checkpoint, "me/t")
    )
