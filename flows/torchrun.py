"""Ranks of this machine, by torchrun in a process of its own: it dies with this one, and leaves in order when this one has to."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO

from cmacc.flows.agent import ATTENDED, FOR_FLOW, STOPPED

log = logging.getLogger(__name__)

_LEAVE_S = 60.0
"""torch's agent gives its ranks 30 s to save."""
_LAST_LINES = 40


class Stopped(Exception):
    """The ranks saved and left because of a signal; the same call continues."""


def rank() -> int | None:
    """Which rank this process is, None when torchrun did not start it."""
    return int(os.environ["RANK"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def attended() -> bool:
    """Whether `launch` started this rank: its log goes to a flow, which shows progress and draws the picture itself."""
    return ATTENDED in os.environ


def leave_with_worker() -> None:
    """In a flow run that a Prefect worker started: save and leave when the worker dies, which by itself leaves it training on."""
    from cmacc.ingest.child import die_with

    if "PREFECT__FLOW_RUN_ID" in os.environ:
        die_with(os.getppid(), signal.SIGTERM)


def die_with_agent() -> None:
    """In a rank: be killed when torchrun is, which by itself leaves its ranks training on."""
    from cmacc.ingest.child import die_with

    die_with(int(os.environ.get(ATTENDED, os.getppid())))


def launch(arguments: Sequence[str], ranks: int, look: Callable[[], object], every_s: float = 1.0) -> None:
    """Run `cmacc ARGUMENTS` on so many ranks until all are done; `look` is called now and then meanwhile.

    What they log is logged here. An exception that ends the waiting, and SIGUSR1, tell them to save and leave. Raises Stopped
    when they did, ValueError with their sentence when they refused, RuntimeError with their last lines when they failed.
    """
    parent = os.getppid()
    command = [sys.executable, "-m", "cmacc.flows.agent", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "cmacc", *arguments]
    # No pipe or session of ours: what they print is no event of ours, and Ctrl-C is passed on in order. A rank is no flow run.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    environment[FOR_FLOW] = str(os.getpid())
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as child:
        assert child.stdout
        said = _Said(child.stdout)
        try:
            with _passed_on(child):
                while (code := _wait(child, every_s)) is None:
                    look()
        except BaseException as error:
            code = _leave(child)
            said.thread.join(_LEAVE_S)
            # By SIGTERM, as `cmacc` takes it; or the worker is dead, and nobody else tells the server that this run ends.
            if isinstance(error, SystemExit) or os.getppid() != parent:
                raise Stopped(said.sentence or "stopped; the same command continues") from None
            raise
        said.thread.join(_LEAVE_S)
    look()
    if code == STOPPED:
        raise Stopped(said.sentence or "stopped; the same command continues")
    if code and said.sentence:
        raise ValueError(said.sentence)
    if code:
        raise RuntimeError(f"training ended with exit status {code}:\n" + "\n".join(said.last))


class _Said:
    """What the ranks say, logged line by line. sentence: the refusal, if one was told; last: lines that were no log records."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self.sentence, self.last = "", deque[str](maxlen=_LAST_LINES)
        self.thread = threading.Thread(target=self._read, args=(pipe,), daemon=True, name="ranks")
        self.thread.start()

    def _read(self, pipe: IO[bytes]) -> None:
        with suppress(ValueError):  # closed under it
            for raw in pipe:
                line = raw.decode(errors="replace").rstrip()
                level, tab, message = line.partition("\t")
                known = logging.getLevelNamesMapping().get(level) if tab else None
                if line.startswith("cmacc: "):
                    self.sentence = self.sentence or line.removeprefix("cmacc: ")
                elif known:
                    log.log(known, "%s", message)
                elif line:
                    self.last.append(line)
                    log.debug("%s", line)


def _wait(child: subprocess.Popen[bytes], seconds: float) -> int | None:
    with suppress(subprocess.TimeoutExpired):
        return child.wait(seconds)
    return None


@contextmanager
def _passed_on(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """SIGUSR1, by which Slurm and others tell that the time is nearly over, goes to the ranks. SIGTERM ends the waiting."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGUSR1, lambda *_: child.send_signal(signal.SIGUSR1))
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, former)


def _leave(child: subprocess.Popen[bytes]) -> int:
    child.terminate()
    code = _wait(child, _LEAVE_S)
    if code is None:
        child.kill()  # and the ranks with it
    return child.wait()
