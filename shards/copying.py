"""One shard of a re-sharded data set: members read where they lie, verified, and written one after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cmacc.shards.choice import Plan
from cmacc.shards.clip import Clip
from cmacc.shards.dataset import Dataset, Shard
from cmacc.shards.errors import DatasetError
from cmacc.shards.facts import facts_from_json
from cmacc.shards.foreign_rows import facts_with_captions
from cmacc.shards.index import Member, publish_indexes
from cmacc.shards.layout import Layout, split_words
from cmacc.shards.place import Place
from cmacc.shards.tar import tar_end, tar_member, tar_padding

_BATCH = 8 << 20  # bytes of members in memory at once, unless one alone is larger


@dataclass(frozen=True)
class Copied:
    """A shard that is there. json_sha256: digests of the json members where the sources have none of them, uint8 (clips, 32)."""

    shard: Shard
    json_sha256: NDArray[np.uint8] | None


def copy_shard(
    datasets: Sequence[Dataset], plan: Plan, layout: Layout, number: int, members: Sequence[str], home: Place
) -> Copied:
    """Write shard `number` of the layout with its indexes; nothing of it is seen before it is whole.

    Every member is compared with its sha256 in the source's catalog on the way. Raises DatasetError, OSError.
    """
    begin, end = int(layout.begin[number]), int(layout.begin[number + 1])
    name = layout.name(number)
    part = home.create(name)
    anew = layout.split is not None or ("json" in members and layout.sha256.shape[1] < len(members))
    found: list[Member] = []
    digests: list[bytes] = []
    try:
        for first, last in _batches(layout, begin, end):
            pieces: list[bytes] = []
            keys = layout.keys.slice(first, last - first).to_pylist()
            for clip, key, contents in zip(range(first, last), keys, _read(datasets, plan, layout, first, last), strict=True):
                _verify(datasets, plan, layout, clip, members, contents)
                for column, (member, data) in enumerate(zip(members, contents, strict=True)):
                    if anew and member == "json":
                        if layout.split:
                            data = _renamed(data, key, layout.split[0][clip], layout.split[1][clip])
                        digests.append(hashlib.sha256(data).digest())
                    title = f"{key}.{member}"
                    header = tar_member(title, len(data))
                    place = int(layout.offset[clip, column])
                    found.append(Member(title, place - len(header), place, len(data)))
                    pieces += (header, data, tar_padding(len(data)))
            part.write_all(pieces)
        part.write(tar_end(part.bytes))
        part.sync()
        publish_indexes(home, name, found)
        part.publish()
    except BaseException:
        part.discard()
        raise
    shard = Shard(name=name, clips=end - begin, bytes=part.bytes, sha256=part.sha256)
    return Copied(shard, np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32) if anew else None)


def read_clips(datasets: Sequence[Dataset], plan: Plan, there: frozenset[str]) -> Iterator[Clip]:
    """The clips of a plan with their media members, verified, but for those `there`; foreign ones have the catalog's facts.

    Raises DatasetError.
    """
    for at, (source, row) in enumerate(zip(plan.source.tolist(), plan.row.tolist(), strict=True)):
        dataset = datasets[source]
        here = slice(row, row + 1)
        key = str(dataset.catalog.texts("key", here)[0])
        if key in there:
            continue
        found = dataset.read(row, check=True)
        own = found.pop("json", b"")
        try:
            facts = facts_with_captions(dataset, row) if dataset.meta.foreign else facts_from_json(own)
        except ValueError as e:
            raise DatasetError(f"clip {key} of {dataset.url} cannot be copied: {e}; leave it out by key <> '{key}'") from e
        if plan.split is not None:
            facts = replace(facts, split=plan.splits[int(plan.split[at])])
        yield Clip(key, facts, found)


def _batches(layout: Layout, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs of clips whose members together have at most `_BATCH` bytes."""
    behind = np.cumsum(layout.size[begin:end].sum(axis=1))
    at = 0
    while at < len(behind):
        base = int(behind[at - 1]) if at else 0
        until = max(at + 1, int(np.searchsorted(behind, base + _BATCH, side="right")))
        yield begin + at, begin + until
        at = until


def _read(datasets: Sequence[Dataset], plan: Plan, layout: Layout, first: int, last: int) -> list[list[bytes]]:
    """The members of some clips, in the order of the plan."""
    found: list[list[bytes]] = [[] for _ in range(last - first)]
    width = layout.place.shape[1]
    for number in np.unique(plan.source[first:last]).tolist():
        here = first + np.flatnonzero(plan.source[first:last] == number)
        begins = layout.place[here]
        ends = begins + layout.was[here]
        shards = np.repeat(layout.shard[here], width)
        contents = datasets[number].ranges(
            list(zip(shards.tolist(), begins.ravel().tolist(), ends.ravel().tolist(), strict=True))
        )
        for i, clip in enumerate(here.tolist()):
            found[clip - first] = contents[i * width : (i + 1) * width]
    return found


def _verify(
    datasets: Sequence[Dataset], plan: Plan, layout: Layout, clip: int, members: Sequence[str], contents: Sequence[bytes]
) -> None:
    for member, data, digest in zip(members, contents, layout.sha256[clip], strict=False):
        if hashlib.sha256(data).digest() != digest.tobytes():
            raise datasets[int(plan.source[clip])].damaged(int(plan.row[clip]), member)


def _renamed(data: bytes, key: str, old: str, new: str) -> bytes:
    """A json member of ours with another split; quotes inside its texts are escaped, so that the words stand there once."""
    was = split_words(old)
    if data.count(was) != 1:
        raise DatasetError(f"the json member of {key} does not name its split as its catalog does; run `cmacc lint`")
    return data.replace(was, split_words(new))
