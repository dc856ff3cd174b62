"""End to end with Prefect: a real server and worker on a free port run all four deployments, as README tells it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cmacc.ingest.world import WorldConfig, render_world
from cmacc.shards.dataset import Dataset

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TINY = {
    "steps": 6, "log_every": 2, "eval_every": 6, "checkpoint_every": 6, "loader.batch": 4, "view.frames": 4, "view.size": 24,
    "view.view_s": 0.5, "objective.dictionary": 16, "objective.pool": 32, "objective.share_start": 0, "objective.share_ramp": 0,
}  # fmt: skip


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


def test_four_deployments_on_a_real_server(tmp_path: Path) -> None:
    world = render_world(tmp_path / "world", WorldConfig(clips=15, eval_clips=15, clip_s=1.0, seed=2), workers=2)
    url = f"http://127.0.0.1:{free_port()}/api"
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "home"), "PREFECT_API_URL": url, "PREFECT_LOGGING_LEVEL": "INFO"}

    def call(*command: str, code: int = 0) -> str:
        done = subprocess.run(
            [str(BIN / command[0]), *command[1:]], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}\n{(tmp_path / 'worker.log').read_text()}"
        return done.stdout + done.stderr

    def run(name: str, **parameters: object) -> None:
        given = [part for key, value in parameters.items() for part in ("-p", f"{key}={json.dumps(value)}")]
        call("cmacc", "run", name, "--watch", *given)

    server = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", url.split(":")[2].split("/")[0]]
    with running([sys.executable, *server], environment, tmp_path / "server.log") as process:
        (tmp_path / "worker.log").touch()
        wait_for(f"{url}/health", process, tmp_path / "server.log")
        assert "no deployment of 'ingest'" in call("cmacc", "run", "ingest", code=1)
        call("prefect", "work-pool", "create", "local", "--type", "process")
        call("prefect", "deploy", "--all")
        worker = ["-m", "prefect", "worker", "start", "--pool", "local", "--type", "process"]
        with running([sys.executable, *worker], environment, tmp_path / "worker.log"):
            data, out = str(tmp_path / "data"), str(tmp_path / "run")
            lists = [f"train={world.train_manifest}", f"eval={world.eval_manifest}"]
            run("ingest", manifests=lists, url_template=str(world.root / "media" / "{id}.mp4"), out=data, short_side=48, fps=8)
            run("reshard/local", sources=[data], out=str(tmp_path / "few"), where="list_contains(labels, 'bell')")
            run("pretrain", data=data, out=out, options=TINY)
            run("evaluate", model=out, data=data, batch=4)

    assert len(Dataset.open(data)) == 30
    assert set(Dataset.open(tmp_path / "few").catalog.labels()) == {("bell",)}
    assert (tmp_path / "run" / "picture.png").stat().st_size > 10_000
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert scores["step"] == TINY["steps"]
    assert scores["retrieval"]["clips"] == 15
