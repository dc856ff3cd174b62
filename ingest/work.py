"""Work on source videos in child processes, with a limit of time for each video and a cause for whatever happens."""

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
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cmacc.ingest.causes import Cause, IngestFailure
from cmacc.ingest.config import IngestConfig
from cmacc.ingest.gate import Gate
from cmacc.ingest.outcome import Outcome, SourceVideo
from cmacc.ingest.staging import clear_scratch, staged_outcomes

log = logging.getLogger(__name__)
_START_S = 120.0  # a child that is not ready by then never will be
_VIDEOS_A_CHILD = 200  # what a decoder leaks goes with the child


class Crew:
    """Child processes that fetch and cut source videos; used from any number of threads, a child for each at a time.

    Done clips lie in `staging/<source>.tar` (see `read_staged`); what lies there already is not made again.
    gate: asked before each fetch. Leaving the context, or `stop`, kills the children and everything they started.
    """

    def __init__(self, config: IngestConfig, staging: Path, gate: Gate | None = None) -> None:
        self.config, self.staging, self.gate = config, staging, gate
        self.guard = threading.Lock()
        self.idle: list[_Child] = []
        self.all: set[_Child] = set()
        self.stopped = False
        staging.mkdir(parents=True, exist_ok=True)

    def work(self, videos: Iterable[SourceVideo]) -> Iterator[Outcome]:
        """One outcome for every clip asked for, video by video; none for the videos that the gate does not admit.

        Raises IngestFailure for a cause that stops the run: the clips without an outcome stay to be done.
        """
        for video in videos:
            staged = staged_outcomes(self.staging, video)
            yield from staged
            missing = tuple(r for r in video.requests if r.key not in {o.key for o in staged})
            if missing and (self.gate is None or self.gate.admit(video)):
                yield from self._outcomes(replace(video, requests=missing))

    def _outcomes(self, video: SourceVideo) -> list[Outcome]:
        outcomes = self._one(video)
        if len(video.requests) > 1 and outcomes[0].cause is Cause.CRASH and not self.stopped:
            log.warning("%s: its clips are made one by one", video.source)
            outcomes = [o for request in video.requests for o in self._one(replace(video, requests=(request,)))]
        if self.gate is not None:
            self.gate.heed(video, outcomes)
        return outcomes

    def _one(self, video: SourceVideo) -> list[Outcome]:
        child = self._take()
        try:
            event = child.ask(video.to_json(), self.config.timeout_s)
        except TimeoutError:
            failure = IngestFailure(Cause.TIMEOUT, f"not done after {self.config.timeout_s:g} s")
        except EOFError:
            failure = IngestFailure(Cause.CRASH, f"the process that worked on it died ({child.ending()})")
        else:
            self._give(child)
            if "outcomes" in event:
                return [Outcome.from_json(o) for o in event["outcomes"]]
            raise IngestFailure(Cause(event["cause"]), event["detail"])
        self._dismiss(child)
        clear_scratch(self.staging, video.source)
        log.warning("%s: %s", video.source, failure)
        return [Outcome(request.key, video.source, failure.cause, failure.detail) for request in video.requests]

    def _take(self) -> _Child:
        with self.guard:
            if self.stopped:
                raise RuntimeError("the crew has been stopped")
            if self.idle:
                return self.idle.pop()
            child = _Child(self._job())
            self.all.add(child)
        try:
            child.event(_START_S)
        except (TimeoutError, EOFError) as error:
            self._dismiss(child)
            raise RuntimeError(f"the ingest child does not start ({child.ending()}); its messages are in the log") from error
        return child

    def _give(self, child: _Child) -> None:
        if child.asked >= _VIDEOS_A_CHILD:
            self._dismiss(child)
            return
        with self.guard:
            self.idle.append(child)

    def _dismiss(self, child: _Child) -> None:
        with self.guard:
            self.all.discard(child)
        child.end()

    def _job(self) -> dict[str, Any]:
        level = logging.getLogger("cmacc").getEffectiveLevel()
        return {"parent": os.getpid(), "config": asdict(self.config), "staging": str(self.staging), "log_level": level}

    def stop(self) -> None:
        """Kill every child, with all that it started; whoever waits for one gets what it had."""
        with self.guard:
            self.stopped = True
            for child in self.all:
                child.kill()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for child in list(self.all):
            self._dismiss(child)


class _Child:
    """One child process, in a session of its own."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.asked = 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cmacc.ingest.child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.selector = selectors.DefaultSelector()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            self.selector.register(pipe, selectors.EVENT_READ, bytearray())
        self._say(job)

    def ask(self, question: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Its answer. Raises TimeoutError when none comes within limit_s seconds, EOFError when it dies."""
        self.asked += 1
        self._say(question)
        return self.event(limit_s)

    def _say(self, line: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(line).encode() + b"\n")
            self.process.stdin.flush()

    def event(self, limit_s: float) -> dict[str, Any]:
        """The next thing it tells. Raises TimeoutError when that does not come within limit_s seconds, EOFError when it dies."""
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
                self._read(deadline)

    def _read(self, deadline: float) -> None:
        """Take in what its pipes hold."""
        while self.selector.get_map():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            for key, _ in self.selector.select(left_s):
                data = os.read(key.fd, 1 << 16)
                if data:
                    key.data.extend(data)
                    return
                self.selector.unregister(key.fileobj)
        raise EOFError

    def ending(self) -> str:
        """How it ended, in words."""
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "it still runs"
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        self.kill()
        self.process.wait()
        self.selector.close()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _relay(line: str) -> None:
    """A line of the child's log, at the level it was logged with."""
    level, tab, message = line.partition("\t")
    known = logging.getLevelNamesMapping().get(level) if tab else None
    log.log(known or logging.WARNING, "%s", message if known else line)
