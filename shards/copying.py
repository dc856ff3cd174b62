"""One shard of a re-sharded data set: members read where they lie, verified, and written one after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from tarfile import BLOCKSIZE

import numpy as np
from numpy.typing import NDArray

from cmacc.shards.choice import Plan
from cmacc.shards.clip import Clip
from cmacc.shards.dataset import Dataset, Shard
from cmacc.shards.errors import DatasetError
from cmacc.shards.facts import facts_from_json
from cmacc.shards.index import Member, publish_indexes
from cmacc.shards.layout import Layout, Piece, split_words
from cmacc.shards.place import Place
from cmacc.shards.tar import tar_end, tar_member

_BATCH = 8 << 20  # bytes in memory at once, unless one clip alone is larger
_ZEROS = bytes(BLOCKSIZE)


@dataclass(frozen=True)
class Copied:
    """A shard that is there. json_sha256: digests of the json members where the sources have none of them, uint8 (clips, 32)."""

    shard: Shard
    json_sha256: NDArray[np.uint8] | None


def written_anew(of: Layout | Piece, members: Sequence[str]) -> bool:
    """Whether json members get digests that no source has: they name another split, or the sources kept none of them."""
    return of.split is not None or ("json" in members and of.sha256.shape[1] < len(members))


def copy_shard(datasets: Sequence[Dataset], piece: Piece, members: Sequence[str], home: Place) -> Copied:
    """Write one shard of a layout with its indexes; nothing of it is seen before it is whole.

    Every member is compared with its sha256 in the source's catalog on the way. Raises DatasetError, OSError.
    """
    part = home.create(piece.name)
    found: list[Member] = []
    digests: list[bytes] = []
    batches = list(_batches(piece))
    buffer = memoryview(bytearray(max(end - begin for _, _, begin, end in batches)))
    try:
        for first, last, begin, end in batches:
            _assemble(datasets, piece, range(first, last), members, buffer[: end - begin], begin, found, digests)
            part.write(buffer[: end - begin])
        part.write(tar_end(part.bytes))
        part.sync()
        publish_indexes(home, piece.name, found)
        part.publish()
    except BaseException:
        part.discard()
        raise
    shard = Shard(name=piece.name, clips=len(piece.keys), bytes=part.bytes, sha256=part.sha256)
    return Copied(shard, np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32) if digests else None)


def _batches(piece: Piece) -> Iterator[tuple[int, int, int, int]]:
    """Runs of clips of at most `_BATCH` bytes, or one clip: first clip, end of clips, first byte in the tar, end of bytes."""
    ends = piece.offset[:, -1] + -(-piece.size[:, -1] // BLOCKSIZE) * BLOCKSIZE
    at = begin = 0
    while at < len(ends):
        until = max(at + 1, int(np.searchsorted(ends, begin + _BATCH, side="right")))
        end = int(ends[until - 1])
        yield at, until, begin, end
        at, begin = until, end


def _assemble(
    datasets: Sequence[Dataset],
    piece: Piece,
    clips: range,
    members: Sequence[str],
    buffer: memoryview,
    begin: int,
    found: list[Member],
    digests: list[bytes],
) -> None:
    """Fill `buffer` with the tar's bytes from `begin` on: headers, members read right into their places, padding.

    Members join `found`; digests of json members join `digests` where the sources have none of what is written.
    """
    rows = slice(clips.start, clips.stop)
    renamed = piece.split is not None
    digested = piece.sha256.shape[1]
    wanted = piece.sha256[rows].tobytes()
    spans: list[list[tuple[int, int, memoryview]]] = [[] for _ in datasets]
    checks: list[tuple[int, str, memoryview, bytes]] = []
    for clip, places, sizes, old_places, old_sizes in zip(
        clips, *(values[rows].tolist() for values in (piece.offset, piece.size, piece.place, piece.was)), strict=True
    ):
        source, shard, key = int(piece.source[clip]), int(piece.shard[clip]), piece.keys[clip]
        for column, (member, place, size) in enumerate(zip(members, places, sizes, strict=True)):
            title, at = f"{key}.{member}", place - begin
            header = tar_member(title, size)
            buffer[at - len(header) : at] = header
            if pad := -size % BLOCKSIZE:
                buffer[at + size : at + size + pad] = _ZEROS[:pad]
            found.append(Member(title, place - len(header), place, size))
            view = buffer[at : at + size]
            if renamed and member == "json":
                view = memoryview(bytearray(old_sizes[column]))
            spans[source].append((shard, old_places[column], view))
            digest = (clip - clips.start) * digested + column
            checks.append((clip, member, view, wanted[32 * digest : 32 * digest + 32] if column < digested else b""))
    for dataset, some in zip(datasets, spans, strict=True):
        dataset.read_into(some)
    for clip, member, view, digest in checks:
        if digest and hashlib.sha256(view).digest() != digest:
            raise datasets[int(piece.source[clip])].damaged(int(piece.row[clip]), member)
        if member == "json" and (renamed or not digest):
            data = bytes(view)
            if piece.split is not None:
                data = _renamed(data, piece.keys[clip], piece.split[0][clip], piece.split[1][clip])
                at = int(piece.offset[clip, -1]) - begin
                buffer[at : at + len(data)] = data
            digests.append(hashlib.sha256(data).digest())


def read_clips(datasets: Sequence[Dataset], plan: Plan, there: frozenset[str]) -> Iterator[Clip]:
    """The clips of a plan with their media members, verified, but for those `there`; foreign ones have the catalog's facts.

    Raises DatasetError.
    """
    from cmacc.shards.foreign.rows import facts_with_captions  # here: it brings PyAV, which copying does without

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


def _renamed(data: bytes, key: str, old: str, new: str) -> bytes:
    """A json member of ours with another split; quotes inside its texts are escaped, so that the words stand there once."""
    was = split_words(old)
    if data.count(was) != 1:
        raise DatasetError(f"the json member of {key} does not name its split as its catalog does; run `cmacc lint`")
    return data.replace(was, split_words(new))
