"""The model inside the package, tuned to find moments in films: its branch, on windows of moving-digit films.

    pip install -c constraints.txt -e '.[train,quickstart]'
    python -m recipes.moving_digits_moments.build -o build/moments      # one core

A run that is stopped goes on: finished steps are skipped, and the tuning begins at its last checkpoint.
"""

import json
import logging
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import set_seed

from bt_adapter_hf import BTAdapterModel
from bt_adapter_hf.adapters.writing import written_whole
from bt_adapter_hf.data.moving_digits import FPS
from bt_adapter_hf.data.moving_digits_films import FilmMoment, film, write_films
from bt_adapter_hf.evaluation.moments import evaluate_films, format_moments
from bt_adapter_hf.search.encoding import VideoEncoder
from bt_adapter_hf.search.moments import Windows, shared

from ..shared import TEST_SEED, TRAIN_SEED, make, parse_arguments


TRAIN_FILMS, TEST_FILMS = 24, 8
LENGTH = {"minutes": (1.5, 1.5), "moments": (30, 36)}  # of training films: dense, for pauses teach little
WINDOWS = Windows(2.0, 0.25)  # of training; a search looks every half second
SEARCHED = Windows(2.0, 0.5)
ROUNDS, STEPS, WARMUP, RATE, KEPT_EVERY = 3, 80, 10, 5e-4, 10  # each round a cosine over films of its own
TEMPERATURE = 0.05  # what the CLIP itself has learned
INSIDE, OUTSIDE, PAUSES = 0.6, 0.45, 8  # overlap of a moment's own window at least, of a wrong one at most


class TrainingFilm:
    """A film on a grid of its own phase, its frames through the frozen tower once."""

    def __init__(self, encoder: VideoEncoder, index: int):
        rng = np.random.default_rng([TRAIN_SEED, 3, index])
        frames, moments = film("train", TRAIN_SEED, index, **LENGTH)
        count, tower = encoder.settings["num_frames"], encoder.model.vision_model
        step, phase = WINDOWS.window / count, rng.uniform(0, WINDOWS.window / count)
        points = phase + step * (np.arange(int((len(frames) / FPS - phase) / step)) + 0.5)
        inputs = encoder.processor(videos=[frames[(points * FPS).astype(int)]], do_sample_frames=False,
                                   return_tensors="pt")  # fmt: skip
        with torch.no_grad():
            states = tower.encode_frames(inputs["pixel_values_videos"], tower.config.num_hidden_layers)
            self.texts = torch.from_numpy(encoder.encode_texts([moment.text for moment in moments]))
        self.states = {layer: state[0].bfloat16() for layer, state in states.items()}  # (frames, 1 + N, D)
        starts = phase + step * np.arange(len(points) - count + 1)
        self.frames = torch.arange(len(starts))[:, None] + torch.arange(count)  # (windows, T)
        self.overlap = np.array(
            [[shared((start, start + WINDOWS.window), (m.start, m.end)) for start in starts] for m in moments]
        )

    def loss(self, model: BTAdapterModel, rng: np.random.Generator) -> torch.Tensor:
        """Of each caption against a window of its moment, one that is cut beside every moment, and pauses."""
        best = self.overlap.max(axis=0)
        own = [int(rng.choice(np.flatnonzero(row >= min(INSIDE, row.max())))) for row in self.overlap]
        cut = [rng.choice(places) for row in self.overlap
               if len(places := np.flatnonzero((row > 0.05) & (best < OUTSIDE)))]  # fmt: skip
        still = np.flatnonzero(best < 0.05)
        chosen = np.array([*own, *cut, *rng.choice(still, min(PAUSES, len(still)), replace=False)], dtype=int)
        windows = {layer: state[self.frames[chosen]].float() for layer, state in self.states.items()}
        pooled = model.vision_model(backbone_states=windows, return_dict=True).pooler_output
        scores = self.texts @ F.normalize(model.visual_projection(pooled), dim=-1).T / TEMPERATURE
        unclear = torch.from_numpy(self.overlap[:, chosen] >= OUTSIDE)
        unclear[:, : len(own)].fill_diagonal_(False)
        scores = scores.masked_fill(unclear, -torch.inf)
        target = torch.arange(len(own))
        return F.cross_entropy(scores, target) + 0.5 * F.cross_entropy(scores[:, : len(own)].T, target)


def tune(folder: Path) -> None:
    set_seed(TRAIN_SEED)
    encoder = VideoEncoder.from_pretrained(device="cpu", dtype="float32")
    model, kept = encoder.model, folder / "checkpoint.pt"
    film_of = lru_cache(TRAIN_FILMS)(lambda index: TrainingFilm(encoder, index))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bt_adapter" in name)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=0.01)
    first = 0
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    losses: list[float] = []
    model.train()
    for step in tqdm(range(first, ROUNDS * STEPS), "tune", initial=first, total=ROUNDS * STEPS):
        number, place = divmod(step, STEPS)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((place + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * place / STEPS)))
        rng = np.random.default_rng([TRAIN_SEED, 4, step])
        loss = film_of(number * TRAIN_FILMS + int(rng.integers(TRAIN_FILMS))).loss(model, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % KEPT_EVERY == 0:
            logging.info("step %d: loss %.3f", step + 1, np.mean(losses[-KEPT_EVERY:]))
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            with written_whole(kept) as file:
                torch.save(state, file)
    model.eval().save_pretrained(folder)
    encoder.processor.save_pretrained(folder)


def score(source: Path | None, films: Path) -> dict[str, dict[str, float]]:
    """Moment search over the held-out films, with the controls."""
    encoder = VideoEncoder.from_pretrained(source, device="cpu", dtype="float32")
    rows: dict[str, list[FilmMoment]] = {}
    for line in (films / "moments.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(str(films / row.pop("file_name")), []).append(FilmMoment(**row))
    return evaluate_films(encoder, tqdm(list(rows.items()), "score"), SEARCHED)


def main() -> None:
    args = parse_arguments(__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    films, folder, results = args.output / "films", args.output / "model", args.output / "results.json"
    folder.mkdir(parents=True, exist_ok=True)
    steps = (
        ("films", films / "moments.jsonl", lambda: write_films(films, "test", TEST_FILMS, TEST_SEED)),
        ("tune", folder / "processor_config.json", lambda: tune(folder)),
    )
    seconds = make(steps, results)
    scores = {"inside the package": score(None, films), "tuned": score(folder, films)}
    results.write_text(json.dumps({"seconds": seconds, **scores}, indent=2) + "\n")
    for name, table in scores.items():
        print(f"{name}, {TEST_FILMS} films:\n{format_moments(table)}\n")


if __name__ == "__main__":
    main()
