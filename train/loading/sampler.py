"""Which clip is the n-th sample of a run: the order of each data set, and their mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.shards.mixture import Mixture
from cmacc.shards.order import ORDER_VERSION, Order
from cmacc.shards.split import Split


@dataclass(frozen=True)
class Source:
    """A data set to train from. split: name, or None for all clips. weight: how often it is drawn from, beside the others."""

    dataset: Dataset
    split: str | None = None
    weight: float = 1.0


def open_sources(data: Sequence[str], split: str | None) -> list[Source]:
    """Data sets by address, or by WEIGHT=ADDRESS. Raises ValueError, DatasetError."""
    sources = []
    for text in data:
        weight, equals, url = text.partition("=")
        share = _number(weight) if equals else None
        url = text if share is None else url  # an address may have = in it
        if not url:
            raise ValueError(f"the address of a data set is empty ({text!r}); give a folder or an fsspec URL")
        try:
            sources.append(Source(Dataset.open(url), split, 1.0 if share is None else share))
        except DatasetError as error:
            if equals and share is None:
                raise DatasetError(f"{error}, or a number as its weight instead of {weight!r}") from error
            raise
    return sources


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


class Samples(NamedTuple):
    """Some samples, int64 (n,) each: number of the source, row in its catalog, epoch of that source."""

    source: NDArray[np.int64]
    row: NDArray[np.int64]
    epoch: NDArray[np.int64]


class Sampler:
    """The endless sequence of samples: a pure function of (seed, sources, streams, window). Memory: O(shards).

    Raises ValueError, DatasetError.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int, streams: int, window: int) -> None:
        self.sources, self.seed, self.streams, self.window = tuple(sources), seed, streams, window
        self.mixture = Mixture([s.weight for s in sources], seed=seed)
        self.splits = [Split(s.dataset, s.split) for s in sources]
        self._lengths = np.array([len(s) for s in self.splits], dtype=np.int64)
        self._order = lru_cache(2 * len(self.sources))(self._make_order)

    @property
    def epoch_samples(self) -> int:
        """Samples after which the source that lasts longest has been seen whole."""
        shares = self.mixture.counts / self.mixture.counts.sum()
        return int(np.ceil((self._lengths / shares).max() - 1e-6))

    def at(self, positions: NDArray[np.integer]) -> Samples:
        """The samples at some positions of the run."""
        source, place = self.mixture.at(positions)
        epoch, place = np.divmod(place, self._lengths[source])
        row = np.empty_like(place)
        for s, e in {*zip(source.tolist(), epoch.tolist(), strict=True)}:
            here = (source == s) & (epoch == e)
            row[here] = self.splits[s].rows(*self._order(s, e).at(place[here]))
        return Samples(source, row, epoch)

    def ahead(self, position: int, count: int, streams: range) -> list[tuple[int, NDArray[np.int64]]]:
        """(source, rows) of some streams that samples position .. position + count may need, as they lie in the shards; nothing
        of the epoch after."""
        found = []
        for s in range(len(self.sources)):
            share = self.mixture.counts[s] / self.mixture.counts.sum()
            epoch, place = divmod(int(position * share), int(self._lengths[s]))
            found.append((s, self.splits[s].rows(*self._order(s, epoch).ahead(place, max(1, int(count * share)), streams))))
        return found

    def instead(self, source: int, row: int) -> int:
        """The row that is taken where the content of `row` does not decode: the next of its split."""
        return self.splits[source].after(row)

    def _make_order(self, source: int, epoch: int) -> Order:
        # the seeds of sources differ, or two versions of one data set would be walked in step
        return Order(
            self.splits[source].clips, seed=self.seed + (source << 48), epoch=epoch, streams=self.streams, window=self.window
        )

    def state_dict(self) -> dict[str, Any]:
        """What decides the order."""
        return {
            "order": ORDER_VERSION,
            "seed": self.seed,
            "streams": self.streams,
            "window": self.window,
            "fingerprints": [s.dataset.fingerprint for s in self.sources],
            "shares": self.mixture.counts.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the order is not the one that the state was saved with."""
        for source, then in zip(self.sources, state.get("fingerprints", ()), strict=False):
            if source.dataset.fingerprint != then:
                said = f"fingerprint {source.dataset.fingerprint[:12]}, then {then[:12]}"
                raise ValueError(
                    f"{source.dataset.url} has changed since this run's checkpoint ({said}), so its position means nothing; "
                    "use another run folder, or the data set as it was"
                )
        now = self.state_dict()
        changed = [name for name in now if state.get(name) != now[name]]
        if changed:
            name = changed[0]
            raise ValueError(
                f"the order of samples has {name} {now[name]}, this run's checkpoint {state.get(name)}, so its position means "
                "nothing; use another run folder, or what the run began with"
            )
