"""`bt-adapter search`: the videos of an index that fit a text best."""

import argparse
import json
import os
import sys

from ._options import add_device_option, path, quiet_transformers, whole_number


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "search",
        help="find videos of an index by text",
        description="Print the videos of an index whose features are nearest to a text, best first, by cosine.",
        epilog='example: bt-adapter search videos.index "a dog catches a frisbee" -k 5 --sheet hits.png',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("index", type=path, metavar="INDEX", help="folder made by `bt-adapter index`")
    parser.add_argument("text", help="what to look for")
    parser.add_argument("-k", type=whole_number(), default=5, metavar="K", help="number of hits (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--sheet", type=path, metavar="PNG", help="also write a contact sheet of the hits")
    parser.add_argument(
        "--model",
        type=path,
        metavar="ID_OR_PATH",
        help="where the index's model is now (default: where it was); another model is refused",
    )
    add_device_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    quiet_transformers()
    from ..adapters.writing import printable
    from ..search.contact_sheet import check_sheet_path, write_contact_sheet
    from ..search.encoding import VideoEncoder
    from ..search.index import VideoIndex

    if args.sheet:
        check_sheet_path(args.sheet)
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
    query = encoder.encode_texts([args.text])
    hits = index.search(query, args.k)[0]

    if args.json:
        print(json.dumps([_as_json(hit) for hit in hits], indent=2))
    else:
        print(f"{'rank':>4}  {'cosine':>7}  {'seconds':>7}  file")
        for hit in hits:
            missing = "" if os.path.exists(hit.row["path"]) else "  (missing: moved or deleted since)"
            name = printable(_short(hit.row["path"]))
            print(f"{hit.rank:>4}  {hit.score:>7.4f}  {_seconds(hit.row['duration']):>7}  {name}{missing}")
    if args.sheet:
        write_contact_sheet(args.sheet, args.text, hits, index, floor=index.median_score(query[0]))
        print(f"contact sheet: {args.sheet}", file=sys.stderr)
    return 0


def _as_json(hit) -> dict:
    """`missing` where the video has been moved or deleted since it was indexed."""
    return {"rank": hit.rank, "score": hit.score, "missing": not os.path.exists(hit.row["path"]), **hit.row}


def _seconds(duration: float | None) -> str:
    return "-" if duration is None else f"{duration:.1f}"


def _short(path: str) -> str:
    """Relative to the working directory where that is shorter."""
    return min(path, os.path.relpath(path), key=len)
