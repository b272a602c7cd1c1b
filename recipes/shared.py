"""What the recipes of the moving digits share: how a short run is set up, and steps that leave their files."""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import TrainingArguments


TRAIN_SEED, TEST_SEED = 0, 1000


def run_arguments(kind: type[TrainingArguments], folder: Path, **fields: Any) -> TrainingArguments:
    """Arguments of a run on the CPU that is over in minutes: a cosine, and no checkpoints."""
    return kind(
        output_dir=str(folder / "log"),
        **{
            "lr_scheduler_type": "cosine",
            "logging_steps": 50,
            "save_strategy": "no",
            "report_to": "none",
            "remove_unused_columns": False,
            "seed": TRAIN_SEED,
            "use_cpu": True,
            # accelerate would cut each batch of a stream at the length of its first tensor, which may be the pictures
            "accelerator_config": {"dispatch_batches": False},
            **fields,
        },
    )


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for everything that is made")
    return parser


def parse_output(description: str) -> Path:
    """The folder for everything that is made, of a recipe whose models are compared and not shipped."""
    return _parser(description).parse_args().output


def parse_arguments(description: str) -> argparse.Namespace:
    """`output`, and whether to `ship`."""
    parser = _parser(description)
    parser.add_argument("--ship", action="store_true", help="copy the model into src/bt_adapter_hf/assets")
    return parser.parse_args()


def make(steps: Iterable[tuple[str, Path, Callable[[], None]]], results: Path) -> dict[str, int]:
    """Takes the steps whose last file is not there yet.

    Args:
        steps: name, the file that is written last, and what makes it.
        results: json file that has the "seconds" of the steps taken before.

    Returns:
        Seconds of every step.
    """
    seconds = json.loads(results.read_text())["seconds"] if results.is_file() else {}
    for name, made, step in steps:
        if not made.is_file():
            start = time.monotonic()
            step()
            seconds[name] = round(time.monotonic() - start)
            results.write_text(json.dumps({"seconds": seconds}, indent=2) + "\n")
    return seconds


def ship(folder: Path, assets: Path) -> None:
    """Copies a model into the package."""
    assets.mkdir(parents=True, exist_ok=True)
    for file in filter(Path.is_file, folder.iterdir()):
        shutil.copyfile(file, assets / file.name)
