"""What an encoder sees of a clip: a `View` of some frames and the sound of the same instants.

All randomness is a pure function of (seed, epoch, key), so nothing has to be saved to resume.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

LEAST_SIDE = 16
"""Pixels: no crop is narrower or lower, unless the picture is."""
LEAST_BLUR = 0.1
"""Smallest sigma of a blur, pixels; below, nothing is blurred."""

# Places of a view's draws, each uniform in [0, 1) and made whether it is needed or not: switching one augmentation on
# leaves the others as they were.
_START, _DISTANCE, _ORDER, _AREA, _RATIO, _TOP, _LEFT, _MIRROR, _GREY, _BRIGHTNESS, _CONTRAST, _SATURATION = range(12)
_GAIN, _BLUR, _SIGMA, _OFFSET = range(12, 16)
_PLACES = 32


@dataclass(frozen=True)
class ViewConfig:
    """Frames and log-mel of one view; saved in every checkpoint and export.

    frames: number of frames. view_s: seconds they span, and seconds of sound. size: pixels of the square picture.
    audio_rate: Hz. n_fft, hop, n_mels: of the log-mel, samples and bands. window: samples of the Hann window, in the middle
    of n_fft. mel_low_hz, mel_high_hz: its range. mel_mean_db, mel_std_db: constants that normalise it.
    The remaining fields are augmentation, used in training alone:
    crop_area: smallest crop, as a share of the largest square in the picture. crop_ratio: largest width / height and
    height / width of a crop, before it is squeezed to a square. flip, grey, blur: probabilities. jitter: largest relative
    change of brightness, contrast and saturation. blur_sigma: largest sigma, pixels of the finished picture.
    gain_db: largest change of volume, dB, either way. masks: how many masks over bands, and how many over time steps;
    mask_bands, mask_steps: the widest of them. offset_s: largest shift of the sound against the picture, seconds, either way.
    second: another view of each clip: "none"; "same", of the same instants; or "apart", of instants some way off, nearer
    ones more often (CVRL, arXiv 2008.03800).
    """

    frames: int = 16
    view_s: float = 1.0
    size: int = 112
    audio_rate: int = 16_000
    n_fft: int = 512
    window: int = 400
    hop: int = 160
    n_mels: int = 80
    mel_low_hz: float = 20.0
    mel_high_hz: float = 8_000.0
    mel_mean_db: float = -30.0
    mel_std_db: float = 20.0
    crop_area: float = 0.4
    crop_ratio: float = 4 / 3
    flip: float = 0.5
    grey: float = 0.1
    jitter: float = 0.3
    blur: float = 0.0
    blur_sigma: float = 1.5
    gain_db: float = 6.0
    masks: int = 0
    mask_bands: int = 12
    mask_steps: int = 20
    offset_s: float = 0.0
    second: Literal["none", "same", "apart"] = "none"

    def __post_init__(self) -> None:
        for name in ("frames", "size", "audio_rate", "n_fft", "window", "hop", "n_mels"):
            if getattr(self, name) < 1:
                raise ValueError(f"view.{name} is {getattr(self, name)}; give 1 or more")
        for name in ("masks", "mask_bands", "mask_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"view.{name} is {getattr(self, name)}; give 0 or more")
        for name in ("view_s", "mel_std_db", "blur_sigma"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"view.{name} is {getattr(self, name)}; give a number above 0")
        if self.window > self.n_fft:
            raise ValueError(f"view.window is {self.window}; give at most n_fft ({self.n_fft})")
        if self.mel_high_hz > self.audio_rate / 2:
            raise ValueError(f"view.mel_high_hz is {self.mel_high_hz}; give at most half of audio_rate ({self.audio_rate / 2})")
        if not 0 <= self.mel_low_hz < self.mel_high_hz:
            raise ValueError(f"view.mel_low_hz is {self.mel_low_hz}; give 0 or more, below mel_high_hz ({self.mel_high_hz})")
        if not 0 < self.crop_area <= 1:
            raise ValueError(f"view.crop_area is {self.crop_area}; give a share above 0 and up to 1")
        if not 1 <= self.crop_ratio < math.inf:
            raise ValueError(f"view.crop_ratio is {self.crop_ratio}; give 1 or more")
        for name in ("flip", "grey", "jitter", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"view.{name} is {getattr(self, name)}; give a share from 0 to 1")
        for name, unit in (("gain_db", "dB"), ("offset_s", "seconds")):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"view.{name} is {getattr(self, name)}; give 0 {unit} or more")
        if self.second not in ("none", "same", "apart"):
            raise ValueError(f"view.second is {self.second!r}; give 'none', 'same' or 'apart'")

    @property
    def mel_steps(self) -> int:
        """Columns of the log-mel: windows are centred, so one more than whole hops."""
        return round(self.view_s * self.audio_rate) // self.hop + 1

    def frame_numbers(self, start_frame: int, fps: float) -> np.ndarray:
        """The frames on screen at `frames` instants, evenly spaced over `view_s`: int64 (frames,). At a low `fps` they repeat."""
        return start_frame + np.floor(np.arange(self.frames) * (self.view_s * fps / self.frames) + 1e-9).astype(np.int64)

    def span_frames(self, fps: float) -> int:
        """Frames from the first of a view to one past its last instant."""
        return max(1, math.ceil(self.view_s * fps - 1e-9))


class ClipShape(NamedTuple):
    """What is known of a clip before it is decoded. fps, width and height are 0 where it has no picture."""

    key: str
    n_frames: int
    fps: float
    width: int
    height: int


@dataclass(frozen=True)
class View:
    """Where and how to look at one clip.

    start_frame: first frame taken. crop: (top, left, height, width), pixels of the stored picture, all even, since its
    colours have half its resolution. sound_s: second of the clip's sound at which the log-mel begins.
    mirror: flip left and right. brightness, contrast, saturation: factors. blur_sigma: pixels of the finished picture, 0 for
    none. gain: factor on the sound's amplitude. masks: parts of the log-mel to blank, (first band, first step, bands, steps).
    """

    start_frame: int
    crop: tuple[int, int, int, int]
    sound_s: float
    mirror: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    blur_sigma: float = 0.0
    gain: float = 1.0
    masks: tuple[tuple[int, int, int, int], ...] = ()


def generator(*words: int | str) -> np.random.Generator:
    """A generator that is a pure function of the words given, e.g. `generator(seed, epoch, key)`."""
    digest = hashlib.blake2b("\0".join(map(str, words)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def training_views(config: ViewConfig, seed: int, epoch: int, clip: ClipShape) -> tuple[View, ...]:
    """The augmented view of `clip` in `epoch`, or two of them if `config.second` asks for it."""
    draw = generator(seed, epoch, clip.key)
    rows = draw.random((2, _PLACES)).tolist()
    views = tuple(_augmented(config, clip, start, row) for start, row in zip(_starts(config, clip, rows[0]), rows, strict=False))
    if config.masks:
        views = tuple(replace(view, masks=_masks(config, draw.random((config.masks, 4)).tolist())) for view in views)
    return views


def central_view(config: ViewConfig, clip: ClipShape, place: float = 0.5) -> View:
    """The view used in evaluation: the largest square in the middle, `place` of the way (0..1) between first and last start."""
    start = round(place * _slack(config, clip))
    height, width = _even(clip.height), _even(clip.width)
    side = min(height, width)
    crop = ((height - side) // 4 * 2, (width - side) // 4 * 2, side, side)
    return View(start, crop, _seconds(clip, start))


def _slack(config: ViewConfig, clip: ClipShape) -> int:
    """The last start frame; 0 when the clip is no longer than the view."""
    return max(0, clip.n_frames - config.span_frames(clip.fps))


def _seconds(clip: ClipShape, frames: int) -> float:
    return frames / clip.fps if clip.fps else 0.0


def _even(side: int) -> int:
    return max(2, side // 2 * 2)


def _starts(config: ViewConfig, clip: ClipShape, row: Sequence[float]) -> tuple[int, ...]:
    """Start frame of each view."""
    slack = _slack(config, clip)
    if config.second != "apart":
        return (int(row[_START] * (slack + 1)),) * (1 if config.second == "none" else 2)
    # P(distance) falls linearly from 0 to the largest; then the pair is placed uniformly.
    distance = int((slack + 1) * (1 - math.sqrt(1 - row[_DISTANCE])))
    early = int(row[_START] * (slack - distance + 1))
    late = early + distance
    return (early, late) if row[_ORDER] < 0.5 else (late, early)


def _augmented(config: ViewConfig, clip: ClipShape, start: int, row: Sequence[float]) -> View:
    sigma = _between(row[_SIGMA], min(LEAST_BLUR, config.blur_sigma), config.blur_sigma)
    offset = config.offset_s * (2 * row[_OFFSET] - 1)
    latest = max(0.0, _seconds(clip, clip.n_frames) - config.view_s)
    return View(
        start_frame=start,
        crop=_crop(config, clip, row),
        sound_s=max(0.0, min(_seconds(clip, start) + offset, latest)),
        mirror=row[_MIRROR] < config.flip,
        brightness=1 + config.jitter * (2 * row[_BRIGHTNESS] - 1),
        contrast=1 + config.jitter * (2 * row[_CONTRAST] - 1),
        saturation=0.0 if row[_GREY] < config.grey else 1 + config.jitter * (2 * row[_SATURATION] - 1),
        blur_sigma=sigma if row[_BLUR] < config.blur else 0.0,
        gain=10 ** (config.gain_db * (2 * row[_GAIN] - 1) / 20),
    )


def _between(share: float, low: float, high: float) -> float:
    return low + share * (high - low)


def _crop(config: ViewConfig, clip: ClipShape, row: Sequence[float]) -> tuple[int, int, int, int]:
    """A rectangle of uniform area; its ratio log-uniform among those allowed with which it fits."""
    height, width = _even(clip.height), _even(clip.width)
    area = _between(row[_AREA], config.crop_area, 1.0) * min(height, width) ** 2
    low, high = max(1 / config.crop_ratio, area / height**2), min(config.crop_ratio, width**2 / area)
    ratio = low * (high / low) ** row[_RATIO]
    tall, wide = _side(math.sqrt(area / ratio), height), _side(math.sqrt(area * ratio), width)
    top, left = 2 * int(row[_TOP] * ((height - tall) // 2 + 1)), 2 * int(row[_LEFT] * ((width - wide) // 2 + 1))
    return top, left, tall, wide


def _side(length: float, longest: int) -> int:
    """`length` as an even number of pixels, not below LEAST_SIDE and not above `longest`."""
    return min(max(2 * round(length / 2), LEAST_SIDE), longest)


def _masks(config: ViewConfig, rows: Sequence[Sequence[float]]) -> tuple[tuple[int, int, int, int], ...]:
    """As many masks over all steps of some bands as over all bands of some steps, none empty, each inside the log-mel."""
    bands, steps = config.n_mels, config.mel_steps
    found = []
    for wide, place, long, when in rows:
        if config.mask_bands:
            size = 1 + int(wide * min(config.mask_bands, bands))
            found.append((int(place * (bands - size + 1)), 0, size, steps))
        if config.mask_steps:
            size = 1 + int(long * min(config.mask_steps, steps))
            found.append((0, int(when * (steps - size + 1)), bands, size))
    return tuple(found)
