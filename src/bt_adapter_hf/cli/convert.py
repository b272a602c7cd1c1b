"""`bt-adapter convert`: released checkpoints to models and adapters of this package, and back."""

import argparse
import json
import math
from pathlib import Path

from ..adapters.writing import written_whole
from ._options import path, quiet_transformers


_CHECKPOINTS = (".pth", ".pt", ".bin", ".safetensors")
_EXAMPLES = """examples:
  bt-adapter convert btadapter_clip_l14.pth out --base openai/clip-vit-large-patch14
  bt-adapter convert btadapter_clip_l14.pth out --base openai/clip-vit-large-patch14 --to adapter --dtype float16
  bt-adapter convert btadapter_weight.bin out --base openai/clip-vit-large-patch14 --to adapter
  bt-adapter convert btadapter_clip_l14.pth --dry-run
  bt-adapter convert my-pretraining-run my-adapter --to adapter
  bt-adapter convert out btadapter_clip_l14.pth --to original"""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="released checkpoints to models and adapters, and back",
        description="Convert a checkpoint of the released BT-Adapter code, strictly: a tensor that is unknown, "
        "missing or of another size is an error, and nothing is written then. Files are read without running code "
        "in them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        type=path,
        metavar="SOURCE",
        help="checkpoint file; with --to original a model (folder or Hub id), with --to adapter also one",
    )
    parser.add_argument(
        "output",
        type=path,
        metavar="OUTPUT",
        nargs="?",
        help="folder; with --to original a .pth, .bin or .safetensors file",
    )
    parser.add_argument(
        "--to",
        default="model",
        choices=("model", "tower", "pretraining", "adapter", "original"),
        help="dual encoder (or the tower, if there is no text tower), video tower, dual encoder with the alignment "
        "head, adapter without the backbone, or the released names (default: model)",
    )
    parser.add_argument(
        "--base",
        type=path,
        metavar="ID_OR_PATH",
        help="the image model that it was trained on; gives what the file does not hold, also the settings of "
        "the branch where it is a dual encoder or tower of this package",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the base, or of SOURCE where that is an id")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the result (default: as in the file)"
    )
    parser.add_argument(
        "--set",
        dest="fields",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="a field of the configuration, such as fusion=sum or mask_order=released; may be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be converted, and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    output = _check_output(args)
    quiet_transformers()
    if args.base is not None:
        from ..hub.kinds import wrong_kind
        from ..hub.source import model_type_of

        if model_type_of(args.base, args.revision) is None:
            raise wrong_kind(args.base, None, "the image model that the checkpoint was trained on, for --base")
    if args.to == "original":
        return _to_original(args, output)
    if Path(args.source).is_dir():
        return _to_adapter(args, output, Path(args.source))
    from ..hub.card_text import is_hub_id

    if args.to == "adapter" and is_hub_id(args.source) and Path(args.source).suffix not in _CHECKPOINTS:
        from ..hub.source import resolve_adapter

        return _to_adapter(args, output, resolve_adapter(args.source, None if args.base else args.revision))
    import torch

    from .. import BTAdapterForPreTraining, BTAdapterVisionModel
    from ..conversion import plan_conversion

    model_class = {"tower": BTAdapterVisionModel, "pretraining": BTAdapterForPreTraining}.get(args.to)
    plan = plan_conversion(
        args.source,
        args.base,
        model_class=model_class,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        revision=args.revision,
        **_fields(args.fields),
    )
    if args.dry_run:
        _print_plan(args, plan)
        return 0
    model = plan.build()
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(output) as folder:
        if args.to == "adapter":
            from ..adapters.verbs import save_bt_adapter

            save_bt_adapter(model, folder, base_model_name_or_path=args.base, revision=_commit(args))
        else:
            model.save_pretrained(folder)
            if hasattr(model, "text_model"):
                plan.notes.append(_write_processor(args, folder))
    if args.to == "adapter":
        return _report(args, output, "adapter", len(_branch(plan.rows)), plan.notes)
    return _report(args, output, plan.model_class.__name__, len(plan.rows), plan.notes)


def _write_processor(args: argparse.Namespace, folder: Path) -> str:
    """Beside a dual encoder, so that `bt-adapter index` takes the folder. Returns a line on it."""
    from ..hub.dual_encoder import processor_of_clip

    missing = "There is no processor beside the model, which `bt-adapter index` and AutoProcessor need: "
    if args.base is None:
        return f"{missing}name the CLIP that it was trained on with --base."
    try:
        processor = processor_of_clip(args.base, args.revision)
    except OSError as error:
        return f"{missing}{args.base} has none ({str(error).splitlines()[0].rstrip('.')})."
    processor.save_pretrained(folder)
    frames = processor.video_processor.num_frames
    return f"The processor has the sizes and the tokenizer of {args.base}, and takes {frames} frames of a video."


def _to_adapter(args: argparse.Namespace, output: Path | None, source: Path) -> int:
    """The branch of a folder that holds a tower, a dual encoder or a pretraining run; one on the Hub was fetched."""
    from ..adapters.verbs import save_bt_adapter
    from ..adapters.whole_models import base_of_run, is_whole_model, load_tower

    if args.to != "adapter" or not is_whole_model(source):
        found = "a folder" if source == Path(args.source) else "no model with a branch"
        raise ValueError(
            f"'{args.source}' is {found}. With --to adapter or --to original it may be that of a tower, a dual "
            f"encoder or a pretraining run; else SOURCE is a checkpoint file of the released code."
        )
    if args.fields:
        raise ValueError("--set is for checkpoint files: the model in a folder has its fields in config.json.")
    model = load_tower(source, args.dtype or "auto")
    state = model.bt_adapter.state_dict()
    if args.dry_run:
        return _print_state(args, state)
    base, revision = (args.base, _commit(args)) if args.base else base_of_run(source)
    if base is None and source != Path(args.source):
        base, revision = args.source, source.name  # the Hub's cache has a folder for each commit
    with written_whole(output) as folder:
        save_bt_adapter(model, folder, base_model_name_or_path=base, revision=revision)
    note = f"Its base model is {base or args.source}" + ("." if base else ": name another with --base.")
    return _report(args, output, "adapter", len(state), [note])


def _commit(args: argparse.Namespace) -> str | None:
    """Of a base on the Hub; None of a folder."""
    from ..models.compat_bt_adapter import resolve_revision

    return args.base and getattr(resolve_revision(args.base, args.revision), "resolved", None)


def _report(args: argparse.Namespace, output: Path, model: str, tensors: int, notes: list[str]) -> int:
    if args.json:
        print(json.dumps({"output": str(output), "model": model, "tensors": tensors, "notes": notes}))
    else:
        print(f"{model} with {tensors} tensors written to {output}")
        for note in notes:
            print(f"  {note}")
    return 0


def _check_output(args: argparse.Namespace) -> Path | None:
    if args.dry_run:
        return None
    if args.output is None:
        raise ValueError("OUTPUT is missing: name the folder to write, or pass --dry-run.")
    output = Path(args.output)
    if output.exists() and not args.overwrite and (output.is_file() or any(output.iterdir())):
        raise ValueError(f"{output} exists: name another OUTPUT, or pass --overwrite.")
    return output


def _fields(pairs: list[str]) -> dict:
    fields = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign:
            raise ValueError(f"--set {pair} is not of the form FIELD=VALUE.")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
        if isinstance(fields[name], float) and not math.isfinite(fields[name]):
            raise ValueError(f"--set {pair}: expected a finite number.")
    return fields


def _to_original(args: argparse.Namespace, output: Path | None) -> int:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel

    from ..conversion import convert_to_original
    from ..hub.kinds import wrong_kind
    from ..hub.source import model_type_of
    from ..models.configuration_bt_adapter import BTAdapterConfig, BTAdapterVisionConfig

    model_type = model_type_of(args.source, args.revision)
    if model_type not in (BTAdapterConfig.model_type, BTAdapterVisionConfig.model_type):
        raise wrong_kind(args.source, model_type, "a dual encoder or a video tower, for --to original")
    model = AutoModel.from_pretrained(args.source, revision=args.revision, dtype=args.dtype or "auto")
    state = {key: tensor.contiguous() for key, tensor in convert_to_original(model).items()}
    if args.dry_run:
        return _print_state(args, state)
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(output) as path:
        if output.suffix == ".safetensors":
            save_file(state, path, metadata={"format": "pt"})
        else:  # the released loader looks for "state_dict" in .pth files, and in no others
            with path.open("wb") as file:  # whose errors are Python's: a full disk is told as one
                torch.save({"state_dict": state} if output.suffix == ".pth" else state, file)
    report = {"output": str(output), "model": "original", "tensors": len(state), "notes": []}
    print(json.dumps(report) if args.json else f"{len(state)} tensors written to {output} under the released names")
    return 0


def _print_state(args: argparse.Namespace, state: dict) -> int:
    """What --dry-run would write."""
    rows = [(key, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for key, tensor in state.items()]
    if args.json:
        tensors = [dict(zip(("name", "shape", "dtype"), row, strict=True)) for row in rows]
        print(json.dumps({"model": args.to, "tensors": tensors, "notes": []}))
    else:
        for key, shape, dtype in rows:
            print(f"{key}  {tuple(shape)}  {dtype}")
    return 0


def _branch(rows: list[tuple]) -> list[tuple]:
    return [row for row in rows if "bt_adapter." in row[1]]


def _print_plan(args: argparse.Namespace, plan) -> None:
    rows = _branch(plan.rows) if args.to == "adapter" else plan.rows
    if args.json:
        names = ("released", "name", "shape", "dtype")
        tensors = [dict(zip(names, row, strict=True)) for row in rows]
        print(json.dumps({"model": plan.model_class.__name__, "tensors": tensors, "notes": plan.notes}))
        return
    width = max(len(row[0]) for row in rows)
    for released, name, shape, dtype in rows:
        print(f"{released:<{width}}  ->  {name}  {'x'.join(map(str, shape)) or 'scalar'}  {dtype}")
    count = sum(_size(row[2]) for row in rows)
    print(f"\n{plan.model_class.__name__}: {len(rows)} tensors, {count / 1e6:.2f} M parameters; nothing was written.")
    for note in plan.notes:
        print(f"  {note}")


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
