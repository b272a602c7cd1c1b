"""Scores on moving digits: which motion, in which order, and retrieval over all captions, beside the controls."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..data.moving_digits import COLOURS, DIGITS, MOTIONS, all_captions, clip_caption, opposite
from ..models.modeling_bt_adapter import BTAdapterModel
from ..models.processing_bt_adapter import BTAdapterProcessor
from .controls import CONTROLS
from .features import FULL, order_features
from .retrieval import Features, cosine_similarity, retrieval_metrics


SCORES = ("motion", "order", "object", "t2v_R1")


def motion_scores(
    caption_features: Features, video_features: Features, facts: Sequence[dict[str, str]]
) -> dict[str, float]:
    """Scores of clips (V, D) against the captions (360, D) in the order of `all_captions`, all in percent.

    Args:
        facts: digit, colour and motion of each clip.

    Returns:
        motion: the right one of the six captions with the clip's digit and colour is the nearest (chance 16.7; whoever
            tells only the kind of motion and not its direction gets 50).
        order: it is nearer than the caption of the opposite motion (chance 50).
        object: the nearest of all captions names the right digit and colour (chance 1.7).
        t2v_R1: the nearest clip of each caption that has clips here shows what the caption says.
    """
    captions = all_captions()
    scores = cosine_similarity(video_features, caption_features)
    wanted = [clip_caption(fact["digit"], fact["colour"], fact["motion"]) for fact in facts]
    right = {"motion": [], "order": [], "object": []}
    for row, fact in zip(scores, facts, strict=True):
        first = captions.index(clip_caption(fact["digit"], fact["colour"], next(iter(MOTIONS))))
        of_object = dict(zip(MOTIONS, row[first : first + len(MOTIONS)], strict=True))
        right["motion"].append(max(of_object, key=of_object.get) == fact["motion"])
        right["order"].append(of_object[fact["motion"]] > of_object[opposite(fact["motion"])])
        right["object"].append(row.argmax() // len(MOTIONS) == first // len(MOTIONS))
    present = [index for index, caption in enumerate(captions) if caption in set(wanted)]
    retrieval = retrieval_metrics(
        torch.as_tensor(np.asarray(caption_features))[present],
        video_features,
        [captions[index] for index in present],
        wanted,
    )
    return {**{name: 100 * float(np.mean(values)) for name, values in right.items()}, "t2v_R1": retrieval["t2v_R1"]}


@torch.inference_mode()
def evaluate_moving_digits(
    model: BTAdapterModel,
    processor: BTAdapterProcessor,
    clips: Iterable[Sequence],
    facts: Sequence[dict[str, str]],
    draws: int = 3,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """`motion_scores` of the model and of every control on the same clips.

    Args:
        clips: batches of videos, in anything that the processor reads.
        facts: digit, colour and motion of each clip, in the order of the clips.
        draws: permutations of every clip in the control `shuffled`, whose scores are averaged.
        seed: of those permutations.

    Returns:
        `{"bt_adapter": scores, "frame_average": scores, "one_frame": ..., "shuffled": ..., "reversed": ...}`.
    """
    model.eval()
    texts = processor(text=all_captions(), padding=True, return_tensors="pt").to(model.device)
    text_features = model.get_text_features(**texts).pooler_output.float().cpu()
    generator = torch.Generator().manual_seed(seed)
    features: dict[str, list[torch.Tensor]] = {}
    for batch in clips:
        videos = processor(videos=list(batch), return_tensors="pt")["pixel_values_videos"]
        for name, values in order_features(model, videos, CONTROLS, draws, generator):
            features.setdefault(name, []).append(values.float().cpu())
    scores: dict[str, list[dict[str, float]]] = {}
    for name, values in features.items():
        group = "bt_adapter" if name == FULL else "shuffled" if name.startswith("shuffled_") else name
        scores.setdefault(group, []).append(motion_scores(text_features, torch.cat(values), facts))
    averaged = {
        group: {score: float(np.mean([run[score] for run in runs])) for score in SCORES}
        for group, runs in scores.items()
    }
    return {group: averaged[group] for group in ("bt_adapter", "frame_average", "one_frame", "shuffled", "reversed")}


def format_scores(scores: dict[str, dict[str, float]]) -> str:
    """The scores as a table for people."""
    names = {
        "bt_adapter": "BT-Adapter",
        "frame_average": "frame-averaged CLIP",
        "one_frame": "one frame only",
        "shuffled": "frames shuffled",
        "reversed": "frames reversed",
    }
    chance = {
        "motion": 100 / len(MOTIONS),
        "order": 50.0,
        "object": 100 / len(DIGITS) / len(COLOURS),
        "t2v_R1": 100 / len(all_captions()),
    }
    lines = [f"{'%':<22}{'motion':>8}{'order':>8}{'object':>8}{'R@1':>8}"]
    for label, row in [*((names[name], scores[name]) for name in scores), ("(chance)", chance)]:
        lines.append(f"{label:<22}" + "".join(f"{row[name]:>8.1f}" for name in SCORES))
    return "\n".join(lines)
