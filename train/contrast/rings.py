"""Dictionaries and candidate pools: rings of key embeddings that take any batch size and wrap anywhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

EMPTY = -1


class Entries(NamedTuple):
    """Some keys and what is known of them, all with one row a key.

    keys: (n, d) float32. ids, sources, labels: (n,) int64, of the clip, its source video and (for analysis alone) its
    class. born: (n,) int64, the step in which the key was computed.
    """

    keys: Tensor
    ids: Tensor
    sources: Tensor
    labels: Tensor
    born: Tensor

    def take(self, index: Tensor) -> Entries:
        return Entries(*(t[index] for t in self))

    def first(self, count: int) -> Entries:
        return Entries(*(t[:count] for t in self))

    def only(self, these: Tensor) -> Entries:
        """All rows, but those where `these` (n,) is False named empty, so that no ring takes them."""
        return self._replace(ids=self.ids.where(these, EMPTY))

    @classmethod
    def join(cls, *parts: Entries) -> Entries:
        return cls(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def isin(values: Tensor, few: Tensor) -> Tensor:
    """(n,) bool: which of `values` (n,) are among `few` (m,). Sorts the few alone, where torch.isin may sort both."""
    if not len(few):
        return torch.zeros_like(values, dtype=torch.bool)
    ordered = few.sort().values
    return ordered[torch.searchsorted(ordered, values.contiguous()).clamp_max_(len(few) - 1)] == values


def newest(ids: Tensor) -> Tensor:
    """(n,) bool: the last row of each clip, where there is one at all."""
    return (ids != EMPTY) & ~(ids[:, None] == ids).triu(1).any(1)


class Ring(nn.Module):
    """`size` slots of entries, the oldest overwritten first. State is its buffers, so `state_dict` holds all of it.

    unique: a clip has one slot at most, and its newest key wins (a pool larger than the data set needs this).
    """

    keys: Tensor
    ids: Tensor
    sources: Tensor
    labels: Tensor
    born: Tensor
    cursor: Tensor

    def __init__(self, size: int, width: int, unique: bool = False) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"a ring of {size} entries cannot hold keys; give 1 or more")
        self.size, self.unique = size, unique
        # One slot more than the size: entries to be dropped are written there, so that no shape depends on the data.
        self.register_buffer("keys", torch.zeros(size + 1, width).index_fill_(0, torch.tensor(size), EMPTY))
        for name in ("ids", "sources", "labels", "born"):
            self.register_buffer(name, torch.full((size + 1,), EMPTY, dtype=torch.int64))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))

    @property
    def entries(self) -> Entries:
        """Views of all slots, empty ones included (their id is -1)."""
        return Entries(*(t[: self.size] for t in (self.keys, self.ids, self.sources, self.labels, self.born)))

    @property
    def filled(self) -> Tensor:
        """(size,) bool."""
        return self.ids[: self.size] != EMPTY

    @torch.no_grad()
    def clear(self) -> None:
        self.ids.fill_(EMPTY)
        self.cursor.zero_()

    @torch.no_grad()
    def enqueue(self, new: Entries) -> None:
        """Write `new` behind the cursor, in order, passing over entries whose id is -1. Of more than `size` the last stay."""
        keep = new.ids != EMPTY
        if self.unique:
            # The older key of a clip leaves a hole, which the cursor fills when it comes round.
            self.ids.masked_fill_(isin(self.ids, new.ids), EMPTY)
            keep = newest(new.ids)
        rank = keep.long().cumsum(0) - 1
        total = keep.sum()
        # When more come than there are slots, two writes would meet in one slot, and their order is not defined.
        keep = keep & (rank >= total - self.size)
        slot = torch.where(keep, (self.cursor + rank) % self.size, self.size)
        for buffer, values in zip((self.keys, self.ids, self.sources, self.labels, self.born), new, strict=True):
            buffer[slot] = values.to(buffer.dtype)
            buffer[self.size] = EMPTY  # what was dropped may be anything, and differ from rank to rank
        self.cursor.copy_((self.cursor + total) % self.size)
