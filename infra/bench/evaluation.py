"""What feature extraction adds to its parts: its time over that of the loader and of the encoder, each measured alone.

    python infra/bench/evaluation.py                      # sounds and videos of its own, some minutes
    python infra/bench/evaluation.py --on esc50:DIR       # of a labelled data set
    python infra/bench/evaluation.py --device gpu
    python infra/bench/evaluation.py --probe svm          # how long a probe takes at UCF101's size, on features that are made

Each round measures the three in turn on the same files; printed are the medians, and of the ratios of one round the median, the
least and the most. Nothing comes from a cache; files lie in the system's own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from cmacc.train.config import recipe
from cmacc.train.evaluation.examples import Examples
from cmacc.train.evaluation.features import extract, of_encoder
from cmacc.train.evaluation.labelled import Labelled, read_labelled
from cmacc.train.evaluation.protocols import PROTOCOLS, probe
from cmacc.train.evaluation.splits import dealt, split
from cmacc.train.loading.loader import LoaderConfig
from cmacc.train.networks.encoders import build_encoders


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(labelled: Labelled, recipe_name: str, views: int, rounds: int, device: str) -> None:
    config = recipe(recipe_name)
    loader = LoaderConfig(batch=64, device=device)  # type: ignore[arg-type]
    where = torch.device("cuda" if loader.dali_device == "gpu" else "cpu")
    encoder = build_encoders(config.encoders)[labelled.kind == "audio"].eval().requires_grad_(False)
    own = of_encoder("trained", encoder, loader.batch, where)
    rows = range(len(labelled.files))

    def load() -> list[Any]:
        return [made for _, made in Examples(labelled, config.view, loader).central(rows, views)]

    batches = load()  # also warms up
    own.of(batches[0])

    def encode() -> None:
        for made in batches:
            own.of(made).cpu()

    def both() -> None:
        extract(Examples(labelled, config.view, loader), [own], views, 1)

    times = [(timed(load), timed(encode), timed(both)) for _ in range(rounds)]
    ratios = [all_of_it / (loading + encoding) for loading, encoding, all_of_it in times]
    print(f"{len(rows)} files ({labelled.kind}), {views} views each, encoders of {recipe_name} on {where.type}, {rounds} rounds")
    for name, seconds in zip(("loader alone", "encoder alone", "feature extraction"), zip(*times, strict=True), strict=True):
        middle = statistics.median(seconds)
        print(f"    {name:<24}{middle:8.2f} s{len(rows) * views / middle:10.1f} views/s")
    said = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"    extraction / (loader + encoder)   {said}   asked: at most 1.10")
    if where.type == "cuda":
        share = statistics.median(loading / all_of_it for loading, _, all_of_it in times)
        print(f"    extraction's views/s / loader's   {share:.2f}   asked: at least 0.90")


def make_sounds(folder: Path, count: int, seconds: float = 5.0, rate: int = 44_100) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class {i % 4}" / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes((3000 * rng.standard_normal(round(seconds * rate))).astype("<i2").tobytes())


def make_videos(folder: Path, count: int, seconds: float = 5.0, fps: int = 25) -> None:
    """MPEG-4 in AVI, 320x240, as UCF101's."""
    for i in range(count):
        path = folder / f"class {i % 4}" / f"{i}.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(i)
        still = rng.integers(0, 255, (15, 20, 3)).repeat(16, 0).repeat(16, 1)
        with av.open(str(path), "w") as out:
            stream = out.add_stream("mpeg4", rate=fps)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 320, 240, "yuv420p", 400_000
            for n in range(round(seconds * fps)):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(still, 3 * n, 1).astype(np.uint8), format="rgb24")))
            out.mux(stream.encode(None))


def time_probe(protocol: str, width: int) -> None:
    """13,320 rows, 101 classes of 25 groups each, three splits that test 7 of the groups; classes overlap."""
    rng = np.random.default_rng(0)
    codes, groups = np.sort(rng.integers(0, 101, 13_320)), rng.integers(0, 25, 13_320)
    hidden = 0.5 * rng.normal(size=(101, 64))[codes] + 0.6 * rng.normal(size=(101 * 25, 64))[25 * codes + groups]
    hidden += 0.8 * rng.normal(size=hidden.shape)
    features = np.maximum(0, hidden @ rng.normal(0, 1 / 8, (64, width)) + 0.3 * rng.normal(size=(len(codes), width)))
    labels = np.array([f"class {code:03}" for code in range(101)])[codes]
    folds = dealt(labels.tolist(), [f"{code} {group}" for code, group in zip(codes, groups, strict=True)])
    sides = [(7 * i <= groups) & (groups < 7 * (i + 1)) for i in range(3)]
    splits = [split(f"split {i + 1}", ~side, side) for i, side in enumerate(sides)]
    began, spent = time.perf_counter(), time.process_time()
    told = probe(
        protocol, features.astype(np.float32), labels, splits, folds, lambda done, note: print(f"    {done} of 3: {note}")
    )
    right = statistics.mean(float(np.mean(labels[one.rows] == one.names)) for one in told)
    print(f"{protocol}, {len(labels)} rows of {width} numbers, 101 classes, 3 splits: {right:.1%}")
    print(f"    {time.perf_counter() - began:.0f} s, {time.process_time() - spent:.0f} s of all cores together")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", action="append", metavar="SPEC", help="esc50:DIR and so on, instead of files that are made")
    parser.add_argument("--recipe", default="small-cpu", help="whose view and encoders")
    parser.add_argument("--files", type=int, default=64, help="of each kind, that are made")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--probe", choices=tuple(PROTOCOLS), help="time that probe instead")
    parser.add_argument("--width", type=int, default=512, help="of the features that are made for --probe")
    given = parser.parse_args()
    if given.probe:
        time_probe(given.probe, given.width)
        return
    with tempfile.TemporaryDirectory() as name:
        specs = given.on or [f"folder:{name}/sounds", f"folder:{name}/videos"]
        if not given.on:
            make_sounds(Path(name) / "sounds", given.files)
            make_videos(Path(name) / "videos", given.files)
        for spec in specs:
            compare(read_labelled(spec), given.recipe, given.views, given.rounds, given.device)


if __name__ == "__main__":
    main()
