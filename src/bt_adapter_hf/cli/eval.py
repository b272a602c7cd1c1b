"""`bt-adapter eval`: scores with intervals, and what they are worth without the order of frames."""

import argparse
import json
import sys
from pathlib import Path

from ._eval_chat import (
    QUESTION_SETS,
    VIDEOCHATGPT,
    add_bench_options,
    add_chat_options,
    add_qa_options,
    run_chat,
)
from ._options import add_device_option, add_encoder_options, load_encoder, path, progress, real_number, whole_number
from ._training import open_columns, open_table
from ._training_options import add_item_timeout, add_on_damage, add_table_options


MOVING_DIGITS = "moving-digits-"
CHAT_TASKS = ("qa", "chat-bench")
TEMPORAL_SETS = (
    *(f"{MOVING_DIGITS}{board}" for board in ("order", "sequence", "count")),
    *("vinoground", "rtime", "vitatecs", "tempcompass", "tvbench", "ssv2"),
)
RETRIEVAL_SETS = ("msrvtt", "didemo", "activitynet", "lsmdc", "rtime-hard")
RECOGNITION_SETS = ("k400", "hmdb51", "ucf101")
EPILOG = """\
examples:
  bt-adapter eval retrieval --data msrvtt_test.json --media-root videos --model my-model -o msrvtt --num-frames 12
  bt-adapter eval recognition --data hmdb51.csv --classes classes.txt --template "a video of {}" -o hmdb
  bt-adapter eval temporal --data moving-digits-order -o order
  bt-adapter eval temporal --data vinoground --model my-model -o vinoground
  bt-adapter eval report order vinoground -o report.html

Every score is taken again without a video, with frames shuffled, frames reversed, one frame, and with the averaged
features of single frames: a model that reads time loses there. An interrupted run goes on with the same command.
Under torchrun or `accelerate launch` the rows are shared out. Exit status: 0; 1 if more rows than the share
--max-broken cannot be used, or more answers get no score from the judge.
"""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="score a model on a table, beside temporal controls",
        description="Score a dual encoder on a table of videos and texts, with intervals over videos, and again with "
        "the order of frames taken away.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    retrieval = tasks.add_parser("retrieval", help="text to video and back: R@1, R@5, R@10, median and mean rank")
    _add_common(retrieval, "NAME|TABLE", f"{', '.join(RETRIEVAL_SETS)}; or a table, as for `bt-adapter pretrain`")
    retrieval.add_argument("--paragraph", action="store_true", help="join the captions of a video into one text")
    retrieval.add_argument(
        "--max-text-length",
        type=whole_number(3),
        metavar="N",
        help="cut texts at so many tokens (default: the model's)",
    )
    retrieval.add_argument(
        "--dual-softmax",
        action="store_true",
        help="weigh scores by a softmax over all queries, as some papers do; a search cannot",
    )
    recognition = tasks.add_parser("recognition", help="zero-shot labels: top-1 and top-5")
    _add_common(recognition, "NAME|TABLE", f"{', '.join(RECOGNITION_SETS)}; or a table of videos and labels")
    recognition.add_argument(
        "--classes", type=path, metavar="TXT", help="names, a line each (default: all labels of the table)"
    )
    recognition.add_argument(
        "--label-offset", type=whole_number(0), default=0, metavar="N", help="number of the first class (default: 0)"
    )
    recognition.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help='sentence around each name, such as "a video of {}"; may be repeated, their features are averaged',
    )
    temporal = tasks.add_parser("temporal", help="texts that only the order of the frames tells apart")
    _add_common(
        temporal,
        "NAME|TABLE",
        f"{', '.join(TEMPORAL_SETS)}; or a table with a right and a wrong text per video",
    )
    temporal.add_argument(
        "--wrong-column", default="wrong", metavar="NAME", help="wrong text of a table, or a list (default: wrong)"
    )
    temporal.add_argument("--aspect-column", metavar="NAME", help="what a row tests; scores are also given by it")
    temporal.add_argument(
        "--items", type=whole_number(), default=360, metavar="N", help="of moving digits (default: 360)"
    )
    qa = tasks.add_parser("qa", help="answers of a chat model: exact and relaxed match, and a judge's verdict")
    _add_common(qa, "NAME|TABLE", f"{', '.join(QUESTION_SETS)}; or a table with questions and answers", chat=True)
    add_qa_options(qa)
    add_chat_options(qa, "gives accuracy and a score from 0 to 5 as well")
    bench = tasks.add_parser("chat-bench", help="the five scores of the VideoChatGPT benchmark, by a judge")
    _add_common(bench, "NAME", f"(default: {VIDEOCHATGPT})", chat=True)
    bench.set_defaults(data=VIDEOCHATGPT)
    add_bench_options(bench)
    add_chat_options(bench, "scores each answer from 0 to 5")
    report = tasks.add_parser("report", help="one table of several results, as markdown or as a page with plots")
    report.add_argument("results", nargs="+", metavar="RESULT", help="result.json files, or their folders")
    report.add_argument(
        "--name", action="append", dest="names", metavar="NAME", help="of each result in the table, in their order"
    )
    report.add_argument("-o", "--output", metavar="FILE", help="ends in .md or .html (default: markdown is printed)")
    report.add_argument("--json", action="store_true", help="print the results as JSON")
    report.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def _add_common(
    parser: argparse.ArgumentParser,
    metavar: str = "TABLE",
    data: str = "as for `bt-adapter pretrain`",
    chat: bool = False,
) -> None:
    parser.add_argument("--data", required="default" not in data, type=path, metavar=metavar, help=data)
    parser.add_argument(
        "--data-root",
        type=path,
        metavar="DIR",
        help="copy of the data set that NAME means, in the layout of the Hub (default: it is read from there)",
    )
    add_table_options(parser)
    parser.add_argument("--split", default="test", metavar="NAME", help="of a Hub dataset (default: test)")
    if chat:
        add_on_damage(parser)
        add_device_option(parser)
    else:
        add_encoder_options(parser)
    parser.add_argument(
        "-o", "--output-dir", required=True, type=path, metavar="DIR", help="where features and result.json go"
    )
    parser.add_argument(
        "--controls",
        default="blind,shuffled,reversed,one_frame,frame_average",
        metavar="LIST",
        help="(default: blind,shuffled,reversed,one_frame,frame_average)",
    )
    parser.add_argument(
        "--shuffle-draws", type=whole_number(), default=3, metavar="N", help="orders drawn per video (default: 3)"
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="N", help="of draws and intervals (default: 0)"
    )
    parser.add_argument(
        "--workers",
        type=whole_number(),
        metavar="N",
        help="videos decoded at once (default: one per two cores, at most 4)",
    )
    add_item_timeout(parser)
    parser.add_argument(
        "--max-broken", type=real_number(0, 1), default=0.1, metavar="SHARE", help="share accepted (default: 0.1)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    if args.task == "report":
        return _report(args)
    from ..import_utils import require_package

    require_package("datasets", "eval")
    require_package("scipy", "eval")
    from ..evaluation.features import is_main_process

    controls = [name.strip() for name in args.controls.split(",") if name.strip()]
    found = (run_chat if args.task in CHAT_TASKS else _run_encoder)(args, controls)
    if found is None or not is_main_process():
        return 0
    result, total = found
    path = result.write(Path(args.output_dir))
    if args.json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        print(result.table())
        print(f"written to {path}")
    status = 0
    for count, of, what in (
        (len(result.failed), total, "rows could not be used"),
        (len(result.unjudged), result.to_judge, "answers got no score from the judge"),
    ):
        if count > args.max_broken * of:
            share = f"more than the share --max-broken {args.max_broken:g}"
            print(f"bt-adapter eval: error: {count} of {of} {what}, {share}", file=sys.stderr)
            status = 1
    return status


def _report(args: argparse.Namespace) -> int:
    from ..adapters.writing import written_whole
    from ..evaluation.report import html_report, markdown_report
    from ..hub.result_files import read_results

    results = read_results(args.results, args.names)
    said = {"output": args.output, "results": [{"name": found.name, **found.content} for found in results]}
    if args.output is None:
        print(json.dumps(said, indent=2) if args.json else markdown_report(results).rstrip("\n"))
        return 0
    writers = {".md": markdown_report, ".html": html_report}
    write = writers.get(Path(args.output).suffix.lower())
    if write is None:
        raise ValueError(f"--output {args.output}: expected a name that ends in {' or '.join(writers)}.")
    text = write(results)
    with written_whole(args.output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(json.dumps(said, indent=2) if args.json else f"written to {args.output}")
    return 0


def _run_encoder(args: argparse.Namespace, controls: list[str]):
    """The result of a dual encoder, and how many rows there are."""
    from ..evaluation.recognition_run import evaluate_recognition
    from ..evaluation.retrieval_run import evaluate_retrieval
    from ..evaluation.temporal_run import evaluate_temporal
    from ..hub.machine import decoding_workers

    folder = Path(args.output_dir)
    given = None if args.task != "recognition" or args.classes is None else _read_classes(args.classes)
    rows, classes = _open_rows(args, folder)
    encoder = load_encoder(args)
    clips = len(rows.clips) if args.task == "temporal" else len(rows)
    with progress(None, clips, f"eval {args.task}") as bar:
        options = {
            "controls": controls,
            "draws": args.shuffle_draws,
            "seed": args.seed,
            "workers": args.workers or decoding_workers(),
            "item_timeout": args.item_timeout,
            "progress": bar.update,
        }
        if args.task == "temporal":
            return evaluate_temporal(encoder, rows, folder, **options), len(rows)
        if args.task == "retrieval":
            options |= {
                "paragraph": args.paragraph,
                "max_text_length": args.max_text_length,
                "dual_softmax": args.dual_softmax,
            }
            return evaluate_retrieval(encoder, rows, folder, **options), len(rows)
        options |= {"label_offset": args.label_offset, "templates": args.template or ["{}"]}
        return evaluate_recognition(encoder, rows, folder, classes=given or classes, **options), len(rows)


def _read_classes(path: str) -> list[str]:
    from ..evaluation.recognition_run import check_classes

    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--classes {path}: expected text in UTF-8 ({error}).") from error
    except OSError as error:
        raise ValueError(f"--classes {path}: {error.strerror}; expected a file of names, a line each.") from error
    names = [line.strip() for line in lines if line.strip()]
    check_classes(names, f"--classes {path}")
    return names


def _open_rows(args: argparse.Namespace, folder: Path):
    """What is scored, and the classes that a named set of recognition has."""
    from ..evaluation.caption_sets import RETRIEVAL_SETS as PROTOCOLS, open_recognition_set, open_retrieval_set

    if args.task == "temporal":
        return _open_temporal(args, folder), None
    if args.task == "recognition" and args.data in RECOGNITION_SETS:
        return open_recognition_set(args.data, args.data_root, args.media_root)
    if args.task == "retrieval" and args.data in RETRIEVAL_SETS:
        if args.data in PROTOCOLS:
            args.paragraph = args.paragraph or PROTOCOLS[args.data].paragraph
            args.max_text_length = args.max_text_length or PROTOCOLS[args.data].max_text_length
        return open_retrieval_set(args.data, args.data_root, args.media_root), None
    return open_table(args, args.data, args.split), None


def _open_temporal(args: argparse.Namespace, folder: Path):
    """The `TemporalSet` that the options describe."""
    from ..evaluation.temporal_sets import moving_digits_set, open_temporal_set, table_set

    if args.data.startswith(MOVING_DIGITS):
        return moving_digits_set(args.data.removeprefix(MOVING_DIGITS), folder / "clips", args.items)
    if args.data in TEMPORAL_SETS:
        return open_temporal_set(args.data, args.data_root, args.media_root)
    options = ("text_column", "wrong_column", "aspect_column")
    return table_set(*open_columns(args, options[: 3 if args.aspect_column else 2]))
