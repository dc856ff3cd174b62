"""The catalog: one Zarr v3 group, one row per clip, every column on its own.

Numbers are arrays of n rows; text and lists are pairs of arrays, `values` and `offsets` (n + 1), as in Arrow;
labels and splits are codes into a vocabulary kept in the column's attributes; captions stay in the json member alone.
The rows that count are the first `rows`, as `dataset.json` has them: what lies behind them is left from an append that was
never committed.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import zarr
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from cmacc.shards.clip import Facts
from cmacc.shards.errors import DatasetError
from cmacc.shards.index import Member
from cmacc.shards.publish import sync_directory, sync_tree

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

_CHUNK = 8192  # elements read at the least; a shard of 32 chunks is one file, 40 of them at 10 million rows
_CHUNKS_A_SHARD = 32
_DENSE_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A clip as its catalog row will have it. members: in the profile's order; sha256: 32 bytes of each media member."""

    key: str
    facts: Facts
    members: tuple[Member, ...]
    sha256: tuple[bytes, ...]


class Ragged(NamedTuple):
    """Row i is `values[offsets[i]:offsets[i + 1]]`; offsets int64 (n + 1)."""

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    def row(self, i: int) -> NDArray[Any]:
        return self.values[self.offsets[i] : self.offsets[i + 1]]


class Catalog:
    """Columns of the first `rows` clips. Opening costs nothing; each column is read alone, when asked for.

    url: of `catalog.zarr`, local or anything fsspec knows. members: extensions, in the order of `offset` and `size`.
    """

    def __init__(self, url: str, rows: int, members: Sequence[str], *, writable: bool = False) -> None:
        self.url, self.rows, self.members = url, rows, tuple(members)
        self._writable = writable
        self._group: Any = None
        self._nodes: dict[str, Any] = {}

    @classmethod
    def create(cls, path: Path, members: Sequence[str]) -> Catalog:
        """A new, empty catalog in place of whatever was at `path`; it appears by rename."""
        part = path.with_name(f".{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        group = zarr.create_group(part, zarr_format=3, attributes={"members": list(members), "later": list(LATER)})
        media = len(members) - 1
        _array(group, "offset", (len(members),), "int64")
        _array(group, "size", (len(members),), "int64")
        _array(group, "sha256", (media, 32), "uint8")
        for name in ("shard", "split", *FACTS, *LISTS, "fingerprint"):
            _fact(group, name)
        for name in CODED:
            group[name].update_attributes({"vocabulary": []})
        sync_tree(part, 0)
        if path.exists():
            shutil.rmtree(path)
        part.rename(path)
        sync_directory(path.parent)
        return cls(str(path), 0, members, writable=True)

    # --- reading ---

    @property
    def columns(self) -> list[str]:
        """Names of all columns, the ones added later last."""
        return [*_BUILT_IN, *self.added]

    @property
    def added(self) -> list[str]:
        """Names of the columns added later, sorted."""
        return sorted(n for n in self._root().array_keys() if n not in _BUILT_IN and not n.startswith("."))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a column of numbers, rows of an uncommitted append left out."""
        array = self._node(name)
        return min(self.rows, array.shape[0]), *array.shape[1:]

    def column(self, name: str, rows: slice | NDArray[np.integer] | None = None) -> NDArray[Any]:
        """A column of numbers, (n, ...): `shard`, a fact, `offset` or `size` (n, members), `sha256` (n, media, 32),
        `fingerprint` uint64 (n, 4), an added one.

        rows: a slice or row numbers (default: all). Raises DatasetError when there is no such column, or when the
        column was added before the data set grew.
        """
        array = self._node(name)
        if not hasattr(array, "shape"):
            raise DatasetError(f"column {name} of {self.url} holds text or lists; read it by texts(), ragged() or labels()")
        if array.shape[0] < self.rows:
            raise DatasetError(
                f"column {name} of {self.url} covers {array.shape[0]} of {self.rows} clips, which came later; compute it again"
            )
        if rows is None:
            return np.asarray(array[: self.rows])
        if isinstance(rows, slice):
            return np.asarray(array[slice(*rows.indices(self.rows))])
        rows = np.asarray(rows)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.rows:
            raise IndexError(f"row numbers go from {rows.min()} to {rows.max()}; {self.url} has {self.rows} rows")
        return np.asarray(array.oindex[rows])

    def attrs(self, name: str) -> dict[str, Any]:
        """Attributes given to an added column, or the vocabulary of a coded one."""
        return dict(self._node(name).attrs)

    def ragged(self, name: str, rows: slice | None = None) -> Ragged:
        """A column of lists: `keyframes` (frame numbers), `labels` (codes), `key`, `source` and others (UTF-8 bytes)."""
        pair = self._node(name)
        if hasattr(pair, "shape"):
            raise DatasetError(f"column {name} of {self.url} holds numbers; read it by column()")
        begin, end, _ = (rows or slice(None)).indices(self.rows)
        offsets = np.asarray(self._node(f"{name}/offsets")[begin : max(begin, end) + 1])
        return Ragged(np.asarray(self._node(f"{name}/values")[int(offsets[0]) : int(offsets[-1])]), offsets - offsets[0])

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

    # --- writing ---

    def append(self, shard: int, entries: Sequence[Entry]) -> None:
        """Write the rows of one shard after the rows that count, and count them; on disk when it returns."""
        began = time.time_ns() - 1_000_000_000  # file times are coarser than the clock
        at, facts = self.rows, [e.facts for e in entries]
        self._put("shard", at, np.full(len(entries), shard))
        for name in FACTS:
            self._put(name, at, np.array([getattr(f, name) for f in facts]))
        self._put("offset", at, np.array([[m.offset for m in e.members] for e in entries]))
        self._put("size", at, np.array([[m.size for m in e.members] for e in entries]))
        digests = np.frombuffer(b"".join(b"".join(e.sha256) for e in entries), dtype=np.uint8)
        self._put("sha256", at, digests.reshape(len(entries), len(self.members) - 1, 32))
        self._put("split", at, self._codes("split", [(f.split,) for f in facts])[0])
        self._put_lists("key", at, [np.frombuffer(e.key.encode(), dtype=np.uint8) for e in entries])
        self._put_lists("source", at, [np.frombuffer(f.source.encode(), dtype=np.uint8) for f in facts])
        self._put_lists("duplicate_of", at, [np.frombuffer(f.duplicate_of.encode(), dtype=np.uint8) for f in facts])
        fingerprints = np.frombuffer(b"".join(bytes.fromhex(f.fingerprint or "00" * 32) for f in facts), dtype=">u8")
        self._put("fingerprint", at, fingerprints.reshape(len(entries), 4))
        self._put_lists("keyframes", at, [np.array(f.keyframes, dtype=np.int32) for f in facts])
        codes, lengths = self._codes("labels", [f.labels for f in facts])
        self._put_lists("labels", at, np.split(codes, np.cumsum(lengths)[:-1]))
        self.rows += len(entries)
        sync_tree(Path(self.url), began)

    def add_column(self, name: str, array: Any, attrs: dict[str, Any] | None = None, *, replace: bool = False) -> None:
        """Add a dense column, one row per clip, e.g. embeddings of a named model; it appears by rename.

        array: anything with shape (n, ...), dtype (a number) and slices, so also a memory map; attrs: JSON. Raises DatasetError.
        """
        if not _NAME.fullmatch(name) or name in _BUILT_IN:
            raise DatasetError(f"column name {name!r} is taken or not usable: letters, digits, '_', '-' and '.' only")
        if len(array.shape) < 1 or array.shape[0] != self.rows:
            raise DatasetError(f"column {name} has shape {tuple(array.shape)}; give one row to each of {self.rows} clips")
        path = Path(self.url, name)
        if path.exists() and not replace:
            raise DatasetError(f"column {name} of {self.url} is there already; pass replace=True to write it again")
        part = Path(self.url, f".{name}.part")
        shutil.rmtree(part, ignore_errors=True)
        row_bytes = max(1, array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64)))
        chunk = max(1, min(_CHUNK, _DENSE_BYTES // row_bytes))
        step = chunk * _CHUNKS_A_SHARD
        made = zarr.create_array(
            part, shape=array.shape, dtype=array.dtype, chunks=(chunk, *array.shape[1:]), shards=(step, *array.shape[1:]),
            compressors=ZstdCodec(level=3), attributes=attrs or {}, zarr_format=3,
        )  # fmt: skip
        for at in range(0, self.rows, step):
            made[at : at + step] = np.asarray(array[at : at + step])
        sync_tree(part, 0)
        if path.exists():
            shutil.rmtree(path)
        part.rename(path)
        sync_directory(path.parent)
        self._nodes.pop(name, None)

    def grow(self) -> None:
        """Give a catalog that was made by an earlier version the columns it lacks, so that it can be appended to."""
        lacks, root = self._lacks(), self._root()
        if lacks:
            began = time.time_ns() - 1_000_000_000
            for name in lacks:
                if name in root:
                    del root[name]  # of an attempt that was killed
                _fact(root, name, self.rows)
            sync_tree(Path(self.url), began)
            self._group = root.update_attributes({"later": list(LATER)})
            self._nodes.clear()
            sync_tree(Path(self.url), began)

    def intact(self) -> bool:
        """Whether every column holds the rows that count, as far as their last chunk tells."""
        last = slice(max(0, self.rows - 1), self.rows)
        try:
            for name in _BUILT_IN:
                if name not in LISTS:
                    self.column(name, last)
                    continue
                pair = self._node(name)
                ends = pair["offsets"][self.rows : self.rows + 1]
                if len(ends) != 1 or pair["values"].shape[0] < ends[0] or ends[0] < 0:
                    return False
                pair["values"][max(0, int(ends[0]) - 1) : int(ends[0])]
        except Exception:  # whatever zarr or a codec makes of a damaged file
            return False
        return True

    # --- inside ---

    def _root(self) -> Any:
        if self._group is None:
            try:
                files, path = fsspec.core.url_to_fs(self.url)
                where = path if isinstance(files, LocalFileSystem) else self.url
                self._group = zarr.open_group(where, mode="r+" if self._writable else "r", zarr_format=3)
            except (OSError, KeyError, ValueError, zarr.errors.BaseZarrError) as e:
                raise DatasetError(f"no catalog can be read at {self.url} ({e}); opening it for writing mends it") from e
        return self._group

    def _lacks(self) -> list[str]:
        """Columns that came after this catalog was made; what was lost later is not among them."""
        return [name for name in LATER if name not in self._root().attrs.get("later", ())]

    def _node(self, name: str) -> Any:
        try:
            if name not in self._nodes:
                column = name.partition("/")[0]
                if column in self._lacks():
                    blank = zarr.create_group(MemoryStore(), zarr_format=3)
                    _fact(blank, column, self.rows)
                    self._nodes[name] = blank[name]
                else:
                    self._nodes[name] = self._root()[name]
            return self._nodes[name]
        except (KeyError, ValueError) as e:
            raise DatasetError(f"no column {name!r} in {self.url}; it has {', '.join(self.columns)}") from e

    def _put(self, name: str, at: int, values: NDArray[Any]) -> None:
        array = self._node(name)
        array.resize((at + len(values), *array.shape[1:]))
        if len(values):
            array[at : at + len(values)] = values.astype(array.dtype, casting="same_kind")

    def _put_lists(self, name: str, at: int, lists: Sequence[NDArray[Any]]) -> None:
        begin = int(self._node(f"{name}/offsets")[at])
        self._put(f"{name}/values", begin, np.concatenate(lists))
        self._put(f"{name}/offsets", at + 1, begin + np.cumsum([len(x) for x in lists]))

    def _codes(self, name: str, words: Sequence[Sequence[str]]) -> tuple[NDArray[np.int32], list[int]]:
        """Codes of all words, flat, and how many each clip has; new words join the vocabulary first."""
        node = self._node(name)
        code = {word: i for i, word in enumerate(node.attrs["vocabulary"])}
        known = len(code)
        flat = [code.setdefault(word, len(code)) for some in words for word in some]
        if len(code) > known:
            self._nodes[name] = node.update_attributes({"vocabulary": list(code)})
        return np.array(flat, dtype=np.int32), [len(some) for some in words]


_BUILT_IN = (
    "key", "shard", "offset", "size", "source", *FACTS, "keyframes", "labels", "split", "fingerprint", "duplicate_of", "sha256",
)  # fmt: skip


def _fact(group: Any, name: str, rows: int = 0) -> None:
    """Add an array, or a pair of them, of `rows` rows, all 0 or empty, which takes no room."""
    if name in LISTS:
        pair = group.create_group(name)
        _array(pair, "values", (), LISTS[name])
        _array(pair, "offsets", (), "int64", rows + 1)
    elif name == "fingerprint":
        _array(group, name, (4,), "uint64", rows)
    else:
        _array(group, name, (), {"shard": "int32", "split": "int16", **FACTS}[name], rows)


def _array(group: Any, name: str, tail: tuple[int, ...], dtype: str, rows: int = 0) -> None:
    group.create_array(
        name, shape=(rows, *tail), chunks=(_CHUNK, *tail), shards=(_CHUNK * _CHUNKS_A_SHARD, *tail), dtype=dtype,
        compressors=ZstdCodec(level=3), fill_value=0,
    )  # fmt: skip
