"""The child process: works on source videos one after the other, so that a decoder's crash costs one of them, not the run.

`python -m cmacc.ingest.child` reads JSON lines on stdin, first the job, then a source video each, and writes JSON lines on
stdout: that it is ready, then the outcomes of each source video's clips, or a cause when going on makes no sense. Logs go to
stderr.
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

from av.error import FFmpegError

from cmacc.ingest.causes import Cause, IngestFailure, failure_from
from cmacc.ingest.config import IngestConfig
from cmacc.ingest.fetch import fetched
from cmacc.ingest.guard import guard_sockets, proxies
from cmacc.ingest.outcome import Outcome, SourceVideo
from cmacc.ingest.staging import StagedWriter, scratch_folder
from cmacc.ingest.transcode import transcode
from cmacc.shards.clip import Clip
from cmacc.shards.options import from_json

log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Work until stdin ends or the parent dies."""
    job = json.loads(sys.stdin.readline())
    die_with(job["parent"])
    # whatever prints, prints to the log: the pipe to the parent carries events alone
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**event: Any) -> None:
        print(json.dumps(event), file=events, flush=True)

    logging.basicConfig(stream=sys.stderr, level=job["log_level"], format="%(levelname)s\t%(message)s")
    config, staging = from_json(IngestConfig, job["config"]), Path(job["staging"])
    if not config.fetch.allow_private:
        guard_sockets(proxies(config.fetch.proxy))
    tell(ready=True)
    for line in sys.stdin:
        try:
            outcomes = ingest_video(SourceVideo.from_json(json.loads(line)), config, staging)
        except IngestFailure as failure:
            tell(cause=failure.cause, detail=failure.detail)
        else:
            tell(outcomes=[asdict(outcome) for outcome in outcomes])


def ingest_video(video: SourceVideo, config: IngestConfig, staging: Path) -> list[Outcome]:
    """Fetch one source video, cut its clips and stage them: one outcome for each, after the staged tar is in place.

    Raises IngestFailure for a cause that stops the run.
    """
    begun = time.monotonic()
    outcomes: list[Outcome] = []
    spans = [(request.start_s, request.end_s) for request in video.requests]
    media = None
    try:
        with scratch_folder(staging, video.source) as scratch, StagedWriter(staging, video.source, scratch) as staged:
            with fetched(video.address, spans, scratch, config.fetch) as media, _memory(config.limits.memory_mb):
                made = transcode(media, video.requests, config.profile, config.limits, scratch, config.checks)
                for request, clip in made:
                    if isinstance(clip, Clip):
                        size = staged.add(clip)
                        outcomes.append(Outcome(clip.key, video.source, bytes=size, fingerprint=clip.facts.fingerprint))
                    else:
                        outcomes.append(Outcome(request.key, video.source, clip.cause, clip.detail))
            staged.commit()
    except Exception as error:
        failure = error if isinstance(error, IngestFailure) else _unforeseen(error)
        if failure.cause.stops:
            raise IngestFailure(failure.cause, f"no room is left on the disk of {staging}; free some") from error
        outcomes = [Outcome(request.key, video.source, failure.cause, failure.detail) for request in video.requests]
    n = max(len(outcomes), 1)
    seconds, downloaded = round((time.monotonic() - begun) / n, 3), (media.bytes if media else 0) // n
    return [replace(outcome, seconds=seconds, fetched=downloaded) for outcome in outcomes]


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
    # what FFmpeg refuses is the file's doing, wherever it is met
    return IngestFailure(Cause.UNDECODABLE if isinstance(error, FFmpegError) else Cause.CRASH, f"{type(error).__name__}: {error}")


def die_with(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Be killed, or told by another signal, when the parent dies, however it dies; decoders say nothing of their own."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:
        raise SystemExit("the parent process is gone")
    import av

    av.logging.set_level(av.logging.PANIC)


if __name__ == "__main__":
    main()
