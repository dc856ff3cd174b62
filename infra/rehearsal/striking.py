"""Kills at their moments, beside the work, and what they cost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from nodes import Gang
from schedule import Kill
from services import Services

_LOOK_S = 0.5


@dataclass(frozen=True)
class Struck:
    """A kill that was done. progress: clips or steps by then; processes: that were killed; at_s: since the phase began; away_s:
    until it was back (a server: until it answered again)."""

    kill: Kill
    progress: int
    processes: int
    at_s: float
    away_s: float


@contextmanager
def striking(
    services: Services, kills: Sequence[Kill], progress: Callable[[], int], struck: list[Struck], gang: Gang | None = None
) -> Iterator[None]:
    """Within the context the kills happen, one after the other, each once `progress` has come to its moment.

    Raises RuntimeError when the work was through before all had happened, or what had failed to come back.
    """
    ended, stopped, errors = threading.Event(), threading.Event(), list[BaseException]()
    began = time.monotonic()

    def strike(kill: Kill) -> None:
        while (now := progress()) < kill.at:
            if ended.wait(_LOOK_S):
                raise RuntimeError(f"the work was through before the {kill.what} was killed")
        at = time.monotonic()
        if gang and kill.host.startswith("node"):
            gang.power_off(kill.host)
        processes = services.processes.kill(services.hosts[kill.host])
        if stopped.wait(kill.away_s):
            return
        _back(services, kill.host, gang)
        struck.append(Struck(kill, now, processes, at - began, time.monotonic() - at))

    def strike_all() -> None:
        try:
            for kill in kills:
                strike(kill)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=strike_all, daemon=True, name="strikes")
    thread.start()
    try:
        yield
    except BaseException:
        stopped.set()
        raise
    finally:
        ended.set()
        thread.join()
    if errors:
        raise errors[0]


def _back(services: Services, host: str, gang: Gang | None) -> None:
    if host == "s3":
        services.start_s3()
    elif host == "prefect":
        services.start_prefect()
    elif host.startswith("worker"):
        services.start_worker(host)
    elif gang:
        gang.power_on(host)
