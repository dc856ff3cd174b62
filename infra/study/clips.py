"""A data set decoded once: every frame and the whole log-mel of each clip, small, in three files that every run maps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cmacc.shards.dataset import Dataset
from cmacc.train.loading.graph import PICTURE_MEAN, PICTURE_STD
from cmacc.train.loading.loader import Batch, LoaderConfig, evaluation_batches
from cmacc.train.loading.views import ViewConfig, generator

FPS = 16
"""Instants a second that are kept."""
MARGIN = 8
"""Pixels that a kept picture is larger than a view: a crop's place is drawn within them."""
VIEW = ViewConfig(frames=8, view_s=1.5, size=40, hop=320, n_fft=512, window=512, n_mels=48)
"""What the encoders see."""


@dataclass(frozen=True)
class Clips:
    """pictures: uint8 (n, instants, side, side, 3), mapped. sounds: normalised log-mel, float16 (n, bands, steps), mapped.

    ids: rows of the catalog, (n,). sources, labels: int64 (n,). train, held_out: places in these columns. classes: names.
    """

    pictures: NDArray[np.uint8]
    sounds: NDArray[np.float16]
    ids: NDArray[np.int64]
    sources: NDArray[np.int64]
    labels: NDArray[np.int64]
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]
    classes: list[str]

    def order(self, seed: int, step: int, batch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places of a step's batch and the epoch of each: every clip once an epoch, a pure function of (seed, step)."""
        position = np.arange(step * batch, (step + 1) * batch)
        epochs = position // len(self.train)
        orders = {int(e): generator("study", seed, "order", int(e)).permutation(self.train) for e in np.unique(epochs)}
        return np.array([orders[int(e)][p % len(self.train)] for e, p in zip(epochs, position, strict=True)]), epochs

    def views(self, places: NDArray[np.int64], draws: np.random.Generator | None) -> Batch:
        """One view of each clip, augmented by `draws`: its instant, crop, mirror, brightness, contrast and volume; None: the
        middle of the clip as it is. Picture and sound are of the same instants."""
        n, span = len(places), round(VIEW.view_s * FPS)
        late = self.pictures.shape[1] - span
        top, left = np.full(n, MARGIN // 2), np.full(n, MARGIN // 2)
        start, mirror = np.full(n, late // 2), np.zeros(n, bool)
        contrast, light, gain = np.ones(n), np.zeros(n), np.zeros(n)
        if draws is not None:
            start, mirror = draws.integers(0, late + 1, n), draws.random(n) < 0.5
            top, left = draws.integers(0, MARGIN + 1, n), draws.integers(0, MARGIN + 1, n)
            contrast, light = draws.uniform(0.7, 1.3, n), draws.uniform(-30, 30, n)
            gain = draws.uniform(-6, 6, n) / VIEW.mel_std_db
        numbers = (np.arange(VIEW.frames) * span // VIEW.frames).astype(np.int64)
        video = np.empty((n, VIEW.frames, VIEW.size, VIEW.size, 3), np.float32)
        audio = np.empty((n, 1, VIEW.n_mels, VIEW.mel_steps), np.float32)
        for i, place in enumerate(places):
            crop = self.pictures[place, start[i] + numbers, top[i] : top[i] + VIEW.size, left[i] : left[i] + VIEW.size]
            video[i] = crop[:, :, ::-1] if mirror[i] else crop
            at = round(start[i] / FPS * VIEW.audio_rate / VIEW.hop)
            audio[i, 0] = self.sounds[place, :, at : at + VIEW.mel_steps]
        shape = (n, 1, 1, 1, 1)
        middle = np.float32(PICTURE_MEAN)
        video = (video - middle) * contrast.reshape(shape).astype(np.float32) + light.reshape(shape).astype(np.float32)
        audio += gain.reshape(n, 1, 1, 1).astype(np.float32)
        pictures = torch.from_numpy(video / np.float32(PICTURE_STD)).permute(0, 4, 1, 2, 3)  # channels_last_3d already
        columns = (torch.from_numpy(each[places]) for each in (self.ids, self.sources, self.labels))
        return Batch(pictures, torch.from_numpy(audio), *columns)


def keep(dataset: Dataset, seconds: float, folder: Path, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Decode `dataset` through the training loader's own path into `folder`, unless it is there. seconds: of each clip."""
    if (folder / "clips.json").exists():
        return
    aside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    whole = replace(VIEW, frames=round(seconds * FPS), view_s=seconds, size=VIEW.size + MARGIN)
    n, ids, labels, sources = len(dataset), [], [], []
    pictures = np.lib.format.open_memmap(aside / "pictures.npy", "w+", np.uint8, (n, whole.frames, whole.size, whole.size, 3))
    sounds = np.lib.format.open_memmap(aside / "sounds.npy", "w+", np.float16, (n, whole.n_mels, whole.mel_steps))
    at = 0
    for batch in evaluation_batches(dataset, whole, LoaderConfig(batch=32, device="cpu"), dataset.rows()):
        stop = at + len(batch.ids)
        frames = batch.video.permute(0, 2, 3, 4, 1) * PICTURE_STD + PICTURE_MEAN
        pictures[at:stop] = frames.round().clamp(0, 255).to(torch.uint8).numpy()
        sounds[at:stop] = batch.audio[:, 0].to(torch.float16).numpy()
        ids.append(batch.ids), labels.append(batch.labels), sources.append(batch.sources)
        at = stop
        if on_progress:
            on_progress(at, n)
    pictures.flush(), sounds.flush()
    rows = torch.cat(ids).numpy()  # those that do not decode are not among them
    np.savez(aside / "rows.npz", ids=rows, labels=torch.cat(labels).numpy(), sources=torch.cat(sources).numpy(),
             train=np.isin(rows, dataset.rows("train")), held_out=np.isin(rows, dataset.rows("eval")))  # fmt: skip
    facts = {"data": dataset.url, "clips": at, "classes": list(dataset.catalog.vocabulary("labels"))}
    (aside / "clips.json").write_text(json.dumps(facts) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def open_clips(folder: Path) -> Clips:
    rows, facts = np.load(folder / "rows.npz"), json.loads((folder / "clips.json").read_text())
    train, held_out = (np.flatnonzero(rows[name]) for name in ("train", "held_out"))
    pictures, sounds = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("pictures", "sounds"))
    return Clips(pictures, sounds, rows["ids"], rows["sources"], rows["labels"], train, held_out, facts["classes"])
