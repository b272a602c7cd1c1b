"""Miniatures of published benchmarks: the files and fields that each has on the Hub, with tiny clips."""

import csv
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

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


def msvd_qa(root: Path) -> None:
    rows = [
        {"id": 1, "video_id": 2, "question": "what is red ?", "answer": "square"},
        {"id": 2, "video_id": 2, "question": "where is the square ?", "answer": "left"},
        {"id": 3, "video_id": 3, "question": "what happens ?", "answer": "right"},
    ]
    dump(root / "test_qa.json", rows)
    (root / "youtube_mapping.txt").write_text("-4wsuPCjDBc_5_15 vid1\nabc_1_9 vid2\ndef_0_3 vid3\n")
    clip(root / "YouTubeClips" / "abc_1_9.avi.mp4").rename(root / "YouTubeClips" / "abc_1_9.avi")


def msrvtt_qa(root: Path) -> None:
    row = {"category_id": 14, "id": 158581, "video_id": 7010, "question": "what is red ?", "answer": "square"}
    dump(root / "test_qa.json", [row])
    zip_of(root / "TestVideo.zip", "TestVideo/video7010.mp4")


def activitynet_qa(root: Path) -> None:
    row = {"video_name": "1QIUV7WYKXg", "question_id": "v_1QIUV7WYKXg_1", "question": "is it red ?", "answer": "yes"}
    parquet(root / "data" / "test-00000-of-00001.parquet", [{**row, "type": "3"}])
    clip(root / "all_test" / "v_1QIUV7WYKXg.mkv.mp4").rename(root / "all_test" / "v_1QIUV7WYKXg.mkv")


def tgif_qa(root: Path) -> None:
    names = {"tumblr_1": "moves", "tumblr_2": "still"}
    rows = [
        {"gif_name": name, "question": "what is it ?", "answer": "square", "vid_id": "FRAMEQA_1", "type": "0"}
        for name in names
    ]
    table(root / "Test_frameqa_question.csv", rows, "\t")
    table(root / "Test_transition_question.csv", [{"gif_name": "x", "question": "?", "a1": "1", "answer": "0"}], "\t")
    (root / "gifs").mkdir()
    frames = [Image.new("RGB", (32, 32), (40 * n, 9, 9)) for n in range(5)]
    frames[0].save(root / "gifs" / "tumblr_1.gif", save_all=True, append_images=frames[1:], duration=100)
    frames[0].save(root / "gifs" / "tumblr_2.gif")


def videochatgpt(root: Path) -> None:
    none = {"question_1": "None", "question_2": "None", "question": "None"}
    generic = [{**none, "video_name": "v_a", "question": "what happens ?", "answer": "the red square is left"}]
    generic.append({**none, "video_name": "v_b", "question": "where is it ?", "answer": "right"})
    temporal = [{**none, "video_name": "v_a", "question": "what is the square ?", "answer": "left"}]
    both = {"question_1": "where is the square ?", "question_2": "the square is where ?"}
    consistency = [{**none, **both, "video_name": "v_b", "answer": "right"}]
    for part, rows in (("Generic", generic), ("Temporal", temporal), ("Consistency", consistency)):
        parquet(root / part / "test-00000-of-00001.parquet", rows)
    zip_of(root / "videos.zip", "Test_Videos/v_a.mp4", "Test_Videos/v_b.mp4")


def msrvtt(root: Path) -> None:
    rows = [{"video_id": f"video{n}", "video": f"video{n}.mp4", "caption": text} for n, text in ((7, "a"), (8, "b"))]
    dump(root / "msrvtt_test_1k.json", rows)
    zip_of(root / "MSRVTT_Videos.zip", "video/video7.mp4", "video/video8.mp4")


def didemo(root: Path) -> None:
    dump(root / "test.json", {"1_2.mp4": ["a b", "c d"], "3_4.mp4": ["e"]})
    for name in ("1_2", "3_4"):
        clip(root / "videos" / f"{name}.mp4")


def activitynet(root: Path) -> None:
    row = {"duration": 9.0, "timestamps": [[0, 1], [2, 3]]}
    dump(root / "val_1.json", {"v_a": {**row, "sentences": [" a. ", "b."]}, "v_b": {**row, "sentences": ["c."]}})
    clip(root / "videos" / "v_a.mp4")
    clip(root / "videos" / "v_b.mkv.mp4").rename(root / "videos" / "v_b.mkv")


def lsmdc(root: Path) -> None:
    names = [f"1004_Juno_00.00.3{n}.967-00.00.35.458" for n in range(2)]
    lines = [f"{name}\t00.00.32.967\t00.00.35.458\t00.00.32\t00.00.35\tsomeone walks {name[-1]}" for name in names]
    root.mkdir(parents=True, exist_ok=True)
    (root / "LSMDC16_challenge_1000_publictect.csv").write_text("\n".join(lines))
    for name in names:
        clip(root / "videos" / "1004_Juno" / f"{name}.mp4").rename(root / "videos" / "1004_Juno" / f"{name}.avi")


def k400(root: Path) -> None:
    rows = [
        {"label": label, "youtube_id": f"id{label[0]}", "time_start": 7, "time_end": 17, "split": "validate"}
        for label in ("abseiling", "zumba")
    ]
    table(root / "annotations" / "val.csv", rows)
    for label in ("abseiling", "zumba"):
        clip(root / "val" / f"id{label[0]}_000007_000017.mp4")


def hmdb51(root: Path) -> None:
    (root / "splits").mkdir(parents=True)
    for name in ("brush_hair", "cartwheel"):
        (root / "splits" / f"{name}_test_split1.txt").write_text(f"a_{name}.avi 2 \nb_{name}.avi 1 \nc.avi 0 \n")
        clip(root / "videos" / name / f"a_{name}.mp4").rename(root / "videos" / name / f"a_{name}.avi")


def ucf101(root: Path) -> None:
    (root / "ucfTrainTestlist").mkdir(parents=True)
    (root / "ucfTrainTestlist" / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 Archery\n")
    names = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "Archery/v_Archery_g01_c01.avi"]
    (root / "ucfTrainTestlist" / "testlist01.txt").write_text("\n".join(names))
    for name in names:
        clip(root / "UCF-101" / f"{name}.mp4").rename(root / "UCF-101" / name)
