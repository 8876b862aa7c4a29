"""An HTTP proxy before a store that, by a plan, answers wrongly, late, in part or not at all."""

from __future__ import annotations

import http.client
import random
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = Literal["slow down", "too many", "error", "drop", "lost", "cut", "hang"]
"""503, 429, 500; a connection closed before the request is passed on, after it, amid the answer; silence."""

Plan = Callable[[str, str, int], "Fault | None"]
"""What is wrong with a request, given its method, its path and how often it was made before."""

FAULTS: tuple[Fault, ...] = ("slow down", "too many", "error", "drop", "lost", "cut")
"""All that do not take time."""


def good(method: str, path: str, before: int) -> None:
    """Nothing is wrong."""


def always(fault: Fault) -> Plan:
    """The same with every request."""
    return lambda method, path, before: fault


def once(fault: Fault) -> Plan:
    """The same with every request, when it is made for the first time."""
    return lambda method, path, before: None if before else fault


def some(share: float, seed: int) -> Plan:
    """Something with a share of the requests, by chance, whatever their order."""

    def plan(method: str, path: str, before: int) -> Fault | None:
        chance = random.Random(f"{seed} {method} {path} {before}")
        return chance.choice(FAULTS) if chance.random() < share else None

    return plan


_ANSWERS = {
    "slow down": (503, "SlowDown"),
    "error": (500, "InternalError"),
    "too many": (429, "TooManyRequests"),
}
_ERROR = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{}</Code><Message>Try later</Message></Error>"


class Proxy(ThreadingHTTPServer):
    """The proxy, with a plan that can be changed and a count of what it did."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.plan: Plan = good
        self.done: Counter[str] = Counter()
        """Requests by fault, and `good` ones."""
        self.asked: Counter[tuple[str, str]] = Counter()
        self.over = threading.Event()
        self.guard = threading.Lock()

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.server_address[1]}"

    def before(self, uri: str) -> str:
        """The same place, asked for through the proxy."""
        return uri.replace(self.upstream, self.address)

    def fault(self, method: str, path: str) -> Fault | None:
        """What is to be wrong with a request."""
        with self.guard:
            same = method, re.sub("uploadId=[^&]*", "", path)
            found = self.plan(*same, self.asked[same])
            self.asked[same] += 1
            self.done[found or "good"] += 1
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.upstream = http.client.HTTPConnection(self.server.upstream)

    def finish(self) -> None:
        self.upstream.close()
        super().finish()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client gave up
            self.close_connection = True

    def _handle(self) -> None:
        content = self._content()
        fault = self.server.fault(self.command, self.path)
        if fault == "hang":
            self.server.over.wait(60)
        if fault in ("hang", "drop"):
            return self._drop()
        if fault in _ANSWERS:
            status, code = _ANSWERS[fault]
            return self._answer(status, {"Content-Type": "application/xml"}, _ERROR.format(code).encode())
        self.upstream.request(self.command, self.path, content, dict(self.headers))
        answer = self.upstream.getresponse()
        body = answer.read()
        if fault == "lost":
            return self._drop()
        self._answer(answer.status, dict(answer.getheaders()), body, cut=fault == "cut")
        return None

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _content(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        del self.headers["Transfer-Encoding"]
        return content

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
        dropped = {"transfer-encoding", "connection", "keep-alive", "content-length", "date", "server"}
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in dropped:
                self.send_header(name, value)
        size = headers.get("Content-Length", str(len(body))) if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", size)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._drop()

    def _drop(self) -> None:
        self.close_connection = True


@contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    """A proxy before a server, for the time of a block."""
    server = Proxy(upstream)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
