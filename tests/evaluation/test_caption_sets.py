"""Named sets of retrieval and recognition in the layouts in which they are given out, run through the command."""

import json

import pytest

from bt_adapter_hf.cli.main import main
from bt_adapter_hf.evaluation.caption_sets import open_recognition_set, open_retrieval_set
from tests.evaluation import layouts


JUNO = "1004_Juno_00.00.3{}.967-00.00.35.458.mp4"
CAPTIONS = {
    "msrvtt": {"video7.mp4": ("a",), "video8.mp4": ("b",)},
    "didemo": {"1_2.mp4": ("a b", "c d"), "3_4.mp4": ("e",)},
    "activitynet": {"v_a.mp4": ("a.", "b."), "v_b.mp4": ("c.",)},
    "lsmdc": {JUNO.format(0): ("someone walks 8",), JUNO.format(1): ("someone walks 8",)},
    "rtime-hard": {"33.mp4": ("a door opens",), "33.mp4 backwards": ("a door closes",)},
}
LABELS = {
    "k400": {"abseiling/ida_000007_000017.mp4": "abseiling", "zumba/idz_000007_000017.mp4": "zumba"},
    "hmdb51": {"brush_hair/a_brush_hair.avi": "brush hair", "cartwheel/a_cartwheel.avi": "cartwheel"},
    "ucf101": {
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi": "apply eye makeup",
        "Archery/v_Archery_g01_c01.avi": "archery",
    },
}


def run(task, name, tiny_checkpoint, tmp_path, *options):
    command = ["eval", task, "--data", name, "--data-root", str(tmp_path / "copy"), "-o", str(tmp_path / "out")]
    assert main([*command, "--model", str(tiny_checkpoint), "--controls", "blind", *options]) == 0
    return json.loads((tmp_path / "out" / "result.json").read_text())


@pytest.mark.parametrize("name", CAPTIONS)
def test_retrieval(name, tmp_path):
    getattr(layouts, name.removesuffix("-hard"))(tmp_path)
    clips = open_retrieval_set(name, tmp_path)
    assert {clip.name: clip.texts for clip in clips.clips} == CAPTIONS[name]
    assert [clip.problem for clip in clips] == [None, None]


def test_the_protocol_of_a_named_set(tiny_checkpoint, tmp_path):
    layouts.didemo(tmp_path / "copy")
    result = run("retrieval", "didemo", tiny_checkpoint, tmp_path)
    assert result["protocol"]["paragraph"] and result["items"]["texts"] == 2 == result["items"]["videos"]
    assert result["controls"]["blind"]["t2v_MnR"]["value"] == 1.5  # what is seen without a video is a tie


@pytest.mark.parametrize("name", LABELS)
def test_recognition(name, tiny_checkpoint, tmp_path):
    getattr(layouts, name)(tmp_path / "copy")
    clips, classes = open_recognition_set(name, tmp_path / "copy")
    assert {clip.name: clip.texts[0] for clip in clips.clips} == LABELS[name]
    assert classes == list(LABELS[name].values()) and [clip.problem for clip in clips] == [None, None]
    if name == "ucf101":
        assert run("recognition", name, tiny_checkpoint, tmp_path)["items"] == {"videos": 2, "classes": 2}


def test_numbers_with_a_file_of_names(tmp_path):
    (tmp_path / "kinetics_val_list.txt").write_text("a b.mp4 1\nc.mp4 0\n")
    (tmp_path / "classes.txt").write_text("zero\none\n")
    clips, classes = open_recognition_set("k400", tmp_path)
    assert [(clip.paths, clip.texts) for clip in clips.clips] == [(("a b.mp4",), ("one",)), (("c.mp4",), ("zero",))]
    (tmp_path / "classes.txt").write_text("zero\n")
    with pytest.raises(ValueError, match="has the label '1'; there are 1 names"):
        open_recognition_set("k400", tmp_path)


def test_what_is_no_number_is_named_with_its_file_row_and_column(tmp_path):
    layouts.k400(tmp_path)
    file = tmp_path / "annotations" / "val.csv"
    file.write_text(file.read_text().replace("zumba,idz,7", "zumba,idz,soon"))
    with pytest.raises(ValueError, match=r"Row 1 of annotations/val.csv has 'soon' in 'time_start' where a number"):
        open_recognition_set("k400", tmp_path)
    layouts.lsmdc(tmp_path / "films")
    (tmp_path / "films" / "LSMDC16_challenge_1000_publictect.csv").write_text("a clip, someone walks\n")
    with pytest.raises(
        ValueError, match=r"publictect.csv holds 'a clip, someone walks' where a clip and its sentence"
    ):
        open_retrieval_set("lsmdc", tmp_path / "films")


def test_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no retrieval benchmark 'msvd'"):
        open_retrieval_set("msvd", tmp_path)
    with pytest.raises(ValueError, match="ucf101 is not on the Hub: name the folder of your copy with data_root"):
        open_recognition_set("ucf101")
    with pytest.raises(ValueError, match="no recognition benchmark 'ssv1'"):
        open_recognition_set("ssv1", tmp_path)
    with pytest.raises(ValueError, match="The videos of msrvtt are not in"):
        open_retrieval_set("msrvtt", tmp_path)
