"""A remote file that is read like a local one: HTTP ranges of it are fetched when they are read, each once."""

from __future__ import annotations

import io
import re
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from cmacc.ingest.causes import Cause, IngestFailure, failure_from

if TYPE_CHECKING:
    from collections.abc import Mapping

    from yt_dlp import YoutubeDL

BLOCK = 256 << 10  # bytes; the unit of what is here and what is not
_MOST = 40  # blocks in one request: YouTube slows down whoever asks for more than 10 MiB at once
_PIECE = 64 << 10


class RangesRefused(Exception):
    """The server does not give this file in ranges, or not in ranges that can be trusted: it is to be had whole or not at all."""


class Meter:
    """Counts the bytes that one source video costs, and keeps them within its limits.

    rate_limit: bytes per second, 0 without limit. max_bytes: in all, 0 for any number.
    """

    def __init__(self, rate_limit: int = 0, max_bytes: int = 0) -> None:
        self.rate_limit, self.max_bytes = rate_limit, max_bytes
        self.bytes = 0
        self.due = 0.0

    def count(self, received: int) -> None:
        """Raises IngestFailure: too-large."""
        self.bytes += received
        self.allow(self.bytes)

    def allow(self, total: int) -> None:
        """Raises IngestFailure (too-large) when a source video costs so many bytes in all and may not."""
        if self.max_bytes and total > self.max_bytes:
            raise IngestFailure(Cause.TOO_LARGE, f"more than max_bytes ({self.max_bytes}) would have to be downloaded")

    def pace(self, received: int) -> None:
        """Wait until so many bytes more are within the rate."""
        if self.rate_limit:
            now = time.monotonic()
            self.due = max(self.due, now) + received / self.rate_limit
            time.sleep(self.due - now)


class RangedFile(io.RawIOBase):
    """The file at `url`, read-only and seekable. What was read, and some ahead of it, lies at the same place in `path`.

    Requests go through `ydl`, with its cookies and proxy and with `headers`; each is tried again `retries` times.
    size: bytes. Reading raises IngestFailure, from then on the same one. Opening raises RangesRefused too.
    """

    def __init__(self, ydl: YoutubeDL, url: str, headers: Mapping[str, str], path: Path, meter: Meter, retries: int) -> None:
        self.ydl, self.url, self.headers = ydl, url, {**headers, "Accept-Encoding": "identity"}
        self.meter, self.retries = meter, retries
        self.name = str(path)
        self.size = 0
        self.etag: str | None = None
        self.at = 0
        self.held = bytearray(1)  # of each block, whether it is here
        self.failure: IngestFailure | None = None
        self.file = path.open("w+b", buffering=0)
        try:
            self._pull(0, 1)
        except BaseException:
            self.close()
            path.unlink()  # else it would pass for a file that is here already
            raise

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence], 0)
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(self.size - self.at, 0)]
        if not len(view):
            return 0
        for block in range(self.at // BLOCK, (self.at + len(view) - 1) // BLOCK + 1):
            if not self.held[block]:
                self._need(block, self._ahead(block))
        self.file.seek(self.at)
        count = self.file.readinto(view)
        self.at += count
        return count

    def fill(self) -> None:
        """Fetch all that is not here yet: `path` is the whole file then."""
        while (block := self.held.find(0)) >= 0:
            self._need(block, _MOST)

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()

    def _ahead(self, block: int) -> int:
        """How many blocks to ask for: as many again as were read in a row up to here."""
        row = block - 1 - self.held.rfind(0, 0, block)
        return min(max(row, 1), _MOST)

    def _need(self, block: int, count: int) -> None:
        """Have this block and up to `count` in a row from it, but none again."""
        if self.failure is not None:
            raise self.failure
        end = self.held.find(1, block, block + count)
        try:
            self._pull(block, end if end > 0 else min(block + count, len(self.held)))
        except RangesRefused as refused:
            self.failure = IngestFailure(Cause.NETWORK, f"the file is no longer what it was: {refused}")
            raise self.failure from refused
        except IngestFailure as failure:
            self.failure = failure
            raise

    def _pull(self, block: int, end: int) -> None:
        def attempt() -> None:
            missing = self.held.find(0, block, end)  # an earlier attempt may have got some of the way
            if missing >= 0:
                self._request(missing * BLOCK, end * BLOCK)

        again = retry_if_exception(lambda error: isinstance(error, IngestFailure) and error.cause is Cause.NETWORK)
        wait, stop = wait_exponential(max=8), stop_after_attempt(self.retries + 1)
        Retrying(retry=again, wait=wait, stop=stop, reraise=True)(attempt)

    def _request(self, begin: int, end: int) -> None:
        """One request for the bytes from begin up to end or the end of the file, written where they belong."""
        from yt_dlp.networking import Request
        from yt_dlp.networking.exceptions import HTTPError

        end = min(end, self.size or end)
        headers = {**self.headers, "Range": f"bytes={begin}-{end - 1}"}
        try:
            with closing(self.ydl.urlopen(Request(self.url, headers=headers))) as response:
                self._receive(response, *self._place(response, begin, end))
        except (RangesRefused, IngestFailure):
            raise
        except Exception as error:
            if isinstance(error, HTTPError) and error.status == 416:
                raise RangesRefused("it has no such range") from error
            raise failure_from(error) from error

    def _place(self, response: Any, begin: int, end: int) -> tuple[int, int]:
        """Which bytes of the file (from, up to) the body is. Raises RangesRefused unless that is beyond doubt."""
        headers = response.headers
        length = headers.get("Content-Length")
        etag = headers.get("ETag")
        if headers.get("Content-Encoding", "identity") != "identity":
            raise RangesRefused("it comes compressed")
        if self.etag and etag and etag != self.etag:
            raise RangesRefused("its ETag changed")
        if response.status == 200 and self.size and length == str(self.size):
            return 0, self.size  # the server gives ranges no longer, but this is still the same file
        said = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", "").strip())
        if response.status != 206 or said is None:
            raise RangesRefused("it does not come in ranges")
        first, last, size = map(int, said.groups())
        if self.size and size != self.size:
            raise RangesRefused(f"it has {size} bytes instead of {self.size}")
        if first != begin or last + 1 != min(end, size) or length not in (None, str(last + 1 - first)):
            raise RangesRefused(f"asked for bytes {begin}-{end - 1} the server sends {said[0]} ({length} bytes)")
        if not self.size:
            self.size, self.etag = size, etag
            self.held = bytearray(-(-size // BLOCK))
            self.file.truncate(size)
        return first, last + 1

    def _receive(self, response: Any, begin: int, end: int) -> None:
        at = begin
        while at < end:
            piece = response.read(min(_PIECE, end - at))
            if not piece:
                raise IngestFailure(Cause.NETWORK, f"the connection ended {end - at} bytes too early")
            self.file.seek(at)
            self.file.write(piece)
            at += len(piece)
            here = len(self.held) if at == self.size else at // BLOCK
            self.held[begin // BLOCK : here] = b"\1" * (here - begin // BLOCK)
            self.meter.count(len(piece))
            self.meter.pace(len(piece))
