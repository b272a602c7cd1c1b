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
    told,
    write_gif_questions,
)
from bt_adapter_hf.data.tgif_qa import TASKS, load_tgif_qa
from bt_adapter_hf.evaluation.controls import reverse_frames, shuffle_frames
from bt_adapter_hf.evaluation.tgif_qa import score_tgif_qa

from ..shared import TEST_SEED, TRAIN_SEED, make, parse_arguments


TRAIN_GIFS, TEST_GIFS = 2000, 240
NUM_FRAMES, SIDE, PATCH, WIDTH, LAYERS = 16, 32, 8, 64, 3
TOWER = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
         "image_size": SIDE, "patch_size": PATCH}  # fmt: skip
TOWER_STEPS, TOWER_BATCH, TOWER_LR = 600, 32, 1.5e-3
SPEECH = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
          "max_position_embeddings": 256, "initializer_range": 0.1}  # fmt: skip
SPEECH_STEPS, SPEECH_BATCH, SPEECH_LR = 500, 48, 2e-3
CONNECTORS = ("mlp", "attention", "qformer")
TUNING = {"max_steps": 900, "batch_size": 32, "learning_rate": 3e-3}
SYSTEMS = (("xclip", "mlp"), ("bt", "mlp"), ("xclip", "attention"), ("xclip", "qformer"))


# ------------------------------------------------------------------------------------------------------------- towers


def video_processor() -> BTAdapterVideoProcessor:
    size = {"height": SIDE, "width": SIDE}
    return BTAdapterVideoProcessor(
        size={"shortest_edge": SIDE}, crop_size=size, num_frames=NUM_FRAMES, sampling="centers"
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


def new_tower(kind: str) -> nn.Module:
    if kind == "xclip":
        mit = {"mit_hidden_size": WIDTH, "mit_intermediate_size": 2 * WIDTH, "mit_num_attention_heads": 4}
        return XCLIPFramesModel(XCLIPFramesConfig(backbone={**TOWER, **mit, "num_frames": NUM_FRAMES,
                                                            "mit_num_hidden_layers": 2}))  # fmt: skip
    clip = CLIPVisionModel(CLIPVisionConfig(**TOWER))
    tower = BTAdapterVisionModel.from_backbone(clip, 2, output_fusion="sum", num_trained_frames=NUM_FRAMES)
    tower.requires_grad_(True)  # nothing here is pretrained
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


def train_tower(kind: str, gifs: Path, folder: Path) -> None:
    """A tower from scratch on the facts of the training GIFs, under the same budget whichever it is."""
    set_seed(TRAIN_SEED)
    pixels = all_pixels(gifs / "train", "train", TRAIN_SEED, TRAIN_GIFS)
    facts = [facts_of(index) for index in range(TRAIN_GIFS)]
    tower, heads = new_tower(kind).train(), Heads()
    learning = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(learning, lr=TOWER_LR, weight_decay=0.05, betas=(0.9, 0.98))
    warmup, rng = 60, np.random.default_rng(TRAIN_SEED)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + np.cos(np.pi * step / TOWER_STEPS)))
    )
    kept = []
    for step in range(TOWER_STEPS):
        rows = rng.choice(TRAIN_GIFS, TOWER_BATCH, replace=False)
        videos = pixels[torch.from_numpy(rows)].float()
        shift = rng.integers(-3, 4, size=2).tolist()
        videos = torch.roll(videos, shift, dims=(-2, -1))  # the background is dark: no edge is seen
        loss, right = heads(tower(videos).pooler_output, [facts[row] for row in rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        rate.step()
        kept.append({"loss": loss.item(), **right})
        if step % 50 == 49:
            means = {name: round(float(np.mean([row[name] for row in kept[-50:]])), 3) for name in kept[-1]}
            logging.info("%s step %d: %s", kind, step + 1, means)
    tower.eval()
    test = all_pixels(gifs / "test", "test", TEST_SEED, TEST_GIFS)
    test_facts = [facts_of(index) for index in range(TEST_GIFS)]
    with torch.no_grad():
        pooled = torch.cat([tower(part.float()).pooler_output for part in test.split(50)])
        _, right = heads.eval()(pooled, test_facts)
    logging.info("%s held out: %s", kind, right)
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=SPEECH_LR, weight_decay=0.02, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 * (1 + np.cos(np.pi * step / SPEECH_STEPS)))
    )
    rng, losses = np.random.default_rng(TRAIN_SEED), []
    for step in range(SPEECH_STEPS):
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
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        losses.append(loss.item())
        if step % 50 == 49:
            logging.info("words, step %d: loss %.4f", step + 1, np.mean(losses[-50:]))
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
    speech = output / "speech"
    steps.append(("speech", speech / "tokenizer_config.json", lambda: train_speech(speech)))
    for kind in ("xclip", "bt"):
        folder = output / f"tower-{kind}"
        steps.append((folder.name, folder / "heads.json", partial(train_tower, kind, gifs, folder)))
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
