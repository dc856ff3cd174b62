"""Rows of a catalog's columns for those who ask for a few at a time: a column's chunks, decoded once and kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cmacc.shards.catalog import Catalog
from cmacc.shards.columns import CODED, LISTS
from cmacc.shards.errors import DatasetError

_KEPT = 512  # chunks of 256 KiB, over all columns
_AT_ONCE = 128  # a question that touches more chunks is answered by the catalog itself, and nothing is kept of it


class RowCache:
    """The chunks used last of the columns of `catalog`. Safe for threads and after a fork: the C cache has no lock that
    could be left held, and two threads that miss the same chunk both read it."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._rows_a_block = lru_cache(None)(catalog.chunk_rows)
        self._block = lru_cache(_KEPT)(self._read)
        self._words = lru_cache(None)(catalog.vocabulary)

    def rows(self, name: str, rows: slice | ArrayLike) -> NDArray[Any]:
        """Some rows of a column of numbers, (n, ...), perhaps not to be written to. Raises DatasetError, IndexError."""
        if isinstance(rows, slice):
            size = self._rows_a_block(name)
            begin, end, step = rows.indices(self._catalog.rows)
            block = begin // size
            if step == 1 and block * size < end <= (block + 1) * size:
                at = block * size
                return self._block(name, block)[begin - at : end - at]
            if step == 1 and (end <= begin or end - begin > _AT_ONCE * size):
                return self._catalog.column(name, rows)
            rows = np.arange(begin, end, step)
        return self._scattered(name, self._checked(rows), lambda wanted: self._catalog.column(name, wanted))

    def lists(self, name: str, rows: ArrayLike) -> list[NDArray[Any]]:
        """Some rows of a column of lists, not to be written to: `keyframes`, `labels` (codes), or a text's UTF-8 bytes."""
        begins, ends = self._bounds(name, rows)
        values, size, found = f"{name}/values", self._rows_a_block(f"{name}/values"), []
        nothing = np.zeros(0, LISTS[name])
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            if begin == end:
                found.append(nothing)
                continue
            block, at = divmod(begin, size)
            row = self._block(values, block)[at : at + end - begin]
            if begin + len(row) < end:  # it goes on in the next chunk, or is not all there
                row = self._long(values, begin, end)
            found.append(row)
        return found

    def texts(self, name: str, rows: ArrayLike) -> list[str]:
        """Some rows of `key`, `source`, `split` or `duplicate_of`. Raises DatasetError, IndexError."""
        if name in CODED:
            words = [*self._words(name), ""]
            return [words[code] for code in self.rows(name, rows).tolist()]
        try:
            return [row.tobytes().decode() for row in self.lists(name, rows)]
        except UnicodeDecodeError as e:
            raise self._damaged(name) from e

    def first(self, name: str, rows: ArrayLike) -> NDArray[np.int64]:
        """The first number of each list, int64 (n,), -1 for an empty one. Raises DatasetError, IndexError."""
        begins, ends = self._bounds(name, rows)
        there = begins < ends
        found = np.full(len(begins), -1, dtype=np.int64)
        if there.any():
            values, wanted = f"{name}/values", begins[there]
            found[there] = self._scattered(values, wanted, lambda wanted: self._catalog.part(values, wanted))
        return found

    # --- inside ---

    def _checked(self, rows: ArrayLike) -> NDArray[np.int64]:
        found = np.asarray(rows)
        if not found.size:
            return np.zeros(0, dtype=np.int64)
        if not 0 <= found.min() <= found.max() < self._catalog.rows:
            raise IndexError(f"row numbers go from {found.min()} to {found.max()}; there are {self._catalog.rows} rows")
        return found.astype(np.int64, copy=False)

    def _bounds(self, name: str, rows: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where some lists begin and end in their column's values. Raises DatasetError for bounds that cannot be."""
        if name not in LISTS:
            raise DatasetError(f"column {name} of {self._catalog.url} holds numbers; read it by numbers()")
        wanted, offsets = self._checked(rows), f"{name}/offsets"
        both = np.concatenate([wanted, wanted + 1])
        found = self._scattered(offsets, both, lambda wanted: self._catalog.part(offsets, wanted))
        begins, ends = found[: len(wanted)], found[len(wanted) :]
        if len(wanted) and not (begins.min() >= 0 and (begins <= ends).all()):
            raise self._damaged(name)
        return begins, ends

    def _scattered(
        self, name: str, at: NDArray[np.int64], otherwise: Callable[[NDArray[np.int64]], NDArray[Any]]
    ) -> NDArray[Any]:
        """The elements `at` of an array, chunk by chunk, or by `otherwise` where there are too many of those."""
        size = self._rows_a_block(name)
        blocks = at // size
        order = np.argsort(blocks, kind="stable")
        ordered = blocks[order]
        cuts = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
        if not len(at) or len(cuts) >= _AT_ONCE:
            return otherwise(at)
        edges = [0, *cuts.tolist(), len(at)]
        parts = []
        for a, b in pairwise(edges):
            block, here = int(ordered[a]), at[order[a:b]]
            part = self._block(name, block)
            if int(here.max()) - block * size >= len(part):
                raise self._damaged(name)
            parts.append(part[here - block * size])
        if len(parts) == 1:
            return parts[0]  # the stable order of equals is the one they had
        found = np.empty((len(at), *parts[0].shape[1:]), parts[0].dtype)
        found[order] = np.concatenate(parts)
        return found

    def _long(self, name: str, begin: int, end: int) -> NDArray[Any]:
        """Elements `begin` to `end`, which are in more than one chunk. A forged end costs no more than there is."""
        size, parts = self._rows_a_block(name), []
        while begin < end:
            block, at = divmod(begin, size)
            part = self._block(name, block)[at : at + end - begin]
            if not len(part):
                raise self._damaged(name)
            parts.append(part)
            begin += len(part)
        return np.concatenate(parts)

    def _damaged(self, name: str) -> DatasetError:
        return DatasetError(f"column {name} of {self._catalog.url} is damaged; opening the data set for writing mends it")

    def _read(self, name: str, block: int) -> NDArray[Any]:
        size = self._rows_a_block(name)
        wanted = slice(block * size, (block + 1) * size)
        values = self._catalog.part(name, wanted) if "/" in name else self._catalog.column(name, wanted)
        values.flags.writeable = False
        return values
