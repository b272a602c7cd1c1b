"""Benchmarks of the order of frames over a dual encoder, with intervals and temporal controls."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..data.broken import broken_item, described
from ..search.encoding import VideoEncoder
from .clips import describe_encoder, draws_of, repeated
from .features import ALL_CONTROLS, FULL, encode_clips
from .results import EvaluationResult
from .retrieval import cosine_similarity
from .statistics import compare
from .temporal import temporal_scores, temporal_values
from .temporal_sets import TemporalSet


# Decimals of cosines that are compared. Frames in another order give the same average but for the last bits, and what
# is that close is a tie, no answer.
DECIMALS = 6


def evaluate_temporal(
    encoder: VideoEncoder,
    board: TemporalSet,
    folder: Path,
    *,
    controls: Sequence[str] = ALL_CONTROLS,
    draws: int = 3,
    seed: int = 0,
    workers: int = 1,
    item_timeout: float | None = 60.0,
    progress: Callable[[int], None] = lambda rows: None,
) -> EvaluationResult:
    """Which text a clip shows, and which clip shows a text, where only the order of the frames tells.

    Args:
        board: clips and items; see `open_temporal_set`, `table_set` and `moving_digits_set`.
        folder: of this run; an interrupted run goes on in it.
        controls, draws, seed, workers, item_timeout, progress: see `encode_clips`.

    Raises:
        ValueError: no item has all its clips.
        OtherRunError: `folder` is of another run.
    """
    clips = board.clips
    protocol = {"task": "temporal", **describe_encoder(encoder), **clips.describe()}
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
    items = []
    failed = [broken_item(clips.source, number, *broken) for number, broken in board.broken.items()]
    for number, item in board.numbered():
        missing = next((row for row in item.clips if row not in features.rows), None)
        if missing is None:
            items.append(replace(item, source=("item", number) if item.source is None else item.source))
        else:
            name, reason = features.failed[missing]
            failed.append(broken_item(clips.source, number, name, reason))
    if not items:
        raise ValueError(
            f"No item of {clips.source} has all its clips and texts. The first of {len(failed)}: "
            f"{described(failed[0])}"
        )
    texts = list(dict.fromkeys(text for item in items for text in item.texts))
    limit = encoder.model.config.text_config.max_position_embeddings
    cut = sum(len(ids) > limit for ids in encoder.processor.tokenizer(texts)["input_ids"])
    encoded = dict(zip(texts, encoder.encode_texts(texts, max_length=limit), strict=True))

    def similarities(condition: str) -> list[np.ndarray]:
        found = []
        for item in items:
            names = [features.rows[row][0] for row in item.clips]
            cosines = cosine_similarity(
                features.stacked(condition, names), np.stack([encoded[text] for text in item.texts])
            )
            found.append(cosines.round(DECIMALS))
        return found

    matrices = {condition: similarities(condition) for condition in features.features}
    scores = {}
    for condition in (FULL, *controls):
        drawn = draws_of(matrices, condition)
        scores[condition] = temporal_scores(items * len(drawn), [matrix for draw in drawn for matrix in draw], seed)
    against = {}
    if "frame_average" in controls:
        pairs = [
            [temporal_values(matrix)["pair"] for matrix in matrices[condition]]
            for condition in (FULL, "frame_average")
        ]
        against["pair"] = compare(*pairs, [item.source for item in items], seed=seed).scaled(100)
    whole = scores[FULL]["all"]
    return EvaluationResult(
        task="temporal",
        scores={name: score.interval for name, score in whole.items()},
        controls={
            control: {name: score.interval for name, score in scores[control]["all"].items()} for control in controls
        },
        against_frame_average=against,
        chance={name: score.chance for name, score in whole.items()},
        items={
            "items": len(items),
            "clips": len({row for item in items for row in item.clips}),
            f"texts, of them {cut} cut at {limit} tokens": len(texts),
            **repeated([(tuple(features.rows[row][0] for row in item.clips), item.texts) for item in items]),
        },
        protocol={**protocol, "max_text_length": limit, "shuffle_draws": draws, "seed": seed},
        failed=failed,
        aspects={
            aspect: {name: score.interval for name, score in of_aspect.items()}
            for aspect, of_aspect in scores[FULL].items()
            if aspect != "all"
        },
    )
