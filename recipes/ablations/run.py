"""The paper's comparisons in the small: every setting under the same budget, one CSV row per run, then the tables.

    pip install -c constraints.txt -e '.[train,eval,quickstart]'
    python recipes/ablations/run.py -o build/ablations                       # everything, three seeds
    python recipes/ablations/run.py -o build/ablations --only table6 order   # some tables
    python recipes/ablations/run.py -o build/ablations --only times          # step times, alternating; a quiet machine
    python recipes/ablations/run.py --report                                 # tables and plots of the rows there are
    python recipes/ablations/run.py -o build/ablations --csv build/own.csv   # anew: the CSV of the clone has its rows

A run takes one core. Stopped at any point, the same command goes on: finished runs are rows of the CSV
(`recipes/ablations/results/runs.csv` unless --csv says otherwise), and one that was under way goes on from its last
checkpoint. Tables and plots of the CSV of the clone go into docs/what_matters.md, those of another one into a page
beside it (`build/own.md`).
"""

import argparse
import csv
import json
import logging
import math
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from transformers import TrainerCallback, set_seed


if __package__ in (None, ""):  # as a file: the recipes are a package of the clone
    sys.path.insert(0, str(Path(__file__).parents[2]))
    __package__ = "recipes.ablations"

from bt_adapter_hf import BTAdapterForPreTraining
from bt_adapter_hf.adapters.writing import written_whole
from bt_adapter_hf.baselines.towers import baseline_of
from bt_adapter_hf.cli._options import whole_number
from bt_adapter_hf.evaluation.retrieval import cosine_similarity, retrieval_metrics
from bt_adapter_hf.models.modeling_bt_adapter_vision import BTAdapterVisionModel
from bt_adapter_hf.training.arguments import BTAdapterTrainingArguments
from bt_adapter_hf.training.checkpoint import last_checkpoint
from bt_adapter_hf.training.resumable import lr_multiplier
from bt_adapter_hf.training.trainer import BTAdapterTrainer

from ..shared import run_arguments
from .report import DOCS, report
from .settings import (
    BATCH,
    CURVE_CLIPS,
    CURVE_STEPS,
    LEARNING_RATE,
    RATES,
    SETTINGS,
    STEPS,
    TABLES,
    Setting,
    runs,
)  # fmt: skip
from .world import Clips, World, load_start


logger = logging.getLogger("ablations")

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "setting", "seed", "budget", "order", "object", "motion", "t2v_R1", "order_long", "trained", "parameters",
    "cpu_seconds", "curve", "order_hits", "object_hits",
)  # fmt: skip
NUMBERS = COLUMNS[3:11]


class Rows:
    """The CSV of finished runs: read as it is, appended to row by row."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[tuple[str, int], dict[str, str]]:
        """{(setting, seed): row}

        Raises:
            ValueError: for a file with other columns, a row that is not whole or of another budget, or a run that is
                there twice.
        """
        if not self.path.is_file():
            return {}
        with open(self.path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, found = list(reader), tuple(reader.fieldnames or ())
        if found != COLUMNS:
            raise ValueError(f"{self.path} has the columns {found}; expected {COLUMNS}. Give another file as --csv.")
        read: dict[tuple[str, int], dict[str, str]] = {}
        for number, row in enumerate(rows, 1):
            if fault := self._fault(row, rows[0]):
                raise ValueError(
                    f"{self.path}, row {number} ({row['setting']}, seed {row['seed']}): {fault}. It was cut or "
                    "edited: take it out, and the run is made again."
                )
            key = (row["setting"], int(row["seed"]))
            if row["budget"] != (budget := SETTINGS[row["setting"]].budget):
                raise ValueError(
                    f"{self.path}: {row['setting']}, seed {row['seed']} was run under the budget {row['budget']}, and "
                    f"here it is {budget} (steps x batch): give another file as --csv, or take the row out."
                )
            if key in read:
                raise ValueError(f"{self.path} has {row['setting']}, seed {row['seed']} twice: take one out.")
            read[key] = row
        return read

    @staticmethod
    def _fault(row: dict[Any, Any], first: dict[str, str]) -> str | None:
        """What is wrong with a row by itself, or beside the first one; None where nothing is."""
        if None in row or None in row.values():
            return f"it has not the {len(COLUMNS)} cells of the header"
        if row["setting"] not in SETTINGS or not row["seed"].isdecimal():
            return "there is no such setting or seed"
        for name in NUMBERS:
            try:
                finite = math.isfinite(float(row[name]))
            except ValueError:
                finite = False
            if not finite:
                return f"{name} is {row[name]!r}, and no number"
        for name in ("order_hits", "object_hits"):
            if not row[name] or set(row[name]) - {"0", "1"}:
                return f"{name} are not zeros and ones"
            if len(row[name]) != len(first[name]):
                return f"it has {len(row[name])} {name}, and row 1 has {len(first[name])}"
        try:
            points = json.loads(row["curve"])
        except json.JSONDecodeError:
            points = None
        return None if isinstance(points, dict) else f"curve is {row['curve']!r}, and no JSON object"

    def add(self, row: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        old = self.path.read_bytes() if self.path.is_file() else b""
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            if old and not old.endswith(b"\n"):
                file.write("\r\n")  # as an editor may have left it
            writer = csv.DictWriter(file, COLUMNS)
            if not old:
                writer.writeheader()
            writer.writerow(row)


class TrainingClips(torch.utils.data.Dataset):
    """Row numbers, in the trainer's order; `Collator` reads the rows of a batch together."""

    needs_store, num_frames, item_timeout, seed, source = False, 8, None, 0, "moving digits, the harder world"

    def __init__(self, clips: Clips):
        self.clips, self.table = clips, self
        self.shard_rows, self.fingerprint = [len(clips)], f"harder-{len(clips)}"

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: tuple[int, int]) -> int:
        return int(index[1])


class Collator:
    def __init__(self, world: World, setting: Setting, needed: list[int]):
        self.world, self.setting, self.needed = world, setting, needed

    def __call__(self, items: list[int]) -> dict[str, Any]:
        rows, clips, processor = np.array(items), self.world.train, self.world.processor
        told = [clips.stories[row] for row in items]
        texts = [one.caption for one in told]
        reads_order = self.setting.fields.get("order_negatives", "none") != "none"
        if reads_order:
            texts += [one.reversed().caption for one in told]
        tokens = processor(text=texts, padding=True, return_tensors="pt")
        B = len(items)
        batch = {"input_ids": tokens["input_ids"][:B], "attention_mask": tokens["attention_mask"][:B], "broken": []}
        if reads_order:
            batch |= {
                "opposite_input_ids": tokens["input_ids"][B:],
                "opposite_attention_mask": tokens["attention_mask"][B:],
            }
        if self.setting.pixels:
            return batch | {"pixel_values_videos": clips.videos(rows, processor)}
        return batch | {"backbone_states": clips.backbone_states(rows, self.needed)}


def build(setting: Setting, world: World, seed: int) -> BTAdapterForPreTraining:
    set_seed(seed)
    if "temporal" in setting.fields:
        model = baseline_of(load_start(world.start), seed=seed, **setting.fields)
    else:
        model = load_start(world.start, **setting.fields)
    if setting.project:
        model.visual_projection.requires_grad_(True)
    return model


def rates(model: BTAdapterForPreTraining) -> dict[str, float]:
    """Those of `RATES` that are of parts of this model."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {
        key: rate for key, rate in RATES.items() if any(lr_multiplier(name, {key: rate}) == rate for name in names)
    }


def needed_states(model: BTAdapterForPreTraining) -> list[int]:
    return model.vision_model.needed_states(model.config.vision_config.num_hidden_layers)


@torch.inference_mode()
def video_features(model: BTAdapterForPreTraining, setting: Setting, world: World, clips: Clips, count: int):
    """(count, P), on the CPU; the mode of the model stays as it was."""
    training = model.training
    model.eval()
    tower: BTAdapterVisionModel = model.vision_model
    features = []
    for first in range(0, count, 60):
        rows = np.arange(first, min(first + 60, count))
        if setting.pixels:
            output = tower(clips.videos(rows, world.processor))
        else:
            output = tower(backbone_states=clips.backbone_states(rows, needed_states(model)))
        features.append(model.visual_projection(output.pooler_output))
    model.train(training)
    return torch.cat(features)


def order_hits(scores: np.ndarray, asked: list[dict[str, Any]]) -> list[int]:
    """Of the clips that differ from their reverse: whether their caption beats the opposite one."""
    pairs = [(row, one) for row, one in zip(scores, asked, strict=True) if one["opposite"] is not None]
    return [int(row[one["caption"]] > row[one["opposite"]]) for row, one in pairs]


def all_scores(model: BTAdapterForPreTraining, setting: Setting, world: World) -> dict[str, Any]:
    """What is in a row of the CSV, from all test clips."""
    features = video_features(model, setting, world, world.test, len(world.test))
    scores = cosine_similarity(features, world.text_features)
    right: dict[str, list[int]] = {"object": [], "motion": []}
    for row, one in zip(scores, world.asked, strict=True):
        own = row[one["caption"]]
        opposite = [] if one["opposite"] is None else [one["opposite"]]
        right["object"].append(int(own > row[one["looks"]].max()))
        right["motion"].append(int(own > row[one["motions"] + opposite].max()))
    captions = [one["caption"] for one in world.asked]
    distinct = sorted(set(captions))
    long = video_features(model, setting, world, world.long, len(world.long))
    ordered = order_hits(scores, world.asked)
    ordered_long = order_hits(cosine_similarity(long, world.text_features), world.asked[: len(world.long)])
    return {
        "order": round(100 * statistics.mean(ordered), 2),
        "order_long": round(100 * statistics.mean(ordered_long), 2),
        **{name: round(100 * statistics.mean(values), 2) for name, values in right.items()},
        "t2v_R1": round(retrieval_metrics(world.text_features[distinct], features, distinct, captions)["t2v_R1"], 2),
        "order_hits": "".join(map(str, ordered)),
        "object_hits": "".join(map(str, right["object"])),
    }


class Curve(TrainerCallback):
    """Order on a part of the test clips, in the middle of a run: {clips seen: percent}, kept in the run's folder."""

    def __init__(self, file: Path, setting: Setting, world: World):
        self.file, self.setting, self.world = file, setting, world
        self.points: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
        self.seconds = 0.0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % CURVE_STEPS == 0:
            start = time.process_time()
            count = min(CURVE_CLIPS, len(self.world.test))
            features = video_features(model, self.setting, self.world, self.world.test, count)
            hits = order_hits(cosine_similarity(features, self.world.text_features), self.world.asked[:count])
            self.points[str(state.global_step * BATCH)] = round(100 * statistics.mean(hits), 2)
            write_json(self.file, self.points)
            self.seconds += time.process_time() - start


def run_one(setting: Setting, seed: int, world: World, folder: Path) -> dict[str, Any]:
    """Trains a setting, or goes on with it, and scores it.

    Raises:
        ValueError: where the folder is of another setting, seed or budget.
    """
    plan = {"setting": setting.name, "seed": seed, "steps": setting.steps, "batch": BATCH, "fields": setting.fields}
    folder.mkdir(parents=True, exist_ok=True)
    told = folder / "setting.json"
    if told.is_file() and (found := json.loads(told.read_text())) != json.loads(json.dumps(plan)):
        raise ValueError(f"{folder} is the folder of another run, {found}; here it is {plan}. Take it away first.")
    write_json(told, plan)
    start = time.process_time()
    before = json.loads(spent.read_text()) if (spent := folder / "seconds.json").is_file() else 0.0
    model = build(setting, world, seed)
    curve = Curve(folder / "curve.json", setting, world)
    if setting.learns:
        arguments = run_arguments(
            BTAdapterTrainingArguments,
            folder,
            max_steps=setting.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            lr_multipliers=rates(model),
            seed=seed,
            save_strategy="steps",
            save_steps=CURVE_STEPS,
            save_total_limit=1,
            disable_tqdm=True,
            logging_steps=CURVE_STEPS,
        )
        trainer = BTAdapterTrainer(
            model=model,
            args=arguments,
            train_dataset=TrainingClips(world.train),
            data_collator=Collator(world, setting, needed_states(model)),
            callbacks=[curve, Spent(spent, before, start)],
        )
        trainer.train(resume_from_checkpoint=last_checkpoint(arguments.output_dir))
    seconds = before + time.process_time() - start - curve.seconds
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "setting": setting.name,
        "seed": seed,
        "budget": setting.budget,
        **all_scores(model, setting, world),
        "trained": trained if setting.learns else 0,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_seconds": round(seconds, 1),
        "curve": json.dumps(curve.points),
    }


class Spent(TrainerCallback):
    """Seconds of the CPU until the last checkpoint, so that a run that was stopped counts whole."""

    def __init__(self, file: Path, before: float, start: float):
        self.file, self.before, self.start = file, before, start

    def on_save(self, args, state, control, **kwargs):
        write_json(self.file, self.before + time.process_time() - self.start)


def write_json(file: Path, value: Any) -> None:
    with written_whole(file) as path:  # a run may be killed at any point
        path.write_text(json.dumps(value))


def measure_times(world: World, file: Path, repeats: int = 5) -> None:
    """Seconds of the CPU for a step of each setting, taking turns; from pixels, and from the backbone's states."""
    rows = list(range(BATCH))
    steps: dict[tuple[str, str], Any] = {}
    for setting in SETTINGS.values():
        if setting.steps != STEPS:
            continue  # its steps are those of another setting
        model = build(setting, world, 0).train()
        for start in ("pixels", "states"):
            if setting.learns and (start == "pixels" or not setting.pixels):
                shown = Setting(setting.name, "", setting.fields, setting.project, start == "pixels")
                batch = Collator(world, shown, needed_states(model))(rows)
                batch.pop("broken")
                steps[setting.name, start] = (model, batch)
    took: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for repeat in range(repeats + 1):
        for key, (model, batch) in steps.items():
            start = time.process_time()
            model(**batch).loss.backward()
            model.zero_grad()
            if repeat:  # the first one warms up
                took[key].append(time.process_time() - start)
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["setting", "start", "seconds"])
        writer.writerows([*key, f"{statistics.median(values):.4f}"] for key, values in took.items())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="folder for clips, states and checkpoints")
    parser.add_argument("--only", nargs="+", choices=[*TABLES, "times"], default=[*TABLES, "times"])
    parser.add_argument("--seeds", type=whole_number(), default=3)
    parser.add_argument("--csv", type=Path, default=RESULTS / "runs.csv", help="where the rows are")
    parser.add_argument("--report", action="store_true", help="train nothing; tables and plots of the rows there are")
    args = parser.parse_args(argv)
    if args.output is None and not args.report:
        parser.error("-o says where clips, states and checkpoints go; only --report does without.")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    rows, times = Rows(args.csv), args.csv.with_name("times.csv")
    done = rows.read()
    if not args.report:
        wanted = runs([name for name in args.only if name != "times"], args.seeds)
        is_timed = "times" in args.only and not times.is_file()
        if is_timed or set(wanted) - done.keys():
            make_runs(args.output, wanted, is_timed, rows, times)
        else:
            logger.info("%s has all %d runs that are asked for: nothing to train.", args.csv, len(wanted))
    docs = DOCS if args.csv.resolve() == (RESULTS / "runs.csv").resolve() else args.csv.with_suffix(".md")
    report(rows.read(), times, args.seeds, docs, [name for name in args.only if name != "times"])


def make_runs(output: Path, wanted: list[tuple[str, int]], is_timed: bool, rows: Rows, times: Path) -> None:
    """The runs that are not among the rows yet.

    Raises:
        ValueError: if another process makes runs in `output`.
    """
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / "run.lock", timeout=0):
            world = World(output / "world")
            for number, (name, seed) in enumerate(wanted, 1):
                if (name, seed) in rows.read():
                    continue
                logger.info("%d of %d: %s, seed %d", number, len(wanted), name, seed)
                folder = output / "runs" / f"{name}-{seed}"
                row = run_one(SETTINGS[name], seed, world, folder)
                if (name, seed) in rows.read():
                    logger.warning("%s has it by now, from another process: this one is left out.", rows.path)
                else:
                    rows.add(row)
                shutil.rmtree(folder)
                logger.info(
                    "order %.1f, object %.1f, R@1 %.1f, %.0f s", row["order"], row["object"], row["t2v_R1"],
                    row["cpu_seconds"],
                )  # fmt: skip
            if is_timed:
                measure_times(world, times)
    except Timeout as error:
        raise ValueError(
            f"Another process makes runs in {output}: wait until it has ended, or take another folder for -o and "
            "another file for --csv."
        ) from error


if __name__ == "__main__":
    main()
