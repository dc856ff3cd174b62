"""How far a flow is: a bar on a terminal, a line now and then in a log, and Prefect's progress artifact."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from uuid import UUID

from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.context import FlowRunContext
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

_EVERY_S = 10.0


class Tell(Protocol):
    def __call__(self, done: int, note: str = "", total: int | None = None) -> None: ...


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Tell]:
    """Gives `tell(done, note, total)`. what: lower case and dashes, it names the artifact too. total, done: in the same unit."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    artifact = _artifact(what, total, done)
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal) as bar:
        row = bar.add_task(what, total=total, completed=done, note="")
        told = time.monotonic()

        def tell(done: int, note: str = "", total: int | None = total) -> None:
            nonlocal told
            bar.update(row, completed=done, note=note, total=total)
            if done < (total or 0) and time.monotonic() - told < _EVERY_S:
                return
            told = time.monotonic()
            if not console.is_terminal:
                log.info("%s: %d of %d  %s", what, done, total, note)
            if artifact is not None:
                # A server that is briefly away must not stop the work.
                with suppress(Exception):
                    update_progress_artifact(artifact, progress=100.0 * done / max(total or 0, 1))

        yield tell


def under_prefect() -> bool:
    """Whether a flow run is being tracked. The `cmacc` command calls the flows' plain functions when there is no server."""
    return FlowRunContext.get() is not None


def table(key: str, rows: list[dict[str, Any]]) -> None:
    """Prefect's table artifact, where there is a flow run to show it."""
    if under_prefect():
        create_table_artifact(key=key, table=rows)


def _artifact(what: str, total: int, done: int) -> UUID | None:
    if not under_prefect():
        return None
    with suppress(Exception):
        found = create_progress_artifact(progress=100.0 * done / max(total, 1), key=f"{what}-progress", description=what)
        return found if isinstance(found, UUID) else None
    return None
