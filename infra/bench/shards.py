"""Re-sharding beside the speed of copying, and catalogs of ten million rows.

    python infra/bench/shards.py                 # 4 GB of clips, then of small ones, then catalogs; 16 GB of disk
    python infra/bench/shards.py --gb 1          # a smaller copy
    python infra/bench/shards.py --only catalog  # or copy, open

Copying is `cp --reflink=never` and `sync` on the same files; the webdataset loop does the same filter and a shuffle. Each runs in
a process of its own, in turn, and files are in the page cache for all of them. Clips are random bytes of a real clip's size.
Times are not stable from machine to machine: read the ratios.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cmacc.shards.catalog import Ragged
from cmacc.shards.catalog_writer import CatalogWriter, Column
from cmacc.shards.choice import Choice, make_plan
from cmacc.shards.clip import Clip, Facts
from cmacc.shards.columns import FACTS
from cmacc.shards.dataset import META, Dataset, Meta, Shard
from cmacc.shards.place import place
from cmacc.shards.profile import PROFILES
from cmacc.shards.query import matching
from cmacc.shards.reshard import reshard
from cmacc.shards.writer import DatasetWriter

Fits = Callable[[dict[str, Any]], bool]
REPEATS = 3
SHARD_BYTES = 256 << 20
QUESTIONS: dict[str, Fits] = {
    "motion >= 1 and list_contains(labels, 'Speech')": lambda facts: facts["motion"] >= 1 and "Speech" in facts["labels"],
    "list_contains(labels, 'Dog')": lambda facts: "Dog" in facts["labels"],
}
ROWS, SHARDS = 10_000_000, 10_000


class Cost(NamedTuple):
    """Seconds by the clock, peak resident memory in MB, and what the work returned."""

    wall_s: float
    peak_mb: float
    result: Any


def apart(work: Callable[..., Any], *arguments: Any) -> Cost:
    """Run `work` in a new process, whose start and imports do not count as time but do as memory."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    try:
        return Cost(*ours.recv())
    finally:
        process.join()


def _run(pipe: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if work is loop_files:
        import_module("peers.webdataset_loop")
    began = time.perf_counter()
    result = work(*arguments)
    wall_s = time.perf_counter() - began
    # not getrusage: its figure begins with that of the process that started this one
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    pipe.send((wall_s, int(peak[1]) / 1024 if peak else float("nan"), result))


def noise_clips(total: float, clip_bytes: int) -> Iterator[Clip]:
    """Clips of about `clip_bytes`, two thirds of them video, until there are `total` bytes; one in ten has a dog."""
    random = np.random.default_rng(0)
    noise = random.bytes(64 << 20)
    done = number = 0
    while done < total:
        size = int(clip_bytes * random.uniform(0.5, 1.5))
        begin = int(random.integers(0, len(noise) - size))
        video, sound = noise[begin : begin + size * 2 // 3], noise[begin + 1 : begin + 1 + size // 3]
        facts = Facts(
            source=f"yt_{number // 3:011d}", start_s=float(number), end_s=number + 10.0, duration_s=10.0, n_frames=250, fps=25.0,
            width=340, height=256, keyframes=tuple(range(0, 250, 25)), loudness_db=float(random.uniform(-60, 0)),
            motion=float(random.uniform(0, 10)), labels=("Speech", "Music") if number % 10 else ("Dog",),
        )  # fmt: skip
        yield Clip(f"{facts.source}_{number * 1000}_{number * 1000 + 10_000}", facts, {"mp4": video, "flac": sound})
        done += size
        number += 1


def copy_files(source: str, out: str, _: str) -> int:
    files = sorted(str(p) for p in Path(source).glob("*.tar"))
    Path(out).mkdir()
    subprocess.run(["cp", "--reflink=never", *files, out], check=True)
    os.sync()
    return sum(p.stat().st_size for p in Path(out).iterdir())


def reshard_files(source: str, out: str, where: str) -> int:
    return reshard([source], out, where=where, order="shuffle:1", shard_bytes=SHARD_BYTES).bytes


def loop_files(source: str, out: str, where: str) -> int:
    from peers.webdataset_loop import webdataset_loop  # imported already, by `_run`: it brings torch, whose memory is not ours

    return webdataset_loop(Path(source), Path(out), QUESTIONS[where], SHARD_BYTES)


def bench_copy(folder: Path, gigabytes: float, clip_bytes: int) -> None:
    source = folder / "source"
    with DatasetWriter(source, PROFILES["h264"], shard_bytes=SHARD_BYTES) as writer:
        for clip in noise_clips(gigabytes * 1e9, clip_bytes):
            writer.add(clip)
    there = Dataset.open(source)
    print(f"{gigabytes:g} GB in {len(there)} clips of {clip_bytes >> 10} KiB, {len(there.meta.shards)} shards")
    for where in QUESTIONS:
        bench_question(folder, where)
    shutil.rmtree(source)


def bench_question(folder: Path, where: str) -> None:
    """The three ways in turn, several times; a ratio is of two that came after one another."""
    source = folder / "source"
    ways: dict[str, Callable[[str, str, str], int]] = {
        "cp --reflink=never and sync": copy_files, "cmacc reshard": reshard_files, "webdataset loop": loop_files,
    }  # fmt: skip
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            for path in source.glob("*.tar"):  # into the page cache, for all alike
                with path.open("rb") as file:
                    while file.read(1 << 24):
                        pass
            os.sync()
            costs[name].append(apart(way, str(source), str(folder / "out"), where))
            shutil.rmtree(folder / "out")
    print(f"  where {where}, shuffled")
    for name, found in costs.items():
        speed = statistics.median(c.result / c.wall_s / 1e6 for c in found)
        seconds = statistics.median(c.wall_s for c in found)
        print(f"    {name:<30} {seconds:6.1f} s {speed:8.0f} MB/s written   peak {max(c.peak_mb for c in found):.0f} MB")
    ours = costs["cmacc reshard"]
    speeds = [a.result / a.wall_s * b.wall_s / b.result for a, b in zip(ours, costs["cp --reflink=never and sync"], strict=True)]
    print(f"    speed beside cp and sync {statistics.median(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f})   asked: 0.7")
    times = [b.wall_s / a.wall_s for a, b in zip(ours, costs["webdataset loop"], strict=True)]
    print(
        f"    sooner than the webdataset loop {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})   asked: 5\n"
    )


def make_large(folder: Path) -> None:
    """A data set of ROWS clips in SHARDS shards: its catalog is whole, its shards are files without content."""
    random, each, blocks = np.random.default_rng(0), ROWS // SHARDS, np.arange(ROWS)
    source_of = blocks // 2
    columns: dict[str, Column] = {name: np.zeros(ROWS, dtype) for name, dtype in FACTS.items()}
    columns["duration_s"], columns["end_s"] = random.uniform(1, 10, ROWS), np.full(ROWS, 10.0)
    columns["motion"], columns["loudness_db"] = random.uniform(0, 10, ROWS), random.uniform(-60, 0, ROWS)
    columns["shard"] = (blocks // each).astype(np.int32)
    size = np.tile(np.array([300_000, 150_000, 500]), (ROWS, 1))
    columns["offset"] = (blocks % each)[:, None] * 455_000 + np.array([512, 301_568, 452_608])
    columns["size"] = size
    columns["sha256"] = np.broadcast_to(random.integers(0, 255, (1, 3, 32), dtype=np.uint8), (ROWS, 3, 32))
    columns["fingerprint"] = np.zeros((ROWS, 4), np.uint64)
    columns["split"] = np.zeros(ROWS, np.int16)
    columns["labels"] = Ragged(random.integers(0, 500, 2 * ROWS).astype(np.int32), np.arange(ROWS + 1) * 2)
    columns["keyframes"] = Ragged(np.tile(np.arange(0, 250, 25, dtype=np.int32), ROWS), np.arange(ROWS + 1) * 10)
    columns["duplicate_of"] = Ragged(np.zeros(0, np.uint8), np.zeros(ROWS + 1, np.int64))
    columns["key"], columns["source"] = _texts("yt_%011d_%07d_x", blocks), _texts("yt_%011d", source_of)
    home = place(folder)
    words = {"labels": [f"label {i}" for i in range(500)], "split": [""]}
    CatalogWriter.write(home, ("mp4", "flac", "json"), columns, words)
    shards = [Shard(name=f"clips-{i:06d}.tar", clips=each, bytes=each * 455_000 + 10_240, sha256="0" * 64) for i in range(SHARDS)]
    for shard in shards:
        with (folder / shard.name).open("wb") as file:
            file.truncate(shard.bytes)
    meta = Meta(profile=PROFILES["h264"].to_json(), members=("mp4", "flac", "json"), shards=shards)
    home.publish(META, meta.to_bytes())


def _texts(form: str, numbers: np.ndarray[Any, Any]) -> Ragged:
    width = len(form % ((0,) * form.count("%")))
    text = "".join(form % ((n,) * form.count("%")) for n in numbers.tolist())
    return Ragged(np.frombuffer(text.encode(), np.uint8), np.arange(len(numbers) + 1) * width)


def open_large(url: str) -> float:
    began = time.perf_counter()
    dataset = Dataset.open(url)
    dataset.read(ROWS // 2 + 7)
    return time.perf_counter() - began


def filter_large(url: str, where: str) -> int:
    return len(matching(Dataset.open(url), where))


def shuffle_large(url: str) -> int:
    return len(make_plan([Dataset.open(url)], Choice(where="duration_s >= 2", order="shuffle:1")).row)


def bench_catalog(folder: Path) -> None:
    url = folder / "large"
    make_large(url)
    catalog_bytes = sum(p.stat().st_size for p in (url / "catalog.zarr").rglob("*") if p.is_file())
    print(f"{ROWS:,} rows in {SHARDS:,} shards, catalog of {catalog_bytes / 1e6:.0f} MB")
    cost = apart(open_large, str(url))
    print(f"    {'open, and read one clip':<50} {cost.wall_s:10.2f} s   peak {cost.peak_mb:.0f} MB   asked: 1 s")
    for where in ("duration_s >= 9 and motion < 5", "duration_s >= 9 and list_contains(labels, 'label 7')", "key like '%77_x'"):
        cost = apart(filter_large, str(url), where)
        said = f"where {where}"
        print(f"    {said:<66} {cost.wall_s:.2f} s   peak {cost.peak_mb:.0f} MB   {cost.result:,} rows   asked: 3 s, 2,000 MB")
    cost = apart(shuffle_large, str(url))
    print(f"    {'plan of a filter and a shuffle':<50} {cost.wall_s:10.2f} s   peak {cost.peak_mb:.0f} MB   asked: 30 s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--only", choices=["copy", "catalog"])
    parser.add_argument("--folder", help="where to write; the system's temporary folder by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        if given.only != "catalog":
            bench_copy(Path(name), given.gb, 450 << 10)
            bench_copy(Path(name), given.gb / 4, 24 << 10)
        if given.only != "copy":
            bench_catalog(Path(name))


if __name__ == "__main__":
    main()
