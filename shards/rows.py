"""Rows of a catalog's columns for those who ask for a few at a time: a column's chunks, decoded once and kept."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmacc.shards.catalog import Catalog

_KEPT = 512  # chunks of 256 KiB, over all columns
_AT_ONCE = 32  # a question that touches more chunks is answered by the catalog itself, and nothing is kept of it
_LARGEST = 1 << 16  # rows, of a chunk as another writer made it


class RowCache:
    """The chunks used last of the number columns of `catalog`. Safe for threads and after a fork: the C cache has no lock that
    could be left held, and two threads that miss the same chunk both read it."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._rows_a_block = lru_cache(None)(lambda name: max(1, min(catalog.chunk_rows(name), _LARGEST)))
        self._block = lru_cache(_KEPT)(self._read)

    def rows(self, name: str, rows: slice | NDArray[np.integer]) -> NDArray[Any]:
        """Some rows of a column of numbers, (n, ...), perhaps not to be written to. Raises DatasetError, IndexError."""
        size = self._rows_a_block(name)
        if isinstance(rows, slice):
            begin, end, step = rows.indices(self._catalog.rows)
            block = begin // size
            if step == 1 and block * size < end <= (block + 1) * size:
                at = block * size
                return self._block(name, block)[begin - at : end - at]
            if step == 1 and (end <= begin or end - begin > _AT_ONCE * size):
                return self._catalog.column(name, rows)
            rows = np.arange(begin, end, step)
        rows = np.asarray(rows)
        if len(rows) == 1 and 0 <= (row := int(rows[0])) < self._catalog.rows:
            return self._block(name, row // size)[row % size : row % size + 1]
        if not len(rows):
            return self._catalog.column(name, slice(0, 0))
        if not 0 <= rows.min() <= rows.max() < self._catalog.rows:
            raise IndexError(f"row numbers go from {rows.min()} to {rows.max()}; there are {self._catalog.rows} rows")
        blocks = rows // size
        touched = np.unique(blocks)
        if len(touched) > _AT_ONCE:
            return self._catalog.column(name, rows)
        parts = [self._block(name, int(block)) for block in touched]
        found = np.empty((len(rows), *parts[0].shape[1:]), parts[0].dtype)
        for block, part in zip(touched.tolist(), parts, strict=True):
            here = blocks == block
            found[here] = part[rows[here] - block * size]
        return found

    def _read(self, name: str, block: int) -> NDArray[Any]:
        size = self._rows_a_block(name)
        values = self._catalog.column(name, slice(block * size, (block + 1) * size))
        values.flags.writeable = False
        return values
