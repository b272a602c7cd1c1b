import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from bt_adapter_hf.cli import check_data
from bt_adapter_hf.cli.main import main
from bt_adapter_hf.data.checking import DataReport, PairCheck, check_rows, holds_conversations
from bt_adapter_hf.data.instructions import InstructionDataset, load_instructions
from bt_adapter_hf.data.pairs import PairDataset, load_table
from tests import tiny_instructions, tiny_pairs
from tests.chat import tiny_gif_qa
from tests.data.test_addresses import write_questions


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def table(tmp_path) -> Path:
    """Ten rows: six good clips, one missing, one cut, one without text; one caption twice, one of 30 letters."""
    folder = tmp_path / "videos"
    path = tiny_pairs.write_table(folder, rows=9)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (folder / "clip1.mp4").unlink()
    (folder / "clip2.mp4").write_bytes((folder / "clip2.mp4").read_bytes()[:300])
    rows[3]["text"] = "  "
    rows[5]["text"] = rows[4]["text"]
    rows[6]["text"] = "x" * 30
    rows.append({"file_name": "clip0.mp4", "text": "again"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check(capsys, *argv) -> tuple[int, dict]:
    status = main(["check-data", *map(str, argv), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_everything_about_a_table_of_files(table, tiny_checkpoint, tmp_path, capsys):
    listed = tmp_path / "broken.jsonl"
    status, found = check(capsys, table, "--model", tiny_checkpoint, "--list", listed, "--workers", 2)
    assert status == 1  # 3 of 10 are broken
    assert (found["rows"], found["checked"], found["usable"], found["broken"]) == (10, 10, 7, 3)
    broken = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [record["index"] for record in broken] == [1, 2, 3]
    assert [record["video"] for record in broken] == ["clip1.mp4", "clip2.mp4", "clip3.mp4"]
    assert "does not exist" in broken[0]["reason"] and "it has no text" in broken[2]["reason"]
    assert sum(found["reasons"].values()) == 3 and found["reasons"]["<path> does not exist."] == 1
    videos = found["videos"]
    assert videos["count"] == 7 and videos["frames"] == [6, 6, 6] and videos["width"] == [32, 32, 32]
    assert videos["seconds"] == pytest.approx([0.6] * 3) and videos["fps"] == pytest.approx([10] * 3)
    assert found["texts"] == {"count": 9, "repeated": 1, "rows_without": 1}
    # each letter is a token, and there are two more
    texts = [json.loads(line)["text"] for line in table.read_text().splitlines()]
    lengths = sorted(len(text.replace(" ", "")) + 2 for text in texts if text.strip())
    assert found["tokens"]["length"] == [lengths[0], lengths[4], lengths[-1]]
    assert found["tokens"]["limit"] == 24 and found["tokens"]["over_limit"] == 1


def test_what_is_accepted_and_the_readable_report(table, capsys):
    assert main(["check-data", str(table.parent), "--max-broken", "0.3"]) == 0
    out = capsys.readouterr().out
    assert "10 rows, 10 checked" in out and "usable  7" in out and "<path> does not exist." in out
    for line in ("clip1.mp4 (row 1): ", "clip2.mp4 (row 2): ", "clip3.mp4 (row 3): it has no text."):
        assert f"\n  {line}" in out
    assert out.count("clip1.mp4") <= 2  # the name in the table, and where it was looked for
    assert "7 videos" in out and "9 texts, 1 repeat an earlier one, 1 rows without" in out and "tokens" not in out
    assert main(["check-data", str(table), "--max-broken", "0.29"]) == 1
    assert "30.0% of the checked rows cannot be used" in capsys.readouterr().err


def test_a_sample_is_random_and_repeatable(table, capsys):
    first, again = (check(capsys, table, "--sample", 4, "--max-broken", 1)[1] for _ in range(2))
    assert first["checked"] == 4 and first == again


def test_the_first_three_are_named_and_the_options_are_those_of_the_command(tmp_path, capsys):
    path = tiny_pairs.write_table(tmp_path / "videos", rows=6)
    for row in range(5):
        clip = path.parent / f"clip{row}.mp4"
        if row == 1:
            data = clip.read_bytes()
            clip.write_bytes(data[: len(data) * 3 // 4])
        elif row != 2:
            clip.unlink()
    assert main(["check-data", str(path), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert out.count("(row ") == 3 and "and 1 more, see --list" in out, out
    assert "on_damage" not in out and "=" not in out.split("(row 1): ")[1].splitlines()[0]


def test_every_video_is_decoded_as_in_training(tmp_path, capsys):
    """`--on-damage salvage` makes of a cut video one that can be used, here as there."""
    path = tiny_pairs.write_table(tmp_path / "videos", rows=2)
    tiny_pairs.write_clip(tmp_path / "whole.mkv", (200, 0, 0), 2, frames=60)
    data = (tmp_path / "whole.mkv").read_bytes()
    (path.parent / "clip0.mp4").write_bytes(data[: len(data) * 2 // 3])  # what it is shows in its content
    for options, usable in (([], 1), (["--on-damage", "salvage"], 2)):
        _, found = check(capsys, path, "--max-broken", 1, *options)
        assert found["usable"] == usable, found["reasons"]
        processor = tiny_pairs.processor()
        processor.video_processor.on_damage = options[1] if options else "raise"
        dataset = PairDataset(load_table(path), processor, training=False, item_timeout=None)
        assert len(dataset[0]["broken"]) == 2 - usable


BROKEN_TABLES = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n\n",
    "null.jsonl": b"null\n",
    "list.jsonl": b"[1, 2]\n",
    "word.jsonl": b"hello\n",
    "open.jsonl": b'{"video": "a.mp4", "te',
    "mixed.jsonl": b'{"video": "a.mp4", "text": "x"}\n{"video": 7, "text": ["x"]}\n',
    "nested.jsonl": b'{"video": {"path": "a.mp4"}, "text": {"en": "x"}}\n',
    "nul.jsonl": b'{"video": "a\\u0000.mp4", "text": "x"}\n',
    "surrogate.jsonl": b'{"video": "caf\\udce9.mp4", "text": "x"}\n',
    "folder.jsonl": b'{"video": ".", "text": "x"}\n',
    "binary.jsonl": bytes(range(256)) * 20,
    "wide.jsonl": '{"video": "a.mp4", "text": "x"}'.encode("utf-16"),
    "empty.json": b"",
    "word.json": b'"hello"',
    "deep.json": b"[" * 5000,
    "empty.csv": b"",
    "one.csv": b"video,text\n",
    "ragged.csv": b"video,text\na.mp4\nb.mp4,x,y,z\n",
    "quote.csv": b'video,text\n"a.mp4,x\n',
    "line.csv": b'video,text\n"two\nlines.mp4",x\n',
    "latin.csv": b"video,text\ncaf\xe9.mp4,x\n",
    "empty.parquet": b"",
    "cut.parquet": b"PAR1abcPAR1",
    "empty.tar": b"",
    "zeros.tar": bytes(10240),
    "binary.tar": bytes(range(256)) * 40,
    "list.messages.jsonl": b'{"messages": 3}\n{"messages": [3]}\n{"messages": [{"role": "user", "content": [7]}]}\n',
    "q.jsonl": b'{"q": null, "a": [], "video_id": {}}\n',
    "half.jsonl": b'{"messages": []}\n\xff\n',
}


@pytest.mark.parametrize("name", BROKEN_TABLES)
def test_no_table_ends_in_a_traceback(name, tmp_path, capfd):
    (tmp_path / name).write_bytes(BROKEN_TABLES[name])
    assert main(["check-data", str(tmp_path / name), "--workers", "1", "--num-frames", "2"]) == 1
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err and "did not foresee" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("bt-adapter check-data: error: ")
    assert name in last or "cannot be used, more than --max-broken" in last


def shards(folder: Path, rows: int, per_shard: int) -> Path:
    """Parquet with the bytes of the clips, a row group per shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = tiny_pairs.write_table(folder / "files", rows=rows)
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    videos = [{"bytes": (table.parent / line["file_name"]).read_bytes(), "path": line["file_name"]} for line in lines]
    videos[1]["bytes"] = b"no video"
    path = folder / "shards.parquet"
    columns = {"video": videos, "text": [line["text"] for line in lines]}
    pq.write_table(pa.table(columns), path, row_group_size=per_shard)
    return path


def test_packed_shards_without_a_store(tmp_path, capsys):
    path = shards(tmp_path, rows=10, per_shard=4)
    status, found = check(capsys, path, "--max-broken", 0.1)
    assert status == 0
    assert (found["rows"], found["checked"], found["broken"], found["videos"]["count"]) == (10, 10, 1, 9)
    _, sampled = check(capsys, path, "--sample", 3, "--max-broken", 1)
    assert sampled["checked"] == 3


@pytest.mark.parametrize(
    "argv, message",
    [
        (["absent.jsonl"], "Cannot read the table absent.jsonl"),
        (["TABLE", "--text-column", "words"], "no text column: looked for 'words', found file_name, text"),
        (["TABLE", "--model", "CLIP", "--max-text-length", "25"], "the text tower takes 1 to 24 tokens"),
    ],
)
def test_bad_input_is_one_clear_line(argv, message, table, tiny_checkpoint, capsys):
    argv = [{"TABLE": str(table), "CLIP": str(tiny_checkpoint)}.get(word, word) for word in argv]
    assert main(["check-data", *argv]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bt-adapter check-data: error: ") and message in error


def test_an_interruption_reports_what_was_done(table, tmp_path, monkeypatch, capsys):
    """Ctrl-C reaches the processes that decode too; they go on until the command has reported."""
    (table.parent / "long.jsonl").write_text("\n".join(table.read_text().splitlines() * 2))

    def interrupted(rows, *_):
        for row in rows:
            yield row
            if row.reason is not None:
                break
        workers = psutil.Process().children(recursive=True)
        assert len(workers) >= 2
        for worker in workers:
            worker.send_signal(signal.SIGINT)
        yield next(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(check_data, "progress", interrupted)
    listed = tmp_path / "broken.jsonl"
    argv = ["check-data", str(table.parent / "long.jsonl"), "--json", "--workers", "1", "--list", str(listed)]
    assert main(argv) == 130
    found = json.loads(capsys.readouterr().out)
    assert found["interrupted"] and 1 < found["checked"] < found["rows"] == 20
    assert len(listed.read_text().splitlines()) == found["broken"] > 0


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> str:
    return str(tiny_instructions.Host("llava", tmp_path_factory.mktemp("llava")).native)


def test_conversations(llava, tmp_path, capsys):
    path = tiny_instructions.write_table(tmp_path / "videos", rows=6)
    lines = path.read_text().splitlines()
    long = json.loads(lines[4])
    long["messages"][1]["content"] = "the red square is right . " * 60
    asked_twice, not_one = lines[0], json.dumps({"messages": [{"role": "assistant", "content": "left"}]})
    path.write_text("\n".join([*lines[:4], json.dumps(long), lines[5], asked_twice, not_one]))
    (tmp_path / "videos" / "clip2.mp4").unlink()
    listed = tmp_path / "broken.jsonl"
    status, found = check(capsys, path, "--model", llava, "--list", listed, "--workers", 2, "--max-broken", 0.3)
    assert status == 1 and (found["rows"], found["usable"], found["broken"]) == (8, 5, 3)
    broken = {record["index"]: record["reason"] for record in map(json.loads, listed.read_text().splitlines())}
    assert list(broken) == [2, 4, 7] and "does not exist" in broken[2]
    assert "tokens, visual ones included, and the model takes" in broken[4] and "its roles are assistant" in broken[7]
    assert found["videos"]["count"] == 4  # clip0 once; not the missing one, nor that of the long conversation
    assert found["texts"] is None
    assert found["tokens"]["over_limit"] == 1 and found["tokens"]["length"][2] > found["tokens"]["limit"]
    data = load_instructions(path)
    processor = tiny_instructions.CLASSES["llava"][1].from_pretrained(llava)
    lengths = [len(InstructionDataset(data, processor, max_length=10**6)[row]["input_ids"]) for row in (0, 1, 3, 5, 6)]
    assert found["tokens"]["length"][0] == min(lengths)


def test_conversations_without_a_model(tmp_path, capsys):
    """VideoChatGPT's format, with the ending of the files left out."""
    tiny_pairs.write_table(tmp_path / "videos", rows=2)
    rows = [{"q": "What?", "a": "A square.", "video_id": f"clip{i}"} for i in (0, 1, 1, 5)]
    (tmp_path / "VideoChatGPT.json").write_text(json.dumps(rows))
    status, found = check(
        capsys, tmp_path / "VideoChatGPT.json", "--media-root", tmp_path / "videos", "--max-broken", 0.25
    )
    assert status == 0 and (found["rows"], found["broken"], found["videos"]["count"]) == (4, 1, 2)
    assert found["tokens"] is None and found["reasons"] == {"<path> does not exist.": 1}


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("a.jsonl", '\n{"messages": []}\n', True),
        ("a.json", '[{"q": "x", "a": "y", "video_id": "z"}]', True),
        ("a.jsonl", '{"video": "x", "text": "q"}\n', False),
        ("a.json", '[{"video": "x", "q": "y"}]', False),
        ("a.csv", "messages\n{}\n", False),
        ("a.jsonl", '{"messages": [', False),
        ("a.json", "", False),
    ],
)
def test_which_tables_hold_conversations(name, text, expected, tmp_path):
    (tmp_path / name).write_text(text)
    assert holds_conversations(str(tmp_path / name)) is expected


def test_a_shard_that_breaks_off_loses_its_rows_only(tmp_path, capsys):
    """Row groups of 4, 4 and 2; the file changes under the reader."""
    path = shards(tmp_path, rows=10, per_shard=4)
    table = load_table(path)
    found = table.records

    def records(shard, item_timeout):
        for index, record in found(shard, item_timeout):
            if shard == 1 and index == 1:
                raise OSError("the connection is gone")
            yield index, record

    table.records = records
    report = DataReport("table", len(table))
    for checked in check_rows(PairCheck(table)):
        report.add(checked)
    broken = {record["index"]: record["reason"] for record in report.broken}
    assert report.checked == 10 and list(broken) == [1, 5, 6, 7]
    assert broken[5] == "The shard cannot be read: the connection is gone."


class Hanging(PairCheck):
    def check(self, row, record):
        if row == 2:
            time.sleep(60)
        if row == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().check(row, record)


def test_a_row_that_hangs_or_crashes_is_cut_off(tmp_path):
    table = load_table(tiny_pairs.write_table(tmp_path / "videos", rows=6))
    found = {checked.row: checked for checked in check_rows(Hanging(table), timeout=2)}
    assert [row for row in found if found[row].reason is None] == [0, 1, 4, 5]
    assert "took longer than 2 s" in found[2].reason and "signal SIGKILL" in found[3].reason
    assert found[2].name == "clip2.mp4"


def test_gifs_that_are_gone_or_have_become_stills(tmp_path, capsys):
    tiny_gif_qa.write_gif(tmp_path / "moves.gif")
    tiny_gif_qa.write_gif(tmp_path / "one.gif", frames=1)
    frame = Image.new("RGB", (20, 20), "red")
    frame.save(tmp_path / "same.gif", format="PNG", save_all=True, append_images=[frame] * 2, duration=[50, 60, 70])
    table = write_questions(tmp_path, ["moves", "one", "same", "gone"])
    status, found = check(capsys, table, "--list", tmp_path / "list.jsonl", "--workers", 1, "--item-timeout", 0)
    assert status == 1 and (found["broken"], found["usable"], found["videos"]["stills"]) == (1, 3, 2)
    listed = {Path(r["video"]).name: r["reason"] for r in map(json.loads, (tmp_path / "list.jsonl").open())}
    assert listed.keys() == {"one.gif", "same.gif", "gone.gif"} and "still" in listed["one.gif"]
    main(["check-data", str(table), "--workers", "1", "--item-timeout", "0"])
    assert "2 of them are stills:" in capsys.readouterr().out
