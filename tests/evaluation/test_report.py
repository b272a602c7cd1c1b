"""Reports over result files, as a user asks for them."""

import json
import xml.etree.ElementTree as ET

import pytest

from bt_adapter_hf.cli.main import main
from bt_adapter_hf.data.broken import BrokenItem
from bt_adapter_hf.evaluation.results import EvaluationResult
from bt_adapter_hf.evaluation.statistics import Comparison, Interval


def result(value: float, frames: int = 8, data: str = "abc", task: str = "temporal", **fields) -> EvaluationResult:
    interval, name = Interval(value, value - 2, value + 2), "pair" if task == "temporal" else "exact"
    return EvaluationResult(
        task=task,
        scores={name: interval},
        controls={"reversed": {name: Interval(10.0, 8.0, 12.0)}, "blind": {name: Interval(50.0, 50.0, 50.0)}},
        against_frame_average={name: Comparison(interval, 0.001, 0.25)},
        chance={"pair": 50.0} if task == "temporal" else {},
        items={"items": 20},
        protocol={
            "model": "my | model",
            "data_fingerprint": data,
            "video_processor": {"num_frames": frames},
            "seed": 0,
        },
        failed=[BrokenItem(source="s", index=0, video="v", reason="gone")],
        **fields,
    )


@pytest.fixture
def folders(tmp_path):
    for name, found in {"small": result(90.0), "large": result(95.5, 16), "words": result(40.0, task="qa")}.items():
        (tmp_path / name).mkdir()
        found.write(tmp_path / name)
    return tmp_path


def test_markdown(folders, capsys):
    assert main(["eval", "report", str(folders / "small"), str(folders / "large" / "result.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| small | 90.0 [88.0, 92.0] |" in lines and "| large | 95.5 [93.5, 97.5] |" in lines
    assert lines.count("| – frames reversed | 10.0 [8.0, 12.0] |") == 2 and "| – (chance) | 50.0 |" in lines
    assert "- small: over 20 items; 1 could not be used" in lines
    assert any("above frame-averaged CLIP (paired bootstrap p = 0.001, McNemar p = 0.25)" in line for line in lines)
    assert "| video_processor.num_frames | 8 | 16 |" in lines and not any("seed" in line for line in lines)
    assert not any("not over the same data" in line for line in lines)


def test_page_with_plots(folders, capsys):
    page = folders / "report.html"
    names = ["--name", "A<b>", "--name", "B", "--name", "C"]
    paths = [str(folders / name) for name in ("small", "large", "words")]
    assert main(["eval", "report", *paths, *names, "-o", str(page)]) == 0
    text = page.read_text()
    assert "A&lt;b&gt;" in text and "A<b>" not in text and text.count("<svg") == 2 and "http-equiv" not in text
    for part in text.split("<svg")[1:]:
        ET.fromstring("<svg" + part.partition("</svg>")[0] + "</svg>")
    assert main(["eval", "report", paths[0], "-o", str(folders / "report.pdf")]) == 1
    assert "--output" in capsys.readouterr().err


def test_other_data_and_bad_files(folders, capsys):
    (folders / "other").mkdir()
    result(20.0, data="xyz").write(folders / "other")
    assert main(["eval", "report", str(folders / "small"), str(folders / "other")]) == 0
    assert "not over the same data" in capsys.readouterr().out
    (folders / "x.json").write_text(json.dumps({"task": "temporal"}))
    (folders / "y.json").write_text("{")
    (folders / "deep.json").write_text("[" * 20_000)
    for argv, words in (
        ([str(folders / "x.json")], "has no scores, controls"),
        ([str(folders / "y.json")], "cannot be read"),
        ([str(folders / "deep.json")], "deep.json cannot be read"),
        ([str(folders)], "no folder with a result.json"),
        ([str(folders / "small"), "--name", "a", "--name", "b"], "2 names for 1 results"),
    ):
        assert main(["eval", "report", *argv]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("form", ["markdown", "page"])
def test_result_files_of_another_shape_are_named(folders, capsys, form):
    """Whatever stands in a field, nothing of it ends in an error without the file's name."""
    good = json.loads((folders / "small" / "result.json").read_text())
    output = ["-o", str(folders / "report.html")] if form == "page" else []
    odd = [None, 3, "x", [], [1], {"pair": 3}, {"pair": {"value": "high", "low": 0, "high": 1}}, {"pair": None}]
    for field in ("task", "scores", "controls", "chance", "items", "protocol", "failed", "against_frame_average"):
        for value in (*odd, float("nan")):
            (folders / "odd.json").write_text(json.dumps({**good, field: value}))
            status, said = main(["eval", "report", str(folders / "odd.json"), *output]), capsys.readouterr().err
            assert "did not foresee" not in said, (field, value, said)
            if status:
                assert "odd.json is no result of `bt-adapter eval`" in said and field in said, (field, value)
            else:  # what could stand there
                assert (field, value) in [("task", "x"), ("protocol", value), ("items", {"pair": 3}),
                                          ("chance", {"pair": 3})], (field, value)  # fmt: skip


def test_few_videos_have_no_p_value_in_a_report(folders, capsys):
    found = result(90.0)
    found.against_frame_average["pair"] = Comparison(Interval(80.0, 70.0, 90.0), None, 0.25)
    found.write(folders / "small")
    assert "too few videos for a bootstrap test, McNemar p = 0.25" in found.table()
    assert main(["eval", "report", str(folders / "small")]) == 0
    assert (
        "above frame-averaged CLIP (too few videos for a bootstrap test, McNemar p = 0.25)" in capsys.readouterr().out
    )


def test_names_that_are_no_text_stay_in_the_file(tmp_path):
    found = result(1.0)
    found.failed[0]["video"] = "clip\udcff.mp4"  # a byte of a file name that is not UTF-8
    assert json.loads(found.write(tmp_path).read_text())["failed"]["list"][0]["video"] == "clip\udcff.mp4"
