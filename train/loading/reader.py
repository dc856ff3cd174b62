"""Clips to batches of views, in four stages: look up, read, decode, and the DALI graph.

Reading and decoding of batches to come go on in threads while the graph makes the one that is due.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.train.loading.flac import cut_flac, flac_rate
from cmacc.train.loading.frames import UNDECODABLE, decode_crops
from cmacc.train.loading.graph import Decoder, Graph
from cmacc.train.loading.sound import UNREADABLE, read_sound
from cmacc.train.loading.views import ClipShape, View, ViewConfig, central_view

_READ_AT_ONCE = 2  # batches
_NEAR = 1 << 20
"""Bytes between two clips that are worth reading along."""


class BadClip(Exception):
    """A clip whose content does not decode. source, row: of which data set, and its catalog row; key: its key."""

    def __init__(self, clip: Clip, reason: object) -> None:
        super().__init__(f"clip {clip.shape.key} (row {clip.row}) does not decode: {reason}")
        self.source, self.row, self.key = clip.source, clip.row, clip.shape.key


class Clip(NamedTuple):
    """A clip to be read. source: number of its data set; row: in the catalog; label: code of its first one, -1 without."""

    source: int
    row: int
    shape: ClipShape
    video_id: int
    label: int


Encoded = tuple["bytes | io.RawIOBase", bytes]
"""Video and sound of a clip, as they lie in its tar."""


class Decoded(NamedTuple):
    """What the graph is given of one clip, a list item for each view. video: frames, or the MP4 bytes; numbers: of the frames;
    sound: encoded; begins: second of the clip's sound at which those bytes begin."""

    video: list[NDArray[np.uint8]]
    numbers: list[NDArray[np.int64]]
    sound: list[NDArray[np.uint8]]
    begins: list[float]


@dataclass(frozen=True)
class Batch:
    """video: float32 (B, 3, frames, size, size); audio: log-mel, float32 (B, 1, bands, steps); ids, sources, labels: int64
    (B,): the clip, its source video, its first label (-1 when it has none). second_video, second_audio: another view of the
    same clips, where `view.second` asks for one.

    With several data sets their clips and their labels are numbered on from one to the next.
    """

    video: Tensor
    audio: Tensor
    ids: Tensor
    sources: Tensor
    labels: Tensor
    second_video: Tensor | None = None
    second_audio: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        def moved(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            layout = torch.channels_last_3d if tensor.ndim == 5 else torch.preserve_format
            return tensor.to(device, memory_format=layout, non_blocking=True)

        return Batch(**{name: moved(tensor) for name, tensor in vars(self).items()})  # type: ignore[arg-type]


@dataclass
class Pending:
    """A batch on its way: its clips and views, and the decoding of each, known once their bytes are read."""

    clips: list[Clip]
    views: list[tuple[View, ...]]
    decoding: Future[list[Future[Decoded]]]
    block: Block


Block = NDArray[np.uint8]
"""Room for the frames of a batch, (B, views, F, size, size, 3); with NVDEC there are none. Used again and again: new memory for
each clip costs time, and what is freed in pieces never quite goes back to the system."""

Replace = Callable[[int, BadClip], "tuple[Clip, tuple[View, ...]] | None"]
"""Given the place in the batch of a clip that does not decode: what to take instead, None to leave it out."""


class ViewReader:
    """Reads and decodes clips of some data sets, up to `batch` at a time.

    device: "cpu" or "gpu", where the graph works. decoder: "nvdec" or "frames", see `graph`. threads: that decode. deblock: see
    `decode_frames`.
    `begin` and `finish` belong to one thread; `look_up`, `read` and `decode` may be called from any. Raises DatasetError for
    a data set whose clips have no picture or no sound, or are not alike.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        view: ViewConfig,
        *,
        batch: int,
        device: str = "cpu",
        decoder: Decoder = "frames",
        threads: int = 2,
        deblock: bool = True,
    ) -> None:
        self.datasets, self.view, self.batch = tuple(datasets), view, batch
        self.device, self.decoder, self.threads, self.deblock = device, decoder, threads, deblock
        self._members = [self._members_of(d) for d in datasets]
        self._first_id = [0, *accumulate(len(d) for d in datasets)]
        self._first_label = [0, *accumulate(len(d.catalog.vocabulary("labels")) for d in datasets)]
        # Not of a pool: at its end the interpreter would wait for a thread of one, even while its source stalls.
        self._reading, self._closed = threading.Semaphore(_READ_AT_ONCE), False
        self._decoding = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        self._graph: Graph | None = None
        self._free: list[Block] = []

    # --- the stages ---

    def look_up(self, source: Sequence[int], row: Sequence[int]) -> list[Clip]:
        """What the catalogs say of some clips; only the parts of them that are touched are read."""
        clips: list[Clip | None] = [None] * len(row)
        for s in set(source):
            dataset = self.datasets[s]
            here = [i for i, other in enumerate(source) if other == s]
            rows = np.array([row[i] for i in here], dtype=np.int64)
            numbers = (dataset.numbers(name, rows).tolist() for name in ("n_frames", "fps", "width", "height"))
            columns = dataset.texts("key", rows), *numbers, dataset.texts("source", rows), dataset.first_labels(rows).tolist()
            for i, r, key, n_frames, fps, width, height, video, label in zip(here, rows.tolist(), *columns, strict=True):
                shape = ClipShape(key, n_frames, fps, width, height)
                clips[i] = Clip(s, r, shape, _number(video), label + self._first_label[s] if label >= 0 else -1)
        return clips  # type: ignore[return-value]

    def read(self, clips: Sequence[Clip]) -> list[Encoded]:
        """Video and sound of each clip. Raises DatasetError, OSError when a source cannot be read.

        All that is not on a local disk is asked for at once. There, video is a file: of a view's second only some parts are read.
        """
        found: list[Encoded] = [(b"", b"")] * len(clips)
        for s in {clip.source for clip in clips}:
            dataset, (video, sound) = self.datasets[s], self._members[s]
            here = [i for i, clip in enumerate(clips) if clip.source == s]
            rows = [clips[i].row for i in here]
            if dataset.local and self.decoder == "frames":
                for i, row, (data,) in zip(here, rows, dataset.read_rows(rows, [sound]), strict=True):
                    found[i] = dataset.file(row, video), data
            else:
                for i, (picture, data) in zip(here, dataset.read_rows(rows, [video, sound]), strict=True):
                    found[i] = picture, data
        return found

    def decode(
        self, clip: Clip, views: Sequence[View], video: bytes | io.RawIOBase, sound: bytes, out: Sequence[NDArray[np.uint8]] = ()
    ) -> Decoded:
        """Frames of each view, cut and scaled, or on the way to NVDEC the bytes as they are. out: arrays for them, not new ones,
        (F, size, size, 3) each. Raises BadClip, and what reading raises."""
        shape = clip.shape
        if not video or not sound:
            raise BadClip(clip, f"its {'sound' if video else 'video'} member is empty")
        # a view may reach past the end of a short clip: its last frame stands
        numbers = [np.minimum(self.view.frame_numbers(v.start_frame, shape.fps), max(shape.n_frames - 1, 0)) for v in views]
        if isinstance(video, bytes) and self.decoder == "nvdec":
            pictures = [np.frombuffer(video, np.uint8)] * len(views)
        else:
            size, stated = self.view.size, (shape.height, shape.width)
            made = partial(decode_crops, video, size=size, stated=stated, deblock=self.deblock)
            try:
                if all(np.array_equal(numbers[0], n) for n in numbers):  # the same instants are decoded once
                    pictures = made(numbers[0], [v.crop for v in views], out=out)
                else:
                    pictures = [
                        made(n, [v.crop], out=out[i : i + 1])[0] for i, (n, v) in enumerate(zip(numbers, views, strict=True))
                    ]
            except UNDECODABLE as error:
                raise BadClip(clip, error) from error
        try:
            cut = [self._sound_of(view, sound) for view in views]
        except UNREADABLE as error:
            raise BadClip(clip, error) from error
        return Decoded(pictures, numbers, [np.frombuffer(data, np.uint8) for data, _ in cut], [at for _, at in cut])

    def make(self, decoded: Sequence[Decoded], views: Sequence[tuple[View, ...]]) -> tuple[list[Tensor], list[Tensor]]:
        """Pictures and log-mel of a batch, one of each for each view of a clip. Raises RuntimeError as the graph does."""
        graph = self._graph = self._graph or self._new_graph()
        try:
            pictures, mel = graph.run(*self._inputs(decoded, views))
        except RuntimeError:
            # One bad sample fails a whole DALI batch and the pipeline with it: build a new one next time.
            self._graph = None
            raise
        each = len(decoded)
        return list(pictures.split(each)), list(mel.split(each))

    # --- all of them ---

    def begin(self, clips: Sequence[Clip], views: Sequence[tuple[View, ...]]) -> Pending:
        """Set out to read and decode some clips."""
        clips, views = list(clips), list(views)
        block = self._free.pop() if self._free else self._new_block()
        decoding: Future[list[Future[Decoded]]] = Future()

        def work() -> None:
            try:
                with self._reading:
                    if self._closed:
                        raise RuntimeError("this reader is closed; make another one")
                    members = self.read(clips)
                every = zip(clips, views, members, block, strict=False)
                decoding.set_result([self._decoding.submit(self.decode, c, v, *m, out=list(room)) for c, v, m, room in every])
            except BaseException as error:
                decoding.set_exception(error)

        threading.Thread(target=work, name="read", daemon=True).start()
        return Pending(clips, views, decoding, block)

    def finish(self, pending: Pending, replace: Replace) -> Batch:
        """The batch that was begun. Raises what `read` does."""
        decoded: list[Decoded | None] = [None] * len(pending.clips)
        left = dict(enumerate(pending.decoding.result()))

        def instead(i: int, bad: BadClip) -> None:
            other = replace(i, bad)
            if other is None:
                decoded[i] = None
                return
            pending.clips[i], pending.views[i] = other
            members = self.read(other[:1])[0]
            left[i] = self._decoding.submit(self.decode, *other, *members, out=list(pending.block[i]))

        while True:
            while left:
                i, future = next(iter(left.items()))
                del left[i]
                try:
                    decoded[i] = future.result()
                except BadClip as bad:
                    instead(i, bad)
            there = [i for i, one in enumerate(decoded) if one is not None]
            inputs = [one for one in decoded if one is not None]
            views = [pending.views[i] for i in there]
            if not there:
                return self._batch([], *self._nothing())
            try:
                made = self.make(inputs, views)
            except RuntimeError as error:
                found = self._new_graph().culprit(*self._inputs(inputs, views))
                if found is None:
                    said = "DALI could not make a batch although it makes each of its clips alone"
                    raise RuntimeError(f"{said}: {error}") from error
                i = there[found[0] % len(there)]
                instead(i, BadClip(pending.clips[i], found[1]))
                continue
            self._free.append(pending.block)
            return self._batch([pending.clips[i] for i in there], *made)

    def central(self, rows: Sequence[int], place: float = 0.5) -> Batch:
        """Views without augmentation of some clips of the first data set. Raises BadClip."""
        clips = self.look_up([0] * len(rows), rows)

        def fail(_: int, bad: BadClip) -> None:
            raise bad

        return self.finish(self.begin(clips, [(central_view(self.view, clip.shape, place),) for clip in clips]), fail)

    def key(self, clip_id: int) -> str:
        """The key of a clip by its number in a `Batch`."""
        source = int(np.searchsorted(self._first_id, clip_id, side="right")) - 1
        return self.datasets[source].texts("key", [clip_id - self._first_id[source]])[0]

    def shard(self, clip: Clip) -> str:
        """Address of the shard that a clip is in."""
        dataset = self.datasets[clip.source]
        return f"{dataset.url}/{dataset.meta.shards[dataset.shard_of(clip.row)].name}"

    def spans(self, source: int, rows: NDArray[np.int64]) -> list[tuple[int, int, int]]:
        """(shard, begin, end) of the bytes of some clips of a data set, neighbours together."""
        dataset = self.datasets[source]
        offsets, sizes = dataset.places(rows)
        columns = [dataset.meta.members.index(m) for m in self._members[source]]
        begins, ends = offsets[:, columns].min(1), (offsets + sizes)[:, columns].max(1)
        found: list[tuple[int, int, int]] = []
        for shard, begin, end in zip(dataset.numbers("shard", rows).tolist(), begins.tolist(), ends.tolist(), strict=True):
            if found and found[-1][0] == shard and found[-1][2] <= begin <= found[-1][2] + _NEAR:
                found[-1] = shard, found[-1][1], end
            else:
                found.append((shard, begin, end))
        return found

    def close(self) -> None:
        """Does not wait for what is being read."""
        self._closed = True
        self._decoding.shutdown(wait=False, cancel_futures=True)

    # --- inside ---

    def _new_block(self) -> Block:
        views, frames = 1 if self.view.second == "none" else 2, 0 if self.decoder == "nvdec" else self.view.frames
        return np.empty((self.batch, views, frames, self.view.size, self.view.size, 3), np.uint8)

    def _new_graph(self) -> Graph:
        views = 1 if self.view.second == "none" else 2
        return Graph(self.view, self.batch * views, self.device, self.threads, decoder=self.decoder)

    def _inputs(self, decoded: Sequence[Decoded], views: Sequence[tuple[View, ...]]) -> tuple[list, list, list[View], list, list]:
        """All first views, then all second ones."""
        each = range(len(views[0]))
        columns = [[part[v] for v in each for part in column] for column in zip(*decoded, strict=True)]
        video, numbers, sound, begins = columns
        return video, sound, [of[v] for v in each for of in views], numbers, begins

    def _batch(self, clips: Sequence[Clip], pictures: list[Tensor], mel: list[Tensor]) -> Batch:
        def column(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64)

        ids = column([self._first_id[c.source] + c.row for c in clips])
        about = ids, column([c.video_id for c in clips]), column([c.label for c in clips])
        return Batch(pictures[0], mel[0], *about, *pictures[1:], *mel[1:])

    def _nothing(self) -> tuple[list[Tensor], list[Tensor]]:
        view, views = self.view, 1 if self.view.second == "none" else 2
        picture = torch.empty(0, 3, view.frames, view.size, view.size)
        return [picture] * views, [torch.empty(0, 1, view.n_mels, view.mel_steps)] * views

    def _sound_of(self, view: View, sound: bytes) -> tuple[bytes, float]:
        """Only what a view needs, at its rate, and the second at which it begins. FLAC of that rate is cut and not decoded."""
        start, seconds, rate = view.sound_s, self.view.view_s, self.view.audio_rate
        if flac_rate(sound) != rate:
            return read_sound(sound).wav(start, seconds, rate)
        data, first = cut_flac(sound, max(0, int(start * rate)), int((start + seconds) * rate) + 2)
        return data, first / rate

    @staticmethod
    def _members_of(dataset: Dataset) -> tuple[str, str]:
        members = dataset.profile.video_member, dataset.profile.audio_member
        for kind, member in zip(("picture", "sound"), members, strict=True):
            if member not in dataset.meta.members:
                has = ", ".join(dataset.meta.members)
                raise DatasetError(f"clips of {dataset.url} have no {kind} ({member}), only {has}; training needs both")
        return members


def _number(video: str) -> int:
    """A number that stands for a source video, the same in any data set; below 2^63."""
    return int.from_bytes(hashlib.blake2b(video.encode(), digest_size=8).digest(), "little") >> 1
