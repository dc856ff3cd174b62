"""Work on groups of source videos in a child process, with a limit of time for each and a cause for whatever happens."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cmacc.ingest.causes import Cause, IngestFailure
from cmacc.ingest.cut import Limits
from cmacc.ingest.fetch import FetchOptions
from cmacc.ingest.outcome import Outcome, SourceVideo
from cmacc.ingest.staging import clear_scratch, staged_keys, staged_path
from cmacc.shards.profile import Profile

log = logging.getLogger(__name__)
_START_S = 120.0  # a child that has not begun by then never will
_running: set[int] = set()
_guard = threading.Lock()


def work(
    videos: Sequence[SourceVideo],
    *,
    profile: Profile,
    staging: Path,
    options: FetchOptions | None = None,
    limits: Limits | None = None,
    timeout_s: float = 600.0,
) -> Iterator[Outcome]:
    """Fetch and cut `videos` one after the other; one outcome for every clip asked for, video by video.

    Done clips lie in `staging/<source>.tar` (see `read_staged`); what lies there already is not made again.
    timeout_s: wall-clock seconds for one source video. Raises IngestFailure for a cause that halts: the clips without an
    outcome stay to be done. Closing the generator kills the child.
    """
    staging.mkdir(parents=True, exist_ok=True)
    waiting = []
    for video in videos:
        staged = staged_keys(staged_path(staging, video.source))
        yield from (Outcome(r.key, video.source, detail="staged before") for r in video.requests if r.key in staged)
        missing = tuple(r for r in video.requests if r.key not in staged)
        if missing:
            waiting.append(replace(video, requests=missing))
    job = {
        "parent": os.getpid(),
        "profile": profile.to_json(),
        "staging": str(staging),
        "options": asdict(options or FetchOptions()),
        "limits": asdict(limits or Limits()),
        "log_level": logging.getLogger("cmacc").getEffectiveLevel(),
    }
    while waiting:
        done = 0
        for outcomes in _one_child({**job, "videos": [v.to_json() for v in waiting]}, waiting, timeout_s):
            done += 1
            yield from outcomes
        waiting = waiting[done:]


def stop_all() -> None:
    """Kill every child of this process, with all that it started: for a flow that is being cancelled."""
    with _guard:
        for pid in _running:
            _kill(pid)


def _one_child(job: dict[str, Any], videos: Sequence[SourceVideo], timeout_s: float) -> Iterator[list[Outcome]]:
    """Outcomes, video by video, until the child is through, dies or has to be killed; the video it dies in is the last."""
    with _Child(job) as child:
        for number, video in enumerate(videos):  # noqa: B007 (the video it dies in is needed below)
            if child.event(_START_S) is None:
                if number == 0:
                    raise RuntimeError(f"the ingest child does not start ({child.ending()}); its messages are in the log")
                return
            try:
                event = child.event(timeout_s)
            except TimeoutError:
                failure = IngestFailure(Cause.TIMEOUT, f"not done after {timeout_s:g} s")
                break
            if event is None:
                failure = IngestFailure(Cause.CRASH, f"the process that worked on it died ({child.ending()})")
                break
            if event["event"] == "halt":
                failure = IngestFailure(Cause(event["cause"]), event["detail"])
                break
            yield [Outcome(**{**o, "cause": o["cause"] and Cause(o["cause"])}) for o in event["outcomes"]]
        else:
            return
    clear_scratch(Path(job["staging"]), video.source)
    log.warning("%s: %s", video.source, failure)
    if failure.cause is not Cause.DISK_FULL:  # which is no clip's fault
        yield [Outcome(request.key, video.source, failure.cause, failure.detail) for request in video.requests]
    if failure.cause.stops:
        raise failure


class _Child:
    """One child process in a session of its own, killed with everything it started when the context ends."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cmacc.ingest.child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        with _guard:
            _running.add(self.process.pid)
        self.selector = selectors.DefaultSelector()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            self.selector.register(pipe, selectors.EVENT_READ, bytearray())
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:
            pipe.write(json.dumps(job).encode())

    def event(self, limit_s: float) -> dict[str, Any] | None:
        """The next event it tells, None when it is through. Raises TimeoutError when none comes within limit_s seconds."""
        deadline = time.monotonic() + limit_s
        while True:
            for key in list(self.selector.get_map().values()):
                line, found, rest = key.data.partition(b"\n")
                if found:
                    key.data[:] = rest
                    if key.fileobj is self.process.stdout:
                        event: dict[str, Any] = json.loads(line)
                        return event
                    _relay(line.decode(errors="replace"))
                    break
            else:
                if not self._read(deadline):
                    return None

    def _read(self, deadline: float) -> bool:
        """Take in what its pipes hold; False when both have ended."""
        while self.selector.get_map():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            for key, _ in self.selector.select(left_s):
                data = os.read(key.fd, 1 << 16)
                if not data:
                    self.selector.unregister(key.fileobj)
                    continue
                key.data.extend(data)
                return True
        return False

    def ending(self) -> str:
        """How it ended, in words."""
        code = self.process.wait(timeout=10)
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        with _guard:
            _kill(self.process.pid)
            _running.discard(self.process.pid)
        self.process.wait()
        self.selector.close()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


def _relay(line: str) -> None:
    """A line of the child's log, at the level it was logged with."""
    level, tab, message = line.partition("\t")
    known = logging.getLevelNamesMapping().get(level) if tab else None
    log.log(known or logging.WARNING, "%s", message if known else line)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
