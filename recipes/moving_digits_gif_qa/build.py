"""GIF question answering in the small, all from scratch on a CPU: towers, a language model, then questions about GIFs
with the tower frozen, the language model in 4 bits and LoRA on it.

    pip install -e '.[train,quickstart,quantization]'
    python -m recipes.moving_digits_gif_qa.build -o build/gif_qa

Every step leaves its files in the output folder and is skipped when they are there.
"""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from bt_adapter_hf import (
    BTAdapterGifQAForConditionalGeneration,
    BTAdapterGifQAProcessor,
    BTAdapterVideoProcessor,
    BTAdapterVisionModel,
    XCLIPFramesConfig,
    XCLIPFramesModel,
    load_bt_adapter,
)
from bt_adapter_hf.data.moving_digits import DIGITS
from bt_adapter_hf.data.moving_digits_gif_qa import (
    FIRST,
    MOST_TIMES,
    REPEATED,
    THEN,
    facts_of,
    questions,
    states_of,
    told,
    write_gif_questions,
)
from bt_adapter_hf.data.tgif_qa import TASKS, load_tgif_qa
from bt_adapter_hf.evaluation.controls import reverse_frames, shuffle_frames
from bt_adapter_hf.evaluation.tgif_qa import score_tgif_qa
from bt_adapter_hf.models.video_io import sample_frame_indices

from ..shared import TEST_SEED, TRAIN_SEED, make, parse_arguments


TRAIN_GIFS, TEST_GIFS = 2000, 240
NUM_FRAMES, SIDE, PATCH, WIDTH, LAYERS = 16, 32, 8, 64, 3
TOWER = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
         "image_size": SIDE, "patch_size": PATCH}  # fmt: skip
IMAGE_STEPS, IMAGE_BATCH, IMAGE_LR = 600, 400, 2e-3
TOWER_STEPS, TOWER_BATCH, TOWER_LR = 450, 32, 1e-3
SPEECH = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
          "max_position_embeddings": 256, "initializer_range": 0.1}  # fmt: skip
SPEECH_STEPS, SPEECH_BATCH, SPEECH_LR = 500, 48, 2e-3
CONNECTORS = ("mlp", "attention", "qformer")
TUNING = {"max_steps": 400, "batch_size": 32, "learning_rate": 4e-3}
SYSTEMS = (("xclip", "mlp"), ("bt", "mlp"), ("xclip", "attention"), ("xclip", "qformer"))


# ------------------------------------------------------------------------------------------------------------- towers


def video_processor() -> BTAdapterVideoProcessor:
    size = {"height": SIDE, "width": SIDE}
    return BTAdapterVideoProcessor(
        size={"shortest_edge": SIDE},
        crop_size=size,
        num_frames=NUM_FRAMES,
        sampling="centers",
        image_mean=[0.1] * 3,  # the background is nearly zero then
        image_std=[0.2] * 3,
    )


def all_pixels(folder: Path, split: str, seed: int, count: int) -> torch.Tensor:
    """The GIFs as the tower sees them (count, T, 3, H, W), kept in a file beside them."""
    kept = folder / f"{split}.pt"
    if not kept.is_file():
        read = video_processor()
        paths = [folder / f"{split}-{seed}-{index:05d}.gif" for index in range(count)]
        pixels = [read(str(path), return_tensors="pt")["pixel_values_videos"].half() for path in tqdm(paths, "read")]
        torch.save(torch.cat(pixels), kept)
    return torch.load(kept, weights_only=True)


def learn(name: str, steps: int, rate: float, modules: list[nn.Module], loss_of: Callable[[int], dict]) -> None:
    """Plain training: `loss_of(step)` gives the loss, first, and figures for the log."""
    learning = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 * (1 + np.cos(np.pi * step / steps)))
    )
    kept = []
    for step in range(steps):
        figures = loss_of(step)
        optimizer.zero_grad()
        figures["loss"].backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        kept.append(
            {key: float(value.detach() if torch.is_tensor(value) else value) for key, value in figures.items()}
        )
        if step % 50 == 49:
            means = {key: round(float(np.mean([row[key] for row in kept[-50:]])), 3) for key in figures}
            logging.info("%s, step %d: %s", name, step + 1, means)


def shifted(videos: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Moved by up to three pixels; the background is dark, and no edge is seen."""
    move = rng.integers(-3, 4, size=2)
    return torch.roll(videos, move.tolist(), dims=(-2, -1)), torch.tensor([0.0, move[1], move[0]]) * 2


def train_images(gifs: Path, folder: Path) -> None:
    """The image part from scratch, on single frames: which digit, where and how big. X-CLIP too starts from a CLIP."""
    set_seed(TRAIN_SEED)
    pixels = all_pixels(gifs / "train", "train", TRAIN_SEED, TRAIN_GIFS)
    digits = torch.tensor([DIGITS.index(facts_of(index)["digit"]) for index in range(TRAIN_GIFS)])
    places = []
    for index in range(TRAIN_GIFS):
        states = states_of("train", TRAIN_SEED, index)
        places.append(states[sample_frame_indices(len(states), NUM_FRAMES, "centers")])
    places = torch.tensor(np.stack(places), dtype=torch.float32)  # (GIFs, T, 3)
    clip, rng = CLIPVisionModel(CLIPVisionConfig(**TOWER)).train(), np.random.default_rng(TRAIN_SEED)
    heads = nn.ModuleDict({"digit": nn.Linear(WIDTH, len(DIGITS)), "place": nn.Linear(WIDTH, 3)})

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        rows, frames = (torch.from_numpy(rng.integers(0, top, IMAGE_BATCH)) for top in (TRAIN_GIFS, NUM_FRAMES))
        images, move = shifted(pixels[rows, frames].float(), rng)
        wanted = places[rows, frames] + move
        seen = ((wanted > 6) & (wanted < 58)).all(dim=1)
        features = clip(images).pooler_output[seen]
        logits, digit = heads["digit"](features), digits[rows][seen]
        place = F.mse_loss(heads["place"](features), (wanted[seen] - 32) / 16)
        loss = F.cross_entropy(logits, digit) + place
        return {"loss": loss, "place": place, "digit": (logits.argmax(dim=-1) == digit).float().mean()}

    learn("images", IMAGE_STEPS, IMAGE_LR, [clip, heads], loss_of)
    clip.save_pretrained(folder)


def new_tower(kind: str, images: Path) -> nn.Module:
    """Around the image part: what is X-CLIP's or BT-Adapter's own is new."""
    clip = CLIPVisionModel.from_pretrained(images)
    if kind == "xclip":
        mit = {"mit_hidden_size": WIDTH, "mit_intermediate_size": 2 * WIDTH, "mit_num_attention_heads": 4}
        fields = {**TOWER, **mit, "num_frames": NUM_FRAMES, "mit_num_hidden_layers": 2}
        tower = XCLIPFramesModel(XCLIPFramesConfig(backbone=fields))
        state = {key.replace("pre_layrnorm", "pre_layernorm"): value for key, value in clip.state_dict().items()}
        unknown = tower.vision_model.load_state_dict(state, strict=False).unexpected_keys
        assert not unknown, unknown
    else:
        tower = BTAdapterVisionModel.from_backbone(clip, 2, output_fusion="sum", num_trained_frames=NUM_FRAMES)
    tower.requires_grad_(True)  # the image part learns on, of both
    return tower


class Heads(nn.Module):
    """What a tower learns from: the facts of a GIF, out of its pooled feature."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.digit, self.action = nn.Linear(WIDTH, len(DIGITS)), nn.Linear(WIDTH, len(REPEATED))
        self.first, self.then = nn.Linear(WIDTH, len(FIRST)), nn.Linear(WIDTH, len(THEN))
        self.count = nn.Linear(WIDTH, MOST_TIMES)

    def forward(self, pooled: torch.Tensor, facts: list[dict[str, Any]]) -> tuple[torch.Tensor, dict[str, float]]:
        pooled, loss, right = self.norm(pooled), 0.0, {}
        for name, words in (("digit", DIGITS), ("action", REPEATED), ("count", range(1, MOST_TIMES + 1)),
                            ("first", tuple(FIRST)), ("then", THEN)):  # fmt: skip
            rows = [row for row, fact in enumerate(facts) if name in fact]
            wanted = torch.tensor([tuple(words).index(facts[row][name]) for row in rows])
            logits = getattr(self, name)(pooled[rows])
            loss = loss + F.cross_entropy(logits, wanted)
            right[name] = (logits.argmax(dim=-1) == wanted).float().mean().item()
        return loss, right


def train_tower(kind: str, images: Path, gifs: Path, folder: Path) -> None:
    """A tower on the facts of the training GIFs, under the same budget whichever it is."""
    set_seed(TRAIN_SEED)
    pixels = all_pixels(gifs / "train", "train", TRAIN_SEED, TRAIN_GIFS)
    facts = [facts_of(index) for index in range(TRAIN_GIFS)]
    tower, heads, rng = new_tower(kind, images).train(), Heads(), np.random.default_rng(TRAIN_SEED)

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        rows = rng.choice(TRAIN_GIFS, TOWER_BATCH, replace=False)
        videos, _ = shifted(pixels[torch.from_numpy(rows)].float(), rng)
        loss, right = heads(tower(videos).pooler_output, [facts[row] for row in rows])
        return {"loss": loss, **right}

    learn(folder.name, TOWER_STEPS, TOWER_LR, [tower, heads], loss_of)
    tower.eval()
    test = all_pixels(gifs / "test", "test", TEST_SEED, TEST_GIFS)
    with torch.no_grad():
        pooled = torch.cat([tower(part.float()).pooler_output for part in test.split(50)])
        _, right = heads.eval()(pooled, [facts_of(index) for index in range(TEST_GIFS)])
    logging.info("%s held out: %s", folder.name, right)
    tower.save_pretrained(folder)
    (folder / "heads.json").write_text(json.dumps(right) + "\n")


# ----------------------------------------------------------------------------------------------------- language model


def build_tokenizer(facts: list[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """One token for every word of the world."""
    rng = np.random.default_rng(0)
    words = {"USER:", "ASSISTANT:"}
    for fact in facts:
        words.update(told(fact).split())
        for question in questions("", fact, rng):
            words.update(question.prompt.split(), question.answer.split())
    vocab = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=SPEECH["max_position_embeddings"],
    )  # fmt: skip


def train_speech(folder: Path) -> None:
    """A Llama from scratch that answers the questions about what it is told in words; it sees nothing."""
    set_seed(TRAIN_SEED)
    facts = [facts_of(index) for index in range(1000)]
    tokens = build_tokenizer(facts)
    model = LlamaForCausalLM(
        LlamaConfig(**SPEECH, vocab_size=len(tokens) + 8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )
    rng = np.random.default_rng(TRAIN_SEED)

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        rows = []
        for _ in range(SPEECH_BATCH):
            fact = facts[rng.integers(len(facts))]
            asked = questions("", fact, rng)
            question = asked[rng.integers(len(asked))]
            prompt = tokens(f"USER: {told(fact)} {question.prompt} ASSISTANT:")["input_ids"]
            answer = tokens(f"{question.answer} </s>")["input_ids"]
            rows.append((prompt + answer, [-100] * len(prompt) + answer))
        ids, labels = (
            nn.utils.rnn.pad_sequence([torch.tensor(row[part]) for row in rows], batch_first=True, padding_value=value)
            for part, value in ((0, 0), (1, -100))
        )
        return {"loss": model(input_ids=ids, labels=labels).loss}

    learn("words", SPEECH_STEPS, SPEECH_LR, [model], loss_of)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------- questions


def assemble(output: Path, kind: str, connector: str, folder: Path) -> None:
    set_seed(TRAIN_SEED)
    parts = {"tower": output / f"tower-{kind}", "language_model": output / "speech"}
    model = BTAdapterGifQAForConditionalGeneration.from_components(
        **parts, connector=connector, num_query_tokens=NUM_FRAMES
    )
    processor = BTAdapterGifQAProcessor(
        video_processor(),
        PreTrainedTokenizerFast.from_pretrained(output / "speech"),
        frames_per_group=model.config.frames_per_group,
        tokens_per_group=model.config.tokens_per_group,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def tune(output: Path, base: Path, folder: Path) -> None:
    """Connector and LoRA on the four tables at once, by the command that users have."""
    table = output / "gifs" / "train" / "train_all.jsonl"
    options = [
        "--lora", "--lora-r", "16", "--load-in-4bit", "--device", "cpu", "--save-steps", "300",
        "--cache-states", str(output / f"states-{base.name.split('-')[1]}"), "--cache-dtype", "fp32",
    ]  # fmt: skip
    options += [part for name, value in TUNING.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    if any(folder.glob("checkpoint-*")):
        options.append("--resume")
    command = [sys.executable, "-m", "bt_adapter_hf.cli.main", "finetune", "--model", str(base)]
    subprocess.run([*command, "--train", str(table), "--output-dir", str(folder), *options], check=True)


def join_tables(folder: Path, split: str) -> None:
    """All four tables as one of conversations, rows of all tasks mixed."""
    asked = [question for task in TASKS for question in load_tgif_qa(folder / f"{split}_{task}_question.csv")]
    order = np.random.default_rng(TRAIN_SEED).permutation(len(asked))
    with (folder / f"{split}_all.jsonl").open("w", encoding="utf-8") as file:
        for index in order:
            messages = asked[index].messages
            messages[0]["content"][0]["path"] += ".gif"
            file.write(json.dumps({"messages": messages}) + "\n")


@torch.inference_mode()
def answer_all(model, processor, folder: Path, split: str, change=None) -> dict[str, dict[str, float]]:
    asked = [question for task in TASKS for question in load_tgif_qa(folder / f"{split}_{task}_question.csv")]
    answers = []
    for start in range(0, len(asked), 60):
        part = asked[start : start + 60]
        chats = [question.messages[:1] for question in part]
        for chat in chats:
            chat[0]["content"][0]["path"] = str(folder / (chat[0]["content"][0]["path"] + ".gif"))
        inputs = processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        if change is not None:
            inputs["pixel_values_videos"] = change(inputs["pixel_values_videos"])
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        answers += processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
    return score_tgif_qa(asked, answers)


def evaluate(output: Path, base: Path, tuned: Path, controls: bool) -> dict[str, dict[str, dict[str, float]]]:
    import bt_adapter_hf

    processor = BTAdapterGifQAProcessor.from_pretrained(base)
    quantized = bt_adapter_hf.quantization_config(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                                  bnb_4bit_use_double_quant=True)  # fmt: skip
    model = BTAdapterGifQAForConditionalGeneration.from_pretrained(base, quantization_config=quantized)
    model = load_bt_adapter(model, tuned).eval()
    folder = output / "gifs" / "test"
    found = {base.name: answer_all(model, processor, folder, "test")}
    if controls:
        generator = torch.Generator().manual_seed(TEST_SEED)
        found[f"{base.name}, shuffled"] = answer_all(
            model, processor, folder, "test", partial(shuffle_frames, generator=generator)
        )
        found[f"{base.name}, reversed"] = answer_all(model, processor, folder, "test", reverse_frames)
    return found


def format_table(scores: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [f"{'':<28}{'FrameQA':>9}{'Action':>9}{'Transition':>12}{'Count MSE':>11}{'of mean':>9}"]
    for name, row in scores.items():
        cells = [f"{100 * row[task]['accuracy']:{width}.1f}"
                 for task, width in (("frameqa", 9), ("action", 9), ("transition", 12))]  # fmt: skip
        lines.append(f"{name:<28}{''.join(cells)}{row['count']['mse']:11.2f}{row['count']['mse_of_mean']:9.2f}")
    return "\n".join(lines)


def main() -> None:
    args = parse_arguments(__doc__)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    output, results_file = args.output, args.output / "results.json"
    output.mkdir(parents=True, exist_ok=True)
    gifs = output / "gifs"

    def write() -> None:
        for split, count, seed in (("test", TEST_GIFS, TEST_SEED), ("train", TRAIN_GIFS, TRAIN_SEED)):
            write_gif_questions(gifs / split, split, count, seed, progress=partial(tqdm, desc=f"{split} GIFs"))
            join_tables(gifs / split, split)

    steps = [("gifs", gifs / "train" / "train_all.jsonl", write)]
    images, speech = output / "images", output / "speech"
    steps.append(("images", images / "model.safetensors", lambda: train_images(gifs, images)))
    steps.append(("speech", speech / "tokenizer_config.json", lambda: train_speech(speech)))
    for kind in ("xclip", "bt"):
        folder = output / f"tower-{kind}"
        steps.append((folder.name, folder / "heads.json", partial(train_tower, kind, images, gifs, folder)))
    scores_file = output / "scores.json"
    for kind, connector in SYSTEMS:
        base, tuned = output / f"base-{kind}-{connector}", output / f"tuned-{kind}-{connector}"
        steps.append((base.name, base / "processor_config.json", partial(assemble, output, kind, connector, base)))
        steps.append((tuned.name, tuned / "adapter_model.safetensors", partial(tune, output, base, tuned)))

        def score(base: Path = base, tuned: Path = tuned, controls: bool = connector == "mlp") -> None:
            scores = json.loads(scores_file.read_text()) if scores_file.is_file() else {}
            scores |= evaluate(output, base, tuned, controls)
            scores_file.write_text(json.dumps(scores, indent=2) + "\n")
            (tuned / "scored").touch()
            print(format_table(scores), flush=True)

        steps.append((f"scores of {tuned.name}", tuned / "scored", score))
    started = time.monotonic()
    seconds = make(steps, results_file)
    print(f"seconds: {seconds}, this run {time.monotonic() - started:.0f}")
    print(format_table(json.loads(scores_file.read_text())))


if __name__ == "__main__":
    main()
