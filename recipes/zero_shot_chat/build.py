"""Does a chat model follow videos when an adapter is only plugged in, as in Table 4 of the paper, in the small?

    pip install -c constraints.txt -e '.[train,quickstart]'
    python -m recipes.zero_shot_chat.build -o build/zero-shot     # about 35 minutes of one core, all in all

The chat model of `moving_digits_chat` knows the words of motion, has seen none, and does not answer when the adapter
is plugged in. What the paper's LLaVA had besides is pictures that show motion: photographs say "running". Here a
*trail* is such a picture, a clip with its past fading. CLIP and then the language model learn from stills and trails;
the branch is pretrained beside that CLIP as always; then it is plugged in, and nothing was ever tuned on a video.

Every step leaves its files in the output folder and is skipped when they are there.
"""

import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, CLIPModel, set_seed

from bt_adapter_hf import BTAdapterLlavaProcessor, BTAdapterProcessor, save_bt_adapter
from bt_adapter_hf.assets import default_chat_model_path, default_model_path
from bt_adapter_hf.data.moving_digits import (
    MOTIONS,
    all_captions,
    all_still_captions,
    clip,
    still,
    still_phrasings,
)
from bt_adapter_hf.data.moving_digits_chat import conversation
from bt_adapter_hf.evaluation.controls import reverse_frames, shuffle_frames
from bt_adapter_hf.models.modeling_bt_adapter_llava import BTAdapterLlavaForConditionalGeneration

from ..moving_digits.build import fit_clip, train_branch, write_clip_files
from ..moving_digits_chat.build import (
    STILL_BATCH,
    STILL_LR,
    STILLS,
    build_llava,
    build_processor,
    choose,
    frame_averaged,
    plug_in,
    score,
    show_still,
    told_in_words,
    train,
)
from ..shared import TEST_SEED, TRAIN_SEED, make, parse_output


CLIP_STEPS, CLIP_BATCH, CLIP_LR = 600, 120, 5e-4  # from the CLIP of the package on
CHAT_STEPS = 400
NUM_FRAMES = 8
TEST_CLIPS = 240


def trail(split: str, seed: int, index: int) -> tuple[np.ndarray, str, dict[str, str]]:
    """One picture of a clip, uint8 (64, 64, 3): its last frame, and what was before it the fainter the longer ago.

    The caption and the facts are the clip's.
    """
    frames, caption, facts = clip(split, seed, index)
    weights = np.exp(np.linspace(-2.0, 0.0, len(frames)))[:, None, None, None]
    return np.round((frames * weights).max(axis=0)).astype(np.uint8), caption, facts


def show_trail(split: str, seed: int, index: int) -> tuple[dict[str, Any], dict[str, str]]:
    image, _, facts = trail(split, seed, index)
    return {"type": "image", "image": Image.fromarray(image)}, facts


def shuffled_index(count: int, place: int, seed: int) -> int:
    """Item `place` of an endless order in which every `count` in a row are all captions once."""
    block, nth = divmod(place, count)
    return block * count + int(np.random.default_rng([seed, count, block]).permutation(count)[nth])


class Pictures(torch.utils.data.IterableDataset):
    """A stream of `count` (image, caption): stills and trails by turns."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self) -> Iterator[dict]:
        for place in range(self.count // 2):
            image, _, facts = still("train", TRAIN_SEED, shuffled_index(len(all_still_captions()), place, TRAIN_SEED))
            rng = np.random.default_rng([TRAIN_SEED, 2, place])
            yield {"image": image, "text": rng.choice(still_phrasings(**facts)).item()}
            image, caption, _ = trail("train", TRAIN_SEED, shuffled_index(len(all_captions()), place, TRAIN_SEED))
            yield {"image": image, "text": caption}


def train_clip(folder: Path) -> None:
    """The CLIP of the package, further on stills and trails. It sees no video."""
    set_seed(TRAIN_SEED)
    start = AutoModel.from_pretrained(default_model_path())
    processor = BTAdapterProcessor.from_pretrained(default_model_path())
    config = CLIPModel.config_class(
        text_config=start.config.text_config.to_dict(),
        vision_config=start.config.vision_config.backbone.to_dict(),
        projection_dim=start.config.projection_dim,
    )
    model = CLIPModel(config)
    weights = {key.replace("vision_model.vision_model.", "vision_model."): v for key, v in start.state_dict().items()}
    wanted = model.state_dict().keys()
    model.load_state_dict({key: value for key, value in weights.items() if key in wanted})

    fit_clip(
        model,
        processor,
        Pictures(CLIP_STEPS * CLIP_BATCH),
        folder,
        max_steps=CLIP_STEPS,
        per_device_train_batch_size=CLIP_BATCH,
        learning_rate=CLIP_LR,
    )


class WordsAndPictures(torch.utils.data.IterableDataset):
    """An endless stream of conversations: about something told in words, a still and a trail by turns."""

    def __iter__(self) -> Iterator[list[dict]]:
        for place in range(CHAT_STEPS * STILL_BATCH // 3 + 1):
            rng = np.random.default_rng([TRAIN_SEED, 3, place])
            yield conversation(*show_still("train", TRAIN_SEED, shuffled_index(len(STILLS), place, TRAIN_SEED)), rng)
            index = shuffled_index(len(all_captions()), place, TRAIN_SEED)
            yield conversation(*show_trail("train", TRAIN_SEED, index), rng)
            kind = rng.choice(["still", "clip", "film"])
            yield conversation(*told_in_words(kind, rng), rng)


def train_chat(clip_folder: Path, folder: Path) -> None:
    """A new projector, and the language model of the package further, on words and pictures.

    That language model has seen stills only: it is frozen where the package's chat model is tuned on clips.
    """
    set_seed(TRAIN_SEED)
    processor = build_processor()
    model = build_llava(processor)
    known = BTAdapterLlavaForConditionalGeneration.from_pretrained(default_chat_model_path())
    model.model.language_model.load_state_dict(known.model.language_model.state_dict())
    model.lm_head.load_state_dict(known.lm_head.state_dict())
    model.model.vision_tower.load_state_dict(CLIPModel.from_pretrained(clip_folder).vision_model.state_dict())
    train(
        model,
        processor,
        WordsAndPictures(),
        folder,
        max_steps=CHAT_STEPS,
        per_device_train_batch_size=STILL_BATCH,
        learning_rate=STILL_LR,
        lr_multipliers={},
    )


def test_videos() -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Held-out clips as the model sees them, uint8 (8, 64, 64, 3)."""
    seen = []
    for place in range(TEST_CLIPS):
        frames, _, facts = clip("test", TEST_SEED, shuffled_index(len(all_captions()), place, TEST_SEED))
        rows = ((np.arange(NUM_FRAMES) + 0.5) * len(frames) / NUM_FRAMES).astype(int)
        seen.append(({"type": "video", "video": frames[rows]}, facts))
    return seen


@torch.inference_mode()
def seen_by(model: BTAdapterLlavaForConditionalGeneration, processor, part: dict[str, Any]) -> dict[str, np.ndarray]:
    """The first token that stands in the prompt for a picture or a video, the CLS, before and after projection."""
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
    inputs = processor.apply_chat_template([messages], tokenize=True, return_dict=True, return_tensors="pt")
    kept: list[torch.Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda _, inputs, output: kept.append(inputs[0]))
    try:
        if part["type"] == "image":
            output = model.get_image_features(inputs["pixel_values"])
        else:
            output = model.get_video_features(inputs["pixel_values_videos"])
    finally:
        hook.remove()
    return {"before": kept[0][0, 0].numpy(), "after": output.pooler_output[0][0].numpy()}


def inside(directions: np.ndarray, span: np.ndarray, share: float = 0.99) -> float:
    """Percent of the energy of directions (n, D) within the components that hold `share` of that of span (m, D)."""
    _, values, axes = np.linalg.svd(span - span.mean(axis=0), full_matrices=False)
    energy = np.cumsum(values**2) / (values**2).sum()
    kept = axes[: int(np.searchsorted(energy, share)) + 1]
    return 100 * float(((directions @ kept.T) ** 2).sum() / (directions**2).sum())


def probe(model, average, processor, videos) -> dict[str, Any]:
    """Why it moves, or why not.

    - Of what sets opposite motions apart in the CLS of a video: how much lies where stills vary, or trails too.
    - A linear reader of motion that has seen trails only: how well it reads trails, and videos.
    """
    model.eval()
    motions = list(MOTIONS)
    stills = [seen_by(model, processor, show_still("train", TRAIN_SEED, i)[0]) for i in range(0, len(STILLS), 2)]
    shown = [show_trail("train", TRAIN_SEED, shuffled_index(len(all_captions()), i, 7)) for i in range(720)]
    trails = [seen_by(model, processor, part) for part, _ in shown]
    held_out = [show_trail("test", TEST_SEED, i) for i in range(len(all_captions()))]
    tested = [seen_by(model, processor, part) for part, _ in held_out]
    fused = [seen_by(model, processor, part) for part, _ in videos]
    averaged = [seen_by(average, processor, part) for part, _ in videos]

    def labels(facts_of) -> list[int]:
        return [motions.index(facts["motion"]) for _, facts in facts_of]

    results: dict[str, Any] = {}
    for where in ("before", "after"):
        table = {
            name: np.stack([one[where] for one in rows])
            for name, rows in (
                ("stills", stills), ("trails", trails), ("tested", tested), ("fused", fused), ("averaged", averaged),
            )
        }  # fmt: skip
        motion = np.array(labels(videos))
        means = np.stack([table["fused"][motion == number].mean(axis=0) for number in range(len(motions))])
        apart = means[0::2] - means[1::2]  # MOTIONS come in opposite pairs
        reader = LogisticRegression(max_iter=2000, C=1.0)
        scale = table["trails"].std(axis=0) + 1e-6
        reader.fit(table["trails"] / scale, labels(shown))
        results[where] = {
            "direction inside stills": inside(apart, table["stills"]),
            "direction inside stills and trails": inside(apart, np.concatenate([table["stills"], table["trails"]])),
            "trails read": 100 * reader.score(table["tested"] / scale, labels(held_out)),
            "videos read, adapter": 100 * reader.score(table["fused"] / scale, motion),
            "videos read, frame average": 100 * reader.score(table["averaged"] / scale, motion),
        }
    return results


def score_plugged(plugged, average, processor, videos) -> dict[str, dict[str, float]]:
    """Answers of a chat model with an adapter plugged in, beside those from frame averages, and the controls."""
    pictures = [show_still("test", TEST_SEED, index) for index in range(len(STILLS))]
    trails = [show_trail("test", TEST_SEED, index) for index in range(len(all_captions()))]
    generator = torch.Generator().manual_seed(TEST_SEED)
    shuffled = partial(shuffle_frames, generator=generator)
    kinds = ("motion", "digit", "colour")

    def last_frame(frames: torch.Tensor) -> torch.Tensor:
        return frames[:, -1:].expand_as(frames)

    return {
        "stills": score(plugged, processor, pictures, ("digit", "colour", "place", "size", "picture")),
        "trails": score(plugged, processor, trails, kinds),
        "frame average": score(average, processor, videos, kinds),
        "adapter": score(plugged, processor, videos, kinds),
        "frame average, likeliest of 6": choose(average, processor, videos, ("motion",)),
        "adapter, likeliest of 6": choose(plugged, processor, videos, ("motion",)),
        "  last frame alone": choose(plugged, processor, videos, ("motion",), last_frame),
        "  frames shuffled": choose(plugged, processor, videos, ("motion",), shuffled),
        "  frames reversed": choose(plugged, processor, videos, ("motion",), reverse_frames),
    }


def evaluate(output: Path) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    processor, videos = BTAdapterLlavaProcessor.from_pretrained(output / "chat"), test_videos()
    adapter = output / "adapter"
    if not adapter.is_dir():
        save_bt_adapter(AutoModel.from_pretrained(output / "model"), adapter)
    plugged = plug_in(output / "chat", adapter)
    average = frame_averaged(plug_in(output / "chat", adapter))
    return score_plugged(plugged, average, processor, videos), probe(plugged, average, processor, videos)


def format_scores(scores: dict[str, dict[str, float]]) -> str:
    kinds = ("motion", "digit", "colour", "place", "size", "picture")
    lines = [f"{'%':<32}" + "".join(f"{kind:>8}" for kind in kinds)]
    for name, row in scores.items():
        cells = (f"{row[kind]:8.1f}" if kind in row else f"{'':8}" for kind in kinds)
        lines.append((f"{name:<32}" + "".join(cells)).rstrip())
    return "\n".join(lines)


def format_table(scores: dict[str, dict[str, float]], probes: dict[str, Any]) -> str:
    lines = [format_scores(scores), "", f"{'%':<40}{'before':>10}{'after':>10}  the projection"]
    lines += [f"{name:<40}{probes['before'][name]:10.1f}{probes['after'][name]:10.1f}" for name in probes["before"]]
    return "\n".join(lines)


def main() -> None:
    output = parse_output(__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    clip_folder, clips, model, chat = (output / name for name in ("clip", "clips", "model", "chat"))
    results_file = output / "results.json"
    steps = (
        ("clip", clip_folder / "processor_config.json", lambda: train_clip(clip_folder)),
        ("clips", clips / "test" / "metadata.jsonl", lambda: write_clip_files(clips)),
        ("branch", model / "processor_config.json", lambda: train_branch(clip_folder, clips, model)),
        ("chat", chat / "processor_config.json", lambda: train_chat(clip_folder, chat)),
    )
    seconds = make(steps, results_file)
    scores, probes = evaluate(output)
    results_file.write_text(json.dumps({"seconds": seconds, "scores": scores, "probe": probes}, indent=2) + "\n")
    print(f"seconds: {seconds}\n{format_table(scores, probes)}")


if __name__ == "__main__":
    main()
