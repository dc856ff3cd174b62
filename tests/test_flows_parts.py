"""Ingest past one machine: two workers on a real Prefect server, and two processes of a Dask cluster."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID, uuid4

import httpx
import psutil
import pytest
from servers import BIN, REPOSITORY, Prefect, prefect

from cmacc.flows import parts
from cmacc.flows.ingest import ingest
from cmacc.ingest import Ledger
from cmacc.ingest.world import World, WorldConfig, render_world
from cmacc.shards.dataset import Dataset
from cmacc.shards.lint import lint

SMALL = {"short_side": 48, "fps": 8, "gop": 8, "shard_mb": 1}
PER_S = 2.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    config = WorldConfig(clips=60, eval_clips=15, clip_s=1.0, clips_per_file=2, seed=12)
    return render_world(tmp_path_factory.mktemp("world"), config, workers=2)


@pytest.fixture(scope="module")
def unbroken(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of the list: key and sha256 of the media members of each clip."""
    home = tmp_path_factory.mktemp("unbroken")
    ingest.fn([str(world.train_manifest)], str(home), url_template=str(world.root / "media" / "{id}.mp4"), **SMALL)
    return members(home)


def members(home: Path) -> dict[str, bytes]:
    dataset = Dataset.open(home)
    digests = dataset.catalog.column("sha256")
    found = {str(key): digests[row].tobytes() for row, key in enumerate(dataset.keys)}
    assert len(found) == len(dataset), "no clip is there twice"
    return found


def check(home: Path, unbroken: dict[str, bytes]) -> None:
    assert members(home) == unbroken
    assert not lint(home)
    assert not (home / "parts").exists()
    assert list((home / "ingest").glob("staging/*")) == []
    with Ledger(home / "ingest" / "ledger.sqlite") as ledger:
        counts = ledger.counts()
        assert (counts.rows, counts.done) == (60, 60)
        names = {shard.name for shard in Dataset.open(home).meta.shards}
        assert set(ledger.shards()) == names
        assert max(row["attempts"] for row in ledger.rows()) <= 2


@contextmanager
def served(root: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """URL of a server of the world's files, and when each was first asked for."""
    first: dict[str, float] = {}

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(root))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            first.setdefault(self.path, time.monotonic())
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # of a client that was killed
                super().do_GET()

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", first
    server.shutdown()


def until(true: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.2)


def kill_with_all_it_started(process: subprocess.Popen[bytes]) -> None:
    """As when a machine goes: the worker, the flow runs it has started, and their children."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=10)


def start(server: Prefect, world: World, home: Path, url: str) -> subprocess.Popen[str]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command = [
        BIN / "cmacc", "ingest", world.train_manifest, "--out", home, "--url-template", url + "/media/{id}.mp4", "--parts", 2,
        "--videos-per-hour", 3600 * PER_S, "--set", "lost_after_s=12", "--workers", 1, *options,
    ]  # fmt: skip
    return subprocess.Popen(
        [str(part) for part in command], env=server.environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.long
def test_two_workers_share_one_ingest_and_one_dies(world: World, unbroken: dict[str, bytes], tmp_path: Path) -> None:
    """The same clips as one process makes, nothing twice, one budget for all; a lost worker's parts are begun again."""
    home = tmp_path / "data"
    with prefect(tmp_path) as server, served(world.root) as (url, asked):
        server.call("prefect", "work-pool", "create", "local", "--type", "process")
        server.call("prefect", "deploy", "--name", "ingest-part/local")
        with server.worker("worker-1", limit=1) as first, server.worker("worker-2", limit=1):
            flow = start(server, world, home, url)
            until(lambda: len(asked) >= 4 and len(list(home.glob("parts/*/alive"))) == 2, flow)
            kill_with_all_it_started(first)
            said, _ = flow.communicate(timeout=400)
    assert flow.returncode == 0, said
    assert "its worker is lost; beginning it again" in said
    check(home, unbroken)
    times = sorted(asked.values())
    assert len(times) == 30
    assert times[-1] - times[0] >= (len(times) - 1) / PER_S * 0.8, "two parts on two workers keep one budget"


@pytest.mark.long
def test_a_dask_cluster_does_the_same(world: World, unbroken: dict[str, bytes], tmp_path: Path, prefect_server: None) -> None:
    """Two processes, of which one is killed in the middle."""
    from distributed import LocalCluster

    home = tmp_path / "data"
    with (
        served(world.root) as (url, asked),
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1") as cluster,
    ):
        workers = [worker.process.pid for worker in cluster.workers.values()]

        def kill_one() -> None:
            while len(asked) < 6:
                time.sleep(0.1)
            for process in psutil.Process(workers[0]).children(recursive=True):
                process.kill()
            psutil.Process(workers[0]).kill()

        killer = threading.Thread(target=kill_one, daemon=True)
        killer.start()
        options = {"url_template": url + "/media/{id}.mp4", "videos_per_hour": 3600 * 4.0, **SMALL}
        counts = ingest([str(world.train_manifest)], str(home), dask=cluster.scheduler_address, **options)
        killer.join(1)
        assert not killer.is_alive()
    assert counts["done"] == 60
    check(home, unbroken)


def test_a_run_that_its_worker_took_and_never_began_is_begun_again(tmp_path: Path) -> None:
    """The worker died between Pending and Running. A run that waits for a worker, or was taken just now, is left alone."""
    from prefect.states import Late, Pending, Running

    state, set_to, made = Pending(), [], []

    class Server:
        def read_flow_run(self, of: UUID) -> object:
            return SimpleNamespace(id=of, state=state, start_time=state.timestamp, name="part")

        def set_flow_run_state(self, of: UUID, to: object, force: bool) -> None:
            set_to.append((of, to.type.value))

        def create_flow_run_from_deployment(self, *_: object, name: str, **__: object) -> object:
            made.append(name)
            return SimpleNamespace(id=uuid4())

    ledger = SimpleNamespace(count_todo=lambda part: (5, 2))
    (tmp_path / "ingest").mkdir()
    runs = parts._Runs(tmp_path, 1, Server(), uuid4(), lost_after_s=10)
    assert not runs.done(0, ledger)
    assert not runs.done(0, ledger) and len(made) == 1
    lost = UUID(runs.runs[0].id)
    long_ago = state.timestamp - timedelta(seconds=71)
    for waits in (Late(timestamp=long_ago), Running()):
        state = waits
        assert not runs.done(0, ledger) and len(made) == 1
    state = Pending(timestamp=long_ago)
    assert not runs.done(0, ledger)
    assert set_to == [(lost, "CRASHED")] and len(made) == 2 and UUID(runs.runs[0].id) != lost


def test_a_server_that_is_away_for_a_while_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it refuses the connection or answers 503. What it refuses by right, or does for too long, is told."""
    monkeypatch.setattr(parts, "_LOOK_EVERY_S", 0.01)
    asked = httpx.Request("GET", "http://127.0.0.1:1")

    def answer(status: int) -> httpx.HTTPStatusError:
        return httpx.HTTPStatusError("no", request=asked, response=httpx.Response(status, request=asked))

    errors: list[Exception] = [httpx.ConnectError("refused"), answer(503), httpx.ReadError("cut")]

    def ask() -> str:
        if errors:
            raise errors.pop(0)
        return "there"

    assert parts._patiently(ask) == "there"
    assert caplog.text.count("does not answer (refused)") == 1
    errors = [answer(404)]
    with pytest.raises(httpx.HTTPStatusError):
        parts._patiently(ask)
    monkeypatch.setattr(parts, "_AWAY_S", 0.05)
    errors = [httpx.ConnectError("refused")] * 1000
    with pytest.raises(httpx.ConnectError):
        parts._patiently(ask)
    assert errors


def test_parts_need_a_server(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parts need a Prefect server"):
        ingest.fn([str(world.train_manifest)], str(tmp_path), parts=2, **SMALL)
