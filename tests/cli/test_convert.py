"""`bt-adapter convert`, on files."""

import json

import pytest
import torch
from transformers import CLIPModel

from bt_adapter_hf import BTAdapterModel, load_bt_adapter
from bt_adapter_hf.adapters.files import CONFIG_NAME, WEIGHTS_NAME
from bt_adapter_hf.cli.main import main
from tests.parity.golden import Golden


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with a released checkpoint (`epoch_1.pth`) and its base (`clip`)."""
    folder = tmp_path_factory.mktemp("files")
    golden = Golden("pretrain_losses")
    torch.manual_seed(0)
    base = CLIPModel(golden.base)
    for key, tensor in golden.weights.items():
        if key.startswith("backbone.layers.") or key.startswith("backbone.patch"):
            name = key.removeprefix("backbone.").replace("layers.", "encoder.layers.", 1)
            base.vision_model.get_parameter(name.replace("patch_e", "embeddings.patch_e")).data.copy_(tensor)
    base.save_pretrained(folder / "clip")
    torch.save({"state_dict": golden.weights}, folder / "epoch_1.pth")
    return folder


def test_to_model_and_back(files, tmp_path, capsys):
    checkpoint, base = str(files / "epoch_1.pth"), str(files / "clip")
    assert main(["convert", checkpoint, str(tmp_path / "out"), "--base", base, "--to", "pretraining", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "BTAdapterForPreTraining"
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "back.pth"), "--to", "original"]) == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    weights = Golden("pretrain_losses").weights
    assert all(back[key].equal(weights[key]) for key in back)
    assert weights.keys() - back.keys() == {key for key in weights if key.startswith("extra_proj")}


def test_to_adapter(files, tmp_path, capsys):
    out = tmp_path / "adapter"
    arguments = ["convert", str(files / "epoch_1.pth"), str(out), "--base", str(files / "clip"), "--to", "adapter"]
    assert main([*arguments, "--dtype", "float16"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [WEIGHTS_NAME, CONFIG_NAME]
    model = load_bt_adapter(CLIPModel.from_pretrained(files / "clip"), out)
    assert type(model) is BTAdapterModel
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    assert main(arguments) == 1
    assert "exists" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_dry_run_prints_the_table(files, capsys):
    arguments = ["convert", str(files / "epoch_1.pth"), "--base", str(files / "clip"), "--dry-run"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "backbone.btadapter_cls_token" in text and "vision_model.bt_adapter.video_cls" in text
    assert "nothing was written" in text
    assert main([*arguments, "--json", "--set", "fusion=sum", "--set", "output_fusion=sum"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not any("balance" in row["released"] for row in plan["tensors"])
    assert sum("left out" in note for note in plan["notes"]) == 3


@pytest.mark.parametrize("kind", ["truncated", "code", "other", "projector", "half"])
def test_bad_files_write_nothing(files, tmp_path, kind, capsys):
    path, marker = tmp_path / "bad.pth", tmp_path / "ran"
    weights = dict(Golden("pretrain_losses").weights)
    if kind == "truncated":
        path.write_bytes((files / "epoch_1.pth").read_bytes()[:100_000])
    elif kind == "code":
        torch.save({**weights, "x": RunsCode(str(marker))}, path)
    elif kind == "other":
        torch.save(CLIPModel.from_pretrained(files / "clip").state_dict(), path)
    elif kind == "projector":
        torch.save({"model.mm_projector.weight": torch.ones(2, 2)}, path)
    else:
        for key in [key for key in weights if key.startswith("backbone.btadapter_T_layers.1.")]:
            del weights[key]
        torch.save(weights, path)
    before = sorted(tmp_path.iterdir())
    assert main(["convert", str(path), str(tmp_path / "out"), "--base", str(files / "clip")]) == 1
    error = capsys.readouterr().err
    expected = {
        "truncated": "truncated, damaged",
        "code": "is refused",
        "other": "holds no BT-Adapter",
        "projector": "LLaVA's projector file",
        "half": "12 tensors are missing",
    }
    assert expected[kind] in error and error.count("\n") == 1 and "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        import os

        return os.mkdir, (self.marker,)
