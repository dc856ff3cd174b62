"""End to end with Prefect: a real server and worker on a free port run all four deployments, as README tells it."""

from __future__ import annotations

import json
from pathlib import Path

from servers import prefect

from cmacc.ingest.world import WorldConfig, render_world
from cmacc.shards.dataset import Dataset

TINY = {
    "steps": 6, "log_every": 2, "eval_every": 6, "checkpoint_every": 6, "loader.batch": 4, "view.frames": 4, "view.size": 24,
    "view.view_s": 0.5, "objective.dictionary": 16, "objective.pool": 32, "objective.share_start": 0, "objective.share_ramp": 0,
}  # fmt: skip


def test_four_deployments_on_a_real_server(tmp_path: Path) -> None:
    world = render_world(tmp_path / "world", WorldConfig(clips=15, eval_clips=15, clip_s=1.0, seed=2), workers=2)
    data, out = str(tmp_path / "data"), str(tmp_path / "run")
    with prefect(tmp_path) as server:

        def run(name: str, **parameters: object) -> None:
            given = [part for key, value in parameters.items() for part in ("-p", f"{key}={json.dumps(value)}")]
            server.call("cmacc", "run", name, "--watch", *given)

        assert "no deployment of 'ingest'" in server.call("cmacc", "run", "ingest", code=1)
        server.call("prefect", "work-pool", "create", "local", "--type", "process")
        server.call("prefect", "deploy", "--all")
        with server.worker():
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
