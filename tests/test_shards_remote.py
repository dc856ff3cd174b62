"""Data sets in a bucket and behind HTTP: written, continued and read over real sockets of 127.0.0.1, which fail at times."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import s3fs
import tenacity
from media import make_clip, tiny_profile
from servers import FileServer, serving

from cmacc.shards import place as place_module
from cmacc.shards import remote as remote_module
from cmacc.shards.cache import Cache
from cmacc.shards.clip import Clip
from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.shards.lint import lint
from cmacc.shards.remote import MERGE_GAP, MERGED, Span, merge
from cmacc.shards.writer import DatasetWriter

N = 7
SHARD_BYTES = 100_000


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [make_clip(i) for i in range(N)]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, clips: list[Clip]) -> Path:
    return write(tmp_path_factory.mktemp("served") / "set", clips)


def write(url: str | Path, clips: list[Clip]) -> Any:
    with DatasetWriter(url, tiny_profile(), shard_bytes=SHARD_BYTES) as w:
        for clip in clips:
            if clip.key not in w.keys:
                w.add(clip)
    return url


def objects(url: str) -> dict[str, bytes]:
    """Name and content of everything there but the catalog."""
    files, path = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    return {f.removeprefix(f"{path}/"): files.cat_file(f) for f in files.find(path) if "catalog.zarr" not in f}


# --- in a bucket ---


def test_the_same_bytes_in_a_bucket(s3: str, here: Path, tmp_path: Path, clips: list[Clip]) -> None:
    url = write(f"{s3}/same", clips)
    assert objects(url) == {p.name: p.read_bytes() for p in here.iterdir() if p.is_file() and p.name != ".lock"}
    there, local = Dataset.open(url), Dataset.open(here)
    assert len(local.meta.shards) > 1 and there.fingerprint == local.fingerprint
    assert [there.read(key, check=True) for key in there.keys.tolist()] == [local.read(row) for row in range(N)]
    assert there.catalog.facts() == local.catalog.facts() and lint(url, samples=2) == []
    spans = [(s, a, b) for s, shard in enumerate(local.meta.shards) for a, b in ((0, 1), (512, 9000), (7, 7), (0, shard.bytes))]
    assert there.ranges(spans) == local.ranges(spans)
    cached = Dataset.open(url, Cache(tmp_path, 10_000_000, 50_000))
    assert [cached.read(row) for row in range(N)] == [local.read(row) for row in range(N)]
    there.catalog.add_column("emb", np.arange(2 * N, dtype=np.float32).reshape(N, 2), {"model": "m"})
    added = Dataset.open(url).catalog
    assert added.added == ["emb"] and added.column("emb", np.array([3])).tolist() == [[6, 7]]
    check_a_fork(there, local)


def check_a_fork(dataset: Dataset, local: Dataset) -> None:
    """Connections of the parent are of no use to a child, which has to make its own."""
    wanted = [local.read(row) for row in range(N)]
    process = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(0 if [dataset.read(row, check=True) for row in range(N)] == wanted else 1)
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0


def large(clip: Clip) -> Clip:
    """More than one part of an upload."""
    return replace(clip, members={**clip.members, "mp4": np.random.default_rng(0).bytes(6 << 20)})


def write_and_wait(url: str, clips: list[Clip], ready: Any) -> None:
    with DatasetWriter(url, tiny_profile(), shard_bytes=SHARD_BYTES) as w:
        for clip in clips[:4]:
            w.add(clip)
        w.cut()
        w.add(large(clips[4]))
        ready.set()
        time.sleep(60)


def test_killed_while_a_shard_is_uploaded(s3: str, here: Path, clips: list[Clip], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place_module, "_UPLOAD_BYTES", 5 << 20)  # the least that S3 takes
    url, fork = f"{s3}/killed", multiprocessing.get_context("fork")
    ready = fork.Event()
    process = fork.Process(target=write_and_wait, args=(url, clips, ready))
    process.start()
    assert ready.wait(60)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    begun = s3fs.S3FileSystem().call_s3("list_multipart_uploads", Bucket="tests").get("Uploads", [])
    assert [u["Key"] for u in begun] == ["killed/clips-000001.tar"] and "clips-000001.tar" not in objects(url)
    left = Dataset.open(url)
    assert left.keys.tolist() == [c.key for c in clips[:4]] and lint(url, samples=1) == []
    with pytest.raises(RuntimeError, match="broken"), DatasetWriter(url, tiny_profile(), shard_bytes=SHARD_BYTES) as w:
        w.add(large(clips[4]))
        raise RuntimeError("broken")
    assert "clips-000001.tar" not in objects(url) and len(Dataset.open(url)) == 4
    fsspec.filesystem("s3").rm(f"{url}/catalog.zarr/size", recursive=True)
    with pytest.raises(DatasetError, match=r"column size of .* is missing"):
        Dataset.open(url).read(0)
    write(url, clips)  # makes the catalog again from the shards, and goes on
    again, local = Dataset.open(url), Dataset.open(here)
    assert again.catalog.facts() == local.catalog.facts()
    assert [again.read(row, check=True) for row in range(N)] == [local.read(row) for row in range(N)]
    assert left.read(3) == local.read(3)


# --- behind a server that fails ---


@pytest.fixture
def server(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(remote_module, "_WAIT", tenacity.wait_none())
    with serving(here.parent) as state:
        yield state


@pytest.fixture(params=["http", "s3"])
def served(request: pytest.FixtureRequest, server: FileServer, here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of the data set on that server, as a web page and as an object of a bucket: S3 reads by plain GET."""
    if request.param == "http":
        yield f"{server.url}/{here.name}"
        return
    for name, value in {"ENDPOINT_URL": server.url, "MAX_ATTEMPTS": "1", "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    yield f"s3://{here.name}"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("fault", ["503", "drop", "cut", "500", "429"])
def test_what_passes_is_asked_again(server: FileServer, served: str, here: Path, fault: str) -> None:
    dataset, local = Dataset.open(served), Dataset.open(here)
    dataset.read(0)
    server.faults[:] = [fault] * 3
    assert dataset.read(1, check=True) == local.read(1) and server.faults == []
    server.faults[:] = [fault, "", fault, "", fault]
    spans = [(s, 0, 600) for s in range(len(local.meta.shards))]
    assert dataset.ranges(spans) == local.ranges(spans)


@pytest.mark.parametrize("fault", ["503", "drop"])
def test_what_does_not_pass_is_one_sentence(server: FileServer, served: str, fault: str) -> None:
    dataset = Dataset.open(served)
    dataset.read(0)
    server.faults[:] = [fault] * 200
    with pytest.raises(DatasetError, match=r"bytes \d+ to \d+ of .*/set/clips-000000\.tar cannot be read .*try again$"):
        dataset.read(1)


@pytest.mark.parametrize(("fault", "sentence"), [("403", "cannot be read .*right to read it"), ("404", "is missing from")])
def test_what_is_refused_is_not_asked_again(server: FileServer, served: str, fault: str, sentence: str) -> None:
    dataset = Dataset.open(served)
    dataset.read(0)
    server.faults[:] = [fault] * 9
    with pytest.raises(DatasetError, match=sentence):
        dataset.read(1)
    assert len(server.faults) == 8


# --- behind a server that stalls ---


@pytest.mark.parametrize("fault", ["stall", "mute"])
def test_what_stalls_is_cancelled_and_asked_again(
    server: FileServer, served: str, here: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, local = Dataset.open(served), Dataset.open(here)
    spans = [(s, 10, 600) for s in range(len(local.meta.shards))]
    dataset.ranges(spans)
    dataset.patience = 0.5
    server.asked.clear()
    server.faults[:] = ["", fault]
    assert dataset.ranges(spans) == local.ranges(spans)
    answered = len(server.asked) - (fault == "stall")
    assert server.hung_up == 1 and answered == len(spans)  # what had come was not asked for again
    name = r"bytes 10 to 600 of (http|s3)://.*set/clips-00000\d\.tar did not come within 0\.50\d s"
    assert [m for m in caplog.messages if re.fullmatch(name, m)]


def test_what_always_stalls_is_one_sentence(server: FileServer, served: str) -> None:
    dataset = Dataset.open(served)
    dataset.read(0)
    dataset.patience, server.faults[:] = 0.1, ["stall"] * 200
    said = r"bytes \d+ to \d+ of .*/set/clips-000000\.tar cannot be read \(its source stalled: .* try again$"
    with pytest.raises(DatasetError, match=said):
        dataset.read(1)
    assert server.hung_up >= 4  # the last of five attempts may end after the error


@pytest.mark.parametrize("of", ["dataset.json", "catalog.zarr/zarr.json", "offset/c/0/0"])
def test_what_is_small_may_stall_too(server: FileServer, here: Path, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_SMALL_FILE", 0)
    monkeypatch.setenv("CMACC_PATIENCE_S", "0.3")
    server.of = of
    server.faults[:] = ["stall", "mute"]
    url = f"{server.url}/set"
    assert Dataset.open(url).read(1, check=True) == Dataset.open(here).read(1) and server.hung_up == 2
    server.faults[:] = ["stall"] * 99
    with pytest.raises(DatasetError, match=rf"({url}.* cannot be read|no catalog can be read at {url}).* stalled: .*; check"):
        Dataset.open(url).read(1)


@pytest.mark.parametrize("said", ["much", "-1", "0", "nan", "inf"])
def test_patience_of_the_environment(here: Path, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMACC_PATIENCE_S", said)
    with pytest.raises(DatasetError, match=f"CMACC_PATIENCE_S is '{said}'; give a number of seconds"):
        Dataset.open(here)
    assert pickle.loads(pickle.dumps(Dataset.open(here, patience=7.0))).patience == 7.0


def test_a_file_system_that_cannot_cancel(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, never = fsspec.filesystem("memory"), threading.Event()
    memory.put(f"{here}/", "/stalling/set/", recursive=True)
    dataset = Dataset.open("memory://stalling/set")
    dataset.read(0)
    dataset.patience = 0.2
    asked = []
    monkeypatch.setattr(type(memory), "cat_file", lambda *_, **__: (asked.append(1), never.wait(60))[1])
    with pytest.raises(DatasetError, match=r"clips-000000\.tar cannot be read \(its source stalled"):
        dataset.read(1)
    never.set()
    memory.rm("/stalling", recursive=True)
    assert len(asked) == 1  # a second one might use the same connection


@pytest.mark.parametrize(("change", "sentence"), [(0, "is truncated"), (650, "is truncated"), (None, "is missing from")])
def test_a_shard_that_goes_while_it_is_read(
    server: FileServer, served: str, here: Path, change: int | None, sentence: str, tmp_path: Path
) -> None:
    shutil.copytree(here, tmp_path / "kept")
    dataset, tar = Dataset.open(served), here / "clips-000000.tar"
    dataset.ranges([(0, 0, 9), (1, 0, 9)])
    server.asked.clear()
    try:
        os.truncate(tar, change) if change is not None else tar.unlink()
        with pytest.raises(DatasetError, match=f"clips-000000.tar {sentence}"):
            dataset.ranges([(0, 600, 700)])
        assert len(server.asked) == (change is not None)  # once
    finally:
        shutil.copy(tmp_path / "kept" / "clips-000000.tar", tar)


def test_what_is_gone_is_told_beside_what_stalls(server: FileServer, caplog: pytest.LogCaptureFixture) -> None:
    dataset = Dataset.open(f"{server.url}/set")
    dataset.ranges([(0, 0, 9), (1, 0, 9)])
    server.faults[:] = ["stall", "404"]
    with pytest.raises(DatasetError, match=r"clips-00000[01]\.tar is missing from"):
        dataset.ranges([(0, 0, 9), (1, 0, 9)])
    assert not [m for m in caplog.messages if "did not come" in m]


def test_a_web_server_without_ranges(server: FileServer, here: Path) -> None:
    dataset, local = Dataset.open(f"{server.url}/set"), Dataset.open(here)
    server.faults[:] = ["whole"] * 9
    assert dataset.read(1, check=True) == local.read(1)
    assert dataset.ranges([(0, 5, 700), (0, 80_000, 80_001)]) == local.ranges([(0, 5, 700), (0, 80_000, 80_001)])


def test_a_shard_that_was_changed(server: FileServer, here: Path, tmp_path: Path) -> None:
    shutil.copytree(here, here.parent / "changed")
    for change, sentence in ((100, "is truncated or changed: 100 bytes"), (None, "is missing from")):
        tar = here.parent / "changed" / "clips-000001.tar"
        os.truncate(tar, change) if change else tar.unlink()
        with pytest.raises(DatasetError, match=f"clips-000001.tar.* {sentence}|clips-000001.tar {sentence}"):
            Dataset.open(f"{server.url}/changed", Cache(tmp_path, 10**7, 4096)).ranges([(0, 0, 9), (1, 0, 9)])


def test_neighbours_are_one_request(server: FileServer, here: Path) -> None:
    dataset = Dataset.open(f"{server.url}/set")
    dataset.read(0)
    server.asked.clear()
    local = Dataset.open(here)
    spans = [(0, 1000, 2000), (1, 0, 10), (0, 0, 100), (0, 1500, 1600), (0, 80_000, 80_010), (0, 5, 5)]
    assert dataset.ranges(spans) == local.ranges(spans)
    assert sorted(server.asked) == [(0, 10), (0, 2000), (80_000, 80_010)]


@pytest.mark.parametrize(
    ("spans", "merged"),
    [
        ([], []),
        ([(0, 0, 5), (0, 5 + MERGE_GAP, 9 + MERGE_GAP)], [(0, 0, 9 + MERGE_GAP)]),
        ([(0, 0, 5), (0, 6 + MERGE_GAP, 9 + MERGE_GAP)], [(0, 0, 5), (0, 6 + MERGE_GAP, 9 + MERGE_GAP)]),
        ([(0, 0, 10), (1, 10, 20)], [(0, 0, 10), (1, 10, 20)]),
        ([(0, 0, MERGED), (0, MERGED, MERGED + 1)], [(0, 0, MERGED), (0, MERGED, MERGED + 1)]),
        ([(0, 0, 2 * MERGED), (0, 5, 9)], [(0, 0, 2 * MERGED)]),
        ([(0, 3, 9), (0, 0, 4), (0, 2, 5)], [(0, 0, 9)]),
    ],
)
def test_merging(spans: list[tuple[int, int, int]], merged: list[tuple[int, int, int]]) -> None:
    found = merge([Span(*s) for s in spans])
    assert [tuple(span) for span, _ in found] == merged
    assert sorted(i for _, covered in found for i in covered) == list(range(len(spans)))
    for span, covered in found:
        assert all(span.file == spans[i][0] and span.begin <= spans[i][1] and spans[i][2] <= span.end for i in covered)
