"""Real servers and workers for tests: started from Python, on free ports of 127.0.0.1, ended with everything they started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"no server at {url}:\n{log.read_text()}")


@dataclass(frozen=True)
class Prefect:
    """A running server. environment: of its clients; logs: folder of what its processes say."""

    environment: dict[str, str]
    logs: Path

    def call(self, *command: str, code: int = 0) -> str:
        """Run a command of the environment's `bin`; what it printed."""
        done = subprocess.run(
            [str(BIN / command[0]), *command[1:]], env=self.environment, cwd=REPOSITORY, capture_output=True, text=True,
            timeout=400, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        said = "".join(log.read_text() for log in sorted(self.logs.glob("worker*.log")))
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}\n{said}"
        return done.stdout + done.stderr

    def worker(self, name: str = "worker", limit: int = 8) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """A worker on the pool `local`, for as long as the context lasts. limit: flow runs at once."""
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "local", "--type", "process"]
        command += ["--name", name, "--limit", str(limit)]
        return running(command, self.environment, self.logs / f"{name}.log")


@contextmanager
def prefect(folder: Path) -> Iterator[Prefect]:
    """A Prefect server of its own, its home and logs in `folder`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = {**os.environ, "PREFECT_HOME": str(folder / "home"), "PREFECT_API_URL": url, "PREFECT_LOGGING_LEVEL": "INFO"}
    log = folder / "server.log"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with running(command, environment, log) as process:
        wait_for(f"{url}/health", process, log)
        yield Prefect(environment, folder)
