"""Named benchmarks read from where they are published, and not from a copy."""

from bt_adapter_hf.evaluation.caption_sets import open_retrieval_set
from bt_adapter_hf.evaluation.qa_sets import open_question_set
from bt_adapter_hf.evaluation.temporal_sets import open_temporal_set
from tests.evaluation import layouts


def test_three_of_them(hub, tmp_path):
    """Annotations in csv, json and parquet; videos in an archive, of which only the wanted members are read."""
    for layout, repo_id in (
        ("vinoground", "HanSolo9682/Vinoground"),
        ("msrvtt", "friedrichor/MSR-VTT"),
        ("tempcompass", "lmms-lab/TempCompass"),
    ):
        getattr(layouts, layout)(tmp_path / layout)
        hub.put_files(repo_id, tmp_path / layout, "dataset")
    board = open_temporal_set("vinoground")
    assert len(board.items) == 2 and board.clips.revision == hub.head("HanSolo9682/Vinoground", repo_type="dataset")
    first = next(iter(board.clips))
    assert first.problem is None and len(first.video) > 100 and first.name == "0_pos.mp4"
    assert next(iter(open_retrieval_set("msrvtt"))).problem is None
    assert len(next(iter(open_temporal_set("tempcompass").clips)).video) > 100


def test_videos_in_a_folder(hub, tmp_path):
    layouts.activitynet_qa(tmp_path)
    hub.put_files("lmms-lab/ActivityNetQA", tmp_path, "dataset")
    board = open_question_set("activitynet-qa", media_root="hf://datasets/lmms-lab/ActivityNetQA/all_test")
    clip = next(iter(board.clips))
    assert clip.problem is None and len(clip.video) > 100 and board.questions[0].kind == "yes or no"
