"""Encodes the clips of a folder, in processes under torchrun or alone; ends itself after `--kill-after` batches."""

import argparse
import os
import signal
from pathlib import Path

from bt_adapter_hf.evaluation.features import Clip, encode_clips
from bt_adapter_hf.search.encoding import VideoEncoder


def clips_of(folder: Path) -> list[Clip]:
    names = sorted(path.name for path in folder.iterdir())
    return [Clip(row, name, str(folder / name), {"texts": [name]}) for row, name in enumerate(names)]


parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("clips", type=Path)
parser.add_argument("output", type=Path)
parser.add_argument("--kill-after", type=int)
args = parser.parse_args()
encoder = VideoEncoder.from_pretrained(args.model, device="cpu")
batches = 0


def count(_):
    global batches
    batches += 1
    if batches == args.kill_after:
        os.kill(os.getpid(), signal.SIGKILL)


encode_clips(encoder, [clips_of(args.clips)], args.output, {}, progress=count)
