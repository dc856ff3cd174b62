"""Ingest beside the other ways of doing the same: clips/s/core for download and transcode from a server on 127.0.0.1.

    python infra/bench/ingest.py                    # four ways in turn, and planning; some six minutes
    python infra/bench/ingest.py --media FOLDER     # the same with real files
    python infra/bench/ingest.py --memory           # peak resident memory of 100 rows beside 10,000

All ways get the same source videos, clips, encoder settings and number of processes. video2dataset takes part if
`make bench-peers` has made its environment. Times are not stable from machine to machine: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import imageio_ffmpeg
from media import Look, Span, Video, link_media, make_media
from peers.bare import bare_pass
from peers.three_pass import THREADS, encoder, three_passes

from cmacc.ingest import Ledger, read_manifest
from cmacc.ingest.world import serve
from cmacc.shards.dataset import Dataset
from cmacc.shards.profile import PROFILES

WORKERS = 2
PROFILE = PROFILES["h264"]
SPANS: tuple[Span, ...] = ((4.0, 14.0), (18.0, 28.0), (32.0, 42.0), (46.0, 56.0))
CLIP_S = 10.0
PEERS = Path(__file__).parent / "peers"
PEER_PYTHON = Path(__file__).parents[2] / ".venv" / "video2dataset" / "bin" / "python"
COMMAND = Path(sys.executable).parent / "cmacc"


class Cost(NamedTuple):
    """Seconds by the clock, and of the processors."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Job:
    """What each way is given. folder: empty, for all that it writes."""

    url: str
    media: Path
    videos: Sequence[Video]
    folder: Path

    def address(self, video: Video) -> str:
        return f"{self.url}/{video.id}.mp4"


def cmacc(job: Job) -> dict[str, Cost]:
    """The command as a user runs it; and once more with nothing left to do, which is what starting it costs."""
    rows = [f"{video.id},{start:.3f},{end:.3f}" for video in job.videos for start, end in video.spans]
    manifest = job.folder / "clips.csv"
    manifest.write_text("\n".join(["id,start,end", *rows]) + "\n")
    arguments = [manifest, "--out", job.folder / "data", "--workers", WORKERS, "--url-template", f"{job.url}/{{id}}.mp4"]
    whole = run([COMMAND, "ingest", *arguments])
    start = run([COMMAND, "ingest", *arguments])
    made = len(Dataset.open(job.folder / "data"))
    if made < len(rows):
        print(f"    cmacc: only {made} of {len(rows)} clips could be made")
    return {
        "cmacc ingest": whole,
        "cmacc ingest, its start not counted": Cost(whole.wall_s - start.wall_s, whole.cpu_s - start.cpu_s),
    }


def three_pass(job: Job) -> dict[str, Cost]:
    work = [(job.address(v), v.spans, job.folder / f"{v.id}.tar", PROFILE) for v in job.videos]
    return {"three FFmpeg runs a clip": _spread(three_passes, work)}


def bare(job: Job) -> dict[str, Cost]:
    work = [((job.media / f"{v.id}.mp4").read_bytes(), v.spans, PROFILE) for v in job.videos]
    return {"bare decode, scale and encode": _spread(bare_pass, work)}


def video2dataset(job: Job) -> dict[str, Cost]:
    """In its own environment. By its own clock, its start (some 15 s a process) is not counted."""
    rows = [{"url": job.address(v), "clips": [list(span) for span in v.spans]} for v in job.videos]
    (job.folder / "list.json").write_text(json.dumps(rows))
    (job.folder / "tmp").mkdir()
    task = {
        "list": str(job.folder / "list.json"), "out": str(job.folder / "out"), "tmp": str(job.folder / "tmp"),
        "height": PROFILE.short_side, "fps": PROFILE.fps, "audio_rate": PROFILE.audio_rate,
        "videos": len(rows), "workers": WORKERS,
    }  # fmt: skip
    environment = {
        **os.environ,
        "PATH": f"{PEERS / 'bin'}:{os.environ['PATH']}",
        "FFMPEG": imageio_ffmpeg.get_ffmpeg_exe(),
        "THREADS": " ".join(THREADS),
        "X264": " ".join(encoder(PROFILE)),
    }
    done = subprocess.run(
        [PEER_PYTHON, PEERS / "video2dataset_run.py"],
        input=json.dumps(task), env=environment, capture_output=True, text=True,
    )  # fmt: skip
    last = done.stdout.strip().splitlines()[-1:]
    if done.returncode or not last:
        raise RuntimeError(f"video2dataset failed: {done.stderr[-2000:]}")
    told = json.loads(last[0])
    if told["videos"] < len(rows):
        print(f"    video2dataset: only {told['videos']} of {len(rows)} source videos worked")
    return {"video2dataset, its start not counted": Cost(told["seconds"], math.nan)}


def run(command: Sequence[object]) -> Cost:
    """Of a command and all that it starts. Raises RuntimeError when it fails."""
    before, began = _children_s(), time.perf_counter()
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stdout[-2000:]}")
    return Cost(time.perf_counter() - began, _children_s() - before)


def _children_s() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _spread(work: Callable[..., int], arguments: Sequence[tuple[Any, ...]]) -> Cost:
    """Cost of `work` on each of `arguments`, one process a core; starting the processes is not counted."""
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        list(pool.map(time.sleep, [0.5] * WORKERS))
        began = time.perf_counter()
        cpu = sum(pool.map(_timed, [work] * len(arguments), arguments))
        return Cost(time.perf_counter() - began, cpu)


def _timed(work: Callable[..., int], arguments: tuple[Any, ...]) -> float:
    """Processor seconds of a call, of the processes that it starts too."""
    before = sum(os.times()[:4])
    if not work(*arguments):
        raise RuntimeError("nothing was made")
    return sum(os.times()[:4]) - before


def compare(videos: Sequence[Video], media: Path, rounds: int) -> None:
    """All ways in turn, `rounds` times (video2dataset once), then clips/s/core and the ratio of cmacc to each."""
    ways: list[Callable[[Job], dict[str, Cost]]] = [cmacc, bare, three_pass]
    clips = sum(len(video.spans) for video in videos)
    print(f"download and transcode of {clips} clips of {len(videos)} source videos, {WORKERS} processes")
    if not PEER_PYTHON.exists():
        print("    (video2dataset is left out: `make bench-peers` makes its environment)")
    costs: dict[str, list[Cost]] = {}
    with serve(media) as url:
        for number in range(rounds):
            for way in [*ways, video2dataset] if PEER_PYTHON.exists() and not number else ways:
                with tempfile.TemporaryDirectory() as folder:
                    for name, cost in way(Job(url, media, videos, Path(folder))).items():
                        costs.setdefault(name, []).append(cost)
    medians = {name: Cost(*map(statistics.median, zip(*taken, strict=True))) for name, taken in costs.items()}
    ours = medians["cmacc ingest, its start not counted"]
    print(f"    {'':<40} {'clips/s/core':>12} {'CPU s/clip':>11}   cmacc is faster by, by CPU")
    for name, cost in medians.items():
        print(f"    {name:<40} {clips / cost.wall_s / WORKERS:12.3f} {cost.cpu_s / clips:11.2f}"
              f"   {cost.wall_s / ours.wall_s:17.2f} {cost.cpu_s / ours.cpu_s:7.2f}")  # fmt: skip
    print()


def plan_seconds(rows: int = 100_000) -> float:
    """Seconds from a list of `rows` rows in AudioSet's form and no ledger until the first source video is known."""
    header = "# Segments csv\n# num_ytids\n# YTID, start_seconds, end_seconds, positive_labels\n"
    lines = (f'bench{number:06d}, {number % 300}.000, {number % 300 + 10}.000, "/m/09x0r,/m/05zppz"' for number in range(rows))
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "segments.csv"
        manifest.write_text(header + "\n".join(lines) + "\n")
        began = time.perf_counter()
        with Ledger(Path(folder) / "ledger.sqlite") as ledger:
            ledger.add(read_manifest(manifest))
            next(ledger.todo())
            return time.perf_counter() - began


def memory() -> None:
    """Peak resident memory of the command with 100 rows and with 10,000, tiny clips both."""
    peaks = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spans = tuple((start / 2, start / 2 + 0.4) for start in range(2, 102))
        videos = make_media(folder / "media", 100, spans, Look(64, 48, 10, 60.0), distinct=2)
        with serve(folder / "media") as url:
            for rows in (100, 10_000):
                manifest = folder / f"{rows}.csv"
                # one clip of each source video, or a hundred
                clips = [(video.id, span) for video in videos for span in spans[: rows // len(videos)]]
                manifest.write_text("id,start,end\n" + "".join(f"{i},{start:.3f},{end:.3f}\n" for i, (start, end) in clips))
                small = ["--short-side", 16, "--fps", 5, "--gop", 5]
                command = [
                    COMMAND,
                    "ingest",
                    manifest,
                    "--out",
                    folder / str(rows),
                    "--url-template",
                    f"{url}/{{id}}.mp4",
                    *small,
                ]
                peaks[rows] = _peaks_mb([str(part) for part in command])
    print("peak resident memory of ingest, MB")
    for rows, (main, child) in peaks.items():
        print(f"    {rows:>6} rows: the command {main:8.1f}, its largest child {child:8.1f}")
    print(f"    ratio {peaks[10_000][0] / peaks[100][0]:.3f} and {peaks[10_000][1] / peaks[100][1]:.3f}\n")


def _peaks_mb(command: Sequence[str]) -> tuple[float, float]:
    """Peak resident memory, MB, of a command and of the largest process below it."""
    peaks: dict[int, float] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for pid in _tree(process.pid):
                peaks[pid] = max(peaks.get(pid, 0.0), _peak_mb(pid))
            time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed with exit status {process.returncode}")
    return peaks.pop(process.pid), max(peaks.values())


def _tree(pid: int) -> list[int]:
    """A process and all below it; what is gone meanwhile is left out."""
    try:
        children = [
            int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
        ]
    except OSError:
        return [pid]
    return [pid, *(below for child in children for below in _tree(child))]


def _peak_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--media", type=Path, help="folder of real media files, instead of those that are made")
    parser.add_argument("--videos", type=int, default=12, help="source videos to make")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="measure memory alone")
    arguments = parser.parse_args()
    if arguments.memory:
        memory()
        return
    with tempfile.TemporaryDirectory() as name:
        media = Path(name) / "media"
        videos = link_media(media, arguments.media, CLIP_S) if arguments.media else make_media(media, arguments.videos, SPANS)
        compare(videos, media.resolve(), arguments.rounds)
    print(f"100,000 rows, a new ledger: the first source video is known after {plan_seconds():.1f} s")


if __name__ == "__main__":
    main()
