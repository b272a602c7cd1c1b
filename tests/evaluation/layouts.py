"""Miniatures of published benchmarks: the files and fields that each has on the Hub, with tiny clips."""

import csv
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests import tiny_pairs


def clip(path: Path, step: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny_pairs.write_clip(path, (200, 60, 30 + step), step=step)
    return path


def zip_of(path: Path, *names: str) -> None:
    """A zip of clips under these names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for step, name in enumerate(names, 1):
            file = path.parent / f"for-zip{Path(name).suffix}"
            tiny_pairs.write_clip(file.with_suffix(".mp4"), (200, 60, 30 + step), step=step)
            archive.write(file.with_suffix(".mp4"), name)
            file.with_suffix(".mp4").unlink()


def parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def table(path: Path, rows: list[dict], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def dump(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content), encoding="utf-8")


def vinoground(root: Path) -> None:
    captions = [("a cat sits, then runs", "a cat runs, then sits"), ("water before ice", "ice before water")]
    rows = [
        {"index": n, "major": major, "minor": "", "pos_cap": right, "neg_cap": wrong}
        for n, (major, (right, wrong)) in enumerate(zip(("object", "action"), captions, strict=True))
    ]
    table(root / "vinoground.csv", rows)
    names = [f"vinoground_videos/{n}_{side}.mp4" for n in range(2) for side in ("pos", "neg")]
    zip_of(root / "vinoground_videos.zip", *names)


def rtime(root: Path) -> None:
    entry = {"temporal": True, "forward_captions": ["a door opens"], "forward_rewrites": [], "reverse_rewrites": []}
    dump(
        root / "test.json",
        {
            "33": {**entry, "reverse": True, "reverse_captions": ["a door closes"]},
            "44": {**entry, "reverse": False, "reverse_captions": []},
        },
    )
    clip(root / "videos" / "33.mp4", 3)


def vitatecs(root: Path) -> None:
    row = {"caption": "a man stands up", "counterfactual": "a man sits down"}
    dump(root / "Direction.jsonl", [{"src_dataset": "MSRVTT", "video_name": "video7", "aspect": "Direction", **row}])
    dump(root / "Type.jsonl", [{"src_dataset": "VATEX", "video_name": "ab_000_010.mp4", "aspect": "Type", **row}])
    clip(root / "videos" / "MSRVTT" / "video7.mp4")
    clip(root / "videos" / "VATEX" / "ab_000_010.mp4")


def tempcompass(root: Path) -> None:
    question = "In which direction does it go?\nA. up\nB. down\nC. left"
    row = {"video_id": "1021488277", "question": question, "answer": "B. down", "dim": "direction"}
    parquet(root / "multi-choice" / "test-00000-of-00001.parquet", [row])
    zip_of(root / "tempcompass_videos.zip", "videos/1021488277.mp4")


def tvbench(root: Path) -> None:
    row = {"question": "How often?", "candidates": ["2", "3", "1"], "answer": "3", "video": "v.webm"}
    dump(root / "json" / "action_count.json", [row])
    zip_of(root / "video" / "action_count.zip", "action_count/v.webm")
    parts = [{**row, "video": "w.mp4", "start": 0.2, "end": 0.4}, {**row, "video": "w.mp4", "start": 7.0, "end": 9.0}]
    dump(root / "json" / "action_sequence.json", parts)
    clip(root / "video" / "action_sequence" / "w.mp4")


def ssv2(root: Path) -> None:
    rows = [
        {
            "id": "7",
            "label": "pushing a pen from left to right",
            "template": "Pushing [something] from left to right",
            "placeholders": ["a pen"],
        },
        {
            "id": "8",
            "label": "putting a pen into a box",
            "template": "Putting [something] into [something]",
            "placeholders": ["a pen", "a box"],
        },
        {"id": "9", "label": "holding a pen", "template": "Holding [something]", "placeholders": ["a pen"]},
    ]
    dump(root / "something-something-v2-validation.json", rows)
    for name in "78":
        clip(root / "20bn-something-something-v2" / f"{name}.mp4").rename(
            root / "20bn-something-something-v2" / f"{name}.webm"
        )
