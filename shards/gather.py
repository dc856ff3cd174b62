"""Columns of chosen clips of several data sets, in the order chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cmacc.shards.dataset import Dataset
from cmacc.shards.query import column_values

_BLOCK = 1 << 18  # rows of a source that are in memory at once


def gather(datasets: Sequence[Dataset], source: NDArray[np.int32], row: NDArray[np.int64], name: str) -> pa.Array:
    """A column's values as Arrow has them, (n,); what is coded comes as large strings, or as lists of them."""
    parts = [_plain(column_values(d, name)) for d in datasets]
    begin = np.cumsum([0, *(len(p) for p in parts)])[:-1]
    return pa.concat_arrays(parts).take(pa.array(begin[source] + row))


def _plain(values: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        return values.cast(pa.large_string())
    if pa.types.is_large_list(values.type) and pa.types.is_dictionary(values.type.value_type):
        return pa.LargeListArray.from_arrays(values.offsets, values.values.cast(pa.large_string()))
    return values


def gather_dense(
    datasets: Sequence[Dataset], source: NDArray[np.int32], row: NDArray[np.int64], name: str, width: int | None = None
) -> NDArray[Any]:
    """A column of numbers, (n, ...); each source is read in blocks, and what nobody asks for is not read.

    width: only so many of each row's first values, for sources that differ in how many they have.
    """
    kinds = [(d.catalog.column(name, slice(0, 0)).dtype, d.catalog.shape(name)[1:]) for d in datasets]
    shape = kinds[0][1] if width is None else (width, *kinds[0][1][1:])
    found = np.empty((len(row), *shape), dtype=np.result_type(*(dtype for dtype, _ in kinds)))
    for number, dataset in enumerate(datasets):
        here = np.flatnonzero(source == number)
        here = here[np.argsort(row[here], kind="stable")]
        rows = row[here]
        at = 0
        while at < len(rows):
            block = int(rows[at]) // _BLOCK * _BLOCK
            until = int(np.searchsorted(rows, block + _BLOCK))
            values = dataset.catalog.column(name, slice(int(rows[at]), int(rows[until - 1]) + 1))
            chosen = values[rows[at:until] - rows[at]]
            found[here[at:until]] = chosen if width is None else chosen[:, :width]
            at = until
    return found
