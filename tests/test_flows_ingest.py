"""The ingest flow: what goes in is accounted for, whatever the source does, and running it again continues it."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import webdataset

from cmacc.flows.ingest import ingest
from cmacc.ingest import Cause, IngestFailure, Ledger
from cmacc.ingest.world import World, WorldConfig, render_world, serve
from cmacc.shards.dataset import Dataset
from cmacc.shards.lint import lint

SMALL = {"short_side": 48, "fps": 8, "gop": 8, "shard_mb": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    config = WorldConfig(clips=30, eval_clips=15, clip_s=1.0, clips_per_file=4, seed=11)
    return render_world(tmp_path_factory.mktemp("world"), config, workers=2)


def template(world: World) -> str:
    return str(world.root / "media" / "{id}.mp4")


def shards(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(home.glob("clips-*"))}


@pytest.mark.usefixtures("prefect_server")
def test_world_over_http_becomes_a_data_set(world: World, tmp_path: Path) -> None:
    lists = [f"train={world.train_manifest}", f"eval={world.eval_manifest}"]
    with serve(world.root) as url:
        counts = ingest(lists, str(tmp_path / "data"), url_template=url + "/media/{id}.mp4", **SMALL)
        assert counts == {"rows": 45, "done": 45, "failed": 0, "bad_rows": 0, "pending": 0, "causes": {}}
    dataset = Dataset.open(tmp_path / "data")
    assert len(dataset.rows("train")) == 30
    assert len(dataset.rows("eval")) == 15
    assert not lint(tmp_path / "data")
    assert list((tmp_path / "data" / "ingest" / "staging").iterdir()) == []

    tars = [str(path) for path in sorted((tmp_path / "data").glob("*.tar"))]
    found = [sample["__key__"] for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)]
    assert found == dataset.keys.tolist()

    before = shards(tmp_path / "data")
    again = ingest(lists, str(tmp_path / "data"), url_template="http://127.0.0.1:9/{id}.mp4", **SMALL)
    assert again["done"] == 45
    assert shards(tmp_path / "data") == before


@pytest.mark.usefixtures("prefect_server")
def test_every_bad_thing_has_its_cause(world: World, tmp_path: Path) -> None:
    good = world.eval_manifest.read_text().splitlines()
    name = good[-1].split(",")[0]
    truncated = tmp_path / "media" / "truncated00.mp4"
    truncated.parent.mkdir()
    truncated.write_bytes((world.root / "media" / f"{name}.mp4").read_bytes()[:3000])
    rows = [
        f"{truncated},0,1,cut",
        f"{tmp_path}/media/missing.mp4,0,1,missing",
        f"{world.root}/media/{name}.mp4,0.5,1.5,good",
        f"{world.root}/media/{name}.mp4,900,901,beyond",
        f"{world.root}/media/{name}.mp4,2,1,backwards",
        f"{world.root}/media/{name}.mp4,x,1,number",
        "http://127.0.0.1:9/unreachable.mp4,0,1,unreachable",
        ",0,1,nothing",
    ]
    table = tmp_path / "list.csv"
    table.write_text("\n".join(["path,start,end,label", *rows]).replace("path,start", "url,start") + "\n")
    counts = ingest([str(table)], str(tmp_path / "data"), **SMALL)
    assert counts["rows"] == len(rows)
    assert counts["done"] + counts["failed"] + counts["bad_rows"] == len(rows)
    assert (counts["done"], counts["bad_rows"]) == (1, 3)
    assert counts["causes"] == {"undecodable": 1, "gone": 1, "too-short": 1, "network": 1}
    with Ledger(tmp_path / "data" / "ingest" / "ledger.sqlite") as ledger:
        details = [str(row["detail"]) for row in ledger.rows() if row["state"] in ("failed", "bad-row")]
    assert all(details), details


@pytest.mark.usefixtures("prefect_server")
def test_nothing_to_be_had_is_one_sentence(tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text(f"path,start,end\n{tmp_path}/none.mp4,0,1\n")
    with pytest.raises(ValueError, match=r"no clip of .*list\.csv could be had \(1 gone\)"):
        ingest([str(table)], str(tmp_path / "data"), **SMALL)
    with pytest.raises(ValueError, match="there is no cause 'sunshine'"):
        ingest([str(table)], str(tmp_path / "data"), retry=["sunshine"], **SMALL)


@pytest.mark.usefixtures("prefect_server")
def test_failures_are_tried_again_by_cause(world: World, tmp_path: Path) -> None:
    video = tmp_path / "late.mp4"
    table = tmp_path / "list.csv"
    first = next(iter(sorted((world.root / "media").glob("*.mp4"))))
    table.write_text(f"path,start,end\n{video},0.5,1.5\n{first},0.5,1.5\n")
    assert ingest([str(table)], str(tmp_path / "data"), **SMALL)["causes"] == {"gone": 1}
    video.write_bytes(first.read_bytes())
    assert ingest([str(table)], str(tmp_path / "data"), **SMALL)["causes"] == {"gone": 1}
    assert ingest([str(table)], str(tmp_path / "data"), retry=["gone"], **SMALL)["done"] == 2
    assert not lint(tmp_path / "data")


class TooMany(BaseHTTPRequestHandler):
    """A site that has had enough: every request is answered by 429."""

    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(429)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def test_a_rate_limit_stops_the_run_and_loses_nothing(world: World, tmp_path: Path) -> None:
    good = next(iter(sorted((world.root / "media").glob("*.mp4"))))
    server = ThreadingHTTPServer(("127.0.0.1", 0), TooMany)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    table = tmp_path / "list.csv"
    table.write_text("url,start,end\n" + f"{good},0.5,1.5\n" + "".join(f"{url}/{i}.mp4,0,1\n" for i in range(40)))
    with pytest.raises(IngestFailure, match="1 clips are done and safe, the same command goes on later") as stopped:
        ingest.fn([str(table)], str(tmp_path / "data"), workers=1, **SMALL)
    server.shutdown()
    assert stopped.value.cause is Cause.RATE_LIMITED
    assert len(Dataset.open(tmp_path / "data")) == 1
    assert TooMany.asked < 20
    with Ledger(tmp_path / "data" / "ingest" / "ledger.sqlite") as ledger:
        counts = ledger.counts()
    assert counts.rows == 41
    assert counts.pending >= 39


def kill_and_continue(cmacc, world: World, unbroken: Path, home: Path, kills: int, draw: random.Random) -> None:  # type: ignore[no-untyped-def]
    """Kill -9 the command `kills` times while it works, then let it finish: the same bytes as `unbroken`."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    arguments = ("ingest", world.train_manifest, "--out", home, "--url-template", template(world), *options)
    for _ in range(kills):
        child = subprocess.Popen(
            cmacc.command(*arguments), env=cmacc.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        ledger = home / "ingest" / "ledger.sqlite"
        deadline = time.monotonic() + 60
        while not ledger.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 4))
        child.send_signal(signal.SIGKILL)
        child.wait()
    cmacc(*arguments)
    assert not lint(home)
    assert shards(home) == shards(unbroken)
    with Ledger(home / "ingest" / "ledger.sqlite") as ledger:
        assert ledger.counts().done == 30


def whole(cmacc, world: World, home: Path) -> Path:  # type: ignore[no-untyped-def]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    cmacc("ingest", world.train_manifest, "--out", home, "--url-template", template(world), *options)
    return home


def test_kill_and_continue(cmacc, world: World, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    kill_and_continue(cmacc, world, whole(cmacc, world, tmp_path / "whole"), tmp_path / "data", 1, random.Random(1))


@pytest.mark.long
def test_kill_twenty_times_and_continue(cmacc, world: World, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    unbroken = whole(cmacc, world, tmp_path / "whole")
    for trial in range(5):
        kill_and_continue(cmacc, world, unbroken, tmp_path / f"data{trial}", 4, random.Random(trial))
