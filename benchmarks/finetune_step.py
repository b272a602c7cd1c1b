"""Step time of instruction tuning with and without frozen states, on a LLaVA with random weights.

    python benchmarks/finetune_step.py --vision clip-b16 --num-frames 8 --steps 8
    python benchmarks/finetune_step.py --vision clip-l14 --llm 7b --bf16 --num-frames 64      # on a GPU

Sizes only: nothing is downloaded. Clips of 10 seconds at 320 x 240 are written and decoded. Prints seconds per step,
and the size of the states per video; the first two steps do not count.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, TrainerCallback

from bt_adapter_hf import BTAdapterLlavaConfig, BTAdapterLlavaForConditionalGeneration, BTAdapterLlavaProcessor
from bt_adapter_hf.assets import default_chat_model_path
from bt_adapter_hf.data.instructions import InstructionCollator, InstructionDataset, load_instructions
from bt_adapter_hf.models.processing_bt_adapter_chat import video_processor_like
from bt_adapter_hf.training.frozen_states import FrozenStates, build_states, plan_states
from bt_adapter_hf.training.instruction_tuning import InstructionArguments, InstructionTrainer, prepare_for_tuning


# width, MLP, layers, heads
VISION = {"clip-b16": (768, 3072, 12, 12, 16), "clip-l14": (1024, 4096, 24, 16, 14)}
LLM = {"tiny": (512, 1024, 4, 8), "1b": (2048, 5632, 22, 32), "7b": (4096, 11008, 32, 32)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vision", choices=VISION, default="clip-b16")
    parser.add_argument("--llm", choices=LLM, default="tiny")
    parser.add_argument("--num-frames", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        table = write_table(folder, options.videos)
        processor = make_processor(VISION[options.vision][-1], options.num_frames)
        for dtype in (None, "bf16", "fp8"):
            print(measure(options, folder, table, processor, dtype), flush=True)


def measure(options, folder: Path, table, processor, dtype: str | None) -> str:
    torch.manual_seed(0)
    args = InstructionArguments(
        output_dir=str(folder / "out"), max_steps=options.steps + 2, per_device_train_batch_size=options.batch_size,
        dataloader_num_workers=options.workers, bf16=options.bf16, logging_steps=options.steps + 2,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    model = make_model(options, len(processor.tokenizer), processor.image_token_id).to(args.device)
    model = prepare_for_tuning(model)
    states, size = None, ""
    if dtype is not None:
        plan = plan_states(folder / dtype, model, processor, table.videos(), dtype)
        start = time.perf_counter()
        build_states(plan, model, processor, workers=options.workers)
        each = (time.perf_counter() - start) / options.videos
        size = f", {plan.bytes_per_video / 1e6:.1f} MB and {each:.2f} s to compute per video"
        states = FrozenStates(folder / dtype, model, processor)
    clock = Clock()
    trainer = InstructionTrainer(
        model=model,
        args=args,
        train_dataset=InstructionDataset(table, processor, max_length=2048, states=states),
        data_collator=InstructionCollator(processor),
        callbacks=[clock],
    )
    trainer.train()
    seconds = float(np.median(np.diff(clock.ends)[1:]))
    return f"{dtype or 'pixels':>6}: {seconds:.3f} s per step{size}"


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def make_model(options, vocabulary: int, image_token: int) -> BTAdapterLlavaForConditionalGeneration:
    width, mlp, layers, heads, patch = VISION[options.vision]
    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads}
    vision = CLIPVisionConfig(**sizes, image_size=224, patch_size=patch)
    width, mlp, layers, heads = LLM[options.llm]
    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads}
    text = LlamaConfig(**sizes, vocab_size=vocabulary + 1, max_position_embeddings=2048)
    native = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    config = BTAdapterLlavaConfig(**{**native.to_dict(), "model_type": "bt_adapter_llava"})
    return BTAdapterLlavaForConditionalGeneration(config).to(torch.bfloat16 if options.bf16 else torch.float32)


def make_processor(patch: int, num_frames: int) -> BTAdapterLlavaProcessor:
    images = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    videos = video_processor_like(images)
    videos.num_frames = num_frames
    tokenizer = BTAdapterLlavaProcessor.from_pretrained(default_chat_model_path()).tokenizer
    return BTAdapterLlavaProcessor(images, videos, tokenizer, patch_size=patch)


def write_table(folder: Path, count: int):
    generator, rows = np.random.default_rng(0), []
    for number in range(count):
        coarse = generator.integers(0, 255, (15, 20, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("h264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for t in range(250):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(coarse, t, axis=1), format="rgb24")))
            container.mux(stream.encode())
        question = [{"type": "video", "path": f"{number}.mp4"}, {"type": "text", "text": "What happens?"}]
        answer = "a red seven moves from the left to the right, then grows from small to big"
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_instructions(folder / "train.jsonl")


if __name__ == "__main__":
    main()
