"""A site's budget kept by a Prefect server, so that workers on many machines share it."""

from __future__ import annotations

import time
from contextlib import suppress

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
from prefect.concurrency.sync import rate_limit
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from cmacc.ingest import Pace
from cmacc.ingest.causes import HOUR_S


class Limits:
    """A global concurrency limit a site, `cmacc-HOST`, whose one slot comes free again at the site's rate."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.known: set[str] = set()

    def __call__(self, host: str, gap_s: float) -> float:
        name = f"cmacc-{host}"
        if host not in self.known:
            _ensure(name, self.pace.rate(host) / HOUR_S)
            self.known.add(host)
        rate_limit(name, strict=True)
        return time.time()


def _ensure(name: str, per_second: float) -> None:
    with get_client(sync_client=True) as client:
        try:
            there = client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):  # another worker was quicker
                client.create_global_concurrency_limit(
                    GlobalConcurrencyLimitCreate(name=name, limit=1, active=True, slot_decay_per_second=per_second)
                )
        else:
            if there.slot_decay_per_second != per_second:
                client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(slot_decay_per_second=per_second))
