"""How late the sound of a clip comes after its picture, estimated from what moves and what begins to sound."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_OFFSET_S = 0.5
_BANDS = 12
_LOW_HZ, _HIGH_HZ = 100.0, 7000.0
_FLOOR = 1e-2  # of a band's mean power: what is softer than that is no onset
_STILL = 0.3  # luma change, 0..255, that is no motion
_TREND_S = 0.5
_SPREAD = (0.25, 0.5, 0.25)
_EPS = 1e-9


def av_offset(changes: NDArray[Any], sound: NDArray[np.float32], rate: int, fps: int) -> tuple[float, float]:
    """(offset_s, trust): seconds by which the sound comes late, within half a second, and how sure that is, 0 to 1.

    changes: mean absolute luma change from the frame before, (n,), 0 for the first. sound: mono, at `rate` Hz.

    The offset is the lag, in whole frames, at which onsets of motion and of sound correlate best: r(lag) is the coefficient of
    both series less their running mean. trust = (r(best) - max r elsewhere) * (1 - 4/n), not below 0: `elsewhere` is more than
    two frames away, so that a beat that fits at many lags counts for nothing; n = (sum p)^2 / sum p^2 over the positive
    products p of the two series at the best lag, about two for each event, so that two coincidences count for nothing.
    (0, 0) when the clip is too short, or when nothing moves or sounds.
    """
    most = round(min(MAX_OFFSET_S, len(changes) / fps / 4) * fps)
    if most < 4:
        return 0.0, 0.0
    known = np.concatenate([changes[1:2], changes[1:]])
    moves = _events(_rise(np.log(known + _STILL)), fps)
    sounds = _events(onsets(sound, rate, fps, len(changes)), fps)
    scale = float(np.linalg.norm(moves) * np.linalg.norm(sounds))
    if scale < _EPS:
        return 0.0, 0.0
    padded = np.pad(sounds, most)
    products = moves * np.lib.stride_tricks.sliding_window_view(padded, len(moves))  # (2 most + 1, n): lags from -most up
    fits = products.sum(axis=1) / scale
    best = int(fits.argmax())
    elsewhere = np.abs(np.arange(len(fits)) - best) > 2
    agree = np.maximum(products[best], 0)
    n = float(agree.sum() ** 2 / max(float(np.square(agree).sum()), _EPS))
    trust = max(0.0, float(fits[best] - max(0.0, fits[elsewhere].max()))) * max(0.0, 1 - 4 / max(n, 1.0))
    return (best - most) / fps, trust


def onsets(sound: NDArray[np.float32], rate: int, fps: int, n_frames: int) -> NDArray[np.float64]:
    """What begins to sound around each frame, (n_frames,): rise of log power since the frame before, summed over bands."""
    width = -(-rate // fps)
    starts = np.rint((np.arange(n_frames) - 0.5) * rate / fps).astype(int) + width
    pieces = np.lib.stride_tricks.sliding_window_view(np.pad(sound, width), width)[starts]
    power = np.square(np.abs(np.fft.rfft(pieces, axis=1)))
    edges = np.geomspace(_LOW_HZ, min(_HIGH_HZ, 0.45 * rate), _BANDS + 1)
    bins = np.unique(np.clip(np.rint(edges / rate * width).astype(int), 1, power.shape[1] - 1))
    bands = np.add.reduceat(power, bins, axis=1)[:, :-1]
    level = np.log(bands + _FLOOR * bands.mean(axis=0) + _EPS)
    return _rise(level).sum(axis=1)


def _rise(level: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(np.diff(level, axis=0, prepend=level[:1]), 0)


def _events(series: NDArray[np.float64], fps: int) -> NDArray[np.float64]:
    """A series less its running mean over about a second, spread a little: an event may fall between two frames."""
    width = 2 * round(_TREND_S * fps) + 1
    weights = np.ones(min(width, len(series)))
    mean = np.convolve(series, weights, "same") / np.convolve(np.ones(len(series)), weights, "same")
    return np.convolve(series - mean, _SPREAD, "same")
