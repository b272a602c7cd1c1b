"""`bt-adapter push`: publish a model, an adapter or a processor on the Hub."""

import argparse
import json
import os

from ._options import path, quiet_transformers


_EXAMPLES = """examples:
  bt-adapter push my-adapter me/bt-adapter-clip-l14 --dry-run
  bt-adapter push my-adapter me/bt-adapter-clip-l14 --license apache-2.0
  bt-adapter push my-adapter me/bt-adapter-clip-l14 --revision experiment --message "Half the learning rate"
  bt-adapter push my-adapter org/bt-adapter-clip-l14 --pr --include LICENSE --include "images/*.png"

Log in with `hf auth login` first, or set HF_TOKEN."""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "push",
        help="publish a model, an adapter or a processor on the Hub, with its card",
        description="Publish a folder with a model, an adapter (also with LoRA) or a processor: in one commit, with a "
        "model card filled from the folder. Files with the names of what a saved model, adapter, processor or run is "
        "made of are published, no others; what was left out is listed. A README.md of your own is kept.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", type=path, metavar="FOLDER", help="such as the output folder of `bt-adapter pretrain`"
    )
    parser.add_argument("repo_id", type=path, metavar="REPO_ID", help="NAMESPACE/NAME; created if needed")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--revision", metavar="BRANCH", help="branch to commit to, created if needed (default: main)")
    target.add_argument("--pr", action="store_true", help="open a pull request")
    parser.add_argument("--private", action="store_true", default=None, help="if the repository is created")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--license", metavar="NAME", help="of the weights, for the card, such as apache-2.0")
    parser.add_argument("--language", metavar="CODE", help="of the texts, for the card, such as en")
    parser.add_argument(
        "--without-code",
        action="store_true",
        help="leave out the code that loads the model where this package is not installed (trust_remote_code=True)",
    )
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="FILE",
        help="publish this file of the folder too, or what a pattern matches; may be repeated",
    )
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="RESULT",
        help="results of `bt-adapter eval`, files or folders, whose scores go into the card",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the files, list those that would be published and those left out, and ask the Hub for nothing",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not os.path.isdir(args.folder):
        found = "is a file" if os.path.isfile(args.folder) else "does not exist"
        raise ValueError(f"'{args.folder}' {found}; expected the folder of a model, an adapter or a processor.")
    quiet_transformers()
    import dataclasses

    from ..adapters.writing import printable
    from ..hub.push import push_to_hub

    pushed = push_to_hub(
        args.folder,
        args.repo_id,
        revision=args.revision,
        create_pr=args.pr,
        private=args.private,
        commit_message=args.message,
        with_code=not args.without_code,
        card={"license": args.license, "language": args.language},
        include=args.include,
        results=args.results,
        dry_run=args.dry_run,
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(pushed)))
        return 0
    if args.dry_run:
        print(f"{len(pushed.files)} files would be published as {printable(args.repo_id)}:")
        print("\n".join(f"  {printable(name)}" for name in pushed.files))
    else:
        print(f"{len(pushed.files)} files published: {pushed.url}")
    if pushed.left_out:
        print(f"left out: {', '.join(map(printable, pushed.left_out))} (--include publishes what you name)")
    return 0
