"""README's Train section, line by line as written, on tiny models under the ids that stand there."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, LlavaForConditionalGeneration

from bt_adapter_hf.adapters.files import AdapterConfig
from bt_adapter_hf.cli.main import main
from tests import tiny_instructions, tiny_pairs
from tests.chat import saved_hosts
from tests.hub.conftest import hf_home, hub  # noqa: F401 (fixtures)


README = Path(__file__).parents[2] / "README.md"
CLIP, LLAVA = "openai/clip-vit-large-patch14-336", "llava-hf/llava-1.5-7b-hf"
# Behind the options of the line, where a small machine needs less.
SMALLER = {
    "check-data": ["--workers", "1", "--max-text-length", "24"],
    "pretrain": "--batch-size 4 --workers 0 --num-frames 4 --num-adapter-layers 3 --max-text-length 24".split(),
    "finetune": "--workers 0 --num-frames 4 --epochs 1 --learning-rate 1e-3".split(),
    "chat": ["--max-new-tokens", "4", "--device", "cpu"],
}


def commands() -> list[list[str]]:
    block = re.search(r"## Train\n\n```bash\n(.*?)```", README.read_text(), re.DOTALL)[1]
    lines = re.sub(r"\s*#.*", "", block).replace("\\\n", " ").replace("YOUR_NAME", "tester").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture
def models(hub, tmp_path):  # noqa: F811
    """A LLaVA, and the CLIP whose vision model it has, on the Hub."""
    native, _ = saved_hosts.save("llava", tmp_path / "hosts")
    tower = LlavaForConditionalGeneration.from_pretrained(native).model.vision_tower
    config = tiny_pairs.clip_config().to_dict()
    clip = CLIPModel(
        CLIPConfig(text_config=config["text_config"], vision_config=tower.config.to_dict(), projection_dim=12)
    )
    clip.vision_model.load_state_dict(tower.state_dict())
    clip.save_pretrained(tmp_path / "clip")
    CLIPProcessor(saved_hosts.tiny_hosts.image_processor(), tiny_pairs.tokenizer()).save_pretrained(tmp_path / "clip")
    for name, folder in ((CLIP, tmp_path / "clip"), (LLAVA, native)):
        hub.put_files(name, folder)


@pytest.mark.filterwarnings("ignore:Warnings while validating metadata")
def test_one_after_the_other(models, hub, tmp_path, monkeypatch, capsys):  # noqa: F811
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    for part, rows in (("train", 8), ("val", 4)):
        tiny_pairs.write_table(tmp_path / "videos" / part, rows)
    table = tiny_instructions.write_table(tmp_path / "chats", 4)
    for path in table.parent.iterdir():
        shutil.move(path, tmp_path / ("chats.jsonl" if path == table else path.name))
    found = commands()
    assert [command[:2] for command in found] == [
        ["bt-adapter", name] for name in ("check-data", "pretrain", "finetune", "push", "chat")
    ]
    for _, name, *options in found:
        assert main([name, *options, *SMALLER.get(name, [])]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert json.loads((tmp_path / "my-adapter" / "run_summary.json").read_text())["finished"]
    adapter = AdapterConfig.read(tmp_path / "my-adapter" / "adapter")
    assert adapter.base_model_name_or_path == CLIP and adapter.revision == hub.head(CLIP) and adapter.fingerprint
    assert "model.safetensors" in hub.files("tester/llava-with-my-adapter")
    assert out.strip().splitlines()[-1]  # an answer
    branches = [
        {k.rpartition("bt_adapter.")[2]: v for k, v in state.items() if ".bt_adapter." in f".{k}"}
        for state in (_read(tmp_path / "my-adapter"), _read(tmp_path / "tuned"))
    ]
    shared = branches[0].keys() & branches[1].keys()
    assert "layers.0.temporal.attn.q_proj.weight" in shared
    moved = [(branches[0][name] - branches[1][name]).abs().max().item() for name in shared]
    assert 0 < max(moved) < 0.1  # tuned from there, and not afresh


def _read(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
