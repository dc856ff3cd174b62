"""End to end with Prefect: a real server and worker on a free port run all four deployments, as README tells it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from servers import prefect
from train_data import clips, write_dataset

from cmacc.ingest.world import WorldConfig, render_world
from cmacc.shards.dataset import Dataset
from cmacc.train.evaluation.results import read_results
from cmacc.train.running.metrics import MetricsLog

TINY = {
    "steps": 6, "log_every": 2, "eval_every": 6, "checkpoint.steps": 6, "loader.batch": 4, "view.frames": 4, "view.size": 24,
    "view.view_s": 0.5, "objective.dictionary": 16, "objective.candidates": 32, "objective.share_start": 0,
    "objective.share_ramp": 0,
}  # fmt: skip


def test_four_deployments_on_a_real_server(tmp_path: Path) -> None:
    world = render_world(tmp_path / "world", WorldConfig(clips=15, eval_clips=15, clip_s=1.0, seed=2), workers=2)
    data, out = str(tmp_path / "data"), str(tmp_path / "run")
    with prefect(tmp_path) as server:

        def run(name: str, **parameters: object) -> None:
            given = [part for key, value in parameters.items() for part in ("-p", f"{key}={json.dumps(value)}")]
            server.call("cmacc", "run", name, "--watch", *given)

        assert "no deployment of 'ingest'" in server.call("cmacc", "run", "ingest", code=1)
        server.call("cmacc", "server-setup")
        server.call("prefect", "deploy", "--all")
        assert "evaluate/k8s" in server.call("prefect", "deployment", "ls"), "it needs neither Docker nor a cluster"
        with server.worker():
            lists = [f"train={world.train_manifest}", f"eval={world.eval_manifest}"]
            run("ingest", manifests=lists, url_template=str(world.root / "media" / "{id}.mp4"), out=data, short_side=48, fps=8)
            run("reshard/local", sources=[data], out=str(tmp_path / "few"), where="list_contains(labels, 'bell')")
            run("pretrain", data=data, out=out, options=TINY)
            run("evaluate", model=out, on=[f"retrieval:{data}"], views=1, batch=4)

    assert len(Dataset.open(data)) == 30
    assert set(Dataset.open(tmp_path / "few").catalog.labels()) == {("bell",)}
    assert (tmp_path / "run" / "picture.png").stat().st_size > 10_000
    scores = [result for result in read_results(out) if result.protocol == "retrieval"]
    assert {(r.encoder, r.over, r.settings["step"]) for r in scores} == {(n, 15, TINY["steps"]) for n in ("trained", "random")}


def until(true: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.2)


@pytest.mark.long
def test_pretraining_goes_on_after_its_worker_died(tmp_path: Path) -> None:
    """kill -9 of the worker's process group: the flow run, torchrun and its rank leave too, and the next worker goes on."""
    data, run = write_dataset(tmp_path / "data", clips()).url, tmp_path / "run"
    options = TINY | {"steps": 100_000, "log_every": 1, "eval_every": 100_000, "checkpoint.steps": 5, "loader.threads": 1}

    def steps() -> list[int]:
        return [record["step"] for record in MetricsLog.read(run / "metrics.jsonl") if "loss/total" in record]

    def of_the_run() -> list[int]:
        every = psutil.process_iter(["pid", "cmdline"])
        return [p.info["pid"] for p in every if any(str(run) in part for part in p.info["cmdline"] or ())]

    with prefect(tmp_path) as server:
        server.call("prefect", "work-pool", "create", "local", "--type", "process")
        server.call("prefect", "deploy", "--name", "pretrain/local")
        again = [f"{name}={json.dumps(value)}" for name, value in {"data": data, "out": str(run), "options": options}.items()]
        begin = ["cmacc", "run", "pretrain", *(part for each in again for part in ("-p", each))]
        with server.worker("worker-1") as first:
            server.call(*begin)
            until(lambda: len(steps()) > 6)
            os.killpg(first.pid, signal.SIGKILL)
            until(lambda: not of_the_run())
        before = steps()
        with server.worker("worker-2"):
            server.call(*begin)
            until(lambda: len(steps()) > len(before) + 5)
            shown = server.call("prefect", "artifact", "ls")
    assert steps() == list(range(1, len(steps()) + 1)), "each step once"
    assert "pretrain-prog" in shown
    until(lambda: not of_the_run())
