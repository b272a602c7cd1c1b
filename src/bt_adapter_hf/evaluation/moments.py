"""Moment search scored: for each caption of a film, whether the moment that is found is the one that it tells of."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..search.encoding import VideoEncoder, unit_rows
from ..search.frame_states import FrameStates
from ..search.moments import Windows, shared, suppress
from ..search.windows import Moment, Plan, read_film


CONDITIONS = ("bt_adapter", "frame_average", "one_frame", "shuffled", "reversed")
SCORES = ("R1_iou50", "R1_iou70", "R5_iou50", "order")


@torch.inference_mode()
def window_features(
    encoder: VideoEncoder, path: str, windows: Windows, batch_size: int = 8, seed: int = 0
) -> tuple[list[Moment], dict[str, np.ndarray]]:
    """The windows of a film, and unit features (windows, P) of them under each of `CONDITIONS`.

    The frozen tower sees each frame twice: once for the branch, which reads the frames of a window as they are, in a
    random order and backwards, and once for the image features of frame-averaged CLIP and of CLIP on the middle frame.
    """
    model, generator = encoder.model, torch.Generator().manual_seed(seed)
    found: dict[str, list[np.ndarray]] = {condition: [] for condition in CONDITIONS}
    plan, done = None, 0
    for step in read_film(encoder, path, windows, batch_size):
        if isinstance(step, Plan):
            plan, done, states, images = step, 0, FrameStates(model), []
            found = {condition: [] for condition in CONDITIONS}
            continue
        if plan is None:
            raise ValueError(f"{path} is shorter than a window of {windows.window:g} s.")
        states.add(step)
        images.append(model.get_image_features(step.to(model.device, model.dtype)).pooler_output.float().cpu())
        ready = torch.from_numpy(plan.frames[done:][plan.frames[done:, -1] < len(states)])
        if len(ready):
            shuffled = ready.gather(1, torch.rand(ready.shape, generator=generator).argsort(dim=1))
            of_frames = torch.nn.functional.normalize(torch.cat(images), dim=-1)
            features = {
                "bt_adapter": states.features(ready),
                "shuffled": states.features(shuffled),
                "reversed": states.features(ready.flip(1)),
                "frame_average": of_frames[ready].mean(dim=1),
                "one_frame": of_frames[ready[:, ready.shape[1] // 2]],
            }
            for condition, values in features.items():
                found[condition].append(unit_rows(values, [path] * len(ready)))
            done += len(ready)
        if done < len(plan.frames):
            states.forget(int(plan.frames[done, 0]))
    return plan.moments, {condition: np.concatenate(parts) for condition, parts in found.items()}


def moment_scores(
    texts: np.ndarray, features: np.ndarray, spans: Sequence[tuple[float, float]], truth: Sequence[dict[str, Any]]
) -> list[dict[str, float]]:
    """Scores of each caption of one film, searched among its windows.

    Args:
        texts: unit features (captions, P); features: (windows, P).
        spans: start and end of each window.
        truth: of each caption its start and end, and with `opposite` those of the moment that is its reverse.

    Returns:
        R1_iou50, R1_iou70: the best moment overlaps the right one by that (intersection over union); R5_iou50: one of
        the best five does. order: the best window of the right moment is above the best one of its reverse; absent
        where the film has no reverse of it.
    """
    rows = [{"path": "", "start": start, "end": end} for start, end in spans]
    scores = []
    for of_query, wanted in zip(texts @ features.T, truth, strict=True):
        ranked = sorted(zip(of_query.tolist(), rows, strict=True), key=lambda hit: -hit[0])
        span = (wanted["start"], wanted["end"])
        best = [shared((row["start"], row["end"]), span) for _, row in suppress(ranked)[:5]]
        found = {"R1_iou50": best[0] >= 0.5, "R1_iou70": best[0] >= 0.7, "R5_iou50": max(best) >= 0.5}
        if wanted.get("opposite") is not None:
            right, wrong = (
                max((s for s, window in zip(of_query, spans, strict=True) if shared(window, place) >= 0.5), default=-1)
                for place in (span, wanted["opposite"])
            )
            found["order"] = right > wrong
        scores.append({name: float(value) for name, value in found.items()})
    return scores


def evaluate_films(
    encoder: VideoEncoder, films: Sequence[tuple[str, Sequence[Any]]], windows: Windows, batch_size: int = 8
) -> dict[str, dict[str, float]]:
    """`moment_scores` in percent over films of [`write_films`], of the model and of every control.

    Args:
        films: path and moments (`FilmMoment`) of each.
    """
    from ..data.moving_digits import clip_caption, opposite

    rows: dict[str, list[dict[str, float]]] = {condition: [] for condition in CONDITIONS}
    for path, moments in films:
        place = {moment.text: (moment.start, moment.end) for moment in moments}
        truth = [
            {
                "start": moment.start,
                "end": moment.end,
                "opposite": place.get(clip_caption(moment.digit, moment.colour, opposite(moment.motion))),
            }
            for moment in moments
        ]
        texts = encoder.encode_texts([moment.text for moment in moments])
        found, features = window_features(encoder, path, windows, batch_size)
        spans = [(moment.start, moment.end) for moment in found]
        for condition in CONDITIONS:
            rows[condition] += moment_scores(texts, features[condition], spans, truth)
    return {
        condition: {name: 100 * float(np.mean([score[name] for score in scores if name in score])) for name in SCORES}
        for condition, scores in rows.items()
    }


def format_moments(scores: dict[str, dict[str, float]]) -> str:
    """The scores as a table for people."""
    names = {
        "bt_adapter": "BT-Adapter",
        "frame_average": "frame-averaged CLIP",
        "one_frame": "one frame only",
        "shuffled": "frames shuffled",
        "reversed": "frames reversed",
    }
    lines = [f"{'%':<22}{'R@1 .5':>8}{'R@1 .7':>8}{'R@5 .5':>8}{'order':>8}"]
    for condition, label in names.items():
        lines.append(f"{label:<22}" + "".join(f"{scores[condition][name]:>8.1f}" for name in SCORES))
    return "\n".join(lines)
