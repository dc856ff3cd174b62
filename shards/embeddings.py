"""Embeddings that `cmacc embed` added to catalogs, as one matrix, and the clips that are nearly alike by them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.shards.gather import gather_dense

_KINDS = ("video-", "audio-")
_BLOCK = 2048


def embeddings(
    datasets: Sequence[Dataset], source: NDArray[np.int32], row: NDArray[np.int64], name: str | None = None
) -> NDArray[np.float32]:
    """Unit vectors of chosen clips, float32 (n, width); not a number for a clip that has none.

    name: of a model, whose picture and sound vectors then stand side by side, so that a cosine is the mean of both; or of one
    column; None where all data sets share the columns of one model and no other. Raises DatasetError.
    """
    columns = _columns(datasets, name)
    parts = []
    for column in columns:
        if len({d.catalog.shape(column)[1:] for d in datasets}) > 1:
            raise DatasetError(f"column {column} is not equally wide in {' and '.join(d.url for d in datasets)}; embed them anew")
        found = gather_dense(datasets, source, row, column).astype(np.float32)
        norm = np.linalg.norm(found, axis=1, keepdims=True).astype(np.float32)
        parts.append(found / np.where(norm > 0, norm, np.float32("nan")))
    return (np.concatenate(parts, axis=1) / len(parts) ** 0.5).astype(np.float32)


def _columns(datasets: Sequence[Dataset], name: str | None) -> list[str]:
    there = set.intersection(*({c for c in d.catalog.added if len(d.catalog.shape(c)) == 2} for d in datasets))
    if name in there:
        return [str(name)]
    models = sorted({c.removeprefix(kind) for c in there for kind in _KINDS if c.startswith(kind)})
    if name is None and len(models) == 1:
        name = models[0]
    found = [kind + name for kind in _KINDS if name is not None and kind + name in there]
    if not found:
        known = f"there are those of {', '.join(models)}" if models else "run `cmacc embed RUN DATA --name NAME` first"
        wanted = f"no embeddings {name!r}" if name else "several embeddings to choose from" if models else "no embeddings"
        raise DatasetError(f"{', '.join(d.url for d in datasets)}: {wanted} in the catalog; {known}")
    return found


def first_of_near(vectors: NDArray[np.float32], cosine: float) -> NDArray[np.int64]:
    """Positions, ascending, of the vectors that have no earlier kept one within `cosine`; unit vectors (n, d) in, int64 out.

    What is not a number is like nothing. Costs n * kept * d multiplications, in blocks.
    """
    kept = np.empty_like(vectors)
    found: list[int] = []
    for begin in range(0, len(vectors), _BLOCK):
        block = np.nan_to_num(vectors[begin : begin + _BLOCK])
        new = np.ones(len(block), dtype=bool)
        for at in range(0, len(found), 16 * _BLOCK):
            new &= (block @ kept[at : min(at + 16 * _BLOCK, len(found))].T).max(axis=1) < cosine
        own = block @ block.T >= cosine
        for i in np.flatnonzero(new):
            if new[i]:
                later = own[i].copy()
                later[: i + 1] = False
                new &= ~later
        chosen = np.flatnonzero(new)
        kept[len(found) : len(found) + len(chosen)] = block[chosen]
        found += (begin + chosen).tolist()
    return np.array(found, dtype=np.int64)
