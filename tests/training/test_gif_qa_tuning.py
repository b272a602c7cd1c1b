"""GIF question answering on the rails of instruction tuning: LoRA on 4 bits, frozen states, the commands."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from bt_adapter_hf import (
    BTAdapterGifQAForConditionalGeneration,
    BTAdapterGifQAProcessor,
    BTAdapterModel,
    load_bt_adapter,
    lora_config,
    save_bt_adapter,
)
from bt_adapter_hf.adapters import verbs
from bt_adapter_hf.adapters.files import AdapterError
from bt_adapter_hf.cli.main import main
from tests import tiny_pairs
from tests.chat import tiny_gif_qa


EXAMPLES = Path(__file__).parents[2] / "examples"
# peft asks transformers by names that the latter deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with `base`, a model and its processor, and `train.jsonl` about four GIFs."""
    folder = tmp_path_factory.mktemp("gif_qa")
    parts = tiny_gif_qa.save_components(folder)
    model = BTAdapterGifQAForConditionalGeneration.from_components(**parts)
    model.save_pretrained(folder / "base")
    BTAdapterGifQAProcessor.from_components(model.config, **parts).save_pretrained(folder / "base")
    rows = []
    for n in range(4):
        tiny_gif_qa.write_gif(folder / f"{n}.gif", frames=3 + n, seed=n)
        seen = [{"type": "video", "path": f"{n}.gif"}, {"type": "text", "text": "what happens ?"}]
        answer = "the red square is left ." if n % 2 else "right"
        rows.append({"messages": [{"role": "user", "content": seen}, {"role": "assistant", "content": answer}]})
    rows.append({"messages": [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "left"}]})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def finetune(folder, output, *options):
    return main(
        ["finetune", "--model", str(folder / "base"), "--train", str(folder / "train.jsonl"), "--output-dir",
         str(output), "--device", "cpu", "--max-steps", "3", "--batch-size", "2", "--learning-rate", "0.01",
         "--logging-steps", "1", "--max-broken", "0.5", "--item-timeout", "0", *options]
    )  # fmt: skip


def losses(output):
    (state,) = output.glob("checkpoint-*/trainer_state.json")
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


def test_lora_on_4_bits_with_and_without_frozen_states(saved, tmp_path, capsys):
    plain, cached = tmp_path / "plain", tmp_path / "cached"
    lora = ("--lora", "--lora-r", "4", "--load-in-4bit")
    assert finetune(saved, plain, *lora) == 0
    summary = json.loads((plain / "run_summary.json").read_text())
    assert "no GIF" in str(summary["broken_reasons"]["train"])  # counted, and skipped
    states = ("--cache-states", str(tmp_path / "states"), "--cache-dtype", "fp32")
    assert finetune(saved, cached, *lora, *states) == 0
    assert "1 states x 4 frames x 1 tokens x 16" in capsys.readouterr().out
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-4)
    # what was trained is written, and nothing else; it goes back into the base
    assert not (plain / "bt_adapter_config.json").exists() and not (plain / "model.safetensors").exists()
    base = AutoModelForImageTextToText.from_pretrained(saved / "base")
    tuned = load_bt_adapter(base, plain)
    names = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in names) and any("language_projection.modules_to_save" in n for n in names)
    assert not any("vision_model" in name for name in names)
    chat = [
        "chat",
        str(saved / "0.gif"),
        "-q",
        "what happens ?",
        "--max-new-tokens",
        "3",
        "--json",
        "--item-timeout",
        "0",
    ]
    assert main([*chat, "--model", str(saved / "base"), "--bt-adapter", str(plain), "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["visual_tokens"] == 4 and found["files"][0]["kind"] == "video"
    assert main([*chat, "--model", str(plain), "--device", "cpu"]) == 0  # the folder names its base
    assert json.loads(capsys.readouterr().out)["answers"] == found["answers"]


def test_more_frames_than_the_tower_takes(saved, capsys):
    chat = ["chat", str(saved / "3.gif"), "-q", "what ?", "--max-new-tokens", "2", "--json", "--model"]
    assert main([*chat, str(saved / "base"), "--num-frames", "10", "--device", "cpu", "--item-timeout", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens"] == 10


def test_whatever_moves_is_a_gif_and_a_still_one_of_one_frame(saved, tmp_path, capsys):
    with Image.open(saved / "3.gif") as gif:
        frames = [frame.convert("RGBA") for frame in ImageSequence.Iterator(gif)]
    moving, still = [tmp_path / name for name in ("a.webp", "a.png")], tmp_path / "still.png"
    for path in moving:
        frames[0].save(
            path, save_all=True, append_images=frames[1:], duration=[40, 200, 10, 90, 60, 70], lossless=True
        )
    frames[0].save(still)
    chat = ["-q", "what ?", "--max-new-tokens", "2", "--model", str(saved / "base"), "--device", "cpu"]
    assert main(["chat", *map(str, moving), str(still), *chat, "--json", "--item-timeout", "0"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [file["kind"] for file in told["files"]] == ["video"] * 3 and told["visual_tokens"] == 3 * 4
    assert [file["frames"] for file in told["files"]] == [[0, 1, 3, 4]] * 2 + [[0] * 4]
    assert main(["chat", *chat]) != 0
    assert "answers about GIFs only: name one" in capsys.readouterr().err


def example(name, argv, monkeypatch) -> int:
    """Runs it in this process; the status it ends with."""
    monkeypatch.setattr("sys.argv", [name, *map(str, argv)])
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    except SystemExit as ended:
        return ended.code
    return 0


def test_the_example_that_answers(saved, tmp_path, monkeypatch, capsys):
    ask = ["--question", "what happens ?", "--base", saved / "base", "--max-new-tokens", "2", "--num-beams", "2"]
    gifs = [saved / "0.gif", saved / "1.gif"]
    assert example("gif_qa_answer", [*gifs, *ask], monkeypatch) == 0
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == list(map(str, gifs))
    broken = tmp_path / "broken.gif"
    broken.write_bytes(gifs[0].read_bytes()[:200])
    assert example("gif_qa_answer", [gifs[0], broken, *ask], monkeypatch) == 1
    assert f"videos[1]: {broken} is truncated or damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_the_example_that_trains(saved, tmp_path, monkeypatch, capsys):
    """From pieces as they are on the Hub, of which the tokenizer has nothing to pad with."""
    config = json.loads((saved / "llm" / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (saved / "llm" / "tokenizer_config.json").write_text(json.dumps(config))
    table = tmp_path / "Train_frameqa_question.csv"
    table.write_text("gif_name\tquestion\tanswer\n" + "".join(f"{n}\twhat ?\tleft\n" for n in range(4)))
    argv = ["--tower", saved / "xclip", "--language-model", saved / "llm", "--connector", "qformer", "--train", table]
    argv += ["--media-root", saved, "--output-dir", tmp_path / "run", "--max-steps", 2, "--batch-size", 2]
    assert example("gif_qa_train", [*argv, "--item-timeout", 0, "--device", "cpu"], monkeypatch) == 0
    ask = ["--question", "what ?", "--base", tmp_path / "run" / "base", "--tuned", tmp_path / "run"]
    assert example("gif_qa_answer", [saved / "0.gif", *ask], monkeypatch) == 0
    assert "0.gif: " in capsys.readouterr().out
    argv[5] = "mlp"
    message = str(example("gif_qa_train", argv, monkeypatch))
    assert "'connector': 'qformer'" in message and "Take another --output-dir." in message


@pytest.mark.parametrize("language", ["gpt2", "qwen2"])
def test_lora_finds_the_layers_of_any_language_model(language):
    peft = pytest.importorskip("peft")
    for tower in ("xclip", "bt"):
        model = tiny_gif_qa.model("attention", language, tower)
        wrapped = peft.get_peft_model(model, lora_config(model, r=2))
        learning = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
        assert any("language_model" in name and "lora_B" in name for name in learning)
        assert any("bt_adapter" in name for name in learning) == (tower == "bt")
        assert not any("vision_model.vision_model" in name for name in learning)


def test_a_branch_and_lora_come_back(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_gif_qa.model("mlp", "llama", "bt")
    model.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(model, lora_config(model, r=2))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(tmp_path / "lora")
    again = load_bt_adapter(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), tmp_path / "lora").eval()
    ids = torch.tensor([[1, *[19] * model.config.tokens_per_group, 5, 6]])
    seen = {"input_ids": ids, "pixel_values_videos": torch.randn(1, 4, 3, 32, 32)}
    with torch.no_grad():
        torch.testing.assert_close(again(**seen).logits, wrapped.eval()(**seen).logits)


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """`base` on the tower of a pretraining run, with the gate of its pooled feature, and a table."""
    folder = tmp_path_factory.mktemp("gated")
    parts = {**tiny_gif_qa.save_components(folder), "tower": folder / "run"}
    run = tiny_pairs.model()
    assert run.config.vision_config.output_fusion == "gate"
    run.save_pretrained(folder / "run")
    tiny_pairs.processor(num_frames=4).save_pretrained(folder / "run")
    model = BTAdapterGifQAForConditionalGeneration.from_components(**parts, connector="mlp")
    assert model.config.vision_config.output_fusion == "gate"
    model.save_pretrained(folder / "base")
    BTAdapterGifQAProcessor.from_components(model.config, **parts).save_pretrained(folder / "base")
    tiny_gif_qa.write_gif(folder / "0.gif")
    said = [{"role": "user", "content": [{"type": "video", "path": "0.gif"}, {"type": "text", "text": "what ?"}]}]
    said.append({"role": "assistant", "content": "left"})
    (folder / "train.jsonl").write_text((json.dumps({"messages": said}) + "\n") * 2)
    return folder


def test_lora_on_a_pretrained_tower_keeps_its_gate(gated, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForImageTextToText.from_pretrained(gated / "base")
    wrapped = peft.get_peft_model(model, lora_config(model, r=2))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(tmp_path)
    again = load_bt_adapter(AutoModelForImageTextToText.from_pretrained(gated / "base"), tmp_path)
    assert again.config.vision_config.output_fusion == "gate"
    learned = dict(wrapped.named_parameters())
    assert all(parameter.equal(learned[name]) for name, parameter in again.named_parameters())


def test_an_error_leaves_the_model_as_it_was(gated, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    model = AutoModelForImageTextToText.from_pretrained(gated / "base")
    peft.get_peft_model(model, lora_config(model, r=2)).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {key: value for key, value in stored.items() if "lora_A" not in key}, tmp_path / "adapter_model.safetensors"
    )
    extra = load_file(tmp_path / "bt_adapter.safetensors")
    save_file({key: value + 1 for key, value in extra.items()}, tmp_path / "bt_adapter.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(gated / "base")
    before, config = {key: value.clone() for key, value in model.state_dict().items()}, model.config.to_dict()
    lines = []
    monkeypatch.setattr(verbs.logger, "warning", lines.append)
    with pytest.raises(AdapterError, match="tensors differ"):
        load_bt_adapter(model, tmp_path)
    assert not any("is replaced" in line for line in lines) and model.config.to_dict() == config
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_an_adapter_of_a_model_with_a_branch_takes_its_place(gated, tmp_path, capsys):
    """The forms that `finetune --adapter-only` suggests, and another training from there."""
    out, more = tmp_path / "out", ("--adapter-only", "--num-frames", "3")
    assert finetune(gated, out, *more) == 0
    assert f"--model {gated / 'base'} --bt-adapter {out}" in capsys.readouterr().out
    trained = load_file(out / "bt_adapter.safetensors")
    model = BTAdapterGifQAForConditionalGeneration.from_pretrained(gated / "base", bt_adapter=out)
    state = model.state_dict()
    where = {key: f"vision_model.bt_adapter.{key}" for key in trained}
    where |= {key: key.removeprefix("extra_modules.") for key in trained if key.startswith("extra_modules.")}
    assert any("language_projection" in key for key in where.values())
    assert all(state[where[key]].equal(trained[key]) for key in trained)
    assert not model.vision_model.vision_model.embeddings.patch_embedding.weight.requires_grad
    chat = ["chat", gated / "0.gif", "-q", "what ?", "--max-new-tokens", "3", "--json", "--item-timeout", "0"]
    answers = []
    for names in (["--model", gated / "base", "--bt-adapter", out], ["--model", out]):
        assert main([*map(str, [*chat, *names]), "--device", "cpu"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1] and len(answers[0]["files"][0]["frames"]) == 3
    assert finetune(gated, tmp_path / "again", *more, "--bt-adapter", str(out)) == 0
    save_bt_adapter(BTAdapterModel.from_pretrained(gated / "run"), tmp_path / "pretrained")
    assert main([*map(str, [*chat, "--model", gated / "base", "--bt-adapter", tmp_path / "pretrained"])]) == 1
    assert "has an adapter in: leave out --bt-adapter" in capsys.readouterr().err


def test_lora_is_merged_with_its_processor_before_training_goes_on(gated, tmp_path, monkeypatch, capsys):
    """By the lines of the error, as they stand there."""
    monkeypatch.chdir(tmp_path)
    assert finetune(gated, tmp_path / "lora", "--lora", "--num-frames", "3") == 0
    capsys.readouterr()
    assert finetune(gated, tmp_path / "again", "--bt-adapter", str(tmp_path / "lora")) == 1
    said = capsys.readouterr().err
    merge = said.partition("in Python, ")[2].partition(", with its processor, ")[0]
    processor = said.partition("with its processor, ")[2].partition("; then")[0]
    names = {"load_bt_adapter": load_bt_adapter, "AutoModelForImageTextToText": AutoModelForImageTextToText}
    eval(merge, names)
    chat = ["chat", str(gated / "0.gif"), "-q", "what ?", "--max-new-tokens", "3", "--model", "merged", "--json"]
    chat += ["--item-timeout", "0", "--device", "cpu"]
    assert main(chat) == 1
    assert "'merged' holds a model without its processor" in capsys.readouterr().err
    eval(processor, {"AutoProcessor": AutoProcessor})
    assert main(chat) == 0
    assert len(json.loads(capsys.readouterr().out)["files"][0]["frames"]) == 3


def test_4_bits_without_bitsandbytes(saved, tmp_path, monkeypatch, capsys):
    from bt_adapter_hf import import_utils

    monkeypatch.setattr(
        import_utils, "import_error", lambda name: ModuleNotFoundError(f"No module named {name!r}", name=name)
    )
    assert finetune(saved, tmp_path, "--lora", "--load-in-4bit") != 0
    assert "needs the package 'bitsandbytes'" in capsys.readouterr().err
