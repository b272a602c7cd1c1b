"""Options and helpers that several commands share."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping


def whole_number(least: int = 1) -> Callable[[str], int]:
    """The type of an option that takes a whole number of at least `least`; argparse names the option in the error."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}.")
        return value

    return read


def real_number(
    least: float = -math.inf, most: float = math.inf, *, above: bool = False, below: bool = False
) -> Callable[[str], float]:
    """The type of an option that takes a finite number from `least` to `most`.

    Args:
        above, below: `least` and `most` are not among them.
    """
    bounds = []
    if least > -math.inf:
        bounds.append(f"{'above' if above else 'of at least'} {least:g}")
    if most < math.inf:
        bounds.append(f"{'below' if below else 'of at most'} {most:g}")

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = (least < value if above else least <= value) and (value < most if below else value <= most)
        if not (math.isfinite(value) and inside):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {' and '.join(bounds)}".rstrip() + ".")
        return value

    return read


def path(text: str) -> str:
    """The type of an option that takes the name of a file, a folder or a repository: any but none at all."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no name of anything; expected a path.")
    return text


def check_models(args: argparse.Namespace) -> None:
    """Refuses a model, named by any option, that is not there, or damaged, before anything large is imported.

    Raises:
        ValueError: with the name of the option.
    """
    options = {
        option: getattr(args, option, None) for option in ("model", "chat_model", "bt_adapter", "base", "judge_local")
    }
    named = {option: name for option, name in options.items() if name is not None}
    if named:
        from ..hub.access import check_reachable

        for option, name in named.items():
            try:
                check_reachable(name)
            except (OSError, ValueError) as error:
                raise ValueError(f"--{option.replace('_', '-')}: {error}") from error


SHOWN = 3  # of the files that were skipped


def name_options(message: str, args: argparse.Namespace, fields: Mapping[str, str]) -> str:
    """An error of a Python function with the options that the user typed: `max_disk=3` becomes `--max-disk 3`.

    Args:
        fields: arguments of functions that are called otherwise than the option's own `args`.
    """
    names = {name: name for name in vars(args) if name != "bt_adapter"}  # which is a module, too
    names |= {field: option for field, option in fields.items() if hasattr(args, option)}
    # "window" and its like are ordinary words where no value follows
    words = "|".join(name if "_" in name else rf"{name}(?==)" for name in names)
    pattern = rf"(?<![\w./'\"`\[-])({words})(=|(?![\w/(=\]'\"`]|\.\w))"

    def replace(found: re.Match) -> str:
        name, behind = found.groups()
        return f"--{names[name].replace('_', '-')}{' ' if behind == '=' else behind}"

    # what is said of --set names fields on purpose
    return message if message.startswith("--set") or not names else re.sub(pattern, replace, message)


def add_encoder_options(parser: argparse.ArgumentParser) -> None:
    """What `load_encoder` reads."""
    parser.add_argument(
        "--model",
        type=path,
        metavar="ID_OR_PATH",
        help="Hub id or folder of a BT-Adapter dual encoder or of an adapter of one (default: the moving-digits model "
        "inside the package)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument(
        "--num-frames", type=whole_number(), metavar="T", help="frames per video (default: as the model says)"
    )
    parser.add_argument(
        "--on-damage",
        choices=("raise", "salvage", "check"),
        help="skip a file that is cut, use the frames before the damage, or skip files with damage anywhere, which "
        "means to decode all of each (default: as the model says)",
    )
    add_dtype_option(parser)
    add_device_option(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add_encoder_options(parser)
    parser.add_argument(
        "--batch-size", type=whole_number(), default=8, metavar="N", help="videos at once (default: 8)"
    )
    parser.add_argument(
        "--workers",
        type=whole_number(),
        metavar="N",
        help="threads that decode (default: one per core, beside an accelerator at most 4)",
    )


def add_dtype_option(parser: argparse.ArgumentParser, elsewhere: str = "float32") -> None:
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help=f"default: auto, which is bfloat16 where the processor or accelerator has units for it, and {elsewhere} "
        "elsewhere; `bt-adapter env` says which",
    )


def add_chat_model_options(parser: argparse.ArgumentParser) -> None:
    """Which chat model, with which adapter, how much of a video it sees, and its precision."""
    parser.add_argument(
        "--model",
        type=path,
        metavar="ID_OR_PATH",
        help="Hub id or folder of a chat model, native or with its adapter in; or of an adapter, LoRA too, that names "
        "its model (default: the moving-digits chat model inside the package)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--bt-adapter", type=path, metavar="ID_OR_PATH", help="adapter for a native model")
    parser.add_argument(
        "--num-frames", type=whole_number(), metavar="T", help="frames per clip (default: as the model says)"
    )
    parser.add_argument(
        "--num-clips",
        type=whole_number(),
        metavar="K",
        help="cut each video into K clips, for K times the frames and tokens",
    )
    add_dtype_option(parser, "as it was saved")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        help="cpu, cuda, cuda:1, mps (default: an accelerator where there is one)",
    )


def load_encoder(args: argparse.Namespace):
    """The `VideoEncoder` that the model options describe."""
    quiet_transformers()
    from ..search.encoding import VideoEncoder

    return VideoEncoder.from_pretrained(
        args.model,
        revision=args.revision,
        num_frames=args.num_frames,
        on_damage=args.on_damage,
        device=args.device,
        dtype=args.dtype,
    )


def print_skipped(skipped: list[dict[str, str]], file) -> None:
    """The first few files that could not be used, and why."""
    from ..adapters.writing import printable, without_name

    for line in skipped[:SHOWN]:
        print(f"  {printable(line['path'])}: {printable(without_name(line['reason'], line['path']))}", file=file)
    if len(skipped) > SHOWN:
        print(f"  and {len(skipped) - SHOWN} more", file=file)


def quiet_transformers() -> None:
    """No progress bar for loading weights: the commands show their own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def progress(items, total: int, description: str):
    """`items` with a bar on stderr, where that is a terminal."""
    from tqdm import tqdm

    return tqdm(items, total=total, desc=description, unit="video", file=sys.stderr, disable=None, dynamic_ncols=True)
