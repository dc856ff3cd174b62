"""The child process: works on source videos one after the other, so that a decoder's crash costs one of them, not the run.

`python -m cmacc.ingest.child` reads one JSON job on stdin and writes JSON lines on stdout: `begin` and `end` of each source
video with the outcomes of its clips, or `halt` when going on makes no sense. Logs go to stderr.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cmacc.ingest.causes import Cause, IngestFailure, failure_from
from cmacc.ingest.cut import Limits
from cmacc.ingest.fetch import FetchOptions, fetch
from cmacc.ingest.outcome import Outcome, SourceVideo
from cmacc.ingest.staging import StagedWriter, scratch_folder
from cmacc.ingest.transcode import transcode
from cmacc.shards.clip import Clip
from cmacc.shards.profile import Profile

log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1


def main() -> None:
    job = json.load(sys.stdin)
    _die_with(job["parent"])
    # whatever prints, prints to the log: the pipe to the parent carries events alone
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**event: Any) -> None:
        print(json.dumps(event), file=events, flush=True)

    logging.basicConfig(stream=sys.stderr, level=job["log_level"], format="%(levelname)s\t%(message)s")
    profile = Profile.from_json(job["profile"])
    options, limits = FetchOptions(**job["options"]), Limits(**job["limits"])
    staging = Path(job["staging"])
    for data in job["videos"]:
        video = SourceVideo.from_json(data)
        tell(event="begin", source=video.source)
        try:
            outcomes = list(ingest_video(video, profile, staging, options, limits))
        except IngestFailure as failure:
            tell(event="halt", source=video.source, cause=failure.cause, detail=failure.detail)
            return
        tell(event="end", source=video.source, outcomes=[asdict(outcome) for outcome in outcomes])


def ingest_video(video: SourceVideo, profile: Profile, staging: Path, options: FetchOptions, limits: Limits) -> Iterator[Outcome]:
    """Fetch one source video, cut its clips and stage them: one outcome for each, after the staged tar is in place.

    Raises IngestFailure for a cause that halts.
    """
    begun = time.monotonic()
    outcomes: list[Outcome] = []
    try:
        with scratch_folder(staging, video.source) as scratch, StagedWriter(staging, video.source, scratch) as staged:
            path = fetch(video.address, scratch, options)
            with _memory(limits.memory_mb):
                for request, made in transcode(path, video.requests, profile, limits, scratch):
                    if isinstance(made, Clip):
                        outcomes.append(Outcome(made.key, video.source, bytes=staged.add(made)))
                    else:
                        outcomes.append(Outcome(request.key, video.source, made.cause, made.detail))
            staged.commit()
    except Exception as error:
        failure = error if isinstance(error, IngestFailure) else _unforeseen(error)
        if failure.cause.stops:
            raise failure from error
        outcomes = [Outcome(request.key, video.source, failure.cause, failure.detail) for request in video.requests]
    share = (time.monotonic() - begun) / max(len(outcomes), 1)
    yield from (replace(outcome, seconds=round(share, 3)) for outcome in outcomes)


@contextmanager
def _memory(megabytes: int) -> Iterator[None]:
    """Beyond this much memory, allocation fails. Not while fetching: a JavaScript runtime reserves far more than it uses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = megabytes << 20
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _unforeseen(error: Exception) -> IngestFailure:
    """A full disk, or an error of ours that no cause foresees: the trace goes to the log, the run goes on."""
    if isinstance(error, OSError) and (failure := failure_from(error)).cause is Cause.DISK_FULL:
        return failure
    if isinstance(error, MemoryError):
        return IngestFailure(Cause.UNDECODABLE, "it needs more memory than memory_mb allows")
    log.error("unforeseen error", exc_info=error)
    return IngestFailure(Cause.CRASH, f"{type(error).__name__}: {error}")


def _die_with(parent: int) -> None:
    """Be killed when the parent dies, however it dies; decoders say nothing of their own."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the parent process is gone")
    import av

    av.logging.set_level(av.logging.PANIC)


if __name__ == "__main__":
    main()
