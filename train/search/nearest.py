"""The clips nearest to a query, exactly: all embeddings of a column are compared, a part of it in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.train.export.trained import MODALITIES

_BYTES = 64 << 20  # of a column, as float32, at once


@dataclass(frozen=True)
class Nearest:
    """rows: of the nearest clips, int64 (k,), the nearest first; cosines: float32 (k,). skipped: clips without an embedding."""

    rows: NDArray[np.int64]
    cosines: NDArray[np.float32]
    skipped: int


@dataclass(frozen=True)
class Embedding:
    """A model's pair of columns in a catalog. name: in `video-NAME`; hash: of the model; address: where it was."""

    name: str
    hash: str
    address: str

    def column(self, modality: str) -> str:
        return f"{modality}-{self.name}"


def nearest(
    dataset: Dataset,
    column: str,
    query: NDArray[np.floating[Any]],
    count: int,
    *,
    without_row: int | None = None,
    without_source: str | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Nearest:
    """The `count` clips whose embedding in `column` (n, d) has the largest cosine with `query` (d,); equal ones by row.

    without_row: a clip that is not found; without_source: a source video whose clips are not. on_progress: told the rows that are
    done. Raises DatasetError, or ValueError for a query of another width or that is not a number.
    """
    query = np.asarray(query, np.float32)
    width = dataset.catalog.shape(column)[1]
    if query.shape != (width,):
        raise ValueError(f"the query has {query.shape} numbers, {column} has {width} a clip; embed both with one model")
    norm = float(np.linalg.norm(query))
    if not 0 < norm < np.inf:
        raise ValueError("the query's embedding is not a number; it cannot be searched with")
    if count < 1:
        raise ValueError(f"count is {count}; give 1 or more")
    asked = count
    while True:
        found, skipped = _largest(dataset, column, query / np.float32(norm), asked + (without_row is not None), on_progress)
        rows = found[:, 0].astype(np.int64)
        keep = np.ones(len(rows), bool) if without_row is None else rows != without_row
        if without_source is not None and len(rows):
            keep &= np.array(dataset.texts("source", rows), dtype=object) != without_source
        kept = found[keep][:count]
        if len(kept) == count or len(found) >= len(dataset) - skipped:
            return Nearest(kept[:, 0].astype(np.int64), kept[:, 1].astype(np.float32), skipped)
        asked *= 4  # so many of them were of that video


def _largest(
    dataset: Dataset, column: str, query: NDArray[np.float32], count: int, on_progress: Callable[[int], None] | None
) -> tuple[NDArray[np.float64], int]:
    """Rows and cosines of the largest, float64 (k, 2), and how many clips have no embedding."""
    chunk = dataset.catalog.chunk_rows(column)
    step = max(1, _BYTES // (4 * len(query)) // chunk) * chunk
    best, skipped = np.empty((0, 2)), 0
    for begin in range(0, len(dataset), step):
        part = dataset.catalog.column(column, slice(begin, begin + step)).astype(np.float32)
        norms = np.linalg.norm(part, axis=1)
        there = np.flatnonzero(norms > 0)  # not of NaN
        skipped += len(part) - len(there)
        cosines = (part @ query)[there] / norms[there]
        if len(there) > count:  # ties stay in until the rows decide
            least = np.partition(cosines, len(cosines) - count)[len(cosines) - count]
            there, cosines = there[cosines >= least], cosines[cosines >= least]
        best = np.concatenate([best, np.stack([begin + there, cosines], axis=1)])
        best = best[np.lexsort((best[:, 0], -best[:, 1]))][:count]
        if on_progress:
            on_progress(min(begin + step, len(dataset)))
    return best, skipped


def embedded_by(dataset: Dataset, name: str | None = None, model_hash: str | None = None) -> Embedding:
    """The pair of columns to search in: of a model by its hash, by its name, or the only one there. Raises DatasetError."""
    added = set(dataset.catalog.added)
    names = [c.removeprefix("video-") for c in sorted(added) if c.startswith("video-") and f"audio-{c[6:]}" in added]
    pairs = [Embedding(n, *_said(dataset, n)) for n in names if name in (None, n)]
    fitting = [pair for pair in pairs if model_hash in (None, pair.hash)]
    if len(fitting) == 1 or (fitting and model_hash):
        return fitting[0]
    if fitting:
        raise DatasetError(f"{dataset.url} has embeddings of {', '.join(names)}; choose one with --name, or a model with --model")
    if pairs:
        raise DatasetError(
            f"{dataset.url} has no embeddings of this very model ({', '.join(pair.name for pair in pairs)} came from another); "
            "run `cmacc embed` with it, or search with the model that they came from"
        )
    there = f"; it has those of {', '.join(names)}" if names else ""
    wanted = f"no embeddings {name!r}" if name else "no embeddings"
    raise DatasetError(f"{dataset.url} has {wanted}{there}; run: cmacc embed RUN {dataset.url}")


def _said(dataset: Dataset, name: str) -> tuple[str, str]:
    """Hash and address of the model of a pair; no hash where the two came from different ones, or from before there was any."""
    video, audio = (dataset.catalog.attrs(f"{modality}-{name}") for modality in MODALITIES)
    same = video.get("hash") == audio.get("hash")
    return (str(video.get("hash") or "") if same else ""), str(video.get("from") or "")
