"""Text-to-video and video-to-text retrieval: ranks and the metrics made from them.

Ranks count from 1 and are deterministic: 1 + (wrong items scored higher) + (wrong items scored equal) / 2, the mean
over all ways of breaking the ties. Breaking them by position, as sorting does, would let the order of files decide.
"""

from collections.abc import Sequence

import numpy as np
import torch


Features = np.ndarray | torch.Tensor
RECALL_AT = (1, 5, 10)


def as_float_array(features: Features, name: str) -> np.ndarray:
    """The features as a float64 array (N, D), whatever they came as; `ValueError` unless 2-D, non-empty and finite."""
    if isinstance(features, torch.Tensor):
        features = features.detach().double().cpu().numpy()
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} must have shape (items, width) with at least one item, got {features.shape}.")
    if not np.isfinite(features).all():
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        raise ValueError(f"{name} holds NaN or infinity in {len(bad)} of {len(features)} rows, first row {bad[0]}.")
    return features


def cosine_similarity(queries: Features, gallery: Features) -> np.ndarray:
    """Cosine of every query (Q, D) with every gallery item (G, D): float32 (Q, G).

    Summed in float64 and rounded once, so that equal features get equal scores wherever they stand in the matrix.

    Raises:
        ValueError: if the widths differ, or a feature is NaN, infinite or all zeros.
    """
    queries, gallery = as_float_array(queries, "queries"), as_float_array(gallery, "gallery")
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"queries have width {queries.shape[1]} but the gallery has width {gallery.shape[1]}: both must come from "
            "the same model, after its projection."
        )
    for name, features in (("queries", queries), ("gallery", gallery)):
        norms = np.linalg.norm(features, axis=1, keepdims=True)
        if (norms == 0).any():
            raise ValueError(f"{name}: row {np.flatnonzero(norms[:, 0] == 0)[0]} is all zeros and has no direction.")
        features /= norms
    return (queries @ gallery.T).astype(np.float32)


def retrieval_ranks(
    similarity: np.ndarray,
    query_ids: Sequence | None = None,
    gallery_ids: Sequence | None = None,
    reference_ties: bool = False,
) -> np.ndarray:
    """Rank of the right gallery item for every query.

    Args:
        similarity: (Q, G) scores, higher is better.
        query_ids, gallery_ids: what belongs together (several captions of one video share its id, several videos may
            share a caption's). A query with several right items takes the rank of the best scored one among the wrong
            ones. Left out: row i belongs to column i.
        reference_ties: the rule of the released code: every position of the sorted row whose score equals the right
            item's is one more rank of that query, so tied queries are counted several times, once of them as a hit.
            Needs exactly one right item per query.

    Returns:
        float64 ranks from 1, one per query (more with `reference_ties`).

    Raises:
        ValueError: for NaN scores, ids that do not fit the matrix, or a query without a right item.
    """
    similarity = np.asarray(similarity)
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise ValueError(f"similarity must have shape (queries, gallery), both at least 1, got {similarity.shape}.")
    if np.isnan(similarity).any():
        raise ValueError(f"similarity holds {int(np.isnan(similarity).sum())} NaN scores; NaN cannot be ranked.")
    if (query_ids is None) != (gallery_ids is None):
        raise ValueError("Give both query_ids and gallery_ids, or neither.")
    if query_ids is None:
        query_ids, gallery_ids = range(similarity.shape[0]), range(similarity.shape[1])
    query_ids, gallery_ids = np.asarray(query_ids), np.asarray(gallery_ids)
    if (len(query_ids), len(gallery_ids)) != similarity.shape:
        raise ValueError(
            f"Got {len(query_ids)} query ids and {len(gallery_ids)} gallery ids for a similarity of shape "
            f"{similarity.shape}."
        )
    right = query_ids[:, None] == gallery_ids[None, :]
    counts = right.sum(axis=1)
    if (counts == 0).any():
        missing = np.flatnonzero(counts == 0)
        raise ValueError(
            f"{len(missing)} of {len(query_ids)} queries have no right item in the gallery, "
            f"first id {query_ids[missing[0]]!r}."
        )
    best = np.where(right, similarity, -np.inf).max(axis=1, keepdims=True)
    if not reference_ties:
        higher = ((similarity > best) & ~right).sum(axis=1)
        equal = ((similarity == best) & ~right).sum(axis=1)
        return 1 + higher + equal / 2
    if (counts > 1).any():
        raise ValueError("reference_ties needs exactly one right item per query, as the released code does.")
    # The tied scores stand side by side in the sorted row, right behind the higher ones.
    higher = (similarity > best).sum(axis=1)
    equal = (similarity == best).sum(axis=1)
    return np.concatenate([1.0 + np.arange(first, first + n) for first, n in zip(higher, equal, strict=True)])


def rank_metrics(ranks: np.ndarray) -> dict[str, float]:
    """`R1`, `R5`, `R10` in percent, median rank `MdR` and mean rank `MnR`, from ranks that count from 1."""
    recalls = {f"R{k}": 100.0 * float(np.mean(ranks <= k)) for k in RECALL_AT}
    return {**recalls, "MdR": float(np.median(ranks)), "MnR": float(np.mean(ranks))}


def retrieval_metrics(
    text_features: Features,
    video_features: Features,
    text_ids: Sequence | None = None,
    video_ids: Sequence | None = None,
    reference_ties: bool = False,
) -> dict[str, float]:
    """Both directions of retrieval from features (texts, D) and (videos, D), which need not be normalised.

    Args:
        text_ids, video_ids: see `retrieval_ranks`; left out, text i belongs to video i.
        reference_ties: the released tie rule, see `retrieval_ranks`. The released code reports text-to-video only.

    Returns:
        `t2v_R1`, `t2v_R5`, `t2v_R10`, `t2v_MdR`, `t2v_MnR` and the same five with `v2t_`.
    """
    similarity = cosine_similarity(text_features, video_features)
    directions = {"t2v": (similarity, text_ids, video_ids), "v2t": (similarity.T, video_ids, text_ids)}
    return {
        f"{direction}_{metric}": value
        for direction, (scores, queries, gallery) in directions.items()
        for metric, value in rank_metrics(retrieval_ranks(scores, queries, gallery, reference_ties)).items()
    }
