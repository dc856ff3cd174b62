"""Why a clip could not be made: every failure has one named cause, and every cause its own rule for trying again."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

HOUR_S = 3600.0


class Retry(NamedTuple):
    """How often a failed clip is tried again by itself, and how many seconds after the last attempt at the earliest."""

    times: int
    after_s: float


class Cause(StrEnum):
    """The named causes, each with its rule.

    `retry`: when another attempt is made without being asked for. `parks`: the site has had enough, so nothing more is asked
    of it for a while. `stops`: no clip's fault, and going on makes it worse, so the run ends.
    """

    GONE = "gone"
    PRIVATE = "private"
    AGE_GATED = "age-gated"
    GEO_BLOCKED = "geo-blocked"
    LIVE = "live"
    FORBIDDEN = "forbidden"
    BOT_CHECK = "bot-check"
    RATE_LIMITED = "rate-limited"
    NETWORK = "network"
    EXTRACTOR = "extractor"
    NO_FORMAT = "no-format"
    NO_VIDEO = "no-video"
    NO_AUDIO = "no-audio"
    TOO_SHORT = "too-short"
    SILENT = "silent"
    STILL = "still"
    UNDECODABLE = "undecodable"
    ENCRYPTED = "encrypted"
    DESYNC = "desync"
    NEAR_DUPLICATE = "near-duplicate"
    TOO_LARGE = "too-large"
    OPTED_OUT = "opted-out"
    TIMEOUT = "timeout"
    CRASH = "crash"
    BAD_ROW = "bad-row"
    DISK_FULL = "disk-full"

    @property
    def retry(self) -> Retry:
        return _RETRY.get(self, Retry(0, 0.0))

    @property
    def parks(self) -> bool:
        return self in (Cause.BOT_CHECK, Cause.RATE_LIMITED)

    @property
    def stops(self) -> bool:
        return self is Cause.DISK_FULL


# what parks its site is due at once: the closed site holds it back
_RETRY = {
    Cause.LIVE: Retry(7, 24 * HOUR_S),
    Cause.FORBIDDEN: Retry(2, 6 * HOUR_S),
    Cause.BOT_CHECK: Retry(1000, 0.0),
    Cause.RATE_LIMITED: Retry(1000, 0.0),
    Cause.NETWORK: Retry(5, HOUR_S / 6),
    Cause.EXTRACTOR: Retry(2, HOUR_S),
    Cause.TIMEOUT: Retry(1, HOUR_S),
    Cause.CRASH: Retry(1, HOUR_S / 6),
    Cause.DISK_FULL: Retry(1000, 0.0),
}


class IngestFailure(Exception):
    """A clip or a source video that could not be had: its cause and one sentence of detail."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause = cause
        self.detail = detail

    def __reduce__(self) -> tuple[type[IngestFailure], tuple[Cause, str]]:
        """From one process to another: an exception is made again from its arguments."""
        return type(self), (self.cause, self.detail)


# yt-dlp knows most of these only as a sentence. First match wins: "Video unavailable. This video is private" is private.
_SAYS = tuple(
    (cause, re.compile(pattern, re.IGNORECASE))
    for cause, pattern in (
        (Cause.DISK_FULL, r"no space left on device|disk quota exceeded"),
        (Cause.BOT_CHECK, r"not a bot|captcha|unusual traffic"),
        (Cause.RATE_LIMITED, r"rate.?limit|too many requests|http error 429|isn.t available, try again later"),
        (Cause.AGE_GATED, r"confirm your age|age.?restricted|inappropriate for some users"),
        (Cause.GEO_BLOCKED, r"geo.?restrict|(in|from) your (country|location|region)"),
        (Cause.LIVE, r"live event will begin|premieres? in|live stream (recording )?is (not|offline)|not currently live"),
        (Cause.PRIVATE, r"private|members.only|join this channel|requires? payment|login required|log ?in to|sign in"),
        (Cause.GONE, r"http error (404|410)|unavailable|no longer available|removed|terminated|not exist|deleted|not found"),
        (Cause.FORBIDDEN, r"http error (401|403|407|451)|forbidden"),
        (Cause.NO_FORMAT, r"requested format is not available|no video formats|unsupported url|drm.protected|is not a valid url"),
        (
            Cause.NETWORK,
            r"http error 5\d\d|timed? ?out|refused|reset by peer|resolve|unreachable|ssl|remote end closed|bytes (read|expected)"
            r"|incomplete|connection|downloaded file is empty|did not get any data|content too short",
        ),
    )
)
_STATUS = {404: Cause.GONE, 410: Cause.GONE, 429: Cause.RATE_LIMITED, 451: Cause.GEO_BLOCKED}


def failure_from(error: BaseException) -> IngestFailure:
    """The failure behind any error of yt-dlp, the network or the operating system; `extractor` when nothing more is known."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, IngestFailure):
            return link
        if getattr(link, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return IngestFailure(Cause.DISK_FULL, "no space is left on the device")
    detail = _sentence(error)
    for link in reversed(chain):
        status = getattr(link, "status", None)
        if isinstance(status, int) and status >= 400:
            refused = Cause.NETWORK if status >= 500 or status == 408 else Cause.FORBIDDEN
            return IngestFailure(_STATUS.get(status, refused), detail)
        if type(link).__name__ == "GeoRestrictedError":
            return IngestFailure(Cause.GEO_BLOCKED, detail)
    for cause, pattern in _SAYS:
        if pattern.search(detail):
            return IngestFailure(cause, detail)
    if any(isinstance(link, OSError) for link in chain):
        return IngestFailure(Cause.NETWORK, detail)
    return IngestFailure(Cause.EXTRACTOR, detail)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and everything it wraps; yt-dlp keeps the true one in `exc_info` and in `cause`."""
    waiting: list[object] = [error]
    seen: set[int] = set()
    while waiting:
        link = waiting.pop(0)
        if not isinstance(link, BaseException) or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        info = getattr(link, "exc_info", None)
        waiting += [info[1] if isinstance(info, tuple) else None, getattr(link, "cause", None), link.__cause__, link.__context__]


def _sentence(error: BaseException) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error) or type(error).__name__)
    text = text.removeprefix("ERROR: ").split("; please report this issue")[0]
    return " ".join(text.split())[:300]
