"""Tiny random chat models to tune, and tables of conversations about tiny clips, all made in code."""

import json
from pathlib import Path

import torch
from PIL import Image
from transformers import set_seed

from bt_adapter_hf import (
    BTAdapterInstructBlipForConditionalGeneration,
    BTAdapterInstructBlipProcessor,
    BTAdapterLlavaForConditionalGeneration,
    BTAdapterLlavaProcessor,
    BTAdapterMiniGPT4ForConditionalGeneration,
    BTAdapterMiniGPT4Processor,
)
from bt_adapter_hf.data.instructions import (
    InstructionCollator,
    InstructionDataset,
    load_instructions,
    longest_conversation,
)
from bt_adapter_hf.training.instruction_tuning import InstructionArguments, InstructionTrainer, prepare_for_tuning
from tests import tiny_pairs
from tests.chat import saved_hosts


CLASSES = {
    "llava": (BTAdapterLlavaForConditionalGeneration, BTAdapterLlavaProcessor),
    "instructblip": (BTAdapterInstructBlipForConditionalGeneration, BTAdapterInstructBlipProcessor),
    "blip-2": (BTAdapterMiniGPT4ForConditionalGeneration, BTAdapterMiniGPT4Processor),
}


class Host:
    """One kind of chat model, as a native checkpoint and an adapter in folders; `saved` where they are there."""

    def __init__(self, name: str, folder: Path, saved: bool = False):
        self.name, self.folder = name, folder
        self.native, self.adapter = (
            (folder / "native", folder / "adapter") if saved else saved_hosts.save(name, folder)
        )
        self.model_class, self.processor_class = CLASSES[name]

    def model(self, **options):
        return self.model_class.from_pretrained(self.native, bt_adapter=self.adapter, **options)

    def processor(self, num_frames: int = 4):
        return self.processor_class.from_pretrained(self.native, num_frames=num_frames)


def write_table(folder: Path, rows: int = 8) -> Path:
    """`folder/train.jsonl` with `rows` conversations about as many clips; answers differ in length."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(rows):
        name = list(tiny_pairs.COLOURS)[i % len(tiny_pairs.COLOURS)]
        direction, step = (("right", 2), ("left", -2))[i // len(tiny_pairs.COLOURS) % 2]
        tiny_pairs.write_clip(folder / f"clip{i}.mp4", tiny_pairs.COLOURS[name], step)
        part = {"type": "video", "path": f"clip{i}.mp4"}
        answer = f"the {name} square is {direction} ." if i % 3 else direction
        messages = [
            {"role": "user", "content": [part, {"type": "text", "text": "what happens ?"}]},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path = folder / "train.jsonl"
    path.write_text("".join(lines))
    return path


def write_mixed_table(folder: Path, kinds: list[str]) -> Path:
    """`folder/train.jsonl` with one conversation per kind: "text", "image", "video" or "both" of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_pairs.write_clip(folder / "clip.mp4", tiny_pairs.COLOURS["red"], 2)
    Image.new("RGB", (40, 40), "red").save(folder / "still.png")
    seen = {"image": {"type": "image", "path": "still.png"}, "video": {"type": "video", "path": "clip.mp4"}}
    lines = []
    for i, kind in enumerate(kinds):
        parts = [seen[name] for name in ("image", "video") if kind in (name, "both")]
        content = [*parts, {"type": "text", "text": "what happens ?"}]
        answer = "the red square is left ." if i % 2 else "left"
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path = folder / "train.jsonl"
    path.write_text("".join(lines))
    return path


def make_trainer(
    host: Host,
    table: Path,
    output_dir: Path,
    *,
    model: torch.nn.Module | None = None,
    lora: dict | None = None,
    states=None,
    validation: Path | None = None,
    **options,
) -> InstructionTrainer:
    """Six steps of two conversations each, on the CPU, with every loss in the log."""
    set_seed(0)
    processor = host.processor()
    model = prepare_for_tuning(host.model() if model is None else model, lora)

    def dataset(path):
        return InstructionDataset(
            load_instructions(path),
            processor,
            max_length=longest_conversation(model.config, processor),
            states=states,
        )

    arguments = {
        "output_dir": output_dir,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 6,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **options,
    }
    args = InstructionArguments(**arguments)
    tiny_pairs.shard_on_the_cpu()
    return InstructionTrainer(
        model=model,
        args=args,
        train_dataset=dataset(table),
        eval_dataset=None if validation is None else dataset(validation),
        data_collator=InstructionCollator(processor),
        processing_class=processor,
    )


def losses(trainer: InstructionTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
