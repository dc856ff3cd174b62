"""The training loader on a GPU: beside DALI's decoding alone, and beside the step of R(2+1)D-18 that it feeds.

    python infra/bench/loader_gpu.py                            # with an NVIDIA GPU; its results belong into infra/bench/results/
    python infra/bench/loader_gpu.py --device cpu --batch 8     # the same on a CPU, with clips of mjpeg, to try this script

Makes its own clips of the default profile. Five rounds in turn; medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader import LOOK, SPANS, make_data
from media import make_media
from nvidia import dali
from nvidia.dali import fn, pipeline_def, types
from torchvision.models.video import r2plus1d_18

from cmacc.shards.dataset import Dataset
from cmacc.train.loading.loader import LoaderConfig, Source, TrainingLoader
from cmacc.train.loading.views import ViewConfig

ROUNDS, BATCHES, WARM = 5, 20, 4


def decoding_alone(dataset: Dataset, view: ViewConfig, batch: int, device: str) -> Iterator[int]:
    """DALI's decoder given the bytes of clips that are in memory already, and frames of a second from the start of each."""
    member = dataset.profile.video_member
    videos = [np.frombuffer(dataset.read(row, [member])[member], np.uint8) for row in range(min(len(dataset), 4 * batch))]
    numbers = view.frame_numbers(0, dataset.profile.fps).astype(np.int32)

    @pipeline_def(
        batch_size=batch, num_threads=4, device_id=0 if device == "gpu" else None, prefetch_queue_depth=2, exec_dynamic=True
    )
    def pipeline() -> Any:
        encoded = fn.external_source(name="video", dtype=types.UINT8, ndim=1, batch=True)
        decoder = {"device": "mixed", "affine": False} if device == "gpu" else {"device": "cpu"}
        return fn.decoders.video(encoded, frames=numbers.tolist(), build_index=False, pad_mode="edge", **decoder)

    built = pipeline()
    built.build()
    for turn in count():
        built.feed_input("video", [videos[(turn * batch + i) % len(videos)] for i in range(batch)])
        if turn:  # one batch is always being decoded already
            built.run()
            yield batch


def loading(dataset: Dataset, view: ViewConfig, batch: int, device: str) -> Iterator[int]:
    loader = TrainingLoader([Source(dataset)], view, LoaderConfig(batch=batch, device=device), seed=0)  # type: ignore[arg-type]
    for made in loader:
        if made.video.is_cuda:
            torch.cuda.synchronize()
        yield len(made.ids)


def speed(batches: Iterator[int], number: int) -> float:
    began = time.perf_counter()
    clips = sum(islice(batches, number))
    return clips / (time.perf_counter() - began)


def waiting(dataset: Dataset, view: ViewConfig, batch: int, device: str, steps: int) -> tuple[float, float]:
    """Share of the time that forward and backward of R(2+1)D-18 wait for data, and clips/s, at bf16 on a GPU."""
    torch_device = torch.device("cuda" if device == "gpu" else "cpu")
    net = r2plus1d_18(num_classes=128).to(torch_device, memory_format=torch.channels_last_3d)
    loader = TrainingLoader([Source(dataset)], view, LoaderConfig(batch=batch, device=device), seed=0)  # type: ignore[arg-type]
    batches, began, waited = iter(loader), 0.0, 0.0
    for step in range(WARM + steps):
        if step == WARM:
            began, waited = time.perf_counter(), loader.waited_s
        video = next(batches).to(torch_device).video
        with torch.autocast(torch_device.type, torch.bfloat16, enabled=device == "gpu"):
            loss = net(video).square().mean()
        loss.backward()
        net.zero_grad(set_to_none=True)
        if device == "gpu":
            torch.cuda.synchronize()  # so that waiting is what the loader is behind, not what the GPU is
    elapsed, waited = time.perf_counter() - began, loader.waited_s - waited
    loader.close()
    return waited / elapsed, steps * batch / elapsed


def machine(device: str) -> dict[str, str]:
    versions = {"torch": torch.__version__, "dali": dali.__version__, "python": platform.python_version()}
    if device != "gpu":
        return {"device": platform.machine(), **versions}
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    return {"device": torch.cuda.get_device_name(), "driver": driver, **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--videos", type=int, default=64, help="source videos to make, of four clips each")
    parser.add_argument("--steps", type=int, default=30, help="of the encoder")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    if given.device == "gpu" and not torch.cuda.is_available():
        raise SystemExit("this machine has no CUDA device; give --device cpu to try the script")
    view, profile = ViewConfig(), "h264" if given.device == "gpu" else "mjpeg"  # what DALI decodes there
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        videos = make_media(folder / "media", given.videos, SPANS, LOOK, distinct=min(12, given.videos))
        dataset = make_data(folder, videos, [profile])[profile]
        ways = {
            "loader": loading(dataset, view, given.batch, given.device),
            "DALI decoding alone": decoding_alone(dataset, view, given.batch, given.device),
        }
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        for round_ in range(1 + ROUNDS):
            for way, batches in ways.items():
                if round_:
                    speeds[way].append(speed(batches, BATCHES))
                else:
                    speed(batches, WARM)  # not counted
        share, trained = waiting(dataset, view, given.batch, given.device, given.steps)
    ours, alone = speeds.values()
    found = {
        **machine(given.device),
        "command": f"python infra/bench/loader_gpu.py --device {given.device} --batch {given.batch} --steps {given.steps}",
        "clips_per_s": {way: statistics.median(column) for way, column in speeds.items()},
        "loader_to_decoding": statistics.median(a / b for a, b in zip(ours, alone, strict=True)),
        "r2plus1d_18_clips_per_s": trained,
        "r2plus1d_18_waiting": share,
    }
    print(json.dumps(found, indent=1))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
