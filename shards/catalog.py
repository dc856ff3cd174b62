"""The catalog: one Zarr v3 group, one row per clip, every column on its own; `columns.py` has what they are.

The rows that count are the first `rows`, as `dataset.json` has them: what lies behind them is left from an append that was
never committed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import zarr
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from zarr.storage import MemoryStore

from cmacc.shards.clip import Facts
from cmacc.shards.columns import (
    BUILT_IN,
    CODED,
    DIGEST,
    FACTS,
    LATER,
    LISTS,
    TEXTS,
    column_digest,
    create_array,
    create_fact,
    row_blocks,
)  # fmt: skip
from cmacc.shards.errors import DatasetError
from cmacc.shards.place import place
from cmacc.shards.remote import PATIENCE_S, passes, patiently
from cmacc.shards.store import remote_store

_READ_TOGETHER = 1 << 18  # bytes, before compression: a chunk as we write it
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Ragged(NamedTuple):
    """Row i is `values[offsets[i]:offsets[i + 1]]`; offsets int64 (n + 1)."""

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    def row(self, i: int) -> NDArray[Any]:
        return self.values[self.offsets[i] : self.offsets[i + 1]]


class Catalog:
    """Columns of the first `rows` clips. Opening costs nothing; each column is read alone, when asked for.

    url: of `catalog.zarr`, local or anything fsspec knows. members: extensions, in the order of `offset` and `size`.
    patience: seconds that a store may take to answer.
    """

    def __init__(
        self, url: str, rows: int, members: Sequence[str], *, writable: bool = False, patience: float = PATIENCE_S
    ) -> None:
        self.url, self.rows, self.members, self.patience = url, rows, tuple(members), patience
        self._writable = writable
        self._group: Any = None
        self._pid = os.getpid()
        self._nodes: dict[str, Any] = {}

    # --- reading ---

    @property
    def columns(self) -> list[str]:
        """Names of all columns, the ones added later last."""
        return [*BUILT_IN, *self.added]

    @property
    def added(self) -> list[str]:
        """Names of the columns added later, sorted."""
        return sorted(n for n in self._root().array_keys() if n not in BUILT_IN and not n.startswith("."))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a column of numbers, rows of an uncommitted append left out."""
        array = self._node(name)
        return min(self.rows, array.shape[0]), *array.shape[1:]

    def chunk_rows(self, name: str) -> int:
        """Rows of an array that are best read together, the first of them beginning at 0: a chunk, or 256 KiB of a larger one.

        name: of a column of numbers, or of one half of a pair, `key/values`. Raises DatasetError.
        """
        array = self._array(name)
        row_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
        return max(1, min(array.chunks[0], _READ_TOGETHER // max(1, row_bytes)))

    def part(self, name: str, wanted: slice | NDArray[np.integer]) -> NDArray[Any]:
        """Some elements of one half of a column of lists, `key/offsets` or `key/values`; of a slice, those that are there."""
        array = self._array(name)
        if isinstance(wanted, slice):
            return self._values(array, wanted)
        return self._values(array.oindex, wanted)

    def column(self, name: str, rows: slice | NDArray[np.integer] | None = None) -> NDArray[Any]:
        """A column of numbers, (n, ...): `shard`, a fact, `offset` or `size` (n, members), `sha256` (n, media, 32),
        `fingerprint` uint64 (n, 4), an added one.

        rows: a slice or row numbers (default: all). Raises DatasetError when there is no such column, or when the
        column was added before the data set grew.
        """
        array = self._array(name)
        if array.shape[0] < self.rows:
            raise DatasetError(
                f"column {name} of {self.url} covers {array.shape[0]} of {self.rows} clips, which came later; compute it again"
            )
        if rows is None or isinstance(rows, slice):
            return self._values(array, slice(*(rows or slice(None)).indices(self.rows)))
        rows = np.asarray(rows)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.rows:
            raise IndexError(f"row numbers go from {rows.min()} to {rows.max()}; {self.url} has {self.rows} rows")
        return self._values(array.oindex, rows)

    def attrs(self, name: str) -> dict[str, Any]:
        """Attributes given to an added column, or the vocabulary of a coded one."""
        return {k: v for k, v in self._node(name).attrs.items() if k != DIGEST}

    def ragged(self, name: str, rows: slice | None = None) -> Ragged:
        """A column of lists: `keyframes` (frame numbers), `labels` (codes), `key`, `source` and others (UTF-8 bytes)."""
        pair = self._node(name)
        if hasattr(pair, "shape"):
            raise DatasetError(f"column {name} of {self.url} holds numbers; read it by column()")
        begin, end, _ = (rows or slice(None)).indices(self.rows)
        offsets = self._values(self._node(f"{name}/offsets"), slice(begin, max(begin, end) + 1))
        values = self._values(self._node(f"{name}/values"), slice(int(offsets[0]), int(offsets[-1])))
        return Ragged(values, offsets - offsets[0])

    def vocabulary(self, name: str) -> list[str]:
        """Names behind the codes of `labels` or `split`."""
        return list(self._node(name).attrs["vocabulary"])

    def texts(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """`key`, `source`, `split` or `duplicate_of` as a numpy string array (StringDType, (n,)); an element is a plain str."""
        if name in CODED:
            words = np.array([*self.vocabulary(name), ""], dtype=np.dtypes.StringDType())
            return words[self.column(name, rows)]
        values, offsets = self.ragged(name, rows)
        raw = values.tobytes()
        text = raw.decode("ascii") if raw.isascii() else None
        pairs = pairwise(offsets.tolist())
        found = [text[a:b] for a, b in pairs] if text is not None else [raw[a:b].decode() for a, b in pairs]
        return np.array(found, dtype=np.dtypes.StringDType())

    def labels(self, rows: slice | None = None) -> list[tuple[str, ...]]:
        """Label names of every clip."""
        names = self.vocabulary("labels")
        codes, offsets = self.ragged("labels", rows)
        return [tuple(names[c] for c in codes[a:b]) for a, b in pairwise(offsets)]

    def arrow(self, name: str, rows: slice | None = None) -> pa.Array:
        """A column as Arrow has it, (n,), its values shared and not copied: numbers, text, lists of them.

        Raises DatasetError for a column with more than one number a row.
        """
        if name == "split":
            return pa.DictionaryArray.from_arrays(self.column(name, rows), pa.array(self.vocabulary(name), pa.string()))
        if name not in LISTS:
            values = self.column(name, rows)
            if values.ndim != 1:
                raise DatasetError(
                    f"column {name} of {self.url} has {values.shape[1:]} numbers a clip; only single ones can be asked"
                )
            return pa.array(values)
        values, offsets = self.ragged(name, rows)
        if name in TEXTS:
            return pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(values))
        if name == "labels":
            values = pa.DictionaryArray.from_arrays(values, pa.array(self.vocabulary(name), pa.string()))
        return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values) if name != "labels" else values)

    def facts(self, rows: slice | None = None) -> list[Facts]:
        """The facts of some clips, put together from their columns; captions stay in the json member."""
        values, offsets = self.ragged("keyframes", rows)
        columns = {
            **{name: self.column(name, rows).tolist() for name in FACTS},
            **{name: self.texts(name, rows).tolist() for name in TEXTS if name != "key"},
            "labels": self.labels(rows),
            "keyframes": [tuple(values[a:b].tolist()) for a, b in pairwise(offsets)],
            "fingerprint": [
                code.astype(">u8").tobytes().hex() if code.any() else "" for code in self.column("fingerprint", rows)
            ],
        }
        return [Facts(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]

    # --- adding ---

    def add_column(self, name: str, array: Any, attrs: dict[str, Any] | None = None, *, replace: bool = False) -> None:
        """Add a dense column, one row per clip, e.g. embeddings of a named model; it appears whole.

        array: anything with shape (n, ...), dtype (a number) and slices, so also a memory map; attrs: JSON. Raises DatasetError.
        """
        if not _NAME.fullmatch(name) or name in BUILT_IN:
            raise DatasetError(f"column name {name!r} is taken or not usable: letters, digits, '_', '-' and '.' only")
        if len(array.shape) < 1 or array.shape[0] != self.rows:
            raise DatasetError(f"column {name} has shape {tuple(array.shape)}; give one row to each of {self.rows} clips")
        if name in self.added and not replace:
            raise DatasetError(f"column {name} of {self.url} is there already; pass replace=True to write it again")
        home = place(self.url)
        with home.aside(name) as folder:
            group = zarr.create_group(folder, zarr_format=3)
            made = create_array(group, name, array.shape, array.dtype, attrs)
            digest = column_digest(made.shape, made.dtype, dict(made.attrs))
            for rows in row_blocks(made.shape, made.dtype):
                part = np.ascontiguousarray(array[rows], made.dtype)
                digest.update(part)
                made[rows] = part
            made.update_attributes({DIGEST: digest.hexdigest()})
            home.put(folder / name, name)
        self._nodes.pop(name, None)

    # --- inside ---

    def _values(self, array: Any, rows: Any) -> NDArray[Any]:
        try:
            return patiently(lambda: np.asarray(array[rows]))
        except Exception as e:  # whatever zarr, a codec or a bucket makes of what is damaged, gone or forbidden
            raise DatasetError(f"the catalog at {self.url} cannot be read ({e}); {_mend(e)}") from e

    def _array(self, name: str) -> Any:
        array = self._node(name)
        if not hasattr(array, "shape"):
            raise DatasetError(f"column {name} of {self.url} holds text or lists; read it by texts(), ragged() or labels()")
        return array

    def _root(self) -> Any:
        if self._group is None or self._pid != os.getpid():
            # the connections of a remote store are of no use to a child that was forked
            self._nodes, self._pid = {}, os.getpid()
            try:
                files, path = fsspec.core.url_to_fs(self.url)
                local = isinstance(files, LocalFileSystem)
                mode: Literal["r", "r+"] = "r+" if self._writable else "r"
                where = path if local else remote_store(self.url, self.patience, read_only=not self._writable)
                self._group = patiently(lambda: zarr.open_group(where, mode=mode, zarr_format=3))
            except Exception as e:  # each kind of bucket has errors of its own
                raise DatasetError(f"no catalog can be read at {self.url} ({e}); {_mend(e)}") from e
        return self._group

    def _lacks(self) -> list[str]:
        """Columns that came after this catalog was made; what was lost later is not among them."""
        return [name for name in LATER if name not in self._root().attrs.get("later", ())]

    def _node(self, name: str) -> Any:
        root = self._root()
        try:
            if name not in self._nodes:
                column = name.partition("/")[0]
                if column in self._lacks():
                    blank = zarr.create_group(MemoryStore(), zarr_format=3)
                    create_fact(blank, column, self.rows)
                    self._nodes[name] = blank[name]
                else:
                    self._nodes[name] = patiently(lambda: root[name])
            return self._nodes[name]
        except (KeyError, ValueError) as e:
            if name.partition("/")[0] in BUILT_IN:
                raise DatasetError(f"column {name} of {self.url} is missing; opening it for writing mends it") from e
            raise DatasetError(f"no column {name!r} in {self.url}; it has {', '.join(self.columns)}") from e
        except Exception as e:
            raise DatasetError(f"the catalog at {self.url} cannot be read ({e}); {_mend(e)}") from e


def _mend(error: Exception) -> str:
    return "check the network, and try again" if passes(error) else "opening it for writing mends it"
