"""`bt-adapter demo`: the models in a browser."""

import argparse
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

from ._options import add_device_option, progress, quiet_transformers, real_number, whole_number


LOOPBACK = ("127.0.0.1", "::1", "localhost")


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="try the models in a browser: search, labels, chat, with and without the branch, a text over time",
        description="Serves a page on this machine: search in videos, labels beside those of the same clip played "
        "backwards, chat about several videos and images, answers with and without the branch, and how well a text "
        "fits a video over time. Offline, with the models inside the package, unless others are named. Only this "
        "machine can open it unless --host says otherwise; what visitors send is deleted.",
        epilog="examples:\n  bt-adapter demo\n  bt-adapter demo ~/videos --model my-adapter --port 8000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "videos",
        nargs="*",
        metavar="INDEX_OR_VIDEO",
        help="what is searched: one index of `bt-adapter index`, or folders and files, of which an index is made now "
        "(default: clips of moving digits)",
    )
    parser.add_argument("--model", metavar="ID_OR_PATH", help="dual encoder (default: moving-digits, in the package)")
    parser.add_argument(
        "--chat-model", metavar="ID_OR_PATH", help="chat model, as `bt-adapter chat --model` takes it (default: "
        "moving-digits, in the package)",
    )  # fmt: skip
    parser.add_argument("--bt-adapter", metavar="ID_OR_PATH", help="adapter for a native chat model")
    parser.add_argument("--host", default="127.0.0.1", metavar="NAME", help="address to serve (default: %(default)s)")
    parser.add_argument("--port", type=whole_number(0), default=7860, metavar="N", help="default: %(default)s; 0: any")
    parser.add_argument("--open", action="store_true", help="open the page in the browser of this machine")
    parser.add_argument(
        "--max-upload", type=whole_number(), default=64, metavar="MB", help="largest file (default: %(default)s)"
    )
    parser.add_argument(
        "--max-seconds",
        type=real_number(0, above=True),
        default=600.0,
        metavar="S",
        help="longest video (default: 600)",
    )
    parser.add_argument(
        "--max-files", type=whole_number(), default=4, metavar="N", help="files of one message (default: %(default)s)"
    )
    parser.add_argument(
        "--queue", type=whole_number(), default=16, metavar="N", help="visitors that may wait (default: %(default)s)"
    )
    add_device_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..import_utils import require_package

    require_package("gradio", "demo")
    require_package("lancedb", "demo")
    if not args.videos and args.model is None:
        require_package("sklearn", "quickstart")
    _check_port(args.host, args.port)
    quiet_transformers()
    from ..demo.page import serve, wait

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # ends as Ctrl-C does, and leaves nothing behind
    with tempfile.TemporaryDirectory(prefix="bt-adapter-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "uploads")  # gone with everything else at the end
        material = gather(args, Path(folder))
        with serve(material, args.host, args.port, queue=args.queue) as address:
            print(f"{address}  (Ctrl-C ends it)", flush=True)
            if args.host not in LOOPBACK:
                print("Everybody who reaches this address can use it.", file=sys.stderr)
            if args.open:
                import webbrowser

                if not webbrowser.open(address):
                    print("no browser could be opened: open the address yourself", file=sys.stderr)
            wait()
    return 0


def gather(args: argparse.Namespace, folder: Path):
    """The models, the index and the example clips of the page."""
    from ..demo.answers import Chat
    from ..demo.clips import Limits
    from ..demo.example_clips import example_texts, write_examples
    from ..demo.material import Material
    from ..search.encoding import VideoEncoder
    from ..search.index import VideoIndex
    from .chat import find_model

    asked = argparse.Namespace(
        model=args.chat_model, revision=None, bt_adapter=args.bt_adapter, files=[""], num_frames=None, num_clips=None,
        dtype="auto", device=args.device,
    )  # fmt: skip
    print("Loading the models and making the index; the address follows.", file=sys.stderr, flush=True)
    processor, load_chat = find_model(asked)
    encoder = VideoEncoder.from_pretrained(args.model, device=args.device)
    examples, film, texts = [], None, []
    if args.model is None:
        require_examples = not args.videos
        try:
            examples, film = write_examples(folder)
            texts = example_texts()
        except ImportError:  # of scikit-learn; one's own videos do without examples
            if require_examples:
                raise
    if len(args.videos) == 1 and _is_index(args.videos[0]):
        index = VideoIndex.load(args.videos[0])
        index.check_model(encoder)
    else:
        index = _make_index(args.videos or [str(folder / "clips")], folder / "index", encoder)
    limits = Limits(args.max_upload, args.max_seconds, args.max_files)
    return Material(encoder, index, Chat(load_chat(), processor), limits, examples=examples, film=film, texts=texts)


def _is_index(path: str) -> bool:
    from ..search.table import has_table

    return has_table(path) or (Path(path) / "index.json").is_file()  # of an older version: loading it says so


def _make_index(videos: list[str], folder: Path, encoder):
    from ..search.files import find_videos
    from ..search.index import VideoIndex
    from ..search.writer import IndexWriter

    with IndexWriter(folder, encoder) as writer:
        done = writer.update(find_videos(videos), progress=lambda found, total: progress(found, total, "index"))
    if done.skipped:
        first = "{path}: {reason}".format(**done.skipped[0])
        print(f"{len(done.skipped)} files could not be read, first: {first}", file=sys.stderr)
    return VideoIndex.load(folder)


def _check_port(host: str, port: int) -> None:
    """Before anything is loaded: another program may have the port, or the address be none of this machine."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"--host {host} --port {port} cannot be served ({reason}): choose another --port.") from error
