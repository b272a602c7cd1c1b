"""A table of conversations on the Hub, about videos in an archive on the disk."""

import json
import zipfile

import pytest

from bt_adapter_hf.cli.main import main
from bt_adapter_hf.data.instructions import load_instructions
from tests import tiny_pairs
from tests.hub.server import OTHER_TOKEN
from tests.tiny_instructions import Host


REPO = "tester/VideoInstruct"
TABLE = f"hf://datasets/{REPO}/VideoInstruct.json"
# peft asks transformers by names that the latter deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


def rows(count: int) -> bytes:
    return json.dumps([{"q": "what happens ?", "a": "right", "video_id": f"v_{i}"} for i in range(count)]).encode()


@pytest.fixture
def videos(tmp_path):
    """A zip with a folder of six videos."""
    with zipfile.ZipFile(tmp_path / "videos.zip", "w") as archive:
        for i, colour in enumerate(list(tiny_pairs.COLOURS)[:3] * 2):
            tiny_pairs.write_clip(tmp_path / "clip.mp4", tiny_pairs.COLOURS[colour], 2 if i < 3 else -2)
            archive.write(tmp_path / "clip.mp4", f"Test_Videos/v_{i}.mp4")
    return tmp_path / "videos.zip"


def test_the_table_is_pinned_and_cached(hub, videos, monkeypatch):
    hub.create(REPO, repo_type="dataset")
    hub.put_files(REPO, {"VideoInstruct.json": rows(6)}, repo_type="dataset")
    commit = hub.head(REPO, repo_type="dataset")
    table = load_instructions(TABLE, media_root=videos)
    assert (len(table), table.revision) == (6, commit)
    hub.put_files(REPO, {"VideoInstruct.json": rows(2)}, repo_type="dataset")
    assert len(load_instructions(TABLE, media_root=videos)) == 2
    at = TABLE.replace(REPO, f"{REPO}@{commit}")
    for source, revision in ((at, None), (TABLE, commit)):
        again = load_instructions(source, media_root=videos, revision=revision)
        assert (len(again), again.revision, again.fingerprint) == (6, commit, table.fingerprint)
    assert len(hub.requests(r"VideoInstruct\.json$", method="GET")) <= 4


def test_what_is_not_there(hub, videos):
    hub.create(REPO, repo_type="dataset")
    hub.put_files(REPO, {"VideoInstruct.json": rows(6)}, repo_type="dataset")
    with pytest.raises(ValueError, match="it is on the Hub: name the folder or the archives of its videos"):
        load_instructions(TABLE)
    with pytest.raises(ValueError, match="gone.json"):
        load_instructions(TABLE.replace("VideoInstruct.json", "gone.json"), media_root=videos)
    with pytest.raises(ValueError, match=": datasets/tester/absent does not exist on the Hub"):
        load_instructions(TABLE.replace(REPO, "tester/absent"), media_root=videos)
    with pytest.raises(ValueError, match="no revision 'v9'"):
        load_instructions(TABLE, media_root=videos, revision="v9")
    with pytest.raises(ValueError, match="hf://datasets/owner/name/path"):
        load_instructions("https://host/table.json", media_root=videos)


def test_check_data_says_why_it_may_not_read(hub, videos, monkeypatch, capsys):
    hub.create(REPO, repo_type="dataset", gated=True)
    hub.put_files(REPO, {"VideoInstruct.json": rows(1)}, repo_type="dataset")
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    assert main(["check-data", TABLE, "--media-root", str(videos)]) == 1
    assert "is gated: accept its conditions" in capsys.readouterr().err


def test_checked_and_tuned_from_the_hub_and_a_zip(hub, videos, tmp_path, capsys):
    hub.create(REPO, repo_type="dataset")
    hub.put_files(REPO, {"VideoInstruct.json": rows(7)}, repo_type="dataset")
    llava = Host("llava", tmp_path / "llava")
    data = ["--media-root", videos, "--max-broken", 0.5]
    argv = ["check-data", TABLE, "--model", llava.native, "--workers", 1, "--json", *data]
    assert main(list(map(str, argv))) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["usable"], report["broken"], report["videos"]["count"]) == (7, 6, 1, 6)
    assert report["tokens"]["over_limit"] == 0
    argv = ["finetune", "--model", llava.native, "--bt-adapter", llava.adapter, "--train", TABLE, *data]
    argv += ["--batch-size", 2, "--num-frames", 4, "--max-steps", 4, "--logging-steps", 1, "--set", "use_cpu=true"]
    losses = {}
    for name, options in (("plain", []), ("cached", ["--cache-states", tmp_path / "states", "--cache-dtype", "fp32"])):
        argv_of = [*argv, "--output-dir", tmp_path / name, *options]
        assert main(list(map(str, argv_of))) == 0
        summary = json.loads((tmp_path / name / "run_summary.json").read_text())
        losses[name] = summary["train_loss"]
        assert summary["data"]["train"]["revision"] == hub.head(REPO, repo_type="dataset")
        assert summary["broken_items"] == {"train": 1}
    assert "7 videos to encode" in capsys.readouterr().out
    assert losses["cached"] == pytest.approx(losses["plain"], rel=1e-5)
