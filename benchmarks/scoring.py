"""Time and memory of scoring 5,000 captions against 5,000 videos: both directions, intervals, all controls.

python benchmarks/scoring.py            # as in one run of `bt-adapter eval retrieval`, features given
python benchmarks/scoring.py --rows 1000
"""

import argparse
import resource
import time

import numpy as np

from bt_adapter_hf.evaluation.features import FULL, ClipFeatures
from bt_adapter_hf.evaluation.retrieval_run import score_retrieval


def main(rows: int, width: int, controls: list[str]) -> tuple[float, float, float]:
    """Seconds, seconds of the processor (which others on the machine do not lengthen), and GB at the highest."""
    generator = np.random.default_rng(0)
    videos = generator.normal(size=(rows, width)).astype(np.float32)
    videos /= np.linalg.norm(videos, axis=1, keepdims=True)
    texts = videos + 0.5 * generator.normal(size=(rows, width)).astype(np.float32) / np.sqrt(width)
    names = [f"video{number:05d}" for number in range(rows)]
    features = ClipFeatures({name: dict(zip(names, videos, strict=True)) for name in (FULL, *controls)})
    start, busy = time.perf_counter(), time.process_time()
    scores, _, _ = score_retrieval(texts, features, names, names, controls)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    assert scores[FULL]["t2v_R1"].value > 0
    return seconds, busy, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--controls", default="", help="further conditions to score, each as costly as the first")
    args = parser.parse_args()
    seconds, busy, memory = main(args.rows, args.width, [name for name in args.controls.split(",") if name])
    print(
        f"{args.rows} x {args.rows}: {seconds:.1f} s ({busy:.1f} s of the processor), {memory:.2f} GB at the highest"
    )
