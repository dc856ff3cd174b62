"""The ingest flow: what goes in is accounted for, whatever the source does, and running it again continues it."""

from __future__ import annotations

import csv
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import webdataset

from cmacc.flows.ingest import ingest
from cmacc.flows.progress import in_time
from cmacc.flows.status import forecast, status
from cmacc.ingest import Cause, IngestFailure, Ledger, Pace, Totals
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
    counts = ingest([str(table)], str(tmp_path / "data"), allow_private=True, **SMALL)
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
    """A site that has had enough of every visitor until it is `patient` again: 429, and then the file."""

    asked = 0
    patient = False
    file = b""

    def do_GET(self) -> None:
        type(self).asked += 1
        body = self.file if self.patient else b""
        self.send_response(200 if self.patient else 429)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "video/mp4")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def too_many(world: World) -> Iterator[tuple[str, type[TooMany], Path]]:
    """(URL, the handler's class, a good file)."""
    good = next(iter(sorted((world.root / "media").glob("*.mp4"))))
    handler = type("Handler", (TooMany,), {"file": good.read_bytes()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler, good
    server.shutdown()


def enough(tmp_path: Path, url: str, good: Path, remote: int) -> str:
    table = tmp_path / "list.csv"
    table.write_text("url,start,end\n" + "".join(f"{url}/{i}.mp4,0.5,1.5\n" for i in range(remote)) + f"{good},0.5,1.5\n")
    return str(table)


def test_a_rate_limit_parks_its_site_and_loses_nothing(too_many: tuple[str, type[TooMany], Path], tmp_path: Path) -> None:
    url, site, good = too_many
    table = enough(tmp_path, url, good, 40)
    with pytest.raises(IngestFailure, match="1 clips are done and safe, the same command goes on later") as stopped:
        ingest.fn([table], str(tmp_path / "data"), workers=1, allow_private=True, **SMALL)
    assert stopped.value.cause is Cause.RATE_LIMITED
    assert len(Dataset.open(tmp_path / "data")) == 1, "what lies elsewhere is done meanwhile"
    assert site.asked < 10
    asked = site.asked
    with pytest.raises(IngestFailure, match="same command goes on"):
        ingest.fn([table], str(tmp_path / "data"), workers=1, allow_private=True, **SMALL)
    assert site.asked == asked, "its hour is not over"
    with Ledger(tmp_path / "data" / "ingest" / "ledger.sqlite") as ledger:
        counts = ledger.counts()
        ((host, (until, cause, _)),) = ledger.closed_hosts().items()
    assert (counts.rows, counts.done) == (41, 1)
    assert counts.pending >= 38
    assert (host, cause) == (url.removeprefix("http://"), "rate-limited")
    assert until > time.time() + 3000
    assert status(str(tmp_path / "data"))[f"closed: {host}"].startswith("rate-limited, until 20")


def test_a_parked_site_is_waited_for(too_many: tuple[str, type[TooMany], Path], tmp_path: Path) -> None:
    url, site, good = too_many

    def relent() -> None:
        while not site.asked:
            time.sleep(0.05)
        time.sleep(1)
        site.patient = True

    threading.Thread(target=relent, daemon=True).start()
    table = enough(tmp_path, url, good, 3)
    counts = ingest.fn(
        [table],
        str(tmp_path / "data"),
        workers=1,
        allow_private=True,
        when_parked="wait",
        options={"pace.park_s": "3", "fetch.retries": "0"},
        **SMALL,
    )
    assert (counts["done"], counts["failed"], counts["pending"]) == (4, 0, 0)
    with Ledger(tmp_path / "data" / "ingest" / "ledger.sqlite") as ledger:
        assert sorted(row["attempts"] for row in ledger.rows())[-1] == 2, "the video that was refused is tried once more"


def test_a_site_has_its_budget(world: World, tmp_path: Path) -> None:
    with serve(world.root) as url:
        began = time.monotonic()
        counts = ingest.fn(
            [str(world.train_manifest)],
            str(tmp_path / "data"),
            url_template=url + "/media/{id}.mp4",
            videos_per_hour=3600 * 4,
            **SMALL,
        )
    with Ledger(tmp_path / "data" / "ingest" / "ledger.sqlite") as ledger:
        videos = len({row["source"] for row in ledger.rows()})
    assert counts["done"] == 30
    assert time.monotonic() - began > (videos - 1) / 4 * 0.8


def test_the_opt_out_list_is_honoured(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = list(dict.fromkeys(line.split(",")[0] for line in world.train_manifest.read_text().splitlines() if line[0] != "#"))
    listed = tmp_path / "opt-out.txt"
    listed.write_text(f"# asked on Monday\n{names[0]}\nhttps://youtu.be/{names[1]}\n")
    arguments = ([str(world.train_manifest)], str(tmp_path / "data"))
    options = {"url_template": template(world), **SMALL}
    counts = ingest.fn(*arguments, opt_out=str(listed), **options)
    dataset = Dataset.open(tmp_path / "data")
    sources = {str(source) for source in dataset.catalog.texts("source")}
    assert counts["causes"] == {"opted-out": 30 - len(dataset)}
    assert counts["rows"] == 30
    assert sources == {f"yt_{name}" for name in names[2:]}
    listed.write_text(f"yt_{names[2]}\n")
    with caplog.at_level("WARNING"):
        counts = ingest.fn(*arguments, opt_out=str(listed), retry=["opted-out"], **options)
    assert counts["done"] == 30
    assert "on the opt-out list are in shards already" in caplog.text


def test_near_duplicates_are_marked_or_left_out(world: World, tmp_path: Path) -> None:
    """The same video at three addresses: as a column, the later ones name the first; as a filter, they fail."""
    first, other, *_ = sorted((world.root / "media").glob("*.mp4"))
    copies = tmp_path / "media"
    copies.mkdir()
    for name, source in (("a", first), ("b", other), ("c", first), ("d", first)):
        (copies / f"{name}.mp4").write_bytes(source.read_bytes())
    table = tmp_path / "list.csv"
    table.write_text("path,start,end\n" + "".join(f"media/{n}.mp4,0,1\n" for n in "abcd"))
    assert ingest.fn([str(table)], str(tmp_path / "column"), **SMALL)["done"] == 4
    dataset = Dataset.open(tmp_path / "column")
    keys = dataset.keys.tolist()
    assert dataset.catalog.texts("duplicate_of").tolist() == ["", "", keys[0], keys[0]]
    assert not lint(tmp_path / "column")
    filtered = ingest.fn([str(table)], str(tmp_path / "filter"), options={"checks.near_duplicate": "filter"}, **SMALL)
    assert (filtered["done"], filtered["causes"]) == (2, {"near-duplicate": 2})
    assert Dataset.open(tmp_path / "filter").keys.tolist() == keys[:2]
    assert list((tmp_path / "filter" / "ingest" / "staging").iterdir()) == []
    again = ingest.fn([str(table)], str(tmp_path / "filter"), options={"checks.near_duplicate": "filter"}, **SMALL)
    assert again == filtered


def test_temporary_files_stay_within_their_room(world: World, tmp_path: Path) -> None:
    """Hardly any room: shards are cut early, and nothing is lost; none at all: one sentence."""
    arguments = ([str(world.train_manifest)], str(tmp_path / "data"))
    options = {"url_template": template(world), **SMALL, "shard_mb": 64}
    assert ingest.fn(*arguments, options={"scratch_gb": "0.0002"}, **options)["done"] == 30
    dataset = Dataset.open(tmp_path / "data")
    assert len(dataset.meta.shards) > 1
    assert not lint(tmp_path / "data")
    with pytest.raises(ValueError, match="scratch_gb is 0"):
        ingest.fn([str(world.train_manifest)], str(tmp_path / "none"), options={"scratch_gb": "0"}, **options)


def test_status_tells_where_it_stands(cmacc, world: World, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    whole(cmacc, world, tmp_path / "data")
    said = cmacc("status", tmp_path / "data", "--price-hour", 2, "--rows", tmp_path / "rows.csv", "--json").stdout
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["key"] for row in rows} == set(Dataset.open(tmp_path / "data").keys)
    assert {row["state"] for row in rows} == {"done"}
    found = json.loads(said)
    assert (found["rows"], found["done"], found["pending"], found["failed"]) == ("30", "30", "0", "0")
    assert float(found["cost of 1,000 clips"].split()[0]) > 0
    assert "time left" not in found
    assert "--out" in cmacc("status", tmp_path, code=1).stderr


def test_the_forecast_is_honest() -> None:
    """Two million clips of as many videos, at a guest session's pace, are most of a year, however fast the machine is."""
    fast = Totals(done=100_000, seconds=3600)
    ahead = forecast({"youtube.com": (2_000_000, 2_000_000)}, fast, Pace())
    assert ahead.seconds == pytest.approx(2_000_000 / 300 * 3600)
    assert in_time(ahead.seconds) == "278 days"
    assert ahead.limit == "300 videos an hour from youtube.com"
    slow = forecast({"youtube.com": (10, 1000), "": (5, 5)}, Totals(done=10, seconds=1000), Pace())
    assert slow.seconds == pytest.approx(1005 * 100)
    assert slow.limit == "the speed of late"
    assert forecast({}, fast, Pace()).seconds == 0
    assert forecast({"": (5, 5)}, Totals(), Pace()).seconds is None


def whole(cmacc, world: World, home: Path) -> Path:  # type: ignore[no-untyped-def]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    cmacc("ingest", world.train_manifest, "--out", home, "--url-template", template(world), *options)
    return home
