"""Rebuild the small chat model that ships inside bt_adapter_hf: a LLaVA that has read words and seen stills only, then
the adapter of moving digits in it, then instruction tuning on clips.

    pip install -c constraints.txt -e '.[train,quickstart]'
    python -m recipes.moving_digits_chat.build -o build/chat         # up to 26 minutes on 2 cores
    python -m recipes.moving_digits_chat.build -o build/chat --ship  # and copy the model into the package

Every step leaves its files in the output folder and is skipped when they are there.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import (
    AutoModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Trainer,
    set_seed,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from bt_adapter_hf import (
    BTAdapterLlavaForConditionalGeneration,
    BTAdapterLlavaProcessor,
    BTAdapterProcessor,
    load_video,
    save_bt_adapter,
)
from bt_adapter_hf.assets import default_model_path
from bt_adapter_hf.data.moving_digits import (
    COLOURS,
    DIGITS,
    MOTIONS,
    PLACES,
    SIZES,
    clip_caption,
    still,
    still_phrasings,
)
from bt_adapter_hf.data.moving_digits_chat import (
    MOTION_KINDS,
    MOTION_PAIRS,
    ORDER_BLIND,
    QUESTIONS,
    answers,
    conversation,
    film_caption,
    write_chat_clips,
)
from bt_adapter_hf.evaluation.controls import reverse_frames, shuffle_frames
from bt_adapter_hf.models.modeling_bt_adapter_llava import BTAdapterLlavaModel
from bt_adapter_hf.training.arguments import BTAdapterTrainingArguments
from bt_adapter_hf.training.resumable import parameter_groups

from ..shared import TEST_SEED, TRAIN_SEED, make, parse_arguments, run_arguments, ship


ASSETS = Path(__file__).parents[2] / "src" / "bt_adapter_hf" / "assets" / "moving-digits-chat"


# Language model: words, and stills
LANGUAGE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.08,  # 1 / sqrt(width)
}
STILL_STEPS, STILL_BATCH, STILL_LR = 1200, 64, 1.5e-3

# Instruction tuning: clips and films, and stills lest they be forgotten
NUM_FRAMES = 8
TRAIN_CLIPS, TEST_CLIPS = 2880, 480
TUNING_STEPS, TUNING_BATCH, TUNING_LR = 320, 48, 5e-4
STILL_SHARE = 0.25
LR_MULTIPLIERS = {
    "bt_adapter.layers.*.temporal.": 10.0,
    "bt_adapter.time_embedding": 10.0,
    "bt_adapter.fusion_gate": 10.0,
}


def all_facts(**axes: Any) -> list[dict[str, str]]:
    """Every combination of the axes, such as `digit=DIGITS`."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


STILLS = all_facts(digit=DIGITS, colour=COLOURS, size=SIZES, place=PLACES)
CLIPS = all_facts(digit=DIGITS, colour=COLOURS, motion=MOTIONS)
FILMS = [
    {**thing, "first": a, "last": b} for thing in all_facts(digit=DIGITS, colour=COLOURS) for a, b in MOTION_PAIRS
]


def build_tokenizer(*others: str) -> PreTrainedTokenizerFast:
    """One token for every word of the world and of other texts, with and without a blank before it, and all bytes."""
    sentences = ["USER: ASSISTANT:", *others, *sum(QUESTIONS.values(), ())]
    sentences += [text for facts in STILLS for text in still_phrasings(**facts)]
    sentences += [text for facts in (*STILLS, *FILMS) for text in answers(facts).values()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10**6,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([blank + text for text in sentences for blank in ("", " ")], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=LANGUAGE["max_position_embeddings"],
    )


def build_processor() -> BTAdapterLlavaProcessor:
    seeing = BTAdapterProcessor.from_pretrained(default_model_path())
    return BTAdapterLlavaProcessor(
        seeing.image_processor,
        seeing.video_processor,
        build_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="full",
    )


def language_config(tokens: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        **LANGUAGE,
        vocab_size=len(tokens),
        pad_token_id=tokens.pad_token_id,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
    )


def build_llava(processor: BTAdapterLlavaProcessor) -> LlavaForConditionalGeneration:
    """A native LLaVA: the CLIP of the package, a new projector and a new language model."""
    clip = AutoModel.from_pretrained(default_model_path()).vision_model.vision_model
    tokens = processor.tokenizer
    config = LlavaConfig(
        vision_config=clip.config,
        text_config=language_config(tokens),
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,  # all of the branch takes part
        vision_feature_select_strategy="full",  # with the CLS: no loss of CLIP reaches the last patch tokens
        initializer_range=LANGUAGE["initializer_range"],
        pad_token_id=tokens.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(clip.state_dict())
    model.model.vision_tower.requires_grad_(False)
    return model


def show_still(split: str, seed: int, index: int) -> tuple[dict[str, Any], dict[str, str]]:
    image, _, facts = still(split, seed, index)
    return {"type": "image", "image": Image.fromarray(image)}, facts


def told_in_words(kind: str, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    """What a still, a clip or a film shows, in a sentence, and its facts."""
    facts = rng.choice({"still": STILLS, "clip": CLIPS, "film": FILMS}[kind])
    if kind == "still":
        return str(rng.choice(still_phrasings(**facts))), facts
    return clip_caption(**facts) if kind == "clip" else film_caption(**facts), facts


class WordsAndStills(torch.utils.data.IterableDataset):
    """An endless stream of conversations, about a still and about something told in words by turns.

    Words tell of stills, clips and films: the language model knows the language of motion, as any does, but has seen
    none.
    """

    def __iter__(self) -> Iterator[list[dict]]:
        for place in range(STILL_STEPS * STILL_BATCH // 2):
            rng = np.random.default_rng([TRAIN_SEED, place])
            block, nth = divmod(place, len(STILLS))
            caption = np.random.default_rng([TRAIN_SEED, block]).permutation(len(STILLS))[nth]
            yield conversation(*show_still("train", TRAIN_SEED, block * len(STILLS) + int(caption)), rng)
            kind = rng.choice(["still", "clip", "film", "film"])
            yield conversation(*told_in_words(kind, rng), rng)


class ClipsAndStills(torch.utils.data.IterableDataset):
    """An endless stream of conversations about video files and, one in four, stills."""

    def __init__(self, folder: Path):
        self.rows = read_table(folder)

    def __iter__(self) -> Iterator[list[dict]]:
        for place in range(TUNING_STEPS * TUNING_BATCH):
            rng = np.random.default_rng([TRAIN_SEED, 1, place])
            if rng.random() < STILL_SHARE:
                yield conversation(*show_still("train", TRAIN_SEED, int(rng.integers(10**9))), rng)
            else:
                path, facts = self.rows[rng.integers(len(self.rows))]
                yield conversation({"type": "video", "video": frames_of(path)}, facts, rng)


def read_table(folder: Path) -> list[tuple[Path, dict[str, str]]]:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return [(folder / row.pop("file_name"), {k: v for k, v in row.items() if k != "text"}) for row in rows]


@cache
def frames_of(path: Path) -> np.ndarray:
    """The frames that the model sees of a file, uint8 (8, 64, 64, 3); each is decoded once."""
    return load_video(path, num_frames=NUM_FRAMES, sampling="centers")[0]


class ChatTrainer(Trainer):
    """`Trainer` with learning rates per part of the model."""

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, self.args), betas=(0.9, 0.98))
        return self.optimizer


def batch_of(processor: BTAdapterLlavaProcessor, conversations: list[list[dict]]) -> dict[str, torch.Tensor]:
    """Conversations as the model takes them, with the loss on answers only."""
    batch = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    is_answer = torch.as_tensor(batch.pop("assistant_masks")).bool()
    return {**batch, "labels": batch["input_ids"].masked_fill(~is_answer, -100)}


def train(
    model: LlavaForConditionalGeneration,
    processor: BTAdapterLlavaProcessor,
    data: torch.utils.data.IterableDataset,
    folder: Path,
    **arguments: Any,
) -> None:
    arguments = run_arguments(
        BTAdapterTrainingArguments, folder, warmup_steps=50, weight_decay=0.02, max_grad_norm=1.0, **arguments
    )
    ChatTrainer(model=model, args=arguments, train_dataset=data, data_collator=partial(batch_of, processor)).train()
    model.config.use_cache = True  # Trainer has turned it off
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def train_on_stills(folder: Path) -> None:
    """Projector and language model from scratch, on words and stills. No motion is ever seen."""
    set_seed(TRAIN_SEED)
    processor = build_processor()
    model = build_llava(processor)
    train(
        model,
        processor,
        WordsAndStills(),
        folder,
        max_steps=STILL_STEPS,
        per_device_train_batch_size=STILL_BATCH,
        learning_rate=STILL_LR,
        lr_multipliers={},
    )


def plug_in(stills: Path, adapter: Path) -> BTAdapterLlavaForConditionalGeneration:
    """The LLaVA of stills with the adapter that was pretrained for retrieval: nothing is tuned."""
    if not adapter.is_dir():
        save_bt_adapter(AutoModel.from_pretrained(default_model_path()), adapter)
    return BTAdapterLlavaForConditionalGeneration.from_pretrained(stills, bt_adapter=str(adapter))


class FrameAveragedLlavaModel(BTAdapterLlavaModel):
    """The baseline without a branch: the tokens of a video are those of its frames, averaged over time."""

    def get_video_features(self, pixel_values_videos: torch.Tensor, frame_mask=None, **kwargs):
        images = pixel_values_videos.flatten(0, 1)
        tokens = self.vision_tower(images, output_hidden_states=True).hidden_states[self.config.vision_feature_layer]
        average = tokens.unflatten(0, pixel_values_videos.shape[:2]).mean(dim=1)
        return BaseModelOutputWithPooling(pooler_output=list(self.multi_modal_projector(average)))


def frame_averaged(model: BTAdapterLlavaForConditionalGeneration) -> BTAdapterLlavaForConditionalGeneration:
    model.model.__class__ = FrameAveragedLlavaModel
    return model


def tune(model: BTAdapterLlavaForConditionalGeneration, clips: Path, folder: Path) -> None:
    """Projector and branch (where there is one) on clips; the language model and the image tower stay as they are."""
    set_seed(TRAIN_SEED)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    has_branch = not isinstance(model.model, FrameAveragedLlavaModel)
    if has_branch:
        model.model.vision_tower.bt_adapter.requires_grad_(True)
    train(
        model,
        BTAdapterLlavaProcessor.from_pretrained(folder.parent / "stills"),
        ClipsAndStills(clips / "train"),
        folder,
        max_steps=TUNING_STEPS,
        per_device_train_batch_size=TUNING_BATCH,
        learning_rate=TUNING_LR,
        lr_multipliers=LR_MULTIPLIERS if has_branch else {},
    )


@torch.inference_mode()
def ask(
    model: LlavaForConditionalGeneration,
    processor: BTAdapterLlavaProcessor,
    parts: list[dict[str, Any]],
    question: str,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> list[str]:
    """Greedy answers to one question about each of the parts; `change` reorders the frames (B, T, 3, H, W)."""
    found = []
    for first in range(0, len(parts), 120):
        messages = [
            [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
            for part in parts[first : first + 120]
        ]
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        if change is not None:
            inputs["pixel_values_videos"] = change(inputs["pixel_values_videos"])
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        found += processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
    return found


@torch.inference_mode()
def choose(model, processor, seen: list[tuple[dict, dict]], kinds: tuple[str, ...], change=None) -> dict[str, float]:
    """As `score` for questions about motion, but of the six motions the likeliest answer counts.

    A model that has never been asked about motion says something else, however much it may have seen.
    """
    model.eval()
    scores = {}
    for kind in kinds:
        right = []
        asked = [(part, facts[kind]) for part, facts in seen if kind in facts]
        for first in range(0, len(asked), 120):
            parts, wanted = zip(*asked[first : first + 120], strict=True)
            likelihoods, shown = [], None
            for motion in MOTIONS.values():
                messages = [
                    [
                        {"role": "user", "content": [part, {"type": "text", "text": QUESTIONS[kind][0]}]},
                        {"role": "assistant", "content": [{"type": "text", "text": f"it {motion}"}]},
                    ]
                    for part in parts
                ]
                inputs = batch_of(processor, messages)
                pixels, labels = inputs.pop("pixel_values_videos"), inputs.pop("labels")[:, 1:]
                if shown is None:
                    pixels = pixels if change is None else change(pixels)
                    shown = {"pixel_values_videos": pixels}  # a Q-Former may read the words
                    if isinstance(model, LlavaForConditionalGeneration):
                        shown = {"mm_encoder_outputs": {"video": model.get_video_features(pixels)}}
                logits = model(**inputs, **shown).logits[:, :-1]
                losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
                likelihoods.append(-losses.sum(dim=1))
            best = torch.stack(likelihoods).argmax(dim=0).tolist()
            right += [list(MOTIONS)[index] == motion for index, motion in zip(best, wanted, strict=True)]
        scores[kind] = 100 * float(np.mean(right))
    return scores


def score(model, processor, seen: list[tuple[dict, dict]], kinds: tuple[str, ...], change=None) -> dict[str, float]:
    """Percent of exactly right answers to each kind of question, over what it can be asked about."""
    model.eval()
    scores = {}
    for kind in kinds:
        asked = [(part, answers(facts)[kind]) for part, facts in seen if kind in answers(facts)]
        given = ask(model, processor, [part for part, _ in asked], QUESTIONS[kind][0], change)
        scores[kind] = 100 * float(np.mean([a == b for a, (_, b) in zip(given, asked, strict=True)]))
    return scores


def evaluate(output: Path) -> dict[str, dict[str, float]]:
    """Everything on digit instances that no training has seen."""
    stills_folder, adapter, clips = output / "stills", output / "adapter", output / "clips"
    processor = BTAdapterLlavaProcessor.from_pretrained(stills_folder)
    pictures = [show_still("test", TEST_SEED, index) for index in range(len(STILLS))]
    videos = [({"type": "video", "video": frames_of(path)}, facts) for path, facts in read_table(clips / "test")]
    of_stills = ("digit", "colour", "place", "size", "picture")
    of_videos = (*MOTION_KINDS, "digit", "colour", "video")
    generator = torch.Generator().manual_seed(TEST_SEED)
    shuffled = partial(shuffle_frames, generator=generator)
    plugged = plug_in(stills_folder, adapter)
    tuned = BTAdapterLlavaForConditionalGeneration.from_pretrained(output / "model")
    average = frame_averaged(plug_in(stills_folder, adapter))
    tuned_average = frame_averaged(BTAdapterLlavaForConditionalGeneration.from_pretrained(output / "frame-average"))
    return {
        "stills, before tuning": score(plugged, processor, pictures, of_stills),
        "stills, after tuning": score(tuned, processor, pictures, of_stills),
        "frame average, not tuned": score(average, processor, videos, of_videos),
        "adapter, not tuned": score(plugged, processor, videos, of_videos),
        "frame average, likeliest of 6": choose(average, processor, videos, MOTION_KINDS),
        "adapter, likeliest of 6": choose(plugged, processor, videos, MOTION_KINDS),
        "  frames shuffled": choose(plugged, processor, videos, MOTION_KINDS, shuffled),
        "frame average, tuned": score(tuned_average, processor, videos, of_videos),
        "adapter, tuned": score(tuned, processor, videos, of_videos),
        "  tuned, frames shuffled": score(tuned, processor, videos, MOTION_KINDS, shuffled),
        "  tuned, frames reversed": score(tuned, processor, videos, MOTION_KINDS, reverse_frames),
        "(order-blind at best)": {kind: 100 * value for kind, value in ORDER_BLIND.items()},
    }


def format_table(scores: dict[str, dict[str, float]]) -> str:
    kinds = (*MOTION_KINDS, "digit", "colour", "place", "size", "picture", "video")
    lines = [f"{'%':<32}" + "".join(f"{kind:>8}" for kind in ("mean", *kinds))]
    for name, row in scores.items():
        mean = f"{np.mean([row[kind] for kind in MOTION_KINDS]):8.1f}" if "motion" in row else f"{'':8}"
        cells = (f"{row[kind]:8.1f}" if kind in row else f"{'':8}" for kind in kinds)
        lines.append((f"{name:<32}" + mean + "".join(cells)).rstrip())
    return "\n".join(lines)


def main() -> None:
    args = parse_arguments(__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = args.output
    stills, clips, adapter = output / "stills", output / "clips", output / "adapter"
    results_file = output / "results.json"

    def write_clips() -> None:
        for split, count, seed in (("train", TRAIN_CLIPS, TRAIN_SEED), ("test", TEST_CLIPS, TEST_SEED)):
            write_chat_clips(clips / split, split, count, seed, progress=partial(tqdm, desc=f"{split} clips"))

    def tuned(name: str, change: Callable = lambda model: model) -> tuple[str, Path, Callable[[], None]]:
        folder = output / name
        return name, folder / "processor_config.json", lambda: tune(change(plug_in(stills, adapter)), clips, folder)

    steps = (
        ("stills", stills / "processor_config.json", lambda: train_on_stills(stills)),
        ("clips", clips / "test" / "metadata.jsonl", write_clips),
        tuned("model"),
        tuned("frame-average", frame_averaged),
    )
    seconds = make(steps, results_file)
    start = time.monotonic()
    scores = evaluate(output)
    seconds["evaluation"] = round(time.monotonic() - start)
    results_file.write_text(json.dumps({"seconds": seconds, "scores": scores}, indent=2) + "\n")
    print(f"seconds: {seconds}\n{format_table(scores)}")
    if args.ship:
        ship(output / "model", ASSETS)


if __name__ == "__main__":
    main()
