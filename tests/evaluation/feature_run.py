"""Encodes the clips of a folder, in processes under torchrun or alone; ends itself after `--kill-after` batches."""

import argparse
import os
import signal
from pathlib import Path

from bt_adapter_hf.evaluation.features import encode_clips
from bt_adapter_hf.search.encoding import VideoEncoder


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


names = sorted(path.name for path in args.clips.iterdir())
encode_clips(encoder, names, lambda name: str(args.clips / name), args.output, {}, batch_size=2, progress=count)
