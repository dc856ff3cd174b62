"""Ways of doing the same, each in a process of its own, measured in turn: one runs, the others are stopped meanwhile."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

UNCOUNTED = 6
"""Batches at the beginning of a round that are not timed: more than any way makes ahead."""

Way = Callable[[Any], Iterator[Any]]
"""A job to endless batches."""


class Turn(NamedTuple):
    """Clips a second by the clock, and processor milliseconds a clip, which others at work on the machine change less."""

    clips_s: float
    cpu_ms: float


class Ratio(NamedTuple):
    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


def ratio(first: list[float], second: list[float]) -> Ratio:
    """Of two columns, of those that were taken in the same round."""
    each = [a / b for a, b in zip(first, second, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))


class Contestant:
    """One way in its own process, stopped but for its turns. Raises RuntimeError when it cannot start or fails later."""

    def __init__(self, name: str, way: Way, job: Any) -> None:
        self.name = name
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_take_turns, args=(theirs, way, job))
        self._process.start()
        theirs.close()
        try:
            self.shapes: list[tuple[int, ...]] = self._answer()
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def turn(self, batches: int, clips: int) -> Turn:
        """So many batches of `clips` each, after those that are not counted but in `cpu_ms`."""
        before = self._cpu_s()
        self._signal(signal.SIGCONT)
        self._pipe.send(batches)
        try:
            wall_s = self._answer()
        finally:
            self._signal(signal.SIGSTOP)
        cpu_s = self._cpu_s() - before
        return Turn(batches * clips / wall_s, 1000 * cpu_s / ((UNCOUNTED + batches) * clips))

    def _cpu_s(self) -> float:
        """Processor seconds of the process and of the workers that it started."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == self._process.pid:  # the process group
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name} ended without a word") from None
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name} failed: {answer}")
        return answer

    def _signal(self, number: signal.Signals) -> None:
        """To the process and to the workers that it started."""
        if self._process.is_alive() and self._process.pid:
            with suppress(ProcessLookupError):  # before it has a group of its own
                os.killpg(self._process.pid, number)

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.kill()
        self._process.join()


def _take_turns(pipe: Connection, way: Way, job: Any) -> None:
    # A group of its own, for the signals; of the same session, so that stopped ones end when the bench is killed.
    os.setpgid(0, 0)
    try:
        batches = way(job)
        first = next(batches)
        pipe.send([tuple(tensor.shape) for tensor in first])
        while True:
            count = pipe.recv()
            for _ in range(UNCOUNTED):
                next(batches)
            began = time.perf_counter()
            for _ in range(count):
                next(batches)
            pipe.send(time.perf_counter() - began)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}".partition("\n")[0])
