"""What an encoder sees of a clip: a `View` of some frames and the sound of the same instants.

All randomness is a pure function of (seed, epoch, key), so nothing has to be saved to resume.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ViewConfig:
    """Frames and log-mel of one view; saved in every checkpoint and export.

    frames: number of frames. view_s: seconds they span, and seconds of sound. size: pixels of the square picture.
    audio_rate: Hz. n_fft, hop, n_mels: of the log-mel, samples and bands. mel_low_hz, mel_high_hz: its range.
    mel_mean_db, mel_std_db: constants that normalise it. The remaining fields are augmentation, used in training alone:
    crop_area: smallest share of the picture kept. flip, grey: probabilities. jitter: largest relative change of
    brightness, contrast and saturation. gain_db: largest change of volume, dB, either way.
    """

    frames: int = 16
    view_s: float = 1.0
    size: int = 112
    audio_rate: int = 16_000
    n_fft: int = 400
    hop: int = 160
    n_mels: int = 80
    mel_low_hz: float = 20.0
    mel_high_hz: float = 8_000.0
    mel_mean_db: float = -30.0
    mel_std_db: float = 20.0
    crop_area: float = 0.4
    flip: float = 0.5
    grey: float = 0.1
    jitter: float = 0.3
    gain_db: float = 6.0

    def __post_init__(self) -> None:
        for name in ("frames", "size", "audio_rate", "n_fft", "hop", "n_mels"):
            if getattr(self, name) < 1:
                raise ValueError(f"view.{name} is {getattr(self, name)}; give 1 or more")
        for name in ("view_s", "mel_std_db"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"view.{name} is {getattr(self, name)}; give a number above 0")
        if self.mel_high_hz > self.audio_rate / 2:
            raise ValueError(f"view.mel_high_hz is {self.mel_high_hz}; give at most half of audio_rate ({self.audio_rate / 2})")
        if not 0 <= self.mel_low_hz < self.mel_high_hz:
            raise ValueError(f"view.mel_low_hz is {self.mel_low_hz}; give 0 or more, below mel_high_hz ({self.mel_high_hz})")
        if not 0 < self.crop_area <= 1:
            raise ValueError(f"view.crop_area is {self.crop_area}; give a share above 0 and up to 1")
        for name in ("flip", "grey", "jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"view.{name} is {getattr(self, name)}; give a share from 0 to 1")
        if not 0 <= self.gain_db < math.inf:
            raise ValueError(f"view.gain_db is {self.gain_db}; give 0 dB or more")

    def stride(self, fps: float) -> int:
        """Frames from one taken frame to the next, in a video of `fps` frames per second: a whole number, at least 1."""
        return max(1, round(self.view_s * fps / self.frames))

    def span_s(self, fps: float) -> float:
        """Seconds a view really spans: `view_s`, rounded to whole frames."""
        return self.frames * self.stride(fps) / fps

    def mel_steps(self, fps: float) -> int:
        """Columns of the log-mel: windows are centred, so one more than whole hops."""
        return round(self.span_s(fps) * self.audio_rate) // self.hop + 1


@dataclass(frozen=True)
class View:
    """Where and how to look at one clip.

    start_frame: first frame taken. crop: (top, left, height, width), shares of the picture, 0..1.
    mirror: flip left and right. brightness, contrast, saturation: factors. gain: factor on the sound's amplitude.
    """

    start_frame: int
    crop: tuple[float, float, float, float]
    mirror: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    gain: float = 1.0


def generator(*words: int | str) -> np.random.Generator:
    """A generator that is a pure function of the words given, e.g. `generator(seed, epoch, key)`."""
    digest = hashlib.blake2b("\0".join(map(str, words)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def _slack(config: ViewConfig, n_frames: int, fps: float) -> int:
    """Start frames to choose from, less one; 0 when the clip is no longer than the view."""
    return max(0, n_frames - config.frames * config.stride(fps))


def _square(aspect: float, area: float) -> tuple[float, float]:
    """(height, width) in shares of a picture with `aspect` = width / height of a square of `area` of the largest one."""
    side = area**0.5
    return side * min(1.0, aspect), side * min(1.0, 1.0 / aspect)


def training_view(config: ViewConfig, seed: int, epoch: int, key: str, n_frames: int, fps: float, aspect: float) -> View:
    """The augmented view of clip `key` in `epoch`. aspect: width / height of its pictures."""
    draw = generator(seed, epoch, key)
    height, width = _square(aspect, draw.uniform(config.crop_area, 1.0))
    factors = 1.0 + config.jitter * draw.uniform(-1.0, 1.0, 3)
    return View(
        start_frame=int(draw.integers(0, _slack(config, n_frames, fps) + 1)),
        crop=(draw.uniform(0, 1 - height), draw.uniform(0, 1 - width), height, width),
        mirror=bool(draw.random() < config.flip),
        brightness=float(factors[0]),
        contrast=float(factors[1]),
        saturation=0.0 if draw.random() < config.grey else float(factors[2]),
        gain=float(10 ** (config.gain_db * draw.uniform(-1.0, 1.0) / 20)),
    )


def central_view(config: ViewConfig, n_frames: int, fps: float, aspect: float, place: float = 0.5) -> View:
    """The view used in evaluation: no augmentation, centre square, `place` of the way (0..1) between first and last start."""
    height, width = _square(aspect, 1.0)
    return View(round(place * _slack(config, n_frames, fps)), ((1 - height) / 2, (1 - width) / 2, height, width))
