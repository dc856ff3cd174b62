"""Measure what `cmacc plan` reckons with, and write flows/rates.json: bytes and processor seconds a second of clip, by profile.

    python infra/bench/rates.py --recordings FOLDER     # real media files: their first 10 s; five minutes of one core
    python infra/bench/rates.py                         # takes over what infra/bench/results/ says of GPUs, nothing else

All of it by the product itself: `cmacc ingest` of files on a local disk, what it takes to start not counted, and the training
loader on a CPU. Processor time, since others may be at work on the machine; it depends on the processor all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from contest import Contestant
from ingest import COMMAND, run
from loader import CLIP_S, loader
from media import Video, link_media
from peers.task import Job

from cmacc.flows.rates import FILE, ProfileRates, Rate, Rates, measured
from cmacc.shards.dataset import Dataset
from cmacc.shards.profile import PROFILES
from cmacc.train.loading.views import ViewConfig
from cmacc.train.networks.flops import gpu_name

RESULTS = Path(__file__).parent / "results"
SELF = "python infra/bench/rates.py --recordings FOLDER"
FAST = "bf16, compiled, channels last"
BATCH, BATCHES = 32, 6


def machine() -> str:
    """Its kind: number of cores, architecture, system."""
    cores = len(os.sched_getaffinity(0))
    return f"{cores} core{'s' * (cores > 1)} of {platform.machine()}, {platform.system()}, no GPU used"


def measure(recordings: Path) -> dict[str, ProfileRates]:
    """Each profile at its default settings."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        videos = link_media(folder / "media", recordings.resolve(), CLIP_S)
        if not videos:
            raise SystemExit(f"{recordings} has no media file with picture and sound; give another folder")
        return {profile: _profile(profile, videos, folder) for profile in PROFILES}


def _profile(name: str, videos: list[Video], folder: Path) -> ProfileRates:
    manifest, out = folder / "clips.csv", folder / name
    rows = [f"{video.id},{start:.3f},{end:.3f}" for video in videos for start, end in video.spans]
    manifest.write_text("\n".join(["id,start,end", *rows]) + "\n")
    command = [COMMAND, "ingest", manifest, "--out", out, "--profile", name, "--workers", 1]
    command += ["--url-template", folder / "media" / "{id}.mp4"]
    whole, start = run(command), run(command)
    data = Dataset.open(out)
    seconds = float(data.catalog.column("duration_s").sum())
    sizes, members = data.catalog.column("size"), data.meta.members
    media = sum(int(sizes[:, i].sum()) for i, member in enumerate(members) if member != "json")
    own = out / "ingest"  # ledger and staged clips, which no reader wants
    stored = sum(f.stat().st_size for f in out.rglob("*") if f.is_file() and own not in f.parents)
    of = f"{len(data)} recordings, {seconds:.0f} s in all, median picture {_size(data)}"

    def rate(value: float, unit: str) -> Rate:
        return Rate(float(f"{value:.4g}"), unit, SELF, of, machine(), f"{datetime.now(UTC):%Y-%m-%d}")

    found = ProfileRates(
        stored=rate(stored / seconds, "bytes a second of clip"),
        read=rate(media / seconds, "bytes a second of clip"),
        transcode=rate((whole.cpu_s - start.cpu_s) / seconds, "processor seconds a second of clip"),
        load=rate(_load_s(data), "processor seconds a view"),
    )
    print(f"{name}, {of}")
    for field, value in asdict(found).items():
        print(f"    {field:<10} {value['value']:>12,.4g} {value['unit']}")
    return found


def _size(data: Dataset) -> str:
    height, width = (sorted(data.catalog.column(side).tolist())[len(data) // 2] for side in ("height", "width"))
    return f"{width}x{height}"


def _load_s(data: Dataset) -> float:
    """Processor seconds of the training loader for one view, with one thread."""
    contestant = Contestant("loader", loader, Job(data.url, ViewConfig(), batch=BATCH, threads=1))
    try:
        return contestant.turn(BATCHES, BATCH).cpu_ms / 1000
    finally:
        contestant.close()


def utilisation(results: Path) -> dict[str, Rate]:
    """What `trainer_gpu.py` measured, by GPU; nothing where no such file is."""
    found = {}
    for path in sorted(results.glob("trainer-*.json")):
        told: dict[str, Any] = json.loads(path.read_text())
        name, mfu = gpu_name(told["machine"]["device"]), told.get(FAST, {}).get("mfu")
        if name is None or mfu is None:
            continue
        of = f"the step of the `paper` recipe, batch {told['batch']}, {FAST}; infra/bench/results/{path.name}"
        found[name] = Rate(mfu, "of the bf16 peak", "python infra/bench/trainer_gpu.py", of, told["machine"]["device"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=Path, metavar="FOLDER", help="real media files with picture and sound")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of what was measured of GPUs")
    parser.add_argument("--out", type=Path, default=FILE, help="the JSON file, instead of flows/rates.json")
    given = parser.parse_args()
    rates = measured() if FILE.exists() else Rates()
    if given.recordings:
        began = time.perf_counter()
        rates = replace(rates, profiles=measure(given.recordings))
        print(f"measured in {time.perf_counter() - began:.0f} s")
    rates = replace(rates, utilisation=utilisation(given.results))
    given.out.write_text(json.dumps(asdict(rates), indent=2) + "\n")
    print(f"written to {given.out}; GPUs measured: {', '.join(rates.utilisation) or 'none'}")


if __name__ == "__main__":
    main()
