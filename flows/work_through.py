"""Everything a ledger has to do, done: groups of source videos to crews, outcomes to the ledger, clips to shards."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from cmacc.flows.pack import Packer
from cmacc.flows.progress import Tell
from cmacc.flows.tracked import under_prefect
from cmacc.ingest import Cause, Checks, Crew, Gate, IngestConfig, IngestFailure, Ledger, Outcome, Pace, SourceVideo
from cmacc.ingest.fingerprint import Near
from cmacc.ingest.gate import Turn
from cmacc.shards.writer import DatasetWriter

log = logging.getLogger(__name__)

_GROUP_S = 60.0
CLIPS_A_TASK = 64
VIDEOS_A_TASK = 32
"""A task is a group of source videos, some seconds of work at the least: Prefect spends up to 20 ms and 20 KB on each."""


@dataclass(frozen=True)
class Shop:
    """What a crew needs to open somewhere else: a value that can be sent there."""

    config: IngestConfig
    staging: Path
    ledger: Path | str

    @contextmanager
    def crew(self) -> Iterator[Crew]:
        with Ledger(self.ledger) as ledger:
            gate = Gate(ledger, self.config.pace, _turns(self.config.pace))
            with Crew(self.config, self.staging, gate) as crew:
                yield crew


class Worked(NamedTuple):
    """What became of a group's clips, and the failure that stops the whole run (a full disk), if one came."""

    outcomes: list[Outcome]
    stop: IngestFailure | None


def work_on(first: int, videos: Sequence[SourceVideo], shop: Shop | Crew) -> Worked:
    """Fetch and cut a group of source videos. first: number of the first of them, for the run's name."""
    if isinstance(shop, Shop):
        with shop.crew() as crew:
            return work_on(first, videos, crew)
    outcomes: list[Outcome] = []
    try:
        for outcome in shop.work(videos):
            outcomes.append(outcome)
    except IngestFailure as stop:
        return Worked(outcomes, stop)
    return Worked(outcomes, None)


@dataclass(frozen=True)
class Hands:
    """Who does the work: so many threads of this process, or of a Dask cluster at an address."""

    workers: int = 2
    dask: str = ""


def work_through(
    ledger: Ledger, packer: Packer, writer: DatasetWriter, config: IngestConfig, hands: Hands, tell: Tell
) -> IngestFailure | None:
    """Until nothing of the packer's part is due, or something stops the run: then that is returned.

    A site that has had enough is waited for, or ends the run when `config.pace.when_parked` is stop.
    """
    twins = Twins(ledger, config.checks)
    done = failed = 0
    while True:
        closed = ledger.closed_hosts()
        videos, (_, n_videos) = ledger.todo(packer.part, closed=closed), ledger.count_todo(packer.part)
        # few videos make small groups, so that every worker has some
        most = max(1, min(VIDEOS_A_TASK, -(-n_videos // (4 * hands.workers))))
        groups = _groups(videos, most, config.pace)
        shop, room = Shop(config, packer.staging, ledger.where), _Room(packer, writer, config)
        with closing(_worked(groups, shop, hands, room)) as working:
            for outcomes, stop in working:
                outcomes = twins.marked(outcomes)
                ledger.record(outcomes)
                packer.pack(writer)
                packer.drop({o.source for o in outcomes if o.cause is Cause.NEAR_DUPLICATE})
                done, failed = done + len(outcomes), failed + sum(o.cause is not None for o in outcomes)
                tell(done, f"{failed} failed")
                if stop:
                    return stop
        closed = ledger.closed_hosts()
        if next(ledger.todo(packer.part, closed=closed), None) is not None:
            continue  # a failure came due, or a site opened, in the meantime
        if not closed or not ledger.count_todo(packer.part)[0]:
            return None
        until, cause, detail = min(closed.values())
        if config.pace.when_parked == "stop":
            return IngestFailure(Cause(cause), detail)
        log.warning(
            "all that is left is at %s, closed (%s) for %.0f s more; waiting", ", ".join(closed), cause, until - time.time()
        )
        tell(done, f"{failed} failed, waiting for {', '.join(closed)} until {time.strftime('%H:%M', time.localtime(until))}")
        time.sleep(max(0.0, until - time.time()))


class Twins:
    """Near duplicates among all the clips of a ledger: marked, or failed, as the checks want it."""

    def __init__(self, ledger: Ledger, checks: Checks) -> None:
        self.use = checks.near_duplicate
        self.near = Near(checks.near_picture_bits, checks.near_sound_bits)
        if self.use != "off":
            for key, fingerprint in ledger.fingerprints():
                self.near.add(key, fingerprint)

    def marked(self, outcomes: Iterable[Outcome]) -> list[Outcome]:
        """The outcomes, each done one compared with every clip before it."""
        return [self._mark(o) if o.cause is None and o.fingerprint and self.use != "off" else o for o in outcomes]

    def _mark(self, outcome: Outcome) -> Outcome:
        found = self.near.nearest(outcome.fingerprint)
        if found is None or found[0] == outcome.key:
            self.near.add(outcome.key, outcome.fingerprint)
            return outcome
        if self.use == "filter":
            return replace(outcome, cause=Cause.NEAR_DUPLICATE, detail=f"nearly the same as {found[0]}", fingerprint="")
        self.near.add(outcome.key, outcome.fingerprint)
        return replace(outcome, duplicate_of=found[0])


class _Room:
    """Keeps what is downloaded and staged within its share of the disk."""

    def __init__(self, packer: Packer, writer: DatasetWriter, config: IngestConfig) -> None:
        self.packer, self.writer, self.bytes = packer, writer, config.scratch_gb * 1e9

    def left(self) -> bool:
        return _tree_bytes(self.packer.staging) < self.bytes

    def make(self) -> bool:
        """Put what is staged into a shard now, so that it need not lie there twice; False if that does not help."""
        self.packer.pack(self.writer)
        self.writer.cut()
        return self.left()


def _tree_bytes(folder: Path) -> int:
    """Blocks in use, for a file that is filled by ranges is larger than what it holds."""
    total = 0
    for inner, _, names in os.walk(folder):  # unlike rglob, it bears folders that vanish under it
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(inner, name).lstat().st_blocks * 512
    return total


def _worked(groups: Iterable[Sequence[SourceVideo]], shop: Shop, hands: Hands, room: _Room) -> Generator[Worked, None, None]:
    """Group by group, in the order of the manifests, so that shards do not depend on who is done first.

    Closing the generator, or an error in it, kills the children and drops the groups that wait.
    """
    waiting: deque[Any] = deque()
    with shop.crew() as crew, _pool(hands) as pool:
        tools: Shop | Crew = shop if hands.dask else crew
        try:
            for group in groups:
                while waiting and (len(waiting) >= 2 * hands.workers or not room.left()):
                    yield waiting.popleft().result()
                if not room.left() and not room.make():
                    raise IngestFailure(
                        Cause.DISK_FULL,
                        f"{shop.staging} holds more than scratch_gb allows ({room.bytes / 1e9:g} GB); give it more",
                    )
                job = {"first": group[0].number, "videos": group, "shop": tools}
                waiting.append(pool.submit(_task(), job) if under_prefect() else pool.submit(work_on, **job))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                getattr(future, "wrapped_future", future).cancel()
            if crew.gate:
                crew.gate.close()
            crew.stop()


def _groups(videos: Iterable[SourceVideo], most: int, pace: Pace) -> Iterator[list[SourceVideo]]:
    """Groups for tasks: at most so many videos, fewer where they have many clips.

    Where a site's budget sets the pace, a group is a minute's worth, so that one sees it go on.
    """
    group: list[SourceVideo] = []
    for video in videos:
        group.append(video)
        gap_s = pace.gap_s(group[0].host)
        full = min(most, max(1, round(_GROUP_S / gap_s))) if gap_s else most
        if len(group) >= full or sum(len(v.requests) for v in group) >= CLIPS_A_TASK:
            yield group
            group = []
    if group:
        yield group


def _pool(hands: Hands) -> Any:
    if hands.dask:
        from prefect_dask import DaskTaskRunner

        return DaskTaskRunner(address=hands.dask)
    if under_prefect():
        from prefect.task_runners import ThreadPoolTaskRunner

        return ThreadPoolTaskRunner(max_workers=hands.workers)
    return ThreadPoolExecutor(hands.workers)


def _task() -> Any:
    from prefect import task
    from prefect.cache_policies import NO_CACHE

    return task(task_run_name="videos {first}", cache_policy=NO_CACHE)(work_on)


def _turns(pace: Pace) -> Turn | None:
    """Who shares out a site's turns: the server that tracks this run, or None (the ledger) when there is none."""
    if not under_prefect():
        return None
    from cmacc.flows.limits import Limits

    return Limits(pace)
