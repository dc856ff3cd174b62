"""Several ranks on this machine: a process that has imported all it needs forks them, and they agree over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHILD = """
import faulthandler, importlib, json, os, sys, traceback
sys.path[:0] = {path!r}
module = importlib.import_module({module!r})

def work(rank, world, port, name, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    faulthandler.dump_traceback_later({most_s}, exit=True)  # ranks that wait for each other would wait for ever
    code = 0
    try:
        getattr(module, name)(*arguments)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    world, port, name, arguments = json.loads(line)
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            work(rank, world, port, name, arguments)
        children.append(child)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""

MOST_S = 180
Began = Callable[[list[int]], None]


@contextmanager
def ranks_of(module: str) -> Iterator[Callable[..., list[int]]]:
    """`run(world, name, *arguments, began=None)`: exit statuses of so many ranks that call a function of a test module.

    began: given their process ids once they run. The function finds its rank in the environment, as torchrun sets it.
    """
    code = CHILD.format(path=[str(Path(__file__).parent)], module=module, most_s=MOST_S)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdin and child.stdout
    stdin, stdout = child.stdin, child.stdout

    def run(world: int, name: str, *arguments: Any, began: Began | None = None) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        stdin.write(json.dumps([world, port, name, arguments]) + "\n")
        stdin.flush()
        children = json.loads(stdout.readline())
        if began:
            began(children)
        found: list[int] = json.loads(stdout.readline())
        return found

    try:
        yield run
    finally:
        stdin.close()
        child.wait(60)
        stdout.close()
