"""A server on 127.0.0.1 that behaves as one is told to: well, or as servers do that break whoever trusts them.

Run as a program it serves a file until it is stopped: `python tests/hostile.py FILE BEHAVIOUR`.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TYPES = {"mp4": "video/mp4", "m4a": "audio/mp4", "webm": "video/webm", "mkv": "video/x-matroska", "mpd": "application/dash+xml"}


@dataclass
class Asked:
    """One request that came: its path, its Range header, and the bytes of body that were sent."""

    path: str
    range: str
    sent: int = 0


@dataclass
class Site:
    """The files served by name, and what was asked for. behaviour: how every request is answered but the first `polite`.

    Behaviours: `well`, `once-cut` (the first body breaks off), `cut` (every one does), `drip` (a byte every 0.2 s),
    `silent` (headers, then nothing), `too-long`, `too-short` (the Content-Length), `html`, `loop` (redirects to itself),
    `empty`, `endless` (chunked), `whole` (no ranges), `late`, `short` (a range that begins later, or ends sooner, than the one
    asked for), `grown`, `other` (with a range comes another size of the file, another ETag), `gzip`, a status as a number, or
    `away:URL`, a redirect to there.
    """

    files: dict[str, bytes]
    behaviour: str = "well"
    polite: int = 0
    asked: list[Asked] = field(default_factory=list)
    address: str = ""

    @property
    def sent(self) -> int:
        """Bytes of all bodies."""
        return sum(asked.sent for asked in self.asked)


@contextmanager
def served(files: dict[str, bytes], behaviour: str = "well", polite: int = 0) -> Iterator[Site]:
    """Serve these files (name: content) at `site.address`/name. polite: so many requests are answered well before."""
    site = Site(files, behaviour, polite)

    class Handler(_Handler):
        pass

    Handler.site = site
    with _Server(("127.0.0.1", 0), Handler) as server:
        site.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield site
        finally:
            server.shutdown()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up early is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        self.asked = Asked(self.path, self.headers.get("Range") or "")
        self.site.asked.append(self.asked)
        number = len(self.site.asked)
        behaviour = "well" if number <= self.site.polite else self.site.behaviour
        if behaviour == "once-cut":
            behaviour = "cut" if number == self.site.polite + 1 else "well"
        self._behave(behaviour)

    def _behave(self, behaviour: str) -> None:
        name = self.path.strip("/").partition("?")[0]
        body = self.site.files.get(name)
        if behaviour.isdigit():
            return self._answer(int(behaviour), b"")
        if behaviour.startswith("away:"):
            return self._answer(302, b"", {"Location": behaviour.removeprefix("away:")})
        if behaviour == "loop":
            return self._answer(302, b"", {"Location": f"{self.path}?again"})
        if behaviour == "html":
            return self._answer(200, b"<html><body>Please accept our cookies.</body></html>", {"Content-Type": "text/html"})
        if behaviour == "empty":
            return self._answer(200, b"", {"Content-Type": "video/mp4"})
        if body is None:
            return self._answer(404, b"")
        kind = {"Content-Type": TYPES.get(name.rpartition(".")[2], "application/octet-stream")}
        if behaviour == "endless":
            return self._endless(kind)
        first, last = 0, len(body) - 1
        found = re.match(r"bytes=(\d+)-(\d*)", self.asked.range) if behaviour != "whole" else None
        if found:
            first, last = int(found[1]), min(int(found[2] or last), last)
            if first >= len(body):
                return self._answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        if found and behaviour == "late":
            first += 7
        if found and behaviour == "short":
            last -= 7
        piece = body[first : last + 1]
        headers = kind | {"Content-Length": str(len(piece)), "ETag": '"one"'}
        if found:
            size = len(body) + (1000 if behaviour == "grown" else 0)
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        if behaviour == "other":
            headers["ETag"] = '"two"'
        if behaviour == "gzip":
            headers["Content-Encoding"] = "br"
        if behaviour == "too-long":
            headers["Content-Length"] = str(len(piece) + 1000)
        if behaviour == "too-short":
            headers["Content-Length"] = str(len(piece) // 2)
        if behaviour == "cut":
            piece = piece[: len(piece) // 2]
        self._head(206 if found else 200, headers)
        if behaviour == "silent":
            time.sleep(60)
        elif behaviour == "drip":
            for byte in piece:
                self._send(bytes([byte]))
                time.sleep(0.2)
        else:
            self._send(piece)
        self.close_connection = behaviour not in ("well", "whole")
        return None

    def _endless(self, headers: dict[str, str]) -> None:
        self._head(200, headers | {"Transfer-Encoding": "chunked"})
        while True:
            self._send(b"4000\r\n" + bytes(0x4000) + b"\r\n")

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(status, {"Content-Length": str(len(body))} | (headers or {}))
        self._send(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, body: bytes) -> None:
        if self.command == "GET":
            # a socket's buffers take megabytes that nobody ever reads: what counts is what was handed over
            for begin in range(0, len(body), 1 << 16):
                self.wfile.write(body[begin : begin + (1 << 16)])
                self.asked.sent += len(body[begin : begin + (1 << 16)])

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    path = Path(sys.argv[1])
    with served({path.name: path.read_bytes()}, *sys.argv[2:3]) as site:
        print(f"{site.address}/{path.name}", flush=True)
        threading.Event().wait()
