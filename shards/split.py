"""The clips of one split, counted and found shard by shard, so that a data set of any size needs memory for its shards alone."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError

_AT_ONCE = 1 << 20  # rows whose split is looked at together
_SHARDS_KEPT = 256


class Split:
    """Clips of the split `name`, or all (None). clips: how many each shard has, int64 (shards,).

    Raises DatasetError for a split that nobody is in.
    """

    def __init__(self, dataset: Dataset, name: str | None) -> None:
        self.dataset, self.name = dataset, name
        sizes = [s.clips for s in dataset.meta.shards]
        self._begins = np.array([0, *accumulate(sizes)], dtype=np.int64)
        self._code: int | None = None
        self.clips = np.array(sizes, dtype=np.int64)
        if name is not None:
            names = dataset.catalog.vocabulary("split")
            self._code = names.index(name) if name in names else -1
            self.clips = self._count()
        if not self.clips.any():
            if name is None or not len(dataset):
                raise DatasetError(f"{dataset.url} has no clip; ingest into it, or give another data set")
            dataset.rows(name)  # says which splits there are
        self._rows = lru_cache(_SHARDS_KEPT)(self._read)

    def __len__(self) -> int:
        return int(self.clips.sum())

    def rows(self, shard: NDArray[np.int64], clip: NDArray[np.int64]) -> NDArray[np.int64]:
        """Catalog rows of the `clip`-th clip of the split in each `shard`, int64 (n,)."""
        if self._code is None:
            return self._begins[shard] + clip
        found = np.empty(len(shard), dtype=np.int64)
        for s in np.unique(shard).tolist():
            here = shard == s
            found[here] = self._begins[s] + self._rows(s)[clip[here]]
        return found

    def after(self, row: int) -> int:
        """The next row of the split; after the last one comes the first."""
        shard = int(np.searchsorted(self._begins, row, side="right")) - 1
        for step in range(len(self.clips) + 1):
            s = (shard + step) % len(self.clips)
            if not self.clips[s]:
                continue
            inside = self._rows(s) if self._code is not None else np.arange(self.clips[s])
            later = inside[inside > row - self._begins[s]] if step == 0 else inside
            if len(later):
                return int(self._begins[s] + later[0])
        raise AssertionError("a split has clips")

    def _count(self) -> NDArray[np.int64]:
        counts = np.zeros(len(self.clips), dtype=np.int64)
        for at in range(0, len(self.dataset), _AT_ONCE):
            codes = self.dataset.catalog.column("split", slice(at, at + _AT_ONCE))
            rows = at + np.flatnonzero(codes == self._code)
            shards = np.searchsorted(self._begins, rows, side="right") - 1
            counts += np.bincount(shards, minlength=len(counts))
        return counts

    def _read(self, shard: int) -> NDArray[np.int32]:
        """Which clips of a shard are in the split."""
        rows = slice(int(self._begins[shard]), int(self._begins[shard + 1]))
        return np.flatnonzero(self.dataset.numbers("split", np.arange(rows.start, rows.stop)) == self._code).astype(np.int32)
