"""Zero-shot recognition over a table of videos and labels, with intervals and temporal controls."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ..data.broken import broken_item
from ..data.sources import PairTable
from ..search.encoding import VideoEncoder
from .clips import Clips, TableClips, as_clips, broken_rows, describe_encoder, draws_of, repeated
from .features import ALL_CONTROLS, FULL, encode_clips
from .results import EvaluationResult
from .retrieval import cosine_similarity, retrieval_ranks
from .statistics import compare, mean_interval


TOP = (1, 5)


def evaluate_recognition(
    encoder: VideoEncoder,
    table: PairTable | Clips,
    folder: Path,
    *,
    classes: Sequence[str] | None = None,
    label_offset: int = 0,
    templates: Sequence[str] = ("{}",),
    controls: Sequence[str] = ALL_CONTROLS,
    draws: int = 3,
    seed: int = 0,
    workers: int = 1,
    item_timeout: float | None = 60.0,
    progress: Callable[[int], None] = lambda rows: None,
) -> EvaluationResult:
    """Share of videos whose class is the nearest text (`top1`), and among the nearest five (`top5`), in percent.

    Args:
        table: its texts are the labels: names of classes, or their numbers where `classes` are given.
        folder: of this run; an interrupted run goes on in it.
        classes: names, in the order of their numbers; by default all labels of the table.
        label_offset: number of the first class (1 for lists that count from 1).
        templates: sentences around the names, such as "a video of {}"; the features of several are averaged.
        controls, draws, seed, workers, item_timeout, progress: see `encode_clips`.

    Raises:
        ValueError: fewer than two classes, a class twice, a template without {}, no row that can be used, or labels
            that are no classes in more than half of the rows.
        OtherRunError: `folder` is of another run.
    """
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"The template {template!r} has no {{}} for the name of the class.")
    clips = as_clips(table)
    if classes is not None:
        check_classes(classes, "the classes given")
    elif isinstance(clips, TableClips):  # before anything is encoded
        _labels(clips.table.texts(), clips.source)
    protocol = {"task": "recognition", **describe_encoder(encoder), **clips.describe()}
    features = encode_clips(
        encoder,
        clips.shards(item_timeout),
        folder,
        protocol,
        controls=controls,
        draws=draws,
        seed=seed,
        workers=workers,
        item_timeout=item_timeout,
        progress=progress,
    )
    failed = broken_rows(clips.source, features)
    labelled = [(row, name, info["texts"]) for row, (name, info) in sorted(features.rows.items())]
    names = list(classes) if classes is not None else _labels((texts for _, _, texts in labelled), clips.source)
    numbers = {name: number for number, name in enumerate(names)}
    kept, right = [], []
    for row, name, texts in labelled:
        number = _class_of(texts[0] if texts else "", numbers, classes is not None, label_offset)
        if number is None:
            reason = f"its label {texts[0]!r} is none of the {len(names)} classes" if texts else "it has no label"
            failed.append(broken_item(clips.source, row, name, reason))
        else:
            kept.append(name)
            right.append(number)
    if len(kept) <= len(labelled) / 2:
        raise ValueError(
            f"Only {len(kept)} of {len(labelled)} rows have a label that is a class; of {failed[-1]['video']}: "
            f"{failed[-1]['reason']}"
        )

    texts = np.mean([encoder.encode_texts([t.replace("{}", name) for name in names]) for t in templates], axis=0)
    ranks = {
        condition: retrieval_ranks(
            cosine_similarity(features.stacked(condition, kept), texts), right, range(len(names))
        )
        for condition in features.features
    }
    top = [k for k in TOP if k < len(names)]
    scores = {}
    for condition in (FULL, *controls):
        draws_of_condition = draws_of(ranks, condition)
        videos = kept * len(draws_of_condition)
        values = np.concatenate(draws_of_condition)
        scores[condition] = {f"top{k}": mean_interval(values <= k, videos, seed=seed).scaled(100) for k in top}
    against = {}
    if "frame_average" in controls:
        hits = [ranks[condition] <= 1 for condition in (FULL, "frame_average")]
        against["top1"] = compare(*hits, kept, seed=seed).scaled(100)
    return EvaluationResult(
        task="recognition",
        scores=scores.pop(FULL),
        controls=scores,
        against_frame_average=against,
        chance={f"top{k}": 100 * k / len(names) for k in top},
        items={"videos": len(kept), "classes": len(names), **repeated(list(zip(kept, right, strict=True)))},
        protocol={**protocol, "templates": list(templates), "shuffle_draws": draws, "seed": seed},
        failed=failed,
    )


def check_classes(names: Sequence[str], where: str) -> None:
    """Raises `ValueError` unless there are two or more, each once."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if len(names) < 2 or twice is not None:
        shown = f", {twice!r} more than once" if twice is not None else f": {names[0]!r}" if names else ""
        raise ValueError(f"Expected two or more different classes, found {len(names)} in {where}{shown}.")


def _labels(texts: Iterable[list[str]], source: str) -> list[str]:
    """The classes of a table, in the order of the alphabet."""
    names = sorted({of_row[0] for of_row in texts if of_row})
    check_classes(names, f"the labels of {source} (text_column names the column that holds them)")
    return names


def _class_of(label: str, numbers: dict[str, int], by_number: bool, offset: int) -> int | None:
    if label in numbers:
        return numbers[label]
    if by_number and label.lstrip("-").isdigit() and 0 <= int(label) - offset < len(numbers):
        return int(label) - offset
    return None
