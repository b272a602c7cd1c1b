"""Index videos with Ray Data, on one machine or on a cluster; what a lost worker had in hand is encoded again.

    pip install 'ray[data]'
    python examples/index_with_ray.py ~/videos -o videos.index --workers 2
    python examples/index_with_ray.py paths.txt -o films.index --model org/my-model --workers 64 --gpus 1 \
        --window 8 --stride 4

The workers read the paths themselves, so they lie on a disk that all of them see; one process, this one, writes the
table, and what is in it already is not encoded again. Files that cannot be read are listed in skipped.jsonl.
"""

import argparse
import os
import sys

import ray

from bt_adapter_hf.search.batches import EncodeVideos, write_rows
from bt_adapter_hf.search.encoding import VideoEncoder
from bt_adapter_hf.search.files import find_videos
from bt_adapter_hf.search.moments import Windows
from bt_adapter_hf.search.writer import IndexWriter


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("videos", nargs="+", help="folders and patterns, or a .txt file with a path on each line")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--model")
    parser.add_argument("--workers", type=int, default=2, help="processes that hold a model each")
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    parser.add_argument("--batch-size", type=int, default=16, help="files that a worker takes at once")
    parser.add_argument("--window", type=float)
    parser.add_argument("--stride", type=float)
    args = parser.parse_args()
    if args.stride is not None and args.window is None:
        parser.error("--stride goes with --window")
    windows = None
    try:
        if args.window is not None:
            windows = (args.window, args.window / 2 if args.stride is None else args.stride)
            Windows(*windows)
        if len(args.videos) == 1 and args.videos[0].endswith(".txt"):
            with open(args.videos[0], encoding="utf-8") as file:
                paths = [os.path.abspath(line.strip()) for line in file if line.strip()]
        else:
            paths = find_videos(args.videos)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    ray.init(ignore_reinit_error=True)
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks, context.raise_original_map_exception = 0, True  # an error of the program is one
    encoder = VideoEncoder.from_pretrained(args.model, device="cpu", dtype="float32")  # says what made the vectors
    with IndexWriter(args.output, encoder, windows and Windows(*windows)) as writer:
        missing = writer.missing(paths)
        if missing:
            # In blocks from the start: `repartition` would wait for a core where the workers hold all of them.
            blocks = -(-len(missing) // args.batch_size)
            rows = ray.data.from_items([{"path": path} for path in missing], override_num_blocks=blocks)
            rows = rows.map_batches(
                EncodeVideos,
                fn_constructor_kwargs={"model": args.model, "windows": windows, "dtype": "float32"},
                batch_size=args.batch_size,
                compute=ray.data.ActorPoolStrategy(size=min(args.workers, blocks)),
                num_gpus=args.gpus,
                max_restarts=4,  # of a worker that is lost
                max_task_retries=4,  # of the batch that it had
            )
            try:
                for batch in rows.iter_batches(batch_size=None):
                    write_rows(writer, batch)
            except ray.exceptions.RayTaskError as error:  # of a worker, such as that it has no model
                reason = str(error.cause).splitlines()[0]
                sys.exit(f"error: {reason} What was encoded is in {args.output}; the same command goes on.")
    print(f"{args.output}: {len(missing) - len(writer.skipped)} videos added, {len(writer.skipped)} skipped")


if __name__ == "__main__":
    main()
