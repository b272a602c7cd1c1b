"""What the data loader costs beside the work that it is there for: decoding, resizing and normalising clips.

    python benchmarks/loader.py                        # 16 clips of 10 s, 340 x 256, made for it; 0, 1 and 2 workers
    python benchmarks/loader.py --videos my/clips      # your own
    python benchmarks/loader.py --workers 0 4 8 --timeout 0

The plain loop calls `load_video` and the video processor on one clip after the other, in as many processes as the
loader has workers. The loader is torch's DataLoader over a PairDataset, with the time limit per item, tokenising and
batching; from files, and from parquet shards through the chunk store. Runs that are compared alternate.

"per core" divides by the processor time of all processes that take part, so it hardly depends on what else the
machine does; "of plain" are ratios to the plain loop.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import CLIPImageProcessorPil, CLIPTokenizer

from bt_adapter_hf import BTAdapterProcessor, BTAdapterVideoProcessor, load_video
from bt_adapter_hf.data.order import EpochOrder, OrderSampler
from bt_adapter_hf.data.pairs import PairCollator, PairDataset, load_table


SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif")


def make_clips(folder: Path, count: int) -> None:
    """H.264 clips of 300 frames, 340 x 256, about 0.5 MB each: a picture that drifts, and some noise."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (64, 85, 3), np.uint8)
    picture = np.kron(small, np.ones((8, 8, 1), np.uint8))
    for number in range(count):
        with av.open(str(folder / f"{number:03d}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast", "crf": "23"})
            stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
            for t in range(300):
                frame = picture[t // 2 : t // 2 + 256, t % 300 : t % 300 + 340].astype(np.int16)
                frame = np.clip(frame + rng.integers(-12, 12, frame.shape[:2])[..., None], 0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())


def processor(frames: int) -> BTAdapterProcessor:
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)
    return BTAdapterProcessor(CLIPImageProcessorPil(), BTAdapterVideoProcessor(num_frames=frames), tokenizer)


def work_alone(paths: list[str], frames: int) -> None:
    torch.set_num_threads(1)
    video_processor = processor(frames).video_processor
    for path in paths:
        clip, _ = load_video(path, num_frames=frames, sampling="jitter")
        clip = torch.from_numpy(clip).movedim(-1, 1)
        video_processor(videos=[clip], do_sample_frames=False, return_tensors="pt")


def processor_seconds() -> float:
    """Of this process and of all that descend from it and live."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))


class Plain:
    """The work alone, in `workers` processes (or in one)."""

    def __init__(self, paths: list[str], frames: int, workers: int):
        self.pool = multiprocessing.get_context("fork").Pool(max(workers, 1))
        self.paths, self.frames, self.workers = paths, frames, max(workers, 1)

    def run(self) -> None:
        shares = [(self.paths[i :: self.workers], self.frames) for i in range(self.workers)]
        self.pool.starmap(work_alone, shares, chunksize=1)

    def close(self) -> None:
        self.pool.terminate()
        self.pool.join()


class Loader:
    """A DataLoader whose workers live on, as they do through a long epoch."""

    def __init__(self, source: Path, rounds: int, frames: int, workers: int, timeout: float | None, store: Path):
        table = load_table(source)
        order = EpochOrder(table.shard_rows, seed=0, chunk_rows=8)
        self.store = table.use_store(store, None, order) if table.needs_store else None
        self.rows = rounds * len(table)
        words = processor(frames)
        self.loader = torch.utils.data.DataLoader(
            PairDataset(table, words, training=True, item_timeout=timeout),
            batch_size=8,
            sampler=OrderSampler(order, 0, self.rows),
            collate_fn=PairCollator(words),
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        self.position = 0

    def run(self) -> None:
        for batch in self.loader:
            assert not batch["broken"], batch["broken"]

    def close(self) -> None:
        del self.loader
        if self.store is not None:
            self.store.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=Path, help="folder of videos (default: clips made for it)")
    parser.add_argument("--clips", type=int, default=16, help="clips to make (default: 16)")
    parser.add_argument("--rounds", type=int, default=2, help="times that a run reads every clip (default: 2)")
    parser.add_argument("--frames", type=int, default=8, help="frames per clip (default: 8)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds per item, 0: no limit (default: 60)")
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs, of which the median counts")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.videos
        if folder is None:
            folder = Path(scratch) / "clips"
            folder.mkdir()
            make_clips(folder, options.clips)
        videos = sorted(path.resolve() for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        files = pa.table({"video": [str(path) for path in videos], "text": ["a clip"] * len(videos)})
        pq.write_table(files, Path(scratch) / "files.parquet")
        packed = [{"bytes": path.read_bytes(), "path": path.name} for path in videos]
        packed = pa.table({"video": packed, "text": ["a clip"] * len(videos)})
        pq.write_table(packed, Path(scratch) / "packed.parquet", row_group_size=4)
        size = sum(path.stat().st_size for path in videos) / len(videos) / 1e6
        print(
            f"{len(videos)} clips of {size:.2f} MB on average, {options.frames} frames each; {os.cpu_count()} cores, "
            f"time limit {options.timeout or 'off'}\n"
        )
        print(f"{'workers':>7}  {'what':<24}{'clips/s':>9}{'of plain':>9}{'per core':>10}{'of plain':>9}")
        paths = [str(path) for path in videos] * options.rounds
        for workers in options.workers:
            report(Path(scratch), paths, workers, options)


def report(scratch: Path, paths: list[str], workers: int, options: argparse.Namespace) -> None:
    timeout = options.timeout or None
    runs = {"plain loop": Plain(paths, options.frames, workers)}
    for name, source in (("loader, files", "files.parquet"), ("loader, parquet shards", "packed.parquet")):
        store = scratch / f"store{workers}"
        runs[name] = Loader(scratch / source, options.rounds, options.frames, workers, timeout, store)
    walls, cores = {name: [] for name in runs}, {name: [] for name in runs}
    for repeat in range(options.repeats + 1):
        for name, run in runs.items():
            wall, core = time.perf_counter(), processor_seconds()
            run.run()
            wall, core = time.perf_counter() - wall, processor_seconds() - core
            if repeat:  # the first starts processes
                walls[name].append(len(paths) / wall)
                cores[name].append(len(paths) / core)
    for run in runs.values():
        run.close()
    for name in runs:
        wall, core = statistics.median(walls[name]), statistics.median(cores[name])
        plain_wall, plain_core = statistics.median(walls["plain loop"]), statistics.median(cores["plain loop"])
        print(
            f"{workers:>7}  {name:<24}{wall:>9.2f}{wall / plain_wall:>9.2f}{core:>10.2f}{core / plain_core:>9.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
