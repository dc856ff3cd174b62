"""Where an ingest stands: what is done, what failed and why, how fast it goes, when it will be through, what it costs."""

from __future__ import annotations

import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmacc.flows.plan import Plan
from cmacc.flows.progress import in_time
from cmacc.ingest import Ledger, Pace, Totals
from cmacc.ingest.causes import HOUR_S


@dataclass(frozen=True)
class Prices:
    """In any currency: of an hour of the machine, of a GB downloaded, of a GB stored for a month."""

    hour: float = 0.0
    gb_in: float = 0.0
    gb_month: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """seconds: until everything that is due now or later is done, None when nothing tells; limit: what holds it up."""

    seconds: float | None
    limit: str


def forecast(left: dict[str, tuple[int, int]], recent: Totals, pace: Pace) -> Forecast:
    """By the slower of two: the clips a second of late, and each site's budget of videos.

    left: host: (source videos, clips) to do. The budget alone tells before anything was measured.
    """
    clips = sum(n for _, n in left.values())
    if not clips:
        return Forecast(0.0, "")
    found = [(videos * pace.gap_s(host), f"{pace.rate(host):g} videos an hour from {host}") for host, (videos, _) in left.items()]
    if recent.done + recent.failed:
        found.append((clips * recent.seconds / (recent.done + recent.failed), "the speed of late"))
    seconds, limit = max(found)
    return Forecast(seconds, limit) if seconds else Forecast(None, "")


def status_rows(ledger: Ledger, pace: Pace, prices: Prices = Prices(), now: float | None = None) -> dict[str, str]:
    """What to show, line by line; the counts add up to the rows of the manifests."""
    now = time.time() if now is None else now
    counts, everything = ledger.counts(), ledger.totals(now=now)
    recent = ledger.totals(since=now - HOUR_S, now=now)
    left = ledger.left()
    due = sum(clips for _, clips in left.values()) - counts.pending
    rows = {"rows": f"{counts.rows:,}", "done": f"{counts.done:,}", "pending": f"{counts.pending:,}"}
    rows["failed"] = f"{counts.failed:,}" + (f", {due:,} of them will be tried again" if due else "")
    rows |= {f"  {cause}": f"{n:,}" for cause, n in counts.causes.items()}
    rows["bad rows"] = f"{counts.bad_rows:,}"
    rows["downloaded"] = _bytes(everything.fetched)
    rows["written"] = _bytes(everything.bytes)
    if recent.done + recent.failed:
        rows["clips/s"] = f"{(recent.done + recent.failed) / recent.seconds:.3g} in the last hour"
    for host, (until, cause, _) in ledger.closed_hosts(now).items():
        rows[f"closed: {host}"] = f"{cause}, until {time.strftime('%Y-%m-%d %H:%M', time.localtime(until))}"
    ahead = forecast(left, recent, pace)
    if ahead.seconds:
        rows["time left"] = f"{in_time(ahead.seconds)}, by {ahead.limit}"
    if everything.done and prices != Prices():
        rows["cost of 1,000 clips"] = _cost(everything, recent if recent.done else everything, prices)
    return rows


def status(data: str, ledger: str = "", prices: Prices = Prices(), rows: Path | None = None) -> dict[str, str]:
    """The lines for the ingest into the folder `data`. rows: a CSV file for every row of the ledger.

    Raises ValueError when nothing was ingested there.
    """
    home = Path(data)
    plan = Plan.load(home)
    with Ledger(ledger) if ledger else plan.open_ledger(home) as book:
        if rows:
            _write_rows(book, rows)
        return status_rows(book, plan.config.pace, prices)


def _write_rows(ledger: Ledger, path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer: Any = None
        for row in ledger.rows():
            if writer is None:
                writer = csv.DictWriter(file, row.keys())
                writer.writeheader()
            writer.writerow(row)
    part.replace(path)


def _cost(everything: Totals, recent: Totals, prices: Prices) -> str:
    machine = 1000 * recent.seconds / max(recent.done, 1) / HOUR_S * prices.hour
    traffic = 1000 * everything.fetched / everything.done / 1e9 * prices.gb_in
    storage = 1000 * everything.bytes / everything.done / 1e9 * prices.gb_month
    return f"{machine + traffic:.4g} once (machine {machine:.4g}, traffic {traffic:.4g}), {storage:.4g} a month of storage"


def _bytes(n: int) -> str:
    for size, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if n >= size:
            return f"{n / size:.2f} {name}"
    return f"{n / 1e3:.1f} kB"
