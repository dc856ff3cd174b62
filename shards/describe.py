"""A data set at a glance: its numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from cmacc.shards.catalog import Catalog
from cmacc.shards.dataset import Dataset

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_MEASURED = ("duration_s", "loudness_db", "motion", "av_offset_s", "av_trust")


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
