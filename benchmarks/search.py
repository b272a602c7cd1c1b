"""A large index searched: LanceDB as `bt-adapter index` and `search` use it, beside a plain product and FAISS.

    python benchmarks/search.py                     # 1,000,000 rows of 512 numbers; 5 GB of disk
    python benchmarks/search.py --rows 100000       # where a search still compares with all rows

Vectors are drawn by chance with a spectrum that falls like 1/sqrt(i), as features of images roughly do; without, in
512 dimensions alike, every index of neighbours does worse. FAISS is left out where it is not installed. Opening and
searching are measured in a process of their own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bt_adapter_hf.import_utils import is_available
from bt_adapter_hf.search.index import VideoIndex
from bt_adapter_hf.search.table import create_table, to_arrow


QUERIES = 100


def draw(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    vectors = rng.normal(size=(rows, dim)).astype(np.float32) * np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def row_of_window(number: int) -> dict:
    """Films of 20 windows each. Columns that hold the same everywhere would be slower to read than those of videos."""
    film, start = number // 20, 4.0 * (number % 20)
    return {
        "path": f"/videos/{film:08d}.mp4", "start": start, "end": start + 8, "size": 7919 * film % 10**8,
        "mtime_ns": 1_700_000_000 * 10**9 + 1_000_003 * film, "duration": 84.0 + film % 4,
        "fps": 25.0 + 5 * (film % 2), "width": 640 * (1 + film % 3), "height": 360 * (1 + film % 3),
        "total_num_frames": 2100 + film % 100, "timestamps": [start + 0.5 + second for second in range(8)],
    }  # fmt: skip


def write(folder: Path, rows: int, dim: int, at_once: int = 100_000) -> float:
    """Writes rows as indexing does, a transaction each time; returns the seconds of the last one."""
    info = {
        "format": 2, "model": None, "revision": None, "fingerprint": "", "dtype": "float32", "dim": dim,
        "settings": {}, "moments": None,
    }  # fmt: skip
    rng, table = np.random.default_rng(0), None
    for start in range(0, rows, at_once):
        count = min(at_once, rows - start)
        rows_now = [row_of_window(number) for number in range(start, start + count)]
        vectors = draw(rng, count, dim)
        begun = time.monotonic()
        data = to_arrow(info, rows_now, vectors)
        if table is None:
            table = create_table(folder, data)
        else:
            table.add(data)
        seconds = time.monotonic() - begun
    return seconds


def search(folder: str, exact: bool) -> dict:
    """In a fresh process that has imported what it needs: open and first query, then one query after the other."""
    import lancedb  # noqa: F401

    dim = json.loads((Path(folder) / "dim.json").read_text())
    queries = draw(np.random.default_rng(1), QUERIES, dim)
    imported = peak()
    with stopwatch() as first:
        index = VideoIndex.load(folder)
        index.search(queries[:1], 10, exact=exact)
    times, found = [], []
    for query in queries[: 10 if exact else QUERIES]:
        with stopwatch() as taken:
            (hits,) = index.search(query[None], 10, exact=exact)
        times.append(taken)
        found.append([(hit.row["path"], hit.row["start"]) for hit in hits])
    return {
        "first": first, "median": np.median(times, axis=0).tolist(), "imported": imported, "memory": peak(),
        "found": found,
    }  # fmt: skip


@contextmanager
def stopwatch():
    """Seconds on the clock, and of the processor, all threads together."""
    begun, seconds = (time.monotonic(), time.process_time()), []
    yield seconds
    seconds += [time.monotonic() - begun[0], time.process_time() - begun[1]]


def peak() -> float:
    """MiB that this process has had in memory at once, on Linux; `ru_maxrss` would count the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def in_its_own_process(folder: Path, exact: bool) -> dict:
    argv = [sys.executable, __file__, "--search", str(folder), *(["--exact"] if exact else [])]
    return json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="to keep the index in; it is written if it is not there")
    parser.add_argument("--search", help=argparse.SUPPRESS)
    parser.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.search:
        print(json.dumps(search(args.search, args.exact)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "index"
        if not folder.exists():
            folder.mkdir(parents=True)
            print(f"append of the last 100,000 rows   {write(folder, args.rows, args.dim):8.1f} s")
            (folder / "dim.json").write_text(json.dumps(args.dim))
        index = VideoIndex.load(folder)
        built = index.optimize()
        if built.at_10 is not None:
            print(f"index of neighbours built in      {built.seconds:8.1f} s, recall@10 of rows {built.at_10:.3f}")
        queries, vectors = draw(np.random.default_rng(1), QUERIES, args.dim), index.features
        rows = [tuple(row.values()) for batch in index._batches(["path", "start"]) for row in batch.to_pylist()]
        with stopwatch() as taken:
            best = [np.argsort(-(vectors @ query), kind="stable")[:10] for query in queries[:10]]
        print(
            f"numpy, a product with all rows    {100 * taken[0]:8.1f} ms a query, {100 * taken[1]:.1f} of the "
            "processor"
        )
        best += [np.argpartition(-(vectors @ query), 10)[:10] for query in queries[10:]]
        if is_available("faiss"):
            import faiss

            flat = faiss.IndexFlatIP(args.dim)
            with stopwatch() as filled:
                flat.add(vectors)
            with stopwatch() as taken:
                for query in queries[:10]:
                    flat.search(query[None], 10)
            print(
                f"FAISS flat                        {100 * taken[0]:8.1f} ms a query, {100 * taken[1]:.1f} of the ",
                end="",
            )
            print(f"processor; {filled[0]:.1f} s to fill")
            del flat
        del vectors
        for exact in (False, True):
            found = in_its_own_process(folder, exact)
            right = [
                len({tuple(row) for row in some} & {rows[number] for number in numbers}) / 10
                for some, numbers in zip(found["found"], best, strict=False)
            ]
            name = "LanceDB, comparing with all" if exact else "LanceDB, as searched by default"
            (wall, processor), first = found["median"], found["first"]
            print(
                f"{name:<33} {1000 * wall:8.1f} ms a query, {1000 * processor:.1f} of the processor; open and first "
                f"{first[0]:.2f} s, {first[1]:.2f} of the processor; recall@10 {np.mean(right):.3f}; "
                f"{found['memory']:.0f} MiB, {found['imported']:.0f} of them before"
            )


if __name__ == "__main__":
    main()
