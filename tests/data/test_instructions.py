"""Tables of conversations, and labels token by token for the three hosts."""

import copy
import json
import re
import socket
import struct
import tarfile
import time
import zipfile
from base64 import b64encode
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bt_adapter_hf import BTAdapterLlavaProcessor
from bt_adapter_hf.assets import default_chat_model_path
from bt_adapter_hf.data.broken import BrokenItemsError
from bt_adapter_hf.data.checking import InstructionCheck, check_rows
from bt_adapter_hf.data.instructions import (
    InstructionCollator,
    InstructionDataset,
    UnusableRow,
    load_instructions,
    longest_conversation,
    visuals_of,
)
from bt_adapter_hf.data.pairs import decoding_options
from bt_adapter_hf.models import video_io
from bt_adapter_hf.models.processing_bt_adapter_qformer import (
    BTAdapterInstructBlipProcessor,
    BTAdapterMiniGPT4Processor,
)
from tests import clip_tools
from tests.chat import tiny_hosts
from tests.chat.tiny_hosts import PATCHES, QUERIES
from tests.data.packed import file_server


IMAGE, VIDEO, EOS, STOP = 18, 19, 2, 20


def llava_processor():
    return BTAdapterLlavaProcessor(
        tiny_hosts.image_processor(), tiny_hosts.video_processor(), tiny_hosts.tokenizer(), patch_size=8
    )


def instructblip_processor():
    return BTAdapterInstructBlipProcessor(
        tiny_hosts.blip_image_processor(),
        tiny_hosts.video_processor(),
        tiny_hosts.tokenizer(),
        tiny_hosts.tokenizer(extra=()),
        num_query_tokens=QUERIES,
    )


def minigpt4_processor():
    processor = BTAdapterMiniGPT4Processor(
        tiny_hosts.blip_image_processor(), tiny_hosts.video_processor(), tiny_hosts.tokenizer(), QUERIES
    )
    assert processor.tokenizer.add_tokens(["###"]) == 1
    return processor


PROCESSORS = {"llava": llava_processor, "instructblip": instructblip_processor, "minigpt4": minigpt4_processor}


@pytest.fixture(params=list(PROCESSORS))
def host(request):
    return request.param, PROCESSORS[request.param]()


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    for name in ("a.mp4", "b.mp4"):
        clip_tools.write_clip(folder / name, count=8)
    Image.fromarray(np.full((40, 48, 3), 90, np.uint8)).save(folder / "a.png")
    (folder / "broken.mp4").write_bytes(b"this is no video" * 20)
    return folder


def write(media, *rows, name="train.jsonl"):
    path = media / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def dataset(media, processor, *rows, max_length=192, **options):
    return InstructionDataset(load_instructions(write(media, *rows)), processor, max_length=max_length, **options)


def video(name="a.mp4"):
    return {"type": "video", "path": name}


def text(words):
    return {"type": "text", "text": words}


def chat(*turns, system=None):
    """("what ?", "red .", ...) with parts in place of a question where there is more than words."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ["user", "assistant"] * (len(turns) // 2)
    return {"messages": messages + [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]}


TWO_TURNS = chat([video(), text("what happens ?")], "red square .", "where ?", "left", system="the right .")


def expected(name, processor):
    """The ids of `TWO_TURNS` and which of them are answers, written out piece by piece."""
    seen, queries = [VIDEO] * PATCHES, [VIDEO] * QUERIES
    if name == "llava":
        pieces = [[1], "the right . USER : ", seen, "what happens ? ASSISTANT : ", ("red square .", EOS)]
        pieces += ["USER : where ? ASSISTANT : ", ("left", EOS)]
    elif name == "instructblip":
        pieces = [queries, [1], "the right . what happens ?", ("red square .", EOS), "where ?", ("left", EOS)]
    else:
        pieces = [[1], "the right .", [STOP], "Human : < Img >", queries, "< / Img > what happens ?", [STOP]]
        pieces += ["Assistant :", ("red square .", STOP), "Human : where ?", [STOP], "Assistant :", ("left", STOP)]
    ids, is_answer = [], []
    for piece in pieces:
        words, end = piece if isinstance(piece, tuple) else (piece, None)
        found = words if isinstance(words, list) else processor.tokenizer.encode(words, add_special_tokens=False)
        found = found + ([] if end is None else [end])
        ids += found
        is_answer += [end is not None] * len(found)
    return ids, [i if answer else -100 for i, answer in zip(ids, is_answer, strict=True)]


def test_labels_token_by_token(host, media):
    name, processor = host
    item = dataset(media, processor, TWO_TURNS)[0]
    ids, labels = expected(name, processor)
    assert item["input_ids"].tolist() == ids
    assert item["labels"].tolist() == labels
    assert sum(label != -100 for label in labels) == 3 + 1 + 1 + 1
    assert item["pixel_values_videos"].shape == (1, 4, 3, 32, 32) and item["broken"] == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_on_either_side(host, media, side):
    name, processor = host
    rows = [TWO_TURNS, chat([{"type": "image", "path": "a.png"}, text("where ?")], "left ."), chat("what ?", "red")]
    data = dataset(media, processor, *rows)
    items = [data[i] for i in range(3)]
    batch = InstructionCollator(processor, padding_side=side)(items)
    S = batch["input_ids"].shape[1]
    for row, item in enumerate(items):
        n = len(item["input_ids"])
        real = slice(0, n) if side == "right" else slice(S - n, S)
        assert torch.equal(batch["input_ids"][row, real], item["input_ids"])
        assert torch.equal(batch["labels"][row, real], item["labels"])
        assert batch["attention_mask"][row].sum() == n and batch["attention_mask"][row, real].all()
        assert (batch["labels"][row] != -100).sum() == (item["labels"] != -100).sum()
    assert batch["pixel_values_videos"].shape == (1, 4, 3, 32, 32) and batch["pixel_values"].shape == (1, 3, 32, 32)
    assert ("qformer_input_ids" in batch) == (name == "instructblip")


def test_padding_leaves_the_processors_own_ids(host, media):
    """The collator's batch, padded on the left, is what the processor makes of the same conversations."""
    _, processor = host
    rows = [TWO_TURNS, chat([video("b.mp4"), text("where is the square ?")], "left .")]
    data = dataset(media, processor, *rows)
    batch = InstructionCollator(processor, padding_side="left")([data[0], data[1]])
    own = processor.apply_chat_template(
        [data.table.messages(0), data.table.messages(1)], tokenize=True, return_dict=True, return_tensors="pt"
    )
    for key in ("input_ids", "attention_mask", "pixel_values_videos"):
        assert torch.equal(batch[key], own[key]), key


def test_the_q_former_reads_no_answer(media):
    processor = instructblip_processor()
    item = dataset(media, processor, TWO_TURNS)[0]
    assert processor.qformer_tokenizer.decode(item["qformer_input_ids"]) == "<s> the right . what happens ?"
    batch = [chat("what ?", "red"), chat("where is the red square ?", "left")]
    batch = [row["messages"] for row in batch]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    learning = processor.apply_chat_template(batch, **options, return_assistant_tokens_mask=True)
    words = processor.qformer_tokenizer.batch_decode(learning["qformer_input_ids"], skip_special_tokens=True)
    assert words == ["what ?", "where is the red square ?"]
    assert learning["qformer_attention_mask"].sum(dim=1).tolist() == [3, 7]
    answering = processor.apply_chat_template(batch, **options)
    assert "left" in processor.qformer_tokenizer.decode(answering["qformer_input_ids"][1])


def test_labels_with_a_subword_tokenizer(media):
    """Blanks belong to the words behind them, and what is learned is the answer and its end."""
    processor = BTAdapterLlavaProcessor.from_pretrained(default_chat_model_path())
    row = chat([video(), text("How does it move?")], "it grows from small to big", "What colour is it?", "red")
    item = dataset(media, processor, row, max_length=1024)[0]
    answers = processor.decode(item["input_ids"][item["labels"] != -100])
    assert answers == " it grows from small to big</s> red</s>"


def test_videos_stand_before_or_behind_the_question(media):
    processor = llava_processor()
    before, behind = [video(), text("what ?")], [text("what ?"), video()]
    prompts = [processor.apply_chat_template(chat(parts, "red")["messages"]) for parts in (before, behind)]
    assert prompts == ["USER: <video>\nwhat ? ASSISTANT: red</s>", "USER: what ?\n<video> ASSISTANT: red</s>"]
    mixed = [text("what ?"), {"type": "image", "path": "a.png"}, video()]
    # an image stands in front, as in LLaVA
    assert processor.apply_chat_template(chat(mixed, "red")["messages"]).startswith("USER: <image>\nwhat ?\n<video> ")
    ids = [dataset(media, processor, chat(parts, "red"))[0]["input_ids"].tolist() for parts in (before, behind)]
    assert sorted(ids[0]) == sorted(ids[1]) and ids[0].index(VIDEO) < ids[1].index(VIDEO)


# ------------------------------------------------------------------------------------------------------------- tables


def test_video_chatgpt(media):
    rows = [{"q": "what happens ?", "a": "red", "video_id": name} for name in ("a", "b", "gone")]
    path = media / "VideoInstruct.json"
    path.write_text(json.dumps(rows))
    table = load_instructions(path)
    assert len(table) == 3 and table.shard_rows == [3]
    kinds = [[part["type"] for part in table.messages(row)[0]["content"]] for row in range(3)]
    assert kinds == [["text", "video"], ["video", "text"], ["text", "video"]]
    assert list(table.videos()) == [str(media / name) for name in ("a.mp4", "b.mp4", "gone.mp4")]
    data = InstructionDataset(table, llava_processor(), max_length=192)
    (record,) = data[2]["broken"]
    assert record["index"] == 2 and record["video"].endswith("gone.mp4") and "gone.mp4" in record["reason"]
    (media / "webm").mkdir(exist_ok=True)
    (media / "webm" / "a.webm").write_bytes((media / "a.mp4").read_bytes())
    elsewhere = load_instructions(path, media_root=media / "webm")
    assert visuals_of(elsewhere.messages(0), "video") == [str(media / "webm" / "a.webm")]


def pack(path, media, folder, *names):
    """An archive of some of the files, in a folder of its own."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.write(media / name, f"{folder}/{name}")
    else:
        with tarfile.open(path, "w") as archive:
            for name in names:
                archive.add(media / name, f"{folder}/{name}")
    return path


def test_videos_and_images_in_archives(media, tmp_path):
    """The same items as from files; a name without ending finds any of the usual ones."""
    (tmp_path / "c.webm").write_bytes((media / "b.mp4").read_bytes())
    pack(tmp_path / "one.zip", media, "Test_Videos", "a.mp4", "a.png", "broken.mp4")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.write(tmp_path / "c.webm", "more/c.webm")
    rows = [{"q": "what happens ?", "a": "red", "video_id": name} for name in ("a", "c", "gone", "broken")]
    rows.append(chat([{"type": "image", "path": "a.png"}, video(), text("where ?")], "left ."))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    processor = llava_processor()
    data = InstructionDataset(load_instructions(path, media_root=tmp_path / "*.zip"), processor, max_length=192)
    (media / "c.webm").write_bytes((tmp_path / "c.webm").read_bytes())
    files = InstructionDataset(load_instructions(path, media_root=media), processor, max_length=192)
    for row in (0, 1, 4):
        packed, loose = data[row], files[row]
        assert packed["broken"] == []
        for key in ("input_ids", "labels", "pixel_values_videos", *(["pixel_values"] if row == 4 else [])):
            assert torch.equal(packed[key], loose[key]), key
    (gone,), (broken,) = data[2]["broken"][:1], data[3]["broken"][:1]
    assert gone["video"] == "gone" and "gone is not in" in gone["reason"] and "two.zip" in gone["reason"]
    assert broken["video"] == "broken" and "not a readable video" in broken["reason"]
    tar = pack(tmp_path / "videos.tar", media, "clips", "a.mp4")
    table = load_instructions(path, media_root=tar)
    assert table.read("a") == table.read("a.mp4") == (media / "a.mp4").read_bytes()


@pytest.mark.parametrize(
    "root, message",
    [
        ("nowhere", "nowhere is neither a folder nor a .zip or .tar file"),
        ("gone.zip", "no such file"),
        ("*.zip", "no file matches"),
        ("text.zip", "not a readable zip"),
        ("hf://datasets/org/name/videos.zip", "read from the disk, again and again: download hf://datasets/org"),
    ],
)
def test_media_that_are_not_there(tmp_path, root, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(chat("what ?", "red")))
    if root == "text.zip":
        (tmp_path / root).write_text("no archive")
    with pytest.raises(ValueError, match=f"Cannot read the table .*{message}"):
        load_instructions(tmp_path / "rows.jsonl", media_root=root if "://" in root else tmp_path / root)


def test_fingerprint_tells_tables_apart(media):
    one = load_instructions(write(media, TWO_TURNS, name="one.jsonl"))
    same = load_instructions(write(media, TWO_TURNS, name="same.jsonl"))
    other = load_instructions(write(media, chat("what ?", "red"), name="other.jsonl"))
    assert one.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "", "is a .jsonl or a .json file"),
        ("gone.json", None, "No such file"),
        ("latin.jsonl", b'{"q": "caf\xe9"}', "it is not UTF-8 .byte 0xe9 at 10.: save it as UTF-8"),
        ("wide.jsonl", "{}".encode("utf-16"), "it is encoded in UTF-16: save it as UTF-8"),
        ("cut.json", "[{", "Cannot read the table"),
        ("map.json", "{}", "holds a dict, and no list"),
        ("empty.jsonl", "\n\n", "has no rows"),
        ("empty.json", "[]", "has no rows"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_instructions(tmp_path / name)


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_byte_order_mark_costs_no_row(media, kind):
    rows = [chat("what ?", "red"), chat("what happens ?", "left")]
    path = media / f"marked.{kind}"
    text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
    path.write_text(text, encoding="utf-8-sig")
    table = load_instructions(path)
    assert [table.messages(row)[1]["content"][0]["text"] for row in range(len(table))] == ["red", "left"]


@pytest.mark.parametrize(
    "row, message",
    [
        ("{not json", "it is no JSON"),
        ("[1]", "no object with fields"),
        ({"question": "a"}, "has the fields question; expected messages"),
        ({"messages": "hello"}, "no list of objects"),
        ({"messages": []}, "its roles are none"),
        ({"messages": [{"role": "user", "content": "what ?"}]}, "its roles are user; expected user and assistant"),
        (chat("what ?", ""), "assistant has no text"),
        (chat([video()], "red"), "user has no text"),
        (chat("what ?", [video()]), "message of the assistant has the part"),
        (chat([{"type": "audio"}, text("what ?")], "red"), "has the part"),
        (chat([{"type": "video"}, text("what ?")], "red"), "needs a path or a url"),
        (chat(7, "red"), "content of a message is 7"),
        ({"q": "what ?", "a": None, "video_id": "a"}, "its a is None; expected text"),
        (chat([{"type": "image", "path": "a.png", "url": "b.png"}, text("?")], "red"), "needs a path or a url"),
        (chat("what \ud800 ?", "red"), r"user holds \\ud800, which is no character"),
        ({"q": "what ?", "a": "\udc00", "video_id": "a"}, r"assistant holds \\udc00, which is no character"),
    ],
)
def test_rows_that_are_no_conversation(media, row, message):
    table = load_instructions(write(media, row, TWO_TURNS))
    with pytest.raises(UnusableRow, match=message):
        table.messages(0)
    data = InstructionDataset(table, llava_processor(), max_length=192)
    item = data[0]
    assert re.search(message, item["broken"][0]["reason"]) and item["broken"][0]["index"] == 0
    assert torch.equal(item["input_ids"], data[1]["input_ids"])


def test_forms_of_parts(media):
    """As the card of other models, OpenAI's API and `datasets`, which fills keys with None, write them."""
    parts = [
        {"type": "video", "video": "a.mp4", "path": None, "text": None},
        {"type": "video_url", "video_url": {"url": "a.mp4"}},
        {"type": "video", "url": f"file://{media}/a.mp4"},
        {"type": "video", "path": "a.mp4"},
    ]
    table = load_instructions(
        write(media, *(chat([part, text("what ?")], "red") for part in parts), name="forms.jsonl")
    )
    assert [visuals_of(table.messages(row), "video") for row in range(4)] == [[str(media / "a.mp4")]] * 4


def test_what_the_rows_of_others_may_name(media, tmp_path):
    """Of a table from the Hub: what lies below the media root."""
    (tmp_path / "secret.mp4").write_bytes((media / "a.mp4").read_bytes())
    names = [
        "../secret.mp4",
        str(tmp_path / "secret.mp4"),
        "hf://datasets/org/name/a.mp4",
        f"file://{tmp_path}/secret.mp4",
    ]
    fine = ["a.mp4", str(media / "a.mp4"), "https://host/a.mp4"]
    rows = [chat([video(name), text("what ?")], "red") for name in [*fine, *names]]
    rows += [{"q": "what ?", "a": "red", "video_id": name} for name in ("../secret", "a")]
    own = load_instructions(write(media, *rows, name="others.jsonl"))
    table = replace(own, revision="0" * 40)
    assert [visuals_of(table.messages(row), "video") for row in range(3)] == [
        [str(media / "a.mp4")], [str(media / "a.mp4")], ["https://host/a.mp4"]
    ]  # fmt: skip
    for row in (3, 4, 5, 6, 7):
        with pytest.raises(UnusableRow, match="lies outside of|neither a path nor"):
            table.messages(row)
    assert visuals_of(table.messages(8), "video") == [str(media / "a.mp4")]
    assert visuals_of(own.messages(4), "video") == [str(tmp_path / "secret.mp4")]  # one's own table may
    with pytest.raises(UnusableRow, match="is on the Hub; what conversations show is read from the disk"):
        own.messages(5)


# -------------------------------------------------------------------------------------------------------- broken items


def test_a_word_that_spells_a_placeholder_is_learned_as_a_word(host, media):
    _, processor = host
    item = dataset(media, processor, chat("what is <video> ?", "the <image> ."))[0]
    assert item["broken"] == [] and "pixel_values_videos" not in item
    assert not {processor.image_token_id, processor.video_token_id} & set(item["input_ids"].tolist())
    assert (item["input_ids"] == processor.tokenizer.unk_token_id).sum() >= 6  # both words, in three pieces each
    answer = item["labels"][item["labels"] != -100].tolist()
    assert processor.tokenizer.convert_ids_to_tokens(answer)[:5] == ["the", "<unk>", "<unk>", "<unk>", "."]


def image_row(path):
    return chat([{"type": "image", "path": path}, text("what ?")], "red")


def test_images_are_limited_and_counted_like_videos(media, tmp_path, monkeypatch):
    """A server that sends byte by byte, an address without a server, a bomb, something else: each is a broken item."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (60, 60)).save(tmp_path / "bomb.png")
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "fine.png")
    content = (tmp_path / "fine.png").read_bytes()
    with file_server(tmp_path) as (address, _, _):
        drip, fine = f"{address}/drip/fine.png", f"{address}/fine.png"
        bad = {
            drip: "took longer than 2 s",
            f"{address}/gone.png": "HTTP 404",
            str(tmp_path / "bomb.png"): "DecompressionBomb",
            str(tmp_path / "text.png"): "cannot be read",
            str(tmp_path): "is not a file",
        }
        rows = [image_row(path) for path in [*bad, fine, "data:image/png;base64," + b64encode(content).decode()]]
        data = dataset(media, llava_processor(), *rows, item_timeout=2.0)
        for row, (path, reason) in enumerate(bad.items()):
            broken = data[row]["broken"][0]
            assert broken["index"] == row and broken["video"] == path and reason in broken["reason"], broken
        assert data[5]["broken"] == data[6]["broken"] == []
        assert torch.equal(data[5]["pixel_values"], data[6]["pixel_values"])
        check = InstructionCheck(data.table)
        found = {checked.row: checked for checked in check_rows(check, timeout=2.0)}
    assert [row for row in found if found[row].reason is None] == [5, 6]
    assert all(reason in found[row].reason for row, reason in enumerate(bad.values()))


def test_check_data_and_training_agree(media, host):
    """Every mix of text, images and videos, and everything that is wrong with one."""
    _, processor = host
    image = {"type": "image", "path": "a.png"}
    rows = [
        chat("what ?", "red"),
        chat([image, text("what ?")], "red"),
        chat([video(), text("what ?")], "red"),
        chat([image, video(), text("what ?")], "red"),
        chat([video(), text("what ?"), video("b.mp4")], "red"),
        chat([video("broken.mp4"), text("what ?")], "red"),
        chat([{"type": "image", "path": "broken.mp4"}, text("what ?")], "red"),
        chat([image, text("what " * 200)], "red"),
        chat([], "red"),
        {"q": "what ?", "a": "red", "video_id": "a"},
        {"q": "what ?", "a": "", "video_id": "a"},
    ]
    data = dataset(media, processor, *rows, item_timeout=None)
    check = InstructionCheck(
        data.table, dataset=data, max_length=192, decoding=decoding_options(processor.video_processor)
    )
    checked = {found.row: found.reason for found in check_rows(check, timeout=None)}
    trained = {}
    for row in range(len(rows)):
        broken = data[row]["broken"]
        trained[row] = broken[0]["reason"] if broken and broken[0]["index"] == row else None
    assert {row for row in trained if trained[row] is None} == {0, 1, 2, 3, 4, 9}
    assert checked == trained


def test_a_template_that_ends_no_answer_is_warned_of(host, media, caplog):
    _, processor = host
    dataset(media, processor, TWO_TURNS)
    assert "where to stop" not in caplog.text
    endless = copy.copy(processor)
    endless.chat_template = {
        "default": "{% for m in messages %}{{ m['role'] }}: {% generation %}{{ m['content'][0]['text'] + ' ' }}"
        "{% endgeneration %}{% endfor %}"
    }
    dataset(media, endless, TWO_TURNS)
    assert f"where to stop. Train with {type(processor).__name__}.default_chat_template" in caplog.text


def test_broken_items_are_replaced_and_reported(host, media):
    _, processor = host
    rows = [
        chat([video("broken.mp4"), text("what ?")], "red"),
        chat([{"type": "image", "path": "gone.png"}, text("what ?")], "red"),
        chat(" ", "red"),
        TWO_TURNS,
    ]
    data = dataset(media, processor, *rows)
    good = data[3]
    assert good["broken"] == []
    reasons = ("broken.mp4", "gone.png does not exist", "has no text")
    for row, reason in enumerate(reasons):
        item = data[(0, row)]
        assert item["broken"][0]["index"] == row and reason in item["broken"][0]["reason"]
        assert {record["index"] for record in item["broken"]} <= {0, 1, 2}
        assert torch.equal(item["input_ids"], good["input_ids"])
    assert len(InstructionCollator(processor)([data[0], data[3]])["broken"]) == len(data[0]["broken"])


@pytest.mark.parametrize("item_timeout", [1.0, None])
def test_whatever_is_wrong_with_an_image_is_counted(media, item_timeout):
    """The same rows are unusable for a check of the table, with and without a model."""
    bomb = (
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 30000, 30000, 1, 24, 0, 0, *[0] * 4)
    )
    (media / "bomb.bmp").write_bytes(bomb)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(media / "cut.png")
    (media / "cut.png").write_bytes((media / "cut.png").read_bytes()[:2000])
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/a.png"
        bad = ["bomb.bmp", "cut.png", "broken.mp4", "http://127.0.0.1:9/dead.png", "http://[::1", "nul\0.png"]
        bad += [address] if item_timeout else []
        rows = [chat([{"type": "image", "path": path}, text("what ?")], "red") for path in bad]
        rows += [chat([{"type": "image", "path": "a.png"}, text("what ?")], "red")]
        data = dataset(media, llava_processor(), *rows, item_timeout=item_timeout)
        assert data[len(bad)]["broken"] == [] and data[len(bad)]["pixel_values"].shape == (1, 3, 32, 32)
        started = time.monotonic()
        for row, path in enumerate(bad):
            record = data[row]["broken"][0]
            assert record["index"] == row, path
            slow = path == address
            assert ("took longer than 1 s" if slow else path) in record["reason"] and record["reason"].endswith(".")
            assert record["video"].endswith(path)
        assert time.monotonic() - started < 60
        for model in (None, InstructionDataset(data.table, data.processor, max_length=192, item_timeout=None)):
            check = InstructionCheck(data.table, dataset=model, max_length=192)
            found = sorted(check_rows(check, timeout=item_timeout or 60.0), key=lambda checked: checked.row)
            assert [checked.reason is None for checked in found] == [False] * len(bad) + [True]


def test_what_replaces_a_broken_item_follows_from_seed_epoch_and_row(media):
    rows = [chat([video("broken.mp4"), text("what ?")], "red")]
    rows += [chat(f"what {word} ?", "red") for word in ("is", "happens", "red", "left", "right", "square", "the")]
    first, again = (dataset(media, llava_processor(), *rows, seed=3) for _ in range(2))
    draws = [first[(epoch, 0)]["input_ids"].tolist() for epoch in range(8)]
    assert draws == [again[(epoch, 0)]["input_ids"].tolist() for epoch in range(8)]
    assert len({tuple(ids) for ids in draws}) > 1
    other = dataset(media, llava_processor(), *rows, seed=4)
    assert draws != [other[(epoch, 0)]["input_ids"].tolist() for epoch in range(8)]
    assert first[0]["input_ids"].tolist() == draws[0]


def test_jittered_frames_follow_from_seed_epoch_and_row(media):
    processor = llava_processor()
    processor.video_processor.sampling, processor.video_processor.num_frames = "jitter", 3
    data = dataset(media, processor, TWO_TURNS)
    draws = [data[(epoch, 0)]["pixel_values_videos"] for epoch in range(6)]
    assert all(torch.equal(a, data[(epoch, 0)]["pixel_values_videos"]) for epoch, a in enumerate(draws))
    assert any(not torch.equal(draws[0], other) for other in draws[1:])


def test_a_decoder_that_hangs_is_cut_off(media, monkeypatch):
    load = video_io.load_pyav

    def hang(source, *args, **kwargs):
        if source.name.endswith("b.mp4"):
            time.sleep(60)
        return load(source, *args, **kwargs)

    monkeypatch.setattr(video_io, "load_pyav", hang)
    rows = [chat([video("b.mp4"), text("what ?")], "red"), TWO_TURNS]
    data = dataset(media, llava_processor(), *rows, item_timeout=0.5)
    data[1]  # its process has started
    start = time.monotonic()
    item = data[0]
    assert time.monotonic() - start < 10
    assert "took longer than 0.5 s and was cut off" in item["broken"][0]["reason"]
    assert torch.equal(item["input_ids"], data[1]["input_ids"])
    with pytest.raises(ValueError, match="item_timeout=0 must be"):
        dataset(media, llava_processor(), TWO_TURNS, item_timeout=0)


def test_too_long_is_broken_and_never_cut(host, media):
    _, processor = host
    long = chat([video(), text("what " * 60 + "?")], "red")
    data = dataset(media, processor, long, TWO_TURNS, max_length=60)
    item = data[0]
    assert "tokens, visual ones included, and the model takes 60" in item["broken"][0]["reason"]
    assert torch.equal(item["input_ids"], data[1]["input_ids"])
    only = dataset(media, processor, long, max_length=60)
    with pytest.raises(BrokenItemsError, match="None of 1 items"):
        only[0]
    whole = dataset(media, processor, long)[0]
    visual = QUERIES if hasattr(processor, "num_query_tokens") else PATCHES
    assert (whole["input_ids"] == VIDEO).sum() == visual and whole["broken"] == []


def test_limit_of_model_and_tokenizer():
    model, processor = tiny_hosts.llava(), llava_processor()
    assert longest_conversation(model.config, processor) == 192
    processor.tokenizer.model_max_length = 50
    assert longest_conversation(model.config, processor) == 50


def test_a_question_too_long_for_the_q_former_is_broken(media):
    processor = instructblip_processor()
    processor.qformer_tokenizer.model_max_length = 8
    data = dataset(media, processor, chat([video(), text("what " * 9)], "red"), chat("what ?", "red " * 9))
    assert "The Q-Former reads 8 tokens" in data[0]["broken"][0]["reason"]
    assert data[1]["broken"] == []  # the answer is none of its business


def test_clips_of_unequal_length_are_padded(media):
    processor = llava_processor()
    items = [dataset(media, processor, TWO_TURNS)[0] for _ in range(2)]
    items[1]["pixel_values_videos"] = items[1]["pixel_values_videos"][:, :3]
    batch = InstructionCollator(processor)(items)
    assert batch["pixel_values_videos"].shape[:2] == (2, 4)
    assert batch["frame_mask"].tolist() == [[True] * 4, [True] * 3 + [False]]


def test_clips_of_one_video(media):
    processor = llava_processor()
    processor.num_clips = 2
    item = dataset(media, processor, TWO_TURNS)[0]
    assert (item["input_ids"] == VIDEO).sum() == 2 * PATCHES
    assert item["pixel_values_videos"].shape == (2, 4, 3, 32, 32)


def test_a_template_without_marked_answers_is_refused(media):
    processor = llava_processor()
    processor.chat_template = "{% for m in messages %}<video>{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="does not mark the answers"):
        dataset(media, processor, TWO_TURNS)
    processor = llava_processor()
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="has no padding token"):
        InstructionCollator(processor)
