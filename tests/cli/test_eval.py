"""`bt-adapter eval`, as a user runs it."""

import json

import pytest

from bt_adapter_hf.cli.main import main
from tests import tiny_pairs
from tests.chat import saved_hosts
from tests.evaluation import layouts
from tests.evaluation.judge_server import JudgeServer


@pytest.fixture
def table(tmp_path):
    return tiny_pairs.write_table(tmp_path / "clips", rows=4).parent


def test_retrieval(tiny_checkpoint, table, tmp_path, capsys):
    command = ["eval", "retrieval", "--data", str(table), "--model", str(tiny_checkpoint), "-o", str(tmp_path / "out")]
    assert main([*command, "--split", "train"]) == 0
    printed = capsys.readouterr().out
    assert "frames reversed" in printed and "above frame-averaged CLIP" in printed and "(chance)" in printed
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["items"]["videos"] == 4 and set(result["controls"]) >= {"shuffled", "reversed"}
    # the same again reads what is there; other settings are refused
    assert main([*command, "--split", "train", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == result["scores"]
    assert main([*command, "--split", "train", "--num-frames", "2"]) == 1
    said = capsys.readouterr().err
    assert "holds an evaluation with other settings (video_processor.num_frames: 4 there, 2 now)" in said


def test_recognition(tiny_checkpoint, table, tmp_path, capsys):
    classes = tmp_path / "classes.txt"
    classes.write_text("".join(f"{json.loads(line)['text']}\n" for line in (table / "metadata.jsonl").open()))
    command = ["eval", "recognition", "--data", str(table), "--model", str(tiny_checkpoint), "--classes", str(classes)]
    assert main([*command, "--template", "it is {}", "--controls", "reversed", "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "top1" in printed and "frames reversed" in printed and "4 classes" in printed
    assert main([*command, "--controls", "backwards", "-o", str(tmp_path / "other")]) == 1
    assert "Unknown controls ['backwards']" in capsys.readouterr().err


def test_classes_are_looked_at_first(table, tmp_path, capsys):
    """Before a model is loaded, here one that does not exist; by the name of what was typed."""
    command = ["eval", "recognition", "--data", str(table), "--model", str(tmp_path), "-o", str(tmp_path / "out")]
    (tmp_path / "one.txt").write_text("run\n\n")
    (tmp_path / "twice.txt").write_text("run\njump\nrun\n")
    for name, words in (("one", "found 1 in"), ("twice", "'run' more than once"), ("none", "No such file")):
        file = tmp_path / f"{name}.txt"
        assert main([*command, "--classes", str(file)]) == 1
        said = capsys.readouterr().err
        assert words in said and f"--classes {file}" in said
    assert not (tmp_path / "out").exists()


def test_without_a_connection_the_copy_on_the_disk_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for command in (
        ["chat-bench", "--judge", "m"],
        ["qa", "--data", "activitynet-qa"],
        ["temporal", "--data", "tvbench"],
    ):
        assert main(["eval", *command, "-o", str(tmp_path / "out")]) == 1
        said = capsys.readouterr().err
        assert "cannot be read from the Hub" in said and "name its folder with --data-root" in said, said


def test_rows_that_cannot_be_used(tiny_checkpoint, table, tmp_path, capsys):
    (table / "clip0.mp4").write_bytes(b"nothing")
    (table / "clip1.mp4").unlink()
    command = ["eval", "retrieval", "--data", str(table), "--model", str(tiny_checkpoint), "-o", str(tmp_path / "out")]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "2 could not be used and are not in the scores" in captured.out
    assert "2 of 4 rows could not be used, more than the share --max-broken 0.1" in captured.err
    assert main([*command, "--max-broken", "0.5"]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--seed", "-1"], "--seed"),
        (["--shuffle-draws", "0"], "--shuffle-draws"),
        (["--model", "./nothere"], "nothere"),
    ],
)
def test_wrong_options(table, tmp_path, capsys, options, words):
    command = ["eval", "retrieval", "--data", str(table), "-o", str(tmp_path / "out"), *options]
    try:
        status = main(command)
    except SystemExit as exit:
        status = exit.code
    assert status in (1, 2) and words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_temporal(tiny_checkpoint, table, tmp_path, capsys):
    rows = [json.loads(line) for line in (table / "metadata.jsonl").open()]
    names = ("red", "green")
    pairs = [{**row, "no": names[row["text"].startswith("red")]} for row in rows]
    (table / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    command = ["eval", "temporal", "--model", str(tiny_checkpoint), "-o", str(tmp_path / "out"), "--item-timeout", "9"]
    assert main([*command, "--data", str(table / "pairs.jsonl"), "--wrong-column", "no"]) == 0
    printed = capsys.readouterr().out
    assert "pair" in printed and "no video" in printed and "(chance)" in printed and "over 4 items" in printed
    assert main([*command, "--data", str(table / "pairs.jsonl")]) == 1
    said = capsys.readouterr().err
    assert "has no wrong column: looked for 'wrong'" in said and "Name it with --wrong-column" in said
    for option in ("question", "answer", "kind"):
        questions = ["--question-column", "text", "--answer-column", "text", f"--{option}-column", "nothing"]
        assert main(["eval", "qa", "--data", str(table / "pairs.jsonl"), "-o", str(tmp_path / "qa"), *questions]) == 1
        said = capsys.readouterr().err
        assert f"has no {option} column: looked for 'nothing'" in said and f"with --{option}-column" in said, said
    assert main([*command, "--data", "rtime"]) == 1
    assert "name the folder of your copy with --data-root" in capsys.readouterr().err


def test_questions_and_five_scores(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    native, adapter = saved_hosts.save("llava", tmp_path)
    layouts.videochatgpt(tmp_path / "bench")
    layouts.msvd_qa(tmp_path / "msvd")
    model = ["--model", str(native), "--bt-adapter", str(adapter), "--num-frames", "4", "--device", "cpu"]
    model += ["--max-new-tokens", "2", "--controls", "blind,frame_average"]
    qa = ["eval", "qa", "--data", "msvd-qa", "--data-root", str(tmp_path / "msvd"), "-o", str(tmp_path / "qa"), *model]
    assert main(qa) == 1  # a video is missing
    captured = capsys.readouterr()
    assert "1 of 3 rows could not be used" in captured.err and "no video" in captured.out and "relaxed" in captured.out
    bench = ["eval", "chat-bench", "--data-root", str(tmp_path / "bench"), "-o", str(tmp_path / "out"), *model]
    assert main(bench) == 1
    assert "give --judge, or --judge-local" in capsys.readouterr().err
    with JudgeServer(lambda text, times: '{"score": 3}').running() as server:
        judge = ["--judge", "m", "--judge-url", server.url]
        assert main([*bench, *judge, "--dry-run", "--price-in", "1"]) == 0
        assert "24 prompts to the judge" in capsys.readouterr().out and server.asked == []
        assert main([*bench, *judge, "--aspects", "temporal,consistency"]) == 0
    printed = capsys.readouterr().out
    assert server.asked[0].startswith("Question: Which colour is snow?")  # before the model is loaded
    assert "consistency" in printed and "detail" not in printed and "3.0 [3.0, 3.0]" in printed
    fresh = [*bench, "-o", str(tmp_path / "fresh"), "--judge", "m"]
    with JudgeServer(lambda text, times: (401, b'{"error": {"message": "no such key"}}', 0)).running() as server:
        assert main([*fresh, "--judge-url", server.url]) == 1
        said = capsys.readouterr().err
        assert len(server.asked) == 1 and "no such key" in said and "set OPENAI_API_KEY" in said and "WARN" not in said
    assert main([*fresh, "--judge-url", "http://127.0.0.1:9/v1", "--judge-retries", "0"]) == 1
    assert "Nothing answers at --judge-url http://127.0.0.1:9/v1/" in capsys.readouterr().err
    assert not (tmp_path / "fresh").exists()  # no question was answered before
    assert main([*bench, "--dry-run"]) == 1
    assert "holds an evaluation with other settings (questions_fingerprint" in capsys.readouterr().err
    assert main([*bench, "--dry-run", "--aspects", "temporal,consistency"]) == 0
    assert "The answers about all 2 videos are there" in capsys.readouterr().out
    assert main([*bench, "--judge-url", "http://127.0.0.1:9/v1"]) == 1
    assert "--judge-url needs --judge" in capsys.readouterr().err
    assert main([*bench, "--judge", "m", "--judge-local", str(native)]) == 1
    assert "give one" in capsys.readouterr().err
    assert main([*bench, "--judge-local", str(tmp_path / "nothere")]) == 1
    assert f"--judge-local: there is no folder '{tmp_path / 'nothere'}'" in capsys.readouterr().err
