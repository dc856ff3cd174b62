"""What columns a catalog has, and how each lies on the disk: one Zarr v3 array, or a pair of them.

Numbers are arrays of n rows; text and lists are pairs of arrays, `values` and `offsets` (n + 1), as in Arrow;
labels and splits are codes into a vocabulary kept in the column's attributes; captions stay in the json member alone.
A chunk is 256 KiB before compression, the least that is read, and carries its own checksum; 32 chunks are one file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

FACTS = {
    "start_s": "float64",
    "end_s": "float64",
    "duration_s": "float64",
    "n_frames": "int32",
    "fps": "float64",
    "width": "int32",
    "height": "int32",
    "loudness_db": "float64",
    "motion": "float64",
    "av_offset_s": "float64",
    "av_trust": "float64",
}
LISTS = {"key": "uint8", "source": "uint8", "keyframes": "int32", "labels": "int32", "duplicate_of": "uint8"}
CODED = ("labels", "split")
TEXTS = ("key", "source", "split", "duplicate_of")
LATER = ("av_offset_s", "av_trust", "fingerprint", "duplicate_of")  # a catalog that was made without them reads as 0 and ""
BUILT_IN = (
    "key", "shard", "offset", "size", "source", *FACTS, "keyframes", "labels", "split", "fingerprint", "duplicate_of", "sha256",
)  # fmt: skip

DIGEST = "cmacc_sha256"  # attribute of an added column: hex digest of its attributes, shape, type and numbers

_CHUNK_BYTES = 1 << 18
_CHUNKS_A_FILE = 32
_BLOCK_BYTES = 1 << 24


def create_columns(where: Any, members: tuple[str, ...]) -> Any:
    """A Zarr group (at a path or in a store) with all built-in columns, without rows."""
    group = zarr.create_group(where, zarr_format=3, attributes={"members": list(members), "later": list(LATER)})
    create_array(group, "offset", (0, len(members)), "int64")
    create_array(group, "size", (0, len(members)), "int64")
    create_array(group, "sha256", (0, len(members), 32), "uint8")
    for name in ("shard", "split", *FACTS, *LISTS, "fingerprint"):
        create_fact(group, name)
    for name in CODED:
        group[name].update_attributes({"vocabulary": []})
    return group


def create_fact(group: Any, name: str, rows: int = 0) -> None:
    """Add an array, or a pair of them, of `rows` rows, all 0 or empty, which takes no room."""
    if name in LISTS:
        pair = group.create_group(name)
        create_array(pair, "values", (0,), LISTS[name])
        create_array(pair, "offsets", (rows + 1,), "int64")
    elif name == "fingerprint":
        create_array(group, name, (rows, 4), "uint64")
    else:
        create_array(group, name, (rows,), {"shard": "int32", "split": "int16", **FACTS}[name])


def create_array(group: Any, name: str, shape: tuple[int, ...], dtype: Any, attributes: dict[str, Any] | None = None) -> Any:
    """An array of zeros in the layout that all columns have."""
    chunk, _ = _chunk(shape, dtype)
    return group.create_array(
        name, shape=shape, chunks=(chunk, *shape[1:]), shards=(chunk * _CHUNKS_A_FILE, *shape[1:]), dtype=dtype,
        compressors=[ZstdCodec(level=3), Crc32cCodec()], fill_value=0, attributes=attributes or {},
    )  # fmt: skip


def _chunk(shape: tuple[int, ...], dtype: Any) -> tuple[int, int]:
    """Rows of a chunk, and bytes of a row."""
    row_bytes = np.dtype(dtype).itemsize * int(np.prod(shape[1:], dtype=np.int64))
    return max(1, _CHUNK_BYTES // max(1, row_bytes)), row_bytes


def row_blocks(shape: tuple[int, ...], dtype: Any) -> Iterator[slice]:
    """Rows of a column in slices of about 16 MiB, of whole files where it is more than one."""
    chunk, row_bytes = _chunk(shape, dtype)
    step = chunk * _CHUNKS_A_FILE * max(1, _BLOCK_BYTES // max(1, chunk * _CHUNKS_A_FILE * row_bytes))
    for at in range(0, shape[0], step):
        yield slice(at, min(at + step, shape[0]))


def column_digest(shape: Sequence[int], dtype: Any, attributes: dict[str, Any]) -> Any:
    """A sha256 to which the rows of an added column are still to be given, in their order, contiguous, in this dtype."""
    said = [list(shape), str(np.dtype(dtype)), {k: v for k, v in attributes.items() if k != DIGEST}]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode())
