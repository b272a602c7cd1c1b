"""Every fetch ends: at a wall-clock deadline, at a bound in bytes, and never anywhere but at http(s)."""

import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bt_adapter_hf.models.video_download import download
from bt_adapter_hf.models.video_errors import EmptyVideoError, VideoDownloadError, VideoTimeoutError


class _Handler(BaseHTTPRequestHandler):
    stop = threading.Event()

    def do_GET(self):
        kind = self.path.strip("/")
        if kind == "dripping_body":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self._drip()
        elif kind == "dripping_headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            self._drip()
        elif kind == "silent":
            self.stop.wait(20)
        elif kind in ("to_a_file", "to_ftp", "in_a_circle"):
            where = {"to_a_file": "file:///etc/passwd", "to_ftp": "ftp://127.0.0.1/x", "in_a_circle": "/in_a_circle"}
            self.send_response(302)
            self.send_header("Location", where[kind])
            self.end_headers()
        elif kind == "cut_in_a_chunk":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n5\r\nab")
            self.close_connection = True
        elif kind == "no_http":
            self.wfile.write(b"\0\1\2 this is no answer\r\n\r\n")
            self.close_connection = True
        elif kind == "endless":
            self.send_response(200)
            self.end_headers()
            self._drip(b"x" * 100_000, 0)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"" if kind == "empty" else b"abc")

    def _drip(self, piece=b"x", wait=0.1):
        try:
            while not self.stop.wait(wait):
                self.wfile.write(piece)
                self.wfile.flush()
        except OSError:
            pass  # the client has hung up

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as httpd:
        httpd.daemon_threads = True
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        _Handler.stop.set()
        httpd.shutdown()
        thread.join()


def fetched(url, **limits) -> bytes:
    content = io.BytesIO()
    download(url, content, **limits)
    return content.getvalue()


def test_the_content_arrives(server):
    before = threading.active_count()
    assert fetched(f"{server}/clip") == b"abc"
    assert threading.active_count() <= before + 2  # the server's own; no timer is left waiting


@pytest.mark.parametrize("kind", ["dripping_body", "dripping_headers", "silent"])
def test_a_slow_server_is_cut_off_at_the_deadline(server, kind):
    started = time.monotonic()
    with pytest.raises(VideoTimeoutError, match=f"{server}/{kind} took longer than 0.5 s"):
        fetched(f"{server}/{kind}", timeout=0.5)
    assert time.monotonic() - started < 5  # a byte every 0.1 s: the socket's own timeout never passes


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("to_a_file", VideoDownloadError, "file:///etc/passwd' is not allowed"),
        ("to_ftp", VideoDownloadError, "only http.s. is followed"),
        ("in_a_circle", VideoDownloadError, "infinite loop"),
        ("cut_in_a_chunk", VideoDownloadError, "IncompleteRead"),
        ("no_http", VideoDownloadError, "could not be downloaded"),
        ("empty", EmptyVideoError, "0 bytes"),
        ("endless", VideoDownloadError, "more than 1000000 bytes"),
    ],
)
def test_what_a_server_does_is_the_error_of_its_item(server, kind, error, message):
    with pytest.raises(error, match=message) as caught:
        fetched(f"{server}/{kind}", max_bytes=1_000_000, timeout=20)
    text = str(caught.value)
    assert text.startswith(f"{server}/{kind} ") and text.endswith(".") and not text.endswith("..") and "\n" not in text


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://a b/", "https://127.0.0.1:9/x"])
def test_malformed_addresses_and_absent_servers(url):
    with pytest.raises(VideoDownloadError, match="could not be downloaded"):
        fetched(url, timeout=5)
