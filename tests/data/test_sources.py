"""Tables from every kind of source, without the Hub (tests/hub/test_streaming.py has that)."""

import json
import multiprocessing
import os
import shutil
import tarfile
import zipfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bt_adapter_hf.data import archives, media, readers, tar_shards
from bt_adapter_hf.data.sources import BrokenRowError, load_table
from tests import tiny_pairs
from tests.data.packed import add_member, file_server, rows_of, write_parquet, write_tar


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return tiny_pairs.write_table(tmp_path_factory.mktemp("clips")).parent


@pytest.fixture(scope="module")
def rows(clips):
    return rows_of(clips)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def records(table) -> list:
    """All rows in order; those of a shard may come in any."""
    shards = (dict(table.records(shard)) for shard in range(len(table.shard_rows)))
    return [shard[index] for shard in shards for index in range(len(shard))]


def expected(rows) -> list[tuple[bytes, list[str]]]:
    return [(data, [text]) for _, data, text in rows]


# Tables that name their videos


@pytest.mark.parametrize("kind", ["folder", "jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_table_gives_the_same_pairs(kind, clips, tmp_path):
    lines = [json.loads(line) for line in (clips / "metadata.jsonl").read_text().splitlines()]
    path, root = tmp_path / f"table.{kind}", clips
    if kind == "folder":
        path, root = clips, None
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif kind == "json":
        path.write_text(json.dumps(lines))
    elif kind == "parquet":
        datasets.Dataset.from_list(lines).to_parquet(path)
    else:
        sep = {"csv": ",", "tsv": "\t"}[kind]
        path.write_text("\n".join(sep.join(row) for row in [["file_name", "text"], *(r.values() for r in lines)]))
    table = load_table(path, media_root=root)
    assert len(table) == 8 and table.shard_rows == [8] and not table.needs_store
    assert [table.pair(i) for i in range(8)] == [
        (str(clips.resolve() / line["file_name"]), line["file_name"], [line["text"]]) for line in lines
    ]
    assert list(table.texts()) == [[line["text"]] for line in lines]
    with pytest.raises(IndexError, match="row 8 of .*has 8 rows"):
        table.pair(8)


def test_cells_of_a_csv_stay_the_text_they_are(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("video,text\nnull,None\nNA,7\n007,1e3\n")
    table = load_table(path)
    assert [table.pair(i)[1:] for i in range(3)] == [("null", ["None"]), ("NA", ["7"]), ("007", ["1e3"])]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_a_byte_order_mark_costs_no_row(kind, tmp_path):
    rows = [{"video": "a.mp4", "text": "first"}, {"video": "b.mp4", "text": "second"}]
    content = {
        "jsonl": "\n".join(map(json.dumps, rows)),
        "json": json.dumps(rows),
        "csv": "video,text\na.mp4,first\nb.mp4,second\n",
        "tsv": "video\ttext\na.mp4\tfirst\nb.mp4\tsecond\n",
    }[kind]
    (tmp_path / f"t.{kind}").write_text(content, encoding="utf-8-sig")
    table = load_table(tmp_path / f"t.{kind}")
    assert [table.pair(row)[1:] for row in range(len(table))] == [("a.mp4", ["first"]), ("b.mp4", ["second"])]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_row_that_is_no_text_costs_itself_only(kind, tmp_path):
    """Half of a surrogate pair is no character: Arrow refuses the file for it, or it would be dropped."""
    lines = [json.dumps({"video": f"{i}.mp4", "text": ["a dog", "a \ud800 dog", "\U0001f415"][i]}) for i in range(3)]
    lines += [json.dumps({"video": "\udc00.mp4", "caption": "b"}), json.dumps({"video": 4, "text": "c"})]
    if kind == "jsonl":
        lines.append("{no json")
    (tmp_path / f"t.{kind}").write_text("\n".join(lines) if kind == "jsonl" else f"[{', '.join(lines)}]")
    table = load_table(tmp_path / f"t.{kind}")
    found = records(table)
    assert [record.texts for record in found] == [["a dog"], [], ["\U0001f415"], [], [], []][: len(lines)]
    problems = ["None", r"text holds \ud800", "None", r"video holds \udc00", "video is 4; expected", "is no JSON"]
    assert all(part in str(record.problem) for part, record in zip(problems, found, strict=False)), found
    assert found[1].name == "1.mp4" and table.name(3) == "row 3" and len(found) == len(lines)


@pytest.mark.parametrize(
    "header",
    ["videoid,name,page_idx,page_dir,duration,contentUrl", "videoid,contentUrl,duration,page_dir,name"],
    ids=["2M", "10M"],
)
def test_webvid(header, clips, tmp_path):
    values = {"videoid": "1066674784", "name": "a goat, grazing", "page_idx": "0", "page_dir": "000051"}
    values |= {"duration": "PT00H00M20S", "contentUrl": "https://host/1.mp4"}
    path = tmp_path / "webvid.csv"
    path.write_text(header + "\n" + ",".join(f'"{values[name]}"' for name in header.split(",")) + "\n")
    (tmp_path / "mp4" / "000051").mkdir(parents=True)
    table = load_table(path, media_root=tmp_path / "mp4")
    video = str(tmp_path.resolve() / "mp4/000051/1066674784.mp4")
    assert table.pair(0) == (video, "000051/1066674784.mp4", ["a goat, grazing"])
    by_url = load_table(path, video_column="contentUrl", text_column="name")
    assert by_url.needs_store and by_url.shard_rows == [1]


def test_several_files_are_one_table(rows, tmp_path):
    for number in range(3):
        lines = [json.dumps({"path": f"{number}-{i}.mp4", "caption": [f"{number}", "b"]}) for i in range(2)]
        (tmp_path / f"part{number}.jsonl").write_text("\n".join(lines))
    table = load_table(str(tmp_path / "part*.jsonl"))
    assert [table.pair(i)[1] for i in range(6)] == [f"{n}-{i}.mp4" for n in range(3) for i in range(2)]
    assert table.pair(4)[2] == ["2", "b"]


def test_fingerprint_is_of_the_rows_wherever_they_lie(clips, rows, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(clips / "metadata.jsonl", tmp_path / name / "table.jsonl")
        write_parquet(tmp_path / name / "p.parquet", rows)
        write_tar(tmp_path / name / "t.tar", rows)
    (tmp_path / "b" / "other.jsonl").write_text((clips / "metadata.jsonl").read_text().replace("red", "pink"))
    write_parquet(tmp_path / "b" / "other.parquet", [*rows[1:], rows[0]])
    write_tar(tmp_path / "b" / "other.tar", [rows[0], *rows[2:]])
    for name in ("table.jsonl", "p.parquet", "t.tar"):
        fingerprints = [load_table(tmp_path / folder / name).fingerprint for folder in ("a", "b")]
        assert fingerprints[0] == fingerprints[1]
        other = tmp_path / "b" / f"other.{name.rpartition('.')[2]}"
        assert load_table(other).fingerprint != fingerprints[0]


@pytest.mark.parametrize(
    "name, content, options, message",
    [
        ("t.csv", "file,text\na,b\n", {}, "no video column: looked for any of video, .*found file, text"),
        ("t.csv", "video,label\na,b\n", {}, "no text column.*found video, label.*text_column"),
        ("t.csv", "video,text\na,b\n", {"text_column": "words"}, "looked for 'words', found video, text"),
        ("t.csv", "video,text\n", {}, "The table .* has no rows"),
        ("t.csv", "", {}, "Cannot read the table .*no header"),
        ("t.csv", "video,video,text\na,b,c\n", {}, "names a column twice"),
        ("t.csv", "video,text\na,b\n", {"media_root": "/absent"}, "media_root /absent is neither a folder nor"),
        (
            "t.csv",
            "video,text\na,b\n",
            {"media_root": "/absent.zip"},
            "Cannot read the table .*: no such file",
        ),
        ("t.jsonl", "{not json", {}, "Cannot read the table"),
        ("t.jsonl", '{"video": 1, "text": "a"}', {}, "int64 in its video column 'video', expected paths"),
        ("t.xlsx", "", {}, "must end in one of .jsonl"),
        ("t.csv", "video,text\na,caf\udce9\n", {}, "t.csv: it is not UTF-8 .byte 0xe9 at 16.: save it as UTF-8"),
        ("t.jsonl", "\udcff\udcfe{\0", {}, "t.jsonl: it is encoded in UTF-16: save it as UTF-8"),
        ("t.parquet", "PAR1 not really", {}, "Cannot read the table"),
        ("t.tar", "not a tar", {}, "t.tar is not an uncompressed tar"),
    ],
)
def test_bad_tables(name, content, options, message, tmp_path):
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        load_table(tmp_path / name, **options)


def test_missing_table(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        load_table(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="Cannot read the table no-one/has-this"):
        load_table("no-one/has-this")
    with pytest.raises(ValueError, match="no file matches"):
        load_table(tmp_path / "*.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="Cannot read the table"):
        load_table(tmp_path / "empty")


# Parquet that holds the videos


def test_parquet_shards_are_row_groups(rows, tmp_path):
    write_parquet(tmp_path / "a.parquet", rows[:5])
    write_parquet(tmp_path / "b.parquet", rows[5:])
    for source in (str(tmp_path / "*.parquet"), tmp_path):
        table = load_table(source)
        assert table.needs_store and table.shard_rows == [3, 2, 3]
        assert [(record.video, record.texts) for record in records(table)] == expected(rows)
        assert [record.name for record in records(table)] == [name for name, _, _ in rows]
        assert list(table.texts()) == [[text] for _, _, text in rows]
    with pytest.raises(RuntimeError, match="have to be fetched: call use_store"):
        table.pair(0)


def test_parquet_rows_without_bytes(clips, rows, tmp_path):
    videos = [{"bytes": None, "path": rows[0][0]}, {"bytes": None, "path": None}, {"bytes": rows[2][1], "path": None}]
    write_parquet(tmp_path / "t.parquet", rows[:3], video=videos, captions=[["a", "b"], [None, " "], None])
    table = load_table(tmp_path / "t.parquet", media_root=clips, text_column="captions")
    assert [tuple(record) for record in records(table)] == [
        (str(clips.resolve() / rows[0][0]), rows[0][0], ["a", "b"], None),
        (None, "", [], "The row holds no video."),
        (rows[2][1], "", [], None),
    ]


def test_parquet_of_other_columns(rows, tmp_path):
    write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(ValueError, match=r"a.parquet.* has no text column: looked for 'words', found unneeded, video"):
        load_table(tmp_path / "a.parquet", text_column="words")
    write_parquet(tmp_path / "b.parquet", rows, text=["x"] * 8)
    cut = (tmp_path / "b.parquet").read_bytes()[:-20]
    (tmp_path / "b.parquet").write_bytes(cut)
    with pytest.raises(ValueError, match="b.parquet is not a readable parquet file"):
        load_table(str(tmp_path / "*.parquet"))


@pytest.mark.parametrize("kind", ["string_view", "large_string", "dictionary", "binary_view", "large_binary"])
def test_every_way_in_which_arrow_writes_text_and_bytes(kind, rows, tmp_path):
    texts = pa.array([text for _, _, text in rows])
    videos = pa.array([data for _, data, _ in rows]) if "binary" in kind else pa.array([name for name, _, _ in rows])
    if kind == "dictionary":
        videos, texts = videos.dictionary_encode(), texts.dictionary_encode()
    else:
        videos = videos.cast(getattr(pa, kind)())
        texts = texts if "binary" in kind else texts.cast(getattr(pa, kind)())
    pq.write_table(pa.table({"video": videos, "text": texts}), tmp_path / "t.parquet")
    table = load_table(tmp_path / "t.parquet")
    assert table.needs_store == ("binary" in kind)
    found = records(table)
    assert [record.texts for record in found] == [[text] for _, _, text in rows]
    if "binary" in kind:
        assert [record.video for record in found] == [data for _, data, _ in rows]
    else:
        assert [record.name for record in found] == [name for name, _, _ in rows]


# WebDataset tars


@pytest.mark.parametrize(
    "text, options",
    [("txt", {}), ("caption", {}), ("words", {"text_column": "words", "video_column": "mp4"})],
)
def test_tars_are_read_in_place(text, options, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "ROWS_PER_SHARD", 3)
    write_tar(tmp_path / "0.tar", rows[:4], text)
    write_tar(tmp_path / "1.tar", rows[4:], text)
    table = load_table(str(tmp_path / "*.tar"), **options)
    assert table.shard_rows == [3, 1, 3, 1] and not table.needs_store
    pairs = [table.pair(row) for row in range(8)]
    assert [(video, texts) for video, _, texts in pairs] == expected(rows)
    assert pairs[5][1] == "./1-0001.mp4"
    assert list(table.texts()) == [[text] for _, _, text in rows]


def test_samples_that_lack_something(rows, tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        add_member(tar, "a.mp4", rows[0][1])
        add_member(tar, "b.txt", b"only text")
        add_member(tar, "c.mp4", rows[2][1])
        add_member(tar, "c.json", b"{broken")
        add_member(tar, "._c.mp4", b"litter of macOS")
        add_member(tar, "d.mp4", rows[3][1])
        add_member(tar, "d.json", b'{"text": "a \\ud800 dog"}')
    table = load_table(tmp_path / "t.tar")
    assert len(table) == 4 and table.pair(3)[2] == []
    assert table.pair(0) == (rows[0][1], "a.mp4", []) and table.pair(2)[2] == []
    with pytest.raises(BrokenRowError, match="no video") as error:
        table.pair(1)
    assert error.value.name == "b.txt"
    with pytest.raises(ValueError, match="no video members: looked for 'avi', found members ending in json, mp4, txt"):
        load_table(tmp_path / "t.tar", video_column="avi")


def test_names_with_dots(rows, tmp_path):
    """As of clips named by their seconds: the first dot is none before an ending."""
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in [
            ("v/abc_12.500_20.250.mp4", rows[0][1]),
            ("v/abc_12.500_20.250.txt", b"\xef\xbb\xbffirst"),  # a byte order mark is no part of it
            ("v/abc_12.750_30.000.mp4", rows[1][1]),  # the same up to the first dot
            ("v/abc_12.750_30.000.json", b'\xef\xbb\xbf{"text": "second"}'),
            ("v/plain.mp4", rows[2][1]),
            ("v/plain.txt", b"third"),
            ("v/low.x.mp4", rows[3][1]),  # an ending of its own, as the text says
            ("v/low.txt", b"fourth"),
        ]:
            add_member(tar, name, data)
    table = load_table(tmp_path / "t.tar")
    assert [table.pair(row)[::2] for row in range(3)] == [
        (rows[0][1], ["first"]),
        (rows[1][1], ["second"]),
        (rows[2][1], ["third"]),
    ]
    assert len(table) == 4
    with pytest.raises(BrokenRowError, match="The sample has no video"):
        table.pair(3)
    named = load_table(tmp_path / "t.tar", video_column="x.mp4")
    assert named.pair(len(named) - 1)[::2] == (rows[3][1], ["fourth"])
    with tarfile.open(tmp_path / "u.tar", "w") as tar:
        add_member(tar, "a.1.5.wmv", rows[0][1])
        add_member(tar, "a.1.5.txt", b"x")
    message = r"found members ending in 1.5.txt, 1.5.wmv .what follows the first dot.. Name one with"
    with pytest.raises(ValueError, match=message):
        load_table(tmp_path / "u.tar")


def test_names_that_are_no_utf8_or_have_line_breaks(rows, tmp_path):
    names = [b"caf\xe9".decode(errors="surrogateescape"), "two\nlines"]
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in names:
            add_member(tar, f"{name}.mp4", rows[0][1])
            add_member(tar, f"{name}.txt", b"x")
    table = load_table(tmp_path / "t.tar")
    assert [table.pair(row)[1] for row in range(2)] == [r"caf\xe9.mp4", r"two\nlines.mp4"]
    assert table.pair(0)[0] == rows[0][1]


def test_sizes_are_bounded(clips, rows, tmp_path, monkeypatch):
    """Of the members of archives too, whatever their headers claim."""
    for module in (archives, tar_shards):
        monkeypatch.setattr(module, "MAX_BYTES", 2000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.mp4", bytes(3000))
        archive.writestr("liar.mp4", bytes(1500))
        archive.writestr("fine.mp4", bytes(2000))
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data.replace((1500).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    lines = [json.dumps({"video": f"{name}.mp4", "text": "x"}) for name in ("bomb", "liar", "fine")]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    table = load_table(tmp_path / "t.jsonl", media_root=tmp_path / "a.zip")
    with pytest.raises(BrokenRowError, match="bomb.mp4 .*It has 3000 bytes, and the limit .* is 2000"):
        table.pair(0)
    with pytest.raises(BrokenRowError, match="liar.mp4 .*cannot be read"):
        table.pair(1)
    assert table.pair(2)[0] == bytes(2000)
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, size in (("big", 2001), ("fine", 2000)):
            add_member(tar, f"{name}.mp4", bytes(size))
            add_member(tar, f"{name}.txt", b"x")
    table = load_table(tmp_path / "t.tar")
    with pytest.raises(BrokenRowError, match="It has 2001 bytes"):
        table.pair(0)
    assert table.pair(1)[0] == bytes(2000)


def test_whatever_unpacking_raises_is_the_error_of_its_row(tmp_path):
    content = np.random.default_rng(0).integers(0, 4, 3000, dtype=np.uint8).tobytes()
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("broken", "fine"):
            archive.writestr(f"{name}.mp4", content)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[50:300] = bytes(range(250))  # zlib.error, which is neither an OSError nor a BadZipFile
    (tmp_path / "a.zip").write_bytes(data)
    lines = [json.dumps({"video": f"{name}.mp4", "text": "x"}) for name in ("broken", "fine")]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    table = load_table(tmp_path / "t.jsonl", media_root=tmp_path / "a.zip")
    with pytest.raises(BrokenRowError, match=r"broken.mp4 in .*a.zip cannot be read: error: Error -3 .*[^.]\.$"):
        table.pair(0)
    assert table.pair(1)[0] == content


def pack_all(path, rows):
    with tarfile.open(path, "w") as tar:
        for name, data, _ in rows:
            add_member(tar, name, data)
    return path


def test_an_archive_that_is_cut_later(rows, tmp_path):
    """After the table was opened: no video is handed out shorter than it is."""
    write_tar(tmp_path / "t.tar", rows)
    pack_all(tmp_path / "a.tar", rows)
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"video": n, "text": t}) for n, _, t in rows))
    packed, archived = load_table(tmp_path / "t.tar"), load_table(tmp_path / "t.jsonl", media_root=tmp_path / "a.tar")
    for name in ("t.tar", "a.tar"):
        os.truncate(tmp_path / name, 1000)
    for table in (packed, archived):
        with pytest.raises(BrokenRowError, match="bytes at .* could be read: the file has changed or is cut"):
            table.pair(0)
    again = load_table(tmp_path / "t.jsonl", media_root=pack_all(tmp_path / "b.tar", rows))
    for name, table in (("t.tar", packed), ("b.tar", again)):
        (tmp_path / name).unlink()
        with pytest.raises(BrokenRowError, match=f"{name} cannot be read: .*No such file"):
            table.pair(1)


def test_members_of_archives_lead_nowhere(tmp_path):
    """Their names are compared and never become places on the disk."""
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data" / "a.zip", "w") as archive:
        archive.writestr("../secret.mp4", b"member")
    names = ["../secret.mp4", str(tmp_path / "secret.mp4"), "../../secret.mp4"]
    (tmp_path / "data" / "t.jsonl").write_text("\n".join(json.dumps({"video": n, "text": "x"}) for n in names))
    table = load_table(tmp_path / "data" / "t.jsonl", media_root=tmp_path / "data" / "a.zip")
    assert table.pair(0)[0] == b"member"
    for row in (1, 2):
        with pytest.raises(BrokenRowError, match="secret.mp4 is not in"):
            table.pair(row)


def test_a_tar_that_is_cut_is_no_shorter_table(rows, tmp_path):
    whole = write_tar(tmp_path / "whole.tar", rows).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        members = tar.getmembers()
    cuts = {
        "between": members[6].offset,  # reads like a shorter tar
        "inside": members[6].offset_data + 100,
        "header": members[6].offset + 100,
    }
    for name, cut in cuts.items():
        (tmp_path / f"{name}.tar").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=f"{name}.tar is (cut|not)"):
            load_table(tmp_path / f"{name}.tar")
    damaged = bytearray(whole)
    damaged[members[6].offset : members[6].offset + 50] = b"?" * 50
    (tmp_path / "damaged.tar").write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged.tar is cut or damaged: after byte"):
        load_table(tmp_path / "damaged.tar")
    assert len(load_table(tmp_path / "whole.tar")) == 8


# Archives with the videos of a table


@pytest.fixture(params=["zip", "tar"])
def archived(request, clips, rows, tmp_path):
    """A table whose videos are in two archives; in the first one under a folder that the table does not mention."""
    members = {
        f"0.{request.param}": [(f"All_Videos/train/{name}", data) for name, data, _ in rows[:5]],
        f"1.{request.param}": [(f"train/{name}", data) for name, data, _ in rows[5:]],
    }
    members[f"1.{request.param}"].append((f"other/{rows[7][0]}", b"a second one of this name"))
    for file, content in members.items():
        if request.param == "zip":
            with zipfile.ZipFile(tmp_path / file, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, data in content:
                    archive.writestr(name, data)
        else:
            with tarfile.open(tmp_path / file, "w") as tar:
                for name, data in content:
                    add_member(tar, name, data)
    lines = [{"video": f"train/{name}", "text": text} for name, _, text in rows]
    lines += [{"video": "train/absent.mp4", "text": "x"}, {"video": rows[7][0], "text": "x"}]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return tmp_path / f"?.{request.param}"


def check_archived(table, rows):
    assert [table.pair(row)[::2] for row in range(8)] == expected(rows)
    with pytest.raises(BrokenRowError, match="train/absent.mp4 is not in .*/0.*/1"):
        table.pair(8)
    with pytest.raises(BrokenRowError, match="may mean 2 members of the archives"):
        table.pair(9)


def test_archives_are_read_without_unpacking(archived, rows):
    table = load_table(archived.parent / "t.jsonl", media_root=archived)
    assert not table.needs_store
    check_archived(table, rows)
    # a forked process must not share the position in the open files
    readers = [multiprocessing.get_context("fork").Process(target=check_many, args=(table, rows)) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0, 0, 0]
    assert not list(archived.parent.rglob("*.mp4"))


def check_many(table, rows):
    for _ in range(30):
        assert [table.pair(row)[::2] for row in range(8)] == expected(rows)


@pytest.mark.parametrize("archived", ["zip"], indirect=True)
def test_damaged_archives(archived):
    folder = archived.parent
    data = (folder / "0.zip").read_bytes()
    (folder / "cut.zip").write_bytes(data[:-100])
    with pytest.raises(ValueError, match="cut.zip is not a readable zip"):
        load_table(folder / "t.jsonl", media_root=folder / "cut.zip")
    with zipfile.ZipFile(folder / "0.zip") as archive:
        place = archive.infolist()[0].header_offset + 200
    (folder / "flipped.zip").write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
    table = load_table(folder / "t.jsonl", media_root=folder / "flipped.zip")
    with pytest.raises(BrokenRowError, match="cannot be read"):
        table.pair(0)
    assert table.pair(1)[0]


# Remote files


def test_urls_are_fetched_and_a_dead_one_is_a_broken_row(clips, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(media, "RETRY_WAITS", (0.01, 0.01))
    monkeypatch.setattr(readers, "ROWS_PER_SHARD", 3)
    with file_server(clips) as (address, log, failures):
        urls = [f"{address}/{name}" for name, _, _ in rows]
        lines = [{"video": url, "text": text} for url, (_, _, text) in zip(urls, rows, strict=True)]
        lines[3]["video"] = f"{address}/dead.mp4"
        lines[4]["video"] = str(clips / rows[4][0])
        lines[5]["video"] = "http://127.0.0.1:bad port/x.mp4"
        (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        failures[f"/{rows[0][0]}"] = [503, 429]  # recovers
        failures[f"/{rows[6][0]}"] = [500] * 3  # does not
        table = load_table(tmp_path / "t.jsonl")
        assert table.needs_store and table.shard_rows == [3, 3, 2] and not log
        found = records(table)
        assert [record.video for record in found[:3]] == [data for _, data, _ in rows[:3]]
        assert found[4].video == str(clips / rows[4][0])
        problems = {row: record.problem for row, record in enumerate(found) if record.problem}
        assert set(problems) == {3, 5, 6}
        assert "dead.mp4 could not be downloaded: HTTP 404" in problems[3] and "HTTP 500" in problems[6]


def test_videos_under_an_address(clips, rows, tmp_path):
    shutil.copy(clips / "metadata.jsonl", tmp_path / "t.jsonl")
    with file_server(clips) as (address, _, _):
        table = load_table(tmp_path / "t.jsonl", media_root=address)
        assert table.needs_store and [(record.video, record.texts) for record in records(table)] == expected(rows)
        for source, root in ((f"{address}/t.jsonl", None), (tmp_path / "t.jsonl", f"{address}/a.zip")):
            with pytest.raises(ValueError, match="read from the disk or from the Hub.*download it"):
                load_table(source, media_root=root)
