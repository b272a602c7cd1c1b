"""`bt-adapter check-data`: what is in a table, and what of it cannot be used, before a run."""

import argparse
import json
import sys
from pathlib import Path

from ..adapters.writing import printable
from ._options import SHOWN, name_options, path, progress, quiet_transformers, real_number, whole_number
from ._training import chat_processor, open_table, text_limit
from ._training_options import add_item_timeout, add_on_damage, add_table_options


EPILOG = """\
examples:
  bt-adapter check-data videos/train --model openai/clip-vit-large-patch14
  bt-adapter check-data 'hf://datasets/org/clips/*.parquet' --sample 500 --list broken.jsonl
  bt-adapter check-data VideoChatGPT.json --media-root activitynet --model org/bt-adapter-llava --json

Exit status: 0; 1 if more than the share --max-broken of the checked rows cannot be used; 130 after Ctrl-C, which
reports what was checked until then.
"""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "check-data",
        help="find missing and broken videos and long texts before a run",
        description="Read the rows of a table, decode frames of their videos and count the tokens of their texts, as "
        "training would. Takes tables of videos with captions (pretrain) and of conversations (finetune).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "table", type=path, metavar="TABLE", help="as for `bt-adapter pretrain` or `bt-adapter finetune`"
    )
    add_table_options(parser)
    add_on_damage(parser)
    parser.add_argument("--split", default="train", metavar="NAME", help="of a Hub dataset (default: train)")
    parser.add_argument(
        "--model", type=path, metavar="ID_OR_PATH", help="count tokens as this model would (default: no counts)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument(
        "--max-text-length", type=whole_number(), metavar="N", help="longest caption in tokens (default: 64)"
    )
    parser.add_argument("--sample", type=whole_number(), metavar="N", help="check N random rows (default: all)")
    parser.add_argument(
        "--num-frames",
        type=whole_number(),
        metavar="T",
        help="frames to decode of each video (default: as the model, or 8)",
    )
    parser.add_argument(
        "--workers", type=whole_number(), metavar="N", help="processes that decode (default: one per core)"
    )
    add_item_timeout(parser)
    parser.add_argument(
        "--max-broken",
        type=real_number(0, 1),
        default=0.1,
        metavar="SHARE",
        help="share that is accepted (default: 0.1)",
    )
    parser.add_argument(
        "--list", type=path, metavar="JSONL", help="write the unusable rows, and stills, and why to this file"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..import_utils import require_package

    require_package("datasets", "train")
    quiet_transformers()
    from ..data.broken import described
    from ..data.checking import DataReport, check_rows, holds_conversations
    from ..hub.machine import available_cores

    workers = available_cores() if args.workers is None else args.workers
    check, limit = conversations(args) if holds_conversations(args.table, args.dataset_revision) else pairs(args)
    rows = len(check.table)
    report = DataReport(args.table, rows, limit)
    results = check_rows(check, args.sample, workers=workers, timeout=args.item_timeout)
    interrupted = False
    try:
        for checked in progress(results, min(rows, args.sample or rows), "check"):
            report.add(checked)
    except KeyboardInterrupt:
        interrupted = True
    if args.list:
        report.write_broken(Path(args.list))
    first = [name_options(described(record), args, {}) for record in report.broken[:SHOWN]]
    found = {**report.to_dict(), "interrupted": interrupted}
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print_report(found, first, list(report.stills)[:SHOWN])
        if args.list and (report.broken or report.stills):
            print(f"  each is listed in {args.list}")
    if interrupted:
        return 130
    if report.share_broken > args.max_broken:
        print(
            f"bt-adapter check-data: error: {report.share_broken:.1%} of the checked rows cannot be used, more than "
            f"--max-broken {args.max_broken:g} allows",
            file=sys.stderr,
        )
        return 1
    return 0


def pairs(args: argparse.Namespace):
    """The check of a table of captions, and the longest caption in tokens."""
    from transformers import AutoConfig, AutoTokenizer

    from ..data.checking import PairCheck
    from ..data.pairs import decoding_options
    from ..hub.kinds import wrong_kind
    from ..hub.source import model_type_of
    from ..models.configuration_bt_adapter import BTAdapterConfig
    from ..models.video_processing_bt_adapter import BTAdapterVideoProcessor

    tokenizer = limit = None
    video_processor = BTAdapterVideoProcessor()
    if args.model is not None:
        model_type = model_type_of(args.model, args.revision)
        if model_type not in ("clip", BTAdapterConfig.model_type):
            raise wrong_kind(args.model, model_type, "a CLIP or a dual encoder with a branch, for a table of captions")
        tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision)
        config = AutoConfig.from_pretrained(args.model, revision=args.revision)
        limit = text_limit(args.max_text_length, tokenizer, config)
        if isinstance(config, BTAdapterConfig):
            video_processor = BTAdapterVideoProcessor.from_pretrained(args.model, revision=args.revision)
    decoding = decoding_options(video_processor)
    if args.on_damage is not None:
        decoding["on_damage"] = args.on_damage
    table = open_table(args, args.table, args.split)
    check = PairCheck(
        table,
        num_frames=args.num_frames or video_processor.num_frames,
        tokenizer=tokenizer,
        decoding=decoding,
        item_timeout=args.item_timeout,
    )
    return check, limit


def conversations(args: argparse.Namespace):
    """The check of a table of conversations, and the longest one in tokens."""
    from transformers import AutoConfig

    from ..data.checking import InstructionCheck
    from ..data.instructions import InstructionDataset, load_instructions, longest_conversation
    from ..data.pairs import decoding_options
    from ..models.video_processing_bt_adapter import BTAdapterVideoProcessor

    table = load_instructions(args.table, media_root=args.media_root, revision=args.dataset_revision)
    dataset = limit = None
    video_processor = BTAdapterVideoProcessor(**({} if args.on_damage is None else {"on_damage": args.on_damage}))
    if args.model is not None:
        processor, _ = chat_processor(args)
        config = AutoConfig.from_pretrained(args.model, revision=args.revision)
        video_processor = processor.video_processor
        limit = longest_conversation(config, processor)
        dataset = InstructionDataset(table, processor, max_length=limit, item_timeout=None)
    check = InstructionCheck(
        table,
        num_frames=args.num_frames or video_processor.num_frames,
        dataset=dataset,
        max_length=limit,
        decoding=decoding_options(video_processor),
    )
    return check, limit


def print_report(found: dict, first: list[str], stills: list[str]) -> None:
    print(f"{printable(found['source'])}: {found['rows']} rows, {found['checked']} checked", end="")
    print(", interrupted" if found["interrupted"] else "")
    print(f"  usable  {found['usable']}")
    print(f"  broken  {found['broken']}")
    for reason, count in found["reasons"].items():
        print(f"    {count:>6}  {printable(reason)}")
    for line in first:
        print(f"  {line}")
    if found["broken"] > len(first):
        print(f"  and {found['broken'] - len(first)} more, see --list")
    videos = found["videos"]
    if videos["count"]:
        print(f"  {videos['count']} videos                min     median        max")
        for name in ("seconds", "frames", "fps", "width", "height"):
            if videos[name] is not None:
                print("    {:<12}{:>11.5g}{:>11.5g}{:>11.5g}".format(name, *videos[name]))
    if videos["stills"]:
        print(f"  {videos['stills']} of them are stills: {', '.join(map(printable, stills))}", end="")
        print(", ..." if videos["stills"] > len(stills) else "")
    if found["images"]:
        print(f"  {found['images']} images")
    texts, tokens = found["texts"], found["tokens"]
    if texts is not None:
        repeated, without = texts["repeated"], texts["rows_without"]
        print(f"  {texts['count']} texts, {repeated} repeat an earlier one, {without} rows without")
    if tokens is not None and tokens["length"] is not None:
        print("    {:<12}{:>11.5g}{:>11.5g}{:>11.5g}".format("tokens", *tokens["length"]), end="")
        print(f"   limit {tokens['limit']}, longer {tokens['over_limit']}")
