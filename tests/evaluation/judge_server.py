"""A chat completion server on loopback that can misbehave, for the tests of judges."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JudgeServer:
    """Answers each request with what `script` returns for (the last message's text, how often it was asked).

    The script returns the text of a reply, or a tuple (status, body bytes, seconds to wait before answering).
    """

    def __init__(self, script: Callable[[str, int], Any]):
        self.script, self.asked, self.bodies = script, [], []
        self._lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][-1]["content"]
                with judge._lock:
                    judge.asked.append(text)
                    judge.bodies.append(body)
                    times = judge.asked.count(text)
                answer = judge.script(text, times)
                if isinstance(answer, str):
                    reply = {"role": "assistant", "content": answer}
                    answer = 200, json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                                              "choices": [{"index": 0, "message": reply, "finish_reason": "stop"}]}
                                             ).encode(), 0  # fmt: skip
                status, content, pause = answer
                time.sleep(pause)
                with contextlib.suppress(ConnectionError):
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.send_header("retry-after-ms", "10")
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @contextlib.contextmanager
    def running(self) -> Iterator["JudgeServer"]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()
