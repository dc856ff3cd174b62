"""Shards in, batches of views out, in an order and with a position that do not depend on who asks.

Three layers: `ViewReader` turns (rows, views) into tensors; `TrainingLoader` walks the endless training order on a
thread of its own; `evaluation_batches` walks a split once.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmacc.shards.dataset import Dataset
from cmacc.shards.order import epoch_order
from cmacc.train.frames import decode_frames
from cmacc.train.graph import Graph
from cmacc.train.views import View, ViewConfig, central_view, training_view

log = logging.getLogger(__name__)

UNDECODABLE = (ValueError, av.error.FFmpegError, IndexError)
"""What a clip with bad content raises. An OSError is not among them: a source that fails is no reason to skip a clip."""


class BadClip(Exception):
    """A clip that does not decode. row: its catalog row; key: its key."""

    def __init__(self, row: int, key: str, reason: object) -> None:
        super().__init__(f"clip {key} (row {row}) does not decode: {reason}")
        self.row, self.key = row, key


@dataclass(frozen=True)
class LoaderConfig:
    """batch: clips a step. device: where DALI works, `auto` takes the GPU if there is one. threads: that decode, 0: one a core.
    ahead: batches made in advance. streams, window: of the order (see `shards.order`)."""

    batch: int = 128
    device: Literal["auto", "cpu", "gpu"] = "auto"
    threads: int = 0
    ahead: int = 2
    streams: int = 8
    window: int = 4096

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "gpu"):
            raise ValueError(f"loader.device is {self.device!r}; use auto, cpu or gpu")
        for name in ("batch", "ahead", "streams", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"loader.{name} is {getattr(self, name)}; give 1 or more")
        if self.threads < 0:
            raise ValueError(f"loader.threads is {self.threads}; give a number, or 0 for as many as there are cores")

    @property
    def dali_device(self) -> str:
        if self.device == "gpu" and not torch.cuda.is_available():
            raise ValueError("loader.device is gpu, but this machine has no CUDA device; use auto or cpu")
        return ("gpu" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device

    @property
    def workers(self) -> int:
        return self.threads or os.cpu_count() or 1


@dataclass(frozen=True)
class Batch:
    """video: float32 (B, 3, frames, size, size); audio: log-mel, float32 (B, 1, bands, steps); ids, sources, labels:
    int64 (B,): catalog row, source video, first label (-1 when the clip has none)."""

    video: Tensor
    audio: Tensor
    ids: Tensor
    sources: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        video = self.video.to(device, memory_format=torch.channels_last_3d, non_blocking=True)
        return Batch(video, *(t.to(device, non_blocking=True) for t in (self.audio, self.ids, self.sources, self.labels)))


def first_labels(dataset: Dataset) -> NDArray[np.int64]:
    """Code of each clip's first label, int64 (n,), -1 for a clip without any."""
    codes, offsets = dataset.catalog.ragged("labels")
    labels = np.full(len(dataset), -1, dtype=np.int64)
    labelled = offsets[1:] > offsets[:-1]
    labels[labelled] = codes[offsets[:-1][labelled]]
    return labels


class ViewReader:
    """Reads and decodes clips of one data set. Not thread-safe: one reader for one thread."""

    def __init__(self, dataset: Dataset, view: ViewConfig, config: LoaderConfig) -> None:
        self.dataset, self.view, self.config = dataset, view, config
        self.device = config.dali_device
        catalog = dataset.catalog
        self.keys = dataset.keys
        self.n_frames = catalog.column("n_frames")
        self.aspect = catalog.column("width") / catalog.column("height")
        self.fps = float(dataset.profile.fps)
        self.sources = torch.from_numpy(np.unique(catalog.texts("source"), return_inverse=True)[1].astype(np.int64))
        self.labels = torch.from_numpy(first_labels(dataset))
        self._pool = ThreadPoolExecutor(config.workers, thread_name_prefix="decode")
        self._graph: Graph | None = None

    def training_view(self, seed: int, epoch: int, row: int) -> View:
        key, n_frames, aspect = str(self.keys[row]), int(self.n_frames[row]), float(self.aspect[row])
        return training_view(self.view, seed, epoch, key, n_frames, self.fps, aspect)

    def central_view(self, row: int, place: float = 0.5) -> View:
        return central_view(self.view, int(self.n_frames[row]), self.fps, float(self.aspect[row]), place)

    def read(self, rows: Sequence[int], views: Sequence[View]) -> Batch:
        """One batch, a view a row. Raises BadClip for the first clip whose content does not decode, OSError or DatasetError
        when a shard cannot be read."""
        video, audio = zip(*self._pool.map(self._members, rows, views), strict=True)
        graph = self._graph = self._graph or Graph(self.view, self.fps, self.config.batch, self.device, self.config.workers)
        try:
            pictures, mel = graph.run(video, audio, views)
        except RuntimeError as error:
            # One bad sample fails a whole DALI batch and the pipeline with it: build a new one next time.
            self._graph = None
            found = graph.culprit(video, audio, views)
            if found is None:
                raise RuntimeError(f"DALI could not make a batch although it makes each of its clips alone: {error}") from error
            row = rows[found[0]]
            raise BadClip(row, str(self.keys[row]), found[1]) from error
        index = torch.as_tensor(rows, dtype=torch.int64)
        return Batch(pictures, mel, index, self.sources[index], self.labels[index])

    def _members(self, row: int, view: View) -> tuple[np.ndarray, np.ndarray]:
        profile = self.dataset.profile
        members = self.dataset.read(row, (profile.video_member, profile.audio_member))
        video, audio = members[profile.video_member], members[profile.audio_member]
        if self.device == "gpu":
            frames = np.frombuffer(video, np.uint8)
        else:
            try:
                frames = decode_frames(video, view.start_frame, self.view.frames, self.view.stride(self.fps))
            except UNDECODABLE as error:
                raise BadClip(row, str(self.keys[row]), error) from error
        return frames, np.frombuffer(audio, np.uint8)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class TrainingLoader:
    """Endless batches of training views. Its state is the number of samples consumed.

    Iterating starts the thread that makes batches ahead; `close` stops it. A clip that does not decode is replaced by
    the next row of the split that does, always the same one, and told to `on_bad` once.
    """

    def __init__(
        self,
        dataset: Dataset,
        view: ViewConfig,
        config: LoaderConfig,
        *,
        split: str | None,
        seed: int,
        on_bad: Callable[[BadClip], None] | None = None,
    ) -> None:
        self.dataset, self.config, self.seed = dataset, config, seed
        self.rows = dataset.rows(split)
        self._shards = dataset.shard_of_row[self.rows]
        self._on_bad = on_bad
        self._bad: set[int] = set()
        self.reader = ViewReader(dataset, view, config)
        self.position = 0
        self.waited_s = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._order_of: tuple[int, np.ndarray] = (-1, self.rows)

    def rows_at(self, position: int, count: int) -> list[tuple[int, int]]:
        """(row, epoch) of samples position .. position + count: a pure function of (seed, position)."""
        out = []
        for place in range(position, position + count):
            epoch, offset = divmod(place, len(self.rows))
            if self._order_of[0] != epoch:
                order = epoch_order(
                    self._shards, seed=self.seed, epoch=epoch, streams=self.config.streams, window=self.config.window
                )
                self._order_of = (epoch, self.rows[order])
            out.append((int(self._order_of[1][offset]), epoch))
        return out

    def __iter__(self) -> Iterator[Batch]:
        """Batches from `position` on. `position` and `waited_s` (seconds spent waiting here) follow what is consumed.

        An iterator ends when `close` is called, or another one of the same loader begins: the reader is for one thread.
        """
        self._halt()
        ready: queue.Queue[Any] = queue.Queue(self.config.ahead)
        thread = threading.Thread(target=self._produce, args=(ready, self.position), daemon=True, name="loader")
        self._thread = thread
        thread.start()
        while self._thread is thread:
            began = time.perf_counter()
            item = ready.get()
            self.waited_s += time.perf_counter() - began
            if isinstance(item, BaseException):
                raise item
            self.position += self.config.batch
            yield item

    def _produce(self, ready: queue.Queue[Any], position: int) -> None:
        try:
            while not self._stop.is_set():
                self._put(ready, self._batch(position))
                position += self.config.batch
        except BaseException as error:
            self._put(ready, error)

    def _put(self, ready: queue.Queue[Any], item: Any) -> None:
        while not self._stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _batch(self, position: int) -> Batch:
        samples = self.rows_at(position, self.config.batch)
        while True:
            rows = [self._good(row) for row, _ in samples]
            views = [self.reader.training_view(self.seed, epoch, row) for row, (_, epoch) in zip(rows, samples, strict=True)]
            try:
                return self.reader.read(rows, views)
            except BadClip as bad:
                self._bad.add(bad.row)
                log.warning("%s; replaced from now on", bad)
                if self._on_bad:
                    self._on_bad(bad)

    def _good(self, row: int) -> int:
        if row not in self._bad:
            return row
        start = int(np.searchsorted(self.rows, row))
        for step in range(1, len(self.rows)):
            other = int(self.rows[(start + step) % len(self.rows)])
            if other not in self._bad:
                return other
        raise ValueError(f"no clip of {self.dataset.url} decodes; run `cmacc lint {self.dataset.url}`")

    def _halt(self) -> None:
        thread, self._thread = self._thread, None
        if thread:
            self._stop.set()
            thread.join()
            self._stop.clear()

    def close(self) -> None:
        self._halt()
        self.reader.close()

    def state_dict(self) -> dict[str, Any]:
        # A copy in one go: the thread may find another bad clip meanwhile.
        keys = sorted(str(self.reader.keys[row]) for row in tuple(self._bad))
        return {"position": self.position, "fingerprint": self.dataset.fingerprint, "replaced": keys}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the data set is not the one the state was saved with."""
        if state["fingerprint"] != self.dataset.fingerprint:
            raise ValueError(
                f"{self.dataset.url} has changed since this run's checkpoint (fingerprint {self.dataset.fingerprint[:12]}, then "
                f"{state['fingerprint'][:12]}), so its position means nothing; use another run folder, or the data set as it was"
            )
        self.position = int(state["position"])
        by_key = {str(key): row for row, key in enumerate(self.reader.keys)} if state["replaced"] else {}
        self._bad = {by_key[key] for key in state["replaced"]}


def evaluation_batches(
    dataset: Dataset, view: ViewConfig, config: LoaderConfig, rows: np.ndarray, place: float = 0.5
) -> Iterator[Batch]:
    """Views without augmentation of `rows`, once, in order, `place` of the way into each clip. Bad clips are left out."""
    reader = ViewReader(dataset, view, config)
    try:
        for begin in range(0, len(rows), config.batch):
            chunk = [int(row) for row in rows[begin : begin + config.batch]]
            while chunk:
                try:
                    yield reader.read(chunk, [reader.central_view(row, place) for row in chunk])
                    break
                except BadClip as bad:
                    log.warning("%s; left out", bad)
                    chunk.remove(bad.row)
    finally:
        reader.close()
