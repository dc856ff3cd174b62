"""Reading ahead: what is wanted soon is there when it is asked for, and nothing that goes wrong ahead harms who reads."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenacity
from media import make_clip, tiny_profile
from servers import FileServer, serving

from cmacc.shards import remote as remote_module
from cmacc.shards.blocks import Block, Blocks
from cmacc.shards.cache import Cache
from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.shards.prefetch import Prefetcher
from cmacc.shards.writer import DatasetWriter

N = 24
BLOCK = 10_000
Spans = list[tuple[int, int, int]]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "set"
    with DatasetWriter(path, tiny_profile(), shard_bytes=100_000) as w:
        for i in range(N):
            w.add(make_clip(i))
    return path


@pytest.fixture
def server(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(remote_module, "_WAIT", tenacity.wait_none())
    with serving(here.parent) as state:
        yield state


@pytest.fixture
def cached(server: FileServer, tmp_path: Path) -> Dataset:
    """Through an empty cache; the sizes of its shards have been looked at."""
    dataset = Dataset.open(f"{server.url}/set", Cache(tmp_path / "cache", 10**8, BLOCK))
    dataset._fetch([remote_module.Span(s, 0, 1) for s in range(len(dataset.meta.shards))])
    server.asked.clear()
    server.names.clear()
    return dataset


def whole(dataset: Dataset) -> Spans:
    return [(number, 0, shard.bytes) for number, shard in enumerate(dataset.meta.shards)]


def kept(dataset: Dataset) -> int:
    assert dataset.cache is not None
    return len(list(dataset.cache.folder.glob("blocks/[!.]*")))


def soon(is_so: Callable[[], bool]) -> None:
    """Wait until it is so; another thread works on it."""
    for _ in range(3000):
        if is_so():
            return
        time.sleep(0.01)
    pytest.fail("it did not come about in 30 s")


def test_what_was_brought_is_not_asked_for(server: FileServer, cached: Dataset, here: Path) -> None:
    cached.prefetch(whole(cached)[:2])
    brought = len(server.asked)
    assert brought > 0 and set(server.names) == {"clips-000000.tar", "clips-000001.tar"}
    assert cached.ranges(whole(cached)[:2]) == Dataset.open(here).ranges(whole(cached)[:2])
    cached.prefetch([*whole(cached)[:2], (1, 5, 5)])
    assert len(server.asked) == brought


def test_without_a_cache_nothing_is_done(server: FileServer) -> None:
    Dataset.open(f"{server.url}/set").prefetch([(0, 0, 1000)])
    assert server.asked == []


def test_the_system_is_asked_to_read_ahead(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, told = os.posix_fadvise, []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda *a: (told.append((Path(f"/proc/self/fd/{a[0]}").readlink(), *a[1:])), real(*a))
    )
    dataset = Dataset.open(here)
    dataset.prefetch([(1, 512, 9000), (0, 0, 10)])
    names = [here / dataset.meta.shards[n].name for n in (1, 0)]
    assert told == [(names[0], 512, 8488, os.POSIX_FADV_WILLNEED), (names[1], 0, 10, os.POSIX_FADV_WILLNEED)]
    monkeypatch.delattr(os, "posix_fadvise")
    dataset.prefetch([(1, 512, 9000)])


@pytest.mark.parametrize("fault", ["503", "drop", "404", "stall"])
def test_what_fails_is_said_once_and_left_to_the_reader(
    server: FileServer, cached: Dataset, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    cached.patience = 0.1
    server.faults[:] = [fault] * 10_000
    for _ in range(2):
        cached.prefetch(whole(cached)[:1])
    assert sum("nothing is read ahead" in m for m in caplog.messages) == 1
    with pytest.raises(DatasetError, match=r"clips-000000\.tar"):
        cached.read(0)
    server.faults.clear()
    cached.patience = 30.0
    cached.prefetch(whole(cached)[:1])
    asked = len(server.asked)
    assert cached.read(0, check=True) and len(server.asked) == asked


@pytest.mark.parametrize("span", [(0, 0, 1 << 40), (0, -5, 9), (99, 0, 9)])
def test_spans_of_a_forged_catalog(cached: Dataset, here: Path, span: tuple[int, int, int]) -> None:
    for dataset in (cached, Dataset.open(here)):
        dataset.prefetch([span])


def test_no_more_than_the_cache_keeps(server: FileServer, here: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path, 12 * BLOCK * 2, BLOCK)
    dataset = Dataset.open(f"{server.url}/set", cache)
    assert not cache.holds(sum(s.bytes for s in dataset.meta.shards))
    dataset.prefetch(whole(dataset))
    there = kept(dataset)
    assert there > 5 and cache.holds(there * BLOCK) and not cache.holds((there + 1) * BLOCK)
    server.asked.clear()
    first = whole(dataset)[: there // -(-dataset.meta.shards[0].bytes // BLOCK)]
    assert first and dataset.ranges(first) == Dataset.open(here).ranges(first)
    assert server.asked == []  # those that come first were brought


def test_each_block_is_fetched_once_for_all_threads(
    server: FileServer, cached: Dataset, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: Blocks = cached._blocks(os.getpid(), cached.cache)
    asked, real = list[remote_module.Span](), blocks._fetch
    monkeypatch.setattr(blocks, "_fetch", lambda spans: (asked.extend(spans), real(spans))[1])
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(N), 3)).tolist()
    server.faults[:], local = ["wait"], Dataset.open(here)
    with ThreadPoolExecutor(8) as pool, Prefetcher(cached) as ahead:
        ahead.advance(whole(cached))
        found = pool.map(cached.read, rows)
        soon(lambda: server.faults == [])
        server.gate.set()
        assert list(found) == [local.read(row) for row in rows]
    assert len(asked) == len(set(asked)) >= kept(cached) > 30


@pytest.mark.parametrize("error", [DatasetError("it is gone"), KeyboardInterrupt()])
def test_who_waits_for_a_block_that_does_not_come(cached: Dataset, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """He hears why, but for an interrupt of the other thread: then he fetches it himself."""
    blocks: Blocks = cached._blocks(os.getpid(), cached.cache)
    waiting, asked, fetch, claim = threading.Event(), [], blocks._fetch, blocks._claim

    def fails_once(spans: list[remote_module.Span]) -> list[bytes]:
        asked.append(spans)
        if len(asked) > 1:
            return fetch(spans)
        waiting.wait(30)
        raise error

    def claims(wanted: list[Block]) -> Any:
        found = claim(wanted)
        if found[1]:
            waiting.set()
        return found

    monkeypatch.setattr(blocks, "_fetch", fails_once)
    monkeypatch.setattr(blocks, "_claim", claims)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(cached.ranges, [(0, 0, 9)]) for _ in range(2)]
        found = [one.exception(30) for one in both]
    heard = 2 if isinstance(error, DatasetError) else 1
    assert found.count(error) == heard and found.count(None) == 2 - heard and len(asked) == 3 - heard
    assert blocks._coming == {}


# --- the thread that does it ---


def test_the_newest_wish_counts(server: FileServer, cached: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmacc.shards.prefetch._BYTES_AT_ONCE", 3 * BLOCK)
    server.faults[:] = ["wait"]
    last = len(cached.meta.shards) - 1
    with Prefetcher(cached) as ahead:
        ahead.advance(whole(cached))
        soon(lambda: server.faults == [])
        ahead.advance([(1, 0, cached.meta.shards[1].bytes)])
        ahead.advance([(last, 0, 100)])  # returns, although nothing comes yet
        server.gate.set()
        soon(lambda: server.names[-1:] == [f"clips-{last:06d}.tar"])
    assert set(server.names) == {"clips-000000.tar", f"clips-{last:06d}.tar"} and kept(cached) == 4


@pytest.mark.parametrize("at_once", [999, 10_000, 1 << 30])
def test_long_spans_are_taken_piece_by_piece(
    server: FileServer, cached: Dataset, here: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmacc.shards.prefetch._BYTES_AT_ONCE", at_once)
    with Prefetcher(cached) as ahead:
        ahead.advance([(0, 5, 5), (0, 0, 2 * BLOCK + 1), (1, BLOCK, BLOCK + 2)])
        soon(lambda: kept(cached) == 4)


def test_closing_does_not_wait(server: FileServer, cached: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmacc.shards.prefetch._BYTES_AT_ONCE", 2 * BLOCK)
    server.faults[:] = ["wait"]
    ahead = Prefetcher(cached)
    ahead.advance(whole(cached))
    soon(lambda: server.faults == [])
    ahead.close()
    ahead.advance(whole(cached))
    ahead.close()
    server.gate.set()
    soon(lambda: not ahead._thread.is_alive())
    assert kept(cached) == 2 and len(cached.meta.shards) > 2
    Prefetcher(cached).close()


def test_a_fork_has_a_thread_of_its_own(server: FileServer, cached: Dataset, here: Path) -> None:
    server.faults[:] = ["wait"]
    with Prefetcher(cached) as ahead:
        ahead.advance(whole(cached)[:1])
        soon(lambda: server.faults == [])
        wanted = Dataset.open(here).ranges(whole(cached)[1:2])

        def child() -> None:
            ahead.advance(whole(cached)[1:2])
            soon(lambda: kept(cached) > 0)
            os._exit(0 if cached.ranges(whole(cached)[1:2]) == wanted else 1)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(60)
        assert process.exitcode == 0


def test_the_thread_outlives_what_fails(server: FileServer, cached: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    server.faults[:] = ["404"] * 8
    with caplog.at_level(logging.WARNING), Prefetcher(cached) as ahead:
        ahead.advance([(99, 0, 5)])
        soon(lambda: bool(caplog.messages))
        ahead.advance([(0, 0, 100)])
        soon(lambda: len(server.faults) < 8)
        server.faults.clear()
        ahead.advance([(0, 0, 100)])
        soon(lambda: kept(cached) > 0)
