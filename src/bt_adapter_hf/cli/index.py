"""`bt-adapter index`: features of all videos under a folder, resumable; and what is done to indices."""

import argparse
import json
import sys

from ._options import add_model_options, load_encoder, path, print_skipped, progress, real_number


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "index",
        help="make video files searchable",
        usage="bt-adapter index DIR_OR_GLOB [DIR_OR_GLOB ...] -o INDEX [options]\n"
        "       bt-adapter index --optimize -o INDEX\n"
        "       bt-adapter index merge INDEX_OR_PARQUET [INDEX_OR_PARQUET ...] -o INDEX\n"
        "       bt-adapter index export INDEX OUT.parquet\n"
        "       bt-adapter index convert INDEX [-o INDEX]",
        description="Decode the videos in folders, patterns and files and store their features, with what made them, "
        "in the folder INDEX, a LanceDB table. Stop it at any time: the same command goes on where it stopped, and "
        "later adds what is new, replaces what has changed, and with --prune takes out what is gone. Files that "
        "cannot be read are counted and listed in INDEX/skipped.jsonl. The words merge, export and convert come "
        "first: make one index of several, write one to a Parquet file, turn one of an older version into a table. (A "
        "folder of such a name is ./merge.)",
        epilog="examples:\n  bt-adapter index ~/videos 'clips/**/*.mp4' -o videos.index\n"
        "  bt-adapter index ~/films -o films.index --window 8 --stride 4\n"
        "  bt-adapter index merge a.index b.index -o all.index",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "videos", nargs="*", type=path, metavar="DIR_OR_GLOB", help="folder, glob pattern (** too) or file"
    )
    parser.add_argument("-o", "--output", type=path, metavar="INDEX", help="folder of the index, new or existing")
    parser.add_argument(
        "--window",
        type=real_number(0, above=True),
        metavar="SECONDS",
        help="find moments: a row for every window of so many seconds; shorter videos are one row (default: a row "
        "for each video)",
    )
    parser.add_argument(
        "--stride",
        type=real_number(0, above=True),
        metavar="SECONDS",
        help="a window begins every so many seconds (default: half of --window)",
    )
    parser.add_argument(
        "--prune", action="store_true", help="take out the files that are gone; without it, search marks them"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="with --prune: also where nothing is left in a folder, as when a disk is not mounted",
    )
    parser.add_argument(
        "--optimize",
        action="store_true",
        help="put small parts together and, above the size where comparing with all rows is fast enough, build an "
        "index of neighbours and print its recall",
    )
    add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    words = {"merge": _merge, "export": _export, "convert": _convert}
    if args.videos[:1] and args.videos[0] in words:
        _refuse_others(args, {"videos", "json", *(() if args.videos[0] == "export" else ("output",))})
        return words[args.videos[0]](args, args.videos[1:])
    if args.output is None:
        args.parser.error("the following arguments are required: -o/--output")
    if not args.videos and not (args.optimize or args.prune):
        args.parser.error("name folders, patterns or files with videos (or --optimize, or --prune)")
    if args.stride is not None and args.window is None:
        args.parser.error("argument --stride: it goes with --window")
    if args.force and not args.prune:
        args.parser.error("argument --force: it goes with --prune")
    return _index(args) if args.videos else _maintain(args)


def _index(args: argparse.Namespace) -> int:
    from ..hub.machine import processes_now
    from ..search.files import find_videos
    from ..search.moments import Windows
    from ..search.pipeline import STAGES
    from ..search.ranks import encode_together
    from ..search.table import check_writable, has_table, open_table
    from ..search.writer import IndexWriter, encode_by

    windows = None if args.window is None else Windows(args.window, args.stride or args.window / 2)
    first = processes_now()[0] == 0
    paths = find_videos(args.videos) if first else []
    if first:
        check_writable(args.output)
    if has_table(args.output) and args.dtype == "auto":
        args.dtype = open_table(args.output)[1]["dtype"]  # wherever it was made
    encoder = load_encoder(args)
    if not first:
        for _ in encode_together(None, lambda part: encode_by(windows, encoder, part, args.batch_size, args.workers)):
            pass
        return 0
    with IndexWriter(args.output, encoder, windows) as writer:
        update = writer.update(
            paths,
            args.videos,
            prune=args.prune,
            force=args.force,
            together=True,
            batch_size=args.batch_size,
            workers=args.workers,
            progress=lambda videos, total: progress(videos, total, "index"),
        )
    skipped, kept = len(update.skipped), update.gone - update.pruned
    moments = {} if windows is None or writer.table is None else {"moments": writer.table.count_rows()}
    done = update.added + update.present > 0
    optimized = _optimize(args.output) if args.optimize and done else None
    if args.json:
        counts = {"added": update.added, "present": update.present, "gone": update.gone, "pruned": update.pruned}
        seconds = {stage: round(encoder.stopwatch.seconds[stage], 3) for stage in STAGES}
        summary = {"index": args.output, **counts, "skipped": skipped, **moments, "seconds": seconds}
        if optimized is not None:
            summary["optimized"] = _as_json(optimized)
        print(json.dumps(summary, indent=2))
    else:
        gone = f", {update.pruned} gone and taken out" if update.pruned else ""
        gone += f", {kept} gone (--prune takes them out)" if kept else ""
        print(
            f"{args.output}: {update.added} videos added, {update.present} already there, {skipped} skipped{gone}"
            + (f"; {moments['moments']} moments" if moments else "")
        )
        if update.added:
            shares = (f"{stage} {share:.0%}" for stage, share in encoder.stopwatch.shares().items())
            print(f"where the time went: {', '.join(shares)}")
        if moments.get("moments") == update.added + update.present:
            print(f"no video is longer than --window {windows.window:g}: each is one row")
        print_skipped(update.skipped, sys.stdout)
        if skipped:
            print(f"all skipped files and why: {args.output}/skipped.jsonl")
        if optimized is not None:
            print(_in_words(optimized))
    if not done:
        reason = "none of the files could be read"
        if all("is not finite" in line["reason"] for line in update.skipped):
            reason = "the model gives no finite feature of any video: try --dtype float32, or its weights are damaged"
        print(f"bt-adapter index: error: {reason}", file=sys.stderr)
        return 1
    return 0


def _maintain(args: argparse.Namespace) -> int:
    """`--prune` and `--optimize` of an index, without videos and so without a model."""
    from ..search.writer import prune

    _refuse_others(args, {"output", "optimize", "prune", "force", "json"})
    pruned = prune(args.output, args.force) if args.prune else None
    optimized = _optimize(args.output) if args.optimize else None
    if args.json:
        counts = {} if pruned is None else {"pruned": pruned}
        more = {} if optimized is None else {"optimized": _as_json(optimized)}
        print(json.dumps({"index": args.output, **counts, **more}, indent=2))
        return 0
    if pruned is not None:
        print(f"{args.output}: {pruned} gone and taken out")
    if optimized is not None:
        print(_in_words(optimized))
    return 0


def _optimize(folder: str):
    from ..search.index import VideoIndex
    from ..search.writer import locked

    index = VideoIndex.load(folder)
    with locked(folder):
        return index.optimize()


def _as_json(built) -> dict:
    return {"rows": built.rows, "recall_at_10": built.at_10, "seconds": built.seconds}


def _in_words(built) -> str:
    from ..search.index import EXACT_ROWS

    if built.at_10 is None:
        return f"{built.rows} rows: a search compares with all of them, which is fast up to {EXACT_ROWS}"
    return (
        f"{built.rows} rows: an index of neighbours was built in {built.seconds:.0f} s; of the 10 nearest rows it "
        f"finds {built.at_10:.1%} (recall@10 of 100 rows against comparing with all)"
    )


def _merge(args: argparse.Namespace, sources: list[str]) -> int:
    from ..search.exchange import merge

    if not sources or args.output is None:
        args.parser.error("merge takes the indices to put together, and -o INDEX")
    return _done(args, args.output, merge(sources, args.output))


def _export(args: argparse.Namespace, names: list[str]) -> int:
    from ..search.exchange import export

    if len(names) != 2:
        args.parser.error("export takes an index and the name of a Parquet file")
    return _done(args, names[1], export(*names))


def _convert(args: argparse.Namespace, names: list[str]) -> int:
    from ..search.exchange import convert

    if len(names) != 1:
        args.parser.error("convert takes one index")
    return _done(args, args.output or names[0], convert(names[0], args.output))


def _done(args: argparse.Namespace, output: str, rows: int) -> int:
    print(json.dumps({"output": output, "rows": rows}, indent=2) if args.json else f"{output}: {rows} rows")
    return 0


def _refuse_others(args: argparse.Namespace, known: set[str]) -> None:
    """An option that would do nothing is an error."""
    for name, value in vars(args).items():
        if name not in {*known, "videos", "command", "debug"} and value != args.parser.get_default(name):
            args.parser.error(f"argument --{name.replace('_', '-')}: it is for indexing videos")
