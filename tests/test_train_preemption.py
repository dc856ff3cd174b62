"""SIGTERM and SIGUSR1, wherever the main thread is: in time, with the last words that say what a resume takes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cmacc.train.running.checkpoint import latest, load
from cmacc.train.running.preemption import Preempted, Preemption

SIGNALS = [signal.SIGTERM, signal.SIGUSR1]

HOME = """
import ctypes, json, logging, os, signal, sys, threading, time
import torch
torch.set_num_threads(1)
from cmacc.shards.publish import PartFile
from cmacc.train.running import preemption as module
from cmacc.train.running.checkpointer import CheckpointConfig, Checkpointer
from cmacc.train.running.preemption import Preempted, Preemption

def ready():
    print("ready", flush=True)

def hang_in_c():
    "In one call of C that no signal interrupts: a mutex is locked twice."
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)

libc = ctypes.CDLL(None)
for line in sys.stdin:
    work, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), fd)
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
        exec(work)
        os._exit(0)
    print("child", child, flush=True)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Child:
    """A process at some work, once it is ready."""

    def __init__(self, home: subprocess.Popen[str], work: str, folder: Path) -> None:
        assert home.stdin
        self.home, self.folder = home, folder
        home.stdin.write(json.dumps([work, str(folder)]) + "\n")
        home.stdin.flush()
        self.pid = self._next("child")
        until(lambda: "ready" in self.out() or "Traceback" in self.err())
        assert "ready" in self.out(), self.err()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def out(self) -> str:
        return (self.folder / "out").read_text() if (self.folder / "out").exists() else ""

    def err(self) -> str:
        return (self.folder / "err").read_text() if (self.folder / "err").exists() else ""

    def ended(self) -> tuple[int, str]:
        """With which status, and what it said."""
        return self._next("ended"), self.err()

    def _next(self, what: str) -> int:
        assert self.home.stdout
        said, number = self.home.stdout.readline().split()
        assert said == what
        return int(number)


def until(come: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not come():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def child() -> Iterator[Callable[[str, Path], Child]]:
    """Forked from a process that has imported all that is needed."""
    home = subprocess.Popen([sys.executable, "-c", HOME], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    made: list[Child] = []

    def make(work: str, folder: Path) -> Child:
        made.append(Child(home, work, folder))
        return made[-1]

    yield make
    assert home.stdin and home.stdout
    home.stdin.close()
    assert home.wait(60) == 0
    home.stdout.close()


Make = Callable[[str, Path], Child]

SAVE_AND_LEAVE = """
saver = Checkpointer(folder, CheckpointConfig())
step = 0
with Preemption(60, saver.wait) as preemption:
    ready()
    while not preemption.requested:
        {one_step}
        step += 1
    saver.save(step, {{"weight": torch.full((3,), float(step))}}, {{}})
    address = saver.wait()
    preemption.done()
    print(preemption.name, step, flush=True)
    print(Preempted(step, address), file=sys.stderr, flush=True)
    os._exit(9)
"""
STEPS = {
    "asleep in C": "libc.usleep(20_000)",
    "in Python": "sum(range(10_000))",
    "in a product of matrices": "torch.randn(400, 400) @ torch.randn(400, 400)",
    "waiting for a lock": "threading.Event().wait(0.02)",
}


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("kind", STEPS)
def test_it_saves_and_leaves(child: Make, tmp_path: Path, kind: str, number: signal.Signals) -> None:
    run = child(SAVE_AND_LEAVE.format(one_step=STEPS[kind]), tmp_path)
    run.send(number)
    status, said = run.ended()
    name, step = run.out().split()[1:]
    assert name == number.name
    assert status == 9, "its own"
    address = str(tmp_path / f"step-{int(step):08d}.safetensors")
    assert f"saved at step {step} in {address}; the same command continues" in said
    assert f"WARNING {name}: the run saves and leaves, within 60 s" in said
    assert latest(tmp_path) == address
    assert load(address).tensors["weight"].tolist() == [float(step)] * 3


HANGS = """
def hang():
    {hang}

saver = Checkpointer(folder, CheckpointConfig())
saver.save(4, {{"weight": torch.zeros(3)}}, {{}})
saver.wait()
with Preemption({grace}, {wait}) as preemption:
    ready()
    hang()
"""
WAYS = {
    "in a call of C": "hang_in_c()",
    "a lock": "threading.Lock().acquire() and threading.Event().wait()",
    "a lock in C": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "a read that stalls": "os.read(os.pipe()[0], 1)",
    "in Python for ever": "while True: pass",
}


@pytest.mark.parametrize("kind", WAYS)
def test_it_leaves_though_it_hangs(child: Make, tmp_path: Path, kind: str) -> None:
    """In the very call that never comes back; the last words say where, and what a resume takes."""
    run = child(HANGS.format(hang=WAYS[kind], grace=0.3, wait="saver.wait"), tmp_path)
    run.send(signal.SIGTERM)
    status, said = run.ended()
    assert status == 143
    (words,) = [line for line in said.splitlines() if line.startswith("ERROR")]
    assert re.search(r"SIGTERM: the run has not saved within 0.3 s \(it was in [^ ]+, [^)]*:\d+\) and ends", words)
    assert words.endswith(f"; the same command continues from {tmp_path}/step-00000004.safetensors")


def test_the_words_of_a_process_without_checkpoints(child: Make, tmp_path: Path) -> None:
    run = child(HANGS.format(hang="time.sleep(600)", grace=0.1, wait="None"), tmp_path)
    run.send(signal.SIGUSR1)
    status, said = run.ended()
    assert status == 143
    assert said.strip().endswith("; the same command continues from the last checkpoint")


def test_nothing_saved_yet(child: Make, tmp_path: Path) -> None:
    run = child(HANGS.format(hang="time.sleep(600)", grace=0.1, wait="lambda seconds: None"), tmp_path)
    run.send(signal.SIGUSR1)
    status, said = run.ended()
    assert status == 143
    assert said.strip().endswith("; the same command continues from its beginning: nothing is saved yet")


AGAIN = """
module._ECHO_S = {echo}
with Preemption(600) as preemption:
    ready()
    for number in {signals}:
        os.kill(os.getpid(), number)
"""


@pytest.mark.parametrize(
    ("echo", "signals", "status"),
    [(0, [15, 15], 143), (0, [10, 15, 10], 143), (0, [10, 15], 0), (600, [15, 15, 10, 15], 0)],
)
def test_a_second_signal_ends_it_at_once(child: Make, tmp_path: Path, echo: int, signals: list[int], status: int) -> None:
    """But for one that follows hard on the first, as torchrun passes it on, and for one of the other kind."""
    run = child(AGAIN.format(echo=echo, signals=signals), tmp_path)
    ended, said = run.ended()
    assert ended == status
    first, last = (signal.Signals(signals[i]).name for i in (0, -1))
    assert (f"{first}: the run was sent {last} again (" in said) == (status == 143)


WRITES = """
write, began = PartFile.write, threading.Event()

def slow(self, data):
    if self.path.name.endswith(".safetensors"):
        began.set()
        time.sleep({seconds})
    return write(self, data)

PartFile.write = slow
saver = Checkpointer(folder, CheckpointConfig())
saver.save(3, {{"weight": torch.arange(5.)}}, {{}})
saver.wait()
saver.save(7, {{"weight": torch.arange(9.)}}, {{}})
with Preemption(600, saver.wait) as preemption:
    began.wait()
    ready()
    hang_in_c()
"""


def test_the_save_under_way_is_finished(child: Make, tmp_path: Path) -> None:
    work = "module._ECHO_S = 0.0\n" + WRITES.format(seconds=0.4)
    run = child(work, tmp_path)
    run.send(signal.SIGTERM)
    until(lambda: "SIGTERM: the run saves and leaves" in run.err())
    run.send(signal.SIGTERM)
    status, said = run.ended()
    assert status == 143
    assert f"continues from {tmp_path}/step-00000007.safetensors" in said
    assert load(latest(tmp_path) or "").tensors["weight"].tolist() == list(range(9))


def test_a_save_that_does_not_end_in_time(child: Make, tmp_path: Path) -> None:
    """The one before it is the latest, and is said to be."""
    work = WRITES.format(seconds=0).replace("Preemption(600", "Preemption(0.3")
    work = work.replace("saver.save(7", "PartFile.write = lambda self, data: began.set() or time.sleep(600)\nsaver.save(7")
    run = child(work.replace("    began.wait()\n", ""), tmp_path)
    run.send(signal.SIGTERM)
    status, said = run.ended()
    assert status == 143
    assert f"continues from {tmp_path}/step-00000003.safetensors" in said
    assert load(latest(tmp_path) or "").tensors["weight"].tolist() == list(range(5))


def test_words_that_nobody_takes_do_not_keep_it(child: Make, tmp_path: Path) -> None:
    """A log whose stream hangs, with the lock of its handler held."""
    work = """
class Stuck(logging.Handler):
    def emit(self, record):
        threading.Event().wait()

logging.getLogger().addHandler(Stuck())
module._LAST_WORDS_S = 0.1
with Preemption(0.1) as preemption:
    ready()
    hang_in_c()
"""
    run = child(work, tmp_path)
    run.send(signal.SIGTERM)
    status, _ = run.ended()
    assert status == 143


FORKS = """
import subprocess
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
with Preemption(600) as preemption:
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    print("ready", flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    other = subprocess.Popen(["sleep", "600"])
    other.terminate()
    print(other.wait(), flush=True)
print(preemption.requested, flush=True)
"""


def test_children_have_signals_of_their_own(child: Make, tmp_path: Path) -> None:
    """As torch's compile workers: what ends one of them does not preempt the run, and it is ended by it."""
    run = child(FORKS, tmp_path)
    assert run.ended()[0] == 0
    assert run.out().split() == ["ready", "7", str(-signal.SIGTERM), "False"]


RANK = """
import os, time
from cmacc.train.running.preemption import Preemption
with Preemption(600) as preemption:
    print("ready", flush=True)
    while not preemption.requested:
        time.sleep(0.01)
    time.sleep(1)  # of saving, in which the same signal comes again
    preemption.done()
    os.write(1, f"rank {os.environ['RANK']} saved after {preemption.name}\\n".encode())  # both ranks write there: in one piece
"""


@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, True), (signal.SIGUSR1, False)])
def test_under_torchrun(tmp_path: Path, number: signal.Signals, to_all: bool) -> None:
    """It passes the signal on to each rank, which may have had it from the scheduler before: no second one."""
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", str(tmp_path / "rank.py")]
    out = tmp_path / "out"
    with out.open("w") as file:
        agent = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        until(lambda: out.read_text().count("ready") == 2)
        ranks = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split() if to_all else []
        for pid in (*ranks, agent.pid):
            os.kill(int(pid), number)
        assert agent.wait(60) != 0
    finally:
        agent.kill()
        agent.wait()
    for rank in range(2):
        assert f"rank {rank} saved after {number.name}" in out.read_text(), out.read_text()


def test_all_is_put_back() -> None:
    """Handlers and the wakeup pipe; a signal after the end meets the former handler."""
    came = []
    former = {number: signal.signal(number, lambda n, _: came.append(n)) for number in SIGNALS}
    read, write = os.pipe()
    os.set_blocking(write, False)
    fd = signal.set_wakeup_fd(write)
    try:
        before = [signal.getsignal(number) for number in SIGNALS]
        with Preemption(600) as preemption:
            assert not preemption.requested
            with Preemption(600) as inner:
                os.kill(os.getpid(), signal.SIGUSR1)
                deadline = time.monotonic() + 30
                while not inner.requested:
                    assert time.monotonic() < deadline
                assert inner.name == "SIGUSR1"
                inner.done()
            assert not preemption.requested
            assert came == []
        assert [signal.getsignal(number) for number in SIGNALS] == before
        assert "preemption" not in [thread.name for thread in threading.enumerate()]
        os.kill(os.getpid(), signal.SIGTERM)
        assert came == [signal.SIGTERM]
        assert os.read(read, 9) == bytes([signal.SIGTERM])
        assert signal.set_wakeup_fd(fd) == write
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd)
        os.close(read)
        os.close(write)


def test_a_former_pipe_that_is_closed_meanwhile_is_let_go() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write)
    try:
        with Preemption(600):
            os.close(write)
        assert signal.set_wakeup_fd(before) == -1
    finally:
        os.close(read)


DONE = """
with Preemption(0.1) as preemption:
    ready()
    preemption.done()
    os.kill(os.getpid(), signal.SIGTERM)
    while not preemption.requested:
        pass
    time.sleep(0.3)
"""


def test_done_stops_the_clock(child: Make, tmp_path: Path) -> None:
    assert child(DONE, tmp_path).ended()[0] == 0


def test_other_signals_are_left_alone() -> None:
    came = []
    former = signal.signal(signal.SIGUSR2, lambda *_: came.append(1))
    try:
        with Preemption(600) as preemption:
            os.kill(os.getpid(), signal.SIGUSR2)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)
            assert not preemption.requested
        assert came == [1]
    finally:
        signal.signal(signal.SIGUSR2, former)


def test_in_another_thread_it_does_nothing() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with Preemption(600) as preemption:
            seen.append((preemption.requested, signal.getsignal(signal.SIGTERM) is before))
            preemption.done()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]


@pytest.mark.parametrize("grace", [0.0, -1.0, float("nan")])
def test_no_grace(grace: float) -> None:
    with pytest.raises(ValueError, match=r"the grace of a preemption is .*; give seconds above 0"):
        Preemption(grace)


def test_the_sentence() -> None:
    error = Preempted(12, "runs/a/checkpoints/step-00000012.safetensors")
    assert str(error) == "saved at step 12 in runs/a/checkpoints/step-00000012.safetensors; the same command continues"
    assert (error.step, error.address) == (12, "runs/a/checkpoints/step-00000012.safetensors")
