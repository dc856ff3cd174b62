"""The whole loader over a network: the batches of a local disk, whatever a server, a cache or another process does meanwhile."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import fsspec
import pytest
import s3fs
import tenacity
import torch
from servers import FileServer, serving
from train_data import LOADER, VIEW, clips, write_dataset

from cmacc.shards import cache as cache_module
from cmacc.shards import remote as remote_module
from cmacc.shards.cache import Cache
from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.train.loading.loader import TrainingLoader
from cmacc.train.loading.reader import Batch
from cmacc.train.loading.sampler import Source

BLOCK = 10_000
STEPS = 8  # two epochs of 16 clips


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards."""
    path = tmp_path_factory.mktemp("served") / "set"
    write_dataset(path, clips())
    return path


@pytest.fixture(scope="module")
def local(here: Path) -> list[Batch]:
    """The batches from the local disk."""
    return take(Dataset.open(here))


@pytest.fixture
def server(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(remote_module, "_WAIT", tenacity.wait_none())
    with serving(here.parent) as state:
        yield state


@pytest.fixture(params=["no cache", "cache"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Cache | None:
    return Cache(tmp_path / "cache", 10**8, BLOCK) if request.param == "cache" else None


def loader(dataset: Dataset, **changes: object) -> TrainingLoader:
    return TrainingLoader([Source(dataset, "train")], VIEW, replace(LOADER, **changes), seed=5)  # type: ignore[arg-type]


def take(dataset: Dataset, steps: int = STEPS, **changes: object) -> list[Batch]:
    made = loader(dataset, **changes)
    try:
        return list(islice(made, steps))
    finally:
        made.close()


def assert_same(found: list[Batch], wanted: list[Batch]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("video", "audio", "ids", "sources", "labels"))


def ours() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith(("loader", "decode", "read", "prefetch"))}


def soon_over(before: set[threading.Thread], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    for thread in ours() - before:
        thread.join(max(0, end - time.monotonic()))
    assert ours() <= before


# --- a server that is well ---


@pytest.mark.parametrize("store", ["http", "s3"])
def test_the_batches_of_a_local_disk(
    request: pytest.FixtureRequest, server: FileServer, here: Path, local: list[Batch], cache: Cache | None, store: str
) -> None:
    url = f"{server.url}/set"
    if store == "s3":
        url = f"{request.getfixturevalue('s3')}/streamed"
        files = s3fs.S3FileSystem()
        if not files.exists(url):
            fsspec.filesystem("s3").put(f"{here}/", url, recursive=True)
    assert_same(take(Dataset.open(url, cache)), local)
    if cache and store == "http":  # another run needs the server no more
        server.asked.clear()
        assert_same(take(Dataset.open(url, cache)), local)
        assert server.asked == []


def test_reading_ahead_is_ahead_and_sequential(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read all of the window has come, each shard from its beginning to its end."""
    dataset = Dataset.open(f"{server.url}/set", Cache(tmp_path / "cache", 10**8, BLOCK))
    gate, read = threading.Event(), Dataset.read_rows
    monkeypatch.setattr(Dataset, "read_rows", lambda self, *args: (gate.wait(30), read(self, *args))[1])
    made = loader(dataset, streams=1)
    batches, before = iter(made), made.sampler.ahead(0, LOADER.window, range(1))[0][1]
    threading.Thread(target=lambda: (wait_until(lambda: have(dataset, made.reader.spans(0, before))), gate.set())).start()
    next(batches)
    asked = [(name, begin) for name, (begin, _) in zip(server.names, server.asked, strict=True)]
    for shard in set(server.names):  # the first stream begins in the middle of one
        begins = [begin for name, begin in asked if name == shard]
        assert sum(a > b for a, b in pairwise(begins)) <= 1
    made.close()


def have(dataset: Dataset, spans: list[tuple[int, int, int]]) -> bool:
    """Whether the cache has all blocks of these spans."""
    assert dataset.cache
    of = ((dataset.meta.shards[s], n) for s, begin, end in spans for n in range(begin // BLOCK, -(-end // BLOCK)))
    return all(dataset.cache.has(shard.sha256, n, min(BLOCK, shard.bytes - n * BLOCK)) for shard, n in of)


def wait_until(is_so: Callable[[], bool]) -> None:
    for _ in range(3000):
        if is_so():
            return
        time.sleep(0.01)
    pytest.fail("it did not come about in 30 s")


# --- a server that fails ---


@pytest.mark.parametrize("fault", ["stall", pytest.param("mute", marks=pytest.mark.long), "drop", "cut", "503"])
def test_what_passes_leaves_the_batches_as_they_are(
    server: FileServer, local: list[Batch], cache: Cache | None, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = loader(dataset := Dataset.open(f"{server.url}/set", cache))
    batches = iter(made)
    found = [next(batches)]
    dataset.patience, server.faults[:] = 0.5, [fault, "", fault]
    if cache:
        shutil.rmtree(cache.folder)
    found += islice(batches, STEPS - 1)
    made.close()
    assert_same(found, local)
    named = [
        m for m in caplog.messages if re.fullmatch(r"bytes \d+ to \d+ of .*clips-00000\d\.tar did not come within 0\.\d+ s", m)
    ]
    assert server.faults == [] and bool(named) == (fault in ("stall", "mute"))


def test_what_stalls_for_ever_ends_the_run(server: FileServer, cache: Cache | None, caplog: pytest.LogCaptureFixture) -> None:
    """After the loader has told what it waits for; with one sentence, and no thread left."""
    before = ours()
    made = loader(dataset := Dataset.open(f"{server.url}/set", cache), patience_s=0.3)
    batches = iter(made)
    next(batches)
    dataset.patience, server.faults[:] = 0.2, ["stall"] * 1000
    if cache:
        shutil.rmtree(cache.folder)
    address = rf"{server.url}/set/clips-00000\d\.tar"
    said = rf"^bytes \d+ to \d+ of {address} cannot be read \(its source stalled: [^\n]*; check the network"
    with pytest.raises(DatasetError, match=said):
        for _ in range(99):
            next(batches)
    made.close()
    assert [m for m in caplog.messages if re.match(r"no batch for 0\.3 s: still reading .*/clips-00000\d\.tar", m)]
    soon_over(before)


@pytest.mark.parametrize(("change", "sentence"), [(None, "is missing from"), (1000, "is truncated")])
def test_a_shard_that_goes_in_the_middle_of_a_run_is_no_bad_clip(
    here: Path, tmp_path: Path, cache: Cache | None, change: int | None, sentence: str
) -> None:
    shutil.copytree(here, tmp_path / "web" / "set")
    tar = tmp_path / "web" / "set" / "clips-000001.tar"
    with serving(tmp_path / "web") as server:
        made = loader(Dataset.open(f"{server.url}/set", cache))
        batches = iter(made)
        next(batches)
        os.truncate(tar, change) if change else tar.unlink()
        if cache:
            shutil.rmtree(cache.folder, ignore_errors=True)  # it is written to at the same time
        with pytest.raises(DatasetError, match=rf"clips-000001\.tar {sentence}[^\n]*; copy it"):
            for _ in range(99):
                next(batches)
        assert made.bad == {}
        made.close()


# --- a cache that fails ---


def test_the_cache_is_deleted_again_and_again(server: FileServer, local: list[Batch], tmp_path: Path) -> None:
    over, folder = threading.Event(), tmp_path / "cache"

    def delete() -> None:
        while not over.wait(0.01):
            shutil.rmtree(folder, ignore_errors=True)

    thread = threading.Thread(target=delete)
    thread.start()
    try:
        assert_same(take(Dataset.open(f"{server.url}/set", Cache(folder, 10**8, BLOCK))), local)
    finally:
        over.set()
        thread.join()


def test_a_full_disk_is_said_once(
    server: FileServer, local: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = Dataset.open(f"{server.url}/set", Cache(tmp_path / "cache", 10**8, BLOCK))
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(cache_module.os, "write", lambda fd, data, real=os.write: real(full, data))
    assert_same(take(dataset), local)
    os.close(full)
    said = [m for m in caplog.messages if "cache" in m]
    assert len(said) == 1 and re.search(r"No space left on device\); reading goes on without it", said[0])


# --- other processes ---

# It has imported all it needs. For each line: fork so many that work, kill them after a while where one is given, and say
# how they ended. An error in one of them goes through the end of the interpreter.
FORKS = """
import json, os, signal, sys, time
sys.path[:0] = {path!r}
import test_train_streaming
for line in sys.stdin:
    name, jobs, seconds = json.loads(line)
    children = []
    for job in jobs:
        child = os.fork()
        if child == 0:
            getattr(test_train_streaming, name)(*job)
            os._exit(0)
        children.append(child)
    if seconds is not None:
        time.sleep(seconds)
        for child in children:
            os.kill(child, signal.SIGKILL)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


class Forks:
    def __init__(self, child: subprocess.Popen[str]) -> None:
        self.child = child

    def begin(self, name: str, *jobs: list[object], kill_after: float | None = None) -> None:
        """Begin the function `name` of this module with the arguments of each job."""
        assert self.child.stdin
        self.child.stdin.write(json.dumps([name, jobs, kill_after]) + "\n")
        self.child.stdin.flush()

    def end(self) -> list[int]:
        assert self.child.stdout
        found: list[int] = json.loads(self.child.stdout.readline())
        return found


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    command = [sys.executable, "-c", FORKS.format(path=[str(Path(__file__).parent)])]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield Forks(child)
    assert child.stdin and child.stdout
    child.stdin.close()
    assert child.wait(30) == 0
    child.stdout.close()


def save_batches(url: str, folder: str, rank: int, world: int, out: str) -> None:
    dataset = Dataset.open(url, Cache(folder, 10**8, BLOCK))
    made = TrainingLoader([Source(dataset, "train")], VIEW, LOADER, seed=5, rank=rank, world=world)
    torch.save([vars(batch) for batch in islice(made, STEPS)], out)
    made.close()


@pytest.mark.parametrize("world", [1, 2])
def test_two_processes_share_a_cache(server: FileServer, local: list[Batch], tmp_path: Path, world: int, forks: Forks) -> None:
    """Two runs at once, and two ranks of one run: for those each block comes once, or nearly."""
    outs = [str(tmp_path / f"{i}.pt") for i in range(2)]
    jobs = [[f"{server.url}/set", str(tmp_path / "cache"), i % world, world, out] for i, out in enumerate(outs)]
    forks.begin("save_batches", *jobs)
    assert forks.end() == [0, 0]
    for i, out in enumerate(outs):
        for part, batch in zip(torch.load(out, weights_only=True), local, strict=True):
            assert all(torch.equal(part[name], getattr(batch, name)[i % world :: world]) for name in ("video", "audio", "ids"))
    shards = zip(server.names, server.asked, strict=True)
    brought = Counter((name, n) for name, (begin, end) in shards for n in range(-(-begin // BLOCK), -(-end // BLOCK)))
    assert len(brought) > 30
    assert world == 1 or brought.total() <= 1.3 * len(brought)


def read_on(url: str, folder: str) -> None:
    for _ in loader(Dataset.open(url, Cache(folder, 10**8, BLOCK))):
        pass


@pytest.mark.long
def test_killed_while_it_fills_the_cache(server: FileServer, local: list[Batch], tmp_path: Path, forks: Forks) -> None:
    url, folder, deaths = f"{server.url}/set", tmp_path / "cache", 0
    while deaths < 3 or not any(folder.glob("blocks/[!.]*")):
        forks.begin("read_on", [url, str(folder)], kill_after=0.05 + 0.03 * deaths)
        assert forks.end() == [-signal.SIGKILL]
        deaths += 1
        assert deaths < 60
    assert_same(take(Dataset.open(url, Cache(folder, 10**8, BLOCK))), local)


def interrupted(url: str, ready: str) -> None:
    """The source has half an hour to answer."""
    dataset = Dataset.open(url)
    made = loader(dataset)
    batches = iter(made)
    next(batches)
    dataset.patience = 1800.0
    Path(ready).touch()
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        for _ in batches:
            pass
    finally:
        made.close()


def test_an_interrupt_does_not_wait_for_what_stalls(server: FileServer, tmp_path: Path, forks: Forks) -> None:
    """Neither to close the loader, nor at the end of the interpreter."""
    forks.begin("interrupted", [f"{server.url}/set", str(tmp_path / "ready")])
    wait_until((tmp_path / "ready").exists)
    server.faults[:] = ["stall"] * 1000
    ended = threading.Event()
    found: list[int] = []
    threading.Thread(target=lambda: (found.extend(forks.end()), ended.set()), daemon=True).start()
    assert ended.wait(60)
    assert found == [-signal.SIGINT]
