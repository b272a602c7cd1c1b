"""Numbers on the command line: what is none, or out of bounds, is refused before anything is loaded, by its option."""

import argparse

import pytest

from bt_adapter_hf.cli._options import name_options, real_number, whole_number
from bt_adapter_hf.cli.main import main


RUN = ["--model", "m", "--train", "t.jsonl", "--output-dir", "o"]
WHOLE = ["batch-size", "eval-batch-size", "gradient-accumulation-steps", "max-steps", "logging-steps", "save-steps",
         "eval-steps", "num-frames"]  # fmt: skip
REFUSED = [
    *(
        (command, f"--{name}", value)
        for command in ("pretrain", "finetune")
        for name in WHOLE
        for value in ("0", "-3")
    ),
    *(("pretrain", f"--{name}", "0") for name in ("cached-gradient-batch-size", "chunk-rows", "max-text-length")),
    *(("pretrain", f"--{name}", "0") for name in ("num-adapter-layers", "max-frames", "temperature", "max-disk")),
    ("pretrain", "--max-disk", "infGB"),
    ("pretrain", "--mask-ratio", "1"),
    ("pretrain", "--mask-ratio", "1.5"),
    ("pretrain", "--drop-path-rate", "-0.1"),
    ("pretrain", "--vtc-weight", "nan"),
    ("pretrain", "--output-gate-scale", "inf"),
    ("pretrain", "--learning-rate", "-1"),
    ("pretrain", "--learning-rate", "fast"),
    ("pretrain", "--epochs", "0"),
    ("pretrain", "--workers", "-1"),
    ("pretrain", "--seed", "-1"),
    ("pretrain", "--batch-size", "4.5"),
    ("finetune", "--max-broken", "1.1"),
    ("finetune", "--item-timeout", "-1"),
    ("finetune", "--lora-r", "0"),
    ("finetune", "--lora-dropout", "2"),
    ("index", "--batch-size", "0"),
    ("index", "--num-frames", "0"),
    ("index", "--workers", "0"),
    *(("chat", f"--{name}", "0") for name in ("num-frames", "num-clips", "max-new-tokens")),
    *(("check-data", f"--{name}", "0") for name in ("sample", "num-frames", "workers", "max-text-length")),
    ("check-data", "--max-broken", "nan"),
    *(("pretrain", "--lr-multipliers", value) for value in ("{", '{"a": NaN}', '{"a": -1}', '{"a": true}', "[1]")),
    *((command, option, "") for command, option in (
        ("pretrain", "--output-dir"), ("pretrain", "--train"), ("finetune", "--bt-adapter"), ("finetune", "--model"),
        ("index", "-o"), ("search", "--sheet"), ("quickstart", "-o"), ("chat", "--model"), ("convert", "--base"),
        ("check-data", "--list"),
    )),
]  # fmt: skip
BEFORE = {"index": ["videos", "-o", "i"], "chat": ["a.mp4"], "check-data": ["t.csv"], "search": ["i", "a dog"],
          "convert": ["x.pth", "o"], "quickstart": []}  # fmt: skip


@pytest.mark.parametrize("command, option, value", REFUSED)
def test_refused_by_the_name_of_the_option(command, option, value, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, *BEFORE.get(command, RUN), option, value])
    assert exit.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    option = {"-o": "-o/--output", "--bt-adapter": "--bt-adapter/--adapter"}.get(option, option)
    assert f"argument {option}: '{value}' is no" in last, last


def test_whole_numbers():
    assert whole_number()("1") == 1 and whole_number(0)("0") == 0
    with pytest.raises(argparse.ArgumentTypeError, match="'x' is not a whole number of at least 0.$"):
        whole_number(0)("x")


def test_real_numbers():
    assert real_number()("-1e4") == -1e4 and real_number(0, 1)("1") == 1 and real_number(0, 1)("0") == 0
    for read, text in ((real_number(0, above=True), "0"), (real_number(0, 1, below=True), "1")):
        with pytest.raises(argparse.ArgumentTypeError):
            read(text)
    with pytest.raises(argparse.ArgumentTypeError, match="'2' is not a number above 0 and of at most 1.$"):
        real_number(0, 1, above=True)("2")
    with pytest.raises(argparse.ArgumentTypeError, match="'nan' is not a number.$"):
        real_number()("nan")


@pytest.mark.parametrize(
    "message, expected",
    [
        ("Raise max_disk, or chunk_rows=3.", "Raise --max-disk, or --chunk-rows 3."),
        ("per_device_train_batch_size=1 is few", "--batch-size 1 is few"),
        ("no column: name it with text_column.", "no column: name it with --text-column."),
        ("holds no vision_model.bt_adapter (60 tensors)", "holds no vision_model.bt_adapter (60 tensors)"),
        ("see /tmp/max_disk/x, max_disk.txt and 'max_disk'", "see /tmp/max_disk/x, max_disk.txt and 'max_disk'"),
        ("the seed of the run is seed=3", "the seed of the run is --seed 3"),
        ("--set max_dis: no such field. Nearest: max_disk.", "--set max_dis: no such field. Nearest: max_disk."),
    ],
)
def test_errors_name_what_was_typed(message, expected):
    args = argparse.Namespace(max_disk=1, chunk_rows=2, batch_size=3, text_column=None, bt_adapter=None, model="m")
    args.seed = 3
    assert name_options(message, args, {"per_device_train_batch_size": "batch_size", "seed": "seed"}) == expected
