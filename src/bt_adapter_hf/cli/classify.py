"""`bt-adapter classify`: zero-shot labels of video files."""

import argparse
import json
import sys
from pathlib import Path

from ._options import add_model_options, load_encoder, path, print_skipped, progress, whole_number


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "classify",
        help="label videos with labels of your own",
        description="Score videos against labels, without training. Prints for each video the best labels with their "
        "probability (softmax over all labels, with the model's own scale) and cosine.",
        epilog='example: bt-adapter classify clip.mp4 --labels "cooking, dancing, surfing" --template "a video of {}"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=path, metavar="FILE", help="video file, folder or glob pattern")
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", metavar='"A, B"', help="labels, separated by commas")
    labels.add_argument("--labels-file", type=path, metavar="TXT", help="file with one label per line")
    parser.add_argument("--template", default="{}", help='sentence around each label, such as "a video of {}"')
    parser.add_argument(
        "--top", type=whole_number(), default=3, metavar="N", help="labels to print per video (default: 3)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--plot",
        metavar="PNG",
        help="also write a picture of the labels, beside those of each clip played backwards; reads the files twice",
    )
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    labels = read_labels(args.labels, args.labels_file)
    if "{}" not in args.template:
        raise ValueError(f"the template '{args.template}' has no {{}} for the label to go.")
    from ..search.contact_sheet import check_sheet_path
    from ..search.files import find_videos
    from ..search.label_plot import label_both_ways, write_label_plot

    if args.plot:
        check_sheet_path(args.plot, "plot")
    paths = find_videos(args.files)
    encoder = load_encoder(args)
    texts = encoder.encode_texts([args.template.replace("{}", label) for label in labels])
    results, skipped = [], []
    for video in progress(
        encoder.encode_videos(paths, batch_size=args.batch_size, workers=args.workers), len(paths), "classify"
    ):
        if video.error is not None:
            skipped.append({"path": video.path, "reason": " ".join(str(video.error).split())})
            continue
        scores = encoder.label_scores(video.feature, texts)[: args.top]
        results.append(
            {
                "path": video.path,
                "labels": [{"label": labels[i], "probability": p, "cosine": cosine} for i, p, cosine in scores],
            }
        )
    if args.plot and results:
        plotted = [label_both_ways(encoder, video["path"], labels, texts, args.top) for video in results]
        write_label_plot(args.plot, plotted)
        print(f"plot: {args.plot}", file=sys.stderr)
    if args.json:
        print(json.dumps({"videos": results, "skipped": skipped}, indent=2))
    else:
        _print_results(results, skipped)
    if not results:
        print("bt-adapter classify: error: none of the files could be read", file=sys.stderr)
        return 1
    return 0


def read_labels(listed: str | None, file: str | None) -> list[str]:
    """Labels from the option or the file, in order.

    Raises:
        ValueError: fewer than two labels, or one twice, or a file that cannot be read.
    """
    if listed is not None:
        lines = listed.split(",")
    else:
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"--labels-file {file} cannot be read as text: {reason}.") from error
    labels = [line.strip() for line in lines if line.strip()]
    if len(labels) < 2:
        raise ValueError(f"found {len(labels)} labels; a choice needs at least two.")
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ValueError(f"the label '{twice}' is there twice.")
    return labels


def _print_results(results: list[dict], skipped: list[dict]) -> None:
    from ..adapters.writing import printable

    for video in results:
        print(printable(video["path"]))
        for label in video["labels"]:
            print(f"  {label['probability']:>7.1%}  {label['cosine']:>7.4f}  {label['label']}")
    if skipped:
        print(f"{len(skipped)} of {len(results) + len(skipped)} files skipped:")
        print_skipped(skipped, sys.stdout)
