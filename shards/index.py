"""What a finished tar holds, and the two index files that other readers want beside it.

DALI's index (v1.2, `clips-000000.idx`): a text line a clip, `extension offset size name` for each member.
Energon's index (`clips-000000.tar.idx`): little-endian uint64 offsets of each clip's first header, and where the last clip ends.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, cast

from cmacc.shards.headers import Member, headers
from cmacc.shards.place import Place


def scan(file: Path | BinaryIO) -> list[Member]:
    """Every member of an uncompressed tar, in its order; data is skipped, not read.

    Raises tarfile.ReadError, with the member and its byte, when the tar is damaged, cut short, or holds something that is not
    a regular file in its top folder.
    """
    if isinstance(file, Path):
        with file.open("rb", buffering=0) as opened:  # headers lie far apart: nothing is gained by reading more than they are
            return scan(cast("BinaryIO", opened))
    size = file.seek(0, 2)
    return [member for member, _ in headers(file, size)]


def clips(members: Iterable[Member]) -> list[tuple[str, list[Member]]]:
    """Adjacent members grouped by key: what every reader of WebDataset takes for one sample."""
    return [(key, list(group)) for key, group in groupby(members, key=lambda m: m.key)]


def dali_index(members: Iterable[Member]) -> bytes:
    """DALI's v1.2 index of a tar, byte for byte what its own `wds2idx` writes."""
    samples = clips(members)
    lines = [f"v1.2 {len(samples)}"]
    lines += [" ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in group) for _, group in samples]
    return ("\n".join(lines) + "\n").encode()


def energon_index(members: Iterable[Member]) -> bytes:
    """Energon's index of a tar: uint64 little-endian, one per clip and a last one for the end."""
    samples = clips(members)
    offsets = [group[0].header for _, group in samples]
    end = samples[-1][1][-1].end if samples else 0
    return struct.pack(f"<{len(offsets) + 1}Q", *offsets, end)


def index_names(tar: str) -> tuple[str, str]:
    """Names of the DALI index and the Energon index of a shard; they lie beside it."""
    return f"{tar.removesuffix('.tar')}.idx", f"{tar}.idx"


def publish_indexes(home: Place, tar: str, members: Sequence[Member]) -> None:
    """Write both indexes of a shard beside it; members: what `scan` finds in it. Raises OSError."""
    for name, data in zip(index_names(tar), (dali_index(members), energon_index(members)), strict=True):
        home.publish(name, data)
