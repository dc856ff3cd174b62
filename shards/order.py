"""The global order of samples: a pure function of the seed, the epoch and the data set; ranks only cut slices of it."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray


def epoch_order(
    shard_of_row: NDArray[np.integer], *, seed: int, epoch: int, streams: int = 8, window: int = 4096
) -> NDArray[np.int64]:
    """Every position of `shard_of_row` once, in the order of one epoch.

    shard_of_row: shard number of each row (n,); rows of a shard lie in the order of its tar.
    streams: shards are shuffled and dealt to this many canonical streams, which take turns sample by sample.
    window: samples are then shuffled inside blocks of this many; no clip moves further than that.

    Returns int64 (n,). It depends on the arguments alone: neither on ranks nor on the numpy version (only the raw
    Philox stream is drawn from, whose values numpy promises never to change). Raises ValueError.
    """
    if streams < 1 or window < 1:
        raise ValueError(f"streams is {streams} and window is {window}; both must be 1 or more")
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed is {seed} and epoch is {epoch}; both must be 0 or more")
    random = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    names, shard = np.unique(np.asarray(shard_of_row), return_inverse=True)
    clips = np.bincount(shard, minlength=len(names))
    stream_of_shard, begin_of_shard = _deal(clips, np.argsort(random.random_raw(len(names)), kind="stable"), streams)

    by_shard = np.argsort(shard, kind="stable")
    first = np.cumsum(clips) - clips
    place_in_shard = np.empty(len(shard), dtype=np.int64)
    place_in_shard[by_shard] = np.arange(len(shard)) - np.repeat(first, clips)
    turn = begin_of_shard[shard] + place_in_shard
    dealt = np.argsort(turn * streams + stream_of_shard[shard], kind="stable")

    # blocks begin at a different place each epoch, so that no two neighbours are always kept apart
    phase = int(random.random_raw() % window)
    block = (np.arange(len(shard), dtype=np.uint64) + np.uint64(phase)) // np.uint64(window)
    bits = np.uint64(int(block[-1]).bit_length() if len(block) else 0)
    draws = random.random_raw(len(shard)) >> bits
    return dealt[np.argsort(draws | block << (np.uint64(64) - bits) if bits else draws, kind="stable")]


def _deal(clips: NDArray[np.int64], shuffled: NDArray[np.int64], streams: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give each shard, in shuffled order, to the stream that is shortest so far: (stream, samples before it) of each shard."""
    stream = np.zeros(len(clips), dtype=np.int64)
    begin = np.zeros(len(clips), dtype=np.int64)
    heap = [(0, s) for s in range(streams)]
    for shard in shuffled:
        begin[shard], stream[shard] = heap[0]
        heapq.heapreplace(heap, (int(begin[shard] + clips[shard]), int(stream[shard])))
    return stream, begin


def batch_rows(order: NDArray[np.int64], step: int, batch: int) -> NDArray[np.int64]:
    """The global batch of `step` (from 0) in an epoch's order; the last one of an epoch may be shorter, past it is empty."""
    return order[step * batch : (step + 1) * batch]


def rank_slice(batch: int, rank: int, world: int) -> slice:
    """What rank `rank` of `world` takes of a global batch of `batch` samples; sizes differ by one at most."""
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank} of {world}; it must be 0 or more, and less than the number of ranks")
    return slice(batch * rank // world, batch * (rank + 1) // world)
