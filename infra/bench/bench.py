"""`make bench`: what the parts cost, as ratios taken in one run, for times are not stable from machine to machine.

    python infra/bench/bench.py

Each pair does the same work in turn, five times; printed are the medians and the ratio of the medians.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
import torchaudio

from cmacc.flows.ingest import ingest
from cmacc.ingest.world import WorldConfig, render_world
from cmacc.shards.dataset import Dataset
from cmacc.train.config import recipe
from cmacc.train.encoders import build_encoders
from cmacc.train.frames import decode_frames
from cmacc.train.gradients import gradient_factors
from cmacc.train.graph import Graph
from cmacc.train.loader import LoaderConfig, TrainingLoader
from cmacc.train.selection import kmeans_plus_plus

REPEATS = 5


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def pair(
    title: str, names: tuple[str, str], first: Callable[[], object], second: Callable[[], object], unit: float, what: str
) -> None:
    """unit: how many `what` each call does."""
    first(), second()
    times = [(timed(first), timed(second)) for _ in range(REPEATS)]
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    print(title)
    for name, seconds in zip(names, (a, b), strict=True):
        print(f"    {name:<50} {unit / seconds:10.1f} {what}/s")
    print(f"    ratio {b / a:.2f}\n")


def naive_frames(video: bytes, start: int, count: int, stride: int) -> np.ndarray:
    """The obvious way: decode from the beginning, convert each wanted frame by itself."""
    with av.open(io.BytesIO(video)) as container:
        frames = islice(container.decode(video=0), start, start + count * stride, stride)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def small_world(folder: Path) -> Dataset:
    world = render_world(folder / "world", WorldConfig(clips=60, eval_clips=15), workers=2)
    template = str(world.root / "media" / "{id}.mp4")
    ingest.fn([str(world.train_manifest)], str(folder / "data"), url_template=template, short_side=72, fps=16, gop=8)
    return Dataset.open(folder / "data")


def bench_frames(dataset: Dataset) -> None:
    videos = [dataset.read(row, ("mp4",))["mp4"] for row in range(len(dataset))]
    pair(
        "8 of 32 frames of a clip, from frame 8 on, one thread",
        ("decode_frames", "decode all from the start, a scaler a frame"),
        lambda: [decode_frames(v, 8, 8, 3) for v in videos],
        lambda: [naive_frames(v, 8, 8, 3) for v in videos],
        len(videos), "clips",
    )  # fmt: skip


def bench_loader(dataset: Dataset) -> None:
    view, config = recipe("small").view, LoaderConfig(batch=20, device="cpu", threads=2)
    loader = TrainingLoader(dataset, view, config, split=None, seed=0)
    batches = iter(loader)
    stride = view.stride(dataset.profile.fps)

    # Many rounds: the few batches that lie ready when the clock starts must not count.
    rounds = 10

    def bare() -> None:
        with ThreadPoolExecutor(2) as pool:
            reads = (dataset.read(row, ("mp4",))["mp4"] for _ in range(rounds) for row in range(len(dataset)))
            list(pool.map(lambda video: decode_frames(video, 4, view.frames, stride), reads))

    pair(
        "training views of a whole data set, two threads",
        ("loader: frames, augmentation, log-mel, tensors", "bare decoding of the same frames"),
        lambda: [next(batches) for _ in range(rounds * len(dataset) // config.batch)], bare, rounds * len(dataset), "clips",
    )  # fmt: skip
    loader.close()


def bench_log_mel(dataset: Dataset) -> None:
    view = recipe("small").view
    sounds = [np.frombuffer(dataset.read(row, ("flac",))["flac"], np.uint8) for row in range(len(dataset))]
    graph = Graph(view, dataset.profile.fps, len(sounds), "cpu", 2, pictures=False)
    mel = torchaudio.transforms.MelSpectrogram(view.audio_rate, view.n_fft, hop_length=view.hop, n_mels=view.n_mels)
    samples = round(view.span_s(dataset.profile.fps) * view.audio_rate)

    def by_torchaudio() -> None:
        for sound in sounds:
            with av.open(io.BytesIO(sound.tobytes())) as container:
                wave = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
            10 * mel(torch.from_numpy(wave[:samples] / np.float32(32768))).clamp_min(1e-10).log10()

    pair(
        "FLAC to log-mel", ("DALI graph", "PyAV and torchaudio, clip by clip"),
        lambda: graph.sounds(sounds, [0.0] * len(sounds)), by_torchaudio, len(sounds), "clips",
    )  # fmt: skip


def bench_selection() -> None:
    config = recipe("small")
    batch, width = config.loader.batch, config.encoders.width
    video, audio = build_encoders(config.encoders)
    pictures = torch.randn(batch, 3, config.view.frames, config.view.size, config.view.size)
    sounds = torch.randn(batch, 1, config.view.n_mels, config.view.mel_steps(16))
    pool = torch.nn.functional.normalize(torch.randn(config.objective.pool, width), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(batch, width), dim=1)
    allowed = torch.ones(len(pool), dtype=torch.bool)

    def select() -> None:
        for _ in range(2):
            kmeans_plus_plus(gradient_factors(pool, queries, 0.1), allowed, batch, torch.Generator())

    def step() -> None:
        (video(pictures).sum() + audio(sounds).sum()).backward()

    pair(
        "a step of the small recipe",
        ("active selection, both directions", "encoders forward and backward"),
        select,
        step,
        1,
        "steps",
    )

    factors = gradient_factors(pool, queries, 0.1)
    whole = (factors.left[:, :, None] * factors.right[:, None, :]).flatten(1)

    def materialised() -> None:
        nearest = torch.full((len(pool),), torch.inf)
        for i in range(batch):
            nearest = torch.minimum(nearest, (whole - whole[i]).square().sum(1))

    pair(
        f"{batch} picks of {len(pool)} candidates", ("factored distances", "materialised gradient embeddings"),
        lambda: kmeans_plus_plus(factors, allowed, batch, torch.Generator()), materialised, batch, "picks",
    )  # fmt: skip


def main() -> None:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        dataset = small_world(Path(folder))
        bench_frames(dataset)
        bench_loader(dataset)
        bench_log_mel(dataset)
    bench_selection()


if __name__ == "__main__":
    main()
