"""Whether a source video may be fetched now: the site's budget, and a site that has had enough is left alone."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cmacc.ingest.causes import HOUR_S
from cmacc.ingest.outcome import Outcome, SourceVideo

if TYPE_CHECKING:
    from cmacc.ingest.ledger import Ledger

log = logging.getLogger(__name__)

GUEST_VIDEOS_PER_HOUR = 300.0
"""What YouTube lets a guest session have; beyond it the session is refused everything for about an hour."""
WEB_CLIENT_VIDEOS_PER_HOUR = 1000.0
"""What yt-dlp's wiki ("Extractors") says of a session that uses YouTube's web client alone, with a PO token."""

Turn = Callable[[str, float], float]
"""(host, seconds between two videos) to the Unix time of this one's turn."""


@dataclass(frozen=True)
class Pace:
    """How much is asked of one site, by all workers together.

    videos_per_hour: 0 without limit; left out, 300 for YouTube (a guest session's) and no limit elsewhere.
    jitter: each gap is longer by a random part, up to this share of it, so that requests keep no beat.
    park_s: how long a site that answered with a rate limit or a bot check is left alone. when_parked: `stop` the run when
    nothing else is left to do, or `wait` for it.
    """

    videos_per_hour: float | None = None
    jitter: float = 0.3
    park_s: float = HOUR_S
    when_parked: Literal["stop", "wait"] = "stop"

    def __post_init__(self) -> None:
        for name in ("videos_per_hour", "jitter", "park_s"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 or more")
        if self.when_parked not in ("wait", "stop"):
            raise ValueError(f"when_parked is {self.when_parked!r}; use wait or stop")

    def rate(self, host: str) -> float:
        """Videos an hour of this host; infinite without limit, and for local files."""
        if self.videos_per_hour is None:
            return GUEST_VIDEOS_PER_HOUR if host == "youtube.com" else float("inf")
        return self.videos_per_hour if host and self.videos_per_hour else float("inf")

    def gap_s(self, host: str) -> float:
        """Seconds from one video of this host to the next, on average."""
        return HOUR_S / self.rate(host)


class Gate:
    """One gate for all threads of a process; what it knows is in the ledger, so all processes on it share one budget.

    turn: who shares out the turns; the ledger, unless another keeps the budget.
    """

    def __init__(self, ledger: Ledger, pace: Pace, turn: Turn | None = None) -> None:
        self.ledger, self.pace = ledger, pace
        self.turn = turn or ledger.turn
        self.stopped = threading.Event()

    def admit(self, video: SourceVideo) -> bool:
        """Wait for the video's turn; False when its site is closed, or the gate has been: it stays to be done."""
        if not video.host:
            return not self.stopped.is_set()
        if video.host in self.ledger.closed_hosts():
            return False
        gap_s = self.pace.gap_s(video.host)
        if gap_s:
            # mean 1, so that the budget is kept
            shaken = gap_s * (1 + self.pace.jitter * (random.random() - 0.5))
            at = self.turn(video.host, shaken)
            if self.stopped.wait(max(0.0, at - time.time())):
                return False
            return video.host not in self.ledger.closed_hosts()
        return not self.stopped.is_set()

    def heed(self, video: SourceVideo, outcomes: Iterable[Outcome]) -> None:
        """Close the site if that is what its answer means."""
        for outcome in outcomes:
            if outcome.cause is not None and outcome.cause.parks:
                log.warning("%s says %s: nothing is asked of it for %.0f s", video.host, outcome.cause, self.pace.park_s)
                self.ledger.close_host(video.host, time.time() + self.pace.park_s, outcome.cause, outcome.detail)
                return

    def close(self) -> None:
        """Nobody waits any longer; nothing more is admitted."""
        self.stopped.set()
