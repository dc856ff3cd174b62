"""Processes of the hosts: started with a mark that all they start inherits, killed with all of it, none left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import psutil
from hosts import Host

REPOSITORY = Path(__file__).resolve().parents[2]
"""Where commands run: prefect.toml and prefect.yaml are read from there."""
_MARK = "CMACC_REHEARSAL_HOST"
_PR_SET_CHILD_SUBREAPER = 36
_LEAVE_S = 20.0


class Processes:
    """What runs on the hosts. logs: folder of what they say, one file a name.

    Within its context this process becomes the parent of all orphans of what it started, so that none escapes; leaving the
    context ends them all, in order first.
    """

    def __init__(self, logs: Path) -> None:
        self.logs, self._id = logs, uuid.uuid4().hex[:12]
        self._started: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Processes:
        self.logs.mkdir(parents=True, exist_ok=True)
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            for process in reversed(self._started):  # those first that lean on others
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
            deadline = time.monotonic() + _LEAVE_S
            for process in self._started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, deadline - time.monotonic()))
            _kill(psutil.Process().children(recursive=True))
            for process in self._started:
                process.wait()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def start(self, host: Host, name: str, command: Iterable[object], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a command on a host, its output at the end of the log of that name."""
        with self.log(name).open("ab") as log, self._lock:
            process = subprocess.Popen(
                host.command(command), env={**environment, _MARK: f"{self._id}/{host.name}"}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, cwd=REPOSITORY, start_new_session=True,
            )  # fmt: skip
            self._started.append(process)
        return process

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def said(self, name: str) -> str:
        """The end of a log."""
        path = self.log(name)
        return path.read_text(errors="replace")[-3000:] if path.exists() else ""

    def of(self, host: Host) -> list[psutil.Process]:
        """All that lives on a host, what its processes have started too."""
        return [p for p in psutil.Process().children(recursive=True) if _marked(p, f"{self._id}/{host.name}")]

    def kill(self, host: Host) -> int:
        """kill -9 to all that lives on a host, as when the machine goes. Returns how many processes that were."""
        found = self.of(host)
        _kill(found)
        return len(found)


def processor_s() -> float:
    """Seconds of processor time of this process and of all that it started and that has ended."""
    return sum(os.times()[:4])


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Ctrl-C (which a shell has background jobs ignore), SIGTERM and SIGHUP end this process in order: all that has to be ended
    with it is."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    former = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _marked(process: psutil.Process, mark: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.environ().get(_MARK) == mark
    return False


def _kill(processes: list[psutil.Process]) -> None:
    """All are stopped first, so that none starts another one meanwhile."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
