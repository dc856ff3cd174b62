"""A loader as one writes it without us: webdataset, a decoder, torchaudio.

Sound, milliseconds of CPU a clip of 10 s in FLAC, of which 1.3 s are wanted: soundfile and its seek 0.36, torchcodec 0.73, PyAV
with a seek 0.74, PyAV from the start 2.5, soundfile all of it 2.4. torchaudio 2.11 decodes by torchcodec itself. log-mel clip by
clip or in batches is the same, 0.55.
"""

from __future__ import annotations

import io
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader

from peers.task import Job, LogMel, Wanted, finish, wanted

try:
    import soundfile
except ImportError:
    soundfile = None

Decode = Callable[[bytes, Wanted], Tensor]
"""Video bytes to the view's frames, cut and scaled: uint8 (F, 3, size, size)."""


def sound_of(data: bytes, view: Wanted, rate: int) -> Tensor:
    """The sound of a view, float32 (samples,)."""
    first = round(view.sound_s * rate)
    wave = (_by_soundfile if soundfile else _by_pyav)(data, first, view.samples, rate)
    return torch.from_numpy(np.pad(wave, (0, view.samples - len(wave)))) * view.gain


def _by_soundfile(data: bytes, first: int, count: int, rate: int) -> np.ndarray:
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        file.seek(min(first, file.frames))
        return file.read(count, dtype="float32")


def _by_pyav(data: bytes, first: int, count: int, rate: int) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.audio[0]
        container.seek(int(first / rate / stream.time_base), stream=stream)
        parts: list[np.ndarray] = []
        begin = 0
        for frame in container.decode(stream):
            begin = begin if parts else round(frame.pts * stream.time_base * rate)
            parts.append(frame.to_ndarray()[0])
            if begin + sum(map(len, parts)) >= first + count:
                break
    return np.concatenate(parts)[first - begin :][:count] / np.float32(32768)


class Make:
    """A sample of webdataset to the tensors of its view; each time a key comes is an epoch of its own."""

    def __init__(self, job: Job, decode: Decode) -> None:
        self.job, self.decode, self.log_mel = job, decode, LogMel(job.view)
        self.seen: Counter[str] = Counter()

    def __call__(self, sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
        key = sample["__key__"]
        view = wanted(self.job.view, self.seen[key], key, json.loads(sample["json"]))
        self.seen[key] += 1
        sound = self.log_mel(sound_of(sample["flac"], view, self.job.view.audio_rate))
        return finish(self.decode(sample["mp4"], view), view), sound


def _samples(job: Job) -> Any:
    shards = [str(path) for path in sorted(Path(job.data).glob("*.tar"))]
    return webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0, empty_check=False).repeat()


def by_workers(job: Job, decode: Decode) -> Iterator[tuple[Tensor, Tensor]]:
    torch.set_num_threads(1)
    samples = _samples(job).shuffle(64).map(Make(job, decode))
    return iter(DataLoader(samples, job.batch, num_workers=job.threads, prefetch_factor=2, multiprocessing_context="fork"))


def by_threads(job: Job, decode: Decode) -> Iterator[tuple[Tensor, Tensor]]:
    torch.set_num_threads(1)
    for done in ahead(Make(job, decode), iter(_samples(job).shuffle(64)), job):
        video, audio = zip(*done, strict=True)
        yield torch.stack(video), torch.stack(audio)


def ahead(work: Callable[[Any], Any], items: Iterator[Any], job: Job) -> Iterator[list[Any]]:
    """What `work` makes of endless items, in batches, two of them ahead, on the job's threads."""
    with ThreadPoolExecutor(job.threads) as pool:
        doing = deque(pool.submit(work, item) for item in islice(items, 2 * job.batch))
        while True:
            done = []
            for _ in range(job.batch):
                done.append(doing.popleft().result())
                doing.append(pool.submit(work, next(items)))
            yield done
