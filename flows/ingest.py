"""The `ingest` flow: clip lists in, a data set out. Running it again continues it."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from cmacc.flows.part import do_part
from cmacc.flows.parts import ingest_parts, merge_parts
from cmacc.flows.plan import Plan
from cmacc.flows.progress import progress, table
from cmacc.flows.status import status_rows
from cmacc.flows.tracked import tracked
from cmacc.flows.work_through import Hands
from cmacc.ingest import Cause, ClipRequest, Counts, IngestConfig, IngestFailure, Ledger, Manifest, read_manifest
from cmacc.ingest.captions import Captions
from cmacc.ingest.manifest import Format
from cmacc.ingest.optout import OptOut
from cmacc.shards.dataset import Dataset
from cmacc.shards.options import change
from cmacc.shards.profile import profile

log = logging.getLogger(__name__)

MOST_WORKERS = 64


@tracked("ingest")
def ingest(
    manifests: list[str],
    out: str,
    url_template: str | None = None,
    manifest_format: Format = "auto",
    label_column: str = "",
    captions: str = "",
    segment_s: float | None = None,
    profile_name: Literal["h264", "h264-dense", "mjpeg", "vp9"] = "h264",
    short_side: int | None = None,
    fps: int | None = None,
    gop: int | None = None,
    audio: Literal["flac", "opus"] | None = None,
    audio_rate: int | None = None,
    shard_mb: int = 256,
    workers: int = 2,
    retry: list[str] | None = None,
    videos_per_hour: float | None = None,
    when_parked: Literal["stop", "wait"] = "stop",
    cookies: str = "",
    proxy: str = "",
    opt_out: str = "",
    allow_private: bool = False,
    timeout_s: float = 600.0,
    ledger: str = "",
    parts: int = 1,
    dask: str = "",
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Download and transcode the clips of `manifests` into the data set `out`; returns the counts of its ledger.

    manifests: `PATH` or `SPLIT=PATH` each, any form that `cmacc.ingest.read_manifest` knows. url_template: address of a
    YouTube id, with `{id}` in it. label_column: of a table, if none is named label. captions: HowTo100M's JSON; segment_s:
    seconds of the clips that a captioned video is cut into. short_side, fps, gop, audio, audio_rate: changes to the profile.
    retry: causes whose failures are tried again now. videos_per_hour: of each site, by all workers together; left out, what
    YouTube lets a guest have. when_parked: stop when all that is left is at a site that has had enough, or wait for it.
    opt_out: a list of what is never taken. allow_private: addresses of this machine and of private networks too. timeout_s:
    for one source video. ledger: URL of a PostgreSQL database, the data set's own file by default. parts: so many flow runs on
    a work pool share the work, and wait for parked sites. dask: address of a Dask scheduler that does it. options: any other
    field of `IngestConfig` by dotted name.

    Raises ValueError, DatasetError or IngestFailure with one sentence when the whole job cannot go on.
    """
    if not 1 <= workers <= MOST_WORKERS:
        raise ValueError(f"workers is {workers}; give 1 to {MOST_WORKERS}")
    if "://" in out:
        said = f"{out} is not a local folder, which the ledger and the staged clips want"
        raise ValueError(f"{said}; ingest into one, then `cmacc reshard FOLDER --out {out}` copies it there")
    causes = [_cause(name) for name in retry or ()]
    kind = profile(
        profile_name,
        short_side=short_side,
        fps=fps,
        gop=gop,
        audio_codec=audio,
        audio_rate=48_000 if audio == "opus" else audio_rate,
    )
    config = change(
        IngestConfig(profile=kind, timeout_s=timeout_s),
        {
            "fetch.cookies": cookies,
            "fetch.proxy": proxy,
            # the template is the operator's own word, wherever it leads
            "fetch.allow_private": allow_private or bool(url_template),
            "pace.videos_per_hour": videos_per_hour,
            "pace.when_parked": "wait" if parts > 1 else when_parked,
            **(options or {}),
        },
    )
    if not config.fetch.max_bytes:
        # a download that is larger than its share of the room on the disk is ended before it fills it
        config = replace(config, fetch=replace(config.fetch, max_bytes=int(config.scratch_gb * 1e9 / workers)))
    spoken = Captions(Path(captions)) if captions else None
    lists = [_read(text, manifest_format, url_template, label_column, spoken, segment_s, allow_private) for text in manifests]
    home = Path(out)
    # Names without folders: the same clips give the same bytes, wherever their lists lie.
    made_by = {"manifests": [Path(m.name).name for m in lists], "versions": {n: version(n) for n in ("cmacc", "av", "yt-dlp")}}
    plan = Plan(config, Hands(workers, dask), ledger, shard_mb, made_by)
    with plan.open_ledger(home) as book:
        for manifest in lists:
            book.add(manifest)
        if opt_out:
            _leave_out(book, OptOut.read(Path(opt_out)))
        book.retry(causes)
        plan.save(home)
        merge_parts(home, plan, book, but_of=parts)
        clips, videos = book.count_todo()
        counts = book.counts()
        log.info("%s: %d rows, %d clips there, %d clips of %d source videos to do", home, counts.rows, counts.done, clips, videos)
        with progress("ingest", total=clips) as tell:
            stop = ingest_parts(home, plan, book, parts, tell) if parts > 1 else do_part(home, home, plan, book, tell)
        table("ingest-counts", [{"what": name, "is": text} for name, text in status_rows(book, config.pace).items()])
        counts, due = book.counts(), book.next_due()
    _conclude(home, manifests, counts, stop)
    if due is not None:
        log.info("some failures may mend themselves: the same command takes them up from %s on", time.ctime(due))
    return {"rows": counts.rows, "done": counts.done, "failed": counts.failed, "bad_rows": counts.bad_rows,
            "pending": counts.pending, "causes": counts.causes}  # fmt: skip


def _conclude(home: Path, manifests: list[str], counts: Counts, stop: IngestFailure | None) -> None:
    """Say what came of it. Raises what the flow raises."""
    if stop:
        hint = " (--when-parked wait does so by itself)" if stop.cause.parks else ""
        safe = f"{counts.done} clips are done and safe, the same command goes on later{hint}"
        raise IngestFailure(stop.cause, f"{stop.detail}; {safe}")
    if not counts.done:
        raise ValueError(f"no clip of {', '.join(manifests)} could be had ({in_words(counts.causes)}); nothing was written")
    log.info("%s: %d clips; %s", home, len(Dataset.open(home)), in_words(counts.causes))


def _read(
    text: str,
    manifest_format: Format,
    url_template: str | None,
    label_column: str,
    captions: Captions | None,
    segment_s: float | None,
    allow_private: bool,
) -> Manifest:
    """`SPLIT=PATH` or `PATH`; a `=` further right than the first `/` or `?` belongs to the path."""
    split, mark, path = text.partition("=")
    if not mark or not split.replace("-", "").replace("_", "").isalnum():
        split, path = "", text
    return read_manifest(
        path, format=manifest_format, url_template=url_template, split=split, label_column=label_column, captions=captions,
        segment_s=segment_s, allow_private=allow_private,
    )  # fmt: skip


def _leave_out(ledger: Ledger, opted: OptOut) -> None:
    """Fail what is on the list and not in a shard yet; say what is in one."""
    left_out, there = [], 0
    for row in ledger.rows():
        if row["key"] and opted.opted_out(_request(row)):
            there += bool(row["shard"])
            left_out += [] if row["shard"] else [str(row["key"])]
    ledger.refuse(left_out, Cause.OPTED_OUT, "on the opt-out list")
    if there:
        log.warning(
            "%d clips on the opt-out list are in shards already; `cmacc reshard --where` writes the data set without them", there
        )


def _request(row: dict[str, Any]) -> ClipRequest:
    return ClipRequest(row["row"], row["manifest"], row["source"], row["address"], row["start_s"], row["end_s"])


def _cause(name: str) -> Cause:
    try:
        return Cause(name)
    except ValueError:
        raise ValueError(f"there is no cause {name!r} to retry; use some of {', '.join(Cause)}") from None


def in_words(causes: dict[str, int]) -> str:
    """`3 gone, 1 network`, most frequent first."""
    return ", ".join(f"{n} {cause}" for cause, n in sorted(causes.items(), key=lambda item: -item[1])) or "no failure"
