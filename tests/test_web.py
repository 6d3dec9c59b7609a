"""Pictures from the web: a server on this machine, and what goes wrong on the way."""

import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from vispec import web


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), colour).save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "/green.png")
            self.end_headers()
        elif self.path == "/green.png":
            self.answer(picture("green"))
        elif self.path == "/agent":
            self.answer(self.headers["User-Agent"].encode())
        elif self.path == "/text":
            self.answer(b"no picture")
        elif self.path == "/large":
            self.answer(bytes(10_000))
        elif self.path == "/short":
            self.answer(b"half", length=8)
        elif self.path == "/odd":
            self.wfile.write(b"SMTP 1.0\r\n\r\n")
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            self.server.stopped.wait(20)
        elif self.path == "/drop-by-drop":
            self.send_response(200)
            self.end_headers()
            while not self.server.stopped.wait(0.05):
                self.wfile.write(b".")
        else:
            self.send_error(404)

    def answer(self, content: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def server():
    """The address of a server that runs while the tests of a file do."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        running.daemon_threads, running.stopped = True, threading.Event()
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.stopped.set()
        running.shutdown()


def test_content_comes_whole_also_from_where_it_moved(server):
    assert web.fetch(f"{server}/green.png") == web.fetch(f"{server}/moved.png") == picture("green")
    assert web.fetch(f"{server}/agent").startswith(b"vispec/")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/gone.png", "HTTP Error 404: Not Found"),
        ("/large", "larger than 9,000 bytes"),
        ("/short", "broken off after 4 bytes"),
        ("/odd", "BadStatusLine: SMTP 1.0"),
        ("/a path", "InvalidURL"),
        ("/slow", "timed out"),
        ("/drop-by-drop", "not there after 0.5 seconds"),
    ],
)
def test_what_goes_wrong_is_an_error_of_the_system(server, path, message, monkeypatch):
    monkeypatch.setattr(web, "MOST_BYTES", 9000)
    monkeypatch.setattr(web, "SECONDS", 0.5)
    with pytest.raises(OSError, match=message):
        web.fetch(f"{server}{path}")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x.png", "http://[::1", "https://", "http://nowhere.invalid/x.png"])
def test_no_server(url, monkeypatch):
    monkeypatch.setattr(web, "SECONDS", 2.0)
    with pytest.raises(OSError):
        web.fetch(url)


def test_what_is_a_url():
    assert web.is_url("http://x/y.png") and web.is_url("HTTPS://x")
    assert not any(map(web.is_url, ("x.png", "http.png", "file:///x.png", "ftp://x/y.png", "/http://x")))
