"""Real servers and workers for tests: started from Python, on free ports of 127.0.0.1, ended with everything they started."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

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
    for _ in range(600):
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
    environment = {
        **os.environ, "PREFECT_HOME": str(folder / "home"), "PREFECT_API_URL": url, "PREFECT_LOGGING_LEVEL": "INFO",
        "PREFECT_WORKER_QUERY_SECONDS": "1",  # by default a run waits for its worker ten seconds
    }  # fmt: skip
    log = folder / "server.log"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with running(command, environment, log) as process:
        wait_for(f"{url}/health", process, log)
        yield Prefect(environment, folder)


@dataclass
class FileServer:
    """A server of files, by range, that fails.

    faults: what happens to the next requests for files that end in `of`. asked: ranges of shards that were asked for; names: of
    those shards. gate: what a request with the fault `wait` waits for before it is answered well. hung_up: how many requests
    that never were answered in full were ended by who asked.
    """

    url: str = ""
    of: str = ".tar"
    faults: list[str] = field(default_factory=list)
    asked: list[tuple[int, int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    hung_up: int = 0

    def stall(self, connection: socket.socket) -> None:
        connection.settimeout(60)
        self.hung_up += connection.recv(1) == b""


class _Handler(SimpleHTTPRequestHandler):
    """As a bucket's public side, or a static web server, answers."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: Any, server_state: FileServer, **options: Any) -> None:
        self.state = server_state
        super().__init__(*arguments, **options)

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        data, size = path.read_bytes(), path.stat().st_size
        fault = self.state.faults.pop(0) if str(path).endswith(self.state.of) and self.state.faults else ""
        if fault == "mute":
            self.close_connection = True
            return self.state.stall(self.connection)
        if fault == "wait":
            self.state.gate.wait(60)
        if fault.isdigit():
            return self.send_error(int(fault))
        if fault == "drop":
            self.close_connection = True
            return self.connection.close()
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if found and found[1] and int(found[1]) >= size:
            self.state.asked.append((int(found[1]), int(found[2])))
            return self.send_error(416)
        if found and fault != "whole":
            begin = int(found[1]) if found[1] else size - int(found[2])
            end = min(int(found[2]) + 1, size) if found[1] and found[2] else size
            if path.suffix == ".tar":
                self.state.asked.append((begin, end))
                self.state.names.append(path.name)
            data = data[begin:end]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault in ("cut", "stall") else data)
        if fault == "stall":
            self.state.stall(self.connection)
        self.close_connection = self.close_connection or fault in ("cut", "stall")
        return None


@contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    """Serve the files of a folder."""
    state = FileServer()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder), server_state=state))
    state.url = f"http://127.0.0.1:{http.server_address[1]}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield state
    state.gate.set()
    http.shutdown()
    http.server_close()
