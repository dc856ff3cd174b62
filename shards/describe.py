"""A data set at a glance: its numbers, and a sheet of pictures and sounds of a few clips."""

from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cmacc.shards.dataset import Dataset

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_MEASURED = ("duration_s", "loudness_db", "motion", "av_offset_s", "av_trust")
_CELL = 96  # pixels of a picture's height; every clip is one strip of that
_SOUND = 240
_FRAMES = 5
_TEXT = 14


def describe(dataset: Dataset) -> dict[str, Any]:
    """Facts of a data set as plain numbers and names, ready for JSON.

    clips, hours, bytes, shards, sources, splits and labels (name: clips, most frequent first), columns added later,
    duplicates (clips that nearly repeat an earlier one), quantiles of duration_s, loudness_db, motion, av_offset_s and av_trust
    (0, 5, 25, 50, 75, 95, 100 %), profile, members, provenance, fingerprint (of dataset.json).
    """
    catalog, meta = dataset.catalog, dataset.meta
    codes, words = catalog.ragged("labels").values, catalog.vocabulary("labels")
    counts = np.bincount(codes, minlength=len(words)).tolist()
    return {
        "url": dataset.url,
        "fingerprint": dataset.fingerprint,
        "clips": len(dataset),
        "hours": float(catalog.column("duration_s").sum() / 3600),
        "bytes": sum(s.bytes for s in meta.shards),
        "shards": len(meta.shards),
        "sources": len(set(catalog.texts("source").tolist())),
        "splits": dict(Counter(catalog.texts("split").tolist()).most_common()),
        "labels": {w: n for n, w in sorted(zip(counts, words, strict=True), key=lambda p: (-p[0], p[1])) if n},
        "duplicates": int(np.count_nonzero(np.diff(catalog.ragged("duplicate_of").offsets))),
        "quantiles": {name: _quantiles(catalog.column(name)) for name in _MEASURED},
        "added_columns": {name: list(catalog.shape(name)) for name in catalog.added},
        "members": list(meta.members),
        "profile": meta.profile,
        "provenance": meta.provenance,
    }


def _quantiles(values: NDArray[Any]) -> dict[str, float]:
    """Of those that were measured: NaN stands for what was not."""
    values = values[~np.isnan(values)]
    if not len(values):
        return {}
    return {f"{q:.0%}": float(v) for q, v in zip(_QUANTILES, np.quantile(values, _QUANTILES), strict=True)}


def contact_sheet(dataset: Dataset, path: str | os.PathLike[str], n: int = 8) -> Path:
    """Write a PNG of `n` clips spread evenly over the data set, a strip each: frames, waveform, log spectrogram, key and labels.

    Raises DatasetError, or av.FFmpegError for a clip that cannot be decoded.
    """
    rows = np.unique(np.linspace(0, max(len(dataset) - 1, 0), min(n, len(dataset))).astype(int)).tolist()
    strips = [_strip(dataset, row) for row in rows]
    width = max((s.width for s in strips), default=_SOUND)
    sheet = Image.new("RGB", (width, max(1, sum(s.height for s in strips))), "white")
    y = 0
    for strip in strips:
        sheet.paste(strip, (0, y))
        y += strip.height
    sheet.save(path, format="PNG")
    return Path(path)


def _strip(dataset: Dataset, row: int) -> Image.Image:
    found = dataset.read(row)
    video, audio = dataset.profile.video_member, dataset.profile.audio_member
    parts = _frames(found[video]) if video in found else []
    if audio in found:
        sound = _samples(found[audio])
        parts += [_waveform(sound), _spectrogram(sound)]
    strip = Image.new("RGB", (sum(p.width + 2 for p in parts), _CELL + _TEXT + 4), "white")
    names = ", ".join(dataset.catalog.labels(slice(row, row + 1))[0])
    ImageDraw.Draw(strip).text((2, 1), f"{dataset.keys[row]}  {names}", fill="black")
    x = 0
    for part in parts:
        strip.paste(part, (x, _TEXT))
        x += part.width + 2
    return strip


def _frames(data: bytes) -> list[Image.Image]:
    """A few frames spread evenly over a clip."""
    with av.open(io.BytesIO(data), "r") as file:
        frames = list(file.decode(video=0))
    chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, _FRAMES).round().astype(int)]
    return [Image.fromarray(f.to_ndarray(format="rgb24")).resize((round(f.width * _CELL / f.height), _CELL)) for f in chosen]


def _samples(data: bytes) -> NDArray[np.float32]:
    """The sound of a clip, mono, -1 to 1."""
    with av.open(io.BytesIO(data), "r") as file:
        resampler = av.AudioResampler(format="flt", layout="mono")
        parts = [p.to_ndarray()[0] for frame in file.decode(audio=0) for p in resampler.resample(frame)]
    return np.concatenate(parts) if parts else np.zeros(1, np.float32)


def _waveform(sound: NDArray[np.float32]) -> Image.Image:
    picture = np.full((_CELL, _SOUND), 255, dtype=np.uint8)
    for x, part in enumerate(np.array_split(sound, _SOUND)):
        if len(part):
            top, bottom = ((1 - np.clip([part.max(), part.min()], -1, 1)) / 2 * (_CELL - 1)).round().astype(int)
            picture[top : bottom + 1, x] = 60
    return Image.fromarray(picture).convert("RGB")


def _spectrogram(sound: NDArray[np.float32], window: int = 512) -> Image.Image:
    """Decibels of power, frequency upwards, the loudest 80 dB from black to white."""
    padded = np.pad(sound, (0, max(0, window - len(sound))))
    starts = np.linspace(0, len(padded) - window, _SOUND).astype(int)
    spectra = np.abs(np.fft.rfft(padded[starts[:, None] + np.arange(window)] * np.hanning(window), axis=1)) ** 2
    decibels = 10 * np.log10(spectra.T[::-1] + 1e-10)
    grey = np.clip((decibels - decibels.max() + 80) / 80, 0, 1) * 255
    return Image.fromarray(grey.astype(np.uint8)).resize((_SOUND, _CELL)).convert("RGB")
