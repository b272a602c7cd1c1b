"""The zoo source of FiftyOne; where it is not installed (it brings a database of its own), what it reads first."""

import importlib.util
import json
from pathlib import Path

import pytest


SOURCE = Path(__file__).parents[2] / "examples" / "fiftyone_zoo"


def test_manifest():
    """FiftyOne imports the source under its name, in the place of whatever else is called so."""
    manifest = json.loads((SOURCE / "manifest.json").read_text(encoding="utf-8"))
    assert importlib.util.find_spec(manifest["name"]) is None
    (model,) = manifest["models"]
    assert model["base_name"] == "bt-adapter" and model["base_filename"]  # without one it cannot be "downloaded"


def test_videos_are_sorted_by_a_sentence(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    fiftyone = pytest.importorskip("fiftyone")
    import fiftyone.brain as brain

    from bt_adapter_hf.data.moving_digits import write_clips

    monkeypatch.setattr(fiftyone.config, "model_zoo_dir", str(tmp_path / "zoo"))
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "bt-adapter-zoo").symlink_to(SOURCE.resolve())
    table = write_clips(tmp_path / "clips", "test", 6, 5, formats=("mp4",))
    captions = {row["file_name"]: row["text"] for row in map(json.loads, table.read_text().splitlines())}
    (table.parent / "words.mp4").write_text("these are words")
    names = sorted([*captions, "words.mp4"])
    videos = fiftyone.Dataset()
    videos.add_samples([fiftyone.Sample(filepath=str(table.parent / name)) for name in names])
    try:
        brain.compute_similarity(videos, model="bt-adapter", brain_key="bt")
        for name, text in captions.items():
            (first,) = videos.sort_by_similarity(text, k=1, brain_key="bt").values("filepath")
            assert Path(first).name == name
    finally:
        videos.delete()
        (SOURCE / "bt-adapter.txt").unlink(missing_ok=True)
