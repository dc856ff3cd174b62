"""A world on disk: the plan (which clips stand in which file), the pool that renders files, the manifests."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import string
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from cmacc.ingest.world import codec
from cmacc.ingest.world.scene import make_scene
from cmacc.ingest.world.sound import RATE, Wave
from cmacc.ingest.world.things import CLASSES

VERSION = 1
_ALPHABET = string.ascii_letters + string.digits + "_-"


@dataclass(frozen=True)
class WorldConfig:
    """A world is a pure function of these (and of the codec versions).

    clips, eval_clips: training and held-out clips; no file holds both. Held-out classes are equally frequent.
    clip_s: seconds. clips_per_file: at most so many stand in one file. width, height: pixels, even. fps: frames per second.
    imbalance: Zipf exponent of the class frequencies in training, 0 = equal; the seed decides which class is frequent.
    """

    clips: int = 1000
    eval_clips: int = 240
    clip_s: float = 2.0
    clips_per_file: int = 12
    imbalance: float = 0.0
    seed: int = 0
    width: int = 160
    height: int = 120
    fps: int = 16

    def __post_init__(self) -> None:
        for field in ("clips", "eval_clips"):
            if getattr(self, field) < len(CLASSES):
                raise ValueError(f"{field} is {getattr(self, field)}; give {len(CLASSES)} or more, one for each class")
        if not 1 <= self.clip_s <= 10 or not float(self.clip_s * self.fps).is_integer():
            raise ValueError(f"clip_s is {self.clip_s}; give 1 to 10 seconds that are a whole number of frames at fps {self.fps}")
        if not 1 <= self.clips_per_file <= 60:
            raise ValueError(f"clips_per_file is {self.clips_per_file}; give 1 to 60")
        if not 0 <= self.imbalance <= 4:
            raise ValueError(f"imbalance is {self.imbalance}; give a Zipf exponent from 0 (equal) to 4")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give 0 or more")
        if not 64 <= self.height <= self.width <= 1280 or self.width % 2 or self.height % 2:
            raise ValueError(f"the picture is {self.width}x{self.height}; give even sides, 64 to 1280, not higher than wide")
        if not 8 <= self.fps <= 60:
            raise ValueError(f"fps is {self.fps}; give 8 to 60")


@dataclass(frozen=True)
class World:
    """A rendered world. files: media files; clips: rows of both manifests."""

    root: Path
    train_manifest: Path
    eval_manifest: Path
    files: int
    clips: int


@dataclass(frozen=True)
class _FilePlan:
    """One media file: its id, split, and per clip (number in the world, class, gap before it in frames)."""

    id: str
    split: str
    clips: tuple[tuple[int, str, int], ...]


def class_counts(clips: int, imbalance: float, ranking: NDArray[np.int64]) -> NDArray[np.int64]:
    """Clips of each class, (classes,), summing to `clips`: Zipf over `ranking` (class at rank 0, 1, …), at least one each."""
    weights = np.empty(len(ranking))
    weights[ranking] = 1.0 / np.arange(1, len(ranking) + 1) ** imbalance
    share = weights / weights.sum() * (clips - len(ranking))
    counts = np.floor(share).astype(np.int64)
    counts[np.argsort(counts - share, kind="stable")[: clips - len(ranking) - counts.sum()]] += 1
    return counts + 1


def plan(config: WorldConfig) -> list[_FilePlan]:
    """The files of a world, training first."""
    rng = np.random.default_rng([config.seed, 0])
    ranking = rng.permutation(len(CLASSES))
    files, number, taken = [], 0, set[str]()
    for split, clips, imbalance in (("train", config.clips, config.imbalance), ("eval", config.eval_clips, 0.0)):
        labels = rng.permutation(np.repeat(CLASSES, class_counts(clips, imbalance, ranking)))
        for part in np.array_split(labels, -(-clips // config.clips_per_file)):
            name = ""
            while not name or name in taken:
                name = "".join(rng.choice(list(_ALPHABET), 11))
            taken.add(name)
            gaps = rng.choice([0, 0, config.fps // 2, config.fps], len(part))
            files.append(_FilePlan(name, split, tuple((number + k, str(label), int(gaps[k])) for k, label in enumerate(part))))
            number += len(part)
    return files


def _pause(frames: int, config: WorldConfig, rng: np.random.Generator) -> tuple[NDArray[np.uint8], Wave]:
    """A grey, nearly silent pause between two clips."""
    grey = np.full((frames, config.height * 3 // 2, config.width), 128, np.uint8)
    return grey, rng.normal(0, 0.003, round(frames / config.fps * RATE)).astype(np.float32)


def _render_file(root: Path, work: Path, config: WorldConfig, file: _FilePlan) -> dict[str, Any]:
    """Render one file and its record: sha256, bytes, clips with latents. A file that is there is kept if its record proves it."""
    media, record_path = root / "media" / f"{file.id}.mp4", work / f"{file.id}.json"
    if record_path.exists() and media.exists():
        record: dict[str, Any] = json.loads(record_path.read_text())
        if hashlib.sha256(media.read_bytes()).hexdigest() == record["sha256"]:
            return record
    clips: list[dict[str, Any]] = []

    def scenes() -> Iterator[tuple[NDArray[np.uint8], Wave]]:
        shown = 0
        for number, label, gap in file.clips:
            rng = np.random.default_rng([config.seed, 1, number])
            if gap:
                yield _pause(gap, config, rng)
            scene = make_scene(label, rng, config.clip_s, config.width, config.height, config.fps)
            start = (shown + gap) / config.fps
            shown += gap + len(scene.frames)
            clips.append({"start": start, "end": shown / config.fps, "label": label, "latents": scene.latents})
            yield scene.frames, scene.sound

    part = work / f"{file.id}.mp4"
    quality = np.random.default_rng([config.seed, 2, file.clips[0][0]]).integers(*codec.SOURCE_CRF, endpoint=True)
    codec.write_mp4(part, scenes(), config.fps, int(quality))
    record = {
        "id": file.id,
        "split": file.split,
        "crf": int(quality),
        "bytes": part.stat().st_size,
        "sha256": hashlib.sha256(part.read_bytes()).hexdigest(),
        "clips": clips,
    }
    part.replace(media)
    _write(record_path, json.dumps(record))
    return record


def _write(path: Path, text: str) -> None:
    """Write aside, then rename."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text)
    aside.replace(path)


def _manifest(records: list[dict[str, Any]], split: str) -> str:
    """AudioSet's segment list: comment lines, then `YTID, start_seconds, end_seconds, positive_labels`."""
    rows = [
        f'{record["id"]}, {clip["start"]:.3f}, {clip["end"]:.3f}, "{clip["label"]}"'
        for record in records
        if record["split"] == split
        for clip in record["clips"]
    ]
    head = [
        f"# Sample world: {split} segments, version {VERSION}.",
        f"# num_ytids={sum(r['split'] == split for r in records)}, num_segs={len(rows)}, num_unique_labels={len(CLASSES)}",
        "# YTID, start_seconds, end_seconds, positive_labels",
    ]
    return "\n".join(head + rows) + "\n"


def _existing(root: Path, config: WorldConfig) -> World | None:
    """The world at `root` if it is complete; None if there is none or a file is gone; ValueError if it is another world."""
    try:
        facts = json.loads((root / "world.json").read_text())
    except FileNotFoundError:
        return None
    if facts["version"] != VERSION or facts["config"] != asdict(config):
        raise ValueError(f"{root} holds a world of other settings; give an empty folder, or delete that one")
    manifests = root / "train_segments.csv", root / "eval_segments.csv"
    world = World(root, *manifests, files=len(facts["files"]), clips=config.clips + config.eval_clips)
    media = [(root / "media" / f"{file['id']}.mp4", file["bytes"]) for file in facts["files"]]
    whole = all(path.exists() and path.stat().st_size == size for path, size in media)
    return world if whole and all(path.exists() for path in manifests) else None


def render_world(
    root: Path,
    config: WorldConfig = WorldConfig(),
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> World:
    """Render the world at `root`, or return it if it is there already. An interrupted rendering is continued.

    workers: processes; None takes one for each core, 1 renders in this process. on_progress: called with (files done, files).
    Raises ValueError if `root` holds a world of other settings.
    """
    root = Path(root)
    if (done := _existing(root, config)) is not None:
        return done
    files = plan(config)
    digest = hashlib.sha256(json.dumps([VERSION, asdict(config), av.library_versions], sort_keys=True).encode()).hexdigest()[:12]
    work = root / ".render" / digest
    for folder in (root / "media", work):
        folder.mkdir(parents=True, exist_ok=True)
    records: dict[str, dict[str, Any]] = {}

    def note(record: dict[str, Any]) -> None:
        records[record["id"]] = record
        if on_progress is not None:
            on_progress(len(records), len(files))

    workers = min(workers or os.cpu_count() or 1, len(files))
    if workers == 1:
        for file in files:
            note(_render_file(root, work, config, file))
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for future in as_completed([pool.submit(_render_file, root, work, config, file) for file in files]):
                note(future.result())
    ordered = [records[file.id] for file in files]
    for split in ("train", "eval"):
        _write(root / f"{split}_segments.csv", _manifest(ordered, split))
    facts = {"version": VERSION, "config": asdict(config), "codecs": av.library_versions, "classes": CLASSES, "files": ordered}
    _write(root / "world.json", json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(root / ".render")
    world = _existing(root, config)
    assert world is not None
    return world
