"""Sounds of any codec and rate: decoded, resampled, and as a WAV file of just what a view needs."""

from __future__ import annotations

import io
import math
import os
import struct
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from cmacc.shards.probe import probe

UNREADABLE = (ValueError, OSError, av.error.FFmpegError, IndexError, MemoryError)
"""What reading a file raises that is bad or gone."""
MARGIN_S = 0.05
"""Of sound on both sides of a view, where it is resampled."""
OPEN = {"protocol_whitelist": "none"}  # a file may be a playlist in disguise
LONGEST_S = 600.0
"""Of a longer sound or film that is no clip at rest, the first ten minutes are looked at."""

Source = str | os.PathLike[str] | bytes
"""A media file, or what is in one."""


def opened(source: Source) -> BinaryIO:
    """Raises OSError."""
    return io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb")


def reason(error: BaseException) -> str:
    """What one of UNREADABLE says, in a line."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(said).split())[:200]


@dataclass(frozen=True)
class Sound:
    """All of a sound: float32 (n,), its channels averaged, `rate` samples a second."""

    samples: NDArray[np.float32]
    rate: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate

    def wav(self, start_s: float, seconds: float, rate: int) -> tuple[bytes, float]:
        """A WAV file of `rate` with the part from `start_s` on, and the second at which it begins."""
        margin = 0.0 if rate == self.rate else MARGIN_S
        step = self.rate // gcd(self.rate, rate)  # so that it begins with a whole sample of either rate
        first = max(0, int((start_s - margin) * self.rate)) // step * step
        part = self.samples[first : int((start_s + seconds + margin) * self.rate) + 2]
        return to_wav(resampled(part, self.rate, rate) if len(part) else np.zeros(1, np.float32), rate), first / self.rate


def resampled(samples: NDArray[np.float32], rate: int, target: int) -> NDArray[np.float32]:
    """`samples` (n,) of `rate` Hz at `target` Hz, what lies above half of that taken away, float32.

    DALI's own resampler has no low-pass: of a sound at 48 kHz, 13 kHz would be heard at 3.
    """
    if rate == target:
        return samples
    common = gcd(rate, target)
    return np.asarray(resample_poly(samples, target // common, rate // common), np.float32)


def read_sound(source: Source, most_s: float = math.inf) -> Sound:
    """Decode the first sound of a file, of a longer one the first `most_s` seconds. Raises one of UNREADABLE: a file that is cut
    short, or damaged in what is decoded, is refused, never taken in part."""
    with opened(source) as file:
        about = probe(file, "audio")
        file.seek(0)
        with av.open(file, "r", container_options=OPEN, metadata_errors="ignore") as container:
            stream = container.streams.audio[0]
            stream.codec_context.options = {"err_detect": "crccheck+explode"}
            parts, had, most = [], 0, most_s * int(about["rate"])
            for frame in container.decode(stream):
                parts.append(_mono(frame))
                had += len(parts[-1])
                if had >= most:
                    break
    samples = np.concatenate(parts)[: round(min(had, most))] if parts else np.zeros(0, np.float32)
    if not len(samples):
        raise ValueError("it has no sound in it")
    if not np.isfinite(samples).all():
        raise ValueError("it has samples that are no numbers")
    return Sound(samples, int(about["rate"]))


def _mono(frame: av.AudioFrame) -> NDArray[np.float32]:
    """Full scale is 1, whatever the format: FFmpeg's own converter takes three times as long for frames of some ms."""
    if frame.layout.nb_channels > 2:  # PyAV 18 ends the process at eight planar channels
        (frame,) = av.AudioResampler(format="flt", layout=frame.layout, rate=frame.sample_rate).resample(frame)
    made = frame.to_ndarray()
    each = made if frame.format.is_planar else made.reshape(-1, frame.layout.nb_channels).T
    mean: NDArray[np.float32] = each[0] if len(each) == 1 else each.mean(0, dtype=np.float32)
    if made.dtype.kind == "f":
        return mean.astype(np.float32)
    half = 2.0 ** (8 * made.dtype.itemsize - 1)
    return ((mean.astype(np.float32) - (half if made.dtype.kind == "u" else 0.0)) / half).astype(np.float32)


def to_wav(samples: NDArray[np.float32], rate: int) -> bytes:
    """A mono WAV file of 32-bit floats."""
    data = samples.astype("<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, 1, rate, 4 * rate, 4, 32)  # IEEE float, one channel, bytes a second and a sample, bits
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks
