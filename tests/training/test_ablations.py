"""The comparisons of recipes/ablations: what is run, in which order, and that nothing is averaged over in silence."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock

from recipes.ablations import report as reporting
from recipes.ablations.run import COLUMNS, Rows, build, main, order_hits, run_one
from recipes.ablations.settings import AGAINST_FIRST, CALLED, SETTINGS, TABLES, TITLES, runs


def row(setting: str, seed: int, share: float, budget: str | None = None) -> dict[str, str]:
    hits = np.random.default_rng([seed, round(100 * share)]).random(60) < share
    bits = "".join(str(int(hit)) for hit in hits)
    values = dict.fromkeys(COLUMNS, "50.0") | {
        "setting": setting,
        "seed": str(seed),
        "budget": budget or SETTINGS[setting].budget,
    }
    return values | {"order_hits": bits, "object_hits": bits, "curve": json.dumps({"1200": 100 * share})}


def test_every_setting_is_in_a_table_and_is_run_once():
    assert {name for names in TABLES.values() for name in names} == SETTINGS.keys()
    assert TITLES.keys() == TABLES.keys() and set(AGAINST_FIRST) < TABLES.keys()
    assert all(called.keys() <= set(TABLES[table]) for table, called in CALLED.items())
    planned = runs([*TABLES], 3)
    assert len(planned) == len(set(planned)) == 3 * len(SETTINGS)
    assert planned[:5] == [*((name, 0) for name in TABLES["table6"]), ("frame_average", 1)]


def test_rows_are_kept_and_those_of_another_budget_or_twice_are_refused(tmp_path):
    rows = Rows(tmp_path / "deep" / "runs.csv")
    assert rows.read() == {}
    rows.add(row("vtc", 0, 0.7))
    rows.add(row("vtc", 1, 0.8))
    assert rows.read() == {("vtc", 0): row("vtc", 0, 0.7), ("vtc", 1): row("vtc", 1, 0.8)}
    rows.add(row("vtc", 1, 0.8))
    with pytest.raises(ValueError, match="has vtc, seed 1 twice"):
        rows.read()
    other = Rows(tmp_path / "other.csv")
    other.add(row("both", 0, 0.7, budget="10x2"))
    with pytest.raises(ValueError, match="both, seed 0 was run under the budget 10x2"):
        other.read()
    (tmp_path / "else.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"has the columns \('a', 'b'\)"):
        Rows(tmp_path / "else.csv").read()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": ""}, r"row 2 \(vtc, seed \): there is no such setting or seed"),
        ({"setting": "magic"}, "no such setting"),
        ({"t2v_R1": ""}, "t2v_R1 is '', and no number"),
        ({"cpu_seconds": "nan"}, "cpu_seconds is 'nan'"),
        ({"order_hits": ""}, "order_hits are not zeros and ones"),
        ({"object_hits": "1.01E+59"}, "object_hits are not"),
        ({"object_hits": "0101"}, "it has 4 object_hits, and row 1 has 60"),
        ({"curve": "[]"}, "no JSON object"),
    ],
)
def test_a_row_that_was_edited_is_named(change, words, tmp_path):
    rows = Rows(tmp_path / "runs.csv")
    rows.add(row("vtc", 0, 0.7))
    rows.add({**row("vtc", 1, 0.8), **change})
    with pytest.raises(ValueError, match=words):
        rows.read()


def test_a_file_that_ends_within_a_line(tmp_path):
    rows = Rows(tmp_path / "runs.csv")
    rows.add(row("vtc", 0, 0.7))
    whole = rows.path.read_bytes()
    rows.path.write_bytes(whole.rstrip())  # as an editor may leave it
    rows.add(row("vtc", 1, 0.8))
    assert rows.read().keys() == {("vtc", 0), ("vtc", 1)}
    rows.path.write_bytes(whole + whole.splitlines(keepends=True)[1][:40])
    with pytest.raises(ValueError, match="row 2 .vtc, seed 0.: it has not the 14 cells"):
        rows.read()
    rows.path.write_bytes(whole + b"vtc,1,300x16,5" + whole.splitlines()[1])
    with pytest.raises(ValueError, match="row 2 .vtc, seed 1.: it has not the 14 cells"):
        rows.read()


def test_runs_that_are_there_need_no_clips_and_others_have_the_folder_alone(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    rows = Rows(tmp_path / "own.csv")
    for setting in TABLES["table6"]:
        rows.add(row(setting, 0, 0.7))
    rows.add(row("both", 1, 0.7))  # of a seed that is not asked for
    command = ["-o", str(tmp_path / "out"), "--csv", str(rows.path), "--seeds", "1", "--only"]
    main([*command, "table6"])
    assert not (tmp_path / "out").exists()
    printed = capsys.readouterr().out
    assert printed.count("###") == 1 and "### Table 6" in printed and f"All tables: {tmp_path / 'own.md'}" in printed
    page = (tmp_path / "own.md").read_text()
    assert "4 of 26 runs" in page and "1 seed;" in page and "(own/table6.svg)" in page
    assert "Times of a step are missing" in page and (tmp_path / "own" / "table6.svg").is_file()
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / "run.lock"), pytest.raises(ValueError, match="Another process makes runs in"):
        main([*command, "order"])
    rows.path.write_text(rows.path.read_text() + "half")
    with pytest.raises(ValueError, match="row 6"):  # before anything is made
        main([*command, "order"])
    with pytest.raises(SystemExit):
        main(["--csv", str(rows.path)])
    assert "only --report does without" in capsys.readouterr().err
    for wrong in (["table6", "--seeds", "0"], ["table5"]):
        with pytest.raises(SystemExit):
            main([*command, *wrong])
    assert "'0' is not a whole number" in (error := capsys.readouterr().err) and "invalid choice: 'table5'" in error


def test_a_difference_that_holds_the_other_way_is_a_no(tmp_path):
    pytest.importorskip("matplotlib")
    shares = {"frame_average": 0.5, "separate": 0.9, "lone_branch": 0.2}
    rows = {(name, seed): row(name, seed, share) for name, share in shares.items() for seed in range(3)}
    text = reporting.report(rows, tmp_path / "times.csv", 3, tmp_path / "page.md")
    assert "order better than *separate-ST, CLIP frozen*? no: -" in text


@pytest.mark.parametrize(
    ("with_copies", "without", "answer"),
    [
        ({"4800": 60, "9600": 91}, {"9600": 50, "19200": 91}, "yes: 9,600"),
        (
            {"4800": 60, "9600": 91},
            {"9600": 50, "14400": 91},
            "no: 9,600; without: 14,400",
        ),
        ({"9600": 91}, {"19200": 50}, "yes: 9,600; without: not reached"),
        (
            {"9600": 60, "14400": 91},
            {"19200": 50},
            "no: 14,400; without: not reached",
        ),
        ({"19200": 60}, {"19200": 50}, "no: not reached"),
    ],
)
def test_half_of_the_clips(with_copies, without, answer):
    curves = {"both_longer": without, "reversed_longer": with_copies}
    rows = {(name, 0): {**row(name, 0, 0.5), "curve": json.dumps(curve)} for name, curve in curves.items()}
    yes, _, clips = answer.partition(": ")
    text = reporting.verdicts(rows, {}, 1)
    assert f"by reversed copies? {yes}: of 19,200 clips, 90 % with them: {clips}" in text


def test_a_folder_of_another_setting_is_named(tmp_path):
    (tmp_path / "setting.json").write_text(json.dumps({"setting": "joint", "seed": 0}))
    with pytest.raises(ValueError, match="folder of another run, {'setting': 'joint', 'seed': 0}"):
        run_one(SETTINGS["vtc"], 0, None, tmp_path)


def test_order_is_asked_of_clips_that_differ_from_their_reverse():
    scores = np.array([[3.0, 1, 2], [1, 2, 3], [5, 5, 5]])
    asked = [{"caption": 0, "opposite": 2}, {"caption": 1, "opposite": 2}, {"caption": 0, "opposite": None}]
    assert order_hits(scores, asked) == [1, 0]


def test_a_missing_seed_is_named_and_the_rest_has_paired_differences(tmp_path):
    pytest.importorskip("matplotlib")
    rows = {("frame_average", seed): row("frame_average", seed, 0.5) for seed in range(3)}
    rows |= {("separate", seed): row("separate", seed, 0.9) for seed in range(3)}
    rows |= {("lone_branch", seed): row("lone_branch", seed, 0.95) for seed in range(2)}
    docs = tmp_path / "docs.md"
    docs.write_text(
        "before\n<!-- tables: written by recipes/ablations/run.py --report -->\nold\n<!-- end of tables -->\n"
    )
    text = reporting.report(rows, tmp_path / "times.csv", 3, docs)
    table = text.partition("### Table 6")[2].partition("###")[0]
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert [line[0].strip("| ") for line in lines[1:]] == [SETTINGS[name].words for name in TABLES["table6"]]
    first, second = (rows[name, seed] for name, seed in (("frame_average", 0), ("separate", 0)))
    single = [
        100 * np.mean([int(bit) for bit in rows["separate", seed]["order_hits"]])
        - 100 * np.mean([int(bit) for bit in rows["frame_average", seed]["order_hits"]])
        for seed in range(3)
    ]
    assert first != second and f"{np.mean(single):+.1f} (" in lines[2][2]
    assert ", ".join(f"{value:+.1f}" for value in single) in lines[2][2] and "**holds**" in lines[2][2]
    alone = [100 * np.mean([int(bit) for bit in rows["lone_branch", seed]["order_hits"]]) for seed in range(2)]
    assert lines[3][1:3] == [f"seed 0: {alone[0]:.1f}, seed 1: {alone[1]:.1f}", ""] and lines[4][1] == "not run"
    assert "Missing, and not averaged over: lone_branch (seed 2); vtc (seed 0, 1, 2)." in table
    assert "better than *frame-averaged CLIP*? yes: +" in text and "step time? not known yet" in text
    assert (tmp_path / "docs" / "table6.svg").is_file() and not (tmp_path / "docs" / "fig3.svg").exists()
    assert docs.read_text().startswith("before\n") and text in docs.read_text() and "stale" not in docs.read_text()


def test_every_setting_starts_from_the_same_clip_and_a_fresh_branch(tmp_path):
    """The shipped model, which the CLIP is taken from, has a branch that reads order already."""
    from recipes.ablations import world

    world.write_start(tmp_path / "start", world.TEXT_TOWER)
    start = SimpleNamespace(start=tmp_path / "start")
    shipped = world.load_start(world.ASSETS).vision_model.bt_adapter.output_gate
    assert shipped.abs().sum() > 1
    backbone = None
    for name, setting in SETTINGS.items():
        tower = build(setting, start, 0).vision_model
        weights = tower.vision_model.state_dict()
        backbone = backbone or weights
        assert weights.keys() == backbone.keys() and all(torch.equal(weights[key], backbone[key]) for key in backbone)
        new = dict(tower.bt_adapter.named_parameters())
        zeros = [x for key, x in new.items() if key.endswith("_gate") or ".temporal.proj." in key]
        assert not any(x.any() for x in zeros), name
        if name in ("reversed", "separate"):  # a seed is of the new weights, too
            again, other = (
                dict(build(setting, start, seed).vision_model.bt_adapter.named_parameters()) for seed in (0, 1)
            )
            assert zeros or name != "reversed"
            assert all(torch.equal(new[key], again[key]) for key in new)
            assert any(not torch.equal(new[key], other[key]) for key in new)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_scores(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    from recipes.ablations import run as running, world

    monkeypatch.setattr(world, "READ_STEPS", 2)
    monkeypatch.setattr(running, "CURVE_STEPS", 2)
    small = world.World(tmp_path / "world", train=80, test=10, text_tower=tmp_path / "text.safetensors")
    setting = replace(SETTINGS["reversed"], steps=4)
    expected = run_one(setting, 0, small, tmp_path / "whole")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(running, "all_scores", stop)
        real = running.BTAdapterTrainer.training_step

        def step(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return real(self, *args, **kwargs)

        patched.setattr(running.BTAdapterTrainer, "training_step", step)
        with pytest.raises(KeyboardInterrupt):
            run_one(setting, 0, small, tmp_path / "stopped")
    again = run_one(setting, 0, small, tmp_path / "stopped")
    differs = {"cpu_seconds"}
    assert {k: v for k, v in again.items() if k not in differs} == {
        k: v for k, v in expected.items() if k not in differs
    }
