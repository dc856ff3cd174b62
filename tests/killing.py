"""Kill -9 at a chosen moment: a process that has imported all it needs forks the work, and kills it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CHILD = """
import os, signal, sys, time
sys.path[:0] = {path!r}
{work}
for line in sys.stdin:
    folder, delay = line.split()
    child = os.fork()
    if child == 0:
        work(folder)
        os._exit(0)
    time.sleep(float(delay))
    os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def killing(work: str) -> Iterator[Callable[[Path, float], bool]]:
    """`kill(folder, seconds)` begins work(folder) and kills it then; whether it was still at work.

    work: Python that defines `work(folder: str)`; it may import the tests' modules.
    """
    code = CHILD.format(path=[str(Path(__file__).parent)], work=work)
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin and child.stdout
    stdin, stdout = child.stdin, child.stdout

    def kill(folder: Path, delay: float) -> bool:
        stdin.write(f"{folder} {delay}\n")
        stdin.flush()
        ended = int(stdout.readline())
        assert ended in (0, -signal.SIGKILL), f"the work ended with {ended} by itself"
        return ended != 0

    try:
        yield kill
    finally:
        stdin.close()
        child.wait(30)
        stdout.close()
