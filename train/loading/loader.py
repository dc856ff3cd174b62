"""Shards in, batches of views out, in an order and with a position that do not depend on who asks.

`TrainingLoader` walks the endless training order on a thread of its own; `evaluation_batches` walks a split once. Both
are thin: `sampler` says which clips, `views` how to look at them, `reader` makes the batches.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from cmacc.shards.dataset import Dataset
from cmacc.shards.order import rank_places
from cmacc.shards.prefetch import Prefetcher
from cmacc.train.loading.graph import Decoder
from cmacc.train.loading.reader import BadClip, Batch, Clip, Pending, ViewReader
from cmacc.train.loading.sampler import Sampler, Source
from cmacc.train.loading.views import View, ViewConfig, central_view, training_views

__all__ = ["BadClip", "Batch", "LoaderConfig", "Source", "TrainingLoader", "evaluation_batches"]

log = logging.getLogger(__name__)

_NVDEC = ("h264", "vp9")
_MOST_THREADS = 1024
_LOOK_S = 0.1
"""Between two looks at whether to stop."""
_GRACE_S = 5.0
"""For a thread that makes batches to come to its end."""
_producing: dict[threading.Thread, threading.Event] = {}
"""Threads that make batches, and what stops each."""


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are made; streams and window decide which, the others do not.

    batch: clips a step, over all ranks. device: where DALI works, `auto` takes the GPU if there is one. decoder: of video,
    `nvdec` or CPU threads that make `frames`; `auto` takes NVDEC beside a GPU, for codecs it knows. threads: that decode, 0: the
    machine's cores, shared among its ranks. ahead: batches that are read and decoded in advance. streams, window: of the order
    (see `shards.order`), samples. patience_s: without a batch for so long, a warning says what is being waited for. deblock:
    decode H.264 to the letter for training on a CPU, too (see `decode_frames`), as NVDEC and evaluation do.
    """

    batch: int = 128
    device: Literal["auto", "cpu", "gpu"] = "auto"
    decoder: Literal["auto", "nvdec", "frames"] = "auto"
    threads: int = 0
    ahead: int = 2
    streams: int = 16
    window: int = 4096
    patience_s: float = 30.0
    deblock: bool = False

    def __post_init__(self) -> None:
        for name, known in (("device", ("auto", "cpu", "gpu")), ("decoder", ("auto", "nvdec", "frames"))):
            if getattr(self, name) not in known:
                raise ValueError(f"loader.{name} is {getattr(self, name)!r}; use {', '.join(known[:-1])} or {known[-1]}")
        for name in ("batch", "ahead", "streams", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"loader.{name} is {getattr(self, name)}; give 1 or more")
        if not 0 <= self.threads <= _MOST_THREADS:
            said = f"give a number up to {_MOST_THREADS}, or 0 for as many as there are cores"
            raise ValueError(f"loader.threads is {self.threads}; {said}")
        if not self.patience_s > 0:
            raise ValueError(f"loader.patience_s is {self.patience_s}; give a number of seconds above 0")
        if self.decoder == "nvdec" and self.device == "cpu":
            raise ValueError("loader.decoder is nvdec, but loader.device is cpu; use frames, or another device")

    @property
    def dali_device(self) -> str:
        if self.device == "gpu" and not torch.cuda.is_available():
            raise ValueError("loader.device is gpu, but this machine has no CUDA device; use auto or cpu")
        return ("gpu" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device

    @property
    def workers(self) -> int:
        """Threads that decode: the cores this process may use, shared among the ranks that torchrun started here."""
        cores = len(os.sched_getaffinity(0))
        return self.threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def reader(
        self, datasets: Sequence[Dataset], view: ViewConfig, batch: int | None = None, *, deblock: bool = True
    ) -> ViewReader:
        """A reader that makes batches of up to `batch` clips (default: of `self.batch`)."""
        device = self.dali_device
        nvdec = device == "gpu" and all(d.profile.codec in _NVDEC for d in datasets)
        decoder: Decoder = ("nvdec" if nvdec else "frames") if self.decoder == "auto" else self.decoder
        return ViewReader(
            datasets, view, batch=batch or self.batch, device=device, decoder=decoder, threads=self.workers, deblock=deblock
        )


class TrainingLoader:
    """Batches of training views, endless or for some epochs. Its state is the number of samples consumed.

    Each rank makes its part of every global batch, and the same number of batches. Iterating starts the thread that makes
    batches ahead; `close` stops it, and so does letting go of the iterator. Where the content of a clip does not decode, that
    sample is of the next row of its split that does: so every rank comes to the same clips by itself, whatever was met before.
    Such clips are in `bad` and told to `on_bad` once; a source that cannot be read stops the run.

    sources: to be mixed by weight. seed: of order and views. rank, world: this process of how many. epochs: until the source
    that lasts longest has been seen so often; the last batch may then be smaller, and a rank's part of it empty.
    Raises ValueError, DatasetError.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        view: ViewConfig,
        config: LoaderConfig,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        epochs: int | None = None,
        on_bad: Callable[[BadClip], None] | None = None,
    ) -> None:
        if config.batch < world:
            raise ValueError(f"loader.batch is {config.batch} for {world} ranks; give at least {world}")
        self.config, self.view, self.seed, self.rank, self.world = config, view, seed, rank, world
        self._places = np.arange(config.batch)[rank_places(config.batch, rank, world)]
        self.sampler = Sampler(sources, seed=seed, streams=config.streams, window=config.window)
        self.end = None if epochs is None else epochs * self.sampler.epoch_samples
        datasets = [s.dataset for s in sources]
        self.reader = config.reader(datasets, view, len(self._places), deblock=config.deblock)
        self._on_bad = on_bad
        self.position = 0
        self.waited_s = 0.0
        self.interrupted: Callable[[], bool] = lambda: False  # asked while waiting: whether to end
        self.bad: dict[tuple[int, int], str] = {}  # (source, row) to key
        self._thread: threading.Thread | None = None
        self._in_flight: deque[tuple[int, Pending]] = deque()
        self._prefetchers: list[Prefetcher] = []  # the thread's own
        self._prefetched = -1
        for source in sources:
            _warn_of_small_cache(source.dataset, config.window)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from `position` on. `position` and `waited_s` (seconds spent waiting here) follow what is consumed.

        An iterator ends when `close` is called, or another one of the same loader begins: the reader is for one thread.
        """
        self._halt()
        ready: queue.Queue[Any] = queue.Queue(1)
        stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, args=(ready, stop, self.position), daemon=True, name="loader")
        _producing[self._thread] = stop
        self._thread.start()
        try:
            while not stop.is_set():
                began = time.perf_counter()
                item = self._next(ready)
                self.waited_s += time.perf_counter() - began
                if item is None or stop.is_set():
                    return
                if isinstance(item, BaseException):
                    raise item
                self.position += self._size(self.position)
                yield item
        finally:
            # Only told: any thread may collect an iterator that was let go of, also one that this thread waits for.
            stop.set()

    def state_dict(self) -> dict[str, Any]:
        # A copy in one go: the thread may find another bad clip meanwhile.
        bad = [[source, row, key] for (source, row), key in sorted(self.bad.copy().items())]
        return {"position": self.position, **self.sampler.state_dict(), "bad": bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the order is not the one that the state was saved with. The number of ranks may differ."""
        self._halt()
        self.sampler.load_state_dict({name: value for name, value in state.items() if name not in ("position", "bad")})
        self.bad = {(int(source), int(row)): str(key) for source, row, key in state["bad"]}
        self.position = int(state["position"])

    def close(self) -> None:
        """Does not wait for a source that does not answer."""
        self._halt(_GRACE_S)
        self.reader.close()

    # --- inside ---

    def _size(self, position: int) -> int:
        """Samples of the global batch that begins at `position`; 0 after the last one."""
        return self.config.batch if self.end is None else max(0, min(self.config.batch, self.end - position))

    def _produce(self, ready: queue.Queue[Any], stop: threading.Event, position: int) -> None:
        try:
            with ExitStack() as ending:
                self._prefetchers = [ending.enter_context(Prefetcher(s.dataset)) for s in self.sampler.sources]
                self._prefetched = -1
                self._in_flight.clear()
                ahead = position
                while not stop.is_set():
                    while len(self._in_flight) <= self.config.ahead and self._size(ahead):
                        self._in_flight.append((ahead, self._begin(ahead)))
                        ahead += self._size(ahead)
                    if not self._in_flight:
                        return
                    at, pending = self._in_flight[0]
                    if not wait((pending.decoding,), _LOOK_S).done:
                        continue  # a source may stall for minutes
                    _put(ready, self._finish(at, pending), stop)
                    self._in_flight.popleft()
        except BaseException as error:
            _put(ready, error, stop)
        finally:
            del _producing[threading.current_thread()]
            _put(ready, None, stop)

    def _next(self, ready: queue.Queue[Any]) -> Any:
        began, told = time.monotonic(), 0.0
        while not self.interrupted():
            with suppress(queue.Empty):
                return ready.get(timeout=_LOOK_S)
            if time.monotonic() - began - told > self.config.patience_s:
                told += self.config.patience_s
                log.warning("no batch for %g s: %s", self.config.patience_s, self._waiting_for())
        return None

    def _waiting_for(self) -> str:
        for _, pending in tuple(self._in_flight):
            if not pending.decoding.done():
                sources = {self.reader.shard(clip) for clip in pending.clips}
                more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
                return f"still reading {', '.join(sorted(sources)[:3])}{more}; look at the disk or the network"
        return "its clips are read, and still being decoded"

    def _begin(self, position: int) -> Pending:
        self._prefetch(position)
        places = self._places[self._places < self._size(position)]
        samples = self.sampler.at(position + places)
        clips = self.reader.look_up(samples.source.tolist(), samples.row.tolist())
        return self.reader.begin(clips, [self._views(*each) for each in zip(clips, samples.epoch.tolist(), strict=True)])

    def _views(self, clip: Clip, epoch: int) -> tuple[View, ...]:
        return training_views(self.view, self.seed, epoch, clip.shape)

    def _finish(self, position: int, pending: Pending) -> Batch:
        first: dict[int, tuple[int, int]] = {}  # where the search for another clip began

        def replace(place: int, bad: BadClip) -> tuple[Clip, tuple[View, ...]]:
            if (bad.source, bad.row) not in self.bad:
                self.bad[bad.source, bad.row] = bad.key
                log.warning("%s; the next one is taken in its place", bad)
                if self._on_bad:
                    self._on_bad(bad)
            row = self.sampler.instead(bad.source, bad.row)
            if first.setdefault(place, (bad.source, bad.row)) == (bad.source, row):
                url = self.reader.datasets[bad.source].url
                raise ValueError(f"no clip of {url} decodes; run `cmacc lint {url}`")
            epoch = int(self.sampler.at(position + self._places[place : place + 1]).epoch[0])
            clip = self.reader.look_up([bad.source], [row])[0]
            return clip, self._views(clip, epoch)

        return self.reader.finish(pending, replace)

    def _prefetch(self, position: int) -> None:
        """Tell the stores what is wanted next: of the streams this rank reads, in the order in which they lie there."""
        window = self.config.window
        if position // max(1, window // 8) == self._prefetched:
            return
        self._prefetched = position // max(1, window // 8)
        rank, world = self.rank, self.world
        if self.config.streams % world or self.config.batch % world or len(self._prefetchers) > 1:
            # every rank needs all streams: those of one machine share them, for the cache is theirs together
            rank, world = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        streams = range(rank % self.config.streams, self.config.streams, world)
        for source, rows in self.sampler.ahead(position, window, streams):
            self._prefetchers[source].advance(self.reader.spans(source, rows))

    def _halt(self, seconds: float | None = None) -> None:
        thread, self._thread = self._thread, None
        if thread:
            if stop := _producing.get(thread):
                stop.set()
            thread.join(seconds)


def _put(ready: queue.Queue[Any], item: Any, stop: threading.Event) -> None:
    """Wait for room, but for no longer than until `stop`: then whoever waits for an item is to get one at once."""
    while not stop.is_set():
        with suppress(queue.Full):
            ready.put(item, timeout=_LOOK_S)
            return
    with suppress(queue.Full):
        ready.put_nowait(None)


@atexit.register
def _stop_all() -> None:
    """Ahead of DALI, which takes down its pipelines at exit, also those that a thread is about to run."""
    for thread, stop in tuple(_producing.items()):
        stop.set()
        thread.join(_GRACE_S)


def _warn_of_small_cache(dataset: Dataset, window: int) -> None:
    """A block is wanted until the last of its window is read: a cache without room for them fetches them again and again."""
    if dataset.cache is None or not len(dataset):
        return
    need = 2 * min(window, len(dataset)) * sum(s.bytes for s in dataset.meta.shards) // len(dataset)
    if not dataset.cache.holds(need):
        log.warning(
            "the cache for %s has %.1f GB, but reading in a window of %d clips goes back and forth over %.1f GB; "
            "give it more (CMACC_CACHE_GB), or a smaller loader.window",
            dataset.url, dataset.cache.max_bytes / 1e9, window, need / 1e9,
        )  # fmt: skip


def evaluation_batches(
    dataset: Dataset, view: ViewConfig, config: LoaderConfig, rows: np.ndarray, place: float = 0.5
) -> Iterator[Batch]:
    """Views without augmentation of `rows`, once, in order, `place` of the way into each clip. Bad clips are left out."""
    reader = config.reader([dataset], view)
    waiting: deque[Pending] = deque()

    def left_out(_: int, bad: BadClip) -> None:
        log.warning("%s; left out", bad)

    try:
        chunks = (rows[at : at + config.batch] for at in range(0, len(rows), config.batch))
        for chunk in chunks:
            clips = reader.look_up([0] * len(chunk), chunk.tolist())
            waiting.append(reader.begin(clips, [(central_view(view, clip.shape, place),) for clip in clips]))
            if len(waiting) > config.ahead and len((batch := reader.finish(waiting.popleft(), left_out)).ids):
                yield batch
        while waiting:
            if len((batch := reader.finish(waiting.popleft(), left_out)).ids):
                yield batch
    finally:
        reader.close()
