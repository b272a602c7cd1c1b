"""What all runs share, made once: clips of the harder world, what the frozen CLIP makes of them, and its text tower.

The CLIP is the shipped one. It has seen stills with short sentences only, so its text tower first reads the captions
of this world, as a CLIP's has read of motion: each beside a single frame of its clip, which tells what moves and never
which way, and beside a paraphrase, which holds captions apart that differ in a word or in the order of words.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import set_seed

from bt_adapter_hf import BTAdapterForPreTraining, BTAdapterProcessor
from bt_adapter_hf.adapters.writing import written_whole
from bt_adapter_hf.data.moving_digits import all_still_captions
from bt_adapter_hf.data.moving_digits_harder import Story, clip, others, story

from ..moving_digits.build import ASSETS, PRETRAINING


TEXT_TOWER = Path(__file__).parent / "results" / "text_tower.safetensors"
NUM_FRAMES, LONG_FRAMES = 8, 16
TRAIN_CLIPS, TEST_CLIPS, LONG_CLIPS = 4800, 360, 180
TRAIN_SEED, TEST_SEED = 0, 1000
OTHER_MOTIONS = 7  # wrong motions beside the right one in the score "motion"
STATES = (1, 2, 3, 4)  # of the shipped CLIP, four layers: what a branch of up to four layers reads
READ_STEPS, READ_BATCH, READ_LR = 400, 64, 5e-4


@dataclass(frozen=True)
class Clips:
    """Clips of one split: pixels uint8 (n, T, 3, 48, 48) and states {index: float32 (n, T, 37, 128)}, on the disk."""

    stories: list[Story]
    pixels: np.ndarray
    states: dict[int, np.ndarray]

    def __len__(self) -> int:
        return len(self.stories)

    def videos(self, rows: np.ndarray, processor: BTAdapterProcessor) -> torch.Tensor:
        """(rows, T, 3, 48, 48) as the model takes them."""
        rules = processor.video_processor
        x = torch.from_numpy(self.pixels[rows]).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (rules.image_mean, rules.image_std))
        return (x - mean) / std

    def backbone_states(self, rows: np.ndarray, needed: list[int]) -> dict[int, torch.Tensor]:
        return {n: torch.from_numpy(self.states[n][rows]) for n in needed}


def load_start(folder: Path, **fields: Any) -> BTAdapterForPreTraining:
    """The dual encoder in `folder`; a branch that it lacks is fresh, and the caller has set the seed."""
    fields = {**PRETRAINING, **fields}
    return BTAdapterForPreTraining.from_pretrained(folder, dtype="float32", **fields)


def make_clips(folder: Path, split: str, seed: int, count: int, num_frames: int) -> Clips:
    """Renders and encodes; what is there already is opened."""
    stories = [story(split, seed, index) for index in range(count)]
    done = folder / "done.json"
    plan = {"split": split, "seed": seed, "count": count, "num_frames": num_frames}
    files = {n: folder / f"states{n}.npy" for n in STATES}
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        processor = BTAdapterProcessor.from_pretrained(ASSETS)
        tower = load_start(ASSETS).eval().vision_model
        shape = (count, num_frames, 3, 48, 48)
        pixels = np.lib.format.open_memmap(folder / "pixels.npy", mode="w+", dtype=np.uint8, shape=shape)
        shape = (count, num_frames, 37, 128)
        arrays = {
            n: np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape) for n, file in files.items()
        }
        for first in tqdm(range(0, count, 60), desc=f"{split} clips"):
            frames = [clip(split, seed, index, num_frames)[0] for index in range(first, min(first + 60, count))]
            batch = processor.video_processor(
                videos=frames, do_sample_frames=False, do_rescale=False, do_normalize=False, return_tensors="pt"
            )["pixel_values_videos"]
            pixels[first : first + len(frames)] = batch.round().clamp(0, 255).to(torch.uint8).numpy()
            rows = np.arange(first, first + len(frames))
            x = Clips(stories, pixels, {}).videos(rows, processor)
            for n, state in tower.encode_frames(x, list(STATES)).items():
                arrays[n][rows] = state.numpy()
        for array in (pixels, *arrays.values()):
            array.flush()
        with written_whole(done) as path:
            path.write_text(json.dumps(plan))
    found = json.loads(done.read_text())
    if found != plan:
        raise ValueError(f"{folder} holds the clips {found}, here {plan} are wanted: take another output folder.")
    return Clips(
        stories,
        np.load(folder / "pixels.npy", mmap_mode="r"),
        {n: np.load(file, mmap_mode="r") for n, file in files.items()},
    )


def paraphrase(told: Story) -> str:
    """The same story in another order of words: "from the left to the right moves a red seven"."""
    parts = []
    for mover in reversed(told.movers):
        who, way = str(mover).split(" from ", 1)
        a, colour, digit, *verb = who.split()
        parts.append(f"from {way} {' '.join(verb)} {a} {colour} {digit}")
    return " and ".join(parts)


def read_captions(clips: Clips) -> dict[str, torch.Tensor]:
    """Trains the text tower of the shipped CLIP, and nothing else; returns its weights."""
    start = time.process_time()
    set_seed(TRAIN_SEED)
    model, processor = load_start(ASSETS), BTAdapterProcessor.from_pretrained(ASSETS)
    model.requires_grad_(False)
    learning = [*model.text_model.parameters(), *model.text_projection.parameters()]
    for parameter in learning:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(learning, lr=READ_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, READ_STEPS)
    rng, tau = np.random.default_rng(TRAIN_SEED), PRETRAINING["temperature"]

    def embed(texts: list[str]) -> torch.Tensor:
        tokens = processor(text=texts, padding=True, truncation=True, return_tensors="pt")
        return torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)

    stills = all_still_captions()
    with torch.no_grad():
        before = embed(stills)
        last = torch.from_numpy(np.ascontiguousarray(clips.states[STATES[-1]][:, :, 0]))  # (n, T, D)
        norm = model.vision_model.vision_model.post_layernorm
        images = torch.nn.functional.normalize(model.visual_projection(norm(last)), dim=-1)
    for _ in tqdm(range(READ_STEPS), desc="text tower"):
        rows = rng.choice(len(clips), READ_BATCH, replace=False)
        told = [clips.stories[row] for row in rows]
        told += [one.reversed() for one in told if not one.symmetric]
        kept = rng.choice(len(stills), 32, replace=False)
        texts = [one.caption for one in told] + [paraphrase(one) for one in told] + [stills[n] for n in kept]
        x = embed(texts)
        said, again, still = x[: len(told)], x[len(told) : 2 * len(told)], x[2 * len(told) :]
        target = torch.arange(len(told))
        logits = said @ again.t() / tau
        loss = cross_entropy(logits, target) + cross_entropy(logits.t(), target)
        frame = images[torch.from_numpy(rows), torch.from_numpy(rng.integers(images.shape[1], size=READ_BATCH))]
        logits = frame @ said[:READ_BATCH].t() / tau
        loss = loss + cross_entropy(logits, target[:READ_BATCH])
        loss = loss + cross_entropy(logits.t(), target[:READ_BATCH])
        loss = loss + 10 * (still - before[torch.from_numpy(kept)]).square().sum(dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
    print(f"text tower: {time.process_time() - start:.0f} s of the CPU, last loss {loss.item():.2f}")
    return {name: x.contiguous() for name, x in model.state_dict().items() if name.startswith("text_")}


def write_start(folder: Path, text_tower: Path) -> None:
    """The shipped CLIP, which has read the captions, without the branch beside it, which has learned already."""
    model = load_start(ASSETS)
    unknown = model.load_state_dict(load_file(text_tower), strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{text_tower} holds weights that are none of a text tower: {unknown}.")
    learned = (".bt_adapter.", "mbta_head.")
    kept = {name: x for name, x in model.state_dict().items() if not any(part in name for part in learned)}
    model.save_pretrained(folder, state_dict=kept)
    BTAdapterProcessor.from_pretrained(ASSETS).save_pretrained(folder)


class World:
    """Clips, texts and the starting CLIP, made in `folder` on first use.

    The text tower is trained only where its file is missing: rows of several machines rest on the same one.
    """

    def __init__(self, folder: Path, train: int = TRAIN_CLIPS, test: int = TEST_CLIPS, text_tower: Path = TEXT_TOWER):
        self.train = make_clips(folder / "train", "train", TRAIN_SEED, train, NUM_FRAMES)
        self.test = make_clips(folder / "test", "test", TEST_SEED, test, NUM_FRAMES)
        long = min(LONG_CLIPS, test)
        self.long = make_clips(folder / "long", "test", TEST_SEED, long, LONG_FRAMES)
        if not text_tower.is_file():
            with written_whole(text_tower) as path:
                save_file(read_captions(self.train), path)
        mark = hashlib.sha256(text_tower.read_bytes()).hexdigest()[:8]  # another text tower starts another model
        self.start = folder / f"start-{mark}"
        if not (self.start / "processor_config.json").is_file():
            write_start(self.start, text_tower)
        self.processor = BTAdapterProcessor.from_pretrained(self.start)
        # Of each test clip: its caption, its opposite, other motions, other looks.
        self.texts: list[str] = []
        self.asked: list[dict[str, Any]] = []
        for index, told in enumerate(self.test.stories):
            motions, looks = others(told, OTHER_MOTIONS, np.random.default_rng([TEST_SEED, index]))
            self.asked.append(
                {
                    "caption": self._number(told.caption),
                    "opposite": None if told.symmetric else self._number(told.reversed().caption),
                    "motions": [self._number(text) for text in motions],
                    "looks": [self._number(text) for text in looks],
                }
            )

        # The text tower is frozen in all settings.
        self.text_features = self._embed(folder / f"text_features-{mark}.npy")

    @torch.inference_mode()
    def _embed(self, file: Path) -> torch.Tensor:
        """(texts, P)"""
        if file.is_file() and len(kept := np.load(file)) == len(self.texts):
            return torch.from_numpy(kept)
        model, parts = load_start(self.start).eval(), []
        for first in tqdm(range(0, len(self.texts), 500), desc="texts"):
            tokens = self.processor(text=self.texts[first : first + 500], padding=True, return_tensors="pt")
            parts.append(model.get_text_features(**tokens).pooler_output)
        with written_whole(file) as path, open(path, "wb") as out:
            np.save(out, torch.cat(parts).numpy())
        return torch.cat(parts)

    def _number(self, text: str) -> int:
        numbers = self.__dict__.setdefault("_numbers", {})
        if text not in numbers:
            numbers[text] = len(self.texts)
            self.texts.append(text)
        return numbers[text]
