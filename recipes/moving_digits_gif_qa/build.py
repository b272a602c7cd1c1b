"""GIF question answering in the small, all from scratch on a CPU: towers, a language model, then questions about GIFs
with the tower frozen, the language model in 4 bits and LoRA on it.

    pip install -c constraints.txt -e '.[train,quickstart,quantization]'
    python -m recipes.moving_digits_gif_qa.build -o build/gif_qa

Every step leaves its files in the output folder and is skipped when they are there.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
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
    quantization_config,
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

from ..shared import TRAIN_SEED, make, parse_arguments
from .table import markdown, read_scores, write_scores, write_table


TRAIN_GIFS, TEST_GIFS = 2000, 240
TEST_SEED = 3000  # fresh: GIFs of seeds 1000 and 2000 were looked at while the recipe was made
# Longer GIFs, whose counts 16 frames cannot tell apart: 4 times and 12 look the same in them, as do 6 and 10
LONG_TIMES, LONG_TRAIN, LONG_TEST, LONG_FRAMES = (4, 6, 8, 10, 12), 1000, 240, 48
NUM_FRAMES, SIDE, PATCH, WIDTH, LAYERS = 16, 32, 8, 64, 3
TOWER = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
         "image_size": SIDE, "patch_size": PATCH}  # fmt: skip
IMAGE_STEPS, IMAGE_BATCH, IMAGE_LR = 2000, 100, 2e-3
TOWER_STEPS, TOWER_BATCH, TOWER_LR = 450, 32, 1e-3
STATES_STEPS, STATES_BATCH = 600, 128
SPEECH = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
          "max_position_embeddings": 256, "initializer_range": 0.1}  # fmt: skip
SPEECH_STEPS, SPEECH_BATCH, SPEECH_LR = 500, 48, 2e-3
STEPS, LONG_STEPS, BATCH, RATE = 100, 60, 32, 4e-3
# encoder, connector, frames of a GIF, and the folder of GIFs that are asked about
SYSTEMS = (
    ("xclip", "mlp", NUM_FRAMES, "gifs"),
    ("xclip", "attention", NUM_FRAMES, "gifs"),
    ("xclip", "qformer", NUM_FRAMES, "gifs"),
    ("bt", "mlp", NUM_FRAMES, "gifs"),
    ("xclip", "mlp", NUM_FRAMES, "long"),
    ("xclip", "mlp", LONG_FRAMES, "long"),
)
TABLE = "train_all.jsonl"


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
    """Each moved by up to three pixels, and what that adds to side and centre; the background is dark, and no edge is
    seen."""
    moves = rng.integers(-3, 4, size=(len(videos), 2))
    moved = [torch.roll(video, move.tolist(), dims=(-2, -1)) for video, move in zip(videos, moves, strict=True)]
    added = np.stack([np.zeros(len(moves)), moves[:, 1], moves[:, 0]], axis=1) * 2
    return torch.stack(moved), torch.tensor(added, dtype=torch.float32)


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
    """What a tower learns from: the facts of a GIF, out of each of its states, and in the states of frames how many
    times it has been done so far."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.digit, self.action = nn.Linear(WIDTH, len(DIGITS)), nn.Linear(WIDTH, len(REPEATED))
        self.first, self.then = nn.Linear(WIDTH, len(FIRST)), nn.Linear(WIDTH, len(THEN))
        self.count, self.so_far = nn.Linear(WIDTH, MOST_TIMES), nn.Linear(WIDTH, MOST_TIMES)

    def forward(
        self, states: torch.Tensor, facts: list[dict[str, Any]], so_far: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """`states` (B, T, P), or (B, 1, P) of a tower that has one for the whole GIF; `so_far` (B, T), -1 = nothing
        is repeated. Right is what the mean over the states says."""
        states, loss, right = self.norm(states), 0.0, {}
        for name, words in (("digit", DIGITS), ("action", REPEATED), ("count", range(1, MOST_TIMES + 1)),
                            ("first", tuple(FIRST)), ("then", THEN)):  # fmt: skip
            rows = [row for row, fact in enumerate(facts) if name in fact]
            wanted = torch.tensor([tuple(words).index(facts[row][name]) for row in rows])
            logits = getattr(self, name)(states[rows])
            loss = loss + F.cross_entropy(logits.flatten(0, 1), wanted.repeat_interleave(logits.shape[1]))
            right[name] = (logits.mean(dim=1).argmax(dim=-1) == wanted).float().mean().item()
        if states.shape[1] > 1:
            logits = self.so_far(states).flatten(0, 1)
            loss = loss + F.cross_entropy(logits, so_far.flatten(), ignore_index=-1)
        return loss, right


def times_so_far(split: str, seed: int, index: int) -> list[int]:
    """Of each sampled frame, from 0: which of the times it belongs to."""
    count, T = facts_of(index).get("count"), len(states_of(split, seed, index))
    frames = sample_frame_indices(T, NUM_FRAMES, "centers")
    return [-1] * NUM_FRAMES if count is None else (count * frames // T).tolist()


def frame_features(tower: XCLIPFramesModel, videos: torch.Tensor) -> torch.Tensor:
    """What X-CLIP's integration transformer is given, (B, T, P)."""
    frames = tower.visual_projection(tower.vision_model(videos.flatten(0, 1)).pooler_output)
    return frames.unflatten(0, videos.shape[:2])


def train_tower(kind: str, images: Path, gifs: Path, folder: Path) -> None:
    """A tower on the facts of the training GIFs, under the same budget whichever it is."""
    set_seed(TRAIN_SEED)
    pixels = all_pixels(gifs / "train", "train", TRAIN_SEED, TRAIN_GIFS)
    facts = [facts_of(index) for index in range(TRAIN_GIFS)]
    so_far = torch.tensor([times_so_far("train", TRAIN_SEED, index) for index in range(TRAIN_GIFS)])
    tower, heads, rng = new_tower(kind, images).train(), Heads(), np.random.default_rng(TRAIN_SEED)

    def states(videos: torch.Tensor) -> torch.Tensor:
        seen = tower(videos)
        return seen.last_hidden_state if kind == "xclip" else seen.pooler_output[:, None]

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        rows = rng.choice(TRAIN_GIFS, TOWER_BATCH, replace=False)
        videos, _ = shifted(pixels[torch.from_numpy(rows)].float(), rng)
        loss, right = heads(states(videos), [facts[row] for row in rows], so_far[torch.from_numpy(rows)])
        return {"loss": loss, **right}

    learn(folder.name, TOWER_STEPS, TOWER_LR, [tower, heads], loss_of)
    tower.eval()
    if kind == "xclip":  # the integration transformer goes on by itself, which costs next to nothing
        with torch.no_grad():
            frames = torch.cat([frame_features(tower, part.float()) for part in pixels.split(50)])

        def integrated(step: int) -> dict[str, torch.Tensor]:
            rows = rng.choice(TRAIN_GIFS, STATES_BATCH, replace=False)
            seen = tower.mit(frames[torch.from_numpy(rows)]).last_hidden_state
            loss, right = heads(seen, [facts[row] for row in rows], so_far[torch.from_numpy(rows)])
            return {"loss": loss, **right}

        learn(f"{folder.name}, integration", STATES_STEPS, TOWER_LR, [tower.mit, heads], integrated)
    test = all_pixels(gifs / "test", "test", TEST_SEED, TEST_GIFS)
    with torch.no_grad():
        seen = torch.cat([states(part.float()) for part in test.split(50)])
        so_far = torch.tensor([times_so_far("test", TEST_SEED, index) for index in range(TEST_GIFS)])
        _, right = heads.eval()(seen, [facts_of(index) for index in range(TEST_GIFS)], so_far)
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
    facts = [facts_of(index, times) for times in (range(1, MOST_TIMES + 1), LONG_TIMES) for index in range(1000)]
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


def tune(output: Path, base: Path, folder: Path, table: Path, steps: int, num_frames: int) -> None:
    """Connector and LoRA, by the command that users have."""
    kind = base.name.split("-")[1]
    options = [
        "--lora", "--lora-r", "16", "--load-in-4bit", "--device", "cpu", "--save-steps", "300",
        "--num-frames", str(num_frames), "--max-steps", str(steps), "--batch-size", str(BATCH),
        "--learning-rate", str(RATE), "--cache-dtype", "fp32",
        "--cache-states", str(output / f"states-{kind}-{table.parent.parent.name}-{num_frames}"),
    ]  # fmt: skip
    if any(folder.glob("checkpoint-*")):
        options.append("--resume")
    command = [sys.executable, "-m", "bt_adapter_hf.cli.main", "finetune", "--model", str(base)]
    subprocess.run([*command, "--train", str(table), "--output-dir", str(folder), *options], check=True)


def join_tables(folder: Path, split: str, tasks: Sequence[str] = TASKS) -> None:
    """The tables as one of conversations, rows of all tasks mixed."""
    asked = [question for task in tasks for question in load_tgif_qa(folder / f"{split}_{task}_question.csv")]
    order = np.random.default_rng(TRAIN_SEED).permutation(len(asked))
    with (folder / f"{split}_all.jsonl").open("w", encoding="utf-8") as file:
        for index in order:
            messages = asked[index].messages
            messages[0]["content"][0]["path"] += ".gif"
            file.write(json.dumps({"messages": messages}) + "\n")


@torch.inference_mode()
def evaluate(base: Path, tuned: Path, folder: Path, tasks: Sequence[str], num_frames: int) -> list[dict[str, Any]]:
    """Rows of the table: the held-out GIFs as they are, with their frames shuffled, and reversed."""
    processor = BTAdapterGifQAProcessor.from_pretrained(base, num_frames=num_frames)
    quantized = quantization_config(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = BTAdapterGifQAForConditionalGeneration.from_pretrained(base, quantization_config=quantized)
    model = load_bt_adapter(model, tuned).eval()
    learns = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    asked = [question for task in tasks for question in load_tgif_qa(folder / f"test_{task}_question.csv")]
    batches = []
    for start in range(0, len(asked), 60):
        chats = [question.messages[:1] for question in asked[start : start + 60]]
        for chat in chats:
            chat[0]["content"][0]["path"] = str(folder / (chat[0]["content"][0]["path"] + ".gif"))
        batches.append(
            processor.apply_chat_template(
                chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
            )
        )
    generator = torch.Generator().manual_seed(TEST_SEED)
    rows = []
    for name, change in (("", None), ("shuffled", partial(shuffle_frames, generator=generator)),
                         ("reversed", reverse_frames)):  # fmt: skip
        answers = []
        for batch in batches:
            inputs = dict(batch)
            if change is not None:
                inputs["pixel_values_videos"] = change(inputs["pixel_values_videos"])
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            answers += processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
        scores = score_tgif_qa(asked, answers)
        row = {"frames": num_frames, "control": name, "trained": learns}
        row |= {task: round(100 * scores[task]["accuracy"], 1) for task in tasks if task != "count"}
        row |= {"count_mse": round(scores["count"]["mse"], 2), "mse_of_mean": round(scores["count"]["mse_of_mean"], 2)}
        rows.append(row)
    return rows


def steps_of(output: Path) -> list[tuple[str, Path, Callable[[], None]]]:
    """Name, the file that is written last, and what makes it."""
    gifs, long = output / "gifs", output / "long"

    def write(folder: Path, counts: tuple[int, int], times: Sequence[int], tasks: Sequence[str]) -> None:
        for split, count, seed in zip(("test", "train"), counts, (TEST_SEED, TRAIN_SEED), strict=True):
            write_gif_questions(
                folder / split, split, count, seed, times, tasks, progress=partial(tqdm, desc=f"{split} GIFs")
            )
            join_tables(folder / split, split, tasks)

    usual = range(1, MOST_TIMES + 1)
    steps = [
        ("gifs", gifs / "train" / TABLE, partial(write, gifs, (TEST_GIFS, TRAIN_GIFS), usual, TASKS)),
        ("long", long / "train" / TABLE, partial(write, long, (LONG_TEST, LONG_TRAIN), LONG_TIMES, ("count",))),
    ]
    images, speech = output / "images", output / "speech"
    steps.append(("images", images / "model.safetensors", lambda: train_images(gifs, images)))
    steps.append(("speech", speech / "tokenizer_config.json", lambda: train_speech(speech)))
    for kind, connector, frames, source in SYSTEMS:
        tower = output / f"tower-{kind}"
        steps.append((tower.name, tower / "heads.json", partial(train_tower, kind, images, gifs, tower)))
        base = output / f"base-{kind}-{connector}"
        tuned = output / f"tuned-{kind}-{connector}-{source}-{frames}"
        budget, tasks = (STEPS, TASKS) if source == "gifs" else (LONG_STEPS, ("count",))
        table = output / source / "train" / TABLE
        steps.append((base.name, base / "processor_config.json", partial(assemble, output, kind, connector, base)))
        tuning = partial(tune, output, base, tuned, table, budget, frames)
        steps.append((tuned.name, tuned / "adapter_model.safetensors", tuning))

        def score(base=base, tuned=tuned, tasks=tasks, frames=frames, kind=kind, connector=connector, source=source):
            rows = evaluate(base, tuned, output / source / "test", tasks, frames)
            about = {"gifs": "usual" if source == "gifs" else "long", "encoder": kind, "connector": connector}
            (tuned / "scores.json").write_text(json.dumps([about | row for row in rows], indent=2) + "\n")

        steps.append((f"scores of {tuned.name}", tuned / "scores.json", score))
    return steps


def main() -> None:
    args = parse_arguments(__doc__)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    output = args.output
    output.mkdir(parents=True, exist_ok=True)
    make(steps_of(output), output / "results.json")
    found = [output / f"tuned-{kind}-{connector}-{source}-{frames}" for kind, connector, frames, source in SYSTEMS]
    write_scores([row for tuned in found for row in json.loads((tuned / "scores.json").read_text())])
    write_table()
    print(markdown(read_scores()))


if __name__ == "__main__":
    main()
