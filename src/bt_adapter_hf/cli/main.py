"""The `bt-adapter` command: finds the subcommand, runs it, turns errors into one line.

Each subcommand is a module of this package with `register(subparsers)` and `run(args) -> int`. Modules import torch
and transformers inside `run` only, so that `--help` is instant.
"""

import argparse
import errno
import importlib
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ._options import check_models, name_options
from ._training_options import TRAINING_OPTIONS


_PACKAGE = __package__.partition(".")[0]
_FOLDER = Path(__file__).parents[1]

HELP_WIDTH = 100
_SPEAK_THEMSELVES = ("datasets", "huggingface_hub", "transformers")  # libraries with a handler of their own
JUDGE_FIELDS = {"base_url": "judge_url", "timeout": "judge_timeout"}  # arguments of a judge, and their options
COMMANDS = (
    "quickstart",
    "index",
    "search",
    "classify",
    "chat",
    "demo",
    "pretrain",
    "finetune",
    "eval",
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
    parser.add_argument("--version", action="version", version=f"bt_adapter_hf {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in commands:
        importlib.import_module(f"{__package__}.{name.replace('-', '_')}").register(subparsers)
        command = subparsers.choices[name]
        command.description = textwrap.fill(command.description, HELP_WIDTH)  # its epilog of examples stays as it is
        command.add_argument("--debug", action="store_true", help="on an error, show the traceback")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 success, 1 an error or nothing succeeded, 2 wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    # Only the asked command is imported; without one, all of them, for the list in --help.
    args = build_parser([argv[0]] if argv and argv[0] in COMMANDS else COMMANDS).parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text; stderr does so already
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.name.partition(".")[0] not in _SPEAK_THEMSELVES)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[handler])
    try:
        check_models(args)
        return args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our stdout (`| head`) has gone; Python must not complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        print(f"bt-adapter {args.command}: error: {_one_line(error, args)}", file=sys.stderr)
        return 1


def _one_line(error: Exception, args: argparse.Namespace) -> str:
    fields = {field: option for option, field in TRAINING_OPTIONS.items()} | JUDGE_FIELDS
    message = name_options(" ".join(str(error).split()), args, fields)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = error.filename or getattr(args, "output", None) or getattr(args, "output_dir", None)
        where = f" for {place}" if place else ""
        return f"no space is left on the disk{where} ({error.strerror}): make room, or choose another place"
    if isinstance(error, ImportError) and "pip install" not in message:
        return f"{message} (`bt-adapter env` tells what is broken)"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's
        return f"out of memory: {message or 'Python has no more'}. Give it less at once: a smaller batch, fewer frames"
    if isinstance(error, ValueError | OSError | ImportError) or type(error).__module__.startswith(_PACKAGE):
        return message
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_FOLDER)]
    places = [f"{Path(frame.filename).relative_to(_FOLDER.parent)}:{frame.lineno}" for frame in own[-1:]]
    if frames[-1] not in own:
        places.append(f"{Path(frames[-1].filename).name}:{frames[-1].lineno}")
    return (
        f"{type(error).__name__}: {message or 'no message'} (at {', '.join(places)}). bt_adapter_hf {__version__} did "
        "not foresee this: please report this line with the output of `bt-adapter env`. --debug shows the traceback"
    )


if __name__ == "__main__":
    sys.exit(main())
