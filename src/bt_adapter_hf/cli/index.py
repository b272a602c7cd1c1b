"""`bt-adapter index`: features of all videos under a folder, resumable."""

import argparse
import json
import sys
from pathlib import Path

from ._options import add_model_options, load_encoder, path, print_skipped, progress


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "index",
        help="make video files searchable",
        description="Decode the videos in folders, patterns and files and store their features, with what made them, "
        "in the folder INDEX. Stop it at any time: the same command goes on where it stopped, and later adds what is "
        "new or has changed and takes out what is gone. Files that cannot be read are counted and listed in "
        "INDEX/skipped.jsonl.",
        epilog="example: bt-adapter index ~/videos 'clips/**/*.mp4' -o videos.index",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "videos", nargs="+", type=path, metavar="DIR_OR_GLOB", help="folder, glob pattern (** too) or file"
    )
    parser.add_argument(
        "-o", "--output", required=True, type=path, metavar="INDEX", help="folder of the index, new or existing"
    )
    add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..search.files import find_videos
    from ..search.index import IndexWriter
    from ..search.store import check_writable, read_info

    paths = find_videos(args.videos)
    check_writable(args.output)
    known = read_info(Path(args.output))
    if known is not None and args.dtype == "auto":  # wherever it was made
        args.dtype = known["dtype"]
    encoder = load_encoder(args)
    with IndexWriter(args.output, encoder) as writer:
        update = writer.update(
            paths,
            args.videos,
            batch_size=args.batch_size,
            workers=args.workers,
            progress=lambda videos, total: progress(videos, total, "index"),
        )
    skipped = len(update.skipped)
    if args.json:
        summary = {"index": args.output, "added": update.added, "present": update.present}
        seconds = {stage: round(value, 3) for stage, value in encoder.stopwatch.seconds.items()}
        print(json.dumps({**summary, "gone": update.gone, "skipped": skipped, "seconds": seconds}, indent=2))
    else:
        gone = f", {update.gone} gone and taken out" if update.gone else ""
        print(f"{args.output}: {update.added} videos added, {update.present} already there, {skipped} skipped{gone}")
        if update.added:
            shares = (f"{stage} {share:.0%}" for stage, share in encoder.stopwatch.shares().items())
            print(f"where the time went: {', '.join(shares)}")
        print_skipped(update.skipped, sys.stdout)
        if skipped:
            print(f"all skipped files and why: {args.output}/skipped.jsonl")
    if update.added + update.present == 0:
        print("bt-adapter index: error: none of the files could be read", file=sys.stderr)
        return 1
    return 0
