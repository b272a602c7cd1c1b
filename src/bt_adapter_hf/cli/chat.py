"""`bt-adapter chat`: questions about videos and images, once or in conversation."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..adapters.writing import no_character, printable
from ._options import add_chat_model_options, add_device_option, path, quiet_transformers, whole_number
from ._training_options import add_item_timeout


# Type of a native host, or of ours -> the middle of our classes' names.
HOSTS = {
    "llava": "Llava",
    "bt_adapter_llava": "Llava",
    "instructblip": "InstructBlip",
    "bt_adapter_instructblip": "InstructBlip",
    "blip-2": "MiniGPT4",
    "bt_adapter_minigpt4": "MiniGPT4",
    "bt_adapter_gif_qa": "GifQA",
}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # unless it moves; a GIF is a video


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="ask about videos and images",
        description="Ask a LLaVA, InstructBLIP or MiniGPT-4 with a BT-Adapter about videos and images, or a model of "
        "GIF question answering about GIFs: the given questions one after the other, or without any what is typed (or "
        "piped in), line by line. Answers are greedy and appear as they are made; the number of visual tokens goes to "
        "stderr first.",
        epilog='example: bt-adapter chat clip.mp4 --question "How does it move?"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files", nargs="*", type=path, metavar="FILE", help="video or image, path or URL; all are seen at once"
    )
    parser.add_argument(
        "-q", "--question", action="append", dest="questions", metavar="TEXT", help="may be given several times"
    )
    add_chat_model_options(parser)
    parser.add_argument(
        "--max-new-tokens", type=whole_number(), default=256, metavar="N", help="per answer (default: 256)"
    )
    add_device_option(parser)
    add_item_timeout(parser)
    parser.add_argument("--json", action="store_true", help="print JSON; needs --question")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _check(args)
    quiet_transformers()
    processor, load_model = find_model(args)
    seen = _look(args.files, processor, args.item_timeout)  # before anything large is loaded
    model = load_model()

    # Pixels, not paths: each file is decoded once, however long the conversation.
    messages, answers, parts = [], [], [part for part, _ in seen]
    for question in args.questions or _typed():
        if problem := no_character(question):  # one that was typed is not the end of the conversation
            print(f"the question {problem}", file=sys.stderr)
            continue
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        parts = []
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        ).to(model.device, model.dtype)
        if not answers:
            visual_tokens = _announce(inputs["input_ids"], [facts for _, facts in seen], processor)
        answer = _answer(model, processor, inputs, args.max_new_tokens, show=not args.json)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        answers.append({"question": question, "answer": answer})
    if args.json:
        files = [facts for _, facts in seen]
        print(json.dumps({"files": files, "visual_tokens": visual_tokens, "answers": answers}, indent=2))
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be told without loading anything.

    Raises:
        ValueError: a question is empty, or JSON is wanted without a question.
        FileNotFoundError: files are not there; all of them are named.
    """
    if args.json and not args.questions:
        raise ValueError("--json needs a --question.")
    if any(not question.strip() for question in args.questions or []):
        raise ValueError("a --question is empty.")
    if problem := next(filter(None, map(no_character, args.questions or [])), None):
        raise ValueError(f"a --question {problem}.")
    missing = [file for file in args.files if not _is_url(file) and not os.path.isfile(file)]
    if missing:
        names = ", ".join(f"'{printable(file)}'" for file in missing)
        what = "is not a file" if len(missing) == 1 else f"are no files, {len(missing)} of {len(args.files)}"
        raise FileNotFoundError(f"{names} {what}.")


def find_model(args: argparse.Namespace):
    """The processor, and a function that loads the model."""
    import bt_adapter_hf

    from ..adapters.files import is_peft_folder
    from ..hub.chat_processor import load_chat_processor
    from ..hub.kinds import wrong_kind
    from ..hub.source import resolve_adapter

    name, revision, adapter, model_type = _named_model(args)
    if model_type not in HOSTS:
        raise wrong_kind(name, model_type, f"a chat model, of type {', '.join(HOSTS)}, or an adapter of one")
    if model_type == "bt_adapter_gif_qa" and not args.files:
        raise ValueError(f"'{name}' answers about GIFs only: name one or several FILEs.")
    folder = None if adapter is None else resolve_adapter(adapter)
    is_lora = folder is not None and is_peft_folder(folder)
    if folder is not None and not is_lora:
        check_place(name, model_type, folder)
    is_native = not model_type.startswith("bt_adapter_")
    if is_native and adapter is None and not all(map(_is_image, args.files)):
        raise ValueError(f"'{name}' has no adapter, and there are videos: name one with --bt-adapter.")
    fields = {"num_frames": args.num_frames, "num_clips": args.num_clips}
    fields = {key: value for key, value in fields.items() if value is not None}
    processor_class = getattr(bt_adapter_hf, f"BTAdapter{HOSTS[model_type]}Processor")
    processor = load_chat_processor(processor_class, name, revision, folder, **fields)

    def load():
        from transformers import AutoModelForImageTextToText

        from ..hub.machine import machine_dtype, usable_device

        device = usable_device(args.device)
        dtype = args.dtype
        if dtype == "auto" and machine_dtype(device)[0] == "bfloat16":  # else as saved: float32 may not fit
            dtype = "bfloat16"
        if is_lora:
            native = AutoModelForImageTextToText.from_pretrained(name, revision=revision, dtype=dtype)
            model = bt_adapter_hf.load_bt_adapter(native, folder)
        else:
            model = getattr(bt_adapter_hf, f"BTAdapter{HOSTS[model_type]}ForConditionalGeneration").from_pretrained(
                name, revision=revision, bt_adapter=folder, dtype=dtype
            )
        return model.to(device).eval()

    return processor, load


def check_place(name: str, model_type: str, adapter: Path) -> None:
    """An adapter goes into a native model, or takes the place of the branch in one of the kind that it was tuned in.

    Raises:
        ValueError: it does neither.
    """
    from ..hub.loading import was_tuned_in

    if model_type.startswith("bt_adapter_") and not was_tuned_in(adapter, model_type):
        raise ValueError(f"'{name}' has an adapter in: leave out --bt-adapter, or name the native model with --model.")


def _named_model(args: argparse.Namespace) -> tuple[str, str | None, str | Path | None, str]:
    """Model, its revision, the adapter to put into it and the model's type.

    An adapter as --model stands in the base model that it names.
    """
    from ..assets import default_chat_model_path
    from ..hub.kinds import holding
    from ..hub.source import find_adapter, model_type_of

    if args.model is None:
        name = str(default_chat_model_path())
        return name, None, args.bt_adapter, model_type_of(name)
    model_type = model_type_of(args.model, args.revision)
    if model_type is not None:
        return args.model, args.revision, args.bt_adapter, model_type
    found = find_adapter(args.model, {"revision": args.revision})
    if found is None:
        raise ValueError(
            f"'{args.model}' holds neither a model with its config.json nor an adapter"
            f"{': it holds ' + holding(Path(args.model)) if os.path.isdir(args.model) else ''}."
        )
    folder, adapter = found
    if args.bt_adapter is not None:
        raise ValueError(f"'{args.model}' is an adapter, and --bt-adapter names another.")
    base = adapter.base_model_name_or_path
    if not base:
        raise ValueError(f"'{args.model}' is an adapter that names no model: name that, and this with --bt-adapter.")
    print(f"'{args.model}' is an adapter of '{base}'", file=sys.stderr)
    return base, adapter.revision, folder, model_type_of(base, adapter.revision)


def _look(files: list[str], processor, timeout: float | None) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The parts of a message that show the files, decoded, and what is told about each.

    Raises:
        ValueError: some cannot be used; all of them are named.
    """
    from PIL import Image

    from ..data.decoding_process import DecodingProcess
    from ..models.video_errors import VideoError

    read = _Reader(processor)
    read = read if timeout is None else DecodingProcess(read, timeout)
    seen, broken = [], []
    for file in files:
        try:
            pixels, indices = read(file)
        except VideoError as error:
            broken.append(str(error) if file in str(error) else f"{file}: {error}")
            continue
        kind = "image" if indices is None else "video"
        pixels = Image.fromarray(pixels) if kind == "image" else pixels
        facts = {"file": file, "kind": kind} | ({} if indices is None else {"frames": indices})
        seen.append(({"type": kind, kind: pixels}, facts))
    if timeout is not None:
        read.close()
    if broken:
        count = f"{len(broken)} of {len(files)} files cannot be used. " if len(files) > 1 else ""
        raise ValueError(count + " ".join(broken))
    return seen


class _Reader:
    """Reads a file: the pixels of an image and None, or the frames of a video and their indices. To a model that is
    asked about GIFs only, an image is one of one frame."""

    def __init__(self, processor):
        from .. import BTAdapterGifQAProcessor

        self.rules, self.num_clips = processor.video_processor, processor.num_clips
        self.only_gifs = isinstance(processor, BTAdapterGifQAProcessor)

    def __call__(self, file: str):
        import numpy as np

        from ..models.image_io import load_image
        from ..models.video_io import load_video

        if (is_image := _is_image(file)) and not self.only_gifs:
            return np.asarray(load_image(file)), None
        frames, metadata = load_video(
            [load_image(file)] if is_image else file,
            num_frames=self.rules.num_frames * self.num_clips,
            sampling=self.rules.sampling,
            backend=self.rules.video_backend,
            on_damage=self.rules.on_damage,
            background=tuple(self.rules.background),
        )
        return frames, [int(index) for index in metadata.frames_indices]


def _is_url(file: str) -> bool:
    return file.startswith(("http://", "https://"))


def _is_image(file: str) -> bool:
    """By its ending, and a file on the disk by what is in it: an animated WebP or PNG is a video."""
    from PIL import Image

    if not file.lower().endswith(IMAGE_SUFFIXES):
        return False
    if _is_url(file):
        return True
    try:
        with Image.open(file) as image:
            return getattr(image, "n_frames", 1) == 1 or image.format == "MPO"  # photographs with a small copy
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # told when it is read
        return True


def _typed() -> Iterator[str]:
    """Questions from the terminal or a pipe, until the end of the input."""
    if sys.stdin.isatty():
        print("Ask; an empty line ends.", file=sys.stderr)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                return
            if not line:
                return
            yield line
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is the error of its line
    yield from filter(None, map(str.strip, sys.stdin))


def _announce(input_ids, files: list[dict[str, Any]], processor) -> int:
    """Tells the cost before anything runs; returns the number of visual tokens."""
    visual = sum(int((input_ids == token).sum()) for token in (processor.image_token_id, processor.video_token_id))
    if files:
        kinds = [f"video of {len(file['frames'])} frames" if file["kind"] == "video" else "image" for file in files]
        print(f"{', '.join(kinds)}: {visual} visual tokens of {input_ids.shape[1]} in the prompt", file=sys.stderr)
    return visual


def _answer(model, processor, inputs, max_new_tokens: int, show: bool) -> str:
    from transformers.generation import BaseStreamer

    class Answer(BaseStreamer):
        """Prints whole words as they are made, and keeps the text."""

        def __init__(self):
            self.ids: list[int] = []
            self.text, self.shown, self.is_prompt = "", 0, True

        def put(self, value) -> None:
            if self.is_prompt:  # comes first
                self.is_prompt = False
                return
            self.ids.extend(value.flatten().tolist())
            self.text = processor.post_process_image_text_to_text([self.ids])[0]
            self._show(self.text.rfind(" ") + 1)

        def end(self) -> None:
            self._show(len(self.text))
            if show:
                print(flush=True)

        def _show(self, end: int) -> None:
            if show and end > self.shown:
                print(self.text[self.shown : end], end="", flush=True)
            self.shown = max(end, self.shown)

    answer = Answer()
    model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=answer)
    return answer.text
