"""The training loader beside bare decoding and beside other libraries that do the same work, on two CPU threads.

    python infra/bench/loader.py                  # ten minutes; makes its own clips
    python infra/bench/loader.py --real FOLDER    # the same with the first 10 s of each media file there
    python infra/bench/loader.py --memory         # resident memory over 20,000 small clips; --full: clips of the default size

Each way runs in a process of its own, in turn, five rounds; clips lie in the page cache. torchcodec, decord and soundfile take
part if `make bench-peers` has installed them. Times are not stable from machine to machine: read the ratios.

The rendered clips have the bit rate of real ones: 34 recordings from the web came to 316 kb/s of h264 and 3,200 kb/s of mjpeg.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from contest import Contestant, Turn, Way, ratio
from media import Look, Span, Video, link_media, make_media
from peers.ffmpeg import link_ffmpeg
from peers.task import Job, decode_stage, wanted

from cmacc.flows.ingest import ingest
from cmacc.shards.dataset import Dataset
from cmacc.train.loading.loader import LoaderConfig, Source, TrainingLoader
from cmacc.train.loading.views import ViewConfig

THREADS = 2
ROUNDS = 5
SHARD_MB = 16  # so that each of two workers has some
CLIP_S = 10.0
SPANS: tuple[Span, ...] = ((4.0, 14.0), (18.0, 28.0), (32.0, 42.0), (46.0, 56.0))
LOOK = Look(discs=12, swing=80.0, grain=2.0)
INSTALLED = Path(__file__).parents[2] / ".venv" / "loader-peers"
LIBRARIES = ("webdataset", "torchcodec", "decord")  # the first with PyAV and torch's DataLoader


def loader(job: Job) -> Iterator[Any]:
    """What is measured."""
    config = LoaderConfig(batch=job.batch, device="cpu", threads=job.threads)
    for batch in TrainingLoader([Source(Dataset.open(job.data))], job.view, config, seed=0):
        yield batch.video, batch.audio


def peer(library: str, job: Job) -> Iterator[Any]:
    loading = import_module("peers.loading")
    if library == "webdataset":
        return loading.by_workers(job, import_module("peers.by_pyav").decode)
    return loading.by_threads(job, import_module(f"peers.by_{library}").decode)


def bare(job: Job) -> Iterator[Any]:
    """The frames of the same views, whole and scaled to the output size, and nothing else."""
    return _videos(job, import_module("peers.by_pyav").bare)


def stage(job: Job) -> Iterator[Any]:
    """The loader's decoding stage alone."""
    return _videos(job, decode_stage)


def _videos(job: Job, work: Any) -> Iterator[Any]:
    """`work` on the bytes of each clip and its view, on the job's threads; epoch after epoch, from first to last."""
    torch.set_num_threads(1)
    dataset = Dataset.open(job.data)
    names = ("n_frames", "width", "height")
    columns = [dataset.catalog.column(name) for name in names]
    facts = [dict(zip(names, row, strict=True), fps=dataset.profile.fps) for row in zip(*columns, strict=True)]

    def one(number: int) -> None:
        epoch, row = divmod(number, len(dataset))
        view = wanted(job.view, epoch, str(dataset.keys[row]), facts[row])
        work(dataset.read(row, ("mp4",))["mp4"], view)

    ahead = import_module("peers.loading").ahead
    for done in ahead(one, iter(range(sys.maxsize)), job):
        yield [torch.empty(len(done))]


def make_data(folder: Path, videos: Iterable[Video], profiles: Iterable[str], **changes: Any) -> dict[str, Dataset]:
    """The clips of `videos`, whose files lie in `folder`/media, as the project's own `ingest` makes them."""
    manifest = folder / "clips.csv"
    rows = [f"{video.id},{start:.3f},{end:.3f}" for video in videos for start, end in video.spans]
    manifest.write_text("\n".join(["id,start,end", *rows]) + "\n")
    template = str((folder / "media").resolve() / "{id}.mp4")
    for name in profiles:
        ingest.fn([str(manifest)], str(folder / name), url_template=template, profile_name=name, shard_mb=SHARD_MB, **changes)
    return {name: Dataset.open(folder / name) for name in profiles}


def describe(name: str, dataset: Dataset) -> str:
    size, seconds = dataset.catalog.column("size"), dataset.catalog.column("duration_s")
    picture, sound = size[:, 0].mean() / 1000, size[:, 1].mean() / 1000  # kB
    width, height = (int(statistics.median(dataset.catalog.column(side).tolist())) for side in ("width", "height"))
    return (
        f"{len(dataset)} clips of {seconds.mean():.1f} s and {width}x{height}, {name}: {picture:,.0f} kB of picture"
        f" ({8 * picture / seconds.mean():,.0f} kb/s) and {sound:.0f} kB of sound a clip"
    )


def ways() -> dict[str, tuple[Way, str]]:
    """What takes part: the way, and the profile of its clips. Libraries get h264."""
    found: dict[str, tuple[Way, str]] = {
        "loader, h264": (loader, "h264"),
        "bare, h264": (bare, "h264"),
        "loader, mjpeg": (loader, "mjpeg"),
        "bare, mjpeg": (bare, "mjpeg"),
        "stage, h264": (stage, "h264"),
        "stage, mjpeg": (stage, "mjpeg"),
    }
    for library in LIBRARIES:
        if not find_spec(library):
            print(f"    ({library} is left out: `make bench-peers` installs it)")
        else:
            found[library] = (partial(peer, library), "h264")
    return found


def compare(data: dict[str, Dataset], rounds: int) -> None:
    view = ViewConfig()
    for name, dataset in data.items():
        print(describe(name, dataset))
    print(
        f"views of {view.frames} frames of {view.size}x{view.size} and their log-mel, batches of {Job.batch}, {THREADS} threads"
    )
    contestants: dict[str, Contestant] = {}
    try:
        for name, (way, profile) in ways().items():
            try:
                contestants[name] = Contestant(name, way, Job(data[profile].url, view, threads=THREADS))
            except RuntimeError as error:
                if name in LIBRARIES:
                    print(f"    ({error})")
                else:
                    raise
        expected = contestants["loader, h264"].shapes
        for name in contestants:
            if name in LIBRARIES and contestants[name].shapes != expected:
                raise RuntimeError(f"{name} makes {contestants[name].shapes}, the loader {expected}")
        # each clip once, and long enough that what a way has ready when its turn begins hardly counts
        batches = max(24, -(-len(data["h264"]) // Job.batch))
        turns: dict[str, list[Turn]] = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, contestant in contestants.items():
                turns[name].append(contestant.turn(batches, Job.batch))
    finally:
        for contestant in contestants.values():
            contestant.close()
    report(turns)


def report(turns: dict[str, list[Turn]]) -> None:
    print(f"    {'':<36} {'clips/s':>8} {'least':>8} {'most':>8} {'CPU ms/clip':>12}")
    for name, column in turns.items():
        speeds = [turn.clips_s for turn in column]
        cpu_ms = statistics.median(turn.cpu_ms for turn in column)
        print(f"    {name:<36} {statistics.median(speeds):8.1f} {min(speeds):8.1f} {max(speeds):8.1f} {cpu_ms:12.1f}")
    print(f"    {'ratios of one round':<50} {'by the clock':<24} by CPU")

    def line(first: str, second: str, asked: str = "") -> None:
        a, b = turns[first], turns[second]
        clock = ratio([turn.clips_s for turn in a], [turn.clips_s for turn in b])
        cpu = ratio([turn.cpu_ms for turn in b], [turn.cpu_ms for turn in a])
        print(f"    {first + ' / ' + second:<50} {clock!s:<24} {cpu}" + (f"   asked: {asked}" if asked else ""))

    line("loader, h264", "bare, h264", "0.8")
    line("loader, mjpeg", "bare, mjpeg")
    peers = [name for name in turns if name in LIBRARIES]
    best = max(peers, key=lambda name: statistics.median(turn.clips_s for turn in turns[name]), default="")
    for name in peers:
        line("loader, h264", name, "1.5 with the best" if name == best else "")
    line("stage, mjpeg", "stage, h264", "2")


MEMORY_CLIPS, SAMPLED, SETTLED = 20_000, 500, 2_000


def memory(full: bool, curve: Path | None) -> None:
    """Resident memory of a process that reads 20,000 clips."""
    changes: dict[str, Any] = {} if full else {"short_side": 64, "fps": 16, "gop": 16}
    view = ViewConfig() if full else ViewConfig(size=56)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        videos = make_media(folder / "media", 48, SPANS, LOOK if full else Look(160, 90, 16), distinct=8)
        dataset = make_data(folder, videos, ["h264"], **changes)["h264"]
        print(describe("h264", dataset))
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_read_on, args=(theirs, Job(dataset.url, view, threads=THREADS)), daemon=True)
        process.start()
        theirs.close()
        taken: list[tuple[int, float]] = []
        try:
            while not taken or taken[-1][0] < MEMORY_CLIPS:
                taken.append(ours.recv())
        except EOFError:
            raise RuntimeError(f"the loader ended after {taken[-1][0] if taken else 0} clips") from None
        finally:
            process.terminate()
            process.join()
    settled = next(megabytes for clips, megabytes in taken if clips >= SETTLED)
    largest, last = max(megabytes for clips, megabytes in taken if clips > SETTLED), taken[-1][1]
    print(
        f"resident memory of the loader over {taken[-1][0]:,} clips, views of {view.frames} frames of {view.size}x{view.size}, MB"
    )
    print(f"    after {SETTLED:,} clips {settled:.0f}, largest after that {largest:.0f}, at the end {last:.0f}")
    print(f"    growth {100 * (largest / settled - 1):.1f} %, at the end {100 * (last / settled - 1):.1f} %   asked: 5 %")
    # one sample is as good as what happens to be in the queues
    after = [megabytes for clips, megabytes in taken if clips > SETTLED]
    early, late = (statistics.median(part) for part in (after[: len(after) // 4], after[-len(after) // 4 :]))
    print(f"    median of the first quarter after that {early:.0f}, of the last {late:.0f}: {100 * (late / early - 1):.1f} %")
    if curve:
        draw(taken, curve)


def _read_on(pipe: Any, job: Job) -> None:
    """Tell (clips read, MB resident) every 500 clips, or at the batch after."""
    batches, clips, told = loader(job), 0, 0
    while clips < MEMORY_CLIPS:
        clips += len(next(batches)[0])
        if clips // SAMPLED > told:
            told = clips // SAMPLED
            status = Path("/proc/self/status").read_text().split("VmRSS:")[1]
            pipe.send((clips, int(status.split()[0]) / 1024))


def draw(taken: list[tuple[int, float]], path: Path) -> None:
    figure_class = import_module("matplotlib.figure").Figure
    figure = figure_class(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="clips read", ylabel="resident MB")
    axes.plot(*zip(*taken, strict=True))
    axes.set_ylim(0, None)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="folder of real media files, instead of those that are made")
    parser.add_argument("--videos", type=int, default=48, help="source videos to make, of four clips each")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--memory", action="store_true", help="measure memory alone")
    parser.add_argument("--full", action="store_true", help="with --memory: clips and views of the default size")
    parser.add_argument("--curve", type=Path, metavar="PNG", help="with --memory: draw it")
    given = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    if given.memory:
        memory(given.full, given.curve)
        return
    sys.path.append(str(INSTALLED))  # of the processes that are started, too
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LD_LIBRARY_PATH"] = link_ffmpeg(folder / "ffmpeg")
        media = folder / "media"
        videos = (
            link_media(media, given.real, CLIP_S) if given.real else make_media(media, given.videos, SPANS, LOOK, distinct=12)
        )
        compare(make_data(folder, videos, ["h264", "mjpeg"]), given.rounds)


if __name__ == "__main__":
    main()
