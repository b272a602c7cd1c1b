"""Zero-shot recognition: top-k accuracy of videos against the texts of the classes."""

from collections.abc import Sequence

import numpy as np

from .retrieval import Features, cosine_similarity, retrieval_ranks


def recognition_metrics(
    video_features: Features, class_features: Features, labels: Sequence[int], top: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Share of videos whose right class is among the best k by cosine, single view, as released.

    Args:
        video_features: (videos, D), class_features: (classes, D); they need not be normalised.
        labels: the right class of each video, 0-based.
        top: the values of k; those that the number of classes makes trivial (k >= classes) are left out.

    Returns:
        `top1`, `top5`, ... as shares in 0-1. Ties count as in `retrieval_ranks`.

    Raises:
        ValueError: for labels outside the classes or of another number than the videos.
    """
    scores = cosine_similarity(video_features, class_features)
    labels = np.asarray(labels)
    if labels.shape != (len(scores),):
        raise ValueError(f"Got labels of shape {labels.shape} for {len(scores)} videos; expected one label per video.")
    classes = scores.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"Labels run from {labels.min()} to {labels.max()}; with {classes} classes: 0 to {classes - 1}."
        )
    ranks = retrieval_ranks(scores, labels, np.arange(classes))
    return {f"top{k}": float(np.mean(ranks <= k)) for k in top if k < classes}
