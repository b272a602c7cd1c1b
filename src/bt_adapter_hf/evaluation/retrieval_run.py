"""Retrieval over a table of videos and captions, with intervals and temporal controls."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..adapters.writing import no_character
from ..data.broken import broken_item, described
from ..data.sources import PairTable
from ..search.encoding import VideoEncoder
from .clips import Clips, as_clips, broken_rows, describe_encoder, draws_of, repeated
from .features import ALL_CONTROLS, FULL, ClipFeatures, encode_clips
from .results import EvaluationResult
from .retrieval import RECALL_AT, cosine_similarity, rank_metrics, retrieval_ranks
from .statistics import Comparison, Interval, compare, mean_interval, median_interval


def evaluate_retrieval(
    encoder: VideoEncoder,
    table: PairTable | Clips,
    folder: Path,
    *,
    paragraph: bool = False,
    max_text_length: int | None = None,
    dual_softmax: bool = False,
    controls: Sequence[str] = ALL_CONTROLS,
    draws: int = 3,
    seed: int = 0,
    workers: int = 1,
    item_timeout: float | None = 60.0,
    progress: Callable[[int], None] = lambda rows: None,
) -> EvaluationResult:
    """Text-to-video and video-to-text retrieval over a table.

    Rows that name the same video are captions of one video. Every caption is a query, and its video the only right
    answer; a video as query has its captions as right answers and takes the rank of the best.

    Args:
        folder: of this run; an interrupted run goes on in it.
        paragraph: join the captions of a video into one text, as is usual for ActivityNet and DiDeMo.
        max_text_length: cut texts at so many tokens; the text tower's limit by default.
        dual_softmax: weigh each score by the softmax over all queries. A search does not have all queries at once:
            such numbers compare with each other only.
        controls, draws, seed, workers, item_timeout, progress: see `encode_clips`.

    Raises:
        ValueError: no video of the table can be read and has a text.
        OtherRunError: `folder` is of another run.
    """
    clips = as_clips(table)
    protocol = {"task": "retrieval", **describe_encoder(encoder), **clips.describe()}
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
    texts_of: dict[str, list[str]] = {}
    failed = broken_rows(clips.source, features)
    for row, (name, info) in sorted(features.rows.items()):
        problems = {text: no_character(text) for text in info["texts"]}
        readable = [text for text in info["texts"] if problems[text] is None]
        texts_of.setdefault(name, []).extend(readable)
        if not readable:  # the video may have other rows
            reason = next((f"its text {problem}" for problem in problems.values()), "it has no text")
            failed.append(broken_item(clips.source, row, name, reason))
    videos = sorted(name for name, texts in texts_of.items() if texts)
    if not videos:
        raise ValueError(
            f"No row of {clips.source} has a video that can be read and a text. The first of {len(failed)}: "
            f"{described(failed[0])}"
        )
    again = repeated([(name, text) for name in videos for text in texts_of[name]])
    if paragraph:
        texts_of = {name: [" ".join(texts)] for name, texts in texts_of.items()}
    owners = [name for name in videos for _ in texts_of[name]]
    limit = encoder.model.config.text_config.max_position_embeddings
    length = limit if max_text_length is None else min(max_text_length, limit)
    captions = [text for name in videos for text in texts_of[name]]
    cut = sum(len(ids) > length for ids in encoder.processor.tokenizer(captions)["input_ids"])
    texts = encoder.encode_texts(captions, max_length=length)

    scores, against, reference_ties = score_retrieval(texts, features, owners, videos, controls, dual_softmax, seed)
    return EvaluationResult(
        task="retrieval",
        scores=scores.pop(FULL),
        controls=scores,
        against_frame_average=against,
        chance={
            f"{direction}_{metric}": value
            for direction, right, gallery in (
                ("t2v", np.ones(len(captions), int), len(videos)),
                ("v2t", np.array([len(texts_of[name]) for name in videos]), len(captions)),
            )
            for metric, value in chance_of_recall(right, gallery).items()
        },
        items={
            "texts": len(captions),
            f"of them cut at {length} tokens": cut,
            "videos": len(videos),
            **again,
        },
        protocol={
            **protocol,
            "paragraph": paragraph,
            "max_text_length": length,
            "dual_softmax": dual_softmax,
            "shuffle_draws": draws,
            "seed": seed,
        },
        failed=failed,
        reference_ties={f"t2v_{metric}": value for metric, value in reference_ties.items()},
    )


def score_retrieval(
    texts: np.ndarray,
    features: ClipFeatures,
    owners: Sequence[str],
    videos: Sequence[str],
    controls: Sequence[str] = (),
    dual_softmax: bool = False,
    seed: int = 0,
) -> tuple[dict[str, dict[str, Interval]], dict[str, Comparison], dict[str, float]]:
    """Scores of features; one matrix (texts, videos) at a time is in memory.

    Args:
        texts: (texts, P); owners: the video of each.
        videos: names of the gallery.
        controls, dual_softmax, seed: see `evaluate_retrieval`.

    Returns:
        Scores under "full" and every control; paired tests against averaged frames; and the metrics from text to
        video by the tie rule of the released code.
    """
    numbers = {name: number for number, name in enumerate(videos)}
    of_texts, of_videos = [numbers[name] for name in owners], range(len(videos))
    ranks: dict[str, dict[str, np.ndarray]] = {"t2v": {}, "v2t": {}}
    for condition in features.features:
        similarity = _similarity(texts, features, condition, videos, dual_softmax)
        ranks["t2v"][condition] = retrieval_ranks(similarity, of_texts, of_videos)
        ranks["v2t"][condition] = retrieval_ranks(similarity.T, of_videos, of_texts)
        if condition == FULL:
            reference_ties = rank_metrics(retrieval_ranks(similarity, of_texts, of_videos, True))
    queries = {"t2v": owners, "v2t": videos}
    scores = {
        condition: {
            f"{direction}_{metric}": interval
            for direction, of_direction in ranks.items()
            for metric, interval in _rank_scores(draws_of(of_direction, condition), queries[direction], seed).items()
        }
        for condition in (FULL, *controls)
    }
    against = {}
    if "frame_average" in controls:
        for direction, of_direction in ranks.items():
            hits = [of_direction[condition] <= 1 for condition in (FULL, "frame_average")]
            against[f"{direction}_R1"] = compare(*hits, queries[direction], seed=seed).scaled(100)
    return scores, against, reference_ties


def chance_of_recall(right: np.ndarray, gallery: int) -> dict[str, float]:
    """What a random order gives, in percent; right: (queries,) how many answers of each query are right."""
    found = {}
    for k in RECALL_AT:
        missed = np.ones(len(right))
        for place in range(min(k, gallery)):  # none of them at this place, nor before
            missed *= np.clip(gallery - place - right, 0, None) / (gallery - place)
        found[f"R{k}"] = 100 * float(1 - missed.mean())
    return found


def dual_softmax_scores(similarity: np.ndarray, scale: float = 100.0) -> np.ndarray:
    """Scores (queries, gallery), each times the softmax of its column over the queries."""
    weights = np.exp(scale * (similarity - similarity.max(axis=0, keepdims=True)))
    return similarity * weights / weights.sum(axis=0, keepdims=True)


def _similarity(
    texts: np.ndarray, features: ClipFeatures, condition: str, videos: Sequence[str], dual_softmax: bool
) -> np.ndarray:
    scores = cosine_similarity(texts, features.stacked(condition, videos))
    return dual_softmax_scores(scores) if dual_softmax else scores


def _rank_scores(draws: list[np.ndarray], queries: Sequence[str], seed: int) -> dict[str, Interval]:
    """Recall in percent, median and mean rank; over several draws, each query stands in all of them."""
    ranks = np.concatenate(draws)
    owners = list(queries) * len(draws)
    scores = {f"R{k}": mean_interval(ranks <= k, owners, seed=seed).scaled(100) for k in RECALL_AT}
    scores["MdR"] = median_interval(ranks, owners, seed=seed)
    scores["MnR"] = mean_interval(ranks, owners, seed=seed)
    return scores
