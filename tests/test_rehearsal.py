"""The rehearsal's own pieces: what is killed when, how a difference is found, and that nothing it started outlives it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
import safetensors.numpy
from train_data import clips as make_clips
from train_data import write_dataset

REHEARSAL = Path(__file__).resolve().parents[1] / "infra" / "rehearsal"
NAMES = ("evidence", "hosts", "processes", "rehearsal", "schedule", "striking", "table")


@pytest.fixture(scope="module")
def cloud() -> Iterator[ModuleType]:
    """The rehearsal's modules, which import each other by bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REHEARSAL))
        yield SimpleNamespace(**{name: __import__(name) for name in NAMES})  # type: ignore[misc]


def until(true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.05)


# --- what is killed when ---


def test_the_schedule_is_a_function_of_the_seed(cloud: Any) -> None:
    for seed in range(40):
        kills = cloud.schedule.schedule(seed, 120, 42)
        assert kills == cloud.schedule.schedule(seed, 120, 42)
        assert sorted(kill.what for kill in kills) == ["Prefect server", "S3 endpoint", "ingest worker", "trainer node"]
        for phase, whole in (("ingest", 120), ("pretrain", 42)):
            first, second = (kill.at for kill in kills if kill.phase == phase)
            assert 0.1 * whole < first < second < 0.9 * whole
        assert all(kill.away_s == 30 for kill in kills if kill.host in ("s3", "prefect"))
        assert 10 < cloud.schedule.change_of_ranks(seed, 42) < 32


def test_every_order_and_host_is_drawn(cloud: Any) -> None:
    drawn = [cloud.schedule.schedule(seed, 120, 42) for seed in range(60)]
    orders = {tuple(kill.what for kill in kills) for kills in drawn}
    hosts = {kill.host for kills in drawn for kill in kills}
    assert len(orders) == 4
    assert hosts == {"worker-1", "worker-2", "node-1", "node-2", "prefect", "s3"}
    assert len({tuple(kill.at for kill in kills) for kills in drawn}) > 50


# --- what two runs differ in ---


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    home = tmp_path_factory.mktemp("rehearsal") / "data"
    write_dataset(home, make_clips()[:6], per_shard=3)
    return [path.read_bytes() for path in sorted(home.glob("*.tar"))]


def test_a_missing_clip_and_another_byte_are_found(cloud: Any, tars: list[bytes]) -> None:
    wanted = cloud.evidence.clips_of(tars)
    assert len(wanted) == 3 * 6
    assert cloud.evidence.differences(wanted, cloud.evidence.clips_of(reversed(tars)), "clips") == []
    missing = cloud.evidence.differences(wanted, cloud.evidence.clips_of(tars[:1]), "clips")
    assert len(missing) == 9 and all(sentence.endswith(" is missing") for sentence in missing)
    assert len(cloud.evidence.differences(cloud.evidence.clips_of(tars[:1]), wanted, "clips")) == 9
    name, at = next((name, tars[0].index(name.encode())) for name in wanted if name.endswith(".mp4") and name.encode() in tars[0])
    changed = bytearray(tars[0])
    changed[at + 512 + 40] ^= 1  # past the member's header
    (sentence,) = cloud.evidence.differences(wanted, cloud.evidence.clips_of([bytes(changed), tars[1]]), "clips")
    assert sentence.startswith(f"clips: {name} is ")
    with pytest.raises(ValueError, match="is in two shards"):
        cloud.evidence.clips_of([*tars, tars[0]])


def test_another_loss_is_found_and_another_speed_is_none(cloud: Any, tmp_path: Path) -> None:
    records = [{"step": 0, "held_out/R@5": 0.25}] + [
        {"step": step, "loss/total": 3.0 / step, "speed/clips_per_s": 9.0 * step, "memory/rss": step} for step in (1, 2, 3)
    ]

    def curve(*changes: dict[str, Any]) -> dict[str, Any]:
        path = tmp_path / "metrics.jsonl"
        changed = {change["step"]: change for change in changes}
        path.write_text("".join(json.dumps({**record, **changed.get(record["step"], {})}) + "\n" for record in records))
        found: dict[str, Any] = cloud.evidence.curve_of(path)
        return found

    wanted = curve()
    assert list(wanted) == ["held-out clips at step 0", "loss at step 1", "loss at step 2", "loss at step 3"]
    assert cloud.evidence.differences(wanted, curve({"step": 2, "speed/clips_per_s": 1.0, "memory/rss": 9}), "curve") == []
    loss = float(np.nextafter(1.5, 2))
    (sentence,) = cloud.evidence.differences(wanted, curve({"step": 2, "loss/total": loss}), "curve")
    assert sentence == f"curve: loss at step 2 has loss/total {loss}, not 1.5"


def test_global_batches_are_read_from_the_pools(cloud: Any) -> None:
    def pool(*entries: tuple[int, int]) -> bytes:
        ids, born = np.ascontiguousarray(np.array(entries, dtype=np.int64).T)
        return bytes(safetensors.numpy.save({"model.memory.pool_video.ids": ids, "model.memory.pool_video.born": born}))

    first, second = pool((4, 0), (2, 0), (7, 1), (-1, 1)), pool((4, 2), (2, 0), (7, 1), (9, 2))
    found = cloud.evidence.batches_of({3: second, 0: pool((-1, 0)), 2: first})
    assert found == {"batch of step 1": [4, 2], "batch of step 2": [7], "batch of step 3": [4, 9]}
    other = cloud.evidence.batches_of({3: pool((4, 2), (2, 0), (7, 1), (5, 2)), 2: first})
    (sentence,) = cloud.evidence.differences(found, other, "batches")
    assert sentence == "batches: batch of step 3 is [4, 5], not [4, 9]"


def test_the_table_says_what_was_killed_when(cloud: Any) -> None:
    kill = cloud.schedule.Kill("trainer node", "node-2", "pretrain", 11, 7.5)
    text = cloud.table.kills([cloud.striking.Struck(kill, 12, 3, 61.7, 8.1)], {"node-2": "10.0.0.2"}, {"pretrain": 42}, [])
    head, line, row = text.splitlines()
    assert head.startswith("killed (kill -9)") and set(line) == {"-", " "}
    assert row.split("  ")[0] == "trainer node"
    assert "12 of 42 steps (drawn: 11), 62 s" in row and "10.0.0.2" in row and row.endswith("nothing")
    assert "see below" in cloud.table.kills(
        [cloud.striking.Struck(kill, 12, 3, 61.7, 8.1)], {"node-2": ""}, {"pretrain": 42}, ["x"]
    )


# --- processes and hosts ---

FAMILY = """
import subprocess, sys, time
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)
"""
"""A process that starts another, in a session of its own."""


def test_a_host_dies_whole_and_alone(cloud: Any, tmp_path: Path) -> None:
    one, other = cloud.hosts.Host("one"), cloud.hosts.Host("other")
    with cloud.processes.Processes(tmp_path / "logs") as processes:
        processes.start(one, "one", [sys.executable, "-c", FAMILY], dict(os.environ)).wait()  # what it started is an orphan now
        processes.start(one, "one", [sys.executable, "-c", f"{FAMILY}time.sleep(600)"], dict(os.environ))
        processes.start(other, "other", ["sleep", "600"], dict(os.environ))
        until(lambda: len(processes.of(one)) == 3)
        family = processes.of(one)
        assert processes.kill(one) == 3
        until(lambda: not any(alive(p) for p in family))
        assert len(processes.of(other)) == 1
        last = processes.of(other)
    assert not any(alive(p) for p in last)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


WORK = """
import sys, os, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hosts import Host
from processes import Processes, ended_by_signals
with ended_by_signals(), Processes(Path(sys.argv[2])) as processes:
    processes.start(Host("one"), "one", [sys.executable, "-c", sys.argv[3] + "time.sleep(600)"], dict(os.environ))
    while len(processes.of(Host("one"))) < 2:
        time.sleep(0.1)
    print(*(p.pid for p in processes.of(Host("one"))), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_leaves_nothing_behind(by: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORK, str(REHEARSAL), str(tmp_path), FAMILY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as work:
        assert work.stdout
        family = [psutil.Process(int(pid)) for pid in work.stdout.readline().split()]
        assert len(family) == 2 and all(alive(p) for p in family)
        work.send_signal(by)
        assert work.wait(60) != 0
    assert not any(alive(p) for p in family)


def test_hosts_on_loopback_have_ports_of_their_own(cloud: Any) -> None:
    hosts, said = cloud.hosts.make_hosts(["one", "two"], loopback=True)
    ports = {host.port(5432) for host in hosts.values()}
    assert len(ports) == 2 and ports == {host.port(5432) for host in hosts.values()}
    assert hosts["one"].at(5432) == f"127.0.0.1:{hosts['one'].port(5432)}" and hosts["one"].command(["true"]) == ["true"]
    assert "127.0.0.1" in said and "asked for" in said


NAMESPACES = """
import sys, subprocess, time
sys.path.insert(0, sys.argv[1])
from hosts import make_hosts
hosts, said = make_hosts(["one", "two"])
if not hosts["one"].namespace:
    sys.exit("no: " + said)
one, two = hosts.values()
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
server = subprocess.Popen(one.command([sys.executable, "-m", "http.server", "--bind", one.address, one.port(8080)]), **quiet)
ask = "import urllib.request, sys; print(urllib.request.urlopen('http://' + sys.argv[1], timeout=5).status)"
for _ in range(100):
    asked = subprocess.run(two.command([sys.executable, "-c", ask, one.at(8080)]), capture_output=True, text=True)
    if asked.returncode == 0:
        break
    time.sleep(0.2)
server.kill()
names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
print(asked.stdout.strip(), one.address != two.address, *sorted(n for n in names if n in hosts))
"""


def test_hosts_are_namespaces_where_permitted(tmp_path: Path) -> None:
    """One reaches the other by its address; the machine itself sees no new network, address or name."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")

    def machine() -> str:
        return "".join(subprocess.run(["ip", *what], capture_output=True, text=True, check=True).stdout
                       for what in (["netns", "list"], ["-o", "link"], ["route"]))  # fmt: skip

    before = machine()
    done = subprocess.run([sys.executable, "-c", NAMESPACES, str(REHEARSAL)], capture_output=True, text=True, check=False)
    if done.returncode and done.stderr.startswith("no: "):
        pytest.skip(done.stderr.removeprefix("no: ").strip())
    assert done.stdout.split() == ["200", "True", "one", "two"], done.stderr
    assert machine() == before


# --- kills beside the work ---


class Stage:
    """Stands in for the services: it notes who was killed and who came back."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.hosts = {name: name for name in ("s3", "prefect", "worker-1", "node-1")}
        self.processes = SimpleNamespace(kill=lambda host: self.done.append(f"kill {host}") or 3)

    def start_s3(self) -> None:
        self.done.append("start s3")

    def start_worker(self, name: str) -> None:
        self.done.append(f"start {name}")


def test_kills_wait_for_their_moment(cloud: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud.striking, "_LOOK_S", 0.01)
    stage, now, struck = Stage(), [0], []
    kills = [cloud.schedule.Kill("w", "worker-1", "ingest", 5, 0.0), cloud.schedule.Kill("s", "s3", "ingest", 9, 0.0)]
    with cloud.striking.striking(stage, kills, lambda: now[0], struck):
        time.sleep(0.1)
        assert stage.done == []
        now[0] = 6
        until(lambda: len(struck) == 1)
        assert stage.done == ["kill worker-1", "start worker-1"]
        now[0] = 9
        until(lambda: len(struck) == 2)
    assert stage.done[2:] == ["kill s3", "start s3"]
    assert [(each.progress, each.processes) for each in struck] == [(6, 3), (9, 3)]


def test_work_that_is_through_too_early_is_no_rehearsal(cloud: Any) -> None:
    kill = cloud.schedule.Kill("S3 endpoint", "s3", "pretrain", 5, 0.0)
    with pytest.raises(RuntimeError, match="through before the S3 endpoint was killed"):  # noqa: SIM117
        with cloud.striking.striking(Stage(), [kill], lambda: 4, []):
            pass


class Actor:
    """Stands in for a play: it notes what it was told to do, and has the evidence that it is given."""

    told: ClassVar[list[tuple[Any, ...]]] = []
    evidence_of: ClassVar[dict[str, Any]] = {}

    def __init__(self, services: Any, name: str, *_: object) -> None:
        self.name, self.struck, self.costs = name, [], {"ingest, seconds": 3}

    def ingest(self, kills: list[Any]) -> None:
        self.told.append((self.name, "ingest", [kill.phase for kill in kills]))

    def reshard(self) -> None:
        self.told.append((self.name, "reshard"))

    def pretrain(self, run: str, nodes: dict[str, int], kills: list[Any] = [], until: int = 0) -> None:  # noqa: B006
        self.told.append((self.name, run, sum(nodes.values()), [kill.phase for kill in kills], until > 0))

    def evidence(self, run: str) -> Any:
        return self.evidence_of[self.name]

    def batches(self, run: str) -> dict[str, list[int]]:
        return {"batch of step 1": [3, 1]}


@pytest.mark.parametrize("other", [False, True])
def test_the_story_is_told_twice_and_compared(
    cloud: Any, other: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With stand-ins for the cloud and the work."""
    import services
    import story

    from cmacc.ingest import world

    stage = SimpleNamespace(environment={"PGPASSWORD": "x"}, prefect_url="", start=lambda *_: None, start_worker=lambda _: None)
    stage.start_site = lambda _: "http://site/{id}"
    rendered = SimpleNamespace(clips=120, files=30, root=tmp_path, train_manifest="t", eval_manifest="e")
    monkeypatch.setattr(services, "Services", lambda *_: stage)
    monkeypatch.setattr(story, "Play", Actor)
    monkeypatch.setattr(world, "render_world", lambda *_, **__: rendered)
    monkeypatch.setattr(cloud.rehearsal, "unfinished", lambda _: [])
    monkeypatch.setenv("PGPASSWORD", "")
    same = cloud.evidence.Evidence({"a.mp4": "1"}, {"clips-0.tar": "2"}, {"loss at step 1": {"loss/total": 2.0}}, {"last": "3"})
    another = cloud.evidence.Evidence(same.clips, same.shards, {"loss at step 1": {"loss/total": 2.5}}, same.weights)
    monkeypatch.setattr(Actor, "evidence_of", {"undisturbed": same, "disturbed": another if other else same})
    monkeypatch.setattr(Actor, "told", [])
    found = cloud.rehearsal.rehearse(0, tmp_path, cloud.hosts.make_hosts(cloud.rehearsal.HOSTS, loopback=True)[0])
    assert Actor.told == [
        ("undisturbed", "ingest", []), ("undisturbed", "reshard"), ("undisturbed", "pretrain", 2, [], False),
        ("disturbed", "ingest", ["ingest"] * 2), ("disturbed", "reshard"), ("disturbed", "pretrain", 2, ["pretrain"] * 2, False),
        ("undisturbed", "elastic", 2, [], True), ("undisturbed", "elastic", 3, [], False),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert found == (["curve: loss at step 1 has loss/total 2.5, not 2.0"] if other else [])
    assert ("different:" in said, "the same in both: 120 clips" in said) == (other, not other)


@pytest.mark.parametrize(("found", "code"), [([], 0), (["clips: one is missing"], 1)])
def test_a_difference_is_an_exit_status(
    cloud: Any, found: list[str], code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cloud.rehearsal, "rehearse", lambda *_: found)
    assert cloud.rehearsal.main(["--loopback", "--out", str(tmp_path / "out")]) == code


@pytest.mark.long
def test_the_whole_of_it_on_loopback(tmp_path: Path) -> None:
    """`make rehearsal` has namespaces where they are permitted; this is the other way, and another seed."""
    command = [sys.executable, str(REHEARSAL / "rehearsal.py"), "--loopback", "--seed", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" nothing") == 4
