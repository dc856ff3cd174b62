"""A flow run whose worker is killed, on a real server: marked Crashed, started again, and not for ever."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun
from servers import Prefect, prefect, serving
from test_flows_parts import kill_with_all_it_started

from cmacc.ingest.world import WorldConfig, render_world
from cmacc.shards.dataset import Dataset

PASSWORD = ("cmacc", "of the trial")


def asked(server: Prefect, path: str, **about: Any) -> Any:
    """What the server answers to one that knows its password."""
    answer = httpx.post(f"{server.environment['PREFECT_API_URL']}/{path}", json=about, auth=PASSWORD, timeout=120)
    return answer.raise_for_status().json()


def run(server: Prefect) -> FlowRun:
    (only,) = asked(server, "flow_runs/filter")
    return FlowRun.model_validate(only)


def heartbeats(server: Prefect) -> int:
    total: int = asked(server, "events/filter", filter={"event": {"name": ["prefect.flow-run.heartbeat"]}})["total"]
    return total


def until_it_is(server: Prefect, *names: str, seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while run(server).state_name not in names:
        assert time.monotonic() < deadline, f"it is {run(server).state_name}, not {' or '.join(names)}"
        time.sleep(0.5)


@pytest.mark.long
def test_a_lost_run_starts_again_so_often_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of a worker and of the run that it has begun, twice, on a server with a password, where one restart is allowed.

    Of the deployments only those of the pool `local` are made where only that pool is. By hand, the Crashed run goes on too.
    """
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", ":".join(PASSWORD))
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", ":".join(PASSWORD))
    world = render_world(tmp_path / "world", WorldConfig(clips=15, eval_clips=15, clip_s=1.0), workers=1)
    with serving(world.root / "media") as media, prefect(tmp_path) as server:
        server.call("prefect", "work-pool", "create", "local", "--type", "process")
        said = server.call("prefect", "deploy", "--all", code=1)
        assert "'docker' which does not exist" in " ".join(said.split())
        server.call("cmacc", "server-setup", "--lost-after", "75", "--restarts", "1")
        given = {
            "manifests": [str(world.train_manifest)], "url_template": media.url + "/{id}.mp4", "out": str(tmp_path / "data"),
            "short_side": 48, "fps": 8, "workers": 1, "options": {"fetch.socket_timeout_s": 300},
        }  # fmt: skip
        parameters = [part for name, value in given.items() for part in ("-p", f"{name}={json.dumps(value)}")]
        server.call("cmacc", "run", "ingest", *parameters)
        media.of, media.faults = ".mp4", ["mute"] * 1000
        for begun, then in (1, ("AwaitingRetry", "Late")), (2, ("Crashed",)):
            before = heartbeats(server)
            with server.worker(f"worker-{begun}") as worker:
                until_it_is(server, "Running")
                while heartbeats(server) == before:
                    time.sleep(0.5)
                kill_with_all_it_started(worker)
            assert run(server).state_name == "Running", "as Prefect leaves it"
            until_it_is(server, *then)
            assert run(server).run_count == begun
        with server.worker("worker-3"):
            while "started" not in (tmp_path / "worker-3.log").read_text():
                time.sleep(0.5)
            time.sleep(10)  # it asks for work every second
            left = run(server)
            assert left.state and (left.state_name, left.run_count) == ("Crashed", 2)
            assert left.state.message == "no sign of life for 75 s"
            media.faults = []
            server.call("prefect", "flow-run", "retry", str(run(server).id))
            until_it_is(server, "Completed")
    assert len(Dataset.open(tmp_path / "data")) == 15
