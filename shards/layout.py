"""Where every byte of a re-sharded data set will lie, worked out from the catalogs alone before any is copied."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cmacc.shards.choice import Plan
from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.shards.gather import gather, gather_dense
from cmacc.shards.tar import tar_end

_BLOCK = tarfile.BLOCKSIZE
_SHORT_NAME = 100  # bytes; a longer one takes an extended header of two blocks more


class Piece(NamedTuple):
    """One shard of a layout: all that is needed to write it. Fields as in `Plan` and `Layout`, of its clips alone."""

    name: str
    keys: list[str]
    source: NDArray[np.int32]
    row: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    shard: NDArray[np.int32]
    place: NDArray[np.int64]
    was: NDArray[np.int64]
    sha256: NDArray[np.uint8]
    split: tuple[list[str], list[str]] | None


@dataclass(frozen=True)
class Layout:
    """The shards of a plan. begin: number of each shard's first clip, and how many clips there are at last, int64 (shards + 1).

    bytes: size of each shard's file. offset, size: of each clip's members in its shard, int64 (n, members).
    shard, place, was: where they lie today: number of the source's shard (n,), offsets and sizes (n, members).
    sha256: of the members as they are, uint8 (n, members or one less, 32). keys: Arrow text (n,).
    split: what the json member says now and shall say, for each clip, or None where it stays.
    """

    begin: NDArray[np.int64]
    bytes: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    shard: NDArray[np.int32]
    place: NDArray[np.int64]
    was: NDArray[np.int64]
    sha256: NDArray[np.uint8]
    keys: pa.Array
    split: tuple[list[str], list[str]] | None

    @staticmethod
    def name(shard: int) -> str:
        return f"clips-{shard:06d}.tar"

    def piece(self, plan: Plan, shard: int) -> Piece:
        """What there is to do for one shard."""
        here = slice(int(self.begin[shard]), int(self.begin[shard + 1]))
        split = self.split and (self.split[0][here], self.split[1][here])
        return Piece(
            self.name(shard), self.keys[here].to_pylist(), plan.source[here], plan.row[here],
            self.offset[here], self.size[here], self.shard[here], self.place[here], self.was[here], self.sha256[here], split,
        )  # fmt: skip

    @property
    def count(self) -> int:
        return len(self.bytes)


def lay_out(datasets: Sequence[Dataset], plan: Plan, members: Sequence[str], shard_bytes: int) -> Layout:
    """Cut a plan into shards of at most `shard_bytes`, by the rule of `DatasetWriter`, and at the border of two splits.

    members: those that are kept, in the order of the sources. Raises DatasetError.
    """
    if shard_bytes < 1:
        raise DatasetError(f"shard_bytes is {shard_bytes}; give 1 or more")
    columns = [datasets[0].meta.members.index(m) for m in members]
    was = gather_dense(datasets, plan.source, plan.row, "size")[:, columns]
    size = was.copy()
    keys = gather(datasets, plan.source, plan.row, "key")
    split = None
    if plan.split is not None and not datasets[0].meta.foreign and "json" in members:
        old_names = gather(datasets, plan.source, plan.row, "split").to_pylist()
        split = old_names, [plan.splits[code] for code in plan.split.tolist()]
        size[:, list(members).index("json")] += [
            len(split_words(new)) - len(split_words(old)) for old, new in zip(*split, strict=True)
        ]
    longest = np.asarray(pc.binary_length(keys), dtype=np.int64)[:, None] + 1 + np.array([len(m) for m in members])
    header = np.where(longest > _SHORT_NAME, 3 * _BLOCK, _BLOCK)
    span = header + -(-size // _BLOCK) * _BLOCK
    behind = np.cumsum(span.sum(axis=1))
    begin = _cut(behind, _borders(plan), shard_bytes)
    base = np.r_[0, behind][begin]
    offset = np.r_[0, behind[:-1]][:, None] + np.cumsum(span, axis=1) - span + header
    offset -= np.repeat(base[:-1], np.diff(begin))[:, None]
    content = np.diff(base)
    ends = np.array([len(tar_end(int(n))) for n in content], dtype=np.int64)
    place = gather_dense(datasets, plan.source, plan.row, "offset")[:, columns]
    sha256 = _digests(datasets, plan, columns)
    shard = gather_dense(datasets, plan.source, plan.row, "shard")
    return Layout(begin, content + ends, offset, size, shard, place, was, sha256, keys, split)


def _digests(datasets: Sequence[Dataset], plan: Plan, columns: list[int]) -> NDArray[np.uint8]:
    """An earlier version kept none of the json member: then there is none to compare with, in all sources."""
    width = min(d.catalog.shape("sha256")[1] for d in datasets)
    return gather_dense(datasets, plan.source, plan.row, "sha256", width)[:, [c for c in columns if c < width]]


def split_words(split: str) -> bytes:
    """How a json member of ours names its split."""
    return b'"split": ' + json.dumps(split, ensure_ascii=False).encode()


def _borders(plan: Plan) -> NDArray[np.int64]:
    inner = np.flatnonzero(np.diff(plan.split)) + 1 if plan.split is not None else np.zeros(0, dtype=np.int64)
    return np.r_[inner, len(plan.row)]


def _cut(behind: NDArray[np.int64], borders: NDArray[np.int64], shard_bytes: int) -> NDArray[np.int64]:
    """Numbers of the clips that shards begin with. behind: bytes of all clips up to and with each one."""
    room = shard_bytes // tarfile.RECORDSIZE * tarfile.RECORDSIZE - 2 * _BLOCK  # the end mark fills a whole record
    begin, at = [0], 0
    for border in borders.tolist():
        while at < border:
            base = int(behind[at - 1]) if at else 0
            at = min(border, max(at + 1, int(np.searchsorted(behind, base + room, side="right"))))
            begin.append(at)
    return np.array(begin, dtype=np.int64)
