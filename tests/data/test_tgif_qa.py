"""The reader of TGIF-QA's four tables."""

import pytest

from bt_adapter_hf.data.tgif_qa import GifQuestion, as_count, chosen_option, is_tgif_qa, load_tgif_qa, read_tgif_qa


CHOICE = "gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\tvid_id\tkey\n"


def write(folder, name, content):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def test_the_four_tables(tmp_path):
    frameqa = "gif_name\tquestion\tanswer\tvid_id\tkey\ntumblr_a\twhat is the color of the car ?\tred\tFRAMEQA1\t1\n"
    count = "gif_name\tquestion\tanswer\ntumblr_b\tHow many times does the man jump ?\t3\n"
    action = CHOICE + "tumblr_c\tWhat does the cat do 4 times ?\tblink\tnod\tjump\tspin\twave\t2\tACTION1\t1\n"
    after = CHOICE + "tumblr_d\tWhat does the cat do after sit ?\tblink\tnod\tjump\tspin\twave\t0\tTRANS1\t1\n"
    tables = {"frameqa": frameqa, "count": count, "action": action, "transition": after}
    found = {
        task: load_tgif_qa(write(tmp_path, f"Test_{task}_question.csv", text))[0] for task, text in tables.items()
    }
    assert found["frameqa"] == GifQuestion("tumblr_a", "what is the color of the car ?", "red", "frameqa")
    assert found["count"] == GifQuestion("tumblr_b", "How many times does the man jump ?", "3", "count")
    options = ("blink", "nod", "jump", "spin", "wave")
    assert found["action"] == GifQuestion("tumblr_c", "What does the cat do 4 times ?", "jump", "action", options)
    assert found["transition"].task == "transition" and found["transition"].answer == "blink"
    assert found["action"].prompt.endswith("(A) blink (B) nod (C) jump (D) spin (E) wave")
    # without the name of the file the content says what it is
    for task, text in tables.items():
        assert next(iter(read_tgif_qa(text, "questions.tsv"))).task == task
        assert is_tgif_qa(text)
    assert not is_tgif_qa("video,text\na.mp4,a dog\n")


def test_rows_that_cannot_be_used_say_why(tmp_path):
    rows = ("a\tq ?\tx\ty\t\tz\tw\t2", "a\tq ?\tx\ty\tz\tv\tw\t7", "\tq ?\tx\ty\tz\tv\tw\t1")
    bad = "".join(f"{row}\t\t\n" for row in rows)
    reasons = list(read_tgif_qa(CHOICE + bad, "Test_action_question.csv"))
    assert "a3" in reasons[0] and "0 to 4" in reasons[1] and "gif_name" in reasons[2]
    count = "gif_name\tquestion\tanswer\na\tHow many times ?\tmany\n"
    with pytest.raises(ValueError, match="row 0 of .*'many'"):
        load_tgif_qa(write(tmp_path, "Test_count_question.csv", count))
    with pytest.raises(ValueError, match="gif_name, question and answer"):
        load_tgif_qa(write(tmp_path, "t.csv", "video\ttext\na\tb\n"))


@pytest.mark.parametrize(
    "text, count", [("3", 3), ("three times", 3), ("2.6", 3), ("it is 14", 10), ("-2", 0), ("often", None)]
)
def test_counts(text, count):
    assert as_count(text) == count


def test_which_option_an_answer_names():
    options = ("wave", "wave hands", "jump", "spin around", "nod")
    said = {"Wave hands.": 1, "wave": 0, "(C) jump": 2, "D": 3, "it can jump": 2, "dance": None, "jump or nod": None}
    assert {text: chosen_option(text, options) for text in said} == said
