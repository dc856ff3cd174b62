"""Sound helpers: pulses at event times, filtered noise, and levelling. Mono float32, 16 kHz, full scale ±1."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RATE = 16_000
Wave = NDArray[np.float32]
QUARTERS = 4


def clock(seconds: float) -> Wave:
    """Sample instants, (S,) seconds."""
    return (np.arange(round(seconds * RATE)) / RATE).astype(np.float32)


def strike(times: Wave, seconds: float, voice: Callable[[Wave, int], Wave], tail_s: float = 0.6) -> Wave:
    """Sum of one voice started at each of `times`: voice(instants since the event, number of the event) -> samples. (S,)"""
    total = round(seconds * RATE)
    out = np.zeros(total, np.float32)
    for number, time in enumerate(times):
        first = round(float(time) * RATE)
        start, stop = max(first, 0), min(first + round(tail_s * RATE), total)
        if start < stop:
            out[start:stop] += voice((np.arange(start - first, stop - first) / RATE).astype(np.float32), number)
    return out


def attack(since: Wave, rise_s: float = 0.004) -> Wave:
    """A short ramp from 0 to 1, so that a pulse begins without a click."""
    return np.minimum(since / np.float32(rise_s), np.float32(1))


def decay(since: Wave, half_s: float) -> Wave:
    """Attack, then exponential decay that halves every `half_s` seconds."""
    return attack(since) * np.exp2(-since / np.float32(half_s))


def partials(since: Wave, hertz: float, ratios: tuple[float, ...], weights: tuple[float, ...]) -> Wave:
    """Sum of sines at hertz × ratios; those above 7 kHz are left out."""
    out = np.zeros_like(since)
    for ratio, weight in zip(ratios, weights, strict=True):
        if hertz * ratio < 7_000:
            out += np.float32(weight) * np.sin(np.float32(2 * np.pi * hertz * ratio) * since)
    return out


def glide(since: Wave, hertz: float, octaves_per_s: float) -> Wave:
    """A sine whose pitch moves by `octaves_per_s` from `hertz`."""
    slope = octaves_per_s * np.log(2)
    return np.sin(2 * np.pi * hertz * np.expm1(slope * since) / slope).astype(np.float32)


def band_noise(rng: np.random.Generator, samples: int, centre: float, octaves: float, floor_db: float = -60.0) -> Wave:
    """Gaussian noise of RMS 1 with a log-normal bump at `centre` Hz, half width `octaves`, over a floor. (samples,)"""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    hertz = np.maximum(np.fft.rfftfreq(samples, 1 / RATE), 20.0)
    gain = np.exp(-0.5 * (np.log2(hertz / centre) / octaves) ** 2) + 10 ** (floor_db / 20)
    noise = np.fft.irfft(spectrum * gain, samples)
    return (noise / np.sqrt(np.mean(noise**2))).astype(np.float32)


def tilted_noise(rng: np.random.Generator, samples: int, db_per_octave: float) -> Wave:
    """Gaussian noise of RMS 1 whose spectrum falls (or rises) evenly. (samples,)"""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    hertz = np.maximum(np.fft.rfftfreq(samples, 1 / RATE), 200.0)
    noise = np.fft.irfft(spectrum * (hertz / 1000) ** (db_per_octave / 6.02), samples)
    return (noise / np.sqrt(np.mean(noise**2))).astype(np.float32)


def in_room(dry: Wave, rng: np.random.Generator, lead_s: float) -> Wave:
    """`dry` (S,) with the echo of a random room, its first `lead_s` seconds dropped, RMS 1.

    The echo fills the pauses, so that loudness is even without riding the gain far.
    """
    since = clock(lead_s)
    echo = rng.standard_normal(len(since)) * np.exp2(-since / rng.uniform(0.2, 0.3))
    size = len(dry) + len(since)
    wet = np.fft.irfft(np.fft.rfft(dry, size) * np.fft.rfft(echo, size), size)[: len(dry)]
    share = rng.uniform(0.25, 0.4)
    out = (dry / np.sqrt(np.mean(dry**2)) + share * wet / np.sqrt(np.mean(wet**2)))[len(since) :]
    return np.asarray(out / np.sqrt(np.mean(out**2)), np.float32)


def quarter_db(wave: Wave) -> NDArray[np.float64]:
    """RMS of each quarter, (4,) dBFS."""
    power = [np.mean(np.square(part, dtype=np.float64)) for part in np.array_split(wave, QUARTERS)]
    return 10 * np.log10(np.array(power) + 1e-12)


def level(wave: Wave, target_db: NDArray[np.float64]) -> Wave:
    """Ride the gain, as a recorder's automatic level does, until each quarter has its target RMS (4,) dBFS; peaks are rounded."""
    knots = (np.arange(QUARTERS) + 0.5) / QUARTERS
    spots = np.arange(len(wave)) / len(wave)
    gain_db = target_db - quarter_db(wave)
    out = wave
    for _ in range(5):
        out = wave * np.exp(np.interp(spots, knots, gain_db) * (np.log(10) / 20)).astype(np.float32)
        out = np.tanh(out * np.float32(0.8)) / np.float32(0.8)
        gain_db = gain_db + (target_db - quarter_db(out))
    return out
