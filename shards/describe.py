"""A data set at a glance: its numbers, and a sheet of pictures and sounds of a few clips."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cmacc.shards.catalog import Catalog
from cmacc.shards.clip import AUDIO, VIDEO
from cmacc.shards.dataset import Dataset
from cmacc.shards.pictures import frames, log_mel_picture, sound, strip, waveform
from cmacc.shards.preview import first_of

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
    return {
        "url": dataset.url,
        "fingerprint": dataset.fingerprint,
        "clips": len(dataset),
        "hours": float(catalog.column("duration_s").sum() / 3600),
        "bytes": sum(s.bytes for s in meta.shards),
        "shards": len(meta.shards),
        "sources": pc.count_distinct(catalog.arrow("source")).as_py(),
        "splits": split_counts(catalog),
        "labels": label_counts(catalog),
        "duplicates": int(np.count_nonzero(np.diff(catalog.ragged("duplicate_of").offsets))),
        "quantiles": {name: _quantiles(catalog.column(name)) for name in _MEASURED},
        "added_columns": {name: list(catalog.shape(name)) for name in catalog.added},
        "members": list(meta.members),
        "profile": meta.profile,
        "provenance": meta.provenance,
    }


def split_counts(catalog: Catalog, rows: NDArray[np.int64] | None = None) -> dict[str, int]:
    """Clips of each split, most first, among `rows` (default: all)."""
    return _counted(_chosen(catalog.column("split"), rows), catalog.vocabulary("split"))


def label_counts(catalog: Catalog, rows: NDArray[np.int64] | None = None) -> dict[str, int]:
    """Clips of each label, most first, among `rows` (default: all); a clip counts with each of its labels."""
    codes, offsets = catalog.ragged("labels")
    if rows is not None:
        chosen = np.zeros(catalog.rows, bool)
        chosen[rows] = True
        codes = codes[np.repeat(chosen, np.diff(offsets))]
    return _counted(codes, catalog.vocabulary("labels"))


def _chosen(values: NDArray[Any], rows: NDArray[np.int64] | None) -> NDArray[Any]:
    return values if rows is None else values[rows]


def _counted(codes: NDArray[Any], words: list[str]) -> dict[str, int]:
    counts = np.bincount(codes.astype(np.int64, copy=False), minlength=len(words)).tolist()
    return {w: n for n, w in sorted(zip(counts, words, strict=True), key=lambda p: (-p[0], p[1])) if n}


def evenly(rows: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """At most `n` of the rows, spread evenly over them, the first and the last among them; int64, in their order."""
    return rows[np.unique(np.linspace(0, max(len(rows) - 1, 0), min(n, len(rows))).astype(np.int64))]


def _quantiles(values: NDArray[Any]) -> dict[str, float]:
    """Of those that were measured: NaN stands for what was not."""
    values = values[np.isfinite(values)]
    if not len(values):
        return {}
    return {f"{q:.0%}": float(v) for q, v in zip(_QUANTILES, np.quantile(values, _QUANTILES), strict=True)}


def contact_sheet(dataset: Dataset, path: str | os.PathLike[str], n: int = 8) -> Path:
    """Write a PNG of `n` clips spread evenly over the data set, a strip each: frames, waveform, log-mel, key and labels.

    Raises DatasetError, or av.FFmpegError or ValueError for a clip that cannot be decoded.
    """
    strips = [_strip(dataset, row) for row in evenly(dataset.rows(), n).tolist()]
    width = max((s.width for s in strips), default=_SOUND)
    sheet = Image.new("RGB", (width, max(1, sum(s.height for s in strips))), "white")
    y = 0
    for picture in strips:
        sheet.paste(picture, (0, y))
        y += picture.height
    sheet.save(path, format="PNG")
    return Path(path)


def _strip(dataset: Dataset, row: int) -> Image.Image:
    found = dataset.read(row)
    video, audio = first_of(found, VIDEO), first_of(found, AUDIO)
    parts = [strip(frames(found[video], _FRAMES, _CELL), _CELL)] if video else []
    if audio:
        heard = sound(found[audio])
        parts += [waveform(heard.samples, _SOUND, _CELL), log_mel_picture(heard).convert("RGB").resize((_SOUND, _CELL))]
    whole = Image.new("RGB", (sum(p.width + 2 for p in parts), _CELL + _TEXT + 4), "white")
    here = slice(row, row + 1)
    names = ", ".join(dataset.catalog.labels(here)[0])
    ImageDraw.Draw(whole).text((2, 1), f"{dataset.catalog.texts('key', here)[0]}  {names}", fill="black")
    x = 0
    for part in parts:
        whole.paste(part, (x, _TEXT))
        x += part.width + 2
    return whole
