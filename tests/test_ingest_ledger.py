"""The ledger: every row of every manifest counted once, whatever happens to the process that writes."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from cmacc.ingest import BadRow, Cause, ClipRequest, Ledger, Manifest, Outcome

A, B, C = "yt_aaaaaaaaaaa", "yt_bbbbbbbbbbb", "yt_ccccccccccc"


def manifest(name: str = "/lists/train.csv", *spans: tuple[str, float, float | None], bad: int = 0) -> Manifest:
    requests = tuple(
        ClipRequest(row, name, source, f"http://host/{source}", start, end, ("dog", "bark"), "train")
        for row, (source, start, end) in enumerate(spans, 1)
    )
    return Manifest(name, requests, tuple(BadRow(name, 100 + i, "no id") for i in range(bad)))


FIVE = manifest("/lists/train.csv", (A, 0, 10), (B, 0, 10), (A, 20, 30), (C, 5, None), (B, 1.5, 2.5), bad=2)
KEYS = [r.key for r in FIVE.requests]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "deep" / "ledger.db")
    ledger.add(FIVE)
    return ledger


def test_pending_is_grouped_by_source_in_the_order_of_the_manifest(ledger: Ledger) -> None:
    videos = ledger.pending()
    assert [(v.source, [r.key for r in v.requests]) for v in videos] == [
        (A, [KEYS[0], KEYS[2]]),
        (B, [KEYS[1], KEYS[4]]),
        (C, [KEYS[3]]),
    ]
    assert videos[0].address == f"http://host/{A}"
    assert tuple(r for v in videos for r in v.requests) == tuple(FIVE.requests[i] for i in (0, 2, 1, 4, 3))


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


def test_only_the_causes_named_are_tried_again(ledger: Ledger) -> None:
    ledger.record(
        [
            Outcome(key, "", cause)
            for key, cause in zip(KEYS, (None, Cause.GONE, Cause.NETWORK, Cause.TIMEOUT, Cause.GONE), strict=True)
        ]
    )
    assert ledger.pending() == []
    assert [r.key for v in ledger.pending([Cause.NETWORK, "timeout"]) for r in v.requests] == [KEYS[2], KEYS[3]]
    ledger.record([Outcome(KEYS[2], A, seconds=2.0, bytes=50)])
    row = next(row for row in ledger.rows() if row["key"] == KEYS[2])
    assert (row["state"], row["cause"], row["attempts"], row["seconds"], row["bytes"]) == ("done", "", 2, 2.0, 50)


def test_done_clips_are_staged_until_they_lie_in_a_shard(ledger: Ledger) -> None:
    ledger.record([Outcome(KEYS[4], B), Outcome(KEYS[0], A), Outcome(KEYS[3], C)])
    assert ledger.staged() == [(KEYS[0], A), (KEYS[3], C), (KEYS[4], B)]
    ledger.mark_done([KEYS[0], KEYS[4]], "clips-000000.tar")
    assert ledger.staged() == [(KEYS[3], C)]
    ledger.reopen([KEYS[0]])
    assert next(r.key for v in ledger.pending() for r in v.requests) == KEYS[0]


def test_a_clip_of_two_manifests_is_done_once(ledger: Ledger) -> None:
    other = manifest("/lists/more.csv", (A, 40, 50), (A, 0, 10), bad=1)
    for _ in range(2):
        ledger.add(other)
        counts = ledger.counts()
        assert (counts.rows, counts.pending, counts.bad_rows) == (10, 6, 4)
    reasons = [row["detail"] for row in ledger.rows() if row["manifest"] == other.name and row["state"] == "bad-row"]
    assert reasons == ["same clip as line 1 of /lists/train.csv", "no id"]


def test_a_clip_that_nobody_asked_for_is_refused_and_nothing_with_it_is_kept(ledger: Ledger) -> None:
    with pytest.raises(KeyError, match="in no manifest"):
        ledger.record([Outcome(KEYS[0], A), Outcome("yt_zzzzzzzzzzz_0_1", "yt_zzzzzzzzzzz")])
    assert ledger.counts().done == 0


def test_nothing_recorded_is_lost_to_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    many = manifest("m", *((f"yt_{n:011d}", 0, 10) for n in range(3000)), bad=3)
    with Ledger(path) as ledger:
        ledger.add(many)
    code = f"""
from pathlib import Path
from cmacc.ingest import Cause, Ledger, Outcome
ledger = Ledger(Path({str(path)!r}))
for video in ledger.pending():
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
        assert len(ledger.pending()) == counts.pending == 3000 - counts.done - counts.failed
