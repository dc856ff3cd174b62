"""Rings against a plain model: a list of slots, written one by one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from cmacc.train.contrast.rings import EMPTY, Entries, Ring, isin, newest


class Slot(NamedTuple):
    key: tuple[float, ...]
    id: int
    source: int
    label: int
    born: int


class PlainRing:
    """What a ring is, as slowly and plainly as can be."""

    def __init__(self, size: int, unique: bool) -> None:
        self.slots: list[Slot | None] = [None] * size
        self.cursor, self.unique = 0, unique

    def enqueue(self, new: list[Slot]) -> None:
        new = [slot for slot in new if slot.id != -1]
        if self.unique:
            names = [slot.id for slot in new]
            new = [slot for i, slot in enumerate(new) if slot.id not in names[i + 1 :]]
            self.slots = [None if slot and slot.id in names else slot for slot in self.slots]
        for slot in new:
            self.slots[self.cursor] = slot
            self.cursor = (self.cursor + 1) % len(self.slots)


def to_entries(slots: list[Slot]) -> Entries:
    keys = torch.tensor([slot.key for slot in slots]).reshape(len(slots), 2)
    return Entries(keys, *(torch.tensor([slot[i] for slot in slots], dtype=torch.int64) for i in range(1, 5)))


def assert_same(ring: Ring, plain: PlainRing) -> None:
    assert int(ring.cursor) == plain.cursor
    assert ring.filled.tolist() == [slot is not None for slot in plain.slots]
    entries = ring.entries
    assert len(entries.ids) == len(plain.slots)
    for i, slot in enumerate(plain.slots):
        if slot is None:
            assert entries.ids[i] == EMPTY
        else:
            assert (tuple(entries.keys[i].tolist()), *(int(column[i]) for column in entries[1:])) == slot


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_sequences(size: int, unique: bool, seed: int) -> None:
    """Wraps, more entries than slots, the same clip twice, entries that are to be passed over, nothing at all."""
    rng = np.random.default_rng([size, unique, seed])
    ring, plain = Ring(size, 2, unique), PlainRing(size, unique)
    for step in range(60):
        count = int(rng.integers(0, 2 * size + 3)) if rng.random() < 0.5 else int(rng.integers(0, 4))
        ids = rng.integers(-1, 2 * size, count).tolist()
        new = [Slot((float(step), float(i)), name, name // 2, int(rng.integers(-1, 3)), step) for i, name in enumerate(ids)]
        ring.enqueue(to_entries(new))
        plain.enqueue(new)
        assert_same(ring, plain)


def test_the_newest_key_of_a_clip_wins_and_its_hole_is_refilled() -> None:
    ring = Ring(4, 2, unique=True)
    ring.enqueue(to_entries([Slot((0.0, 0.0), name, 0, 0, 1) for name in (5, 6, 7)]))
    ring.enqueue(to_entries([Slot((0.0, 1.0), 6, 0, 0, 2), Slot((0.0, 2.0), 6, 0, 0, 2)]))
    assert ring.entries.ids.tolist() == [5, EMPTY, 7, 6]
    assert ring.entries.keys[3].tolist() == [0.0, 2.0]
    ring.enqueue(to_entries([Slot((0.0, 3.0), name, 0, 0, 3) for name in (8, 9)]))
    assert ring.entries.ids.tolist() == [8, 9, 7, 6]


def test_a_pool_twice_the_data_loses_no_clip() -> None:
    """13 clips in a new order each epoch: after the first epoch each has its one slot, with its newest key."""
    ring, rng, newest = Ring(26, 2, unique=True), np.random.default_rng(0), {}
    for epoch in range(20):
        for step, part in enumerate(np.array_split(rng.permutation(13), 4)):
            new = [Slot((0.0, 0.0), int(i), 0, 0, 4 * epoch + step) for i in part]
            ring.enqueue(to_entries(new))
            newest |= {slot.id: slot.born for slot in new}
            held = ring.entries.take(ring.filled)
            assert dict(zip(held.ids.tolist(), held.born.tolist(), strict=True)) == newest
            assert len(held.ids) == len(newest)


def test_state_dict_round_trip() -> None:
    """Another ring with this state goes on exactly as this one does."""
    ring, other = Ring(5, 2, unique=True), Ring(5, 2, unique=True)
    ring.enqueue(to_entries([Slot((1.0, float(i)), i, 0, 0, 0) for i in (3, 1, 4, 1, 5, 9, 2)]))
    other.load_state_dict(ring.state_dict())
    for _ in range(2):
        for a, b in zip((*ring.entries, ring.cursor), (*other.entries, other.cursor), strict=True):
            assert torch.equal(a, b)
        for each in (ring, other):
            each.enqueue(to_entries([Slot((2.0, float(i)), i, 1, 1, 1) for i in (2, 7, 1)]))


def test_dtypes_stay() -> None:
    ring = Ring(3, 2)
    ring.enqueue(to_entries([Slot((0.5, 0.25), 1, 0, 0, 0)])._replace(keys=torch.tensor([[0.5, 0.25]], dtype=torch.bfloat16)))
    assert ring.entries.keys.dtype == torch.float32
    assert ring.entries.keys[0].tolist() == [0.5, 0.25]


def test_what_is_dropped_leaves_no_trace() -> None:
    """State is compared between ranks, and saved: nothing of an entry that was passed over may be in it."""
    ring, new = Ring(3, 2), to_entries([Slot((0.5, 0.25), name, 0, 0, 0) for name in (1, -1, 2)])
    new.keys[1] = float("nan")
    ring.enqueue(new)
    other = Ring(3, 2)
    other.enqueue(new.take(torch.tensor([0, 2])))
    for name, values in ring.state_dict().items():
        assert torch.equal(values, other.state_dict()[name])


def test_sets_of_clips() -> None:
    ids = torch.tensor([3, -1, 5, 3, 7, -1, 5])
    assert newest(ids).tolist() == [False, False, False, True, True, False, True]
    for few in ([5, 9, -1], [1], []):
        assert torch.equal(isin(ids, torch.tensor(few, dtype=torch.int64)), torch.isin(ids, torch.tensor(few, dtype=torch.int64)))


def test_clearing() -> None:
    ring = Ring(3, 2)
    ring.enqueue(to_entries([Slot((0.5, 0.25), name, 0, 0, 0) for name in (1, 2)]))
    ring.clear()
    assert not ring.filled.any()
    ring.enqueue(to_entries([Slot((0.5, 0.25), 3, 0, 0, 0)]))
    assert ring.entries.ids.tolist() == [3, EMPTY, EMPTY]


def test_a_ring_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="ring of 0 entries"):
        Ring(0, 4)
