"""The study's data sets: two sample worlds, a talker, and real clips. Each is ingested once and decoded once."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
from clips import Clips, keep, open_clips

from cmacc.ingest.world import WorldConfig, render_world, serve
from cmacc.shards.dataset import Dataset

Say = Callable[[str], None]

WORLDS = {
    "balanced": WorldConfig(clips=5040, eval_clips=600, imbalance=0.0, seed=7, width=96, height=72),
    "unequal": WorldConfig(clips=5040, eval_clips=600, imbalance=1.5, seed=7, width=96, height=72),
}
"""Fifteen classes; in `unequal` the most frequent is met 58 times as often as the rarest. Held-out ones are equally frequent."""
PICTURES: dict[str, Any] = {"profile_name": "h264", "short_side": 72, "fps": 16, "gop": 8}
SECONDS = {"balanced": 2.0, "unequal": 2.0, "grid": 3.0, "real": 2.5}
"""Of each clip, decoded and kept."""
RECORDINGS = Path(__file__).resolve().parents[2].parent / "shared" / "data"
"""Where `grid/` and `clips/` are looked for, unless CMACC_RECORDINGS names another folder; they are not part of the project."""
HOP_S = 0.5
"""Real clips begin so far apart."""


def clips_of(name: str, out: Path, say: Say) -> Clips:
    """Make what is missing of a data set's way into `out`, and open it. Raises FileNotFoundError where recordings are absent."""
    folder = out / "decoded" / name
    if not (folder / "clips.json").exists():
        data = out / "data" / name
        if name in WORLDS:
            _world(name, out, data, say)
        else:
            _recordings(name, out, data, say)
        say(f"{name}: decoding")
        keep(Dataset.open(str(data)), SECONDS[name], folder)
    return open_clips(folder)


def _ingest(manifests: list[str], data: Path, **options: Any) -> None:
    os.environ.pop("PREFECT_API_URL", None)
    from cmacc.flows.ingest import ingest

    counts = ingest(manifests, str(data), workers=os.cpu_count() or 1, shard_mb=64, **PICTURES, **options)
    if not counts["done"]:
        raise RuntimeError(f"nothing was ingested into {data}: {counts}")


def _world(name: str, out: Path, data: Path, say: Say) -> None:
    say(f"{name}: rendering {WORLDS[name].clips + WORLDS[name].eval_clips} clips")
    world = render_world(out / "worlds" / name, WORLDS[name])
    say(f"{name}: ingesting")
    with serve(world.root) as url:
        _ingest([f"train={world.train_manifest}", f"eval={world.eval_manifest}"], data, url_template=f"{url}/media/{{id}}.mp4")


def recordings(kind: str) -> Path:
    folder = Path(os.environ.get("CMACC_RECORDINGS", RECORDINGS)) / kind
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there; set CMACC_RECORDINGS to the folder that holds {kind}/, or leave it out")
    return folder


def _recordings(name: str, out: Path, data: Path, say: Say) -> None:
    """`grid`: each clip whole, labelled by its digit, every fifth of a digit held out. `real`: pieces of each video, one after
    the other and overlapping, every fifth video held out."""
    lists = out / "lists"
    lists.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[tuple[str, float, float, str]]] = {"train": [], "eval": []}
    if name == "grid":
        folder = recordings("grid")
        met: dict[str, int] = {}
        with (folder / "labels.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                met[row["digit"]] = met.get(row["digit"], 0) + 1
                split = "eval" if met[row["digit"]] % 4 == 0 else "train"
                rows[split].append((str(folder / row["filename"]), 0.0, 2.96, row["digit"]))
    else:
        folder = recordings("clips")
        for number, path in enumerate(sorted(p for p in folder.iterdir() if p.is_file())):
            with av.open(str(path)) as container:
                seconds = (container.duration or 0) / 1e6
            begins = range(int((seconds - SECONDS["real"]) / HOP_S) + 1) if seconds >= SECONDS["real"] else range(0)
            split = "eval" if number % 5 == 4 else "train"
            for k in begins:
                rows[split].append((str(path), k * HOP_S, k * HOP_S + SECONDS["real"], path.stem))
    for split, found in rows.items():
        with (lists / f"{name}-{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "start", "end", "label"])
            writer.writerows(found)
    say(f"{name}: ingesting {sum(map(len, rows.values()))} clips")
    _ingest([f"{split}={lists / f'{name}-{split}.csv'}" for split in rows], data, allow_private=True)
