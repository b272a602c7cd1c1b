"""`index`, `search` and `classify` as a user runs them."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lancedb
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from bt_adapter_hf import BTAdapterForPreTraining, BTAdapterModel, save_bt_adapter
from bt_adapter_hf.adapters.fingerprint import plain, weights_digest
from bt_adapter_hf.cli.main import main
from bt_adapter_hf.search.encoding import VideoEncoder
from bt_adapter_hf.search.index import VideoIndex
from bt_adapter_hf.search.table import to_arrow
from tests import tiny_pairs


@pytest.fixture
def index(tiny_checkpoint, clips, tmp_path, capsys) -> Path:
    assert main(["index", str(clips), "-o", str(tmp_path / "idx"), "--model", str(tiny_checkpoint)]) == 0
    capsys.readouterr()
    return tmp_path / "idx"


def error_of(argv: list, capsys, out: str | None = "") -> str:
    """Runs a command that must fail with exactly one line on stderr, and returns it."""
    assert main([str(arg) for arg in argv]) == 1
    captured = capsys.readouterr()
    assert captured.out == out or out is None
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def usage_error(argv: list, capsys) -> str:
    """Runs a command that argparse must refuse, and returns the line that says why."""
    with pytest.raises(SystemExit) as status:
        main([str(arg) for arg in argv])
    assert status.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_index_and_again(tiny_checkpoint, clips, tmp_path, capsys):
    argv = ["index", str(clips), "-o", str(tmp_path / "idx"), "--model", str(tiny_checkpoint)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "4 videos added, 0 already there, 2 skipped" in out
    assert "empty.mp4: " in out and "skipped.jsonl" in out  # the first few, and where all are
    times = re.search(r"^where the time went: (.*)$", out, re.MULTILINE)[1]
    shares = dict(re.findall(r"(\w+) (\d+)%", times))
    assert shares.keys() == {"decode", "preprocess", "transfer", "tower", "write"}
    assert 95 <= sum(map(int, shares.values())) <= 105
    assert main([*argv, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    seconds = summary.pop("seconds")
    assert seconds.keys() == shares.keys() and seconds["tower"] == 0 < seconds["write"]  # two are tried again
    assert summary == {
        "index": str(tmp_path / "idx"), "added": 0, "present": 4, "gone": 0, "pruned": 0, "skipped": 2
    }  # fmt: skip
    (clips / "red.mp4").unlink()
    assert main(argv) == 0
    assert "0 videos added, 3 already there, 2 skipped, 1 gone (--prune takes them out)" in capsys.readouterr().out
    assert main(["index", "--prune", "-o", str(tmp_path / "idx")]) == 0  # without videos, and so without a model
    assert "1 gone and taken out" in capsys.readouterr().out
    assert main([*argv, "--optimize"]) == 0
    assert "3 rows: a search compares with all of them" in capsys.readouterr().out
    assert main([*argv, "--optimize", "--json"]) == 0  # one document
    optimized = {"rows": 3, "recall_at_10": None, "seconds": None}
    assert json.loads(capsys.readouterr().out)["optimized"] == optimized
    assert main(["index", "--prune", "--optimize", "-o", str(tmp_path / "idx"), "--json"]) == 0
    expected = {"index": str(tmp_path / "idx"), "pruned": 0, "optimized": optimized}
    assert json.loads(capsys.readouterr().out) == expected


def test_moments(tiny_checkpoint, clips, tmp_path, capsys):
    """Of clips of 0.6 s, and a GIF of 0.4 s, which is a moment as a whole."""
    argv = ["index", str(clips), "-o", str(tmp_path / "idx"), "--model", str(tiny_checkpoint), "--window", "0.5"]
    assert main([*argv, "--stride", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "4 videos added, 0 already there, 2 skipped; 7 moments" in out and "no video is longer" not in out
    shares = dict(re.findall(r"(\w+) (\d+)%", out))
    assert shares.keys() >= {"decode", "preprocess", "tower", "write"} and int(shares["write"]) < 90
    search = ["search", str(tmp_path / "idx"), "a dog"]
    assert main([*search, "-k", "9", "--overlap", "1", "--sheet", str(tmp_path / "hits.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert sum("00:00.0-00:00.5" in line for line in lines) == sum("00:00.1-00:00.6" in line for line in lines) == 3
    assert main([*search, "--json"]) == 0  # those of one clip overlap
    hits = json.loads(capsys.readouterr().out)
    assert len(hits) == len({hit["path"] for hit in hits}) == 4
    assert all(hit["start"] < hit["end"] for hit in hits)
    assert "other settings (--stride 0.1, now 0.25)" in error_of(argv, capsys)
    assert (
        main(["index", str(clips), "-o", str(tmp_path / "w"), "--model", str(tiny_checkpoint), "--window", "9"]) == 0
    )
    out = capsys.readouterr().out
    assert "; 4 moments" in out and "no video is longer than --window 9: each is one row" in out


def test_merge_export_and_convert(index, tiny_checkpoint, clips, tmp_path, capsys):
    assert main(["index", "export", str(index), str(tmp_path / "rows.parquet")]) == 0
    assert "rows.parquet: 4 rows" in capsys.readouterr().out
    merged = ["index", "merge", str(tmp_path / "rows.parquet"), str(index), "-o", str(tmp_path / "all")]
    assert main([*merged, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(tmp_path / "all"), "rows": 4}
    assert "no index of an older version" in error_of(["index", "convert", index], capsys)
    assert "merge takes the indices" in usage_error(["index", "merge", index], capsys)
    assert "export takes an index" in usage_error(["index", "export", index], capsys)
    error = usage_error(["index", "merge", index, "-o", tmp_path / "x", "--window", "3"], capsys)
    assert "argument --window: it is for indexing videos" in error


def test_index_options(tiny_checkpoint, clips, tmp_path, capsys):
    argv = ["index", clips / "*.gif", "-o", tmp_path / "idx", "--model", tiny_checkpoint, "--num-frames", "2"]
    argv += ["--dtype", "bfloat16", "--device", "cpu", "--workers", "1", "--batch-size", "1"]
    assert main([str(arg) for arg in argv]) == 0
    index = VideoIndex.load(tmp_path / "idx")
    assert index.info["dtype"] == "bfloat16"
    assert len(index.rows[0]["timestamps"]) == index.info["settings"]["num_frames"] == 2
    assert main(["index", str(clips / "*.gif"), *map(str, argv[2:8]), "--device", "cpu"]) == 0  # goes on in bfloat16
    assert "0 videos added, 1 already there" in capsys.readouterr().out
    # the text meets the videos in the dtype of the index
    assert main(["search", str(tmp_path / "idx"), "a dog", "--device", "cpu"]) == 0
    assert "grey.gif" in capsys.readouterr().out


def test_index_errors(tiny_checkpoint, clips, index, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    model = ["--model", tiny_checkpoint]
    assert "no video under" in error_of(["index", tmp_path / "empty", "-o", tmp_path / "new", *model], capsys)
    assert "is not a file, a folder" in error_of(["index", tmp_path / "nope", "-o", tmp_path / "new", *model], capsys)
    assert "is a file" in error_of(["index", clips, "-o", clips / "red.mp4", *model], capsys)
    assert "other files" in error_of(["index", clips, "-o", clips, *model], capsys)
    assert "other settings" in error_of(["index", clips, "-o", index, *model, "--num-frames", "6"], capsys)
    assert "other weights" in error_of(["index", clips, "-o", index, *model, "--dtype", "bfloat16"], capsys)
    assert "nowhere" in error_of(["index", clips, "-o", tmp_path / "new", "--model", tmp_path / "nowhere"], capsys)
    error = error_of(["index", clips, "-o", tmp_path / "new", "--model", "./nothere"], capsys)
    assert error.startswith("bt-adapter index: error: --model: there is no folder './nothere'")
    for option in ("--batch-size", "--workers", "--num-frames"):
        error = usage_error(["index", clips, "-o", tmp_path / "new", option, "-1"], capsys)
        assert f"argument {option}: '-1' is not a whole number" in error
    for option in ("--window", "--stride"):
        error = usage_error(["index", clips, "-o", tmp_path / "new", "--window", "1", option, "0"], capsys)
        assert f"argument {option}: '0' is not a number above 0" in error
    error = error_of(["index", clips, "-o", tmp_path / "new", "--window", "1", "--stride", "2", *model], capsys)
    assert "--stride 2 is longer than --window 1" in error
    for given in (["--window", "1", "--stride", "1e-7"], ["--window", "1e-9"]):
        error = error_of(["index", clips, "-o", tmp_path / "new", *given, *model], capsys)
        assert f"{given[-2]} {given[-1].replace('e-', 'e-0')}: expected a number of seconds, 0.01 or more" in error
    assert "--force: it goes with --prune" in usage_error(["index", clips, "-o", "x", "--force"], capsys)
    assert "--stride: it goes with --window" in usage_error(["index", clips, "-o", "x", "--stride", "2"], capsys)
    assert "other settings (--window None, now 1.0" in error_of(
        ["index", clips, "-o", index, "--window", "1", *model], capsys
    )
    assert "required: -o" in usage_error(["index", clips], capsys)
    assert "name folders" in usage_error(["index", "-o", index], capsys)
    assert "--model: it is for indexing videos" in usage_error(["index", "--prune", "-o", index, *model], capsys)
    assert "holds no index" in error_of(["index", "--prune", "-o", tmp_path / "empty"], capsys)
    assert "holds no index" in error_of(["index", "--optimize", "-o", tmp_path / "empty"], capsys)
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    error = error_of(["index", tmp_path / "loop.mp4", "-o", tmp_path / "new", *model], capsys)
    assert "loop.mp4' is a link to a file that does not exist, or to itself" in error
    assert not (tmp_path / "new").exists()


def test_odd_names_and_files(tiny_checkpoint, clips, index, tmp_path, capsys, monkeypatch):
    """One line each, which names what was typed or the file."""
    monkeypatch.chdir(tmp_path)
    model = ["--model", tiny_checkpoint]
    assert "DIR_OR_GLOB: '' is no name" in usage_error(["index", "", "-o", "new", *model], capsys)
    assert "argument -o/--output: '' is no name" in usage_error(["index", clips, "-o", "", *model], capsys)
    assert "--model: there is no folder 'no name!': it does not exist." in error_of(
        ["index", clips, "-o", "n", "--model", "no name!"], capsys
    )
    error = error_of(["index", clips, "-o", "n", "--model", "org/none"], capsys)  # the tests are offline
    assert "org/none is no folder, and could not be loaded" in error and "HF_HUB_OFFLINE is set" in error
    Path("labels.txt").write_bytes(b"\xff\xfe")
    for file in ("labels.txt", "."):
        error = error_of(["classify", clips, "--labels-file", file, *model], capsys)
        assert f"--labels-file {file} cannot be read as text" in error
    assert "cannot be written to '/proc'" in error_of(["search", index, "a", "--sheet", "/proc/x.png"], capsys)


def test_damaged_files_can_be_salvaged(tiny_checkpoint, clips, tmp_path, capsys):
    whole = (clips / "red.mp4").read_bytes()
    cut = tmp_path / "cut.gif"
    content = (clips / "grey.gif").read_bytes()
    cut.write_bytes(content[: len(content) * 3 // 4])
    argv = ["index", str(cut), "-o", str(tmp_path / "idx"), "--model", str(tiny_checkpoint)]
    assert main(argv) == 1 and whole
    assert "on_damage='salvage'" in capsys.readouterr().out
    assert main([*argv, "--on-damage", "salvage"]) == 0
    assert "1 videos added" in capsys.readouterr().out


def test_names_that_are_no_text_and_files_that_are_gone(tiny_checkpoint, clips, tmp_path, capsys):
    """They are shown escaped, on one line; JSON has them as they are."""
    odd = [os.fsencode(clips) + b"/caf\xe9.mp4", os.fsencode(clips) + b"/two\nlines.mp4"]
    for name in odd:
        shutil.copy(clips / "red.mp4", name)
    (clips / "green.mp4").rename(clips / "moved.mp4")
    os.rename(clips / "garbage.avi", os.fsencode(clips) + b"/bad\xff.avi")
    assert main(["index", str(clips), "-o", str(tmp_path / "idx"), "--model", str(tiny_checkpoint)]) == 0
    assert "bad\\xff.avi" in capsys.readouterr().out
    (clips / "moved.mp4").unlink()
    argv = ["search", str(tmp_path / "idx"), "a dog", "-k", "9"]
    assert main([*argv, "--sheet", str(tmp_path / "s.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert sum("caf\\xe9.mp4" in line for line in lines) == sum("two\\nlines.mp4" in line for line in lines) == 1
    assert ["missing" in line for line in lines] == ["moved.mp4" in line for line in lines]
    assert main([*argv, "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)
    assert {os.fsencode(hit["path"]) for hit in hits} > set(odd)
    assert [hit["missing"] for hit in hits] == [hit["path"].endswith("moved.mp4") for hit in hits]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk(index, tiny_checkpoint, clips, tmp_path, capsys):
    """One line that names the file, and nothing half-written is left."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        error = error_of(["search", index, "a dog", "--sheet", disk / "s.png"], capsys, out=None)
        assert "No space left" in error and "s.png" in error
        with pytest.raises(OSError, match="No space left"), open(disk / "filler", "wb", buffering=0) as file:
            while file.write(bytes(512)):
                pass
        error = error_of(["index", clips, "-o", disk / "idx", "--model", tiny_checkpoint], capsys)
        assert "No space left" in error and "the index '" in error
        assert sorted(path.name for path in disk.rglob("*")) == ["filler"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_unwritable_output_is_found_before_the_work(tiny_checkpoint, clips, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(VideoEncoder, "from_pretrained", lambda *args, **options: pytest.fail("the model was loaded"))
    error = error_of(["index", clips, "-o", clips / "red.mp4" / "idx", "--model", tiny_checkpoint], capsys)
    assert "the index cannot be written to" in error


def test_index_of_broken_files_only(tiny_checkpoint, clips, tmp_path, capsys):
    argv = ["index", clips / "empty.mp4", clips / "garbage.avi", "-o", tmp_path / "idx", "--model", tiny_checkpoint]
    assert main([str(arg) for arg in argv]) == 1
    captured = capsys.readouterr()
    assert "0 videos added, 0 already there, 2 skipped" in captured.out
    assert captured.err == "bt-adapter index: error: none of the files could be read\n"
    assert [path.name for path in (tmp_path / "idx").iterdir()] == ["skipped.jsonl"]
    # the folder is no obstacle to a later try
    assert main(["index", str(clips), "-o", str(tmp_path / "idx"), "--model", str(tiny_checkpoint)]) == 0


def test_weights_that_are_not_finite(tiny_checkpoint, clips, tmp_path, capsys):
    """Every video fails, and the command says why."""
    model = BTAdapterModel.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        model.visual_projection.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path / "model")
    VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu").processor.save_pretrained(tmp_path / "model")
    for options in ([], ["--window", "0.4"]):
        argv = ["index", clips / "red.mp4", clips / "green.mp4", "-o", tmp_path / "idx", "--model", tmp_path / "model"]
        assert main([str(arg) for arg in [*argv, *options]]) == 1
        captured = capsys.readouterr()
        assert "0 videos added, 0 already there, 2 skipped" in captured.out
        assert captured.err.startswith("bt-adapter index: error: the model gives no finite feature of any video")


def test_search_table_json_and_sheet(index, tiny_checkpoint, tmp_path, capsys):
    encoder = VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu")
    loaded = VideoIndex.load(index)
    scores = loaded.features @ encoder.encode_texts(["a red dog"])[0]
    expected = [loaded.rows[i]["path"] for i in (-scores).argsort()[:3]]

    assert main(["search", str(index), "a red dog", "-k", "3", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)
    assert [hit["path"] for hit in hits] == expected
    assert [hit["score"] for hit in hits] == pytest.approx(sorted(scores, reverse=True)[:3], abs=1e-5)
    assert {"rank", "duration", "timestamps", "width"} <= hits[0].keys()

    assert main(["search", str(index), "a red dog", "-k", "3", "--sheet", str(tmp_path / "hits.png")]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [os.path.basename(line.split()[1]) for line in lines] == [os.path.basename(path) for path in expected]
    assert [float(line.split()[-1]) for line in lines] == pytest.approx(sorted(scores, reverse=True)[:3], abs=1e-4)
    with Image.open(tmp_path / "hits.png") as sheet:
        assert sheet.width > 1000


def test_ways_to_ask(index, clips, tmp_path, capsys):
    def hits(*argv) -> list[dict]:
        assert main(["search", str(index), *map(str, argv), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    like = hits("--like", clips / "red.mp4", "-k", 1)
    assert like[0]["path"].endswith("red.mp4") and like[0]["score"] == pytest.approx(1, abs=1e-5)
    Image.new("RGB", (32, 32), (60, 80, 230)).save(tmp_path / "still.png")
    assert len(hits("--like", tmp_path / "still.png")) == 4
    plain, turned = hits("a red dog"), hits("a red dog", "--not", "a blue cat")
    assert [hit["score"] for hit in plain] != [hit["score"] for hit in turned]
    assert [Path(hit["path"]).suffix for hit in hits("a", "--where", "path like '%.gif'")] == [".gif"]
    (tmp_path / "texts.txt").write_text("a red dog\n\na cat\n")
    several = hits("--queries", tmp_path / "texts.txt")
    assert [result["query"] for result in several] == ["a red dog", "a cat"]
    assert [hit["path"] for hit in several[0]["hits"]] == [hit["path"] for hit in plain]
    assert several[0]["hits"][0]["score"] == pytest.approx(plain[0]["score"], abs=1e-5)
    assert main(["search", str(index), "--queries", str(tmp_path / "texts.txt"), "--csv", "-k", "2"]) == 0
    lines = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [(line["query"], line["rank"]) for line in lines] == [
        ("a red dog", "1"), ("a red dog", "2"), ("a cat", "1"), ("a cat", "2")
    ]  # fmt: skip
    assert [line["path"] for line in lines[:2]] == [hit["path"] for hit in plain[:2]]
    assert float(lines[0]["score"]) == pytest.approx(plain[0]["score"], abs=1e-5)

    assert "give one of" in usage_error(["search", index], capsys)
    assert "give one of" in usage_error(["search", index, "a", "--like", clips / "red.mp4"], capsys)
    assert "condition 'nope > 1' cannot be used" in error_of(["search", index, "a", "--where", "nope > 1"], capsys)
    assert "does not exist" in error_of(["search", index, "--like", clips / "none.mp4"], capsys)
    assert "empty.mp4 is empty" in error_of(["search", index, "--like", clips / "empty.mp4"], capsys)
    assert "cannot be read as text" in error_of(["search", index, "--queries", clips / "red.mp4"], capsys)
    assert (
        "no row fulfils" in (main(["search", str(index), "a", "--where", "width > 9999"]), capsys.readouterr().out)[1]
    )


def test_an_example_is_sampled_as_the_index_was(tiny_checkpoint, clips, tmp_path, capsys):
    index = str(tmp_path / "more.index")
    main(["index", str(clips), "-o", index, "--model", str(tiny_checkpoint), "--num-frames", "6"])
    capsys.readouterr()
    encoder, red = VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu"), str(clips / "red.mp4")
    (own,) = encoder.encode_videos([red])
    (hits,) = VideoIndex.load(index).search(own.feature[None], k=1)
    assert hits[0].score < 1 - 1e-5  # with the frames of the processor
    assert main(["search", index, "--like", red, "-k", "1", "--json"]) == 0
    (hit,) = json.loads(capsys.readouterr().out)
    assert hit["path"].endswith("red.mp4") and hit["score"] == pytest.approx(1, abs=1e-6)


def test_search_errors(index, tiny_checkpoint, tmp_path, capsys):
    assert "holds no index" in error_of(["search", tmp_path, "a dog"], capsys)
    assert "ends in .png" in error_of(["search", index, "a dog", "--sheet", tmp_path / "x.gif"], capsys)
    assert "a text is empty" in error_of(["search", index, " "], capsys)
    assert "tokens long; this model takes 24" in error_of(["search", index, "a " * 40], capsys)
    assert main(["search", str(index), "a dog", "-k", str(2**40)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert "argument -k: '0' is not a whole number of at least 1" in usage_error(
        ["search", index, "a dog", "-k", "0"], capsys
    )

    encoder = VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu")
    torch.manual_seed(2)
    BTAdapterModel(encoder.model.config).save_pretrained(tmp_path / "other")
    encoder.processor.save_pretrained(tmp_path / "other")
    error = error_of(["search", index, "a dog", "--model", tmp_path / "other"], capsys)
    assert "was made with" in error
    assert "other weights" in error


def test_the_model_of_an_index_may_have_moved(index, tiny_checkpoint, tmp_path, capsys):
    loaded = VideoIndex.load(index)
    data = to_arrow({**loaded.info, "model": str(tmp_path / "old place")}, loaded.rows, loaded.features)
    lancedb.connect(index).create_table("videos", data, mode="overwrite")
    assert "old place" in error_of(["search", index, "a dog"], capsys)
    assert main(["search", str(index), "a dog", "--model", str(tiny_checkpoint)]) == 0


def test_the_model_of_an_index_by_what_it_computes(tiny_checkpoint, clips, tmp_path, capsys):
    """Not by what only its training has read, which an adapter of it does not bring with it."""
    torch.manual_seed(3)
    clip = tmp_path / "clip"
    CLIPModel(tiny_pairs.clip_config()).save_pretrained(clip)
    CLIPProcessor(tiny_pairs.processor().image_processor, tiny_pairs.tokenizer()).save_pretrained(clip)
    trained = {"mask_ratio": 0.5, "vtc_weight": 2.0, "mbta_loss": "mse", "order_negatives": "reversed"}
    BTAdapterForPreTraining.from_pretrained(
        clip, adapter_layers=[1, 2], gate_on="branch", drop_path_rate=0.3, mask_order="released", **trained
    ).save_pretrained(tmp_path / "run")
    tiny_pairs.processor().save_pretrained(tmp_path / "run")
    run = BTAdapterModel.from_pretrained(tmp_path / "run")
    save_bt_adapter(run, tmp_path / "adapter", base_model_name_or_path=str(clip))
    index = ["index", clips, "--dtype", "float32", "--num-frames", "4"]
    main(list(map(str, [*index, "-o", tmp_path / "a", "--model", tmp_path / "run"])))
    features = VideoIndex.load(tmp_path / "a").features
    assert main(["search", str(tmp_path / "a"), "a dog", "--model", str(tmp_path / "adapter")]) == 0
    main(list(map(str, [*index, "-o", tmp_path / "a", "--model", tmp_path / "adapter"])))  # nothing is made again
    main(list(map(str, [*index, "-o", tmp_path / "b", "--model", tmp_path / "adapter"])))
    np.testing.assert_array_equal(VideoIndex.load(tmp_path / "b").features, features)
    assert main(["index", "merge", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "c")]) == 0

    # An index of an earlier version knows the whole config only: the very same model goes on with it.
    loaded = VideoIndex.load(tmp_path / "a")
    info = {name: value for name, value in loaded.info.items() if name != "features_fingerprint"}
    config = json.dumps(plain(run.config.to_diff_dict()), sort_keys=True).encode()
    assert info["fingerprint"] == weights_digest(sorted(run.state_dict().items()), as_stored=True, start=config)
    lancedb.connect(tmp_path / "a").create_table(
        "videos", to_arrow(info, loaded.rows, loaded.features), mode="overwrite"
    )
    assert main(["search", str(tmp_path / "a"), "a dog"]) == 0
    main(list(map(str, [*index, "-o", tmp_path / "d", "--model", tmp_path / "run"])))
    assert main(["index", "merge", str(tmp_path / "a"), str(tmp_path / "d"), "-o", str(tmp_path / "e")]) == 0
    capsys.readouterr()
    assert "other weights or settings" in error_of(
        ["search", tmp_path / "a", "a dog", "--model", tmp_path / "adapter"], capsys
    )


def test_classify(tiny_checkpoint, clips, tmp_path, capsys):
    model = ["--model", str(tiny_checkpoint)]
    argv = ["classify", str(clips), "--labels", "red, green,blue ,grey", *model]
    assert main([*argv, "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert [Path(video["path"]).name for video in output["videos"]] == ["green.mp4", "grey.gif", "blue.MP4", "red.mp4"]
    assert [Path(line["path"]).name for line in output["skipped"]] == ["empty.mp4", "garbage.avi"]
    for video in output["videos"]:
        probabilities = [label["probability"] for label in video["labels"]]
        assert len(probabilities) == 3
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0.75 < sum(probabilities) < 1  # the best three of four

    (tmp_path / "labels.txt").write_text("red\n\ngreen\nblue\ngrey\n")
    argv = ["classify", str(clips), "--labels-file", str(tmp_path / "labels.txt"), "--top", "1", *model]
    assert main(argv) == 0
    out = capsys.readouterr().out
    best = output["videos"][0]["labels"][0]
    assert out.splitlines()[1].split() == [f"{best['probability']:.1%}", f"{best['cosine']:.4f}", best["label"]]
    assert "2 of 6 files skipped:" in out
    assert out.count("empty.mp4") == 1 and "empty.mp4: is empty" in out


def test_classify_template_is_put_around_the_labels(tiny_checkpoint, clips, capsys):
    argv = ["classify", str(clips / "red.mp4"), "--model", str(tiny_checkpoint), "--json", "--top", "2"]

    def cosines(labels: str, *options: str) -> list[float]:
        assert main([*argv, "--labels", labels, *options]) == 0
        return [label["cosine"] for label in json.loads(capsys.readouterr().out)["videos"][0]["labels"]]

    assert cosines("red, blue", "--template", "a {} dog") == cosines("a red dog, a blue dog")
    assert cosines("red, blue") != cosines("a red dog, a blue dog")


def test_classify_errors(tiny_checkpoint, clips, tmp_path, capsys):
    files = ["classify", clips / "red.mp4", "--model", tiny_checkpoint]
    assert "found 1 labels" in error_of([*files, "--labels", "red,"], capsys)
    assert "'red' is there twice" in error_of([*files, "--labels", "red, blue, red"], capsys)
    assert "no {} for the label" in error_of([*files, "--labels", "red, blue", "--template", "a dog"], capsys)
    assert "nope.txt cannot be read" in error_of([*files, "--labels-file", tmp_path / "nope.txt"], capsys)
    for option in ("--top", "--batch-size", "--workers", "--num-frames"):
        assert f"argument {option}: '0' is not" in usage_error([*files, "--labels", "red, blue", option, "0"], capsys)

    argv = ["classify", clips / "empty.mp4", "--labels", "red, blue", "--model", tiny_checkpoint]
    assert main([str(arg) for arg in argv]) == 1
    captured = capsys.readouterr()
    assert "1 of 1 files skipped" in captured.out
    assert captured.err == "bt-adapter classify: error: none of the files could be read\n"


def test_the_installed_command(index):
    """Through the console script, in a process of its own, from another working directory."""
    script = Path(sys.executable).with_name("bt-adapter")
    done = subprocess.run([script, "search", index.name, "a dog"], cwd=index.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
    assert done.stderr == ""
