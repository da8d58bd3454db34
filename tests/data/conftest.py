"""A web server on this machine that answers as it is told, and remembers what it was asked."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from data.sources import fetch


class Site:
    """pages: content by path, or by (path, offset). failures: (status, headers) to answer first, by path."""

    def __init__(self) -> None:
        self.pages: dict[Any, bytes] = {}
        self.failures: dict[str, list[tuple[int, dict[str, str]]]] = {}
        self.asked: list[tuple[str, dict[str, str], dict[str, str]]] = []
        self.counts: Counter[str] = Counter()
        self.address = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.asked.append((parts.path, query, dict(handler.headers)))
        self.counts[parts.path] += 1
        status, headers, body = 200, {}, b""
        if self.failures.get(parts.path):
            status, headers = self.failures[parts.path].pop(0)
        elif (
            content := self.pages.get((parts.path, query.get("offset")), self.pages.get(parts.path))
        ) is None:
            status = 404
        else:
            body = content
        if status == 0:  # the connection is cut
            handler.connection.close()
            return
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)


@pytest.fixture
def site() -> Iterator[Site]:
    found = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting takes no time; the seconds asked for."""
    seconds: list[float] = []
    initialize = fetch.Fetcher.__init__

    def patched(self: Any, *arguments: Any, **settings: Any) -> None:
        initialize(self, *arguments, **settings)
        self.sleep = seconds.append

    monkeypatch.setattr(fetch.Fetcher, "__init__", patched)
    return seconds
