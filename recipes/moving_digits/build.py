"""Rebuild the moving-digits model that ships inside bt_adapter_hf, from nothing but scikit-learn's digits.

    pip install -c constraints.txt -e '.[train,quickstart]'
    python -m recipes.moving_digits.build -o build/moving-digits          # about 13 minutes on 2 cores
    python -m recipes.moving_digits.build -o build/moving-digits --ship   # and copy the model into the package

Every step leaves its files in the output folder and is skipped when they are there.
"""

import json
import logging
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bt_adapter_hf import BTAdapterModel, BTAdapterProcessor, BTAdapterVideoProcessor
from bt_adapter_hf.data.moving_digits import (
    COLOURS,
    DIGITS,
    PLACES,
    SIZES,
    all_captions,
    all_still_captions,
    still,
    still_phrasings,
    write_clips,
)
from bt_adapter_hf.data.pairs import PairCollator, PairDataset, load_table
from bt_adapter_hf.evaluation.moving_digits import evaluate_moving_digits, format_scores
from bt_adapter_hf.training.arguments import BTAdapterTrainingArguments
from bt_adapter_hf.training.starting_point import load_starting_point
from bt_adapter_hf.training.trainer import BTAdapterTrainer

from ..shared import TEST_SEED, TRAIN_SEED, make, parse_arguments, run_arguments, ship


logger = logging.getLogger("moving_digits")

ASSETS = Path(__file__).parents[2] / "src" / "bt_adapter_hf" / "assets" / "moving-digits"

TRAIN_CLIPS, TEST_CLIPS = 12 * len(all_captions()), len(all_captions())

# CLIP
IMAGE_SIZE, PATCH_SIZE = 48, 8
IMAGE_MEAN, IMAGE_STD = [0.1, 0.1, 0.1], [0.2, 0.2, 0.2]  # of the stills: their dark background becomes nearly zero
WIDTH, VISION_LAYERS, TEXT_LAYERS, HEADS, PROJECTION = 128, 4, 2, 4, 64
MAX_TEXT_LENGTH = 32
CLIP_STEPS, CLIP_BATCH, CLIP_LR = 1800, 120, 1e-3
EASY_STEPS = 150

# Branch
NUM_FRAMES = 8
PRETRAINING = {
    "adapter_layers": [2, 3],
    "max_frames": NUM_FRAMES,  # rows that no training clip reaches would stay random; longer videos interpolate
    "time_embedding_init_std": 0.5,  # 0.02 leaves left-to-right and right-to-left alike for the whole run
    "fusion_gate_scale": 1.0,  # the released 100 and 10000 multiply the gates' gradients, and clipping then
    "output_gate_scale": 1.0,  # starves everything else
    "drop_path_rate": 0.0,
    "mask_ratio": 0.5,  # 18 of 36 patches stay; at 0.7 a small digit often vanishes, and learning takes twice as long
    "temperature": 0.05,  # what the CLIP itself has learned
}
BRANCH_STEPS, BRANCH_BATCH, BRANCH_LR = 800, 32, 5e-4
LR_MULTIPLIERS = {  # time is new, space starts from the backbone
    "bt_adapter.layers.*.temporal.": 10.0,
    "bt_adapter.time_embedding": 10.0,
    "bt_adapter.fusion_gate": 10.0,
    "bt_adapter.output_gate": 10.0,
}


def build_processor() -> BTAdapterProcessor:
    pixels = {
        "size": {"shortest_edge": IMAGE_SIZE},
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
    }
    return BTAdapterProcessor(
        image_processor=CLIPImageProcessor(**pixels),
        video_processor=BTAdapterVideoProcessor(num_frames=NUM_FRAMES, sampling="centers", **pixels),
        tokenizer=build_tokenizer(),
    )


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's kind of BPE: one token for every word of the world, and all bytes, so that any text has tokens."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=10**6,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    looks = product(DIGITS, COLOURS, SIZES, PLACES)
    sentences = [sentence for look in looks for sentence in still_phrasings(*look)] + all_captions()
    bpe.train_from_iterator(sentences, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    # The trainer lists single bytes without the suffix; CLIP's rules need both forms of each byte.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [f"{byte}</w>" for byte in alphabet] + ["".join(merge) for merge in merges] + [start, end]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TEXT_LENGTH)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    size = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS}
    config = CLIPConfig(
        text_config={
            **size,
            "num_hidden_layers": TEXT_LAYERS,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_TEXT_LENGTH,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "projection_dim": PROJECTION,
        },
        vision_config={
            **size,
            "num_hidden_layers": VISION_LAYERS,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "projection_dim": PROJECTION,
        },
        projection_dim=PROJECTION,
    )
    model = CLIPModel(config)
    # CLIP's 0.02 hides positions behind the patches for hundreds of steps, and with them the places and the strokes.
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.2)
    return model


class Stills(torch.utils.data.IterableDataset):
    """An endless stream of (image, caption). Each 600 in a row show every caption once; batches are cut from it.

    The easy part draws captions in random order. After `EASY_STEPS` every other batch shows all ten digits in each of
    twelve looks (colour, size, place): colour, size and place are learned by then, and such a batch leaves only the
    digit to tell the captions apart.
    """

    def __iter__(self) -> Iterator[dict]:
        captions, looks = len(all_still_captions()), len(COLOURS) * len(SIZES) * len(PLACES)
        for step in range(CLIP_STEPS):
            for place in range(step * CLIP_BATCH, (step + 1) * CLIP_BATCH):
                block, nth = divmod(place, captions)
                rng = np.random.default_rng([TRAIN_SEED, block])
                if step < EASY_STEPS or step % 2:
                    caption = rng.permutation(captions)[nth]
                else:
                    caption = nth % len(DIGITS) * looks + rng.permutation(looks)[nth // len(DIGITS)]
                image, _, facts = still("train", TRAIN_SEED, block * captions + int(caption))
                phrasings = still_phrasings(**facts)
                yield {"image": image, "text": np.random.default_rng([TRAIN_SEED, place]).choice(phrasings).item()}


def train_clip(processor: BTAdapterProcessor, folder: Path) -> None:
    """A small CLIP from scratch, on stills only: it meets places and sizes, never a motion."""
    set_seed(TRAIN_SEED)
    model = build_clip(processor.tokenizer)
    fit_clip(
        model,
        processor,
        Stills(),
        folder,
        max_steps=CLIP_STEPS,
        per_device_train_batch_size=CLIP_BATCH,
        learning_rate=CLIP_LR,
        logging_steps=100,
    )


def fit_clip(
    model: CLIPModel,
    processor: BTAdapterProcessor,
    data: torch.utils.data.IterableDataset,
    folder: Path,
    **arguments: Any,
) -> None:
    """Trains a CLIP on a stream of (image, text), and saves it with its processor."""

    def collate(items: list[dict]) -> dict:
        batch = processor(
            images=[item["image"] for item in items],
            text=[item["text"] for item in items],
            padding=True,
            return_tensors="pt",
        )
        return {**batch, "return_loss": True}

    arguments = run_arguments(
        TrainingArguments,
        folder,
        warmup_steps=40,
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        **arguments,
    )
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate).train()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@torch.inference_mode()
def still_accuracy(folder: Path) -> dict[str, float]:
    """Share of held-out stills whose best caption of all 600 is the right one, and right in its digit."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), BTAdapterProcessor.from_pretrained(folder)
    captions = all_still_captions()
    texts = model.get_text_features(**processor(text=captions, padding=True, return_tensors="pt")).pooler_output
    texts = torch.nn.functional.normalize(texts, dim=-1)
    right, digit = [], []
    for start in range(0, 2 * len(captions), 200):
        images = [still("test", TEST_SEED, index)[0] for index in range(start, start + 200)]
        best = (
            model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output @ texts.T
        ).argmax(-1)
        wanted = torch.arange(start, start + 200) % len(captions)
        right.append(best == wanted)
        digit.append(best // (len(captions) // len(DIGITS)) == wanted // (len(captions) // len(DIGITS)))
    return {"exact_caption": torch.cat(right).float().mean().item(), "digit": torch.cat(digit).float().mean().item()}


def write_clip_files(folder: Path) -> None:
    for split, count, seed in (("train", TRAIN_CLIPS, TRAIN_SEED), ("test", TEST_CLIPS, TEST_SEED)):
        write_clips(folder / split, split, count, seed, progress=partial(tqdm, desc=f"{split} clips"))


def train_branch(clip_folder: Path, clips: Path, folder: Path) -> None:
    """The branch on video files, beside the frozen CLIP, with tube masking and all three losses."""
    set_seed(TRAIN_SEED)
    model, _ = load_starting_point(clip_folder, **PRETRAINING)
    processor = BTAdapterProcessor.from_pretrained(clip_folder)
    arguments = run_arguments(
        BTAdapterTrainingArguments,
        folder,
        max_steps=BRANCH_STEPS,
        per_device_train_batch_size=BRANCH_BATCH,
        learning_rate=BRANCH_LR,
        lr_multipliers=LR_MULTIPLIERS,
    )
    data = PairDataset(load_table(clips / "train"), processor, training=True, seed=TRAIN_SEED)
    BTAdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=PairCollator(processor),
        processing_class=processor,
    ).train()
    model.save_pretrained(folder / "pretraining")
    BTAdapterModel.from_pretrained(folder / "pretraining").save_pretrained(folder)  # leaves the alignment head out
    processor.save_pretrained(folder)


def clip_scores(folder: Path, clips: Path) -> dict[str, dict[str, float]]:
    """Scores on the written test clips, beside the controls."""
    rows = [json.loads(line) for line in (clips / "test" / "metadata.jsonl").read_text().splitlines()]
    paths = [str(clips / "test" / row["file_name"]) for row in rows]
    batches = [paths[first : first + 36] for first in range(0, len(paths), 36)]
    model, processor = AutoModel.from_pretrained(folder), BTAdapterProcessor.from_pretrained(folder)
    return evaluate_moving_digits(model, processor, tqdm(batches, desc="score"), rows, draws=5)


def main() -> None:
    args = parse_arguments(__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    clip_folder, clips, folder = args.output / "clip", args.output / "clips", args.output / "model"
    results_file = args.output / "results.json"
    steps = (
        ("clip", clip_folder / "processor_config.json", lambda: train_clip(build_processor(), clip_folder)),
        ("clips", clips / "test" / "metadata.jsonl", lambda: write_clip_files(clips)),
        ("branch", folder / "processor_config.json", lambda: train_branch(clip_folder, clips, folder)),
    )
    seconds = make(steps, results_file)
    stills, scores = still_accuracy(clip_folder), clip_scores(folder, clips)
    results = {"seconds": seconds, "stills": stills, "clips": scores}
    results_file.write_text(json.dumps(results, indent=2) + "\n")
    print(f"seconds: {seconds}\nCLIP on held-out stills: exact caption {stills['exact_caption']:.3f} of 600, ", end="")
    print(f"digit {stills['digit']:.3f}\n{len(all_captions())} captions, {TEST_CLIPS} held-out clips:")
    print(format_scores(scores))
    if args.ship:
        ship(folder, ASSETS)


if __name__ == "__main__":
    main()
