import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from bt_adapter_hf.search.exchange import convert, export, merge
from bt_adapter_hf.search.index import IndexMismatchError, VideoIndex
from tests.search.test_index import INFO, make, unit


def index_of(folder, names: list[str], seed: int = 0, **info) -> VideoIndex:
    rows = [{"path": name, "start": 0.0, "end": 2.0, "size": seed, "mtime_ns": 5} for name in names]
    return make(folder, unit(np.random.default_rng(seed).normal(size=(len(names), 8))), rows, **info)


def contents(index: VideoIndex) -> dict[str, tuple[int, list[float]]]:
    return {
        row["path"]: (row["size"], feature.tolist()) for row, feature in zip(index.rows, index.features, strict=True)
    }


def test_merge(tmp_path):
    a, b = index_of(tmp_path / "a", ["1", "2", "it's"]), index_of(tmp_path / "b", ["it's", "4"], seed=1)
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c") == 4
    merged = VideoIndex.load(tmp_path / "c")
    assert merged.info == a.info
    assert contents(merged) == {**contents(a), **contents(b)}  # of one file the later rows count
    index_of(tmp_path / "d", ["5"], seed=2)
    assert merge([tmp_path / "d"], tmp_path / "c") == 5  # into one that is there
    assert merge([tmp_path / "d"], tmp_path / "c") == 5


def test_an_exported_index_is_merged_again(tmp_path):
    a = index_of(tmp_path / "a", ["1", "2", "3"])
    assert export(tmp_path / "a", tmp_path / "a.parquet") == 3
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == a.table.schema.names
    np.testing.assert_array_equal(np.stack(table["vector"].to_numpy()), a.features)
    assert merge([tmp_path / "a.parquet"], tmp_path / "b") == 3
    assert contents(VideoIndex.load(tmp_path / "b")) == contents(a)


def test_what_does_not_fit_is_not_merged(tmp_path):
    index_of(tmp_path / "a", ["1"])
    index_of(tmp_path / "other", ["2"], fingerprint="g")
    index_of(tmp_path / "frames", ["2"], settings={"num_frames": 4})
    index_of(tmp_path / "moments", ["2"], moments={"window": 8.0, "stride": 4.0})
    with pytest.raises(IndexMismatchError, match=r"other' was made with another model than '.*a'"):
        merge([tmp_path / "a", tmp_path / "other"], tmp_path / "c")
    with pytest.raises(IndexMismatchError, match="num_frames=None, now 4"):
        merge([tmp_path / "a", tmp_path / "frames"], tmp_path / "c")
    with pytest.raises(IndexMismatchError, match="window=None, now 8"):
        merge([tmp_path / "a", tmp_path / "moments"], tmp_path / "c")
    with pytest.raises(ValueError, match="merged into itself"):
        merge([tmp_path / "a"], tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="holds no index"):
        merge([tmp_path / "a", tmp_path / "none"], tmp_path / "c")
    (tmp_path / "x.parquet").write_text("x")
    with pytest.raises(ValueError, match=r"x\.parquet' is no Parquet file"):
        merge([tmp_path / "x.parquet"], tmp_path / "c")
    pq.write_table(
        VideoIndex.load(tmp_path / "a").table.to_arrow().replace_schema_metadata({}), tmp_path / "y.parquet"
    )
    with pytest.raises(ValueError, match="does not say which model"):
        merge([tmp_path / "y.parquet"], tmp_path / "c")
    export(tmp_path / "a", tmp_path / "z.parquet")
    whole = (tmp_path / "z.parquet").read_bytes()
    begin = pq.ParquetFile(tmp_path / "z.parquet").metadata.row_group(0).column(0).data_page_offset
    (tmp_path / "z.parquet").write_bytes(whole[:begin] + bytes(20) + whole[begin + 20 :])
    with pytest.raises(ValueError, match=r"z\.parquet' is damaged \(.*\): export it again"):
        merge([tmp_path / "z.parquet"], tmp_path / "c")
    assert not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match=r"ends in \.parquet"):
        export(tmp_path / "a", tmp_path / "a.csv")


def test_places_where_nothing_can_be_exported_to(tmp_path):
    index_of(tmp_path / "a", ["1"])
    for place in (tmp_path / "a" / "x.parquet", tmp_path / "a" / "videos.lance" / "x.parquet"):
        with pytest.raises(ValueError, match="lies in the index '.*/a', which holds nothing else"):
            export(tmp_path / "a", place)
    with pytest.raises(ValueError, match="lies in the index"):
        merge([tmp_path / "a"], tmp_path / "a" / "new")
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "file").touch()
    for place, reason in (
        (tmp_path / "none" / "x.parquet", "No such file or directory"),
        (tmp_path / "file" / "x.parquet", "Not a directory"),
        (tmp_path / "folder.parquet", "Is a directory"),
    ):
        with pytest.raises(OSError, match=f"^'{place}' cannot be written: {reason}.$"):
            export(tmp_path / "a", place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file", "folder.parquet"]


def old_index(folder: Path) -> np.ndarray:
    """As earlier versions wrote it; the second part replaces a row of the first."""
    folder.mkdir()
    info = {name: value for name, value in INFO.items() if name != "moments"}
    (folder / "index.json").write_text(json.dumps({**info, "format": 1}))
    features = unit(np.random.default_rng(0).normal(size=(5, 8)))
    for part, (names, rows) in enumerate(((["1", "2", "caf\udce9"], features[:3]), (["2", "4"], features[3:]))):
        facts = [{"path": name, "size": 7, "mtime_ns": 8, "duration": 2.5, "timestamps": [0.0]} for name in names]
        save_file({"features": rows}, folder / f"part-0000{part}.safetensors", {"rows": json.dumps(facts)})
    return features


def test_an_index_of_format_1_becomes_a_table(tmp_path):
    features = old_index(tmp_path / "old")
    with pytest.raises(ValueError, match="convert .*old` makes a table of it"):
        VideoIndex.load(tmp_path / "old")
    with pytest.raises(ValueError, match="convert .*old` makes a table of it"):
        merge([tmp_path / "old"], tmp_path / "c")
    assert convert(tmp_path / "old", tmp_path / "new") == 4
    assert convert(tmp_path / "old") == 4
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["videos.lance"]
    for folder in ("old", "new"):
        index = VideoIndex.load(tmp_path / folder)
        assert index.info == INFO
        assert [row["path"] for row in index.rows] == ["1", "2", "caf\udce9", "4"]
        assert [(row["start"], row["end"], row["size"]) for row in index.rows] == [(0.0, 2.5, 7)] * 4
        np.testing.assert_array_equal(index.features, features[[0, 3, 2, 4]])


def test_a_conversion_that_was_killed_is_ended(tmp_path):
    old_index(tmp_path / "old")
    parts = {path: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    convert(tmp_path / "old")
    for path, content in parts.items():  # the table is complete, the old files are still there
        path.write_bytes(content)
    assert len(VideoIndex.load(tmp_path / "old")) == 4
    assert convert(tmp_path / "old") == 4
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["videos.lance"]


def test_what_cannot_be_converted(tmp_path):
    with pytest.raises(FileNotFoundError, match="no index of an older version"):
        convert(tmp_path)
    old_index(tmp_path / "old")
    index_of(tmp_path / "new", ["1"])
    with pytest.raises(FileExistsError, match="holds an index already"):
        convert(tmp_path / "old", tmp_path / "new")
    part = tmp_path / "old" / "part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(ValueError, match="part-00000.safetensors' is damaged"):
        convert(tmp_path / "old")
    assert part.exists()


def test_parts_that_are_no_rows_are_refused_and_nothing_is_written(tmp_path):
    import numpy as np
    import pyarrow as pa

    from bt_adapter_hf.search.exchange import _checked

    rows = pa.table({"path": ["a", "b"], "start": [0.0, 0.0], "vector": pa.array([[1.0, 0.0]] * 2)})
    assert _checked("x", rows) is rows
    with pytest.raises(ValueError, match="'x' has no column path"):
        _checked("x", rows.drop_columns(["path"]))
    with pytest.raises(ValueError, match="2 rows of 1 moments"):
        _checked("x", rows.set_column(0, "path", [["a", "a"]]))
    with pytest.raises(ValueError, match="without a path"):
        _checked("x", rows.set_column(0, "path", [[None, "a"]]))
    with pytest.raises(ValueError, match="not finite"):
        _checked("x", rows.set_column(2, "vector", pa.array([[np.nan, 0.0]] * 2)))
    with pytest.raises(ValueError, match="is empty"):
        _checked("x", rows.slice(0, 0))


def test_a_name_that_is_no_text_is_not_one_that_is_shown_alike():
    from bt_adapter_hf.search.table import paths_condition

    assert paths_condition(["caf\udce9.mp4"]) == "(path in ('caf\\xe9.mp4') and path_bytes is not null)"
    assert (
        paths_condition(["caf\\xe9.mp4", "a'.mp4"]) == "(path in ('caf\\xe9.mp4', 'a''.mp4') and path_bytes is null)"
    )
