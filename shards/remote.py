"""Bytes from a store behind a network: many ranges at once, neighbours in one request, patience with what passes, and an end
to it: no attempt lasts longer than its time, whatever a server does."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar, cast

import tenacity
from fsspec.implementations.local import LocalFileSystem

log = logging.getLogger(__name__)

MERGE_GAP = 64 << 10  # bytes that nobody asked for cost less than another request
MERGED = 16 << 20  # bytes of a request, unless one span alone is longer
PATIENCE_S = 30.0  # that a store may take to answer, besides the time its bytes need on a slow line
_SLOWEST = 1 << 20  # bytes a second, of a line that is slow and yet to be waited for
_SMALL_FILE = 16 << 20  # bytes: more than a file has that is read whole, whose size nobody knows
_AT_ONCE = 128  # requests of one question; each store has its own limit of connections
_GRACE_S = 5.0  # for what is cancelled to close its connection
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


class Stalled(TimeoutError):
    """No answer in time. again: whether it may be asked again, which it may not where the request could not be cancelled."""

    def __init__(self, seconds: float, again: bool = True) -> None:
        super().__init__(f"its source stalled: no whole answer within {seconds:.3g} s")
        self.again = again


def limit_s(patience: float, size: int) -> float:
    """Seconds that `size` bytes may take to come."""
    return patience + size / _SLOWEST


def sizes(files: Any, of: Mapping[int, File], patience: float = PATIENCE_S) -> list[int | None]:
    """How long each file is, bytes; None where a store does not tell. Raises Unreadable, as `fetch` does."""
    found: dict[int, int | None] = {}

    def ask() -> None:
        left = [_Wanted(Span(n, 0, file.bytes), "size", file.path, {}, lambda s: s) for n, file in of.items() if n not in found]
        answers = _together(files, left, patience)
        found.update({w.about.file: a for w, a in zip(left, answers, strict=True) if not isinstance(a, BaseException)})
        _tell(left, answers)

    patiently(ask)
    return [found[n] for n in of]


def fetch(files: Any, of: Mapping[int, File], spans: Sequence[Span], patience: float = PATIENCE_S) -> list[bytes]:
    """Bytes of each span, asked for at once; what the network spoils is asked for again, and nothing else.

    files: an fsspec file system; of: the files by the numbers that the spans have; patience: seconds that an attempt may last,
    besides the time its bytes need at 1 MiB/s. Raises Unreadable from FileNotFoundError, from EOFError where a file is not as
    long as it should be, from Stalled, or from whatever the store says.
    """
    wanted = merge(spans)
    got: dict[int, bytes] = {}

    def ask() -> None:
        left = [i for i in range(len(wanted)) if i not in got]
        asked = [_range(of[wanted[i][0].file], wanted[i][0]) for i in left]
        answers = _together(files, asked, patience, sum(w.about.end - w.about.begin for w in asked))
        got.update({i: a for i, a in zip(left, answers, strict=True) if not isinstance(a, BaseException)})
        _tell(asked, answers)

    patiently(ask)
    found = [b""] * len(spans)
    for i, (span, covered) in enumerate(wanted):
        for at in covered:
            inner = spans[at]
            found[at] = got[i] if inner == span else got[i][inner.begin - span.begin : inner.end - span.begin]
    return found


def whole(files: Any, path: str, patience: float = PATIENCE_S) -> bytes:
    """All of a small file. Raises Stalled, or what the file system says."""
    if isinstance(files, LocalFileSystem):
        return bytes(files.cat_file(path))
    wanted = [_Wanted(Span(0, 0, 0), "cat_file", path, {}, bytes)]

    def ask() -> bytes:
        answers = _together(files, wanted, patience, _SMALL_FILE)
        _tell(wanted, answers)
        return cast("bytes", answers[0])

    try:
        return patiently(ask)
    except Unreadable as e:
        raise e.__cause__ or e from None


# --- inside: one attempt ---


class _Wanted(NamedTuple):
    """A call of a file system. about: what the call is for; path, options: its arguments; check: what is made of its answer."""

    about: Span
    method: str
    path: str
    options: dict[str, int]
    check: Callable[[Any], Any]


def _range(file: File, span: Span) -> _Wanted:
    def check(answer: bytes) -> bytes:
        if len(answer) == file.bytes != span.end - span.begin:
            answer = answer[span.begin : span.end]  # all of it: a web server that knows no ranges
        if len(answer) != span.end - span.begin:
            raise EOFError(f"{len(answer)} bytes came")
        return answer

    return _Wanted(span, "cat_file", file.path, {"start": span.begin, "end": span.end}, check)


def _together(files: Any, wanted: Sequence[_Wanted], patience: float, size: int = 0) -> list[Any]:
    """What each call brings, or an error that may pass. Raises Unreadable at once for an error that does not.

    size: bytes that come in all.
    """
    seconds = limit_s(patience, size)
    if not wanted:
        return []
    if files.async_impl:
        waiting = asyncio.run_coroutine_threadsafe(_cancellable(files, wanted, seconds), files.loop)
    else:
        waiting = _aside(files, wanted)
    try:
        answers = waiting.result(seconds + (2 * _GRACE_S if files.async_impl else 0))
    except TimeoutError:
        answers = [Stalled(seconds, again=files.async_impl)] * len(wanted)
    finally:
        waiting.cancel()
    for one, answer in zip(wanted, answers, strict=True):
        if isinstance(answer, Stalled):
            what = f"bytes {one.about.begin} to {one.about.end} of " if "start" in one.options else ""
            log.warning("%s%s did not come within %.3g s", what, files.unstrip_protocol(one.path), seconds)
    return answers


async def _cancellable(files: Any, wanted: Sequence[_Wanted], seconds: float) -> list[Any]:
    """In the loop of an asynchronous file system. What is late is cancelled, and its connection closed with it: fsspec's own
    way to wait for several calls would leave them running."""
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(want: _Wanted) -> Any:
        async with room:
            try:
                return want.check(await getattr(files, f"_{want.method}")(want.path, **want.options))
            except Exception as e:
                return _passing(want, e)

    tasks = [asyncio.ensure_future(one(want)) for want in wanted]
    late: set[asyncio.Task[Any]] = set(tasks)
    try:
        _, late = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in late:
            task.cancel()
    if late:
        await asyncio.wait(late, timeout=_GRACE_S)
    errors = [task.exception() for task in tasks if task.done() and not task.cancelled()]  # looked at, so that asyncio is silent
    for error in errors:
        if error:
            raise error
    return [Stalled(seconds) if task in late else task.result() for task in tasks]


def _aside(files: Any, wanted: Sequence[_Wanted]) -> Future[list[Any]]:
    """In a thread of its own, which is left behind if a file system that is not asynchronous does not come back."""
    found: Future[list[Any]] = Future()

    def one(want: _Wanted) -> Any:
        try:
            return want.check(getattr(files, want.method)(want.path, **want.options))
        except Exception as e:
            return _passing(want, e)

    def run() -> None:
        try:
            answers = [one(want) for want in wanted]
        except Exception as e:
            if found.set_running_or_notify_cancel():
                found.set_exception(e)
        else:
            if found.set_running_or_notify_cancel():
                found.set_result(answers)

    threading.Thread(target=run, name="read", daemon=True).start()
    return found


def _passing(want: _Wanted, error: Exception) -> Exception:
    """The error, or else Unreadable is raised from it."""
    if passes(error):
        return error
    if any(_status(e) == 416 for e in _chain(error)):
        raise Unreadable(want.about) from EOFError("it ends before them")
    raise Unreadable(want.about) from error


def _tell(wanted: Sequence[_Wanted], answers: Sequence[Any]) -> None:
    """Raise the first error among the answers, if there is one."""
    for want, answer in zip(wanted, answers, strict=True):
        if isinstance(answer, BaseException):
            raise Unreadable(want.about) from answer


def patiently(ask: Callable[[], _T]) -> _T:
    """What `ask` returns, asked again after a while, five times in all, as long as its error is one that passes."""
    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_ATTEMPTS), wait=_WAIT, retry=tenacity.retry_if_exception(passes), reraise=True,
        before_sleep=_say_again,
    )(ask)  # fmt: skip


def _say_again(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.info("asking again: %s", (error.__cause__ or error) if error else "")


def passes(error: BaseException) -> bool:
    """Whether an error is of the kind that another attempt may not meet: connections, time-outs, 5xx, throttling."""
    import aiohttp
    import botocore.exceptions as boto

    for e in _chain(error):
        status = _status(e)
        if status is not None:
            return status >= 500 or status in (408, 429)
        if isinstance(e, Stalled):
            return e.again
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
