"""The ledger: every row of every manifest counted once, whatever happens to the process that writes."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from cmacc.ingest import BadRow, Cause, ClipRequest, Ledger, Outcome, SourceVideo
from cmacc.ingest.ledger import Part, host_of

A, B, C = "yt_aaaaaaaaaaa", "yt_bbbbbbbbbbb", "yt_ccccccccccc"


@dataclass(frozen=True)
class Listed:
    """A manifest that is all in memory."""

    name: str
    listed: tuple[ClipRequest | BadRow, ...]

    def __iter__(self) -> Iterator[ClipRequest | BadRow]:
        return iter(self.listed)

    @property
    def requests(self) -> list[ClipRequest]:
        return [row for row in self.listed if isinstance(row, ClipRequest)]


def manifest(name: str = "/lists/train.csv", *spans: tuple[str, float, float | None], bad: int = 0, first: int = 1) -> Listed:
    requests = (
        ClipRequest(row, name, source, f"http://host/{source}", start, end, ("dog", "bark"), "train")
        for row, (source, start, end) in enumerate(spans, first)
    )
    return Listed(name, (*requests, *(BadRow(name, 100 + i, "no id") for i in range(bad))))


SPANS = ((A, 0.0, 10.0), (B, 0.0, 10.0), (A, 20.0, 30.0), (C, 5.0, None), (B, 1.5, 2.5))
FIVE = manifest("/lists/train.csv", *SPANS, bad=2)
KEYS = [r.key for r in FIVE.requests]


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    return tmp_path / "deep" / "ledger.db" if request.param == "sqlite" else request.getfixturevalue("postgres")


@pytest.fixture
def ledger(where: Path | str) -> Iterator[Ledger]:
    with Ledger(where) as ledger:
        ledger.add(FIVE)
        yield ledger


def todo(ledger: Ledger, now: float = 0.0, **options: object) -> list[SourceVideo]:
    return list(ledger.todo(now=now, **options))  # type: ignore[arg-type]


def keys(videos: list[SourceVideo]) -> list[str]:
    return [r.key for video in videos for r in video.requests]


def test_work_is_grouped_by_source_in_the_order_of_the_manifest(ledger: Ledger) -> None:
    videos = todo(ledger)
    assert [(v.source, [r.key for r in v.requests]) for v in videos] == [
        (A, [KEYS[0], KEYS[2]]),
        (B, [KEYS[1], KEYS[4]]),
        (C, [KEYS[3]]),
    ]
    assert (videos[0].address, videos[0].host) == (f"http://host/{A}", "host")
    assert tuple(r for v in videos for r in v.requests) == tuple(FIVE.requests[i] for i in (0, 2, 1, 4, 3))
    assert ledger.count_todo() == (5, 3)
    assert todo(ledger, closed=["host"]) == []
    assert len(todo(ledger, closed=["elsewhere"])) == 3


def test_parts_share_out_every_source_once(where: Path | str) -> None:
    many = manifest("m", *((f"yt_{n:011d}", s, s + 1.0) for s in (0.0, 5.0) for n in range(300)))
    with Ledger(where) as ledger:
        ledger.add(many)
        for of in (1, 2, 7):
            parts = [todo(ledger, part=Part(number, of)) for number in range(of)]
            sources = [v.source for part in parts for v in part]
            assert len(sources) == len(set(sources)) == 300
            assert all(len(v.requests) == 2 for part in parts for v in part)
            assert all(len(part) > 150 / of for part in parts)
            assert sum(ledger.count_todo(Part(number, of))[0] for number in range(of)) == 600
    with pytest.raises(ValueError, match="part 2 of 2 is none"):
        Part(2, 2)


def test_counts_add_up_to_the_rows_at_every_step(ledger: Ledger) -> None:
    def counts() -> tuple[int, int, int, int]:
        c = ledger.counts()
        assert c.rows == 7
        assert sum(c.causes.values()) == c.failed
        return c.pending, c.done, c.failed, c.bad_rows

    assert counts() == (5, 0, 0, 2)
    ledger.record([Outcome(KEYS[0], A, seconds=1.5, bytes=100), Outcome(KEYS[2], A, Cause.SILENT, "at -90 dBFS")])
    assert counts() == (3, 1, 1, 2)
    ledger.add(FIVE)
    assert counts() == (3, 1, 1, 2), "adding again changes nothing"
    ledger.record(Outcome(key, B, Cause.NETWORK, "reset") for key in (KEYS[1], KEYS[4]))
    assert counts() == (1, 1, 3, 2)
    assert ledger.counts().causes == {"network": 2, "silent": 1}
    ledger.mark_done([KEYS[0]], "clips-000000.tar")
    ledger.reopen([KEYS[2]])
    assert counts() == (2, 1, 2, 2)
    ledger.refuse([KEYS[2]], Cause.OPTED_OUT, "on the list")
    assert counts() == (1, 1, 3, 2)


def test_an_edited_manifest_keeps_what_is_done(ledger: Ledger) -> None:
    ledger.record([Outcome(KEYS[0], A), Outcome(KEYS[1], B, Cause.GONE)])
    shifted = manifest(FIVE.name, (C, 7.0, 8.0), SPANS[0], SPANS[2], SPANS[0], bad=1, first=2)
    for _ in range(2):
        ledger.add(shifted)
        rows = {row["key"]: (row["row"], row["state"]) for row in ledger.rows() if row["key"]}
        assert rows == {f"{C}_7000_8000": (2, "pending"), KEYS[0]: (3, "done"), KEYS[2]: (4, "pending")}
        assert [(row["row"], row["detail"]) for row in ledger.rows() if row["state"] == "bad-row"] == [
            (5, "same clip as line 3"),
            (100, "no id"),
        ]


def test_failures_are_due_again_by_the_rule_of_their_cause(ledger: Ledger) -> None:
    causes = (None, Cause.GONE, Cause.NETWORK, Cause.TIMEOUT, Cause.LIVE)
    ledger.record([Outcome(key, key[:14], cause) for key, cause in zip(KEYS, causes, strict=True)], now=1000.0)
    assert todo(ledger, now=1000.0) == []
    assert ledger.next_due() == 1000 + Cause.NETWORK.retry.after_s
    assert keys(todo(ledger, now=1000 + Cause.NETWORK.retry.after_s)) == [KEYS[2]]
    assert keys(todo(ledger, now=1000 + Cause.TIMEOUT.retry.after_s)) == [KEYS[2], KEYS[3]]
    assert keys(todo(ledger, now=1000 + Cause.LIVE.retry.after_s)) == [KEYS[2], KEYS[4], KEYS[3]]
    ledger.record([Outcome(KEYS[3], C, Cause.TIMEOUT)], now=9000.0)
    assert KEYS[3] not in keys(todo(ledger, now=1e12)), "a timeout is tried again once"
    ledger.record([Outcome(KEYS[2], A, seconds=2.0, bytes=50)])
    row = next(row for row in ledger.rows() if row["key"] == KEYS[2])
    assert (row["state"], row["cause"], row["attempts"], row["seconds"], row["bytes"]) == ("done", "", 2, 2.0, 50)
    ledger.retry([Cause.GONE, "timeout"])
    assert keys(todo(ledger, now=0.0)) == [KEYS[1], KEYS[3]]


def test_done_clips_are_staged_until_they_lie_in_a_shard(ledger: Ledger) -> None:
    ledger.record([Outcome(KEYS[4], B, fingerprint="f4"), Outcome(KEYS[0], A, duplicate_of="x"), Outcome(KEYS[3], C)])
    assert [(row["key"], row["source"], row["duplicate_of"]) for row in ledger.staged()] == [
        (KEYS[0], A, "x"), (KEYS[3], C, ""), (KEYS[4], B, ""),
    ]  # fmt: skip
    ledger.mark_done([KEYS[0], KEYS[4]], "clips-000000.tar")
    assert [row["key"] for row in ledger.staged()] == [KEYS[3]]
    assert ledger.shards() == {"clips-000000.tar": 2}
    ledger.moved("clips-000000.tar", "clips-000009.tar")
    assert set(ledger.keys_of_shard("clips-000009.tar")) == {KEYS[0], KEYS[4]}
    assert list(ledger.fingerprints()) == [(KEYS[4], "f4")]
    ledger.reopen([KEYS[0], KEYS[4]])
    assert keys(todo(ledger))[:1] == KEYS[:1]
    assert list(ledger.fingerprints()) == []


def test_a_clip_of_two_manifests_is_done_once(ledger: Ledger) -> None:
    other = manifest("/lists/more.csv", (A, 40, 50), (A, 0, 10), bad=1)
    for _ in range(2):
        ledger.add(other)
        counts = ledger.counts()
        assert (counts.rows, counts.pending, counts.bad_rows) == (10, 6, 4)
    reasons = [row["detail"] for row in ledger.rows() if row["manifest"] == other.name and row["state"] == "bad-row"]
    assert reasons == ["same clip as line 1 of /lists/train.csv", "no id"]


def test_a_clip_that_nobody_asked_for_is_refused_and_nothing_with_it_is_kept(ledger: Ledger) -> None:
    with pytest.raises(KeyError, match="yt_zzzzzzzzzzz_0_1 is in no manifest"):
        ledger.record([Outcome(KEYS[0], A), Outcome("yt_zzzzzzzzzzz_0_1", "yt_zzzzzzzzzzz")])
    assert ledger.counts().done == 0


def test_totals_of_a_time(ledger: Ledger) -> None:
    assert ledger.totals().done == 0
    ledger.record([Outcome(KEYS[0], A, bytes=10, fetched=100), Outcome(KEYS[2], A, bytes=20, fetched=100)], now=6000.0)
    ledger.record([Outcome(KEYS[1], B, Cause.GONE)], now=6030.0)
    ledger.record([Outcome(KEYS[4], B, bytes=5)], now=6600.0)
    everything = ledger.totals(now=6660.0)
    assert (everything.done, everything.failed, everything.bytes, everything.fetched, everything.videos) == (3, 1, 35, 200, 3)
    assert everything.seconds == 660
    assert ledger.totals(since=6500.0, now=6660.0).done == 1


def test_a_closed_host_opens_again(ledger: Ledger) -> None:
    ledger.close_host("host", 5000.0, Cause.RATE_LIMITED, "too many")
    assert ledger.closed_hosts(now=4999.0) == {"host": (5000.0, "rate-limited", "too many")}
    assert ledger.closed_hosts(now=5000.0) == {}


def test_turns_at_a_host_are_a_gap_apart_whoever_takes_them(where: Path | str, ledger: Ledger) -> None:
    assert [ledger.turn("host", 12.0, now=100.0) for _ in range(3)] == [100, 112, 124]
    assert ledger.turn("other", 12.0, now=100.0) == 100
    assert ledger.turn("host", 12.0, now=500.0) == 500, "no turns are saved up"
    with Ledger(where) as second, ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda i: (ledger, second)[i % 2].turn("host", 10.0, now=1000.0), range(40)))
    assert sorted(taken) == [1000 + 10 * i for i in range(40)]


def test_hosts_of_addresses() -> None:
    found = [
        host_of(a)
        for a in (
            "/data/a.mp4",
            "https://WWW.youtube.com/watch?v=x",
            "https://youtu.be/x",
            "http://h:81/a",
            "https://h:443/a",
            "http://[",
        )
    ]
    assert found == ["", "youtube.com", "youtube.com", "h:81", "h", ""]


def test_a_ledger_that_cannot_be_opened_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="cannot live in mysql"):
        Ledger("mysql://localhost/x")
    with pytest.raises(ValueError, match=r"cannot be opened: .*refused.* mend its URL") as refused:
        Ledger("postgresql://user:secret@127.0.0.1:9/none")
    assert "secret" not in str(refused.value)


def test_nothing_recorded_is_lost_to_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    many = manifest("m", *((f"yt_{n:011d}", 0, 10) for n in range(3000)), bad=3)
    with Ledger(path) as ledger:
        ledger.add(many)
    code = f"""
from pathlib import Path
from cmacc.ingest import Cause, Ledger, Outcome
ledger = Ledger(Path({str(path)!r}))
for video in ledger.todo():
    ledger.record([Outcome(r.key, r.source, None if r.row % 3 else Cause.GONE) for r in video.requests])
    print(video.requests[0].key, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        said = [child.stdout.readline().strip() for _ in range(40)]
        child.send_signal(signal.SIGKILL)
        said += [line.strip() for line in child.stdout.read().splitlines()]
    assert child.returncode == -signal.SIGKILL
    assert sqlite3.connect(path).execute("pragma integrity_check").fetchone() == ("ok",)
    with Ledger(path) as ledger:
        counts = ledger.counts()
        assert counts.rows == 3003
        assert len(said) <= counts.done + counts.failed <= len(said) + 1
        settled = {row["key"] for row in ledger.rows() if row["state"] in ("done", "failed")}
        assert {key for key in said if key} <= settled
        assert ledger.count_todo()[0] == counts.pending == 3000 - counts.done - counts.failed
