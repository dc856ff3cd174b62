"""Media to what an encoder takes, in plain torch and PyAV: as the training graph makes it, without augmentation.

Files are read as those of a labelled data set are: one that is cut short or does not decode is refused, never taken in part; of a
longer one the first ten minutes are looked at.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import av
import numpy as np
import torch
import torchaudio
from numpy.typing import NDArray
from torch import Tensor

from cmacc.train.loading.constants import FLOOR_DB, PICTURE_MEAN, PICTURE_STD
from cmacc.train.loading.film import look_at
from cmacc.train.loading.frames import UNDECODABLE, Box, Finish
from cmacc.train.loading.sound import LONGEST_S, Source, read_sound, reason, resampled
from cmacc.train.loading.views import ClipShape, ViewConfig, central_view


class Prepare:
    """Inputs of encoders that were trained with `view`.

    Both methods give one view from the middle, or `views` of them evenly spaced from the first to the last, or one at each second
    of `at`. What is shorter than a view is followed by silence, or by its last frame. All are on the CPU, float32.
    """

    def __init__(self, view: ViewConfig) -> None:
        self.view = view
        self._mel = torchaudio.transforms.MelSpectrogram(
            view.audio_rate, view.n_fft, view.window, view.hop, view.mel_low_hz, view.mel_high_hz, n_mels=view.n_mels,
            power=2, norm=None, mel_scale="htk",
        ).double()  # fmt: skip

    def audio(
        self,
        sound: Source | Tensor | NDArray[Any],
        rate: float | None = None,
        *,
        views: int = 1,
        at: Sequence[float] | None = None,
    ) -> Tensor:
        """Log-mel of a sound, (views, 1, bands, steps).

        sound: path or bytes of a media file, or a waveform of -1..1, (n,) or (channels, n), of `rate` Hz. Raises ValueError for a
        file without sound, OSError.
        """
        view = self.view
        if isinstance(sound, Tensor | np.ndarray):
            heard, rate = _waveform(sound), _rate(rate)
        else:
            with _refused(sound, "no sound that decodes", "give a file with sound"):
                found = read_sound(sound, LONGEST_S)
            heard, rate = torch.from_numpy(found.samples), float(found.rate)
        seconds, samples = len(heard) / rate, round(view.view_s * view.audio_rate)
        starts = [place * max(0.0, seconds - view.view_s) for place in _places(views)] if at is None else at
        heard = torch.from_numpy(resampled(heard.numpy(), round(rate), view.audio_rate))
        cut = torch.stack([_cut(heard, round(start * view.audio_rate), samples) for start in starts])
        decibels = 10 * self._mel(cut).clamp_min(10 ** (FLOOR_DB / 10)).log10()
        return ((decibels - view.mel_mean_db) / view.mel_std_db).float().unsqueeze(1)

    def video(
        self, film: Source | Tensor | NDArray[Any], fps: float | None = None, *, views: int = 1, at: Sequence[float] | None = None
    ) -> Tensor:
        """Pictures of a film, (views, 3, frames, size, size).

        film: path or bytes of a media file, or RGB frames, uint8 (n, height, width, 3), `fps` of them a second. Raises ValueError
        for a file without a picture, OSError.
        """
        if isinstance(film, Tensor | np.ndarray):
            frames = _frames(film)
            shape = ClipShape("", len(frames), _fps(fps), width=frames.shape[2], height=frames.shape[1])
            made = [self._scaled(frames, numbers, crop) for numbers, crop in self._plan(shape, views, at)]
        else:
            with _refused(film, "no picture that decodes", "give another film"):
                known = look_at(film)
            plan = self._plan(ClipShape("", known.frames, known.fps, known.width, known.height), views, at)
            with _refused(film, "no picture that decodes", "give another film"):
                made = known.pictures([numbers for numbers, _ in plan], [crop for _, crop in plan], self.view.size)
        pictures = torch.from_numpy(np.stack(made)).permute(0, 4, 1, 2, 3).float()
        return ((pictures - PICTURE_MEAN) / PICTURE_STD).contiguous()

    def _plan(self, clip: ClipShape, views: int, at: Sequence[float] | None) -> list[tuple[NDArray[np.int64], Box]]:
        """Frame numbers and crop of each view."""
        looks = [central_view(self.view, clip, place) for place in _places(views)]
        starts = [look.start_frame for look in looks] if at is None else [round(second * clip.fps) for second in at]
        last = max(0, clip.n_frames - 1)
        return [(np.minimum(self.view.frame_numbers(start, clip.fps), last), looks[0].crop) for start in starts]

    def _scaled(self, frames: NDArray[np.uint8], numbers: NDArray[np.int64], crop: Box) -> NDArray[np.uint8]:
        top, left, height, width = crop
        finish = Finish(None, self.view.size, None)
        cut = (np.ascontiguousarray(frames[n, top : top + height, left : left + width]) for n in numbers)
        return np.stack([finish(av.VideoFrame.from_ndarray(picture, format="rgb24")).copy() for picture in cut])


def _places(views: int) -> list[float]:
    if views < 1:
        raise ValueError(f"views is {views}; give 1 or more")
    return [0.5] if views == 1 else [i / (views - 1) for i in range(views)]


def _waveform(sound: Tensor | NDArray[Any]) -> Tensor:
    heard = torch.as_tensor(sound)
    if not heard.is_floating_point():
        raise ValueError(f"the waveform is of {heard.dtype}; give floats of -1 to 1, e.g. int16 / 32768")
    if heard.ndim == 2:
        heard = heard.mean(0)
    if heard.ndim != 1 or not len(heard):
        raise ValueError(f"a waveform of shape {tuple(torch.as_tensor(sound).shape)} does not fit; give (n,) or (channels, n)")
    return heard.float().cpu()


def _rate(rate: float | None) -> float:
    if rate is None or not 0 < rate < math.inf:
        raise ValueError(f"rate is {rate}; give the waveform's samples a second")
    return rate


def _frames(film: Tensor | NDArray[Any]) -> NDArray[np.uint8]:
    frames = film.cpu().numpy() if isinstance(film, Tensor) else film
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not all(frames.shape):
        said = f"frames of {frames.dtype} and shape {frames.shape} do not fit"
        raise ValueError(f"{said}; give RGB as uint8 (n, height, width, 3)")
    return frames


def _fps(fps: float | None) -> float:
    if fps is None or not 0 < fps < math.inf:
        raise ValueError(f"fps is {fps}; give how many frames there are a second")
    return fps


def _cut(heard: Tensor, start: int, samples: int) -> Tensor:
    """`samples` of a sound from sample `start` on, silence behind its end: float64 (samples,)."""
    part = heard[max(0, start) : max(0, start) + samples]
    return torch.nn.functional.pad(part, (0, samples - len(part))).double()


@contextmanager
def _refused(source: Source, what: str, instead: str) -> Iterator[None]:
    """A sentence for what the reader raises of a bad file; that a file is not there, or not ours to read, is told as it is."""
    try:
        yield
    except UNDECODABLE as error:
        name = "the file" if isinstance(source, bytes) else os.fspath(source)
        raise ValueError(f"{name} has {what} ({reason(error)}); {instead}") from error
