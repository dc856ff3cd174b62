"""The child process: what it finishes is staged, what kills or hangs it costs one source video."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import av
import pytest
from hostile import served
from test_ingest_media import clapper, ffmpeg

from cmacc.ingest import (
    Cause,
    ClipRequest,
    Crew,
    FetchOptions,
    Gate,
    IngestConfig,
    IngestFailure,
    Ledger,
    Limits,
    Outcome,
    Pace,
    SourceVideo,
    read_staged,
    staged_path,
    transcode,
)
from cmacc.ingest.child import ingest_video
from cmacc.ingest.staging import StagedWriter
from cmacc.ingest.work import _Child
from cmacc.shards.clip import Clip, source_id
from cmacc.shards.profile import profile

TINY = profile("h264", short_side=32, fps=10, gop=5)


def config(**changes: object) -> IngestConfig:
    """With room for what other tests left in this process, which some of the work is done in."""
    given = {"profile": TINY, "fetch": FetchOptions(retries=0, allow_private=True), "timeout_s": 60.0}
    given |= {"limits": Limits(memory_mb=1 << 20)} | changes
    return IngestConfig(**given)  # type: ignore[arg-type]


def video(address: str | Path, *spans: tuple[float, float | None]) -> SourceVideo:
    source = source_id(path=str(address))
    requests = tuple(
        ClipRequest(n, "list", source, str(address), start, end) for n, (start, end) in enumerate(spans or ((0.0, 2.0),))
    )
    return SourceVideo(source, str(address), requests, "site" if "://" in str(address) else "")


def run(videos: list[SourceVideo], staging: Path, **changes: object) -> dict[str, Outcome]:
    with Crew(config(**changes), staging) as crew:
        return {o.key: o for o in crew.work(videos)}


def children() -> set[int]:
    """Process ids of the ingest children of this process."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # threads end at any time
            for pid in (task / "children").read_text().split():
                if b"cmacc.ingest.child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.add(int(pid))
    return found


class Hanging:
    """A server that takes connections and never answers."""

    def __init__(self, server: socket.socket) -> None:
        self.server = server
        self.address = f"http://127.0.0.1:{server.getsockname()[1]}/a.mp4"
        self.taken: list[socket.socket] = []

    def when_taken(self, act: Callable[[], None]) -> threading.Thread:
        """Call act once somebody hangs."""

        def wait() -> None:
            try:
                connection, _ = self.server.accept()
            except OSError:  # the test is over and nobody came
                return
            self.taken.append(connection)
            act()

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        return thread


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Hanging(server)
        server.shutdown(socket.SHUT_RDWR)  # or a thread that waits still would take connections of a later test's server


def test_what_is_done_is_staged_and_not_done_again(tmp_path: Path) -> None:
    path, staging = clapper(tmp_path / "a.mp4"), tmp_path / "staging"
    first, mute = video(path, (0.0, 2.0), (1.0, 3.0)), video(clapper(tmp_path / "mute.mp4", sound=False))
    outcomes = run([first, mute], staging)
    assert [o.cause for o in outcomes.values()] == [None, None, Cause.NO_AUDIO]
    assert [p.name for p in staging.iterdir()] == [f"{first.source}.tar"]
    clips = {clip.key: clip for clip in read_staged(staged_path(staging, first.source))}
    expected = {r.key: made for r, made in transcode(path, first.requests, TINY)}
    assert clips == expected
    for key, clip in clips.items():
        assert clip.members == expected[key].members  # type: ignore[union-attr]
        assert outcomes[key].bytes > sum(map(len, clip.members.values()))
        assert outcomes[key].seconds > 0
    before = staged_path(staging, first.source).read_bytes()
    again = run([first], staging)
    assert [o.detail for o in again.values()] == ["staged before"] * 2
    assert [(o.fingerprint, o.bytes > 0) for o in again.values()] == [(o.fingerprint, True) for o in list(outcomes.values())[:2]]
    assert staged_path(staging, first.source).read_bytes() == before
    more = run([video(path, (0.0, 2.0), (2.0, 3.5))], staging)
    assert [o.cause for o in more.values()] == [None, None]
    staged = list(read_staged(staged_path(staging, first.source)))
    assert len(staged) == 3
    assert clips.items() <= {clip.key: clip for clip in staged}.items()


def test_a_damaged_staged_tar_is_made_again(tmp_path: Path) -> None:
    wanted, staging = video(clapper(tmp_path / "a.mp4")), tmp_path / "staging"
    staging.mkdir()
    staged_path(staging, wanted.source).write_bytes(b"half a ta")
    assert [o.cause for o in run([wanted], staging).values()] == [None]
    assert len(list(read_staged(staged_path(staging, wanted.source)))) == 1


def test_a_crash_costs_one_source_video(tmp_path: Path, hanging: Hanging) -> None:
    good, after = (video(clapper(tmp_path / f"{n}.mp4")) for n in "ab")
    dies = video(hanging.address)
    thread = hanging.when_taken(lambda: os.kill(children().pop(), signal.SIGSEGV))
    outcomes = run([good, dies, after], tmp_path / "staging")
    thread.join(5)
    assert [o.cause for o in outcomes.values()] == [None, Cause.CRASH, None]
    assert "SIGSEGV" in outcomes[dies.requests[0].key].detail
    assert not children()
    assert sorted(p.suffix for p in (tmp_path / "staging").iterdir()) == [".tar", ".tar"]


def test_a_hang_costs_its_time_limit(tmp_path: Path, hanging: Hanging) -> None:
    slow, after = video(hanging.address), video(clapper(tmp_path / "a.mp4"))
    began = time.monotonic()
    outcomes = run([slow, after], tmp_path / "staging", timeout_s=3.0)
    assert [o.cause for o in outcomes.values()] == [Cause.TIMEOUT, None]
    assert 3 <= time.monotonic() - began < 25
    assert not children()


def test_a_crash_in_one_clip_costs_that_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child dies whenever it is to make the second clip: the others are made one by one."""
    asked = []

    def dies_of_the_second(self: _Child, question: dict, limit_s: float) -> dict:  # type: ignore[type-arg]
        asked.append([r["start_s"] for r in question["requests"]])
        if 1.0 in asked[-1]:
            self.kill()
        return really(self, question, limit_s)

    really = _Child.ask
    monkeypatch.setattr(_Child, "ask", dies_of_the_second)
    outcomes = run([video(clapper(tmp_path / "a.mp4"), (0.0, 1.0), (1.0, 2.0), (2.0, 3.0))], tmp_path / "staging")
    assert [o.cause for o in outcomes.values()] == [None, Cause.CRASH, None]
    assert asked == [[0.0, 1.0, 2.0], [0.0], [1.0], [2.0]]
    (tar,) = (tmp_path / "staging").iterdir()
    assert len(list(read_staged(tar))) == 2


def test_a_child_serves_many_groups_and_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmacc.ingest.work._VIDEOS_A_CHILD", 2)
    videos = [video(clapper(tmp_path / f"{n}.mp4")) for n in "abc"]
    with Crew(config(), tmp_path / "staging") as crew:
        pids = []
        for each in videos:
            list(crew.work([each]))
            pids.append(children())
    assert pids[0] == {*pids[0]} and len(pids[0]) == 1
    assert pids[1] == set(), "after two videos it has done its share"
    assert len(pids[2]) == 1 and pids[2] != pids[0]
    assert not children()


def test_stopping_kills_the_child(tmp_path: Path, hanging: Hanging) -> None:
    good, slow = video(clapper(tmp_path / "a.mp4")), video(hanging.address)
    with Crew(config(), tmp_path / "staging") as crew:
        assert [o.cause for o in crew.work([good])] == [None]
        assert len(children()) == 1
        hanging.when_taken(crew.stop)
        assert [o.cause for o in crew.work([slow])] == [Cause.CRASH]
        with pytest.raises(RuntimeError, match="stopped"):
            list(crew.work([video(clapper(tmp_path / "b.mp4"))]))
    assert not children()


def test_the_child_dies_with_its_parent(tmp_path: Path, hanging: Hanging) -> None:
    code = f"""
from pathlib import Path
from cmacc.ingest import ClipRequest, Crew, FetchOptions, IngestConfig, SourceVideo
address = {hanging.address!r}
video = SourceVideo("url_0", address, (ClipRequest(1, "m", "url_0", address),))
list(Crew(IngestConfig(fetch=FetchOptions(allow_private=True)), Path({str(tmp_path)!r})).work([video]))
"""
    hangs = threading.Event()
    hanging.when_taken(hangs.set)
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        assert hangs.wait(60)
        pids = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        assert len(pids) == 1
        parent.kill()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pids[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pids[0]}").exists()


def test_a_site_that_has_had_enough_is_left_alone(tmp_path: Path) -> None:
    good, other = (video(clapper(tmp_path / f"{n}.mp4")) for n in "ab")
    with served({}, "429") as site, Ledger(tmp_path / "ledger") as ledger:
        limited = [replace(video(f"{site.address}/a.mp4?{n}"), host="site") for n in range(5)]
        gate = Gate(ledger, Pace(park_s=3600))
        with Crew(config(), tmp_path / "staging", gate) as crew:
            seen = [o.cause for o in crew.work([good, *limited, other])]
        assert seen == [None, Cause.RATE_LIMITED, None]
        ((host, (until, cause, _)),) = ledger.closed_hosts().items()
    assert (host, cause) == ("site", "rate-limited")
    assert 3500 < until - time.time() < 3700
    assert 1 <= len(site.asked) <= 3, "one video's requests, and nothing after them"


def test_the_gate_keeps_a_sites_budget(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        pace, now = Pace(videos_per_hour=36_000, jitter=0.5), time.time()
        gates = [Gate(ledger, pace), Gate(ledger, pace)]
        remote, local = replace(video("http://h/a.mp4"), host="h"), video(tmp_path / "a.mp4")
        assert all(gates[n % 2].admit(remote) for n in range(21))
        assert time.time() - now > 20 * 0.1 * 0.75, "a tenth of a second each, give or take the jitter"
        assert all(gates[0].admit(local) for _ in range(1000))
        gates[0].close()
        assert not gates[0].admit(remote)
        assert not gates[0].admit(local)
    assert Pace().rate("youtube.com") == 300
    assert Pace().gap_s("elsewhere.org") == 0
    assert Pace(videos_per_hour=0).gap_s("youtube.com") == 0
    with pytest.raises(ValueError, match="park_s is -1"):
        Pace(park_s=-1)


def test_a_full_disk_is_nobodys_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: StagedWriter, clip: Clip) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StagedWriter, "add", full)
    wanted = video(clapper(tmp_path / "a.mp4"))
    with pytest.raises(IngestFailure) as caught:
        ingest_video(wanted, config(), tmp_path)
    assert caught.value.cause is Cause.DISK_FULL
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_an_error_of_our_own_is_a_crash_of_one_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmacc.ingest.child.transcode", lambda *_: 1 / 0)
    (outcome,) = ingest_video(video(clapper(tmp_path / "a.mp4")), config(), tmp_path)
    assert outcome.cause is Cause.CRASH
    assert "ZeroDivisionError" in outcome.detail


def test_memory_has_a_limit(tmp_path: Path) -> None:
    huge = tmp_path / "huge.mkv"
    source = ("-f", "lavfi", "-i", "color=size=9000x9000:rate=2", "-f", "lavfi", "-i", "anoisesrc=r=8000", "-t", 1)
    ffmpeg(*source, "-c:v", "libx264", "-preset", "ultrafast", huge)
    with av.open(str(huge)) as container:
        assert container.streams.video[0].width == 9000
    wanted = video(huge, (0.0, 0.9))
    after = video(clapper(tmp_path / "a.mp4"))
    outcomes = run([wanted, after], tmp_path / "staging", limits=Limits(memory_mb=256, max_pixels=10**8))
    assert [o.cause for o in outcomes.values()] == [Cause.UNDECODABLE, None]
