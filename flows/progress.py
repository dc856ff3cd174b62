"""How far a flow is: a bar on a terminal, a line now and then in a log, and Prefect's progress artifact."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from uuid import UUID

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cmacc.flows.tracked import under_prefect

log = logging.getLogger(__name__)

_EVERY_S = 10.0


class Tell(Protocol):
    def __call__(self, done: int, note: str = "", total: int | None = None) -> None: ...


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Tell]:
    """Gives `tell(done, note, total)`. what: lower case and dashes, it names the artifact too. total, done: in the same unit."""
    console = Console(stderr=True)
    began, first = time.monotonic(), done
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    artifact = _artifact(what, total, done)
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal) as bar:
        row = bar.add_task(what, total=total, completed=done, note="")
        told, last = time.monotonic(), -1

        def tell(done: int, note: str = "", total: int | None = total) -> None:
            nonlocal told, last
            rate = (done - first) / max(time.monotonic() - began, 1e-3)
            speed = f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"
            bar.update(row, completed=done, note=f"{speed}  {note}", total=total)
            if (done < (total or 0) or done == last) and time.monotonic() - told < _EVERY_S:
                return
            told, last = time.monotonic(), done
            left = f", {in_time(((total or done) - done) / rate)} left" if rate and done < (total or 0) else ""
            line = f"{done} of {total}, {speed}{left}  {note}"
            if not console.is_terminal:
                log.info("%s: %s", what, line)
            if artifact is not None:
                # A server that is briefly away must not stop the work.
                with suppress(Exception):
                    from prefect.artifacts import update_progress_artifact

                    update_progress_artifact(artifact, progress=100.0 * done / max(total or 0, 1), description=line)

        yield tell


def in_time(seconds: float) -> str:
    """`3.0 min`, `5.2 h`, `278 days`."""
    for size, name in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            value = seconds / size
            return f"{value:.0f} {name}" if value >= 10 else f"{value:.1f} {name}"
    return f"{seconds:.0f} s"


def table(key: str, rows: list[dict[str, Any]]) -> None:
    """Prefect's table artifact, where there is a flow run to show it."""
    if under_prefect():
        from prefect.artifacts import create_table_artifact

        create_table_artifact(key=key, table=rows)


def _artifact(what: str, total: int, done: int) -> UUID | None:
    if not under_prefect():
        return None
    with suppress(Exception):
        from prefect.artifacts import create_progress_artifact

        found = create_progress_artifact(progress=100.0 * done / max(total, 1), key=f"{what}-progress", description=what)
        return found if isinstance(found, UUID) else None
    return None
