"""SIGTERM and SIGUSR1: the run saves and leaves in time, wherever it is; and if it hangs, the process leaves without it.

Python runs its handlers between bytecodes of the main thread, which may be for minutes in one call: a compilation, a
collective, a read that stalls. So the handlers here do nothing. What counts is the byte that the C half of Python's signal
handling writes into a pipe at once, in whatever thread the signal arrives; a thread reads it. (`sigwait` would do too, but only
with the signal blocked in every thread, those of DALI and of OpenMP too, and children inherit what is blocked: torch's compile
workers could not be ended any more.) Children by fork inherit the handlers and the pipe; they are taken from them.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT = 143  # as a shell says that SIGTERM ended a process
_ECHO_S = 3.0  # torchrun passes on the signal that a scheduler has sent to its processes too: that is no second one
_LAST_WORDS_S = 2.0  # for the log, whose stream may hang as well

Wait = Callable[[float], str | None]


class Preempted(Exception):
    """The run has saved and leaves because of a signal. step: that is saved; address: of the checkpoint."""

    def __init__(self, step: int, address: str) -> None:
        super().__init__(f"saved at step {step} in {address}; the same command continues")
        self.step, self.address = step, address


class Preemption:
    """Within its context SIGTERM and SIGUSR1 end nothing: `requested` says that one came, and a watchdog keeps the time.

    grace_s: seconds from the first signal. If `done` was not called by then, or a second signal of the same kind comes, the
    process ends with status 143, after the save under way if the time is enough for it. wait: `Checkpointer.wait`, of the
    process that has one; it may be set later.

    In another thread than the main one the context does nothing: Python takes no
    handler there. A call that keeps Python's global lock keeps the watchdog out as well; then only SIGKILL helps, which whoever
    sent the signal sends next.
    """

    def __init__(self, grace_s: float, wait: Wait | None = None) -> None:
        if not grace_s > 0:
            raise ValueError(f"the grace of a preemption is {grace_s}; give seconds above 0")
        self.grace_s, self.wait = grace_s, wait
        self.name = ""
        self._done = False
        self._former: dict[signal.Signals, Any] = {}
        self._former_fd = -1
        self._pipe: tuple[int, int] | None = None
        self._watch = threading.Thread(target=self._read, name="preemption", daemon=True)

    @property
    def requested(self) -> bool:
        """Whether a signal came; `name` is the first one's, as SIGTERM."""
        return bool(self.name)

    def done(self) -> None:
        """All is saved: the time no longer counts. A second signal still ends the process."""
        self._done = True

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            log.debug("signals are left alone: this is not the main thread")
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._watch.start()
        self._former_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in SIGNALS:
            self._former[number] = signal.signal(number, _nothing)
        _within.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pipe is None:
            return
        _within.remove(self)
        self._put_back()
        os.write(self._pipe[1], bytes([0]))  # no signal has this number: the end
        self._watch.join()
        for fd in self._pipe:
            os.close(fd)
        self._pipe = None

    def _put_back(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        try:
            signal.set_wakeup_fd(self._former_fd)
        except (OSError, ValueError):  # whose it was has closed it
            signal.set_wakeup_fd(-1)

    # --- inside, in the watchdog's thread ---

    def _read(self) -> None:
        assert self._pipe
        pipe, came, deadline = self._pipe[0], dict[int, float](), 0.0
        while True:
            counts = bool(came) and not self._done
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()) if counts else None)
            if not ready:
                if not self._done:
                    self._leave(0.0, f"has not saved within {self.grace_s:g} s")
                continue
            for number in os.read(pipe, 64):
                now = time.monotonic()
                if number == 0:
                    return
                if number not in SIGNALS:
                    continue
                if not came:
                    self.name, deadline = signal.Signals(number).name, now + self.grace_s
                    _aside(log.warning, "%s: the run saves and leaves, within %g s", self.name, self.grace_s)
                elif number in came and now - came[number] >= _ECHO_S:
                    self._leave(deadline - now, f"was sent {signal.Signals(number).name} again")
                came.setdefault(number, now)

    def _leave(self, seconds: float, why: str) -> None:
        """End the process at once, but for the save under way, which has these seconds."""
        seconds = max(0.0, seconds)
        _aside(self._say, seconds, why).join(seconds + _LAST_WORDS_S)
        os._exit(EXIT)

    def _say(self, seconds: float, why: str) -> None:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        at = traceback.extract_stack(frame)[-1] if frame else None
        within = f"in {at.name}, {at.filename}:{at.lineno}" if at else "nowhere"
        address = self.wait(seconds) if self.wait else None
        place = f"{address}" if address else "the last checkpoint" if self.wait is None else "its beginning: nothing is saved yet"
        log.error("%s: the run %s (it was %s) and ends; the same command continues from %s", self.name, why, within, place)


def _aside(call: Callable[..., Any], *arguments: Any) -> threading.Thread:
    """In a thread of its own: what a log writes to may hang, and must not hold up the watchdog."""
    thread = threading.Thread(target=call, args=arguments, daemon=True)
    thread.start()
    return thread


_within: list[Preemption] = []


def _nothing(number: int, frame: FrameType | None) -> None:
    """What has to be done the watchdog does."""


_forking = threading.local()


def _before_fork() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _in_child() -> None:
    """A child by fork would write its own signals into the pipe of its parent; so none reaches it until this is put back."""
    for preemption in reversed(_within):
        preemption._put_back()
    _within.clear()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)
