"""`bt-adapter env`: versions, devices, decoders, a try of the chat model, and what is wrong. For bug reports."""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import re
from pathlib import Path

from ..import_utils import import_error, is_missing


# (name in package registries, name to import)
CORE = (
    ("torch", "torch"),
    ("torchvision", "torchvision"),
    ("transformers", "transformers"),
    ("safetensors", "safetensors"),
    ("huggingface_hub", "huggingface_hub"),
    ("numpy", "numpy"),
    ("pillow", "PIL"),
    ("av", "av"),
    ("packaging", "packaging"),
)
DECODERS = (("decord", "decord"), ("torchcodec", "torchcodec"))
# Their versions only: importing them is slow, and what breaks them is mostly one of the above.
OTHERS = (
    *("accelerate", "datasets", "peft", "bitsandbytes", "matplotlib", "scikit-learn", "tokenizers"),
    *("lancedb", "scipy", "ftfy", "openai", "gradio"),
)
# What the optional ones are for, and the extra that brings them.
PURPOSES = {
    "accelerate": ("pretrain and finetune", "train"),
    "datasets": ("tables: pretrain, check-data, eval", "train"),
    "peft": ("LoRA", "train"),
    "bitsandbytes": ("language models in 4 or 8 bits", "quantization"),
    "matplotlib": ("plots of losses and results", "train"),
    "scikit-learn": ("the digits of quickstart", "quickstart"),
    "lancedb": ("index and search", "search"),
    "scipy": ("paired tests of eval", "eval"),
    "ftfy": ("captions of some sets of eval", "eval"),
    "openai": ("judges of eval", "eval"),
    "gradio": ("the page of demo", "demo"),
    "decord": ("another decoder", None),
    "torchcodec": ("another decoder", "torchcodec"),
}


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "env",
        help="versions, devices and decoders, and what is broken",
        description="Print versions beside those that were tested, devices and usable video decoders; ask the chat "
        "model inside the package about a picture and a video; name what is broken and how to fix it. Exits with 1 "
        "when a required package is broken or out of range, or the chat model does not answer.",
        epilog="example: bt-adapter env --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    report = environment_report()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print_report(report)
    return 1 if report["problems"] else 0


def environment_report() -> dict:
    """Everything that the command prints. Itself needs no package to be healthy."""
    torch_works = import_error("torch") is None
    problems = [problem for name, module in CORE if (problem := _core_problem(name, module, torch_works)) is not None]
    versions = _compared_versions()
    problems += [
        f"{name} {entry['installed']} is out of the range that bt_adapter_hf takes. Fix: pip install "
        f"'{name}{entry['range']}'"
        for name, entry in versions.items()
        if entry["state"] == "out of range"
    ]
    decoders, decoder_error = _decoders()
    if decoder_error is not None and not problems:
        problems.append(f"bt_adapter_hf.models.video_io does not import ({decoder_error})")
    chat_error = None if problems else _chat_error()
    chat = "not tried: see the problems" if problems else "fails" if chat_error else "answers"
    if chat_error:
        problems.append(
            f"the chat model inside the package does not answer about a picture and a video ({chat_error}). "
            f"{_back_to_tested(versions) or 'All versions are as tested: please report this.'}"
        )
    return {
        "bt_adapter_hf": _version("bt_adapter_hf"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {
            **{name: _state(name, module) for name, module in CORE + DECODERS},
            **{name: {"version": _version(name), "error": None} for name in OTHERS},
        },
        "versions": versions,
        "builds": {"torch": _torch_build(torch_works), "torchvision": _torchvision_build()},
        "devices": _devices() if torch_works else [],
        "precision": _precision() if torch_works else None,
        "video_decoders": decoders,
        "chat": chat,
        "problems": problems,
        "notes": [note for note in (_decord_note(), _torchcodec_note(), _version_note(versions)) if note is not None],
    }


def _compared_versions() -> dict[str, dict[str, str | None]]:
    if import_error("packaging") is not None:
        return {}
    from ._versions import compare_versions

    return compare_versions()


def _differing(versions: dict[str, dict[str, str | None]]) -> dict[str, dict[str, str | None]]:
    return {name: entry for name, entry in versions.items() if entry["tested"] and entry["state"] != "as tested"}


def _back_to_tested(versions: dict[str, dict[str, str | None]]) -> str:
    """How to get the tested versions of the packages that differ; empty if none does."""
    from ._versions import CONSTRAINTS

    differing = _differing(versions)
    return f"For the tested versions: pip install -c {CONSTRAINTS} {' '.join(differing)}" if differing else ""


def _version_note(versions: dict[str, dict[str, str | None]]) -> str | None:
    differing = _differing(versions)
    if not differing:
        return None
    shown = ", ".join(f"{name} {entry['installed']} ({entry['tested']})" for name, entry in differing.items())
    return f"other versions than tested (in brackets): {shown}. {_back_to_tested(versions)}"


def _chat_error() -> str | None:
    """What keeps the chat model inside the package from answering about a picture and a video, in one line."""
    try:
        import numpy as np
        import torch
        from PIL import Image
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from ..assets import default_chat_model_path
        from ._options import quiet_transformers

        quiet_transformers()
        processor = AutoProcessor.from_pretrained(default_chat_model_path())
        model = AutoModelForImageTextToText.from_pretrained(default_chat_model_path())
        frames = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
        content = [
            {"type": "image", "image": Image.fromarray(frames[0])},
            {"type": "video", "video": frames},
            {"type": "text", "text": "What moves?"},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        # the first of the two tokens is a forward pass over the prompt, the second one over a token and the cache
        with torch.no_grad():
            answer = model.generate(
                **inputs, max_new_tokens=2, min_new_tokens=2, output_logits=True, return_dict_in_generate=True
            )
        if not all(logits.isfinite().all() for logits in answer.logits):
            return "its logits are not finite"
    except Exception as error:  # whatever another version of a library raises
        return _one_line(error)
    return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _state(name: str, module: str) -> dict:
    error = import_error(module)
    broken = error is not None and not is_missing(error, module)
    return {"version": _version(name), "error": _one_line(error) if broken else None}


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _core_problem(name: str, module: str, torch_works: bool) -> str | None:
    error = import_error(module)
    if error is None:
        return None
    if is_missing(error, module):
        return f"{name} is not installed. Fix: pip install {name}"
    if name == "torchvision" and torch_works:
        return (
            f"torchvision ({_torchvision_build()}) does not fit torch ({_torch_build(torch_works)}): "
            f"{_one_line(error)}. Fix: install both in one command and from the same place: "
            "pip uninstall -y torch torchvision && pip install torch torchvision. "
            "(The default builds are CUDA builds and run on a CPU; a CPU-only torch needs a CPU-only torchvision.)"
        )
    return f"{name} is installed but does not import ({_one_line(error)}). Fix: pip install --force-reinstall {name}"


def _torch_build(torch_works: bool) -> str | None:
    """Version with the platform it was built for, such as "2.13.0+cpu" or "2.13.0+cu130"."""
    if not torch_works:
        return _version("torch")
    import torch

    return str(torch.__version__)


def _torchvision_build() -> str | None:
    """As `_torch_build`, read from its source: only there is the build named, and importing may be what is broken."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    version_file = Path(spec.origin).with_name("version.py")
    match = re.search(r"__version__ = '([^']+)'", version_file.read_text()) if version_file.is_file() else None
    return match[1] if match else _version("torchvision")


def _devices() -> list[str]:
    import torch

    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices.append(f"cuda:{i} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def _precision() -> dict[str, str]:
    """What `--dtype auto` stands for on the device that the commands take, and why."""
    from ..hub.machine import machine_dtype, usable_device

    device = usable_device(None)
    dtype, reason = machine_dtype(device)
    return {"device": str(device), "dtype": dtype, "reason": reason}


def _decoders() -> tuple[dict[str, str | None], str | None]:
    """Each video backend with None, or what keeps it from being used; and why that cannot be told."""
    try:
        from ..models.video_backends import available_video_backends
    except Exception as error:  # whatever a broken torchvision raises inside transformers
        return {}, _one_line(error)
    return available_video_backends(), None


def _decord_note() -> str | None:
    error = import_error("decord")
    if error is None:
        return None
    if is_missing(error, "decord"):
        return "decord is not installed; it has wheels for x86-64 Linux and Windows only. PyAV decodes everything."
    return f"decord is installed but does not import ({_one_line(error)}). PyAV decodes everything."


def _torchcodec_note() -> str | None:
    error = import_error("torchcodec")
    if error is None or is_missing(error, "torchcodec"):
        return None
    return f"torchcodec is installed but does not load: {_torchcodec_cause(str(error))} PyAV decodes everything."


def _torchcodec_cause(message: str) -> str:
    """What stops it, and the fix. torchcodec tries one library per FFmpeg version and reports the error of each; those
    for FFmpeg versions that are absent say so (libav...), which matters only when no other error is among them."""
    causes = re.findall(
        r"OSError: (.*(?:cannot open shared object file|undefined symbol|Library not loaded).*)", message
    )
    other = [cause for cause in causes if not re.match(r"(lib)?av|(lib)?sw", Path(cause.split(":")[0]).name)]
    if not causes:
        return f"{message.strip().splitlines()[0]} Fix: pip install -U torch torchvision torchcodec"
    if not other:
        return f"FFmpeg's libraries are missing ({causes[0]}). Fix: apt-get install ffmpeg (or your system's package)."
    if re.match(r"libnv|libcu|libc10_cuda|libtorch_cuda", other[0]):
        return (
            f"it is a CUDA build and CUDA's libraries are missing ({other[0]}), as with a CPU-only torch. "
            "Fix: pip uninstall -y torch torchvision torchcodec && pip install torch torchvision torchcodec."
        )
    return (
        f"it was built for another torch ({other[0]}). "
        "Fix: pip uninstall -y torch torchvision torchcodec && pip install torch torchvision torchcodec."
    )


def _print_report(report: dict) -> None:
    print(f"bt_adapter_hf    {report['bt_adapter_hf'] or 'not installed'}")
    print(f"python           {report['python']}")
    print(f"platform         {report['platform']}")
    print()
    for name, state in report["packages"].items():
        version = report["builds"].get(name) or state["version"] or "-"
        compared = _describe(report["versions"].get(name.replace("_", "-")))
        if state["version"] is None and name in PURPOSES and not state["error"]:
            purpose, extra = PURPOSES[name]
            compared = f"not installed; for {purpose}" + (f" (pip install '.[{extra}]')" if extra else "")
        line = f"{name:<17}{version:<17}{compared}{'   BROKEN: ' + state['error'] if state['error'] else ''}"
        print(line.rstrip())
    print()
    print(f"devices          {', '.join(report['devices']) or 'unknown: torch does not import'}")
    if report["precision"]:
        print("precision        {dtype} on {device}: {reason}".format(**report["precision"]))
    usable = [name for name, problem in report["video_decoders"].items() if problem is None]
    print(f"decoders         {', '.join(usable) or 'unknown: see the problems'}")
    print(f"chat model       {report['chat']}")
    for title in ("problems", "notes"):
        for line in report[title]:
            print(f"\n{title[:-1].upper()}: {line}")
    if not report["problems"]:
        print("\nno problem found")


def _describe(entry: dict[str, str | None] | None) -> str:
    """How a version stands to the tested one and to the range that is taken."""
    if entry is None:
        return ""
    if entry["state"] == "out of range":
        return f"out of range ({entry['range']})"
    return f"{entry['state']} ({entry['tested']})" if entry["state"].endswith("than tested") else entry["state"]
