"""What an ingest withstands: kill -9, media damaged at random, a full disk, a long list. Then it is as if nothing had been."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import wave
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import av
import pytest
from test_ingest_media import ffmpeg

from cmacc.flows.work_through import _tree_bytes
from cmacc.ingest import Cause, Ledger
from cmacc.ingest.world import World, WorldConfig, render_world, serve
from cmacc.shards.dataset import Dataset
from cmacc.shards.facts import facts_from_json
from cmacc.shards.lint import lint

SMALL = {"short_side": 64, "fps": 10, "gop": 10, "shard_mb": 1}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    config = WorldConfig(clips=60, eval_clips=15, clip_s=1.5, clips_per_file=4, seed=7)
    return render_world(tmp_path_factory.mktemp("world"), config, workers=2)


def of_world(world: World) -> tuple[object, ...]:
    """What to ingest, as the command is told: some shards' worth of generated clips, several of each source video."""
    return (world.train_manifest, "--url-template", world.root / "media" / "{id}.mp4")


def recordings(folder: Path) -> list[Path]:
    """Forty of the real files, good, odd and talking, the larger ones left out."""
    good, odd, talking = (
        sorted((p for p in (folder / name).iterdir() if p.suffix != ".csv"), key=lambda p: (p.stat().st_size, p.name))
        for name in ("clips", "odd", "grid")
    )
    return [*good[:14], *odd[::6][:14], *talking[::10]]


def table(path: Path, addresses: Iterable[object], column: str = "path") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([(column,), *((str(address),) for address in addresses)])
    return path


# --- what a finished run must look like ---


class Whole(NamedTuple):
    """What an unbroken run gives: sha256 of each member of each clip, what became of each row, seconds of work."""

    members: dict[str, str]
    rows: dict[int, tuple[str, str]]
    seconds: float = 0.0


def whole(home: Path, seconds: float = 0.0) -> Whole:
    """Read from the tars and the ledger alone. Fails where the data set is not sound in itself."""
    assert not lint(home)
    members: dict[str, str] = {}
    for path in sorted(home.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                assert info.name not in members, f"{info.name} is there twice"
                members[info.name] = hashlib.sha256(tar.extractfile(info).read()).hexdigest()  # type: ignore[union-attr]
    with Ledger(home / "ingest" / "ledger.sqlite") as ledger:
        found, counts, staged = list(ledger.rows()), ledger.counts(), ledger.staged()
    done = [row["key"] for row in found if row["state"] == "done"]
    assert sorted(done) == sorted(name.removesuffix(".json") for name in members if name.endswith(".json"))
    assert counts.rows == len(found) == counts.done + counts.failed + counts.bad_rows + counts.pending
    assert (counts.done, counts.pending, sum(counts.causes.values())) == (len(done), 0, counts.failed)
    assert not staged
    for row in (row for row in found if row["state"] == "done"):
        assert row["key"] in Dataset.open(home).keys_of_shard(row["shard"])
    left = [p for p in home.rglob("*") if p.suffix in (".part", ".work", ".partial") or p.parent.name == "staging"]
    assert not left
    return Whole(members, {row["row"]: (row["state"], row["cause"]) for row in found}, seconds)


def same(home: Path, unbroken: Whole) -> None:
    found = whole(home)
    assert found.members.keys() == unbroken.members.keys()
    assert found.members == unbroken.members
    assert found.rows == unbroken.rows


# --- kill -9 ---


@contextlib.contextmanager
def begun(cmacc, *arguments: object) -> Iterator[subprocess.Popen[str]]:  # type: ignore[no-untyped-def]
    """The command, from the moment that it says what is to do. Killed with its process group at the end."""
    with subprocess.Popen(
        cmacc.command("ingest", *arguments, *OPTIONS), env=cmacc.environment, text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, start_new_session=True,
    ) as child:  # fmt: skip
        try:
            assert child.stderr is not None
            child.stderr.readline()
            yield child
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def run_whole(cmacc, home: Path, *arguments: object) -> Whole:  # type: ignore[no-untyped-def]
    with begun(cmacc, *arguments, "--out", home) as child:
        begin = time.monotonic()
        _, said = child.communicate()
        assert child.returncode == 0, said
        seconds = time.monotonic() - begin
    return whole(home, seconds)


def kill_and_continue(cmacc, home: Path, unbroken: Whole, kills: int, draw: random.Random, *arguments: object) -> None:  # type: ignore[no-untyped-def]
    """Kill it `kills` times, at moments drawn from all of an unbroken run's work, each after what the one before had done."""
    moments = sorted(draw.uniform(0, unbroken.seconds) for _ in range(kills))
    for last, moment in pairwise([0.0, *moments]):
        with begun(cmacc, *arguments, "--out", home):
            time.sleep(moment - last)
    cmacc("ingest", *arguments, "--out", home, *OPTIONS)
    same(home, unbroken)


@pytest.fixture(scope="module")
def unbroken(cmacc, world: World, tmp_path_factory: pytest.TempPathFactory) -> Whole:  # type: ignore[no-untyped-def]
    """The world, ingested in one go, into more than one shard."""
    home = tmp_path_factory.mktemp("unbroken") / "data"
    found = run_whole(cmacc, home, *of_world(world))
    assert len(list(home.glob("*.tar"))) > 1
    return found


def test_killed_and_continued(cmacc, world: World, unbroken: Whole, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    kill_and_continue(cmacc, tmp_path / "data", unbroken, 1, random.Random(1), *of_world(world))


@pytest.mark.long
def test_killed_and_continued_on_recordings(cmacc, real_data: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    files = table(tmp_path / "list.csv", recordings(real_data))
    unbroken = run_whole(cmacc, tmp_path / "whole", files)
    assert {state for state, _ in unbroken.rows.values()} == {"done", "failed"}
    kill_and_continue(cmacc, tmp_path / "data", unbroken, 3, random.Random(2), files)


@pytest.mark.long
def test_killed_twenty_times_on_recordings(cmacc, real_data: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    files = table(tmp_path / "list.csv", recordings(real_data))
    unbroken = run_whole(cmacc, tmp_path / "whole", files)
    for trial in range(5):
        kill_and_continue(cmacc, tmp_path / f"data{trial}", unbroken, 4, random.Random(trial), files)


@pytest.mark.long
def test_killed_and_continued_over_http(cmacc, real_data: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    names = [p.name for p in recordings(real_data) if p.suffix in (".mp4", ".webm")][:10]
    with serve(real_data) as url:
        addresses = [f"{url}/{'clips' if (real_data / 'clips' / name).exists() else 'odd'}/{name}" for name in names]
        what = (table(tmp_path / "list.csv", addresses, "url"), "--allow-private")
        unbroken = run_whole(cmacc, tmp_path / "whole", *what)
        kill_and_continue(cmacc, tmp_path / "data", unbroken, 1, random.Random(3), *what)


# --- killed at a chosen step, not at a moment ---


def die_at(step: int | None, arguments: list[str], told: Callable[[int], None] | None = None) -> None:
    """Ingest, and die by SIGKILL right before the step-th thing that lasts: a rename, a removal or a commit of the ledger."""
    import sqlalchemy as sa

    from cmacc.flows.ingest import ingest

    taken = 0

    def take(*_: object) -> None:
        nonlocal taken
        taken += 1
        if taken == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def heard(event: str, _: object) -> None:
        if event in ("os.rename", "os.remove", "os.rmdir"):
            take()

    sys.addaudithook(heard)
    sa.event.listen(sa.Engine, "commit", take)
    manifest, out, template = arguments
    ingest.fn([manifest], out, url_template=template, **SMALL)  # type: ignore[arg-type]
    if told:
        told(taken)


def die_often(steps: int, seed: int, manifest: str, home: str, template: str) -> None:
    """In a process of its own: an unbroken run in `home`/whole, then runs in `home`/STEP, each killed there and continued.

    The process forks before it has threads, so that the imports are paid for once.
    """
    import cmacc.flows.ingest  # noqa: F401

    def forked(step: int | None, name: str) -> tuple[int, int]:
        """(status, steps taken)."""
        get, put = os.pipe()
        if not (pid := os.fork()):
            with contextlib.suppress(BaseException):
                die_at(step, [manifest, f"{home}/{name}", template], lambda n: os.write(put, str(n).encode()) and None)
                os._exit(0)
            os._exit(1)
        os.close(put)
        with os.fdopen(get) as pipe:
            said = pipe.read()
        return os.waitpid(pid, 0)[1], int(said or 0)

    status, last = forked(None, "whole")
    assert status == 0 and last > 20
    draw = random.Random(seed)
    for i in range(steps):
        # one of each stretch of the run
        step = draw.randint(1 + last * i // steps, last * (i + 1) // steps)
        name = f"step{step}of{last}"
        assert forked(step, name)[0] == signal.SIGKILL
        assert forked(None, name)[0] == 0


def killed_at_steps(steps: int, seed: int, world: World, home: Path, environment: dict[str, str]) -> None:
    home.mkdir()
    manifest, _, template = map(str, of_world(world))
    code = f"from {Path(__file__).stem} import die_often; die_often({steps}, {seed}, {manifest!r}, {str(home)!r}, {template!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "PYTHONPATH": str(Path(__file__).parent)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    unbroken = whole(home / "whole")
    for path in sorted(home.glob("step*")):
        same(path, unbroken)


def test_killed_between_any_two_steps(cmacc, world: World, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    killed_at_steps(3, 0, world, tmp_path / "trials", cmacc.environment)


@pytest.mark.long
def test_killed_at_a_hundred_steps(cmacc, world: World, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    killed_at_steps(100, 1, world, tmp_path / "trials", cmacc.environment)


# --- media damaged at random ---

_BOXES = re.compile(rb"ftyp|moov|trak|mdia|stbl|stsd|stts|ctts|stsc|stsz|stco|co64|elst|avcC|esds|mdat|moof|LIST|movi|idx1|strf")


def _flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.randint(1, 64)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _span(data: bytearray, draw: random.Random) -> slice:
    begin = draw.randrange(len(data))
    return slice(begin, begin + draw.randint(1, max(2, len(data) // 8)))


def _zero(data: bytearray, draw: random.Random) -> None:
    span = _span(data, draw)
    data[span] = bytes(len(data[span]))


def _double(data: bytearray, draw: random.Random) -> None:
    span = _span(data, draw)
    data[span.stop : span.stop] = data[span]


def _remove(data: bytearray, draw: random.Random) -> None:
    del data[_span(data, draw)]


def _insert(data: bytearray, draw: random.Random) -> None:
    span = _span(data, draw)
    data[span.start : span.start] = draw.randbytes(span.stop - span.start)


def _truncate(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(16, len(data)) :]


def _swap(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(1, len(data))
    data[:] = data[at:] + data[:at]


def _garbage(data: bytearray, draw: random.Random) -> None:
    header = draw.choice((64, 1024, 8192, 65536))
    data[header:] = draw.randbytes(max(len(data) - header, 0))


def _huge(data: bytearray, draw: random.Random) -> None:
    """Absurd sizes and counts beside the names of boxes; of formats without any, near the beginning."""
    places = [m.start() for m in _BOXES.finditer(data)] or [draw.randrange(8, min(4096, len(data) - 16)) for _ in range(8)]
    for at in draw.sample(places, min(draw.randint(1, 3), len(places))):
        at += draw.choice((-4, 4, 8, 12))
        data[at : at + 4] = draw.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x00", b"\x00\xff\xff\xff"))


MUTATIONS = {f.__name__.strip("_"): f for f in (_flip, _zero, _double, _remove, _insert, _truncate, _swap, _garbage, _huge)}


def mutate(files: list[Path], folder: Path, count: int, seed: int) -> None:
    """`count` damaged copies, every mutation in turn; the name says which, of which file."""
    folder.mkdir()
    draw = random.Random(seed)
    for n, name in zip(range(count), list(MUTATIONS) * count, strict=False):
        file = draw.choice(files)
        data = bytearray(file.read_bytes())
        MUTATIONS[name](data, draw)
        (folder / f"{n:03d}-{name}-{file.stem}{file.suffix}").write_bytes(data)


def damaged(files: list[Path], folder: Path, count: int, seed: int) -> None:
    """Every damaged file becomes a clip that decodes in full, or fails by a cause that is about the file."""
    from cmacc.flows.ingest import ingest

    mutate(files, folder / "media", count, seed)
    home = folder / "data"
    counts = ingest.fn([str(folder / "media")], str(home), timeout_s=60.0, **SMALL)  # type: ignore[arg-type]
    with Ledger(home / "ingest" / "ledger.sqlite") as ledger:
        causes = {Path(row["address"]).name: (row["cause"], row["detail"]) for row in ledger.rows() if row["state"] == "failed"}
    assert not {name: why for name, why in causes.items() if why[0] in (Cause.CRASH, Cause.TIMEOUT)}
    assert counts["rows"] == count
    assert 0 < counts["done"] < count
    whole(home)
    decode_in_full(home)


def decode_in_full(home: Path) -> None:
    dataset = Dataset.open(home)
    for row in range(len(dataset)):
        members = dataset.read(row, check=True)
        facts = facts_from_json(members["json"])
        with av.open(io.BytesIO(members["mp4"])) as file:
            assert sum(1 for _ in file.decode(video=0)) == facts.n_frames
        with av.open(io.BytesIO(members["flac"])) as file:
            samples = sum(frame.samples for frame in file.decode(audio=0))
        assert samples == round(facts.duration_s * dataset.profile.audio_rate)


def test_damaged_media(world: World, tmp_path: Path) -> None:
    damaged(sorted((world.root / "media").glob("*.mp4"))[:4], tmp_path, 18, 1)


def test_damaged_recordings(real_data: Path, tmp_path: Path) -> None:
    damaged([p for p in sorted((real_data / "clips").iterdir()) if p.stat().st_size < 600_000], tmp_path, 27, 2)


def test_sound_that_cannot_be_mixed_is_no_crash(tmp_path: Path) -> None:
    """Twenty-one channels of no known layout: what a flipped byte made of a recording with two."""
    from cmacc.flows.ingest import ingest

    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((21, 2, 8000, 0, "NONE", ""))
        file.writeframes(random.Random(0).randbytes(2 * 21 * 16000))
    picture = ("-f", "lavfi", "-i", "testsrc=size=64x48:rate=10", "-t", 2)
    ffmpeg(*picture, "-i", tmp_path / "a.wav", "-c:v", "libx264", "-c:a", "copy", "-shortest", tmp_path / "a.mkv")
    with pytest.raises(ValueError, match=r"could be had \(1 undecodable\)"):
        ingest.fn([str(tmp_path / "a.mkv")], str(tmp_path / "data"), **SMALL)  # type: ignore[arg-type]


@pytest.mark.long
def test_five_hundred_damaged_recordings(real_data: Path, world: World, tmp_path: Path) -> None:
    damaged([*sorted((real_data / "clips").iterdir()), *sorted((world.root / "media").glob("*.mp4"))], tmp_path, 500, 3)


# --- a full disk ---


class Disk:
    """A disk of so many KiB at `path`, seen from its own mount namespace alone, which goes with its process."""

    def __init__(self, shell: subprocess.Popen[str], path: Path, kib: int) -> None:
        self.shell, self.path = shell, path
        self._do(f"mount -t tmpfs -o size={kib}k disk {path}")

    def grow(self, kib: int) -> None:
        self._do(f"mount -o remount,size={kib}k {self.path}")

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """A command that sees the disk."""
        enter = ["nsenter", f"--target={self.shell.pid}", "--user", "--preserve-credentials", "--mount"]
        return subprocess.run([*enter, *command], capture_output=True, text=True, check=False, timeout=300, **options)

    def copy(self, folder: Path) -> Path:
        """What is on it, for those outside: SQLite would follow /proc to the wrong disk."""
        shutil.copytree(f"/proc/{self.shell.pid}/root{self.path}", folder)
        return folder

    def _do(self, command: str) -> None:
        assert self.shell.stdin is not None and self.shell.stdout is not None
        self.shell.stdin.write(f"{command} && echo done || echo no\n")
        self.shell.stdin.flush()
        if self.shell.stdout.readline() != "done\n":
            raise OSError(f"`{command}` is refused")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Disk]]:
    """Makes a small disk."""
    path = tmp_path / "disk"
    path.mkdir()
    with subprocess.Popen(
        ["unshare", "--map-root-user", "--mount", "sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    ) as shell:  # fmt: skip

        def make(kib: int) -> Disk:
            try:
                return Disk(shell, path, kib)
            except OSError:
                pytest.skip("nobody may mount a small disk here, not even in a namespace of their own (unshare -rm)")

        yield make
        shell.kill()


def fill_and_continue(cmacc, disk: Disk, unbroken: Whole, arguments: tuple[object, ...], look: Path) -> int:  # type: ignore[no-untyped-def]
    """Fill the disk; what is there is sound; with more room the same command finishes. Returns the clips that were there."""
    home = disk.path / "data"
    command = cmacc.command("ingest", *arguments, "--out", home, *OPTIONS)
    full = disk.run(command, env=cmacc.environment)
    said = [line for line in full.stderr.splitlines() if line.startswith("cmacc:")]
    assert (full.returncode, len(said)) == (1, 1), full.stderr
    assert re.search(rf"(no room|no space).*{re.escape(str(disk.path))}", said[0]), said[0]
    there = disk.copy(look / "full") / "data"
    clips = 0
    if (there / "dataset.json").exists():
        assert not lint(there)
        clips = len(Dataset.open(there))
    disk.grow(64 << 10)
    more = disk.run(command, env=cmacc.environment)
    assert more.returncode == 0, more.stderr
    same(disk.copy(look / "more") / "data", unbroken)
    return clips


def test_a_full_disk(cmacc, world: World, unbroken: Whole, tmp_path: Path, disk: Callable[[int], Disk]) -> None:  # type: ignore[no-untyped-def]
    # room for the first shard, not for the second beside what waits for it
    assert fill_and_continue(cmacc, disk(3700), unbroken, of_world(world), tmp_path) > 0


@pytest.mark.long
@pytest.mark.parametrize("kib", [8, 64, 160, *range(400, 4000, 400)])
def test_disks_of_many_sizes(
    cmacc,  # type: ignore[no-untyped-def]
    world: World,
    unbroken: Whole,
    tmp_path: Path,
    disk: Callable[[int], Disk],
    kib: int,
) -> None:
    fill_and_continue(cmacc, disk(kib), unbroken, of_world(world), tmp_path)


def test_little_scratch_makes_small_shards(world: World, unbroken: Whole, tmp_path: Path) -> None:
    from cmacc.flows.ingest import ingest

    manifest, _, template = map(str, of_world(world))
    home = tmp_path / "data"
    ingest.fn([manifest], str(home), url_template=template, options={"scratch_gb": 1e-6}, **SMALL)  # type: ignore[arg-type]
    same(home, unbroken)
    assert len(list(home.glob("*.tar"))) > 3


def test_the_room_is_measured_while_others_tidy_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scratch folder that goes between its name and its content is no reason to end the run."""
    (tmp_path / "a.work").mkdir()
    (tmp_path / "a.work" / "a.mp4").write_bytes(bytes(100_000))
    (tmp_path / "b.tar").write_bytes(bytes(8192))
    really = os.scandir

    def scan(path: Any = ".") -> Any:
        if str(path).endswith(".work"):
            shutil.rmtree(path)
        return really(path)

    assert _tree_bytes(tmp_path) > 100_000
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scan)
        assert _tree_bytes(tmp_path) == 8192


# --- a long list ---


def peak_mib(cmacc, home: Path, *arguments: object) -> float:  # type: ignore[no-untyped-def]
    """The most memory that the command's own process ever held."""
    code = (
        "import sys; from pathlib import Path; from cmacc.flows.cli import main\n"
        "try: main()\n"
        "finally: print(next(x for x in Path('/proc/self/status').read_text().splitlines() if x.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "ingest", *map(str, arguments), "--out", str(home), "--set", "checks.still=off", *OPTIONS],
        env=cmacc.environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout.splitlines()[-1].split()[1]) / 1024


@pytest.mark.long
def test_memory_does_not_grow_with_the_list(cmacc, world: World, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    videos = sorted((world.root / "media").glob("*.mp4"))[:10]
    peaks = {}
    for rows in (100, 2000):
        lines = [f"{videos[i % 10]},{i // 10 / 100:.2f},{i // 10 / 100 + 0.4:.2f}\n" for i in range(rows)]
        (tmp_path / f"{rows}.csv").write_text("path,start,end\n" + "".join(lines))
        peaks[rows] = peak_mib(cmacc, tmp_path / f"data{rows}", tmp_path / f"{rows}.csv")
        assert len(Dataset.open(tmp_path / f"data{rows}")) == rows
    assert peaks[2000] < 1.1 * peaks[100], peaks
