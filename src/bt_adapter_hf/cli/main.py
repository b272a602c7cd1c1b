"""The `bt-adapter` command: finds the subcommand, runs it, turns user errors into one line.

Each subcommand is a module of this package with `register(subparsers)` and `run(args) -> int`. Modules import torch
and transformers inside `run` only, so that `--help` is instant.
"""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence


COMMANDS = (
    "quickstart",
    "index",
    "search",
    "classify",
    "chat",
    "pretrain",
    "finetune",
    "check-data",
    "convert",
    "push",
    "env",
)


def build_parser(commands: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bt-adapter",
        description="Search, label and learn from real video files with a BT-Adapter model.",
        epilog="Start with: bt-adapter quickstart",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in commands:
        importlib.import_module(f"{__package__}.{name.replace('-', '_')}").register(subparsers)
        subparsers.choices[name].add_argument("--debug", action="store_true", help="on an error, show the traceback")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 success, 1 an error or nothing succeeded, 2 wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    # Only the asked command is imported; without one, all of them, for the list in --help.
    args = build_parser([argv[0]] if argv and argv[0] in COMMANDS else COMMANDS).parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our stdout (`| head`) has gone; Python must not complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        if args.debug:
            raise
        message = " ".join(str(error).split())
        if isinstance(error, ImportError) and "pip install" not in message:
            message += " (`bt-adapter env` tells what is broken)"
        print(f"bt-adapter {args.command}: error: {message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
