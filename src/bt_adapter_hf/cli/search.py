"""`bt-adapter search`: the videos of an index, or the moments in them, that fit a text or an example best."""

import argparse
import csv
import json
import os
import sys

from ._options import add_device_option, path, quiet_transformers, real_number, whole_number


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "search",
        help="find videos, or moments in them, by text or by example",
        description="Print the videos of an index, or the moments where it has moments, whose features are nearest to "
        "a text, to each text of a file, or to another video or image; best first, by cosine.",
        epilog='examples:\n  bt-adapter search videos.index "a dog catches a frisbee" -k 5 --sheet hits.png\n'
        '  bt-adapter search films.index "a goal" --not "replay" --where "duration > 60 and path like \'%%/24/%%\'"\n'
        "  bt-adapter search films.index --like clip.mp4 --per-video --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("index", type=path, metavar="INDEX", help="folder made by `bt-adapter index`")
    parser.add_argument("text", nargs="?", help="what to look for")
    parser.add_argument("--queries", type=path, metavar="FILE", help="look for each line of a text file")
    parser.add_argument("--like", type=path, metavar="VIDEO_OR_IMAGE", help="look for what resembles this file")
    parser.add_argument("--not", dest="against", metavar="TEXT", help="turn away from what fits this text")
    parser.add_argument(
        "--where",
        metavar="SQL",
        help="only rows for which this holds; the columns are path, start, end, duration, width, height, fps, size, "
        "total_num_frames and mtime_ns",
    )
    parser.add_argument("-k", type=whole_number(), default=5, metavar="K", help="number of hits (default: 5)")
    parser.add_argument("--per-video", action="store_true", help="only the best moment of each file")
    parser.add_argument(
        "--overlap",
        type=real_number(0, 1),
        default=0.0,
        metavar="PART",
        help="moments of one file that share more than this part of their time with a better one are left out "
        "(default: 0, all that overlap)",
    )
    parser.add_argument("--exact", action="store_true", help="compare with all rows, whatever --optimize has built")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--csv", action="store_true", help="print CSV")
    parser.add_argument(
        "--sheet",
        type=path,
        metavar="PNG_OR_HTML",
        help="also write a contact sheet of the hits; one that ends in .html is a page that plays them",
    )
    parser.add_argument(
        "--model",
        type=path,
        metavar="ID_OR_PATH",
        help="where the index's model is now (default: where it was); another model is refused",
    )
    add_device_option(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    if sum(given is not None for given in (args.text, args.queries, args.like)) != 1:
        args.parser.error("give one of: a text, --queries, --like")
    if args.sheet and args.queries:
        args.parser.error("argument --sheet: it shows the hits of one query")
    quiet_transformers()
    from ..search.contact_sheet import check_sheet_path, write_contact_sheet
    from ..search.encoding import VideoEncoder
    from ..search.html_sheet import write_html_sheet
    from ..search.index import VideoIndex, combined

    if args.sheet:
        check_sheet_path(args.sheet, kinds=(".png", ".html"))
    names = _queries(args)
    index = VideoIndex.load(args.index)
    model = args.model or index.info["model"]
    if not args.model and model and os.path.isabs(model) and not os.path.isdir(model):
        raise FileNotFoundError(f"the model of the index was in '{model}', and is gone: say with --model where it is.")
    # In the dtype of the index: the text must meet its videos in the numbers that they were made with.
    encoder = VideoEncoder.from_pretrained(
        model,
        revision=None if args.model else index.info["revision"],
        device=args.device,
        dtype=index.info["dtype"],
    )
    index.check_model(encoder)
    if args.like:
        # sampled and prepared as the index's videos were
        (video,) = encoder.with_settings(index.info["settings"]).encode_videos([args.like])
        if video.error is not None:
            raise video.error
        queries = video.feature[None]
    else:
        queries = encoder.encode_texts(names)
    queries = combined(queries, encoder.encode_texts([args.against])[0] if args.against is not None else None)
    found = index.search(
        queries, args.k, where=args.where, per_video=args.per_video, overlap=args.overlap, exact=args.exact
    )
    if args.json:
        results = [
            {"query": name, "hits": [_as_json(hit) for hit in hits]} for name, hits in zip(names, found, strict=True)
        ]
        print(json.dumps(results if args.queries else results[0]["hits"], indent=2))
    elif args.csv:
        _print_csv(names, found)
    else:
        for name, hits in zip(names, found, strict=True):
            _print_table(name if args.queries else None, hits, index.info["moments"] is not None)
    if args.sheet:
        write = write_html_sheet if args.sheet.lower().endswith(".html") else write_contact_sheet
        write(args.sheet, names[0], found[0], index, floor=index.median_score(queries[0]))
        print(f"contact sheet: {args.sheet}", file=sys.stderr)
    return 0


def _queries(args: argparse.Namespace) -> list[str]:
    """What is looked for, in words: for --like the name of the file."""
    if args.queries is None:
        return [args.text if args.like is None else f"like {args.like}"]
    try:
        with open(args.queries, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--queries {args.queries} cannot be read as text: {reason}.") from error
    if not any(lines):
        raise ValueError(f"--queries {args.queries} has no text in it: expected one on each line.")
    return [line for line in lines if line]


def _print_table(query: str | None, hits: list, moments: bool) -> None:
    from ..adapters.writing import printable
    from ..search.moments import span_text

    if query is not None:
        print(printable(query))
    if not hits:
        print("no row fulfils the condition")
    names = [printable(_short(hit.row["path"])) for hit in hits]
    width = min(60, max(map(len, names), default=0))
    for name, hit in zip(names, hits, strict=True):
        row = hit.row
        if moments:
            time = span_text(row["start"], row["end"])
        else:
            time = "-" if row["duration"] is None else f"{row['duration']:.1f} s"
        missing = "  (missing: moved or deleted since)" if _is_missing(hit) else ""
        print(f"{hit.rank:>4}  {name:<{width}}  {time:>11}  {hit.score:.4f}{missing}")


def _print_csv(names: list[str], found: list[list]) -> None:
    writer = csv.writer(sys.stdout)
    columns = ("path", "start", "end", "duration", "width", "height")
    writer.writerow(["query", "rank", "score", "missing", *columns])
    for name, hits in zip(names, found, strict=True):
        for hit in hits:
            values = [hit.row[column] for column in columns]
            writer.writerow([name, hit.rank, f"{hit.score:.6f}", int(_is_missing(hit)), *values])


def _as_json(hit) -> dict:
    """`missing` where the video has been moved or deleted since it was indexed."""
    return {"rank": hit.rank, "score": hit.score, "missing": _is_missing(hit), **hit.row}


def _is_missing(hit) -> bool:
    return not os.path.exists(hit.row["path"])


def _short(path: str) -> str:
    """Relative to the working directory where that is shorter."""
    return min(path, os.path.relpath(path), key=len)
