"""What a score is to be compared with: the same encoder untrained, and statistics that anybody can compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torchaudio
from torch import Tensor

from cmacc.train.evaluation.examples import Examples
from cmacc.train.evaluation.features import Describer, Features, KeptOfFiles, Progress
from cmacc.train.evaluation.splits import Kind
from cmacc.train.loading.sound import LONGEST_S, UNREADABLE, Sound, read_sound, reason, resampled
from cmacc.train.networks.encoders import Encoder, EncoderConfig, build_encoders

RATE, N_FFT, WINDOW, HOP, BANDS, LOW_HZ = 16_000, 512, 400, 160, 80, 20.0
"""Of the log-mel statistics, whatever the encoder's own view: Hz, samples, samples, samples, bands, Hz."""
GRID = 4
"""Cells a side, of the colour and motion statistics."""


def untrained(config: EncoderConfig, kind: Kind, seed: int = 0) -> Encoder:
    """The encoder as it is before training, the same for the same seed; torch's own generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_encoders(config)[kind == "audio"].eval().requires_grad_(False)


def log_mel_statistics(sound: Sound) -> Features:
    """Mean, standard deviation and maximum over the whole file of each band of an 80-band log-mel, dB, and the standard deviation
    of its differences from step to step: (320,)."""
    samples = torch.from_numpy(resampled(sound.samples, sound.rate, RATE))
    samples = torch.nn.functional.pad(samples, (0, max(0, N_FFT - len(samples))))
    decibels = 10 * _mel()(samples).clamp_min(1e-10).log10()
    steps = decibels.diff(dim=1)
    return torch.cat([decibels.mean(1), decibels.std(1), decibels.amax(1), steps.std(1)]).numpy()


@cache
def _mel() -> torchaudio.transforms.MelSpectrogram:
    return torchaudio.transforms.MelSpectrogram(RATE, N_FFT, WINDOW, HOP, f_min=LOW_HZ, f_max=RATE / 2, n_mels=BANDS)


def whole_sounds(examples: Examples, cache: Path | None = None, on_progress: Progress | None = None) -> Features:
    """Log-mel statistics of all files, (n, 320), kept as `features.extract` keeps those of encoders."""
    kept = KeptOfFiles(
        cache, examples.labelled, 4 * BANDS, {"name": "log-mel statistics", "mel": [RATE, N_FFT, WINDOW, HOP, BANDS, LOW_HZ]}
    )
    examples.facts |= kept.facts()
    missing = np.flatnonzero(kept.missing()).tolist()
    done = len(examples.labelled.files) - len(missing)
    for count, (row, made) in enumerate(_described(examples, missing), start=1):
        if made is not None:
            kept.add(np.array([row]), made[None], examples.facts)
        if on_progress:
            on_progress(done + count)
    return kept.features()


def _described(examples: Examples, rows: list[int]) -> Iterator[tuple[int, Features | None]]:
    """In order, read in threads some files ahead."""
    labelled, waiting = examples.labelled, deque[tuple[int, Future[tuple[Sound, Features]]]]()

    def describe(path: Path) -> tuple[Sound, Features]:
        sound = read_sound(path, LONGEST_S)
        return sound, log_mel_statistics(sound)

    with ThreadPoolExecutor(examples.loader.workers) as pool:
        todo = deque(rows)
        while todo or waiting:
            while todo and len(waiting) < 4 * examples.loader.workers:
                row = todo.popleft()
                waiting.append((row, pool.submit(describe, labelled.files[row])))
            row, future = waiting.popleft()
            try:
                sound, made = future.result()
                examples.facts[row] = sound.rate, sound.seconds
                yield row, made
            except UNREADABLE as error:
                examples.left_out[labelled.file_name(row)] = reason(error)
                yield row, None


def colour_and_motion() -> Describer:
    """Of views (b, views, 3, frames, size, size) the mean and deviation of each colour, and the mean, deviation and
    maximum of the change from frame to frame, in each cell of a 4 x 4 grid; of views, the mean: (b, 144)."""
    return Describer("colour and motion", f"colour and motion {GRID}", GRID * GRID * 9, _colour_and_motion)


@torch.inference_mode()
def _colour_and_motion(views: Tensor) -> Tensor:
    b, v, channels, frames, _, _ = views.shape
    cells = torch.nn.functional.adaptive_avg_pool2d(views.flatten(0, 3), GRID).view(b, v, channels, frames, GRID * GRID)
    grey = views.mean(2)  # (b, v, frames, size, size)
    change = grey.diff(dim=2).abs() if frames > 1 else torch.zeros_like(grey)
    change = torch.nn.functional.adaptive_avg_pool2d(change.flatten(0, 2), GRID).view(b, v, -1, GRID * GRID)
    spread = torch.nn.functional.adaptive_avg_pool2d(views.flatten(0, 3) ** 2, GRID).view_as(cells)
    deviation = (spread.mean(3) - cells.mean(3) ** 2).clamp_min(0).sqrt()
    parts = [cells.mean(3).flatten(2), deviation.flatten(2), change.mean(2), change.std(2, unbiased=False), change.amax(2)]
    return torch.cat(parts, dim=2).mean(1)
