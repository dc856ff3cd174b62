"""Which clips a new data set has, and in which order: a question to the catalogs of others, answered by a plan."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cmacc.shards.dataset import Dataset
from cmacc.shards.embeddings import embeddings, first_of_near
from cmacc.shards.errors import DatasetError
from cmacc.shards.gather import gather
from cmacc.shards.query import matching, sorted_by

log = logging.getLogger(__name__)

Pick = Callable[[NDArray[np.float32], int, int], NDArray[np.int64]]
"""`pick(vectors (n, d), count, seed)` gives the positions of `count` distinct vectors that cover all, e.g. k-means++."""


@dataclass(frozen=True)
class Choice:
    """A question to catalogs. Clips are filtered, ordered, then thinned in the order of the fields from `dedup` to `limit`.

    where: an SQL expression over the catalog's columns. order: `source`, `shuffle:SEED` or `by:COLUMN` (ascending).
    dedup: leave out a clip whose embedding has at least this cosine with one before it, above 0 up to 1.
    balance: `labels` or a column: as many clips for each value. A clip with several labels counts for its rarest one. With a
    limit the values share it, and what the small ones lack the others have; without one all have what the smallest has.
    diverse: so many clips that cover all, by embedding. limit: the first so many.
    split: e.g. `train:0.9,val:0.1`, decided by a hash of the source video, so that no video is in two splits, whatever else is
    chosen. Shards then hold clips of one split each. Without it clips keep the split they have.
    embedding: of which model, or one column; need not be said where there is one. Raises DatasetError for what makes no sense.
    """

    where: str | None = None
    order: str = "source"
    dedup: float | None = None
    balance: str | None = None
    diverse: int | None = None
    limit: int | None = None
    split: str | None = None
    embedding: str | None = None

    def __post_init__(self) -> None:
        kind, _, value = self.order.partition(":")
        if self.order != "source" and not (kind == "by" and value) and not (kind == "shuffle" and value.isdecimal()):
            raise DatasetError(f"order {self.order!r} is not known; give source, shuffle:SEED or by:COLUMN")
        for name in ("limit", "diverse"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise DatasetError(f"{name} is {count}; give 1 or more")
        if self.dedup is not None and not 0 < self.dedup <= 1:
            raise DatasetError(f"dedup is {self.dedup}; give a cosine above 0 and up to 1, 0.95 finds what is nearly the same")
        if self.split is not None:
            parse_split(self.split)

    @property
    def seed(self) -> int:
        """Of a shuffled order; 0 for other orders."""
        kind, _, value = self.order.partition(":")
        return int(value) if kind == "shuffle" else 0


class Plan(NamedTuple):
    """Which clips, in which order: numbers of source and row, (n,). split: position in `splits`, (n,), or None: as it was.

    splits: their names. duplicates: clips left out because their key came before; near: because their like did.
    """

    source: NDArray[np.int32]
    row: NDArray[np.int64]
    split: NDArray[np.int16] | None = None
    splits: tuple[str, ...] = ()
    duplicates: int = 0
    near: int = 0


def make_plan(datasets: Sequence[Dataset], choice: Choice, pick: Pick | None = None) -> Plan:
    """Choose and order clips. Of clips with the same key the first source's is taken. Raises DatasetError."""
    datasets = list(datasets)
    rows, duplicates = _distinct(datasets, [matching(d, choice.where) for d in datasets])
    source = np.repeat(np.arange(len(rows), dtype=np.int32), [len(r) for r in rows])
    row = np.concatenate(rows)
    turn = _turn(datasets, rows, choice)
    source, row = source[turn], row[turn]
    near = 0
    if choice.dedup is not None or choice.diverse is not None:
        vectors = embeddings(datasets, source, row, choice.embedding)
        kept = np.arange(len(row))
        if choice.dedup is not None:
            kept = first_of_near(vectors, choice.dedup)
            near = len(row) - len(kept)
        if choice.balance is not None:
            kept = kept[_balanced(datasets, source[kept], row[kept], choice)]
        if choice.diverse is not None:
            kept = kept[_diverse(vectors[kept], choice, pick)]
        source, row = source[kept], row[kept]
    elif choice.balance is not None:
        kept = _balanced(datasets, source, row, choice)
        source, row = source[kept], row[kept]
    source, row = source[: choice.limit], row[: choice.limit]
    if choice.split is None:
        return Plan(source, row, duplicates=duplicates, near=near)
    shares = parse_split(choice.split)
    split = _splits(datasets, source, row, shares)
    if empty := [name for i, (name, _) in enumerate(shares) if i not in split]:
        log.warning("no clip is in split %s: the chosen clips have too few source videos for its share", ", ".join(empty))
    by_split = np.argsort(split, kind="stable")
    return Plan(source[by_split], row[by_split], split[by_split], tuple(name for name, _ in shares), duplicates, near)


def parse_split(text: str) -> list[tuple[str, float]]:
    """`train:0.9,val:0.1` as names and the share at which each ends: [("train", 0.9), ("val", 1.0)]. Raises DatasetError."""
    shares, end = [], 0.0
    for part in text.split(","):
        name, _, share = part.strip().partition(":")
        try:
            end += float(share)
        except ValueError:
            end = float("nan")
        shares.append((name, end))
    names = [name for name, _ in shares]
    rising = all(b > a for (_, a), (_, b) in pairwise([("", 0.0), *shares]))
    if not all(names) or len(set(names)) < len(names) or not rising or abs(end - 1) > 1e-6:
        raise DatasetError(f"split {text!r} is not understood; give names and shares that make 1, as in train:0.9,val:0.1")
    return [*shares[:-1], (names[-1], 1.0)]


def split_of(source: str, shares: Sequence[tuple[str, float]]) -> str:
    """The split of a source video: the same for all its clips, in any data set and at any time."""
    place = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") / 2**64
    return next((name for name, end in shares if place < end), shares[-1][0])


def _distinct(datasets: list[Dataset], rows: list[NDArray[np.int64]]) -> tuple[list[NDArray[np.int64]], int]:
    """Rows whose key is in no data set before, and how many were left out; within one data set keys differ."""
    if len(datasets) < 2:
        return rows, 0
    keys = [d.catalog.arrow("key").take(pa.array(r)) for d, r in zip(datasets, rows, strict=True)]
    codes = np.asarray(pc.dictionary_encode(pa.concat_arrays(keys)).indices)
    _, first = np.unique(codes, return_index=True)
    new = np.zeros(len(codes), dtype=bool)
    new[first] = True
    kept = [r[n] for r, n in zip(rows, np.split(new, np.cumsum([len(r) for r in rows])[:-1]), strict=True)]
    return kept, int(len(codes) - len(first))


def _turn(datasets: list[Dataset], rows: list[NDArray[np.int64]], choice: Choice) -> NDArray[np.int64]:
    n = sum(map(len, rows))
    kind, _, value = choice.order.partition(":")
    if kind == "by":
        return sorted_by(datasets, rows, value)
    if kind == "shuffle":
        return np.argsort(np.random.Philox(key=np.array([choice.seed, 0], dtype=np.uint64)).random_raw(n), kind="stable")
    return np.arange(n, dtype=np.int64)


def _balanced(datasets: list[Dataset], source: NDArray[np.int32], row: NDArray[np.int64], choice: Choice) -> NDArray[np.int64]:
    """Positions, ascending, of as many clips for each value as `Choice.balance` says, the first ones of each."""
    assert choice.balance is not None
    values = gather(datasets, source, row, choice.balance)
    group = _rarest(values) if pa.types.is_large_list(values.type) else _codes(values)
    sizes = np.bincount(group[group >= 0])
    if not sizes.any():
        raise DatasetError(f"balance {choice.balance!r} finds no value to balance by: no chosen clip has one")
    most = np.full(len(sizes), sizes[sizes > 0].min()) if choice.limit is None else _shares(sizes, choice.limit)
    by_group = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(group[by_group]) > 0])
    rank = np.empty(len(group), dtype=np.int64)
    rank[by_group] = np.arange(len(group)) - np.repeat(starts, np.diff(np.r_[starts, len(group)]))
    return np.flatnonzero((group >= 0) & (rank < most[group]))


def _shares(sizes: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """How many of each group make `limit` in all, as evenly as can be: the small groups give all they have."""
    low, high = 0, int(sizes.max())
    while low < high:  # the most that all groups may give without passing the limit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(sizes, middle).sum() <= limit else (low, middle - 1)
    shares = np.minimum(sizes, low)
    shares[np.flatnonzero(sizes > low)[: limit - shares.sum()]] += 1
    return shares


def _codes(values: pa.Array) -> NDArray[np.int64]:
    return np.asarray(pc.dictionary_encode(values).indices.fill_null(-1), dtype=np.int64)


def _rarest(lists: pa.Array) -> NDArray[np.int64]:
    """Code of the rarest value of each list, -1 for an empty one."""
    words = lists.flatten()
    codes = _codes(words.cast(pa.large_string()) if pa.types.is_dictionary(words.type) else words)
    if not len(codes):
        return np.full(len(lists), -1)
    order = np.argsort(np.bincount(codes), kind="stable")
    place = np.empty(len(order), dtype=np.int64)  # 0 for the rarest
    place[order] = np.arange(len(order))
    lengths = np.asarray(pc.list_value_length(lists), dtype=np.int64)
    found = np.full(len(lists), -1, dtype=np.int64)
    some = lengths > 0
    found[some] = order[np.minimum.reduceat(place[codes], (np.cumsum(lengths) - lengths)[some])]
    return found


def _diverse(vectors: NDArray[np.float32], choice: Choice, pick: Pick | None) -> NDArray[np.int64]:
    if pick is None:
        raise DatasetError("diverse needs a function that picks; `cmacc reshard --diverse N` brings one")
    assert choice.diverse is not None
    sound = np.flatnonzero(np.isfinite(vectors).all(axis=1))
    return np.sort(sound[pick(vectors[sound], min(choice.diverse, len(sound)), choice.seed)])


def _splits(
    datasets: list[Dataset], source: NDArray[np.int32], row: NDArray[np.int64], shares: list[tuple[str, float]]
) -> NDArray[np.int16]:
    names = pc.dictionary_encode(gather(datasets, source, row, "source"))
    number = {name: i for i, (name, _) in enumerate(shares)}
    of_source = np.array([number[split_of(s, shares)] for s in names.dictionary.to_pylist()], dtype=np.int16)
    return of_source[np.asarray(names.indices)] if len(row) else of_source
