"""Numbers computed once, kept in a Zarr group by all that they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

log = logging.getLogger(__name__)

_VERSION = 2
"""Of how media become features: to be raised when the same encoder gives others."""
_ROWS = 256  # of a chunk, which is written when it is whole


class Kept:
    """Numbers (n, width) of n files or clips, NaN where there are none yet; on a disk if `cache`, a folder, is given.

    A chunk of rows is written when it is whole, by a rename, with its checksum: a kill costs what came after the last one.
    task: what they are of, for who looks into the group; about: JSON, all that they depend on.
    """

    def __init__(self, cache: Path | None, n: int, width: int, task: str, about: Mapping[str, Any]) -> None:
        self._made = np.full((n, width), np.nan, np.float32)
        self._next = 0  # first row that is not written
        self._stored: Any = None
        if cache is not None:
            self._stored = _opened(cache, task, self._made.shape, {"version": _VERSION, **about})
            self._made[:] = _checked(self._stored, cache)
        self._new = False

    def missing(self) -> NDArray[np.bool_]:
        return np.asarray(np.isnan(self._made).any(axis=1))

    def put(self, rows: NDArray[np.int64], made: NDArray[np.float32]) -> None:
        """rows: of 0 to n - 1, ascending from call to call."""
        self._made[rows] = made
        self._new = True
        if (whole := int(rows[-1]) // _ROWS * _ROWS) > self._next:
            self._write(whole)

    def close(self) -> NDArray[np.float32]:
        """All of them, written too."""
        if self._new:
            self._write(len(self._made))
        return self._made

    def _write(self, stop: int) -> None:
        if self._stored is not None:
            self._stored[self._next : stop] = self._made[self._next : stop]
        self._next = stop


def _opened(cache: Path, task: str, shape: tuple[int, int], about: Mapping[str, Any]) -> Any:
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    cache.mkdir(parents=True, exist_ok=True)
    group = zarr.open_group(cache, mode="a", zarr_format=3)
    try:
        found = group[key]
        if isinstance(found, zarr.Array) and found.shape == shape:
            return found
    except (KeyError, ValueError):  # ValueError: what describes it is cut
        pass
    return group.create_array(
        key, shape=shape, chunks=(_ROWS, shape[1]), dtype="float32", fill_value=np.nan, overwrite=True,
        compressors=(ZstdCodec(), Crc32cCodec()), attributes={"task": task, **about},
    )  # fmt: skip


def _checked(stored: Any, cache: Path) -> NDArray[np.float32]:
    """What is stored; a chunk that is damaged counts as not there."""
    made = np.full(stored.shape, np.nan, np.float32)
    for first in range(0, len(made), _ROWS):
        try:
            made[first : first + _ROWS] = stored[first : first + _ROWS]
        except (ValueError, RuntimeError, OSError) as error:
            log.warning("a part of %s is damaged (%s); it is computed again", cache, error)
    return made
