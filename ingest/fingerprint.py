"""256 bits that stay nearly the same when a clip is encoded again, and the search for earlier clips that have nearly the same.

192 bits of picture: at 1/6, 1/2 and 5/6 of a clip, which of the 64 lowest frequencies of the luma lie above their median (pHash:
C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010). 64 bits of sound: whether the difference
between neighbouring bands rises or falls from one ninth of the clip to the next (J. Haitsma and T. Kalker, A Highly Robust
Audio Fingerprinting System, ISMIR 2002, eq. 1, on log energies). Neither size, frame rate nor volume enters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

PICTURE_BITS, SOUND_BITS = 32, 10  # of 192 and 64: so far apart are two encodings of one clip at the most, as measured
_LOOKS = 3
_SIDE = 8
_WINDOW_S = 0.064
_LOW_HZ, _HIGH_HZ = 200.0, 3400.0
_FLOOR = 1e-2  # of the mean energy: what is softer than that is the codec's
_SILENCE = 1e-12

Luma = NDArray[np.uint8]


def looks(n_frames: int) -> tuple[int, ...]:
    """Numbers of the frames whose picture counts, ascending; the same one several times in a very short clip."""
    return tuple((2 * i + 1) * n_frames // (2 * _LOOKS) for i in range(_LOOKS))


def fingerprint(lumas: Sequence[Luma], sound: NDArray[np.float32], rate: int) -> str:
    """64 hex digits; "" when neither picture nor sound has anything to tell the clip by.

    lumas: of the frames `looks` names, uint8 [height, width]. sound: mono, at `rate` Hz.
    """
    words = np.packbits([*map(_picture_bits, lumas), _sound_bits(sound, rate)]).tobytes()
    return words.hex() if any(words) else ""


def distance(a: str, b: str) -> tuple[int, int]:
    """(picture, sound): differing bits of two fingerprints, of 192 and of 64."""
    bits = np.bitwise_count(_words(a) ^ _words(b))
    return int(bits[:_LOOKS].sum()), int(bits[_LOOKS])


class Near:
    """Fingerprints of clips seen so far, by key: which of them does a new one nearly repeat?

    Two are near when they differ in at most picture_bits of the 192 bits of picture and in at most sound_bits of the 64 of sound.
    """

    def __init__(self, picture_bits: int = PICTURE_BITS, sound_bits: int = SOUND_BITS) -> None:
        self.picture_bits, self.sound_bits = picture_bits, sound_bits
        self.keys: list[str] = []
        self._words = np.zeros((_LOOKS + 1, 1024), np.uint64)  # a column a clip: the sound of all of them lies together

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, key: str, fingerprint: str) -> None:
        self.extend([key], _words(fingerprint)[None])

    def extend(self, keys: Sequence[str], words: NDArray[np.uint64]) -> None:
        """Add many. words: (n, 4), as the catalog's column `fingerprint` has them; a clip without one (zeros) is left out."""
        told = np.flatnonzero(words.any(axis=1))
        begin, end = len(self.keys), len(self.keys) + len(told)
        if end > self._words.shape[1]:
            self._words = np.pad(self._words, ((0, 0), (0, max(end, 2 * begin) - self._words.shape[1])))
        self._words[:, begin:end] = words[told].T
        self.keys += [keys[i] for i in told.tolist()]

    def nearest(self, fingerprint: str) -> tuple[str, int, int] | None:
        """(key, picture bits, sound bits) of the nearest near clip, the earliest of several; None when there is none."""
        if not fingerprint:
            return None
        wanted, seen = _words(fingerprint), self._words[:, : len(self.keys)]
        sound = np.bitwise_count(seen[_LOOKS] ^ wanted[_LOOKS])
        alike = np.flatnonzero(sound <= self.sound_bits)
        picture = np.bitwise_count(seen[:_LOOKS, alike] ^ wanted[:_LOOKS, None]).sum(axis=0, dtype=np.int64)
        near = np.flatnonzero(picture <= self.picture_bits)
        if not len(near):
            return None
        best = near[np.argmin(picture[near] + sound[alike[near]])]
        return self.keys[alike[best]], int(picture[best]), int(sound[alike[best]])


def _words(fingerprint: str) -> NDArray[np.uint64]:
    return np.frombuffer(bytes.fromhex(fingerprint), ">u8").astype(np.uint64)


def _picture_bits(luma: Luma) -> NDArray[Any]:
    """(64,) bool: the lowest frequencies of a cosine transform of the whole picture; the first, its mean, says nothing."""
    low = (_cosines(luma.shape[0]) @ luma.astype(np.float32) @ _cosines(luma.shape[1]).T).ravel()
    low = np.round(low / luma.size, 2)  # a flat picture has no frequencies, whatever floating point makes of it
    above = low > np.median(low[1:])
    above[0] = False
    return above


def _cosines(n: int) -> NDArray[np.float32]:
    """(8, n): DCT-II of n points, its 8 lowest frequencies, 0 first."""
    return np.cos(np.pi / n * np.arange(_SIDE)[:, None] * (np.arange(n) + 0.5)).astype(np.float32)


def _sound_bits(sound: NDArray[np.float32], rate: int) -> NDArray[Any]:
    """(64,) bool: sign of the change in time of the difference between neighbouring bands, 8 times 8."""
    width = max(2, min(round(_WINDOW_S * rate), len(sound) // (_SIDE + 1)))
    pieces = np.lib.stride_tricks.sliding_window_view(sound, width)[:: width // 2] * np.hanning(width).astype(np.float32)
    power = np.square(np.abs(np.fft.rfft(pieces, axis=1)))
    edges = np.rint(np.geomspace(_LOW_HZ, _HIGH_HZ, _SIDE + 2) / rate * width).astype(int)
    bands = np.stack([power[:, a : max(a + 1, b)].sum(axis=1) for a, b in pairwise(edges)], axis=1)
    parts = np.add.reduceat(bands, np.arange(_SIDE + 1) * len(bands) // (_SIDE + 1), axis=0)
    level = np.log(parts + _FLOOR * parts.mean() + _SILENCE)
    return (np.diff(np.diff(level, axis=1), axis=0) > 0).ravel()
