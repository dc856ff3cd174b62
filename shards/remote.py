"""Bytes from a store behind a network: many ranges at once, neighbours in one request, and patience with what passes."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import tenacity

log = logging.getLogger(__name__)

MERGE_GAP = 64 << 10  # bytes that nobody asked for cost less than another request
MERGED = 16 << 20  # bytes of a request, unless one span alone is longer
_ATTEMPTS = 5
_WAIT = tenacity.wait_random_exponential(multiplier=0.3, max=10)  # seconds
_PASSING = {errno.EBUSY, errno.EAGAIN, errno.EIO, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, errno.ENETUNREACH}
_T = TypeVar("_T")


class File(NamedTuple):
    """A file of the store and its size, bytes."""

    path: str
    bytes: int


class Span(NamedTuple):
    """Bytes `begin` to `end` of a file, which has a number of the caller's own."""

    file: int
    begin: int
    end: int


class Unreadable(Exception):
    """A range that could not be read. span: which; the cause is what the store said last."""

    def __init__(self, span: Span) -> None:
        super().__init__(f"bytes {span.begin} to {span.end} of file {span.file}")
        self.span = span


def merge(spans: Sequence[Span]) -> list[tuple[Span, list[int]]]:
    """Spans that cover all of `spans`, near ones of a file as one; with each, the positions of those it covers."""
    found: list[tuple[Span, list[int]]] = []
    for at in sorted(range(len(spans)), key=lambda i: spans[i]):
        span = spans[at]
        if found:
            last, covered = found[-1]
            end = max(last.end, span.end)
            inside = span.end <= last.end
            if span.file == last.file and (inside or (span.begin - last.end <= MERGE_GAP and end - last.begin <= MERGED)):
                found[-1] = (last._replace(end=end), [*covered, at])
                continue
        found.append((span, [at]))
    return found


def sizes(files: Any, of: Mapping[int, File]) -> list[int | None]:
    """How long each file is, bytes; None where a store does not tell. Raises Unreadable, as `fetch` does."""
    try:
        found: list[int | None] = patiently(lambda: files.sizes([file.path for file in of.values()]))
        return found
    except Exception:  # each kind of bucket has errors of its own, and some do not say of which file
        for number, file in of.items():
            try:
                files.size(file.path)
            except Exception as e:
                raise Unreadable(Span(number, 0, file.bytes)) from e
        raise


def fetch(files: Any, of: Mapping[int, File], spans: Sequence[Span]) -> list[bytes]:
    """Bytes of each span, asked for at once; what the network spoils is asked for again.

    files: an fsspec file system; of: the files by the numbers that the spans have. Raises Unreadable from FileNotFoundError,
    from EOFError where a file is not as long as it should be, or from whatever the store says.
    """
    wanted = merge(spans)
    got: dict[int, bytes] = {}

    def ask() -> None:
        left = [i for i in range(len(wanted)) if i not in got]
        asked = [wanted[i][0] for i in left]
        answers = files.cat_ranges(
            [of[s.file].path for s in asked], [s.begin for s in asked], [s.end for s in asked], on_error="return"
        )
        failed = []
        for i, span, answer in zip(left, asked, answers, strict=True):
            if not isinstance(answer, BaseException) and len(answer) == of[span.file].bytes != span.end - span.begin:
                answer = answer[span.begin : span.end]  # all of it: a web server that knows no ranges
            if isinstance(answer, BaseException):
                failed.append((span, answer))
            elif len(answer) != span.end - span.begin:
                failed.append((span, EOFError(f"{len(answer)} bytes came")))
            else:
                got[i] = answer
        if failed:
            # what does not pass is told at once, whatever else might still come
            span, error = min(failed, key=lambda f: passes(f[1]))
            raise Unreadable(span) from error

    patiently(ask)
    found = [b""] * len(spans)
    for i, (span, covered) in enumerate(wanted):
        for at in covered:
            inner = spans[at]
            found[at] = got[i] if inner == span else got[i][inner.begin - span.begin : inner.end - span.begin]
    return found


def patiently(ask: Callable[[], _T]) -> _T:
    """What `ask` returns, asked again after a while, five times in all, as long as its error is one that passes."""
    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_ATTEMPTS), wait=_WAIT, retry=tenacity.retry_if_exception(passes), reraise=True,
        before_sleep=lambda state: log.info("asking again: %s", state.outcome and state.outcome.exception()),
    )(ask)  # fmt: skip


def passes(error: BaseException) -> bool:
    """Whether an error is of the kind that another attempt may not meet: connections, time-outs, 5xx, throttling."""
    import aiohttp
    import botocore.exceptions as boto

    for e in _chain(error):
        status = _status(e)
        if status is not None:
            return status >= 500 or status in (408, 429)
        if isinstance(e, (FileNotFoundError, PermissionError, NotImplementedError)):
            return False
        if isinstance(e, (ConnectionError, TimeoutError, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)):
            return True
        if isinstance(e, (boto.HTTPClientError, boto.IncompleteReadError)):
            return True
    return isinstance(error, OSError) and error.errno in _PASSING


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, the first one last: the store's own words say more than what was made of them."""
    causes = [error]
    while causes[-1].__cause__ is not None and len(causes) < 8:
        causes.append(causes[-1].__cause__)
    yield from reversed(causes)


def _status(error: BaseException) -> int | None:
    """The HTTP status of an answer, from an error of aiohttp, botocore or gcsfs."""
    import aiohttp

    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif isinstance(error, aiohttp.ClientResponseError):
        found = error.status
    else:
        found = getattr(error, "code", None) if type(error).__module__.startswith("gcsfs") else None
    return found if isinstance(found, int) and 100 <= found < 600 else None
