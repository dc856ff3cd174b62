"""The cache of remote blocks: right bytes, a limit that holds whoever shares the folder, and whatever is killed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from media import make_clip, tiny_profile

from cmacc.shards import cache as cache_module
from cmacc.shards.cache import Cache
from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.shards.facts import facts_to_json
from cmacc.shards.writer import DatasetWriter

BLOCK = 70_000  # more than one page, and no multiple of it
LIMIT = 20 * (BLOCK + 5000)
SHA = "ab" * 32
N = 40
CLIPS = [make_clip(i) for i in range(N)]


def block(number: int, size: int = BLOCK) -> bytes:
    return np.random.default_rng(number).bytes(size)


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "blocks").iterdir())


def disk_bytes(folder: Path) -> int:
    """What `du` says; a file may go while it counts, which is no fault."""
    found = subprocess.run(["du", "-s", "-B1", folder], capture_output=True, text=True, check=False).stdout
    return int(found.split()[0]) if found else 0


def counted(folder: Path) -> int:
    return int((folder / "used").read_bytes())


def real_cost(folder: Path) -> int:
    sizes = [p.stat().st_size for p in (folder / "blocks").iterdir()]
    return cache_module._FIXED + sum(map(cache_module._cost, sizes))


def test_blocks_come_back(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", LIMIT, BLOCK)
    assert cache.get(SHA, 0, BLOCK, 0, BLOCK) is None
    cache.put(SHA, 0, block(0))
    cache.put(SHA, 7, block(7, 10))
    for begin, end in ((0, BLOCK), (0, 1), (65_535, 65_537), (65_536, BLOCK), (69_999, BLOCK), (5, 5)):
        assert cache.get(SHA, 0, BLOCK, begin, end) == block(0)[begin:end]
    assert cache.get(SHA, 7, 10, 2, 9) == block(7, 10)[2:9]
    assert cache.get("cd" * 32, 0, BLOCK, 0, 1) is None and Cache(tmp_path / "c", LIMIT, BLOCK - 1).get(SHA, 0, 9, 0, 9) is None
    again = pickle.loads(pickle.dumps(cache))
    assert again.get(SHA, 0, BLOCK, 0, BLOCK) == block(0)
    again.put(SHA, 0, block(0))
    assert counted(tmp_path / "c") == real_cost(tmp_path / "c")


def test_the_oldest_go_first_down_to_nine_tenths(tmp_path: Path) -> None:
    cache = Cache(tmp_path, LIMIT, BLOCK)
    most = (LIMIT - cache_module._FIXED) // cache_module._cost(BLOCK + 8)
    now = time.time()
    for number in range(most):
        cache.put(SHA, number, block(number))
        os.utime(cache._path(SHA, number), (now, now - 10_000 + number))
    assert len(files(tmp_path)) == most
    assert cache.get(SHA, 0, BLOCK, 0, 1) == block(0)[:1]  # used: it stays
    cache.put(SHA, most, block(most))
    there = {n for n in range(most + 1) if cache.get(SHA, n, BLOCK, 0, 1) is not None}
    assert {0, most} <= there and 1 not in there and there - {0} == set(range(min(there - {0}), most + 1))
    assert (
        counted(tmp_path) == real_cost(tmp_path)
        and 0.8 * LIMIT < counted(tmp_path) - cache_module._cost(BLOCK + 8) <= 0.9 * LIMIT
    )


def test_a_hit_is_noted_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, touched = Cache(tmp_path, LIMIT, BLOCK), []
    cache.put(SHA, 0, block(0))
    os.utime(cache._path(SHA, 0), (0, time.time() - 61))
    real = os.utime
    monkeypatch.setattr(os, "utime", lambda fd: (touched.append(1), real(fd)))
    for _ in range(50):
        cache.get(SHA, 0, BLOCK, 0, 9)
    assert len(touched) == 1


@pytest.mark.parametrize("change", ["flip", "flip checksum", "cut", "longer", "empty"])
def test_altered_blocks_are_dropped(tmp_path: Path, change: str) -> None:
    cache = Cache(tmp_path, LIMIT, BLOCK)
    cache.put(SHA, 0, block(0))
    path = cache._path(SHA, 0)
    data = bytearray(path.read_bytes())
    if "flip" in change:
        data[-1 if "checksum" in change else 66_000] ^= 1
    path.write_bytes({"cut": data[:-1], "longer": data + b"x", "empty": b""}.get(change, bytes(data)))
    if "flip" in change:
        assert cache.get(SHA, 0, BLOCK, 0, 65_536) == block(0)[:65_536]  # a page that is sound
    assert cache.get(SHA, 0, BLOCK, 65_000, BLOCK) is None and files(tmp_path) == []
    cache.put(SHA, 0, block(0))
    assert cache.get(SHA, 0, BLOCK, 0, BLOCK) == block(0)


@pytest.mark.parametrize("found", [b"", b"junk", b"-0000000000000000001", b"%020d" % 10**15, b"\xff" * 20])
def test_a_count_that_is_wrong_is_mended(tmp_path: Path, found: bytes) -> None:
    cache = Cache(tmp_path, LIMIT, BLOCK)
    cache.put(SHA, 0, block(0))
    (tmp_path / "used").write_bytes(found)
    fresh = Cache(tmp_path, LIMIT, BLOCK)
    fresh.put(SHA, 1, block(1))
    assert files(tmp_path) == [f"{SHA}.{BLOCK}.{n}" for n in (0, 1)] and counted(tmp_path) == real_cost(tmp_path)


def test_dead_parts_go_and_strangers_stay(tmp_path: Path) -> None:
    cache = Cache(tmp_path, LIMIT, BLOCK)
    cache.put(SHA, 0, block(0))
    (tmp_path / "blocks" / f".{'0' * 16}.part").write_bytes(bytes(BLOCK))
    (tmp_path / "blocks" / "thesis.tex").write_bytes(bytes(100_000))
    held = cache._reserve(cache._path(SHA, 5), BLOCK + 8)
    assert held is not None
    (tmp_path / "used").unlink()
    Cache(tmp_path, LIMIT, BLOCK).put(SHA, 1, block(1))
    assert files(tmp_path) == [held[1].name, f"{SHA}.{BLOCK}.0", f"{SHA}.{BLOCK}.1", "thesis.tex"]
    assert counted(tmp_path) == real_cost(tmp_path) - cache_module._cost(100_000)
    os.close(held[0])


def test_two_that_fetch_the_same_block(tmp_path: Path) -> None:
    """Both have reserved room before either is done."""
    first, second = Cache(tmp_path, LIMIT, BLOCK), Cache(tmp_path, LIMIT, BLOCK)
    first._enter()
    reserved = second._reserve(second._path(SHA, 0), BLOCK + 8)
    assert reserved is not None
    first.put(SHA, 0, block(0))
    second._publish(reserved[1], second._path(SHA, 0), BLOCK + 8)
    os.close(reserved[0])
    assert files(tmp_path) == [f"{SHA}.{BLOCK}.0"] and counted(tmp_path) == real_cost(tmp_path)
    assert first.get(SHA, 0, BLOCK, 0, BLOCK) == block(0)


def test_a_smaller_limit_is_kept_at_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path, LIMIT, BLOCK)
    for number in range(12):
        cache.put(SHA, number, block(number))
    assert Cache(tmp_path, LIMIT // 4, BLOCK).get(SHA, 99, BLOCK, 0, 1) is None
    assert disk_bytes(tmp_path) <= LIMIT // 4 and files(tmp_path)


@pytest.mark.parametrize(("limit", "size"), [(BLOCK, BLOCK), (0, 4096), (-1, 4096), (1 << 30, 0)])
def test_a_limit_smaller_than_a_block(tmp_path: Path, limit: int, size: int) -> None:
    with pytest.raises(DatasetError, match=r"does not hold one block of .* bytes; give"):
        Cache(tmp_path, limit, size)


def obstruct(folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    if how == "a file in the way":
        (folder / "blocks").write_text("mine")
    elif how == "a lock that is a folder":
        (folder / "lock").mkdir()
    elif how == "a full disk":
        full = os.open("/dev/full", os.O_WRONLY)
        monkeypatch.setattr(cache_module.os, "write", lambda fd, data, real=os.write: real(full, data))
    else:
        folder.chmod(0o500)
        if os.access(folder, os.W_OK):  # root may write anywhere
            monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "not yours")))


@pytest.mark.parametrize("how", ["a file in the way", "a lock that is a folder", "a full disk", "read-only"])
def test_reading_goes_on_without_it(
    remote: str, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path / "c", LIMIT, BLOCK)
    obstruct(tmp_path / "c", how, monkeypatch)
    dataset = Dataset.open(remote, cache)
    with caplog.at_level(logging.WARNING):
        assert all(dataset.read(row) == clip_bytes(row) for row in (*range(N), 0, 1))
    assert sum("reading goes on without it" in line for line in caplog.messages) == 1
    monkeypatch.undo()
    assert disk_bytes(tmp_path / "c") < 40_000


# --- a folder that others change meanwhile ---


@pytest.mark.parametrize("when", ["before", "while it writes", "while it reserves"])
def test_a_folder_that_was_deleted_is_made_again(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "c"
    cache, times = Cache(folder, LIMIT, BLOCK), []
    cache.put(SHA, 0, block(0))
    if when == "before":
        shutil.rmtree(folder)
    else:
        name, owner = ("_checksums", cache_module) if when == "while it writes" else ("ftruncate", os)
        real = getattr(owner, name)
        gone = lambda *a: (times or shutil.rmtree(folder), times.append(1), real(*a))[2]  # noqa: E731
        monkeypatch.setattr(owner, name, gone)
    cache.put(SHA, 1, block(1))
    monkeypatch.undo()
    assert cache.get(SHA, 1, BLOCK, 0, BLOCK) == block(1) and cache.get(SHA, 0, BLOCK, 0, BLOCK) is None
    assert counted(folder) == real_cost(folder) and caplog.messages == []


def test_a_folder_that_is_deleted_again_and_again(remote: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = Dataset.open(remote, Cache(tmp_path / "c", LIMIT, 20_000))
    rows, over = np.random.default_rng(0).integers(0, N, 400).tolist(), threading.Event()

    def delete() -> None:
        while not over.wait(0.002):
            shutil.rmtree(tmp_path / "c", ignore_errors=True)

    thread = threading.Thread(target=delete)
    thread.start()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(dataset.read, rows)) == [clip_bytes(r) for r in rows]
    over.set()
    thread.join()
    assert len(caplog.messages) == sum("reading goes on without it" in m for m in caplog.messages) <= 1


def test_a_file_system_that_takes_no_more(tmp_path: Path) -> None:
    """A real limit on the size of files, under which the folder's small files fit and blocks do not."""
    script = f"""
import logging, os, resource, sys
sys.path[:0] = {sys.path!r}
from cmacc.shards.cache import Cache
logging.basicConfig(format="%(message)s")
cache = Cache(sys.argv[1], {LIMIT}, {BLOCK})
cache.put({SHA!r}, 0, bytes({BLOCK}))
before = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
for number in (1, 2, 3):
    cache.put({SHA!r}, number, bytes({BLOCK}))
assert cache.get({SHA!r}, 0, {BLOCK}, 0, {BLOCK}) == bytes({BLOCK}) and not cache.holds(1)
assert len(os.listdir("/proc/self/fd")) == before
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
    assert "File too large); reading goes on without it" in done.stderr
    assert files(tmp_path) == [f"{SHA}.{BLOCK}.0"] and counted(tmp_path) == real_cost(tmp_path)


def test_a_process_that_holds_the_lock_and_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache, mine = Cache(tmp_path, LIMIT, BLOCK), Cache(tmp_path, LIMIT, BLOCK)
    mine.put(SHA, 0, block(0))

    def stopped() -> None:
        with cache._locked():
            os.kill(os.getpid(), signal.SIGSTOP)

    process = multiprocessing.get_context("fork").Process(target=stopped)
    process.start()
    os.waitpid(process.pid or 0, os.WUNTRACED)
    monkeypatch.setattr(cache_module, "_LOCK_S", 0.1)
    mine.put(SHA, 1, block(1))
    mine.put(SHA, 2, block(2))
    process.kill()
    process.join()
    assert mine.get(SHA, 0, BLOCK, 0, BLOCK) == block(0) and mine.get(SHA, 1, BLOCK, 0, 1) is None
    assert sum("another process has held its lock for 0.1 s); reading goes on" in m for m in caplog.messages) == 1


def test_what_it_holds_stays(tmp_path: Path) -> None:
    cache, blocks = Cache(tmp_path, LIMIT, BLOCK), 0
    while cache.holds((blocks + 1) * BLOCK):
        blocks += 1
    assert cache.holds(blocks * BLOCK - 1) and not cache.holds(blocks * BLOCK + 1) and blocks * BLOCK > 0.75 * LIMIT
    for turn in range(3):
        for number in range(blocks):
            assert cache.has(SHA, number, BLOCK) == (turn > 0)
            cache.put(SHA, number, block(number))
    assert not cache.has(SHA, 0, BLOCK - 1) and len(files(tmp_path)) == blocks


def test_two_limits_for_one_folder(remote: str, tmp_path: Path) -> None:
    """Each evicts what the other has just fetched; the larger limit is never passed, and every byte is right."""
    small, large = (Dataset.open(remote, Cache(tmp_path, limit, 20_000)) for limit in (100_000, 300_000))
    started = [*processes(small, times=3), *processes(large, times=3)]
    for process in started:
        process.join(60)
    assert [p.exitcode for p in started] == [0] * 8
    assert disk_bytes(tmp_path) <= 300_000 and counted(tmp_path) == real_cost(tmp_path)


# --- data sets read through it ---


def clip_bytes(row: int) -> dict[str, bytes]:
    clip = CLIPS[row]
    return {**clip.members, "json": facts_to_json(clip.facts)}


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A data set in fsspec's memory, which a forked child has, too."""
    path = tmp_path_factory.mktemp("set")
    with DatasetWriter(path, tiny_profile(), shard_bytes=150_000) as w:
        for clip in CLIPS:
            w.add(clip)
    memory = fsspec.filesystem("memory")
    memory.put(f"{path}/", "/cached/set/", recursive=True)
    yield "memory://cached/set"
    memory.rm("/cached", recursive=True)


def test_no_request_where_blocks_are_there(remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset.open(remote, Cache(tmp_path, 1 << 30, 10_000))
    shards = [(i, 0, s.bytes) for i, s in enumerate(dataset.meta.shards)]
    whole = dataset.ranges([*shards, (0, 0, 0)])
    assert [len(data) for data in whole] == [*(s.bytes for s in dataset.meta.shards), 0]
    real = type(dataset._files).cat_file
    monkeypatch.setattr(type(dataset._files), "cat_file", lambda s, path, **k: None if ".tar" in path else real(s, path, **k))
    assert dataset.ranges(shards) == whole[:-1]
    assert all(dataset.read(row, check=True) == clip_bytes(row) for row in range(N))
    again = pickle.loads(pickle.dumps(dataset))
    assert again.cache is not None and again.read(3) == clip_bytes(3)


def test_a_block_that_was_wrong_when_it_was_fetched(remote: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1 << 30, 10_000)
    dataset = Dataset.open(remote, cache)
    shard = dataset.meta.shards[0]
    for number in range(-(-shard.bytes // 10_000)):
        cache.put(shard.sha256, number, bytes(min(10_000, shard.bytes - number * 10_000)))
    assert dataset.read(0) != clip_bytes(0)
    assert dataset.read(0, check=True) == clip_bytes(0) == dataset.read(0)


def test_threads_and_forks(remote: str, tmp_path: Path) -> None:
    dataset = Dataset.open(remote, Cache(tmp_path, LIMIT // 2, 20_000))
    rows = np.random.default_rng(0).integers(0, N, 300).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(dataset.read, rows)) == [clip_bytes(r) for r in rows]
    child = multiprocessing.get_context("fork").Process(target=read_all, args=(dataset, 1, 1))
    child.start()
    child.join()
    assert child.exitcode == 0 and disk_bytes(tmp_path) <= LIMIT // 2


def test_the_environment_names_a_cache(remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMACC_CACHE", str(tmp_path / "c"))
    monkeypatch.setenv("CMACC_CACHE_GB", "0.05")
    dataset = Dataset.open(remote)
    assert dataset.read(2) == clip_bytes(2)
    assert dataset.cache is not None and dataset.cache.max_bytes == 50_000_000 and files(tmp_path / "c")
    assert Dataset.open(remote, Cache(tmp_path / "d", LIMIT, BLOCK)).cache.folder == tmp_path / "d"  # type: ignore[union-attr]
    for wrong in ("much", "nan", "inf"):
        monkeypatch.setenv("CMACC_CACHE_GB", wrong)
        with pytest.raises(DatasetError, match=f"CMACC_CACHE_GB is '{wrong}'; give a number"):
            Dataset.open(remote)


# --- many processes ---


def read_all(dataset: Dataset, seed: int, times: int) -> None:
    """In a child: read rows at random; an error or a wrong byte ends it with a status that is not 0."""
    rows = np.random.default_rng(seed).integers(0, N, times * N).tolist()
    os._exit(0 if all(dataset.read(row) == clip_bytes(row) for row in rows) else 1)


def processes(dataset: Dataset, times: int, seed: int = 0) -> list[multiprocessing.context.ForkProcess]:
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=read_all, args=(dataset, seed + i, times)) for i in range(4)]
    for process in started:
        process.start()
    return started


def test_four_processes_share_a_small_cache(remote: str, tmp_path: Path) -> None:
    limit = 200_000
    dataset = Dataset.open(remote, Cache(tmp_path, limit, 20_000))
    assert sum(s.bytes for s in dataset.meta.shards) > 2 * limit
    started, most = processes(dataset, times=6), 0
    while any(p.is_alive() for p in started):
        most = max(most, disk_bytes(tmp_path))
    assert [p.exitcode for p in started] == [0] * 4
    assert limit / 2 < most <= limit and counted(tmp_path) == real_cost(tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_kill_9(remote: str, tmp_path: Path, seed: int) -> None:
    limit, draw = 200_000, random.Random(seed)
    dataset = Dataset.open(remote, Cache(tmp_path, limit, 20_000))
    for attempt in range(3):
        started = processes(dataset, times=200, seed=10 * attempt)
        time.sleep(draw.uniform(0.02, 0.25))
        for process in started:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
        assert disk_bytes(tmp_path) <= limit
    assert counted(tmp_path) >= real_cost(tmp_path)
    (started := processes(dataset, times=2))[0].join()
    for process in started:
        process.join()
    assert [p.exitcode for p in started] == [0] * 4 and disk_bytes(tmp_path) <= limit
    assert counted(tmp_path) == real_cost(tmp_path) and not [name for name in files(tmp_path) if name.endswith(".part")]


def test_killed_at_each_step_of_a_put(tmp_path: Path) -> None:
    """A real process that ends itself at the n-th system call that changes the folder; then the next one mends it all."""
    script = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from cmacc.shards import cache as module
left = int(sys.argv[2])
def counting(real):
    def call(*a, **k):
        global left
        if left == 0: os.kill(os.getpid(), 9)
        left -= 1
        return real(*a, **k)
    return call
cache = module.Cache(sys.argv[1], {LIMIT}, {BLOCK})
cache.get({SHA!r}, 0, {BLOCK}, 0, 1)
for name in ("pwrite", "open", "ftruncate", "write", "unlink", "rename"):
    setattr(os, name, counting(getattr(os, name)))
cache.put({SHA!r}, 0, bytes({BLOCK}))
"""
    ends = []
    for step in range(30):
        folder = tmp_path / str(step)
        done = subprocess.run([sys.executable, "-c", script, folder, str(step)], capture_output=True, check=False)
        ends.append(done.returncode)
        assert done.returncode in (0, -9), done.stderr
        assert counted(folder) >= real_cost(folder) and disk_bytes(folder) <= LIMIT
        (folder / "used").unlink()
        cache = Cache(folder, LIMIT, BLOCK)
        cache.put(SHA, 1, block(1))
        assert counted(folder) == real_cost(folder) and cache.get(SHA, 0, BLOCK, 0, BLOCK) in (None, bytes(BLOCK))
        assert not [name for name in files(folder) if name.endswith(".part")]
        if done.returncode == 0:
            break
    assert ends[-1] == 0 and len(ends) > 5


def put_many(cache: Cache, first: int) -> None:
    for number in range(first, first + 20):
        cache.put(SHA, number, block(number, 100))


def test_one_counts_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is slow between reading the count and writing it, and half of the blocks are put by two."""
    real = cache_module._Count.set
    monkeypatch.setattr(cache_module._Count, "set", lambda self, value: (time.sleep(0.002), real(self, value))[1])
    cache = Cache(tmp_path, LIMIT, 4096)
    started = [multiprocessing.get_context("fork").Process(target=put_many, args=(cache, 10 * i)) for i in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert len(files(tmp_path)) == 50 and counted(tmp_path) == real_cost(tmp_path)
