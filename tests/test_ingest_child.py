"""The child process: what it finishes is staged, what kills or hangs it costs one source video."""

from __future__ import annotations

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
from test_ingest_media import clapper, ffmpeg

from cmacc.ingest import (
    Cause,
    ClipRequest,
    FetchOptions,
    IngestFailure,
    Limits,
    Outcome,
    SourceVideo,
    read_staged,
    staged_path,
    stop_all,
    transcode,
    work,
)
from cmacc.ingest.child import ingest_video
from cmacc.ingest.staging import StagedWriter
from cmacc.shards.clip import Clip, source_id
from cmacc.shards.profile import profile

TINY = profile("h264", short_side=32, fps=10, gop=5)


def video(address: str | Path, *spans: tuple[float, float | None]) -> SourceVideo:
    source = source_id(path=str(address))
    requests = tuple(
        ClipRequest(n, "list", source, str(address), start, end) for n, (start, end) in enumerate(spans or ((0.0, 2.0),))
    )
    return SourceVideo(source, str(address), requests)


def run(videos: list[SourceVideo], staging: Path, timeout_s: float = 60, limits: Limits | None = None) -> dict[str, Outcome]:
    options = FetchOptions(retries=0)
    return {o.key: o for o in work(videos, profile=TINY, staging=staging, timeout_s=timeout_s, options=options, limits=limits)}


def children() -> set[int]:
    """Process ids of the ingest children of this process."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
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
            self.taken.append(self.server.accept()[0])
            act()

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        return thread


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Hanging(server)


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
    outcomes = run([slow, after], tmp_path / "staging", timeout_s=3)
    assert [o.cause for o in outcomes.values()] == [Cause.TIMEOUT, None]
    assert 3 <= time.monotonic() - began < 25
    assert not children()


def test_closing_and_stopping_kill_the_child(tmp_path: Path, hanging: Hanging) -> None:
    good, slow = video(clapper(tmp_path / "a.mp4")), video(hanging.address)
    outcomes = work([good, slow], profile=TINY, staging=tmp_path / "staging")
    assert next(outcomes).cause is None
    assert len(children()) == 1
    outcomes.close()  # type: ignore[attr-defined]
    assert not children()
    hanging.when_taken(stop_all)
    assert [o.cause for o in run([slow], tmp_path / "staging").values()] == [Cause.CRASH]


def test_the_child_dies_with_its_parent(tmp_path: Path, hanging: Hanging) -> None:
    code = f"""
from pathlib import Path
from cmacc.ingest import ClipRequest, SourceVideo, work
from cmacc.shards.profile import profile
address = {hanging.address!r}
video = SourceVideo("url_0", address, (ClipRequest(1, "m", "url_0", address),))
list(work([video], profile=profile("h264"), staging=Path({str(tmp_path)!r})))
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


def test_a_cause_that_halts_stops_before_the_next_video(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.mp4"

        def refuse() -> None:
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        threading.Thread(target=refuse, daemon=True).start()
        good, limited, never = (video(clapper(tmp_path / f"{n}.mp4")) for n in "abc")
        limited = replace(limited, address=address)
        seen = []
        with pytest.raises(IngestFailure) as caught:
            for outcome in work([good, limited, never], profile=TINY, staging=tmp_path / "staging"):
                seen.append(outcome.cause)
    assert caught.value.cause is Cause.RATE_LIMITED
    assert seen == [None, Cause.RATE_LIMITED]


def test_a_full_disk_is_nobodys_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: StagedWriter, clip: Clip) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StagedWriter, "add", full)
    wanted = video(clapper(tmp_path / "a.mp4"))
    with pytest.raises(IngestFailure) as caught:
        list(ingest_video(wanted, TINY, tmp_path, FetchOptions(), Limits()))
    assert caught.value.cause is Cause.DISK_FULL
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_an_error_of_our_own_is_a_crash_of_one_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmacc.ingest.child.transcode", lambda *_: 1 / 0)
    (outcome,) = ingest_video(video(clapper(tmp_path / "a.mp4")), TINY, tmp_path, FetchOptions(), Limits())
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
    outcomes = run([wanted, after], tmp_path / "staging", limits=Limits(memory_mb=256))
    assert [o.cause for o in outcomes.values()] == [Cause.UNDECODABLE, None]
