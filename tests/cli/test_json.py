"""`--json`: every command that prints results has it, and prints one JSON document on stdout and nothing else."""

import argparse
import json

import pytest

from bt_adapter_hf.cli.main import COMMANDS, build_parser, main
from tests import tiny_pairs
from tests.evaluation import layouts


FOR_PEOPLE = {"demo"}  # chat is a conversation too, but answers given questions


def parsers(parser, name=""):
    """Every parser that runs something, by its name."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield name, parser
    for action in below:
        for word, child in action.choices.items():
            yield from parsers(child, f"{name} {word}".strip())


def test_every_command_has_it():
    found = dict(parsers(build_parser()))
    assert {name.split()[0] for name in found} == set(COMMANDS)
    without = {name for name, parser in found.items() if "--json" not in parser._option_string_actions}
    assert without == FOR_PEOPLE


@pytest.fixture
def folder(tmp_path):
    tiny_pairs.write_table(tmp_path / "clips", rows=4)
    rows = [json.loads(line) for line in (tmp_path / "clips" / "metadata.jsonl").open()]
    layouts.dump(tmp_path / "clips" / "pairs.jsonl", [{**row, "wrong": "nothing at all"} for row in rows])
    return tmp_path


def test_one_document_and_nothing_else(folder, tiny_checkpoint, capsys):
    """In the order in which a user goes; what is for people goes to stderr."""
    model = ["--model", tiny_checkpoint, "--device", "cpu"]
    clips, index, run = folder / "clips", folder / "index", folder / "run"
    evaluate = ["--item-timeout", "9", "--workers", "1", "--controls", "reversed", *model]

    def ask(*argv, status=0):
        argv = list(map(str, argv))
        assert main([*argv, "--json"]) == status, (argv, capsys.readouterr().err)
        return json.loads(capsys.readouterr().out)

    assert ask("index", clips, "-o", index, *model, "--optimize")["optimized"]["rows"] == 4
    (clips / "clip3.mp4").unlink()
    pruned = ask("index", "-o", index, "--prune", "--optimize")
    built = {"rows": 3, "recall_at_10": None, "seconds": None}
    assert pruned == {"index": str(index), "pruned": 1, "optimized": built}
    assert len(ask("search", index, "a clip", *model, "--sheet", folder / "sheet.html")) == 3
    labels = ["--labels", "red, blue", "--plot", folder / "plot.png"]
    assert ask("classify", clips / "clip0.mp4", *labels, *model)["videos"]
    assert ask("check-data", clips / "metadata.jsonl", status=1)["broken"] == 1
    ask("eval", "retrieval", "--data", clips, "-o", run, "--max-broken", "0.5", *evaluate)
    table = ["--data", clips / "pairs.jsonl", "--max-broken", "0.5"]
    ask("eval", "temporal", *table, "-o", folder / "temporal", *evaluate)
    (report,) = ask("eval", "report", run)["results"]
    assert report["name"] == "run" and report["scores"]["t2v_R1"]["value"] >= 0
    ask("eval", "report", run, "-o", folder / "report.md")
    trained = ["--train", clips, "--max-steps", "1", "--set", "use_cpu=true", "--max-broken", "0.5"]
    summary = ask("pretrain", *model[:2], *trained, "--output-dir", folder / "out", "--batch-size", "2")
    assert summary == json.loads((folder / "out" / "run_summary.json").read_text()) and summary["finished"]
    for target in ("adapter", "original"):
        assert ask("convert", tiny_checkpoint, "--to", target, "--dry-run")["tensors"][0].keys() == {
            *("name", "shape", "dtype")
        }
        assert ask("convert", tiny_checkpoint, folder / target, "--to", target)["tensors"]
    main(["env", "--json"])  # its status says whether it found problems
    assert json.loads(capsys.readouterr().out)["bt_adapter_hf"]
