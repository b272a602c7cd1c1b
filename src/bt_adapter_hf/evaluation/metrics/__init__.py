"""Metrics as modules of the library `evaluate`: `evaluate.load(metric_path("video_retrieval"))`."""

from pathlib import Path


METRICS = ("video_retrieval", "temporal_order")


def metric_path(name: str) -> str:
    """The folder of one of `METRICS`, for `evaluate.load`.

    Raises:
        ValueError: another name.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(METRICS)}.")
    return str(Path(__file__).parent / name)
