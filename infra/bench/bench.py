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
from pathlib import Path

import av
import numpy as np
import torch
import torchaudio

from cmacc.flows.ingest import ingest
from cmacc.ingest.world import WorldConfig, render_world
from cmacc.shards.dataset import Dataset
from cmacc.train.config import recipe
from cmacc.train.loading.graph import Graph

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


def small_world(folder: Path) -> Dataset:
    world = render_world(folder / "world", WorldConfig(clips=60, eval_clips=15), workers=2)
    template = str(world.root / "media" / "{id}.mp4")
    ingest.fn([str(world.train_manifest)], str(folder / "data"), url_template=template, short_side=72, fps=16, gop=8)
    return Dataset.open(folder / "data")


def bench_log_mel(dataset: Dataset) -> None:
    view = recipe("small-cpu").view
    sounds = [np.frombuffer(dataset.read(row, ("flac",))["flac"], np.uint8) for row in range(len(dataset))]
    graph = Graph(view, len(sounds), "cpu", 2, pictures=False)
    mel = torchaudio.transforms.MelSpectrogram(view.audio_rate, view.n_fft, hop_length=view.hop, n_mels=view.n_mels)
    samples = round(view.view_s * view.audio_rate)

    def by_torchaudio() -> None:
        for sound in sounds:
            with av.open(io.BytesIO(sound.tobytes())) as container:
                wave = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
            10 * mel(torch.from_numpy(wave[:samples] / np.float32(32768))).clamp_min(1e-10).log10()

    pair(
        "FLAC to log-mel", ("DALI graph", "PyAV and torchaudio, clip by clip"),
        lambda: graph.sounds(sounds, [0.0] * len(sounds)), by_torchaudio, len(sounds), "clips",
    )  # fmt: skip


def main() -> None:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        dataset = small_world(Path(folder))
        bench_log_mel(dataset)


if __name__ == "__main__":
    main()
