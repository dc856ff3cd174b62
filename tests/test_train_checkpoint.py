"""Checkpoints: what is saved comes back, nothing half-written is ever used, a save that fails harms nothing, no code is run."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import math
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch
from fsspec.implementations.memory import MemoryFileSystem
from killing import killing
from torch import Tensor

from cmacc.shards.place import place
from cmacc.shards.publish import PartFile
from cmacc.train.export.trained import load_trained
from cmacc.train.running import checkpoint
from cmacc.train.running.checkpoint import CheckpointError, before, find_checkpoint, latest, load
from cmacc.train.running.checkpointer import CheckpointConfig, Checkpointer

TYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool,
)  # fmt: skip


def state(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model.weight": torch.randn(40, 5, generator=generator),
        "model.filter": torch.randn(3, 2, 4, 4, generator=generator).to(memory_format=torch.channels_last),
        "optimiser.step.model.weight": torch.tensor(float(step)),
        "model.none": torch.zeros(0, 3),
        **{f"of.{dtype}": torch.randint(0, 2, (3,), generator=generator).to(dtype) for dtype in TYPES},
    }


def facts(step: int) -> dict[str, Any]:
    return {"config": {"text": "é", "rate": 0.1 + step, "large": 2**70}, "loader": {"position": step, "keys": [["a", None]]}}


def save(where: str | Path, *steps: int, keep: int = 2, **options: Any) -> None:
    """Each of these steps, whole."""
    saver = Checkpointer(where, CheckpointConfig(keep=keep, **options))
    for step in steps:
        saver.save(step, state(step), facts(step))
        assert saver.wait() == f"{os.fspath(where)}/step-{step:08d}.safetensors"
        assert (saver.step, saver.failed) == (step, 0)


def assert_holds(address: str | None, step: int) -> None:
    assert address is not None
    found, wanted = load(address), state(step)
    assert (found.address, found.step, found.facts) == (address, step, facts(step))
    assert found.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor), name
    assert {"torch", "python", "cmacc", "nvidia-dali-cuda130"} == set(found.description["versions"])


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def both(*steps: int) -> list[str]:
    return sorted(["latest", *(f"step-{step:08d}{end}" for step in steps for end in (".json", ".safetensors"))])


@pytest.fixture
def memory() -> Iterator[str]:
    url = f"memory://{uuid.uuid4().hex}/checkpoints"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


# --- what is saved comes back ---


def test_round_trip_and_the_last_few_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    assert latest(folder) is None
    for step in (1, 2, 99, 100, 12345):
        save(folder, step)
        assert_holds(latest(folder), step)
    assert files(folder) == both(100, 12345)
    assert_holds(str(folder / "step-00000100.safetensors"), 100)
    assert before(str(folder / "step-00012345.safetensors")) == str(folder / "step-00000100.safetensors")
    assert before(str(folder / "step-00000100.safetensors")) is None
    save(folder, 20000, keep=1)
    assert files(folder) == both(20000)


def test_any_reader_of_safetensors_reads_it(tmp_path: Path) -> None:
    save(tmp_path, 3)
    found = safetensors.torch.load_file(tmp_path / "step-00000003.safetensors")
    assert found.keys() == state(3).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state(3).items())
    data = (tmp_path / "step-00000003.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin = 8 + int.from_bytes(data[:8], "little")
    for name, tensor in state(3).items():
        assert (begin + header[name]["data_offsets"][0]) % tensor.element_size() == 0, "memory-mapped, it would be misaligned"


def test_what_it_does_not_hold_is_said_at_once(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path, CheckpointConfig())
    with pytest.raises(TypeError, match="not JSON serializable"):
        saver.save(1, state(1), {"path": tmp_path})
    saver.save(1, {"z": torch.zeros(2, dtype=torch.complex64)}, {})
    saver.close()
    assert saver.failed == 1
    assert "z is of torch.complex64, which a checkpoint does not hold" in str(saver.error)
    assert latest(tmp_path) is None


@pytest.mark.parametrize("asynchronous", [True, False])
def test_it_is_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
    """Training changes the tensors, and what the facts refer to, while they are being written."""
    saver = Checkpointer(tmp_path, CheckpointConfig(asynchronous=asynchronous))
    gate, write, said = threading.Event(), PartFile.write, facts(5)

    def slow(self: PartFile, data: bytes | memoryview) -> int:
        if asynchronous:
            assert gate.wait(60)
        return write(self, data)

    monkeypatch.setattr(PartFile, "write", slow)
    for step in (5, 6):  # the second time the memory of the first is used again
        tensors, said = state(step), facts(step)
        gate.clear()
        saver.save(step, tensors, said)
        for tensor in tensors.values():
            tensor.fill_(1)
        said["loader"]["position"] = -1
        gate.set()
        assert_holds(saver.wait(), step)


def test_a_save_waits_for_the_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Checkpointer(tmp_path, CheckpointConfig())
    gate, write, wait = threading.Event(), PartFile.write, saver.wait
    events: list[str] = []

    def slow(self: PartFile, data: bytes | memoryview) -> int:
        assert gate.wait(60)
        events.append(self.path.name)
        return write(self, data)

    def opened(timeout: float | None = None) -> str | None:
        events.append("waits")
        gate.set()
        return wait(timeout)

    monkeypatch.setattr(PartFile, "write", slow)
    saver.save(1, state(1), facts(1))
    assert latest(tmp_path) is None
    monkeypatch.setattr(saver, "wait", opened)
    saver.save(2, state(2), facts(2))
    assert_holds(wait(), 2)
    assert_holds(str(tmp_path / "step-00000001.safetensors"), 1)
    order = [key for key, _ in itertools.groupby(event.partition(".")[0] for event in events if event != "latest")]
    assert order == ["waits", "step-00000001", "step-00000002"]


def test_a_store_that_hangs_does_not_hold_up_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    saver, gate, write = Checkpointer(tmp_path, CheckpointConfig()), threading.Event(), PartFile.write
    monkeypatch.setattr("cmacc.train.running.checkpointer._PATIENCE_S", 0.01)
    monkeypatch.setattr(PartFile, "write", lambda self, data: gate.wait(60) and write(self, data))
    saver.save(2, state(2), facts(2))
    saver.save(3, state(3), facts(3))
    assert saver.failed == 1
    assert "step 3 could not be saved" in caplog.text
    assert "the one of step 1 stays the latest" in caplog.text
    saver.close()
    assert "the checkpoint of step 2 was not through after 0 s and is left behind: see to " in caplog.text
    assert saver.failed == 2
    gate.set()
    assert_holds(saver.wait(), 2)


def test_a_step_that_is_saved_is_not_written_over(tmp_path: Path) -> None:
    save(tmp_path, 4)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    saver = Checkpointer(tmp_path, CheckpointConfig())
    saver.save(4, state(5), facts(5))
    assert_holds(saver.wait(), 4)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_when_it_is_due(tmp_path: Path) -> None:
    now = time.monotonic()
    saver = Checkpointer(tmp_path, CheckpointConfig(steps=10, minutes=2))
    assert [step for step in range(31) if saver.due(step, now)] == [10, 20, 30], "not before the first step"
    assert not saver.due(7, now + 100)
    assert saver.due(7, now + 130)
    saver.save(7, state(7), facts(7))
    assert not saver.due(7, now + 1000)
    assert not saver.due(8, now + 100)
    assert saver.due(10, now)
    saver.close()
    assert not Checkpointer(tmp_path, CheckpointConfig(steps=7, minutes=0)).due(7, now), "it goes on from there"
    never = Checkpointer(tmp_path, CheckpointConfig(steps=0, minutes=0))
    assert not any(never.due(step, now + 1e9) for step in range(100))


@pytest.mark.parametrize("changes", [
    {"steps": -1}, {"minutes": -1.0}, {"minutes": math.inf}, {"minutes": math.nan}, {"keep": 0}, {"keep_minutes": -0.5},
    {"grace_s": 0.0}, {"grace_s": math.nan},
])  # fmt: skip
def test_impossible_settings(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=rf"^checkpoint\.{name} is .*; give "):
        CheckpointConfig(**changes)


# --- what is kept ---


@pytest.mark.parametrize("anew", [False, True])
def test_one_each_hour_is_kept_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: bool) -> None:
    """Also when the run is begun again after each save."""
    hours = iter([0, 0.4, 0.9, 1.0, 1.5, 1.9, 2.0, 2.7, 2.8, 4.9, 5.0, 5.1])
    monkeypatch.setattr("time.time", lambda: clock)
    saver = Checkpointer(tmp_path, CheckpointConfig(keep=2, keep_minutes=60))
    for step, hour in enumerate(hours, 1):
        clock = 1e9 + 3600 * hour
        if anew:
            saver = Checkpointer(tmp_path, CheckpointConfig(keep=2, keep_minutes=60))
        saver.save(step, state(step), facts(step))
        saver.wait()
    assert files(tmp_path) == both(4, 7, 10, 11, 12)


def test_none_is_kept_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hours = itertools.count()
    monkeypatch.setattr("time.time", lambda: 3600.0 * next(hours))
    save(tmp_path, *range(1, 7), keep=1, keep_minutes=0)
    assert files(tmp_path) == both(6)


def test_a_clock_that_was_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not keep the next hours from being kept."""
    hours = [9000.0, 1.0, 1.5, 2.1, 2.2, 2.3]
    monkeypatch.setattr("time.time", lambda: clock)
    saver = Checkpointer(tmp_path, CheckpointConfig(keep=1, keep_minutes=60))
    for step, hour in enumerate(hours, 1):
        clock = 3600 * hour
        saver.save(step, state(step), facts(step))
        saver.wait()
    assert files(tmp_path) == both(4, 6)


# --- killed at any moment ---

WORK = """
import os, signal
import torch
torch.set_num_threads(1)
import test_train_checkpoint as tests
from cmacc.train.running.checkpointer import CheckpointConfig, Checkpointer

def killed_at(number):
    "Kill this process in the number-th thing that it asks of the file system; in a write, when half is written."
    count = [0]
    def counted(name, call):
        def asked(*arguments, **options):
            count[0] += 1
            if count[0] == number:
                if name == "write":
                    fd, data = arguments
                    call(fd, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return asked
    for name in ("open", "write", "fsync", "replace", "unlink"):
        setattr(os, name, counted(name, getattr(os, name)))
"""

AT_EACH = (
    WORK
    + """
import shutil, sys
for line in sys.stdin:
    home, step = line.split()
    step = int(step)
    for number in range(1, 1000):
        folder = f"{home}/{number}"
        shutil.copytree(f"{home}/0", folder)
        child = os.fork()
        if child == 0:
            saver = Checkpointer(folder, CheckpointConfig(keep=2, asynchronous=False))
            killed_at(number)
            saver.save(step, tests.state(step), tests.facts(step))
            os._exit(saver.failed)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended in (0, -signal.SIGKILL), ended
        if ended == 0:
            print(number, flush=True)
            break
"""
)


@pytest.fixture(scope="module")
def kill_at_each() -> Iterator[Callable[[Path, int], int]]:
    """Save a step in copies of `home/0`, each killed one operation later; how many copies there are: the last is whole."""
    code = f"import sys\nsys.path[:0] = [{str(Path(__file__).parent)!r}]\n{AT_EACH}"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin and child.stdout
    stdin, stdout = child.stdin, child.stdout

    def kill(home: Path, step: int) -> int:
        stdin.write(f"{home} {step}\n")
        stdin.flush()
        return int(stdout.readline())

    yield kill
    stdin.close()
    assert child.wait(30) == 0
    stdout.close()


def assert_whole(folder: Path) -> None:
    """Each JSON says that there is a whole checkpoint, not the latest one alone."""
    for path in folder.glob("step-*.json"):
        load(path)


@pytest.mark.parametrize("standing", [(), (1, 2), (1, 2, 3)])
def test_killed_at_each_operation_of_a_save(
    tmp_path: Path, standing: tuple[int, ...], kill_at_each: Callable[[Path, int], int]
) -> None:
    """Before, in and after the write of each file, its fsync, its rename, the pointer's, and each removal."""
    (tmp_path / "0").mkdir()
    save(tmp_path / "0", *standing, keep=3)
    step = len(standing) + 1
    seen = set()
    number = kill_at_each(tmp_path, step)
    assert number > (15 if standing else 11)
    for folder in (tmp_path / str(n) for n in range(1, number + 1)):
        assert_whole(folder)
        found = latest(folder)
        seen.add(found and Path(found).name)
        if found is None or f"{step:08d}" not in found:
            assert found == (str(folder / f"step-{standing[-1]:08d}.safetensors") if standing else None)
        if found:
            assert_holds(found, int(found[-20:-12]))
        saver = Checkpointer(folder, CheckpointConfig(keep=2))
        saver.save(step + 1, state(step + 1), facts(step + 1))
        assert_holds(saver.wait(), step + 1)
        left = files(folder)
        assert len(left) == 5 or (len(left) == 3 and not standing), left
        assert not [name for name in left if name.endswith(".part")]
    assert len(seen) == 2, "before the pointer the former one, after it the new one"


def test_killed_at_any_time(tmp_path: Path) -> None:
    """Of a process that saves in a thread while it changes the tensors; the same folder each time."""
    work = (
        WORK
        + """
def work(folder):
    saver = Checkpointer(folder, CheckpointConfig(keep=2))
    step = saver.step or 0
    while True:
        step += 1
        tensors = tests.state(step)
        saver.save(step, tensors, tests.facts(step))
        for tensor in tensors.values():
            tensor.fill_(1)
"""
    )
    rng, stood_at = np.random.default_rng(), 0
    with killing(work) as kill:
        for _ in range(8):
            assert kill(tmp_path / "checkpoints", rng.uniform(0.0, 0.3))
            found = latest(tmp_path / "checkpoints")
            if found:
                step = load(found).step
                assert step >= stood_at
                assert_holds(found, step)
                stood_at = step
    assert stood_at > 0


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000007.safetensors.part").write_bytes(b"half")
    (tmp_path / "step-00000006.safetensors").write_bytes(b"whole, and no JSON beside it")
    save(tmp_path, 8, keep=1)
    assert files(tmp_path) == both(8)


# --- a disk that is full, a store that fails ---


def assert_went_on(saver: Checkpointer, where: Path, caplog: pytest.LogCaptureFixture, step: int) -> None:
    """Step 1 stays the latest, the log says so once, and the next save is as good as any."""
    assert saver.failed == 1
    assert_holds(saver.wait(), 1)
    assert_holds(latest(where), 1)
    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    said = record.getMessage()
    assert said.startswith(f"step {step} could not be saved in {where} (")
    assert "; the run goes on, the one of step 1 stays the latest: make room there or mend the address" in said
    assert "\n" not in said


@pytest.mark.parametrize("kind", ["file-size limit", "write", "fsync", "replace", "open"])
def test_no_room_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    save(tmp_path, 1)
    saver = Checkpointer(tmp_path, CheckpointConfig())

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if kind == "file-size limit":  # the kernel's own, for this process: the file is cut in the middle
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            saver.save(2, state(2), facts(2))
            saver.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(os, kind, full)
            saver.save(2, state(2), facts(2))
            saver.wait()
    assert isinstance(saver.error, OSError)
    assert_went_on(saver, tmp_path, caplog, 2)
    assert files(tmp_path) == both(1), "what was half written takes up the room that there is"
    saver.save(3, state(3), facts(3))
    assert_holds(saver.wait(), 3)


def test_no_memory_for_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    saver = Checkpointer(tmp_path, CheckpointConfig())

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        saver.save(2, state(2), facts(2))
    assert_went_on(saver, tmp_path, caplog, 2)
    saver.save(3, state(3), facts(3))
    assert_holds(saver.wait(), 3)


class Failing(MemoryFileSystem):
    """A store of which a chosen request fails, with an error of its own kind."""

    protocol = "failing"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False
    count, fails_at = 0, 0
    error: Exception = RuntimeError("503 slow down")

    @classmethod
    def ask(cls) -> None:
        cls.count += 1
        if cls.count == cls.fails_at:
            raise cls.error

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self.ask()
        file = super()._open(path, mode, **options)
        if mode == "wb":
            commit = file.commit
            file.commit = lambda: (self.ask(), commit())
        return file

    def ls(self, *arguments: Any, **options: Any) -> Any:
        self.ask()
        return super().ls(*arguments, **options)

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        self.ask()
        super().pipe_file(path, value, **options)

    def rm(self, *arguments: Any, **options: Any) -> None:
        self.ask()
        super().rm(*arguments, **options)

    def rm_file(self, path: str) -> None:
        self.ask()
        super().rm_file(path)


fsspec.register_implementation("failing", Failing, clobber=True)


@pytest.mark.parametrize("error", [RuntimeError("503 slow down"), OSError(errno.EIO, "broken"), PermissionError("forbidden")])
def test_a_store_whose_every_request_may_fail(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """One after the other: the run goes on, the last checkpoint is whole, the next save is as good as any."""
    told = 0
    for number in itertools.count(1):
        Failing.store.clear()
        Failing.count, Failing.fails_at, Failing.error = 0, 0, error
        url = f"failing://run{number}/checkpoints"
        save(url, 1, 2)
        saver = Checkpointer(url, CheckpointConfig(keep=2))
        caplog.clear()
        Failing.count, Failing.fails_at = 0, number
        saver.save(3, state(3), facts(3))
        stands = saver.wait()
        through, Failing.fails_at = Failing.count < number, 0
        if through:
            break
        assert stands == latest(url)
        assert_holds(stands, 2 if saver.failed else 3)
        loud = [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert len(loud) == 1
        assert str(error) in loud[0].getMessage()
        told += saver.failed
        saver.save(4, state(4), facts(4))
        assert_holds(saver.wait(), 4)
        assert_holds(latest(url), 4)
    assert told >= 5
    assert number - 1 > told, "what fails while old ones are dropped is no failed save"


@pytest.mark.parametrize("what", ["nowhere://x/y", "no right", "no bucket"])
def test_an_address_that_takes_nothing_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "there") if what == "no right" else RuntimeError("NoSuchBucket")

    url = {"no right": str(tmp_path), "no bucket": "failing://x/y"}.get(what, what)
    monkeypatch.setattr("cmacc.shards.place.publish", forbidden)
    monkeypatch.setattr(Failing, "pipe_file", forbidden)
    with pytest.raises(Exception, match=r"does not let us write \(NoSuchBucket\); check|Permission denied|; check the address"):
        Checkpointer(url, CheckpointConfig())


def test_in_s3(s3: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Over a socket: saved, kept, found, loaded, and a bucket that fails in between."""
    import s3fs
    from botocore.exceptions import EndpointConnectionError

    run = f"{s3}/{uuid.uuid4().hex}/run"
    where = f"{run}/checkpoints"
    assert latest(where) is None
    with pytest.raises(CheckpointError, match=r"/run holds no checkpoint; give"):
        find_checkpoint(run)
    save(where, 1, 2, 3)
    assert_holds(find_checkpoint(run), 3)
    assert_holds(find_checkpoint(where), 3)
    assert_holds(find_checkpoint(f"{where}/step-00000002.json"), 2)
    there = s3fs.S3FileSystem()
    there.invalidate_cache()
    assert sorted(name.rpartition("/")[2] for name in there.ls(where, detail=False)) == both(2, 3)

    saver, call = Checkpointer(where, CheckpointConfig()), s3fs.S3FileSystem._call_s3

    async def cut_off(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        if method in ("put_object", "create_multipart_upload", "upload_part"):
            raise EndpointConnectionError(endpoint_url="http://127.0.0.1:1")
        return await call(self, method, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_call_s3", cut_off)
        saver.save(4, state(4), facts(4))
        assert_holds(saver.wait(), 3)
    assert saver.failed == 1
    assert "step 4 could not be saved in s3://tests/" in caplog.text
    saver.save(5, state(5), facts(5))
    assert_holds(saver.wait(), 5)
    there.pipe_file(f"{where}/step-00000005.safetensors", there.cat_file(f"{where}/step-00000005.safetensors")[:-3])
    with pytest.raises(CheckpointError, match=r"s3://.*step-00000005.safetensors is damaged .*write step-00000003 into s3://"):
        load(find_checkpoint(run))


def test_more_than_a_part_of_an_upload_in_s3(s3: str) -> None:
    """Files larger than one block are sent in several parts."""
    where = f"{s3}/{uuid.uuid4().hex}"
    tensors = {"large": torch.arange(9 << 20, dtype=torch.float32), "small": torch.arange(3)}
    saver = Checkpointer(where, CheckpointConfig())
    saver.save(1, tensors, {})
    found = load(saver.wait() or "").tensors
    assert saver.failed == 0
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


# --- files that are damaged, foreign, malicious ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save(folder, 1, 2)
    return folder


def refused(folder: Path) -> str | None:
    """The sentence with which the latest of a folder is refused; None where it is as it was saved."""
    try:
        address = latest(folder)
        assert address
        load(address)
    except CheckpointError as error:
        said = str(error)
        assert str(folder) in said.partition(" ")[0]
        assert said.count("; ") == 1
        assert "\n" not in said
        return said
    assert_holds(address, 2)
    return None


@pytest.mark.parametrize("name", ["step-00000002.safetensors", "step-00000002.json", "latest"])
def test_cut_anywhere(whole: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole, folder)
    data = (folder / name).read_bytes()
    whole_enough = {len(data), len(data) - 1} if name != "step-00000002.safetensors" else set()  # a newline may be missing
    for cut in sorted({*range(0, len(data), max(1, len(data) // 150)), *range(len(data) - 20, len(data))}):
        (folder / name).write_bytes(data[:cut])
        said = refused(folder)
        if name == "latest" and data[:cut].strip() == b"step-00000002":
            assert said is None, "the name alone is what a person may write"
        elif cut not in whole_enough:
            assert said, cut
            assert "write step-0000000" in said
        if said and name != "latest":
            assert said.startswith(str(folder / name))
            assert said.endswith(f"use the one of step 1: write step-00000001 into {folder / 'latest'}")


@pytest.mark.parametrize("name", ["step-00000002.safetensors", "step-00000002.json", "latest"])
def test_a_byte_changed_anywhere(whole: Path, tmp_path: Path, name: str) -> None:
    folder, rng = tmp_path / "checkpoints", np.random.default_rng(0)
    shutil.copytree(whole, folder)
    data = (folder / name).read_bytes()
    places = range(len(data)) if len(data) < 200 else rng.integers(len(data), size=400)
    harmless = 0
    for at in places:
        bad = bytearray(data)
        bad[at] ^= int(rng.integers(1, 256))
        (folder / name).write_bytes(bad)
        harmless += refused(folder) is None
    assert harmless <= (0 if name == "step-00000002.safetensors" else 0.25 * len(places)), "white space of JSON at most"


@pytest.mark.parametrize("name", ["step-00000002.safetensors", "step-00000002.json", "latest"])
def test_noise_instead(whole: Path, tmp_path: Path, name: str) -> None:
    folder, rng = tmp_path / "checkpoints", np.random.default_rng(1)
    shutil.copytree(whole, folder)
    size = (folder / name).stat().st_size
    for length in (*rng.integers(0, 300, size=60), size):
        (folder / name).write_bytes(rng.bytes(int(length)))
        assert refused(folder)
    for text in (
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"null",
        b"[1]",
        b'{"sha256": "x"}',
        b'{"format": 2, "sha256": 1}',
        b"9" * 9000,
    ):
        (folder / name).write_bytes(text)
        assert refused(folder)


def forge(folder: Path, act: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON of step 2 and give it the digest it then must have, in the pointer too."""
    path = folder / "step-00000002.json"
    content = json.loads(path.read_text())
    act(content)
    del content["sha256"]
    content["sha256"] = checkpoint._digest(content)
    path.write_text(json.dumps(content))
    (folder / "latest").write_text(f"step-00000002 {content['sha256']}\n")


def forge_tensors(data: bytes) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        import hashlib

        (folder / "step-00000002.safetensors").write_bytes(data)
        digest = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        forge(folder, lambda content: content.update(tensors=digest))

    return act


class Malice:
    """Unpickled by a careless loader, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


FORGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another format": (lambda f: forge(f, lambda c: c.update(format="2")), "it is of format '2', and this version of"),
    "another step": (lambda f: forge(f, lambda c: c.update(step=1)), "it is of step 1"),
    "no facts": (lambda f: forge(f, lambda c: c.pop("facts")), "it is not the JSON of a checkpoint"),
    "facts a list": (lambda f: forge(f, lambda c: c.update(facts=[])), "its content is not what was written"),
    "tensors a number": (lambda f: forge(f, lambda c: c.update(tensors=5)), "it is not the JSON of a checkpoint"),
    "the files of another step": (
        lambda f: [shutil.copy(f / f"step-00000001{e}", f / f"step-00000002{e}") for e in (".json", ".safetensors")],
        "it is of step 1",
    ),
    "the tensors of another step": (
        lambda f: shutil.copy(f / "step-00000001.safetensors", f / "step-00000002.safetensors"),
        "its bytes are not those that were written",
    ),
    "the pointer of another run": (
        lambda f: (f / "latest").write_text(f"step-00000002 {'0' * 64}\n"),
        "it is not the one that latest names",
    ),
    "empty tensors": (forge_tensors(b""), "damaged or foreign"),
    "a header that claims too much": (forge_tensors((1 << 60).to_bytes(8, "little") + b"{}"), "damaged or foreign"),
    "offsets beyond the end": (
        forge_tensors(header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}') + b"1234"), "damaged or foreign",
    ),
    "a header of noise": (forge_tensors(header(b"\xff" * 40)), "damaged or foreign"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORGED)
def test_foreign_files_are_refused(whole: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole, folder)
    act, sentence = FORGED[kind]
    act(folder)
    said = refused(folder)
    assert said
    assert sentence in said
    assert "write step-00000001 into" in said
    assert said.startswith(f"{folder}/step-00000002")


def test_nothing_is_unpickled(whole: Path, tmp_path: Path) -> None:
    """A pickle in the place of each file, with the digests that it must have."""
    folder, proof = tmp_path / "checkpoints", tmp_path / "ran"
    data = pickle.dumps(Malice(proof), 2)
    for act in (
        forge_tensors(data),
        lambda f: (f / "step-00000002.json").write_bytes(data),
        lambda f: (f / "latest").write_bytes(data),
    ):
        shutil.copytree(whole, folder)
        act(folder)
        assert refused(folder)
        shutil.rmtree(folder)
    assert not proof.exists()
    pickle.loads(data)
    assert proof.exists(), "it is as dangerous as it is meant to be"


@pytest.mark.parametrize("name", [
    "../step-00000001", "/etc/passwd", "", ".", "..", "sub/step-00000001", "step-1", "step-00000001.pt.json", "a\0b",
    "step-00000001 abc", "step-00000001\nstep-00000002", "step-٠٠٠٠٠٠٠١",
])  # fmt: skip
def test_a_pointer_elsewhere_is_refused(whole: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole, folder)
    shutil.copytree(whole, folder / "sub")
    for path in whole.iterdir():
        shutil.copy(path, tmp_path)
    (folder / "latest").write_text(name)
    said = refused(folder)
    assert said == f"{folder}/latest names no checkpoint; use the one of step 2: write step-00000002 into {folder}/latest"
    (folder / "latest").write_text("step-00000002")
    assert refused(folder) is None


def test_a_pointer_to_what_is_gone(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole, folder)
    (folder / "latest").write_text("step-00000009")
    assert refused(folder) == (
        f"{folder}/latest names step-00000009, which is not there; "
        f"use the one of step 2: write step-00000002 into {folder}/latest"
    )
    (folder / "latest").write_text("step-00000002\n")
    (folder / "step-00000002.safetensors").unlink()
    said = refused(folder)
    assert said
    assert said.startswith(f"{folder}/step-00000002.safetensors is not there; use the one of step 1: write step-00000001 into ")
    for path in folder.glob("step-*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"latest names step-00000002, which is not there; no checkpoint is "):
        latest(folder)


def test_without_a_pointer(whole: Path, tmp_path: Path) -> None:
    """The newest whole one: a writer may be killed before its first pointer."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole, folder)
    (folder / "latest").unlink()
    assert_holds(latest(folder), 2)
    (folder / "step-00000002.safetensors").write_bytes(b"cut")
    assert_holds(latest(folder), 1)
    (folder / "step-00000001.json").write_text("{}")
    assert latest(folder) is None


def test_what_is_found(whole: Path, tmp_path: Path, memory: str) -> None:
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match=rf"^{run} holds no checkpoint; give a checkpoint file, or the folder of a run"):
        find_checkpoint(run)
    shutil.copytree(whole, run / "checkpoints")
    newest, first = (str(run / "checkpoints" / f"step-0000000{n}.safetensors") for n in (2, 1))
    for given in (run, f"{run}/", run / "checkpoints", newest, newest.replace(".safetensors", ".json")):
        assert find_checkpoint(given) == newest
    assert find_checkpoint(first) == first
    save(memory, 7)
    (run / "config.json").write_text(json.dumps({"data": [], "checkpoint": {"at": memory}}))
    assert find_checkpoint(run) == f"{memory}/step-00000007.safetensors"
    assert_holds(find_checkpoint(memory), 7)
    with pytest.raises(CheckpointError, match=r"config.json is not a checkpoint; give a file step-NNNNNNNN.safetensors, or"):
        find_checkpoint(run / "config.json")
    with pytest.raises(CheckpointError, match=r"step-00000005.safetensors is not there; use the one of step 2"):
        load(find_checkpoint(run / "checkpoints" / "step-00000005.safetensors"))
    with pytest.raises(CheckpointError, match=r"step-00000005.safetensors is not there; no checkpoint is there that"):
        load(tmp_path / "step-00000005.safetensors")


def test_a_sentence_tells_no_secret() -> None:
    url = "failing://me:secret@host/run"
    place(url).publish("latest", b"?")
    for ask, address in ((latest, url), (load, f"{url}/step-00000009.json"), (load, f"{url}/9"), (find_checkpoint, f"{url}/no")):
        with pytest.raises(CheckpointError, match="failing://host/run") as raised:
            ask(address)
        assert "secret" not in str(raised.value)


def test_a_later_format(whole: Path, tmp_path: Path) -> None:
    """Nothing is wrong with it: no older checkpoint is to be taken instead, but the version that wrote it."""
    run = tmp_path / "run"
    shutil.copytree(whole, run / "checkpoints")
    forge(run / "checkpoints", lambda c: c.update(format=3, versions={"cmacc": "9.1"}))
    said = "is of format 3, and this version of cmacc reads 2; go on with the one that wrote it, cmacc 9.1"
    for look in (latest, find_checkpoint, lambda folder: Checkpointer(folder, CheckpointConfig())):
        with pytest.raises(CheckpointError, match=rf"^{run}/checkpoints/step-00000002.json {said}$"):
            look(run / "checkpoints")
    for load_it in (load, load_trained):
        with pytest.raises(CheckpointError, match=said):
            load_it(run / "checkpoints" / "step-00000002.safetensors")
    assert load(run / "checkpoints" / "step-00000001.json").step == 1


def test_checkpoints_of_format_1(tmp_path: Path) -> None:
    """One sentence, wherever they are met: their pickles are not read."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"format": 1}, folder / "step-00000012.pt")
    sentence = r"has checkpoints of format 1 \(.pt\), which this version does not read; export them with"
    for path in (folder / "step-00000012.pt", tmp_path / "run"):
        with pytest.raises(CheckpointError, match=sentence):
            find_checkpoint(path)
    (folder / "latest").write_text("step-00000012.pt")
    with pytest.raises(CheckpointError, match=sentence):
        latest(folder)
    with pytest.raises(CheckpointError, match=sentence):
        Checkpointer(folder, CheckpointConfig())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the copy into pinned memory")
def test_from_a_gpu(tmp_path: Path) -> None:
    """Queued behind the work that makes the tensor, before the work that changes it."""
    saver = Checkpointer(tmp_path, CheckpointConfig())
    large = torch.randn(4096, 4096, device="cuda")
    for step in (1, 2):
        tensors = {"large": large @ large, "host": torch.tensor(step)}
        wanted = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        tensors["large"].copy_(large @ large)
        saver.save(step, tensors, {})
        for tensor in tensors.values():
            tensor.fill_(7)
        found = load(saver.wait() or "", "cuda").tensors
        assert all(found[name].is_cuda and torch.equal(found[name].cpu(), tensor) for name, tensor in wanted.items())
