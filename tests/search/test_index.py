import json
import subprocess
import sys

import lancedb
import numpy as np
import pytest

from bt_adapter_hf.search.exchange import export, merge
from bt_adapter_hf.search.index import VideoIndex, combined
from bt_adapter_hf.search.table import create_table, to_arrow
from bt_adapter_hf.search.writer import known_files, prune


INFO = {
    "format": 2, "model": None, "revision": None, "fingerprint": "f", "dtype": "float32", "dim": 8, "settings": {},
    "moments": None,
}  # fmt: skip


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def make(folder, features: np.ndarray, rows: list[dict] | None = None, **info) -> VideoIndex:
    rows = [{"path": f"{i}.mp4", "start": 0.0, "end": 1.0} for i in range(len(features))] if rows is None else rows
    create_table(folder, to_arrow({**INFO, **info}, rows, features))
    return VideoIndex.load(folder)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> VideoIndex:
    return make(tmp_path_factory.mktemp("index"), unit(np.random.default_rng(0).normal(size=(50, 8))))


def test_search_equals_a_naive_one(index):
    features = index.features
    queries = unit(features[[7, 30]] + 0.1 * features[[8, 31]])
    results = index.search(queries, k=6)
    for query, hits in zip(queries, results, strict=True):
        scores = [float(sum(a * b for a, b in zip(query, row, strict=True))) for row in features]
        expected = sorted(range(50), key=lambda i: -scores[i])[:6]
        assert [hit.row["path"] for hit in hits] == [f"{i}.mp4" for i in expected]
        assert [hit.score for hit in hits] == pytest.approx([scores[i] for i in expected], abs=1e-6)
        assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5, 6]
    assert [hits[0].row["path"] for hits in results] == ["7.mp4", "30.mp4"]
    assert len(index.search(queries, k=500)[0]) == 50
    assert len(index.search(queries, k=2**70, per_video=True)[0]) == 50


def test_a_search_with_ready_vectors_needs_no_torch():
    """Nor its memory, three times that of an index of 1,000,000 rows."""
    code = "import sys, bt_adapter_hf.search.index; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_search_refuses_bad_queries(index):
    with pytest.raises(ValueError, match=r"shape \(1, 3\); expected \(queries, 8\)"):
        index.search(np.ones((1, 3), np.float32))
    with pytest.raises(ValueError, match="k=0"):
        index.search(index.features[:1], k=0)
    with pytest.raises(ValueError, match=r"overlap=1\.5"):
        index.search(index.features[:1], overlap=1.5)


def test_conditions(index):
    (hits,) = index.search(index.features[:1], k=50, where="path like '%7%' and \"end\" >= 1")
    assert sorted(hit.row["path"] for hit in hits) == ["17.mp4", "27.mp4", "37.mp4", "47.mp4", "7.mp4"]
    for condition, reason in (
        ("colour > 1", "No field named colour"),
        ("path ==== 'x'", "sql parser error"),
        ("", "parser error"),
        ("path", "boolean"),
        ("path = 3", "could not convert"),
        ("1=1; drop table videos", "parser error"),  # nothing of it is done, nor left out in silence
        ("1=1 limit 2", "parser error"),
        ("1=1 order by path", "parser error"),
    ):
        with pytest.raises(ValueError, match=f"condition '{condition}' cannot be used: .*{reason}.*columns path, "):
            index.search(index.features[:1], where=condition)
    (hits,) = index.search(index.features[:1], k=50, where="path = 'a;b.mp4' or path = '7.mp4' -- of a note")
    assert [hit.row["path"] for hit in hits] == ["7.mp4"]


def test_median_score(index):
    query = index.features[0]
    assert index.median_score(query) == pytest.approx(np.median(index.features @ query))


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> VideoIndex:
    """Two films of 40 windows of 4 s, one every second, and a clip; the windows at 10 s and at 30 s of the first
    are the best, and so are their neighbours."""
    features, rows = [], []
    for film in ("a.mp4", "b.mp4"):
        for start in range(40):
            near = max(1 - abs(start - 10) / 8, 0.9 - abs(start - 30) / 8, 0) if film == "a.mp4" else 0.3
            features.append([near, 1 - near, *([0.01 * start] * 6)])
            rows.append({"path": film, "start": float(start), "end": start + 4.0})
    features.append([1.0, 1.0, *[0.0] * 6])
    rows.append({"path": "clip.gif", "start": 0.0, "end": None})
    info = {"moments": {"window": 4.0, "stride": 1.0}}
    return make(tmp_path_factory.mktemp("films"), unit(np.array(features)), rows, **info)


QUERY = np.eye(8, dtype=np.float32)[:1]


def spans(hits) -> list[tuple[str, float]]:
    return [(hit.row["path"], hit.row["start"]) for hit in hits]


def test_neighbouring_windows_are_one_moment(films):
    (hits,) = films.search(QUERY, k=2)
    assert spans(hits) == [("a.mp4", 10.0), ("a.mp4", 30.0)]
    (hits,) = films.search(QUERY, k=30)
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    for hit in hits:  # no two overlap, and each window that is left out overlaps a better one
        others = [other for other in hits if other is not hit and other.row["path"] == hit.row["path"]]
        assert all(abs(other.row["start"] - hit.row["start"]) >= 4 for other in others)
    (all_of_them,) = films.search(QUERY, k=100, overlap=1.0)
    assert len(all_of_them) == 81
    kept = {path: [start for other, start in spans(hits) if other == path] for path in ("a.mp4", "b.mp4")}
    for hit in all_of_them[:80]:
        if hit.row["path"] != "clip.gif":
            assert any(abs(hit.row["start"] - start) < 4 for start in kept[hit.row["path"]])
    (half,) = films.search(QUERY, k=100, overlap=0.5)
    assert len(hits) < len(half) < 81


def test_the_best_moment_of_each_video(films):
    (hits,) = films.search(QUERY, k=3, per_video=True)  # 80 windows are better than the clip, or as many
    assert sorted(path for path, _ in spans(hits)) == ["a.mp4", "b.mp4", "clip.gif"]
    assert spans(hits)[0] == ("a.mp4", 10.0)


def test_against():
    queries = combined(QUERY, np.eye(8, dtype=np.float32)[1])
    assert np.linalg.norm(queries) == pytest.approx(1)
    assert queries[0, 1] == pytest.approx(-queries[0, 0] / 2)
    np.testing.assert_array_equal(combined(QUERY, None), QUERY)


def test_optimize(tmp_path):
    index = make(tmp_path, unit(np.random.default_rng(1).normal(size=(500, 8))))
    assert index.optimize().at_10 is None
    assert not index.table.list_indices()
    built = index.optimize(exact_rows=300)
    assert built.rows == 500
    assert built.at_10 > 0.9
    assert built.seconds > 0
    query = index.features[7:8]
    (exact,), (fast,) = index.search(query, k=10, exact=True), index.search(query, k=10)
    assert len({hit.row["path"] for hit in exact} & {hit.row["path"] for hit in fast}) >= 5
    assert fast[0] == exact[0]
    # rows that come later are found too
    query = unit(np.random.default_rng(2).normal(size=(1, 8)))
    index.table.add(to_arrow(index.info, [{"path": "new.mp4", "start": 0.0}], query))
    assert VideoIndex.load(tmp_path).search(query)[0][0].row["path"] == "new.mp4"


def test_no_index_and_damaged_index(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no index: make one with `bt-adapter index"):
        VideoIndex.load(tmp_path)
    good = make(tmp_path / "good", unit(np.ones((2, 8))))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="older version: `bt-adapter index convert"):
        VideoIndex.load(tmp_path / "old")
    with pytest.raises(ValueError, match=r"newer version \(format 3, this one reads 2\): upgrade"):
        make(tmp_path / "newer", unit(np.ones((2, 8))), format=3)
    with pytest.raises(ValueError, match="does not say settings"):
        make(tmp_path / "wrong", unit(np.ones((2, 8))), settings="x")
    database = lancedb.connect(tmp_path / "foreign")
    database.create_table("videos", good.table.to_arrow().replace_schema_metadata({"bt_adapter": "{"}))
    with pytest.raises(ValueError, match="is not a video index"):
        VideoIndex.load(tmp_path / "foreign")
    good.table.delete("true")
    with pytest.raises(ValueError, match="is empty"):
        VideoIndex.load(tmp_path / "good")
    for manifest in (tmp_path / "good" / "videos.lance" / "_versions").iterdir():
        manifest.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        VideoIndex.load(tmp_path / "good")


@pytest.mark.parametrize("damage", ["cut", "gone", "overwritten"])
def test_damaged_data_of_a_table(tmp_path, damage):
    """Whoever meets them says which index it is and what to do, and nothing of Rust."""
    make(tmp_path / "bad", unit(np.random.default_rng(0).normal(size=(50, 8))))
    make(tmp_path / "good", unit(np.ones((2, 8))))
    for file in (tmp_path / "bad" / "videos.lance" / "data").iterdir():
        content = file.read_bytes()
        file.unlink()
        if damage != "gone":
            file.write_bytes(content[: len(content) // 2] if damage == "cut" else bytes(len(content)))
    index = VideoIndex.load(tmp_path / "bad")
    query = np.ones((1, 8), np.float32)
    calls = {
        "search": lambda: index.search(query),
        "search with a condition": lambda: index.search(query, where="path like '%7%'"),
        "rows": lambda: index.rows,
        "features": lambda: index.features,
        "median": lambda: index.median_score(query[0]),
        "optimize": lambda: index.optimize(exact_rows=1),
        "known files": lambda: known_files(index.table, index.folder),
        "prune": lambda: prune(tmp_path / "bad"),
        "merge": lambda: merge([tmp_path / "bad"], tmp_path / "new"),
        "merge into": lambda: merge([tmp_path / "good"], tmp_path / "bad"),
        "export": lambda: export(tmp_path / "bad", tmp_path / "x.parquet"),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match="the index '.*/bad' is damaged .*: put its folder back") as caught:
            call()
        assert ".rs" not in str(caught.value) and "LanceError" not in str(caught.value), name
        assert len(str(caught.value)) < 400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good"]


def test_what_made_it_is_in_the_table(index):
    assert json.loads(index.table.schema.metadata[b"bt_adapter"]) == index.info == INFO
