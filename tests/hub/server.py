"""A Hub on 127.0.0.1 that speaks the Hub's HTTP API to unmodified clients, with faults to switch on.

Three servers: the Hub itself, the storage that large files are fetched from and put to by signed URLs, and Xet's own
(see cas.py). They are three origins, so a client that sends its token beyond the Hub shows (`Hub.leaks`).
"""

import hashlib
import hmac
import re
import secrets
import socket
import struct
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from tests.hub.api import HUB_ROUTES, STORAGE_ROUTES, Answer, HubError, Request, as_error
from tests.hub.cas import CAS_ROUTES, XET_HUB_ROUTES, XET_STORAGE_ROUTES
from tests.hub.faults import ANSWERS, BODIES, Fault
from tests.hub.lfs import LFS_HUB_ROUTES, LFS_STORAGE_ROUTES
from tests.hub.repositories import Commit, File, Repository, is_large


# The account of the tests, and somebody else's. No other token is valid.
TOKEN, USER = "hf_LoopbackTokenOfTheTests0123456789", "tester"
OTHER_TOKEN, OTHER_USER = "hf_SomebodyElsesToken9876543210abcdef", "stranger"
ROUTES = {
    "hub": HUB_ROUTES + LFS_HUB_ROUTES + XET_HUB_ROUTES,
    "storage": STORAGE_ROUTES + LFS_STORAGE_ROUTES + XET_STORAGE_ROUTES,
    "cas": CAS_ROUTES,
}
PIECE = 1 << 16  # bytes sent at once


class Hub:
    """Both servers and what they keep. A context manager; `url` is what `HF_ENDPOINT` must be.

    Attributes:
        xet: whether large files are offered over Xet too; a client with hf_xet takes it then.
        log: the requests so far, oldest first.
        page_size: entries of a listing per page.
        part_size: large files are put in parts of so many bytes.
    """

    def __init__(self, page_size: int = 1000, part_size: int = 50_000_000, xet: bool = False):
        self.xet = xet
        self.xorbs: dict[str, list[bytes]] = {}  # chunks by the hash of the xorb
        self.xet_files: dict[str, str] = {}  # sha256 by Xet's hash, of what a client has put there
        self.names: dict[str, str] = {}  # a path for each sha256, to be seen in the log
        self.page_size, self.part_size = page_size, part_size
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.moved: dict[tuple[str, str], str] = {}
        self.storage: dict[str, bytes] = {}  # large files by sha256
        self.parts: dict[str, dict[int, bytes]] = {}
        self.users = {TOKEN: USER, OTHER_TOKEN: OTHER_USER}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self._lock = threading.RLock()
        self._key = secrets.token_bytes(16)
        self._closing = threading.Event()
        self._servers = {port: _Server(self, port) for port in ("hub", "storage", "cas")}
        # Storage has another name than the Hub, as in truth: clients tell by the name where a token may go.
        self.url, self.storage_url, self.cas_url = (
            f"http://{'127.0.0.1' if port == 'hub' else 'localhost'}:{server.server_port}"
            for port, server in self._servers.items()
        )

    def __enter__(self) -> "Hub":
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._closing.set()
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    # ------------------------------------------------------------------------------------------------ for the tests

    def create(
        self, repo_id: str, repo_type: str = "model", private: bool = False, gated: str | bool = False
    ) -> Repository:
        with self._lock:
            repository = Repository(repo_id, repo_type, private, gated)
            self.repositories[repo_type, repo_id] = repository
            return repository

    def put_files(
        self,
        repo_id: str,
        files: dict[str, bytes | str] | Path,
        repo_type: str = "model",
        revision: str = "main",
        message: str = "files",
    ) -> str:
        """Commits files, or the files of a folder, to a repository, made if needed. Returns the commit's id."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        with self._lock:
            repository = self.repositories.get((repo_type, repo_id)) or self.create(repo_id, repo_type)
            content = dict(repository.find(revision).files)
            for path, data in files.items():
                data = data.encode() if isinstance(data, str) else data
                content[path] = self.file(data, is_large(path, len(data), data[:512]))
            return repository.commit(repository.ref(revision), content, message, author=USER).oid

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        return {path: file.data for path, file in self._commit(repo_id, revision, repo_type).files.items()}

    def head(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> str:
        return self._commit(repo_id, revision, repo_type).oid

    def history(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """Commits, newest first."""
        return self.repositories[repo_type, repo_id].history(self._commit(repo_id, revision, repo_type))

    def fail(self, kind: str, path: str = "", **options: Any) -> Fault:
        """Switches on a fault for requests whose path matches; see `Fault` for the options."""
        fault = Fault(kind, path, **{**{**ANSWERS, **BODIES}[kind], **options})
        self.faults.append(fault)
        return fault

    def requests(self, path: str = "", method: str | None = None, port: str | None = None) -> list[Request]:
        """Lines of the log: those whose path matches, of one method, on one port."""
        return [
            request
            for request in list(self.log)
            if re.search(path, request.path) and method in (None, request.method) and port in (None, request.port)
        ]

    def sent(self, path: str = "") -> int:
        """Bytes of file contents sent for paths that match."""
        return sum(
            r.sent for r in self.requests(path, "GET") if r.status in (200, 206) and not r.path.startswith("/api/")
        )

    @property
    def leaks(self) -> list[Request]:
        """Requests beyond the Hub that carried a token of it; Xet has tokens of its own."""
        return [
            request
            for request in list(self.log)
            if (request.port == "storage" and request.authorized)
            or (request.port == "cas" and "hf_" in request.headers.get("authorization", ""))
        ]

    def xet_hash(self, file: File, path: str) -> str:
        """Of a large file: that of the client that put it here, or else its sha256, for clients do not check it."""
        self.names[file.sha256] = path
        return next((name for name, sha256 in self.xet_files.items() if sha256 == file.sha256), file.sha256)

    def _commit(self, repo_id: str, revision: str, repo_type: str) -> Commit:
        commit = self.repositories[repo_type, repo_id].find(revision)
        if commit is None:
            raise KeyError(f"{repo_id} has no revision {revision}")
        return commit

    def file(self, data: bytes, large: bool) -> File:
        file = File(data, large)
        if large:
            self.storage[file.sha256] = data
        return file

    # ------------------------------------------------------------------------------------------- answering requests

    def answer(self, request: Request) -> Answer | None:
        """The answer to a request, None to close the connection without one."""
        with self._lock:
            fault = self.take_fault(request, ANSWERS)
        if fault is not None and fault.kind == "hangs":
            self._closing.wait(fault.seconds)
        if fault is not None and fault.kind in ("refused", "hangs"):
            return None
        try:
            if fault is not None and fault.kind != "lost":
                raise as_error(fault)
            routes = ROUTES[request.port]
            for method, pattern, function in routes:
                match = pattern.fullmatch(request.path)
                if match and request.method in method.split("|"):
                    with self._lock:
                        answer = function(self, request, **match.groupdict())
                    return None if fault is not None else answer
            raise HubError(404, None, f"No such page: {request.method} {request.path}")
        except HubError as error:
            return error.answer

    def take_fault(self, request: Request, kinds: dict) -> Fault | None:
        for fault in self.faults:
            if fault.kind in kinds and fault.happens_to(request.method, unquote(request.path), request.port):
                fault.hits += 1
                request.fault = fault.kind
                return fault
        return None

    def signed(self, path: str) -> str:
        signature = hmac.new(self._key, path.encode(), hashlib.sha256).hexdigest()
        return f"{self.storage_url}{quote(path)}?{urlencode({'X-Amz-Signature': signature})}"

    def check_signature(self, request: Request) -> None:
        expected = hmac.new(self._key, request.path.encode(), hashlib.sha256).hexdigest()
        if request.query.get("X-Amz-Signature") != [expected]:
            raise HubError(403, None, "SignatureDoesNotMatch")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: Hub, port: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.port = hub, port

    def handle_error(self, request, client_address):
        """A client that went away is no error of the server; anything else is."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_):
        """The log is `Hub.log`."""

    def do(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        request = Request(
            port=self.server.port,
            method=self.command,
            path=url.path if self.server.port == "hub" else unquote(url.path),
            query=parse_qs(url.query, keep_blank_values=True),
            headers={name.lower(): value for name, value in self.headers.items()},
            body=self._read_body(),
            range=self.headers.get("Range"),
            authorized="Authorization" in self.headers,
        )
        answer = hub.answer(request)
        line = replace(request, path=unquote(request.path), body=b"")
        if answer is not None:
            line.status = answer.status
        hub.log.append(line)
        if answer is None:
            self._break(reset=False)
        else:
            self._send(line, answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _send(self, line: Request, answer: Answer) -> None:
        fault, body = answer.fault, answer.body
        if fault is not None and fault.kind == "slow":
            self.server.hub._closing.wait(fault.seconds)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = fault.place(len(body)) if fault is not None and fault.kind in ("cut", "reset", "stall") else None
        for start in range(0, len(body) if stop is None else stop, PIECE):
            piece = body[start : min(start + PIECE, len(body) if stop is None else stop)]
            line.sent += len(piece)  # before it is sent: who has received it may look at the log
            self.wfile.write(piece)
        if stop is None:
            return
        if fault.kind == "stall":
            self.server.hub._closing.wait(fault.seconds)
        self._break(reset=fault.kind == "reset")

    def _break(self, reset: bool) -> None:
        """Ends the connection, in order or not."""
        self.close_connection = True
        if reset:
            self.wfile.flush()
            time.sleep(0.05)  # what was sent should arrive first: a reset may overtake it
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        self.connection.shutdown(socket.SHUT_RDWR)
