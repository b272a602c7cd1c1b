"""Question answering and the five scores: layouts of the Hub, a tiny chat model, a judge that misbehaves."""

import json

import numpy as np
import pytest
import torch

from bt_adapter_hf import (
    BTAdapterInstructBlipForConditionalGeneration,
    BTAdapterInstructBlipProcessor,
    BTAdapterLlavaForConditionalGeneration,
    BTAdapterLlavaProcessor,
)
from bt_adapter_hf.adapters.host_modules import find_tower
from bt_adapter_hf.data.pairs import load_table
from bt_adapter_hf.evaluation import frames as frames_module
from bt_adapter_hf.evaluation.answering import Answerer, answer_clips, frame_averaged, read_answers
from bt_adapter_hf.evaluation.chat_bench_run import dry_run_cost, evaluate_chat_bench, parts_of
from bt_adapter_hf.evaluation.features import OtherRunError
from bt_adapter_hf.evaluation.judge import EndpointJudge, JudgeRefusedError
from bt_adapter_hf.evaluation.qa_run import CACHE_NAME, evaluate_qa
from bt_adapter_hf.evaluation.qa_sets import (
    READERS,
    moving_digits_questions,
    open_chat_bench,
    open_question_set,
    table_questions,
)
from bt_adapter_hf.evaluation.report import markdown_report
from bt_adapter_hf.hub.result_files import card_section, read_results
from tests.chat import saved_hosts, tiny_gif_qa
from tests.evaluation import layouts
from tests.evaluation.forks import in_processes, killed_after
from tests.evaluation.judge_server import JudgeServer


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    return {name: saved_hosts.save(name, tmp_path_factory.mktemp(name)) for name in ("llava", "instructblip")}


@pytest.fixture(scope="module")
def answerer(hosts) -> Answerer:
    native, adapter = hosts["llava"]
    model = BTAdapterLlavaForConditionalGeneration.from_pretrained(native, bt_adapter=adapter).eval()
    return Answerer(model, BTAdapterLlavaProcessor.from_pretrained(native, num_frames=4), "tiny", max_new_tokens=3)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    layouts.videochatgpt(root)
    return open_chat_bench(root=root)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")


ASKED = {
    "msvd-qa": [
        ("abc_1_9.mp4", "what is red ?"),
        ("abc_1_9.mp4", "where is the square ?"),
        ("def_0_3.mp4", "what happens ?"),
    ],
    "msrvtt-qa": [("video7010.mp4", "what is red ?")],
    "activitynet-qa": [("v_1QIUV7WYKXg.mp4", "is it red ?")],
    "tgif-qa": [("tumblr_1.gif", "what is it ?"), ("tumblr_2.gif", "what is it ?")],
}
MISSING = {
    "msvd-qa": "def_0_3.mp4 does not exist",
    "tgif-qa": "has become a still",
}


@pytest.mark.parametrize("name", READERS)
def test_each_set_is_read_and_run_in_its_layout(name, answerer, tmp_path):
    getattr(layouts, name.replace("-", "_"))(tmp_path / "copy")
    board = open_question_set(name, root=tmp_path / "copy")
    assert [(board.clips.clips[q.row].name, *q.texts) for q in board.questions] == ASKED[name]
    assert len(board.clips) == len({video for video, _ in ASKED[name]})
    result = evaluate_qa(answerer, board, tmp_path / "run", controls=("blind",), item_timeout=None)
    reasons = [item["reason"] for item in result.failed]
    assert len(reasons) == (name in MISSING) and MISSING.get(name, "") in "".join(reasons)
    assert result.items["questions"] == len(board.questions) - len(reasons)
    assert result.scores.keys() == {"exact", "relaxed"}


def test_scores_and_controls_equal_answers_given_by_hand(answerer, tmp_path, monkeypatch):
    """One decoding for all; the reversed frames, no video and averaged frames are what is asked about."""
    layouts.msvd_qa(tmp_path / "copy")
    board = open_question_set("msvd-qa", root=tmp_path / "copy")
    load, decoded = frames_module.load_video, []
    monkeypatch.setattr(frames_module, "load_video", lambda *a, **k: decoded.append(a) or load(*a, **k))
    result = evaluate_qa(answerer, board, tmp_path / "run", draws=2, item_timeout=None)
    assert len(decoded) == 1
    frames, _ = load(tmp_path / "copy/YouTubeClips/abc_1_9.avi", num_frames=4, sampling="centers")
    questions = [question.texts[0] for question in board.questions[:2]]
    found = read_answers(tmp_path / "run").texts
    assert found[0, "full"] == answerer.answer(frames, questions)
    assert found[0, "reversed"] == answerer.answer(frames[::-1].copy(), questions)
    assert found[0, "blind"] == answerer.answer(None, questions) == [answerer.answer(None, [q])[0] for q in questions]
    assert {condition for _, condition in found} == {
        *("full", "blind", "shuffled_0", "shuffled_1", "reversed", "one_frame", "frame_average")
    }
    assert result.against_frame_average["exact"].p_mcnemar is not None and result.items == {
        "questions": 2,
        "videos": 1,
    }
    table = result.table()
    assert "no video" in table and "relaxed" in table and "1 could not be used" in table
    before = (tmp_path / "run" / "result.json", result.to_dict())
    again = evaluate_qa(answerer, board, tmp_path / "run", draws=2, item_timeout=None)
    assert again.to_dict() == before[1] and len(decoded) == 1
    with pytest.raises(OtherRunError, match="shuffle_draws: 2 there, 3 now"):
        evaluate_qa(answerer, board, tmp_path / "run", item_timeout=None)


@pytest.mark.parametrize("name", ["llava", "instructblip"])
@torch.no_grad()
def test_frame_averaged_is_the_mean_of_the_frames_and_leaves_no_trace(name, hosts):
    native, adapter = hosts[name]
    model_class, processor_class = {
        "llava": (BTAdapterLlavaForConditionalGeneration, BTAdapterLlavaProcessor),
        "instructblip": (BTAdapterInstructBlipForConditionalGeneration, BTAdapterInstructBlipProcessor),
    }[name]
    model = model_class.from_pretrained(native, bt_adapter=adapter).eval()
    tower, video = find_tower(model), torch.randn(2, 4, 3, 32, 32)
    plain = tower(video, output_hidden_states=True)
    images = [tower.vision_model(video[:, t], output_hidden_states=True) for t in range(4)]
    with frame_averaged(model):
        found = tower(video, output_hidden_states=True)
        torch.testing.assert_close(tower(video[0]).last_hidden_state, images_of(tower, video[0]))
    for layer in range(len(found.hidden_states)):
        mean = sum(image.hidden_states[layer] for image in images) / 4
        torch.testing.assert_close(found.hidden_states[layer], tower._place_cls(mean))
    torch.testing.assert_close(tower(video).last_hidden_state, plain.last_hidden_state)
    answerer = Answerer(model, processor_class.from_pretrained(native, num_frames=4), name, max_new_tokens=2)
    frames = np.random.default_rng(0).integers(0, 255, (4, 40, 40, 3), dtype=np.uint8)
    with frame_averaged(model):
        assert answerer.answer(frames, ["what happens ?"]) == answerer.answer(frames[::-1].copy(), ["what happens ?"])
    assert len(answerer.answer(None, ["what ?", "where is it ?"])) == 2


def images_of(tower, images):
    return tower.vision_model(images).last_hidden_state


def test_tables_and_moving_digits(answerer, tmp_path):
    rows = [
        {"video": "a.mp4", "question": "what ?", "answer": ["square", "red square"], "kind": "x"},
        {"video": "a.mp4", "question": "where ?", "answer": ["left"], "kind": "y"},
        {"video": "gone.mp4", "question": "where ?", "answer": ["left"], "kind": "y"},
    ]
    layouts.dump(tmp_path / "qa.jsonl", rows)
    layouts.clip(tmp_path / "a.mp4")
    tables = [load_table(tmp_path / "qa.jsonl", text_column=name) for name in ("question", "answer", "kind")]
    board = table_questions(*tables)
    assert [(q.row, q.references) for q in board.questions][:2] == [(0, ("square", "red square")), (0, ("left",))]
    result = evaluate_qa(answerer, board, tmp_path / "run", controls=(), item_timeout=None)
    assert result.items == {"questions": 2, "videos": 1} and result.failed[0]["video"] == "gone.mp4"
    assert result.aspects.keys() == {"x", "y"}
    boards = [moving_digits_questions(tmp_path / "digits", count=2) for _ in range(2)]
    assert boards[0].questions == boards[1].questions and {"motion", "first", "last"} <= {
        q.kind for q in boards[0].questions
    }


def test_a_row_that_cannot_be_asked_counts_as_failed(answerer, tmp_path):
    """Of a table and of a set as published: an empty question or answer, or half of a character."""
    asked = [("what ?", "square"), ("", "left"), ("where ?", "left"), ("who ?", None), (" ", "x"), ("a\ud800 ?", "x")]
    rows = [{"video": "a.mp4", "question": question, "answer": answer} for question, answer in asked]
    layouts.dump(tmp_path / "qa.jsonl", rows)
    layouts.clip(tmp_path / "a.mp4")
    tables = [load_table(tmp_path / "qa.jsonl", text_column=name) for name in ("question", "answer")]
    of_table = evaluate_qa(answerer, table_questions(*tables), tmp_path / "run", controls=(), item_timeout=None)
    layouts.dump(tmp_path / "copy" / "test_qa.json", [{**row, "video_id": 7} for row in rows])
    layouts.clip(tmp_path / "copy" / "videos" / "video7.mp4")
    board = open_question_set("msrvtt-qa", root=tmp_path / "copy")
    of_set = evaluate_qa(answerer, board, tmp_path / "other", controls=(), item_timeout=None)
    for result in (of_table, of_set):
        assert result.items == {"questions": 2, "videos": 1}
        assert [item["index"] for item in result.failed] == [1, 3, 4, 5]
        reasons = [item["reason"] for item in result.failed]
        assert reasons[:3] == ["it has no question.", "it has no answer.", "it has no question."]
        assert "\\ud800" in reasons[3] and "no character" in reasons[3]
    assert [len(texts) for texts in read_answers(tmp_path / "run").texts.values()] == [2]
    cost = dry_run_cost(board, tmp_path / "other", "m", None, ["full"])
    assert cost.prompts == 2
    layouts.dump(tmp_path / "copy" / "test_qa.json", [{**row, "video_id": 7} for row in rows[1:2]])
    empty = open_question_set("msrvtt-qa", root=tmp_path / "copy")
    with pytest.raises(ValueError, match="No question of msrvtt-qa .* it has no question"):
        evaluate_qa(answerer, empty, tmp_path / "third", controls=(), item_timeout=None)
    with pytest.raises(OtherRunError, match="questions_fingerprint"):  # the same videos, asked other things
        layouts.dump(tmp_path / "copy" / "test_qa.json", [{**rows[0], "question": "why ?", "video_id": 7}])
        other = open_question_set("msrvtt-qa", root=tmp_path / "copy")
        evaluate_qa(answerer, other, tmp_path / "other", controls=(), item_timeout=None)


def judge_of(text, times):
    """Misbehaves at first, and in every way; a reply depends on the prompt alone."""
    if times == 1 and len(text) % 3 == 0:
        return (429, b"{}", 0) if len(text) % 2 else (500, b"oops", 0)
    if times == 1 and len(text) % 3 == 1:
        return "I think it is fine."
    return f"Well: {{'score': {len(text) % 5 + 0.5}, 'pred': 'yes'}} I would say"


def test_five_scores_of_a_judge_that_misbehaves(answerer, bench, tmp_path):
    with JudgeServer(judge_of).running() as server:
        judge = EndpointJudge("m", server.url, timeout=5, retries=2)
        cost = dry_run_cost(bench, tmp_path / "run", judge.name, list(ASPECT_COUNTS), ["full", "blind"])
        result = evaluate_chat_bench(answerer, bench, tmp_path / "run", judge, controls=("blind",), item_timeout=None)
        asked = len(server.asked)
        again = evaluate_chat_bench(answerer, bench, tmp_path / "run", judge, controls=("blind",), item_timeout=None)
    assert len(server.asked) == asked and again.to_dict() == result.to_dict() and result.failed == []
    assert cost.prompts == 2 * sum(ASPECT_COUNTS.values()) == 16
    assert cost.describe(1e6, 0).startswith("16 prompts to the judge") and f"about {cost.tokens}.00" in cost.describe(
        1e6
    )
    assert dry_run_cost(bench, tmp_path / "run", judge.name, list(ASPECT_COUNTS), ["full", "blind"]).prompts == 0
    means = {aspect: result.scores[aspect].value for aspect in ASPECT_COUNTS}
    assert result.scores["average"].value == pytest.approx(np.mean(list(means.values())))
    weighed = sum(means[aspect] * count for aspect, count in ASPECT_COUNTS.items()) / sum(ASPECT_COUNTS.values())
    assert result.scores["average_of_answers"].value == pytest.approx(weighed)
    for aspect in ASPECT_COUNTS:
        assert result.scores[f"{aspect}_whole"].value == pytest.approx(means[aspect] - 0.5)
    consistency = [text for text in server.asked if "Question 2" in text]
    assert all("where is the square ?" in text and "the square is where ?" in text for text in consistency)
    replies = [json.loads(line) for line in (tmp_path / "run" / CACHE_NAME).read_text().splitlines()]
    assert all(reply["raw"].startswith("Well:") and reply["judge"] == judge.name for reply in replies)
    assert result.protocol["judge"] == "m at 127.0.0.1" and "correctness" in result.table()


ASPECT_COUNTS = {"correctness": 2, "detail": 2, "context": 2, "temporal": 1, "consistency": 1}


def test_a_judge_that_never_answers_one_or_any(answerer, bench, tmp_path):
    """A score that is missing is reported and in no mean; a judge without a single score is an error."""
    script = lambda text, times: "no." if "Score whether" in text else '{"score": 2}'  # noqa: E731
    with JudgeServer(script).running() as server:
        judge = EndpointJudge("m", server.url, timeout=5, retries=0)
        result = evaluate_chat_bench(answerer, bench, tmp_path / "run", judge, controls=(), item_timeout=None)
    assert result.failed == [] and [item["source"] for item in result.unjudged] == [
        "judge of videochatgpt, temporal, full",
        "judge of videochatgpt, consistency, full",
    ]
    assert [item["index"] for item in result.unjudged] == [2, 3] and result.to_judge == 8
    assert "temporal" not in result.scores and result.scores["average"].value == 2
    gone = EndpointJudge("m", server.url, timeout=1, retries=0)
    with pytest.raises(JudgeRefusedError, match="m at 127.0.0.1 scored none of 8 prompts in a row.*Connection"):
        evaluate_chat_bench(answerer, bench, tmp_path / "other", gone, controls=(), item_timeout=None)
    with pytest.raises(ValueError, match="m at 127.0.0.1 scored no answer. The first reason: .*Connection"):
        evaluate_chat_bench(
            answerer, bench, tmp_path / "few", gone, aspects=["temporal"], controls=(), item_timeout=None
        )
    with pytest.raises(ValueError, match="aspects=beauty: expected a choice of correctness"):
        parts_of(["beauty"])


def test_judged_answers(answerer, tmp_path):
    layouts.msvd_qa(tmp_path / "copy")
    board = open_question_set("msvd-qa", root=tmp_path / "copy")
    script = lambda text, times: (  # noqa: E731
        '{"pred": "yes", "score": 4.8}' if "what is red" in text else '{"pred": "no", "score": 1}'
    )
    with JudgeServer(script).running() as server:
        judge = EndpointJudge("m", server.url, timeout=5, retries=0)
        result = evaluate_qa(
            answerer, board, tmp_path / "run", judge=judge, controls=("frame_average",), item_timeout=None
        )
    values = {name: score.value for name, score in result.scores.items()}
    assert (
        values["judged"] == 50 and values["judge_score"] == pytest.approx(2.9) and values["judge_score_whole"] == 2.5
    )
    assert result.against_frame_average["judged"].difference.value == 0
    assert result.unjudged == [] and result.to_judge == 4


def test_what_the_judge_fails_at_is_no_failure_of_answering(answerer, tmp_path, monkeypatch):
    """A judge named later is asked about the answers that are there; its failures, under the controls too, are told
    apart from what could not be asked, and exact match keeps these answers."""
    layouts.msvd_qa(tmp_path / "copy")
    board = open_question_set("msvd-qa", root=tmp_path / "copy")
    options = {"controls": ("blind",), "item_timeout": None}
    plain = evaluate_qa(answerer, board, tmp_path / "run", **options)
    monkeypatch.setattr(Answerer, "answer", lambda *args: pytest.fail("what is there is not asked again"))
    before = dry_run_cost(board, tmp_path / "run", None, None, ["full", "blind"])
    assert (before.known, before.clips, before.answered) == (0, 1, 1) and before.prompts >= 3
    bad = lambda text, times: "no." if "what is red" in text else '{"pred": "yes", "score": 4}'  # noqa: E731
    with JudgeServer(bad).running() as server:
        judge = EndpointJudge("m", server.url, timeout=5, retries=0)
        result = evaluate_qa(answerer, board, tmp_path / "run", judge=judge, **options)
        after = dry_run_cost(board, tmp_path / "run", judge.name, None, ["full", "blind"])
    assert result.failed == plain.failed and len(plain.failed) == 1 and result.items == plain.items
    assert {name: result.scores[name] for name in plain.scores} == plain.scores and result.scores[
        "judged"
    ].value == 100
    assert [item["source"] for item in result.unjudged] == [f"judge of msvd-qa, {name}" for name in ("full", "blind")]
    assert (
        after.prompts + after.known == before.prompts and after.known > 0 and "more have its reply" in after.describe()
    )
    table = result.table()
    assert "1 could not be used" in table and "2 of 4 answers got no score from the judge" in table
    written = json.loads(result.write(tmp_path / "run").read_text())
    assert written["failed"]["items"] == 1 and {**written["unjudged"], "list": 0, "reasons": 0} == {
        **{"answers": 2, "of": 4},
        **{"list": 0, "reasons": 0},
    }
    named = read_results([tmp_path / "run"])
    assert "2 of 4 answers got no score from the judge" in markdown_report(named)
    assert "2 answers without a score" in card_section(named) and "judge m at 127.0.0.1" in card_section(named)
    written["protocol"]["judge"] = "/home/somebody/judge (local)"
    layouts.dump(tmp_path / "other.json", written)
    assert "judge judge (local)" in card_section(read_results([tmp_path / "other.json"]))


def test_killed_resumed_and_in_two_processes(answerer, bench, tmp_path, caplog):
    def run(name, **options):
        questions = bench.by_row()
        protocol = {"x": 1}
        return answer_clips(
            answerer,
            bench.clips.shards(None),
            questions,
            tmp_path / name,
            protocol,
            draws=1,
            item_timeout=None,
            **options,
        )

    expected = run("a")
    assert in_processes(lambda: run("b", progress=killed_after(1)), 1) == [-9]
    (part,) = (tmp_path / "b" / "answers").iterdir()
    part.write_bytes(part.read_bytes() + b'{"row": 1, "na')  # a line that was being written
    assert len({row for row, _ in read_answers(tmp_path / "b").texts}) == 1
    assert run("b").texts == expected.texts
    first, *_ = sorted((tmp_path / "b" / "answers").iterdir())
    first.write_bytes(b"{broken\n" + b'{"row": "x"}\n' + b"\xff\n")
    assert run("b").texts == expected.texts and "line 2 is damaged" in caplog.text
    assert in_processes(lambda: run("c")) == [0, 0]
    assert len(list((tmp_path / "c" / "answers").iterdir())) == 2 and run("c").texts == expected.texts


def test_what_is_not_as_published(tmp_path):
    with pytest.raises(ValueError, match="no question set 'msvd'"):
        open_question_set("msvd", root=tmp_path)
    with pytest.raises(ValueError, match="msvd-qa has no file test_qa.json"):
        (tmp_path / "videos").mkdir()
        open_question_set("msvd-qa", root=tmp_path)
    layouts.activitynet_qa(tmp_path / "copy")
    rows = [{"video_name": "1QIUV7WYKXg", "question": "what ?", "answer": "yes", "type": kind} for kind in ("3", "x")]
    layouts.parquet(tmp_path / "copy" / "data" / "test-00000-of-00001.parquet", rows)
    with pytest.raises(ValueError, match=r"Row 1 of data/test-.*parquet has 'x' in 'type' where a number is expected"):
        open_question_set("activitynet-qa", root=tmp_path / "copy")
    layouts.msvd_qa(tmp_path)
    (tmp_path / "youtube_mapping.txt").write_text("abc vid9\n")
    with pytest.raises(ValueError, match=r"asks about the video 2, which youtube_mapping.txt does not list"):
        open_question_set("msvd-qa", root=tmp_path)


def test_a_model_that_takes_no_question_without_a_gif(tmp_path):
    """ "No video" is a grey one then, and a model without a branch has no averaged frames."""
    model = tiny_gif_qa.model()
    answerer = Answerer(model, tiny_gif_qa.processor(model.config), "gifs", max_new_tokens=3)
    layouts.tgif_qa(tmp_path / "copy")
    board = open_question_set("tgif-qa", root=tmp_path / "copy")
    controls = ("blind", "shuffled", "reversed", "one_frame")
    result = evaluate_qa(answerer, board, tmp_path / "run", draws=1, controls=controls, item_timeout=None)
    assert result.items["questions"] == 1 and result.controls.keys() == set(controls)
    assert "has become a still" in result.failed[0]["reason"]
    pixels = answerer.processor.video_processor(
        [np.full((4, 40, 40, 3), np.round(255 * np.array(answerer.processor.video_processor.image_mean)), np.uint8)],
        return_tensors="pt",
    )["pixel_values_videos"]
    assert pixels.abs().max() < 0.02
    with pytest.raises(ValueError, match=r"gifs has no branch: leave it out \(controls=blind\)"):
        evaluate_qa(answerer, board, tmp_path / "b", controls=("blind", "frame_average"), item_timeout=None)
    assert not (tmp_path / "b").exists()


def test_gifs_may_lie_beside_the_tables(tmp_path):
    from bt_adapter_hf.data.moving_digits_gif_qa import write_gif_questions
    from bt_adapter_hf.evaluation.qa_sets import open_question_set

    write_gif_questions(tmp_path, "test", 4, 1)
    questions = open_question_set("tgif-qa", root=tmp_path)
    assert len(questions.clips) > 0
    assert all(clip.problem is None for clip in questions.clips)
