"""The bounded folder of fetched shards: right rows, never more bytes than allowed, nothing left after a crash."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import datasets
import psutil
import pytest
import torch

from bt_adapter_hf.data import chunk_store, media, readers
from bt_adapter_hf.data.chunk_folder import has_row, shard_path
from bt_adapter_hf.data.chunk_store import ChunkStoreError, discard
from bt_adapter_hf.data.order import EpochOrder, OrderSampler, RowOrder
from bt_adapter_hf.data.pairs import PairCollator, PairDataset, load_table
from bt_adapter_hf.data.readers import Record
from bt_adapter_hf.data.sources import BrokenRowError
from tests import tiny_pairs
from tests.data.packed import GivenOrder, file_server, largest_size, rows_of, write_parquet


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return rows_of(tiny_pairs.write_table(tmp_path_factory.mktemp("clips"), rows=24).parent)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def table(rows, tmp_path):
    """24 rows in 8 shards; about 1.3 MB a shard."""
    padded = [(name, data + bytes(400_000), text) for name, data, text in rows]
    table = load_table(write_parquet(tmp_path / "t.parquet", padded, group=3))
    assert table.shard_rows == [3] * 8
    yield table
    if table.store is not None:
        table.store.close()


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def shards_in(folder: Path) -> set[int]:
    return {int(path.name[6:12]) for path in folder.glob("shard-*.rows")}


def check_row(table, rows, row):
    video, name, texts = table.pair(row)
    assert (video[: len(rows[row][1])], name, texts) == (rows[row][1], rows[row][0], [rows[row][2]])


def test_rows_come_in_the_order_of_training_within_the_bound(table, rows, tmp_path):
    order = EpochOrder(table.shard_rows, seed=1, chunk_rows=6)
    bound = 6 * 1_300_000  # two chunks are four shards
    folder = tmp_path / "store"
    with largest_size(folder) as seen:
        store = table.use_store(folder, bound, order)
        for position in range(3 * len(rows)):  # each epoch in another order
            _, row = order.row(position)
            check_row(table, rows, row)
            store.advance(position + 1)
        check_row(table, rows, 0)  # any other row may be asked for too
        check_row(table, rows, 23)
    assert 4 * 1_200_000 < seen[0] <= bound
    store.close()
    assert not folder.exists()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_loader_workers_read_what_the_store_fetches(table, rows, tmp_path, workers):
    order = EpochOrder(table.shard_rows, seed=0, chunk_rows=8)
    store = table.use_store(tmp_path / "store", 9 * 1_300_000, order, position=5)
    dataset = PairDataset(table, tiny_pairs.processor(), training=True)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=4,
        sampler=OrderSampler(order, 5, 36),
        collate_fn=PairCollator(tiny_pairs.processor()),
        num_workers=workers,
    )
    position, found = 5, []
    for batch in loader:
        found += batch["pair_ids"].tolist()
        position += 4
        store.advance(position)
    assert found == [order.row(position)[1] for position in range(5, 41)]


def test_a_table_that_fits_is_fetched_once(table, rows, tmp_path):
    folder = tmp_path / "store"
    store = table.use_store(folder, None, EpochOrder(table.shard_rows, seed=0, chunk_rows=5))
    for row in range(24):
        check_row(table, rows, row)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.rows")}
    assert len(times) == 8
    for position in range(0, 72, 5):
        store.advance(position)
        time.sleep(0.03)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.rows")} == times


def test_the_order_of_evaluation_starts_again(table, rows, tmp_path):
    order = RowOrder([3, 0, 2, 4], chunk_rows=4)
    chunks = order.chunks(0)
    assert [tuple(next(chunks)) for _ in range(3)] == [(0, 0, 5, [0, 1, 2]), (0, 5, 9, [3]), (1, 9, 14, [0, 1, 2])]
    assert next(order.chunks(15)) == (1, 14, 18, [3])
    store = table.use_store(tmp_path / "store", 6 * 1_300_000, RowOrder(table.shard_rows, chunk_rows=3))
    for _ in range(2):
        store.advance(0)
        for row in range(24):
            check_row(table, rows, row)
            store.advance(row + 1)


def test_nothing_is_fetched_for_what_comes_after_the_end(table, rows, tmp_path):
    order = EpochOrder(table.shard_rows, seed=0, chunk_rows=3)
    chunks = order.chunks()
    (first,), (second,) = next(chunks).shards, next(chunks).shards
    store = table.use_store(tmp_path / "store", None, order, stop=4)
    for position in range(4):
        check_row(table, rows, order.row(position)[1])
        store.advance(position + 1)
    time.sleep(0.5)
    assert shards_in(store.folder) == {first, second}
    other = next(iter(set(range(8)) - {first, second}))
    check_row(table, rows, 3 * other)  # but what is asked for is


def test_what_is_kept_is_not_fetched_again(table, rows, tmp_path):
    folder = tmp_path / "store"
    times = []
    for _ in range(2):
        store = table.use_store(folder, 6 * 1_300_000, RowOrder(table.shard_rows, chunk_rows=3), stop=12)
        for row in range(12):
            check_row(table, rows, row)
        store.close(keep=True)
        times.append({path: path.stat().st_mtime_ns for path in folder.glob("shard-*.rows")})
    assert len(times[0]) == 4 and times[0] == times[1]
    discard(folder)
    assert not folder.exists()
    discard(folder)


@pytest.mark.parametrize(
    "shards, kept",
    [
        ([0, 1, 2, 3, 4, 5], {2, 3, 4, 5}),
        ([0, 1, 2, 0, 3, 4], {0, 2, 3, 4}),  # 0 was needed again after 1
    ],
)
def test_what_was_needed_longest_ago_goes_first(table, rows, tmp_path, shards, kept):
    """So that a shard that comes again soon need not be fetched again."""
    order = GivenOrder(shards, rows=3)
    store = table.use_store(tmp_path / "store", int(4.5 * 1_250_000), order, stop=18)
    for position in range(18):
        shard = shards[position // 3]
        check_row(table, rows, 3 * shard + position % 3)
        following = shards[position // 3 + 1 : position // 3 + 2]
        wait_until(lambda following=following: set(following) <= shards_in(store.folder))
        store.advance(position + 1)
    assert shards_in(store.folder) == kept


def test_too_small_a_bound_is_said_with_numbers(table, tmp_path):
    order = EpochOrder(table.shard_rows, seed=0, chunk_rows=6)
    store = table.use_store(tmp_path / "store", 3_000_000, order)
    message = (
        r"4 shards are needed at a time, with 12 rows; 2 of them take 2\.\d MB, the next .* or more, and only 3.0 MB"
    )
    with pytest.raises(ChunkStoreError, match=message):
        for row in range(24):
            table.pair(row)
    with pytest.raises(ChunkStoreError, match="Raise max_disk, or lower chunk_rows .now 6."):
        store.advance(3)
        store.advance(6)
    assert sum(path.stat().st_size for path in (tmp_path / "store").iterdir()) < 3_000_000


def test_a_shard_that_does_not_fit_alone(table, tmp_path):
    table.use_store(tmp_path / "store", 1_000_000, EpochOrder(table.shard_rows, seed=0, chunk_rows=1))
    with pytest.raises(ChunkStoreError, match=r"a shard with 3 rows takes 1\.\d MB or more, .* smaller shards"):
        table.pair(0)


def test_no_disk_left(table, rows, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        (folder / "store").mkdir()
        table.use_store(folder / "store", None, EpochOrder(table.shard_rows, seed=0, chunk_rows=24))
        with pytest.raises(
            ChunkStoreError, match="no disk space left: .* are free, .* MB.* checkpoints are not touched"
        ):
            for row in range(24):
                check_row(table, rows, row)
        table.store.close()
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_source_that_changes_or_goes_away(table, rows, tmp_path):
    order = EpochOrder(table.shard_rows, seed=0, chunk_rows=3)
    path = tmp_path / "t.parquet"
    store = table.use_store(tmp_path / "store", 3 * 1_300_000, order)
    table.pair(order.row(0)[1])
    wait_until(lambda: len(shards_in(store.folder)) >= 2)
    write_parquet(path, [(name, b"other", text) for name, _, text in rows[:6]], group=3)
    with pytest.raises(ChunkStoreError, match="Fetching .*t.parquet to .* failed"):
        for position in range(24):
            store.advance(position)
            table.pair(order.row(position)[1])


def test_a_fetching_process_that_dies_is_noticed(table, tmp_path):
    order = EpochOrder(table.shard_rows, seed=0, chunk_rows=3)  # so that it fetches two shards, and then waits
    store = table.use_store(tmp_path / "store", None, order)
    psutil.Process(store._process.pid).kill()
    with pytest.raises(ChunkStoreError, match="process that fetches was killed"):
        for row in range(24):
            table.pair(row)
    with pytest.raises(ChunkStoreError, match="process that fetches was killed"):
        store.advance(1)
    assert store is table.store


def test_folders_that_are_refused(table, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_store, "LOCK_SECONDS", 0.2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds other files .thesis.txt.: .* empty folder"):
        table.use_store(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    with pytest.raises(ValueError, match="max_disk=0"):
        table.use_store(tmp_path / "store", 0)
    first = table.use_store(tmp_path / "store")
    with pytest.raises(ChunkStoreError, match="in use by another run"):
        table.use_store(tmp_path / "store")
    table.pair(0)
    discard(tmp_path / "store")  # of a run that was refused
    assert shards_in(tmp_path / "store") and list((tmp_path / "store").glob("*.lock"))
    first.close()
    assert not (tmp_path / "store").exists()
    table.use_store(tmp_path / "store").close()


KILLED = """
import sys
import datasets
from bt_adapter_hf.data.order import EpochOrder
from bt_adapter_hf.data.sources import load_table
datasets.config.HF_DATASETS_CACHE = {cache!r}
table = load_table({table!r})
order = EpochOrder(table.shard_rows, seed=3, chunk_rows=6)
store = table.use_store({folder!r}, {bound}, order)
for position in range(10):
    table.pair(order.row(position)[1])
    store.advance(position + 1)
print("at 10", flush=True)
sys.stdin.read()
"""


def test_a_killed_run_leaves_no_process_and_no_growth(table, rows, tmp_path):
    folder, bound = tmp_path / "store", 6 * 1_300_000
    code = KILLED.format(
        cache=str(tmp_path / "cache"),
        table=str(tmp_path / "t.parquet"),
        folder=str(folder),
        bound=bound,
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as run:
        assert run.stdout.readline() == "at 10\n"
        (fetcher,) = psutil.Process(run.pid).children()
        os.kill(run.pid, signal.SIGKILL)
        wait_until(lambda: not fetcher.is_running() or fetcher.status() == psutil.STATUS_ZOMBIE, 10)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= bound + 1000
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*.rows")}
    assert kept
    # what else a crash may leave: a shard half written, a name without its content, a request
    cut = sorted(kept)[0]
    cut.write_bytes(cut.read_bytes()[:5000])
    (folder / ".error.txt.1.partial").write_bytes(b"x" * 5000)
    (folder / "wanted-7").touch()
    (folder / "error.txt").write_text("of the run before")

    order = EpochOrder(table.shard_rows, seed=3, chunk_rows=6)
    with largest_size(folder) as seen:
        store = table.use_store(folder, bound, order, position=10)
        assert not (folder / "error.txt").exists() and not list(folder.glob("*.partial"))
        assert all(path.stat().st_mtime_ns == kept[path] for path in folder.glob("shard-*") if path in kept)
        for position in range(10, 48):
            check_row(table, rows, order.row(position)[1])
            store.advance(position + 1)
    assert seen[0] <= bound


def test_shards_of_another_table_are_deleted(table, rows, tmp_path):
    folder = tmp_path / "store"
    (folder).mkdir()
    (folder / "store.json").write_text(json.dumps({"fingerprint": "another"}))
    (folder / "shard-000000.arrow").write_bytes(b"rows of another table")
    table.use_store(folder)
    check_row(table, rows, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dead_url_is_replaced_inside_its_shard(rows, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(readers, "ROWS_PER_SHARD", 4)
    served = tmp_path / "served"
    served.mkdir()
    for name, data, _ in rows[:12]:
        if name != "clip5.mp4":
            (served / name).write_bytes(data)
    with file_server(served) as (address, asked, _):
        lines = [json.dumps({"video": f"{address}/{name}", "text": text}) for name, _, text in rows[:12]]
        (tmp_path / "t.jsonl").write_text("\n".join(lines))
        table = load_table(tmp_path / "t.jsonl")
        table.use_store(tmp_path / "store")
        dataset = PairDataset(table, tiny_pairs.processor(), training=True, seed=1)
        collator = PairCollator(tiny_pairs.processor())
        batches = list(torch.utils.data.DataLoader(dataset, 4, collate_fn=collator, num_workers=workers))
        texts = [dataset[epoch, 5]["text"] for epoch in range(12)]
        table.store.close()
    assert [batch["pair_ids"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, -1, 6, 7], [8, 9, 10, 11]]
    (broken,) = batches[1]["broken"]
    assert broken["index"] == 5 and broken["video"].endswith("clip5.mp4") and "HTTP 404" in broken["reason"]
    assert {text[-1] for text in texts} == {"4", "6", "7"}
    assert len(asked) == 12  # each once; evaluation of the replacements asked for nothing


def test_a_shard_without_a_usable_row_is_replaced_from_others(rows, tmp_path):
    videos = [
        {"bytes": b"garbage" * 50 if row in (2, 3) else data, "path": name}
        for row, (name, data, _) in enumerate(rows[:8])
    ]
    table = load_table(write_parquet(tmp_path / "t.parquet", rows[:8], group=2, video=videos))
    # of the store's plan only the first shards; the others are fetched on demand
    store = table.use_store(tmp_path / "store", None, RowOrder(table.shard_rows, chunk_rows=1))
    dataset = PairDataset(table, tiny_pairs.processor(), training=False)
    item = dataset[3]
    assert (item["text"], item["pair_id"]) == (rows[4][2], -1)
    assert [record["index"] for record in item["broken"]] == [3, 2]
    store.close()


def test_a_server_that_drips_holds_back_its_own_row_only(rows, tmp_path):
    """The other rows of the shard can be read at once; its own is broken after the limit."""
    served = tmp_path / "served"
    served.mkdir()
    for name, data, _ in rows[:4]:
        (served / name).write_bytes(data)
    with file_server(served) as (address, _, _):
        urls = [f"{address}/drip/{rows[0][0]}", *(f"{address}/{name}" for name, _, _ in rows[1:4])]
        lines = [json.dumps({"video": url, "text": text}) for url, (_, _, text) in zip(urls, rows, strict=False)]
        (tmp_path / "t.jsonl").write_text("\n".join(lines))
        table = load_table(tmp_path / "t.jsonl")
        assert table.shard_rows == [4]
        store = table.use_store(tmp_path / "store", item_timeout=4.0)
        for row in (3, 1, 2):
            assert table.pair(row)[0] == rows[row][1]
        assert not has_row(shard_path(store.folder, 0), 0)
        started = time.monotonic()
        with pytest.raises(BrokenRowError, match="took longer than 4 s and was given up") as error:
            table.pair(0)
        assert error.value.name == urls[0] and time.monotonic() - started < 15
        store.close()


def test_a_full_disk_is_not_the_fault_of_a_video(rows, tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(rows[0][1])

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(media.SpooledTemporaryFile, "write", full)
    with file_server(tmp_path) as (address, _, _):
        with pytest.raises(OSError, match="No space left"):
            list(media.Media(None).fetch([(0, Record(None, f"{address}/clip.mp4", ["x"]))], 60.0))


def test_what_is_being_fetched_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "MEMORY_BYTES", 1 << 16)
    size, videos = 6 << 20, 10
    for number in range(videos):
        (tmp_path / f"{number}.mp4").write_bytes(bytes([number]) * size)
    with file_server(tmp_path) as (address, _, _):
        named = [(number, Record(None, f"{address}/{number}.mp4", [])) for number in range(videos)]
        tracemalloc.start()
        found = {}
        for number, record in media.Media(None).fetch(named, 60.0):
            found[number] = (len(record.video), record.video[-1])
            time.sleep(0.05)  # what takes the rows is slower than what fetches them
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert found == {number: (size, number) for number in range(videos)}
    assert peak < 0.7 * videos * size  # a few of them: one that is read, and what passes through the pipes
