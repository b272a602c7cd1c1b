"""The clips of a table in the packed forms that data sets come in, and a file server."""

import contextlib
import io
import json
import tarfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bt_adapter_hf.data.order import Chunk


def rows_of(folder: Path) -> list[tuple[str, bytes, str]]:
    """(name, bytes, text) of the rows of `folder/metadata.jsonl`."""
    records = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return [(record["file_name"], (folder / record["file_name"]).read_bytes(), record["text"]) for record in records]


def write_parquet(path: Path, rows: list[tuple[str, bytes, str]], group: int = 3, **columns) -> Path:
    """As `datasets` writes a `Video` column, with another column that nobody needs."""
    table = pa.table(
        {
            "unneeded": [b"x" * 100_000 for _ in rows],
            "video": [{"bytes": data, "path": name} for name, data, _ in rows],
            "text": [text for _, _, text in rows],
            **columns,
        }
    )
    pq.write_table(table, path, row_group_size=group)
    return path


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tar(path: Path, rows: list[tuple[str, bytes, str]], text: str = "txt") -> Path:
    """A WebDataset shard with the text in `.txt` members, or under a key of `.json` members."""
    with tarfile.open(path, "w") as tar:
        for number, (name, data, words) in enumerate(rows):
            key = f"./{path.stem}-{number:04d}"
            add_member(tar, f"{key}.{name.rpartition('.')[2]}", data)
            if text == "txt":
                add_member(tar, f"{key}.txt", words.encode())
            add_member(tar, f"{key}.json", json.dumps({"other": 1, text: words}).encode())
    return path


@contextmanager
def file_server(folder: Path):
    """Serve a folder; yields (address, paths asked for, answers to give instead: path -> list of codes).

    Below "/drip/" a file comes byte by byte, two a second.
    """
    log: list[str] = []
    failures: dict[str, list[int]] = {}

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            log.append(self.path)
            if failures.get(self.path):
                self.send_error(failures[self.path].pop(0))
            elif self.path.startswith("/drip/"):
                self.drip((folder / self.path.removeprefix("/drip/")).read_bytes())
            else:
                super().do_GET()

        def drip(self, content: bytes):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client has enough of it
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    if closing.wait(0.5):
                        return

        def log_message(self, *args):
            pass

    closing = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log, failures
    finally:
        closing.set()
        server.shutdown()
        server.server_close()


class GivenOrder:
    """Chunks of one shard each, in the order of a list, for a `ChunkStore`."""

    chunk_rows = 1

    def __init__(self, shards: list[int], rows: int):
        self.shards, self.rows = shards, rows

    def chunks(self, start: int):
        for number in range(start // self.rows, len(self.shards)):
            yield Chunk(0, number * self.rows, (number + 1) * self.rows, [self.shards[number]])


@contextmanager
def largest_size(folder: Path, pause: float = 0.002):
    """Watch a folder; the list that it yields ends with the largest number of bytes of shards in it."""
    seen, done = [0], threading.Event()

    def watch():
        while not done.is_set():
            total = 0
            for path in folder.glob("shard-*"):
                try:
                    total += path.stat().st_size
                except FileNotFoundError:
                    pass  # deleted or renamed meanwhile
            seen.append(max(seen.pop(), total))
            time.sleep(pause)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()
