"""docs/data.md, as it stands, over every kind of table."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import datasets
import pytest

from tests import tiny_pairs
from tests.data.packed import file_server, rows_of, write_parquet, write_tar


PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
OPEN, LOOP = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def videos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_pairs.write_table(tmp_path / "videos" / "train", rows=4)
    return tmp_path / "videos" / "train"


@pytest.mark.parametrize("kind", ["folder", "tar", "zip", "parquet", "URLs"])
def test_the_loop_outside_a_trainer(videos, tmp_path, kind):
    rows = rows_of(videos)
    source, needs_store = "videos/train", kind in ("parquet", "URLs")
    with file_server(shutil.copytree(videos, tmp_path / "served")) as (address, _, _):
        if kind == "tar":
            source = str(write_tar(tmp_path / "t.tar", rows))
        elif kind == "parquet":
            source = str(write_parquet(tmp_path / "t.parquet", rows, group=2))
        elif kind == "zip":
            with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
                for name, data, _ in rows:
                    archive.writestr(name, data)
            source = str(shutil.copy(videos / "metadata.jsonl", tmp_path / "t.jsonl"))
        elif kind == "URLs":
            source = str(tmp_path / "t.jsonl")
            lines = [json.dumps({"video": f"{address}/{name}", "text": text}) for name, _, text in rows]
            Path(source).write_text("\n".join(lines))
        opened = OPEN.replace('"videos/train"', repr(source))
        if kind == "zip":
            opened = opened.replace(f"load_table({source!r})", f"load_table({source!r}, media_root='v.zip')")
        names = {}
        exec(compile(opened, "docs/data.md", "exec"), names)
        assert names["table"].needs_store == needs_store
        loop = LOOP.replace("/scratch/clips", str(tmp_path / "scratch")).replace("...  #", "seen.append(item)  #")
        names["seen"] = []
        exec(compile(loop, "docs/data.md", "exec"), names)
    assert len(names["seen"]) == 12 and all(item["broken"] == [] for item in names["seen"])
    assert [sorted(item["text"] for item in names["seen"][start : start + 4]) for start in (0, 4, 8)] == [
        sorted(text for _, _, text in rows)
    ] * 3
    assert not (tmp_path / "scratch").exists()
