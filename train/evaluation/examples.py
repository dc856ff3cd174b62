"""Files of a labelled data set as an encoder's input: the run's own views, by the same DALI graph as in training."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmacc.train.evaluation.labelled import Labelled
from cmacc.train.loading.film import look_at
from cmacc.train.loading.graph import Graph
from cmacc.train.loading.loader import LoaderConfig
from cmacc.train.loading.sound import LONGEST_S, UNREADABLE, read_sound, reason, to_wav
from cmacc.train.loading.views import ClipShape, View, ViewConfig, central_view, training_views

T = TypeVar("T")
_LOOK_S = 0.1
_SILENCE = np.frombuffer(to_wav(np.zeros(1, np.float32), 16_000), np.uint8)


@dataclass(frozen=True)
class Inputs:
    """Of one file: rate (Hz, or frames a second) and seconds, and what the graph is given for each of its views."""

    rate: float
    seconds: float
    views: list[View]
    video: list[NDArray[np.uint8]]
    sound: list[NDArray[np.uint8]]
    begins: list[float]


class Examples:
    """Views of labelled files. A sound that is shorter than a view is followed by silence, of a video the last frame stands,
    as the training loader has it.

    left_out: name to reason, of files that did not decode. facts: row to (Hz or frames a second, seconds) of those that did.
    loader: `batch` inputs are made at once, on `device`, by `workers` threads, `ahead` batches in advance.
    """

    def __init__(self, labelled: Labelled, view: ViewConfig, loader: LoaderConfig) -> None:
        self.labelled, self.view, self.loader = labelled, view, loader
        self.left_out: dict[str, str] = {}
        self.facts: dict[int, tuple[float, float]] = {}
        self._graph: Graph | None = None
        self._room = 0
        self._alone = threading.Lock()

    def central(self, rows: Sequence[int], views: int = 10, crops: int = 1) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Views without augmentation of each file, in order: `views` evenly spaced from first to last, each cut by `crops` (1:
        the middle; 3: both ends and the middle of the longer side; sounds are not cut).

        Gives rows (b,), and float32 (b, views x crops, 3, frames, size, size) or (b, views, 1, bands, steps), on `device`. Files
        that do not decode are left out. Batches to come are read meanwhile. Raises ValueError for other numbers.
        """
        if views < 1 or crops not in (1, 3):
            raise ValueError(f"there are {views} views and {crops} crops; give 1 view or more, and 1 crop or 3")

        def of(shape: ClipShape) -> list[View]:
            places = np.linspace(0, 1, views) if views > 1 else [0.5]
            found = [central_view(self.view, shape, float(place)) for place in places]
            return found if crops == 1 or self.labelled.kind == "audio" else [v for each in found for v in _cut(each, shape)]

        each = views * (crops if self.labelled.kind == "video" else 1)
        return ahead(self._batches(rows, max(1, self.loader.batch // each), of), self.loader.ahead)

    def training(self, rows: Sequence[int], seed: int, epoch: int) -> Tensor:
        """One augmented view of each file, float32 (b, 3, frames, size, size) or (b, 1, bands, steps): a pure function of (seed,
        epoch, file). Raises ValueError when one does not decode."""

        def of(shape: ClipShape) -> list[View]:
            return list(training_views(self.view, seed, epoch, shape)[:1])

        parts = list(self._batches(rows, self.loader.batch, of))
        if sum(len(there) for there, _ in parts) < len(rows):
            bad = next(name for row in rows if (name := self.labelled.file_name(row)) in self.left_out)
            raise ValueError(f"{bad} does not decode ({self.left_out[bad]}); take it out of the data set")
        return torch.cat([made[:, 0] for _, made in parts])

    # --- inside ---

    def _batches(
        self, rows: Sequence[int], files: int, of: Callable[[ClipShape], list[View]]
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        chunks = deque([list(map(int, rows[at : at + files])) for at in range(0, len(rows), files)])
        waiting: deque[tuple[list[int], list[Future[Inputs]]]] = deque()
        pool = ThreadPoolExecutor(self.loader.workers, thread_name_prefix="decode")
        try:
            while chunks or waiting:
                while chunks and len(waiting) <= self.loader.ahead:
                    chunk = chunks.popleft()
                    waiting.append((chunk, [pool.submit(self._read, row, of) for row in chunk]))
                there, inputs = [], []
                for row, future in zip(*waiting.popleft(), strict=True):
                    try:
                        inputs.append(future.result())
                    except UNREADABLE as error:
                        self.left_out[self.labelled.file_name(row)] = reason(error)
                        continue
                    there.append(row)
                    self.facts[row] = inputs[-1].rate, inputs[-1].seconds
                if there:
                    yield np.array(there, dtype=np.int64), self._make(inputs)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, row: int, of: Callable[[ClipShape], list[View]]) -> Inputs:
        path, name = self.labelled.files[row], self.labelled.file_name(row)
        return (_heard if self.labelled.kind == "audio" else _seen)(path, name, of, self.view)

    def _make(self, inputs: Sequence[Inputs]) -> Tensor:
        """(b, views, ...). Bad files were found before: what fails here is no file's fault."""
        views, sound, begins, video = (
            [one for of in inputs for one in getattr(of, name)] for name in ("views", "sound", "begins", "video")
        )
        with self._alone:
            if self._graph is None or len(views) > self._room:
                self._room = len(views)
                self._graph = Graph(
                    self.view, self._room, self.loader.dali_device, self.loader.workers, pictures=self.labelled.kind == "video"
                )
            made = self._graph.run(video, sound, views, (), begins)[self.labelled.kind == "audio"]
        return made.unflatten(0, (len(inputs), -1))


def _heard(path: Any, name: str, of: Callable[[ClipShape], list[View]], config: ViewConfig) -> Inputs:
    """A sound is to its views a clip with a frame for each sample."""
    sound = read_sound(path, LONGEST_S)
    views = of(ClipShape(name, len(sound.samples), float(sound.rate), 2, 2))
    cut = [sound.wav(view.sound_s, config.view_s, config.audio_rate) for view in views]
    return Inputs(sound.rate, sound.seconds, views, [], [np.frombuffer(data, np.uint8) for data, _ in cut], [at for _, at in cut])


def _seen(path: Any, name: str, of: Callable[[ClipShape], list[View]], config: ViewConfig) -> Inputs:
    film = look_at(path)
    views = [replace(view, sound_s=0.0) for view in of(ClipShape(name, film.frames, film.fps, film.width, film.height))]
    numbers = [np.minimum(config.frame_numbers(view.start_frame, film.fps), film.frames - 1) for view in views]
    pictures = film.pictures(numbers, [view.crop for view in views], config.size)
    return Inputs(film.fps, film.seconds, views, pictures, [_SILENCE] * len(views), [0.0] * len(views))


def _cut(view: View, shape: ClipShape) -> list[View]:
    """The view's square at both ends and in the middle of the longer side."""
    top, left, side, _ = view.crop
    last_top, last_left = (max(0, length - side) // 2 * 2 for length in (shape.height, shape.width))
    return [replace(view, crop=(t, x, side, side)) for t, x in ((0, 0), (top, left), (last_top, last_left))]


def ahead(made: Iterator[T], depth: int = 1) -> Iterator[T]:
    """The same things, made in a thread of its own, at most `depth` of them before they are asked for."""
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(max(1, depth))
    stop = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=_LOOK_S)
                return

    def work() -> None:
        try:
            for item in made:
                put((True, item))
                if stop.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if not more:
                if item is not None:
                    raise item
                return
            yield item
    finally:
        stop.set()
        thread.join()
