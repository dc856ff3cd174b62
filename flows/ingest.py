"""The `ingest` flow: clip lists in, a data set out. Running it again continues it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from cmacc.flows.pack import Packer
from cmacc.flows.progress import progress, table, under_prefect
from cmacc.ingest import Cause, FetchOptions, IngestFailure, Ledger, Manifest, Outcome, SourceVideo, read_manifest, stop_all, work
from cmacc.ingest.manifest import Format
from cmacc.shards.dataset import Dataset
from cmacc.shards.profile import Profile, profile
from cmacc.shards.writer import DatasetWriter

log = logging.getLogger(__name__)

MOST_WORKERS = 64
VIDEOS_A_TASK = 32
"""A task is a group of source videos, some seconds of work at the least: Prefect spends up to 20 ms and 20 KB on each."""


@dataclass(frozen=True)
class HowTo:
    """How source videos are worked on. timeout_s: wall-clock seconds for one of them."""

    profile: Profile
    staging: Path
    options: FetchOptions
    timeout_s: float


class Worked(NamedTuple):
    """What became of a group's clips, and the failure that halts the whole run (a rate limit, a full disk), if one came."""

    outcomes: list[Outcome]
    halt: IngestFailure | None


@task(task_run_name="videos {first}", cache_policy=NO_CACHE)
def work_on(first: int, videos: Sequence[SourceVideo], how: HowTo) -> Worked:
    """Fetch and cut a group of source videos in a child process. first: number of the first of them, for the run's name."""
    outcomes: list[Outcome] = []
    try:
        for outcome in work(videos, profile=how.profile, staging=how.staging, options=how.options, timeout_s=how.timeout_s):
            outcomes.append(outcome)
    except IngestFailure as halt:
        return Worked(outcomes, halt)
    return Worked(outcomes, None)


@flow(name="ingest", log_prints=False)
def ingest(
    manifests: list[str],
    out: str,
    url_template: str | None = None,
    manifest_format: Format = "auto",
    label_column: str = "",
    profile_name: Literal["h264", "h264-dense", "mjpeg", "vp9"] = "h264",
    short_side: int | None = None,
    fps: int | None = None,
    gop: int | None = None,
    shard_mb: int = 256,
    workers: int = 2,
    retry: list[str] | None = None,
    cookies: str = "",
    proxy: str = "",
    pause_s: float = 0.0,
    timeout_s: float = 600.0,
) -> dict[str, Any]:
    """Download and transcode the clips of `manifests` into the data set `out`; returns the counts of its ledger.

    manifests: `PATH` or `SPLIT=PATH` each, any form that `cmacc.ingest.read_manifest` knows. url_template: address of a
    YouTube id, with `{id}` in it. label_column: of a table, if none is named label. short_side, fps, gop: changes to the
    profile. retry: causes whose failures are tried again. pause_s: seconds between downloads of one worker. timeout_s: for
    one source video. Raises ValueError, DatasetError or IngestFailure with one sentence when the whole job cannot go on.
    """
    if not 1 <= workers <= MOST_WORKERS:
        raise ValueError(f"workers is {workers}; give 1 to {MOST_WORKERS}")
    kind = profile(profile_name, short_side=short_side, fps=fps, gop=gop)
    causes = [_cause(name) for name in retry or ()]
    options = FetchOptions(cookies=cookies, proxy=proxy, pause_s=pause_s)
    lists = [_read(text, manifest_format, url_template, label_column) for text in manifests]
    home = Path(out)
    halted: IngestFailure | None = None
    with Ledger(home / "ingest" / "ledger.sqlite") as ledger:
        for manifest in lists:
            ledger.add(manifest)
        packer = Packer(ledger, home)
        # Names without folders: the same clips give the same bytes, wherever their lists lie.
        made_by = {
            "manifests": [Path(m.name).name for m in lists],
            "versions": {n: version(n) for n in ("cmacc", "av", "yt-dlp")},
        }
        with DatasetWriter(
            home, kind, shard_bytes=shard_mb << 20, provenance={"ingest": made_by}, on_commit=packer.committed
        ) as writer:
            packer.settle(writer.keys)
            videos = ledger.pending(causes)
            counts = ledger.counts()
            log.info("%s: %d rows, %d clips there, %d source videos to do", home, counts.rows, counts.done, len(videos))
            packer.pack(writer)
            # Every pending clip has one outcome; failures to be tried again are pending too by now.
            todo = sum(len(v.requests) for v in videos)
            working = _worked(videos, HowTo(kind, packer.staging, options, timeout_s), workers)
            with progress("ingest", total=todo) as tell, closing(working):
                done = failed = 0
                for outcomes, halt in working:
                    ledger.record(outcomes)
                    packer.pack(writer)
                    done, failed = done + len(outcomes), failed + sum(o.cause is not None for o in outcomes)
                    tell(done, f"{failed} failed")
                    if halt:
                        halted = halt
                        break
        counts = ledger.counts()
        summary = {"rows": counts.rows, "done": counts.done, "failed": counts.failed, "bad_rows": counts.bad_rows,
                   "pending": counts.pending, "causes": counts.causes}  # fmt: skip
    _report(summary)
    if halted:
        raise IngestFailure(
            halted.cause, f"{halted.detail}; {counts.done} clips are done and safe, the same command goes on later"
        )
    if not counts.done:
        raise ValueError(f"no clip of {', '.join(manifests)} could be had ({_in_words(counts.causes)}); nothing was written")
    log.info("%s: %d clips; %s", home, len(Dataset.open(home)), _in_words(counts.causes))
    return summary


def _worked(videos: Sequence[SourceVideo], how: HowTo, workers: int) -> Generator[Worked, None, None]:
    """Group by group, in the order of the manifests, so that shards do not depend on who is done first.

    Closing the generator, or an error in it, kills the children and drops the groups that wait.
    """
    size = max(1, min(VIDEOS_A_TASK, -(-len(videos) // (4 * workers))))
    groups = deque((i, videos[i : i + size]) for i in range(0, len(videos), size))
    waiting: deque[Any] = deque()
    pool: Any = ThreadPoolTaskRunner(max_workers=workers) if under_prefect() else ThreadPoolExecutor(workers)
    with pool:
        try:
            while groups or waiting:
                while groups and len(waiting) < 2 * workers:
                    job = dict(zip(("first", "videos", "how"), (*groups.popleft(), how), strict=True))
                    waiting.append(pool.submit(work_on, job) if under_prefect() else pool.submit(work_on.fn, **job))
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                getattr(future, "wrapped_future", future).cancel()
            stop_all()


def _read(text: str, manifest_format: Format, url_template: str | None, label_column: str) -> Manifest:
    """`SPLIT=PATH` or `PATH`; a `=` further right than the first `/` or `?` belongs to the path."""
    split, mark, path = text.partition("=")
    if not mark or not split.replace("-", "").replace("_", "").isalnum():
        split, path = "", text
    return read_manifest(path, format=manifest_format, url_template=url_template, split=split, label_column=label_column)


def _cause(name: str) -> Cause:
    try:
        return Cause(name)
    except ValueError:
        raise ValueError(f"there is no cause {name!r} to retry; use some of {', '.join(Cause)}") from None


def _in_words(causes: dict[str, int]) -> str:
    return ", ".join(f"{n} {cause}" for cause, n in sorted(causes.items(), key=lambda item: -item[1])) or "no failure"


def _report(summary: dict[str, Any]) -> None:
    rows = [
        *((state, summary[state]) for state in ("rows", "done", "pending", "bad_rows")),
        *((f"failed: {cause}", n) for cause, n in summary["causes"].items()),
    ]
    table("ingest-counts", [{"state": s, "clips": n} for s, n in rows])
