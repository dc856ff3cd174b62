"""Ask a child process what a media file is: a decoder that crashes or hangs on it costs that file, not the run."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from typing import Any

_LIMIT_S = 120.0
_FILES_A_CHILD = 2000  # what a decoder leaks goes with the child


class Prober:
    """One child process, started when first asked; used from one thread, as a context manager."""

    def __init__(self, limit_s: float = _LIMIT_S) -> None:
        self.limit_s = limit_s
        self._child: subprocess.Popen[bytes] | None = None
        self._asked = 0

    def probe(self, path: str, offset: int, size: int, kind: str, *, measure: bool = False) -> dict[str, Any]:
        """What `probe.probe` finds in this part of a local file. Raises ValueError for what is broken, crashes it, or hangs."""
        child = self._child = self._child or self._start()
        self._asked += 1
        question = {"path": path, "offset": offset, "size": size, "kind": kind, "measure": measure}
        assert child.stdin is not None and child.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(question).encode() + b"\n")
            child.stdin.flush()
            limit_s = self.limit_s + (size >> 20 if measure else 0)  # decoding takes its time
            if not select.select([child.stdout], [], [], limit_s)[0]:
                self._end()
                raise ValueError(f"nothing is known of it after {limit_s:g} s")
            line = child.stdout.readline()
        if not line.endswith(b"\n"):
            code = self._end()
            ending = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            raise ValueError(f"the process that opened it died ({ending})")
        if self._asked >= _FILES_A_CHILD:
            self._end()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        self._asked = 0
        return subprocess.Popen(
            [sys.executable, "-m", "cmacc.shards.probe", str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def _end(self) -> int:
        child, self._child = self._child, None
        if child is None:
            return 0
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            return child.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
