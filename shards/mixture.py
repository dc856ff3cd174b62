"""Several data sets as one endless sequence of samples, mixed by weight: a pure function of the seed and the weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

PERIOD = 4096
"""Samples after which each data set has had exactly its share."""


class Mixture:
    """weights: how often each data set is drawn from, above 0, to any sum; shares are kept to 1/4096.

    Inside a period the data sets are spread evenly, so that every batch has nearly its share of each. Raises ValueError.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        asked = np.asarray(weights, dtype=np.float64)
        if not len(asked) or not np.all((asked > 0) & np.isfinite(asked)):
            raise ValueError(f"weights are {', '.join(map(str, weights)) or 'none'}; give each data set a number above 0")
        exact = asked / asked.sum() * PERIOD
        self.counts = np.floor(exact).astype(np.int64)
        largest = np.argsort(self.counts - exact, kind="stable")[: PERIOD - int(self.counts.sum())]
        self.counts[largest] += 1
        if not self.counts.all():
            least = int(np.argmin(self.counts))
            raise ValueError(f"weight {weights[least]} is below 1/{PERIOD} of the sum; give at least {asked.sum() / PERIOD:g}")
        self._key = np.array([seed, 0], dtype=np.uint64)
        self._period = lru_cache(8)(self._draw)

    def at(self, places: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which data set each place of the mixture is drawn from, and which of that data set's own samples it is, from 0."""
        period, inside = np.divmod(np.asarray(places, dtype=np.int64), PERIOD)
        source, place = np.empty_like(period), np.empty_like(period)
        for p in np.unique(period).tolist():
            here = period == p
            of, before = self._period(p)
            source[here] = of[inside[here]]
            place[here] = p * self.counts[source[here]] + before[inside[here]]
        return source, place

    def _draw(self, period: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each place of a period, the data set and how many of its samples came before in the period."""
        if len(self.counts) == 1:
            return np.zeros(PERIOD, dtype=np.int64), np.arange(PERIOD)
        starts = np.random.Philox(key=self._key, counter=np.array([0, period, 1, 1], dtype=np.uint64)).random_raw(
            len(self.counts)
        )
        source = np.repeat(np.arange(len(self.counts)), self.counts)
        before = np.concatenate([np.arange(n) for n in self.counts])
        when = (before + starts[source] / 2.0**64) / self.counts[source]
        turn = np.argsort(when, kind="stable")
        return source[turn], before[turn]
