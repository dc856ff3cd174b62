"""The global order of samples: a pure function of the seed, the epoch and the data set; ranks only cut slices of it.

The shards, shuffled anew each epoch, are laid end to end in a ring, which is cut into `streams` equal parts that take turns
sample by sample. Inside a stream samples are shuffled in blocks. So a sample's place in the epoch says which stream it is of; at
any time `streams` shards and few more are being read, each from its beginning to its end; and nothing is as long as the data
set, for any place is worked out alone.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = 2
"""Changes when the same arguments give another order: a position in the old one means nothing then."""

_SHARDS, _PHASES, _ROTATION, _BLOCK = range(4)  # what is drawn, each from a counter of its own


_PIECES = 8
"""Of a block, in which streams take turns when reading ahead."""


class Order:
    """One epoch of a data set.

    clips: how many of each shard's clips take part, (shards,). streams: equal parts that take turns; they belong to the order,
    not to ranks. window: samples, over all streams, among which a sample is shuffled: no clip moves further than that.

    Depends on its arguments alone: neither on ranks nor on the numpy version (only the raw Philox stream is drawn from, whose
    values numpy promises never to change). Takes O(shards + window) memory. Raises ValueError.
    """

    def __init__(self, clips: NDArray[np.integer], *, seed: int, epoch: int, streams: int = 16, window: int = 4096) -> None:
        if streams < 1 or window < 1:
            raise ValueError(f"streams is {streams} and window is {window}; both must be 1 or more")
        if seed < 0 or epoch < 0:
            raise ValueError(f"seed is {seed} and epoch is {epoch}; both must be 0 or more")
        self._key = np.array([seed, epoch], dtype=np.uint64)
        self.streams, self.block = streams, max(1, window // streams)
        counts = np.asarray(clips, dtype=np.int64)
        self._shards = np.argsort(self._draw(len(counts), _SHARDS), kind="stable")
        self._clips = counts[self._shards]
        self._ends = np.cumsum(self._clips)
        self._n = int(self._ends[-1]) if len(counts) else 0
        # where the first stream begins: were it always with a shard, equal shards would be cut at the same clips each epoch
        self._rotation = int(self._draw(1, _ROTATION)[0] % np.uint64(max(self._n, 1)))
        # blocks begin at a place of their own in each stream and epoch: no two neighbours are always kept apart, and the
        # streams do not all begin new shards at once
        self._phases = (self._draw(streams, _PHASES) % np.uint64(self.block)).astype(np.int64)
        self._shuffled = lru_cache(4 * streams)(self._shuffle)

    def __len__(self) -> int:
        """Samples of the epoch."""
        return self._n

    def at(self, places: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The samples at some places of the epoch, 0 to len - 1: shard, and which of the shard's clips that take part, from 0;
        int64, as `places` is."""
        places = np.asarray(places, dtype=np.int64)
        if places.size and not 0 <= places.min() <= places.max() < self._n:
            raise IndexError(f"places go from {places.min()} to {places.max()}; the epoch has {self._n} samples")
        turn, stream = np.divmod(places, self.streams)
        block = (turn + self._phases[stream]) // self.block
        moved = np.empty_like(turn)
        together = np.lexsort((block, stream))
        ends = np.flatnonzero(np.diff(stream[together]) | np.diff(block[together])) + 1
        for here in np.split(together, ends) if len(places) else ():
            first, permutation = self._shuffled(int(stream[here[0]]), int(block[here[0]]))
            moved[here] = first + permutation[turn[here] - first]
        return self._clip(stream, moved)

    def ahead(self, place: int, window: int, streams: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The samples of some streams that places from `place` on may be, up to the blocks that hold place + `window`: shard and
        clip of it, as `at` gives them. The streams take turns with a few of theirs, as they lie in their shards."""
        begin, end = (min(p, self._n) // self.streams for p in (place, place + window))
        turns = {s: (self._turns(s, self._block_of(s, begin))[0], self._turns(s, self._block_of(s, end))[1]) for s in streams}
        step = max(1, self.block // _PIECES)
        longest = max((last - first for first, last in turns.values()), default=0)
        stream, turn = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for at in range(0, longest, step):
            for s, (first, last) in turns.items():
                turn.append(np.arange(first + at, min(first + at + step, last)))
                stream.append(np.full(len(turn[-1]), s))
        return self._clip(np.concatenate(stream), np.concatenate(turn))

    def _block_of(self, stream: int, turn: int) -> int:
        return int((turn + self._phases[stream]) // self.block)

    def _turns(self, stream: int, block: int) -> tuple[int, int]:
        """First turn of a block, and one past its last."""
        length = (self._n - stream + self.streams - 1) // self.streams
        begin = block * self.block - int(self._phases[stream])
        return min(max(begin, 0), length), min(begin + self.block, length)

    def _shuffle(self, stream: int, block: int) -> tuple[int, NDArray[np.int64]]:
        first, end = self._turns(stream, block)
        return first, np.argsort(self._draw(end - first, _BLOCK, stream, block), kind="stable")

    def _clip(self, stream: NDArray[np.int64], turn: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        whole, more = divmod(self._n, self.streams)  # the first streams have one sample more
        laid = (self._rotation + stream * whole + np.minimum(stream, more) + turn) % max(self._n, 1)
        at = np.searchsorted(self._ends, laid, side="right")
        return self._shards[at], laid - (self._ends[at] - self._clips[at])

    def _draw(self, count: int, *what: int) -> NDArray[np.uint64]:
        counter = np.array([0, *what, 0, 0], dtype=np.uint64)[:4]
        return np.random.Philox(key=self._key, counter=counter).random_raw(max(count, 0))


def rank_places(batch: int, rank: int, world: int) -> slice:
    """What rank `rank` of `world` takes of a global batch of `batch` samples: every `world`-th. Sizes differ by one at most.

    Where `world` divides both the batch and the streams of an order, a rank meets the samples of its own streams alone.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank} of {world}; it must be 0 or more, and less than the number of ranks")
    return slice(rank, batch, world)
