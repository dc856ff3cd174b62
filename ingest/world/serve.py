"""A world over HTTP: a small threaded file server on 127.0.0.1 with byte ranges, in place of a video site."""

from __future__ import annotations

import mimetypes
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_CHUNK = 1 << 16


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and end (exclusive) that a Range header asks of `size` bytes; None for the whole file.

    Raises ValueError where nothing of the file is asked for. Several ranges, or another unit, count as no range (RFC 9110 14.2).
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(size - int(last), 0), size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= size:
        raise ValueError(f"range starts at byte {start} of {size}")
    return start, stop


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def _answer(self, body: bool) -> None:
        path = self._file()
        if path is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        size = path.stat().st_size
        try:
            span = byte_range(self.headers.get("Range"), size)
        except ValueError:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, stop = span or (0, size)
        self.send_response(HTTPStatus.PARTIAL_CONTENT if span else HTTPStatus.OK)
        self.send_header("Content-Type", mimetypes.guess_type(path.name)[0] or "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if span:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if body:
            with path.open("rb") as file:
                file.seek(start)
                while start < stop and (chunk := file.read(min(_CHUNK, stop - start))):
                    self.wfile.write(chunk)
                    start += len(chunk)

    def _file(self) -> Path | None:
        """The file asked for, links resolved, or None if it is not a file under the root."""
        try:
            path = (self.root / unquote(urlsplit(self.path).path).lstrip("/")).resolve()
        except (ValueError, OSError):
            return None
        return path if path.is_relative_to(self.root) and path.is_file() else None

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the caller counts what it fetches."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up early, as a downloader probing a file does, is no error worth a traceback."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serve(root: Path, port: int = 0) -> Iterator[str]:
    """Serve the files under `root` on 127.0.0.1 and yield the base URL; port 0 takes a free one."""

    class Handler(_Handler):
        pass

    Handler.root = Path(root).resolve()
    server = _Server(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
