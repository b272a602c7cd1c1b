"""`bt-adapter convert`: released checkpoints to models and adapters of this package, and back."""

import argparse
import json
from pathlib import Path

from ..adapters.writing import written_whole
from ._options import quiet_transformers


_EXAMPLES = """examples:
  bt-adapter convert btadapter_clip_l14.pth out --base openai/clip-vit-large-patch14
  bt-adapter convert btadapter_clip_l14.pth out --base openai/clip-vit-large-patch14 --to adapter --dtype float16
  bt-adapter convert btadapter_weight.bin out --base openai/clip-vit-large-patch14 --to adapter
  bt-adapter convert btadapter_clip_l14.pth --dry-run
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
        "source", metavar="SOURCE", help="checkpoint file; with --to original a model (folder or Hub id)"
    )
    parser.add_argument(
        "output", metavar="OUTPUT", nargs="?", help="folder; with --to original a .pth, .bin or .safetensors file"
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
        metavar="ID_OR_PATH",
        help="the image model that it was trained on; gives what the file does not hold",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the base, or of SOURCE with --to original")
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
    if args.to == "original":
        return _to_original(args, output)
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

            save_bt_adapter(model, folder, base_model_name_or_path=args.base, revision=args.revision)
        else:
            model.save_pretrained(folder)
    report = {
        "output": str(output),
        "model": plan.model_class.__name__,
        "tensors": len(plan.rows),
        "notes": plan.notes,
    }
    if args.to == "adapter":
        report["model"] = "adapter"
        report["tensors"] = len(_branch(plan.rows))
    if args.json:
        print(json.dumps(report))
    else:
        print(f"{report['model']} with {report['tensors']} tensors written to {output}")
        for note in plan.notes:
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
    return fields


def _to_original(args: argparse.Namespace, output: Path | None) -> int:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel

    from ..conversion import convert_to_original

    model = AutoModel.from_pretrained(args.source, revision=args.revision, dtype=args.dtype or "auto")
    state = {key: tensor.contiguous() for key, tensor in convert_to_original(model).items()}
    if args.dry_run:
        for key, tensor in state.items():
            print(f"{key}  {tuple(tensor.shape)}  {str(tensor.dtype).removeprefix('torch.')}")
        return 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(output) as path:
        if output.suffix == ".safetensors":
            save_file(state, path, metadata={"format": "pt"})
        else:  # the released loader looks for "state_dict" in .pth files, and in no others
            torch.save({"state_dict": state} if output.suffix == ".pth" else state, path)
    report = {"output": str(output), "model": "original", "tensors": len(state), "notes": []}
    print(json.dumps(report) if args.json else f"{len(state)} tensors written to {output} under the released names")
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
