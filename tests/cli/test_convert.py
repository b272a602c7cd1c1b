"""`bt-adapter convert`, on files."""

import json
import shlex
import shutil

import pytest
import torch
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from bt_adapter_hf import BTAdapterModel, BTAdapterVisionModel, load_bt_adapter
from bt_adapter_hf.adapters.files import CONFIG_NAME, WEIGHTS_NAME
from bt_adapter_hf.cli.main import main
from tests import tiny_pairs
from tests.hub.conftest import hf_home, hub  # noqa: F401 (fixtures)
from tests.parity.golden import Golden


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with a released checkpoint (`epoch_1.pth`) and its base (`clip`)."""
    folder = tmp_path_factory.mktemp("files")
    golden = Golden("pretrain_losses")
    torch.manual_seed(0)
    base = CLIPModel(golden.base)
    own = dict(base.vision_model.named_parameters())
    for key, tensor in golden.weights.items():  # the backbone that the checkpoint was trained on
        short = key.removeprefix("backbone.")
        for name in (short, f"encoder.{short}", f"embeddings.{short}"):
            if key.startswith("backbone.") and name in own:
                own[name].data.copy_(tensor)
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


def test_settings_that_a_released_file_does_not_hold(files, tmp_path, capsys, caplog):
    """They are told on the way there, and come back by the options told, or from the model as the base."""
    run, file = tmp_path / "run", str(tmp_path / "file.pth")
    torch.manual_seed(0)
    settings = {"gate_on": "branch", "output_gate_scale": 3.5, "num_trained_frames": 4, "mask_order": "released"}
    model = BTAdapterModel.from_pretrained(files / "clip", adapter_layers=[0, 2], **settings).eval()
    for parameter in model.vision_model.bt_adapter.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(run)
    pixels = torch.randn(2, 3, 3, *2 * [model.config.vision_config.image_size])

    def difference(*options: str) -> float:
        assert main(["convert", file, str(tmp_path / "back"), "--overwrite", *options]) == 0
        back = BTAdapterModel.from_pretrained(tmp_path / "back").eval()
        with torch.no_grad():
            features = [each.get_video_features(pixels).pooler_output for each in (model, back)]
        return (features[0] - features[1]).abs().max().item()

    assert main(["convert", str(run), file, "--to", "original"]) == 0
    (told,) = [record.getMessage() for record in caplog.records if "no settings" in record.getMessage()]
    assert "gate_on='branch' here, 'backbone' there" in told and "mask_order" not in told
    options = shlex.split(told.partition("or with ")[2].removesuffix("."))
    assert options[::2] == ["--set"] * 4
    assert options[1::2] == ["adapter_layers=[0,2]", "gate_on=branch", "num_trained_frames=4", "output_gate_scale=3.5"]
    assert difference("--base", str(files / "clip")) > 1e-3
    assert difference("--base", str(files / "clip"), *options) == 0
    capsys.readouterr()
    assert difference("--base", str(run)) == 0
    said = "with the settings of the base: gate_on='branch', num_trained_frames=4, output_gate_scale=3.5."
    assert said in capsys.readouterr().out

    caplog.clear()
    assert main(["convert", str(files / "epoch_1.pth"), str(tmp_path / "out"), "--base", str(files / "clip")]) == 0
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "same.pth"), "--to", "original"]) == 0
    assert "no settings" not in caplog.text  # what the released code computes anyway


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


def test_what_index_needs_is_beside_the_model(files, tmp_path, capsys):
    """A processor from the base, which has its sizes and its tokenizer; without one, a line that says so."""
    words = tiny_pairs.tokenizer()
    base = CLIPModel.from_pretrained(files / "clip")
    base.save_pretrained(tmp_path / "clip")
    side = {"height": base.config.vision_config.image_size, "width": base.config.vision_config.image_size}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": side["height"]}, crop_size=side)
    CLIPProcessor(image_processor, words).save_pretrained(tmp_path / "clip")
    checkpoint = str(files / "epoch_1.pth")
    assert main(["convert", checkpoint, str(tmp_path / "out"), "--base", str(tmp_path / "clip")]) == 0
    assert "The processor has the sizes and the tokenizer of" in capsys.readouterr().out
    tiny_pairs.write_clip(tmp_path / "a.mp4", (220, 40, 40), step=2)
    index = ["index", str(tmp_path / "a.mp4"), "-o", str(tmp_path / "index"), "--model", str(tmp_path / "out")]
    assert main([*index, "--device", "cpu"]) == 0
    assert main(["convert", checkpoint, str(tmp_path / "bare"), "--base", str(files / "clip")]) == 0
    assert "no processor beside the model" in capsys.readouterr().out
    assert not (tmp_path / "bare" / "processor_config.json").exists()


def test_a_model_on_the_hub_becomes_an_adapter(files, hub, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("bt_adapter_hf.hub.access.RETRY_WAITS", [0.01])
    hub.put_files("tester/clip", files / "clip")
    checkpoint, run, out = str(files / "epoch_1.pth"), tmp_path / "run", tmp_path / "adapter"
    assert main(["convert", checkpoint, str(out), "--base", "tester/clip", "--to", "adapter"]) == 0
    content = json.loads((out / CONFIG_NAME).read_text())
    assert (content["base_model_name_or_path"], content["revision"]) == ("tester/clip", hub.head("tester/clip"))
    assert main(["convert", checkpoint, str(run), "--base", str(files / "clip")]) == 0
    hub.put_files("tester/run", run)
    assert main(["convert", "tester/run", str(out), "--to", "adapter", "--overwrite"]) == 0
    content = json.loads((out / CONFIG_NAME).read_text())
    assert (content["base_model_name_or_path"], content["revision"]) == ("tester/run", hub.head("tester/run"))
    load_bt_adapter(CLIPModel.from_pretrained("tester/clip"), out)
    capsys.readouterr()
    assert main(["convert", "tester/nothing", str(tmp_path / "no"), "--to", "adapter"]) == 1
    assert "tester/nothing is neither a folder nor an adapter that could be fetched" in capsys.readouterr().err


def test_a_whole_model_becomes_an_adapter(files, tmp_path, capsys):
    checkpoint, base = str(files / "epoch_1.pth"), str(files / "clip")
    for kind in ("pretraining", "tower"):
        run, out = tmp_path / kind, tmp_path / f"{kind}-adapter"
        assert main(["convert", checkpoint, str(run), "--base", base, "--to", kind]) == 0
        assert main(["convert", str(run), str(out), "--to", "adapter", "--base", base]) == 0
        assert sorted(path.name for path in out.iterdir()) == [WEIGHTS_NAME, CONFIG_NAME]
        model = load_bt_adapter(CLIPModel.from_pretrained(base), out)
        assert type(model) is BTAdapterModel
        assert json.loads((out / CONFIG_NAME).read_text())["base_model_name_or_path"] == base
    capsys.readouterr()
    assert main(["convert", str(run), "--to", "adapter", "--dry-run"]) == 0
    assert "video_cls" in capsys.readouterr().out
    assert main(["convert", str(run), str(tmp_path / "no"), "--to", "pretraining"]) == 1
    assert "is a folder. With --to adapter or --to original" in capsys.readouterr().err
    assert main(["convert", base, str(tmp_path / "no"), "--to", "adapter"]) == 1
    assert "is a folder" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_a_base_with_its_config_only(files, tmp_path, capsys):
    """It says how many heads there are, and lends nothing."""
    (tmp_path / "config").mkdir()
    shutil.copy(files / "clip" / "config.json", tmp_path / "config")
    weights = torch.load(files / "epoch_1.pth", weights_only=True)["state_dict"]
    tower = {key: tensor for key, tensor in weights.items() if key.startswith("backbone.")}
    torch.save({"state_dict": tower}, tmp_path / "tower.pth")
    arguments = ["convert", str(tmp_path / "tower.pth"), str(tmp_path / "out"), "--base", str(tmp_path / "config")]
    assert main([*arguments, "--to", "tower"]) == 0
    expected = main(["convert", str(files / "epoch_1.pth"), str(tmp_path / "whole"), "--base", str(files / "clip")])
    assert expected == 0
    one = BTAdapterVisionModel.from_pretrained(tmp_path / "out").state_dict()
    two = BTAdapterVisionModel.from_pretrained(tmp_path / "whole").state_dict()
    assert one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one)
    branch = {key: tensor for key, tensor in tower.items() if "btadapter" in key or "balance" in key}
    torch.save({"state_dict": branch}, tmp_path / "branch.pth")
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "branch.pth"), str(tmp_path / "no"), *arguments[3:]]) == 1
    assert "the base has a config and no weights" in capsys.readouterr().err
