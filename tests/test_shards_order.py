"""The order of samples: complete, the same everywhere, well mixed, and still kind to the disk."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from cmacc.shards.order import batch_rows, epoch_order, rank_slice


def shards(*clips: int) -> np.ndarray:
    return np.repeat(np.arange(len(clips)), clips)


@pytest.mark.parametrize("clips", [(), (1,), (5,), (3, 0, 7, 1), (100,) * 20, (1,) * 50, tuple(range(40))])
@pytest.mark.parametrize(("streams", "window"), [(8, 4096), (1, 1), (3, 10), (64, 7)])
def test_every_row_once(clips: tuple[int, ...], streams: int, window: int) -> None:
    order = epoch_order(shards(*clips), seed=3, epoch=1, streams=streams, window=window)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(sum(clips)))


def test_the_order_never_changes() -> None:
    """These digests are the format: a run resumed by a later version must see the same clips."""
    order = epoch_order(shards(*[50] * 30), seed=7, epoch=2, streams=4, window=128)
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == "79af33421e46f612"
    again = epoch_order(shards(*[50] * 30).astype(np.uint16), seed=7, epoch=2, streams=4, window=128)
    assert np.array_equal(order, again)


def test_seed_and_epoch_both_matter() -> None:
    orders = [epoch_order(shards(*[50] * 30), seed=s, epoch=e).tobytes() for s in range(3) for e in range(3)]
    assert len(set(orders)) == 9


def test_shards_are_named_by_any_number() -> None:
    """Rows of one split alone: shard numbers have gaps, and are not sorted when a caller reorders rows."""
    some = np.array([7, 7, 3, 3, 3, 900, 900, 3])
    assert np.array_equal(np.sort(epoch_order(some, seed=0, epoch=0)), np.arange(8))


def test_how_far_clips_travel() -> None:
    """Neighbours in a tar end up far apart, yet at any time only about `streams` shards (and those of a window) are in use."""
    clips, streams, window = 700, 8, 4096
    shard = shards(*[clips] * 100)
    order = epoch_order(shard, seed=1, epoch=0, streams=streams, window=window)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    apart = np.abs(np.diff(place))[np.diff(shard) == 0]
    assert 1000 < np.median(apart) < 2 * window
    in_use = [len(np.unique(shard[order[i : i + window]])) for i in range(0, len(order) - window, window)]
    assert streams <= np.median(in_use) <= 4 * streams
    # a block of samples is one window at most: the order before it is shuffled never differs by more
    plain = epoch_order(shard, seed=1, epoch=0, streams=streams, window=1)
    before = np.empty(len(plain), dtype=np.int64)
    before[plain] = np.arange(len(plain))
    assert np.abs(place - before).max() < window
    # every clip is about as likely at the beginning of an epoch as at its end
    firsts = np.concatenate([epoch_order(shard, seed=1, epoch=e)[:1000] for e in range(200)])
    assert len(np.unique(shard[firsts])) == 100


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_ranks_share_a_batch(world: int, batch: int) -> None:
    rows = np.arange(batch)
    parts = [rows[rank_slice(batch, rank, world)] for rank in range(world)]
    assert np.array_equal(np.concatenate(parts), rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ValueError, match="rank"):
        rank_slice(batch, world, world)


def test_batches_cut_the_order() -> None:
    order = epoch_order(shards(10, 13), seed=0, epoch=0)
    assert np.array_equal(np.concatenate([batch_rows(order, step, 5) for step in range(6)]), order)
    assert [len(batch_rows(order, step, 5)) for step in range(6)] == [5, 5, 5, 5, 3, 0]


@pytest.mark.parametrize("wrong", [{"streams": 0}, {"window": 0}, {"seed": -1}, {"epoch": -1}])
def test_wrong_arguments(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        epoch_order(shards(3), **{"seed": 0, "epoch": 0, **wrong})
