"""The order of samples: complete, the same everywhere, well mixed, and still kind to the disk."""

from __future__ import annotations

import hashlib
import tracemalloc

import numpy as np
import pytest

from cmacc.shards.mixture import PERIOD, Mixture
from cmacc.shards.order import Order, rank_places


def whole(clips: list[int] | np.ndarray, **options: int) -> np.ndarray:
    """An epoch's order as rows of the data set, shards one after the other."""
    counts = np.asarray(clips, dtype=np.int64)
    order = Order(counts, **{"seed": 3, "epoch": 1, **options})
    shard, clip = order.at(np.arange(len(order)))
    return (np.cumsum(counts) - counts)[shard] + clip


@pytest.mark.parametrize("clips", [(), (0, 0), (1,), (5,), (3, 0, 7, 1), (100,) * 20, (1,) * 50, tuple(range(40))])
@pytest.mark.parametrize(("streams", "window"), [(8, 4096), (1, 1), (3, 10), (64, 7), (16, 100)])
def test_every_row_once(clips: tuple[int, ...], streams: int, window: int) -> None:
    assert np.array_equal(np.sort(whole(clips, streams=streams, window=window)), np.arange(sum(clips)))


def test_the_order_never_changes() -> None:
    """These digests are the format: a run resumed by a later version must see the same clips. See ORDER_VERSION."""
    digest = hashlib.sha256(whole([50] * 30, seed=7, epoch=2, streams=4, window=128).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "44daf2a5bc1c69e5"
    mixed = Mixture([2, 1, 0.5], seed=7).at(np.arange(5000))
    assert hashlib.sha256(np.stack(mixed).astype("<i8").tobytes()).hexdigest()[:16] == "d98a5ed7b544608f"


def test_any_place_alone_is_as_in_the_whole() -> None:
    clips = np.array([17, 0, 40, 3, 99, 25])
    order = Order(clips, seed=1, epoch=0, streams=4, window=24)
    shards, inside = order.at(np.arange(len(order)))
    places = np.random.default_rng(0).permutation(len(order))
    again = Order(clips, seed=1, epoch=0, streams=4, window=24)
    for some in np.array_split(places, 40):
        found = again.at(some)
        assert np.array_equal(found[0], shards[some])
        assert np.array_equal(found[1], inside[some])
    for place in (-1, len(order)):
        with pytest.raises(IndexError, match="184 samples"):
            order.at(np.array([place]))


def test_seed_and_epoch_both_matter() -> None:
    orders = [whole([50] * 30, seed=s, epoch=e).tobytes() for s in range(3) for e in range(3)]
    assert len(set(orders)) == 9


@pytest.mark.parametrize(("clips", "streams", "window"), [(700, 8, 4096), (70, 16, 1024), (700, 16, 4096)])
def test_how_far_clips_travel(clips: int, streams: int, window: int) -> None:
    """Neighbours in a tar end up far apart, yet at any time only about two shards a stream are in use."""
    counts = np.full(100, clips)
    order = whole(counts, seed=1, epoch=0, streams=streams, window=window)
    shard = np.repeat(np.arange(100), clips)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    apart = np.abs(np.diff(place))[np.diff(shard) == 0]
    assert window / 5 < np.median(apart) < window
    assert (apart < streams).mean() < 2 * streams / window + 0.01
    in_use = [len(np.unique(shard[order[i : i + window]])) for i in range(0, len(order) - window, window)]
    assert streams <= np.median(in_use) <= streams * (2 + window / streams / clips)
    # no clip is further than a window from where the streams alone would have it
    plain = whole(counts, seed=1, epoch=0, streams=streams, window=1)
    before = np.empty(len(plain), dtype=np.int64)
    before[plain] = np.arange(len(plain))
    assert np.abs(place - before).max() < window


def test_uniform_enough() -> None:
    """Over epochs a clip is about as likely anywhere; and two neighbours of a tar share a batch no more often than the window
    makes any two clips of it do."""
    counts, batch, epochs = np.full(40, 50), 50, 200
    orders = [whole(counts, seed=1, epoch=e, streams=8, window=400) for e in range(epochs)]
    first = np.bincount(np.concatenate([o[:500] for o in orders]), minlength=2000)  # the first quarter of each epoch
    assert abs(first.mean() - epochs / 4) < 1e-9
    assert 0.5 < first.var() / (epochs * 0.25 * 0.75) < 2  # as wide as independent draws would be
    batches = []
    for order in orders:
        of = np.empty(2000, dtype=np.int64)
        of[order] = np.arange(2000) // batch
        batches.append(of)
    together = np.array([np.mean(of[:-1] == of[1:]) for of in batches]).mean()
    # a stream has 50 / 8 clips in a batch, of 50 in a block: one of its neighbours is among them with 1 in 8
    assert 0.09 < together < 0.15


def test_streams_never_run_dry() -> None:
    """Also with fewer shards than streams, and shards of very different size: until the end all streams take turns."""
    for clips in ([1000], [1000, 10, 3], [5] * 7 + [400]):
        order = Order(np.array(clips), seed=0, epoch=0, streams=16, window=160)
        n = len(order)
        rows = whole(clips, seed=0, epoch=0, streams=16, window=160)
        # each stream is a stretch of the shards laid end to end: its rows, taken together, are n / 16 neighbours
        for s in range(16):
            assert n // 16 <= len(rows[s::16]) <= n // 16 + 1


def test_a_rank_that_divides_the_streams_has_shards_of_its_own() -> None:
    counts = np.full(64, 100)
    order = Order(counts, seed=0, epoch=3, streams=16, window=800)
    for world in (2, 4, 8):
        seen = []
        for rank in range(world):
            places = np.concatenate([b + np.arange(128)[rank_places(128, rank, world)] for b in range(0, 6400, 128)])
            seen.append(set(order.at(places)[0].tolist()))
        # 64 shards over the ranks; only those that a cut between streams goes through are read twice
        assert sum(map(len, seen)) <= 64 + 16
        assert max(map(len, seen)) <= 64 // world + 2 * 16 // world


def test_what_is_ahead_holds_what_comes() -> None:
    """From any place on: all samples of the next `window` places, few others, neighbours of a tar together."""
    counts = np.array([40, 0, 90, 13, 60, 77, 120])
    order = Order(counts, seed=5, epoch=1, streams=4, window=80)
    for place in range(0, len(order), 37):
        shard, clip = order.ahead(place, 100, range(4))
        there = set(zip(shard.tolist(), clip.tolist(), strict=True))
        coming = order.at(np.arange(place, min(place + 100, len(order))))
        assert there >= set(zip(*(c.tolist() for c in coming), strict=True))
        assert len(there) == len(shard) <= 100 + 3 * 80
        steps = np.diff(shard * 1000 + clip)
        assert (steps != 1).sum() <= len(there) / 2 + len(counts)  # two or three neighbours at a time
        mine = order.ahead(place, 100, range(1, 4, 2))
        assert set(zip(*(c.tolist() for c in mine), strict=True)) < there


def test_a_hundred_thousand_shards() -> None:
    """Fifty million clips, and no array as long as that."""
    counts = np.full(100_000, 500)
    tracemalloc.start()
    order = Order(counts, seed=0, epoch=0)
    for position in range(0, 50_000_000, 10_000_000):
        assert len(set(zip(*(a.tolist() for a in order.at(position + np.arange(128))), strict=True))) == 128
    order.ahead(25_000_000, 4096, range(16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000 * 100


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_ranks_share_a_batch(world: int, batch: int) -> None:
    rows = np.arange(batch)
    parts = [rows[rank_places(batch, rank, world)] for rank in range(world)]
    assert np.array_equal(np.sort(np.concatenate(parts)), rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ValueError, match="rank"):
        rank_places(batch, world, world)


@pytest.mark.parametrize("wrong", [{"streams": 0}, {"window": 0}, {"seed": -1}, {"epoch": -1}])
def test_wrong_arguments(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Order(np.array([3]), **{"seed": 0, "epoch": 0, **wrong})


@pytest.mark.parametrize("weights", [[1.0], [2, 1], [0.7, 0.2, 0.1], [1] * 7, [1000, 1]])
def test_shares_of_a_mixture(weights: list[float]) -> None:
    """Each period has exactly its share of each, each batch nearly; and a data set's own samples come in their order."""
    mixture, share = Mixture(weights, seed=4), np.array(weights) / sum(weights)
    source, place = mixture.at(np.arange(3 * PERIOD))
    assert mixture.counts.sum() == PERIOD
    assert np.abs(mixture.counts / PERIOD - share).max() <= 1 / PERIOD
    for s, count in enumerate(mixture.counts):
        assert np.array_equal(place[source == s], np.arange(3 * count))
    for batch in source.reshape(-1, 128):
        assert np.abs(np.bincount(batch, minlength=len(weights)) - 128 * share).max() < 2
    some = np.random.default_rng(0).integers(0, 3 * PERIOD, 300)
    assert all(np.array_equal(a, b[some]) for a, b in zip(mixture.at(some), (source, place), strict=True))


@pytest.mark.parametrize("weights", [[], [0.0, 1], [-1.0], [float("nan")], [1e9, 1]])
def test_weights_that_make_no_sense(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="give"):
        Mixture(weights, seed=0)
