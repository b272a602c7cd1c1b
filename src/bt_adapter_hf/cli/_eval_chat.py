"""`bt-adapter eval qa` and `chat-bench`: what a chat model says about videos."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ._options import add_chat_model_options, path, progress, quiet_transformers, real_number, whole_number
from ._training import open_columns


MOVING_DIGITS = "moving-digits"
QUESTION_SETS = (MOVING_DIGITS, "msvd-qa", "msrvtt-qa", "activitynet-qa", "tgif-qa")
VIDEOCHATGPT = "videochatgpt"


def add_chat_options(parser: argparse.ArgumentParser, judge: str) -> None:
    """The chat model, as for `bt-adapter chat`, and the judge."""
    add_chat_model_options(parser)
    parser.add_argument(
        "--max-new-tokens", type=whole_number(), default=64, metavar="N", help="per answer (default: 64)"
    )
    parser.add_argument(
        "--batch-size", type=whole_number(), default=8, metavar="N", help="questions at once (default: 8)"
    )
    group = parser.add_argument_group("judge", judge)
    group.add_argument("--judge", metavar="MODEL", help="its name at an endpoint that speaks OpenAI's protocol")
    group.add_argument(
        "--judge-url", metavar="URL", help="of the endpoint, such as http://127.0.0.1:8000/v1 (default: OpenAI's)"
    )
    group.add_argument("--judge-local", type=path, metavar="ID_OR_PATH", help="a chat model of transformers instead")
    group.add_argument(
        "--judge-threads", type=whole_number(), default=8, metavar="N", help="requests at once (default: 8)"
    )
    group.add_argument(
        "--judge-timeout",
        type=real_number(0, above=True),
        default=60.0,
        metavar="S",
        help="of a request (default: 60)",
    )
    group.add_argument(
        "--judge-retries", type=whole_number(0), default=5, metavar="N", help="of a refused request (default: 5)"
    )
    group.add_argument(
        "--dry-run", action="store_true", help="only say what judging would cost, of the answers that are there"
    )
    group.add_argument("--price-in", type=real_number(0), metavar="P", help="of a million tokens of prompts")
    group.add_argument("--price-out", type=real_number(0), metavar="P", help="of a million tokens of replies")


def add_qa_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--question-column", default="question", metavar="NAME", help="of a table (default: question)")
    parser.add_argument("--answer-column", default="answer", metavar="NAME", help="of a table (default: answer)")
    parser.add_argument(
        "--items", type=whole_number(), default=120, metavar="N", help="videos of moving digits (default: 120)"
    )
    parser.add_argument("--kind-column", metavar="NAME", help="of a table: scores are also given by it")


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--aspects",
        default="correctness,detail,context,temporal,consistency",
        metavar="LIST",
        help="(default: correctness,detail,context,temporal,consistency)",
    )


def open_questions(args: argparse.Namespace):
    """The `QuestionSet` that the options describe."""
    from ..evaluation.chat_bench_run import parts_of
    from ..evaluation.qa_sets import moving_digits_questions, open_chat_bench, open_question_set, table_questions

    if args.task == "chat-bench":
        if args.data != VIDEOCHATGPT:
            raise ValueError(f"--data {args.data}: chat-bench scores {VIDEOCHATGPT}; for a table use `eval qa`.")
        return open_chat_bench(parts_of(aspects_of(args)), args.data_root, args.media_root)
    if args.data == MOVING_DIGITS:
        return moving_digits_questions(Path(args.output_dir) / "clips", args.items)
    if args.data in QUESTION_SETS:
        return open_question_set(args.data, args.split, args.data_root, args.media_root)
    options = ("question_column", "answer_column", "kind_column")
    return table_questions(*open_columns(args, options[: 3 if args.kind_column else 2]))


def aspects_of(args: argparse.Namespace) -> list[str]:
    return [name.strip() for name in args.aspects.split(",") if name.strip()]


def judge_name(args: argparse.Namespace) -> str | None:
    """What results call the judge; None without one.

    Raises:
        ValueError: two judges, or an address without a name.
    """
    from ..evaluation.judge import endpoint_name, local_name

    if args.judge is not None and args.judge_local is not None:
        raise ValueError("--judge names a model at an endpoint and --judge-local one on this machine: give one.")
    if args.judge_url is not None and args.judge is None:
        raise ValueError("--judge-url needs --judge, the model's name there.")
    if args.judge is not None:
        return endpoint_name(args.judge, args.judge_url)
    return None if args.judge_local is None else local_name(args.judge_local)


def make_judge(args: argparse.Namespace, folder: Path):
    """The judge that is named, if any; one at an endpoint has been asked something, before hours of answers.

    Raises:
        JudgeRefusedError: it answers nothing.
    """
    from ..evaluation.judge import EndpointJudge, LocalJudge
    from ..evaluation.judging import check_answers
    from ..evaluation.qa_run import CACHE_NAME

    if args.judge is not None:
        judge = EndpointJudge(
            args.judge, args.judge_url, args.judge_timeout, args.judge_retries, threads=args.judge_threads
        )
        check_answers(judge, folder / CACHE_NAME)
        return judge
    return None if args.judge_local is None else LocalJudge(args.judge_local, args.device)


def run_chat(args: argparse.Namespace, controls: list[str]):
    """The result of `qa` or `chat-bench`, and how many questions there are; None after a dry run."""
    from ..evaluation.answering import Answerer, conditions_of
    from ..evaluation.chat_bench_run import dry_run_cost, evaluate_chat_bench
    from ..evaluation.features import is_main_process
    from ..evaluation.qa_run import evaluate_qa
    from ..hub.machine import decoding_workers
    from .chat import find_model

    quiet_transformers()
    name = judge_name(args)
    if name is None and args.task == "chat-bench" and not args.dry_run:
        raise ValueError("a judge is missing: give --judge, or --judge-local.")
    folder = Path(args.output_dir)
    board = open_questions(args)
    if args.dry_run:
        aspects = aspects_of(args) if args.task == "chat-bench" else None
        cost = dry_run_cost(board, folder, name, aspects, conditions_of(controls, args.shuffle_draws))
        said = cost.describe(args.price_in, args.price_out)
        if is_main_process():
            print(json.dumps({**asdict(cost), "says": said}) if args.json else said)
        return None
    judge = make_judge(args, folder) if is_main_process() else None
    processor, load_model = find_model(argparse.Namespace(**{**vars(args), "files": ["a video"]}))
    if args.on_damage is not None:
        processor.video_processor.on_damage = args.on_damage
    answerer = Answerer(
        load_model(), processor, args.model or "moving-digits-chat", args.max_new_tokens, args.batch_size
    )
    with progress(None, len(board.by_row()), f"eval {args.task}") as bar:
        options = {
            "controls": controls,
            "draws": args.shuffle_draws,
            "seed": args.seed,
            "workers": args.workers or decoding_workers(),
            "item_timeout": args.item_timeout,
            "progress": bar.update,
        }
        if args.task == "qa":
            result = evaluate_qa(answerer, board, folder, judge=judge, **options)
        else:
            result = evaluate_chat_bench(answerer, board, folder, judge, aspects=aspects_of(args), **options)
    return result, len(board.questions)
