"""Writing a catalog: shard by shard as clips come, or all of it at once where every row is known."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmacc.shards.catalog import Catalog, Ragged
from cmacc.shards.clip import Facts
from cmacc.shards.columns import BUILT_IN, FACTS, LATER, LISTS, create_columns, create_fact
from cmacc.shards.index import Member
from cmacc.shards.place import Place

CATALOG = "catalog.zarr"
Column = NDArray[Any] | Ragged


@dataclass(frozen=True, slots=True)
class Entry:
    """A clip as its catalog row will have it. members: in the data set's order; sha256: 32 bytes of each of them."""

    key: str
    facts: Facts
    members: tuple[Member, ...]
    sha256: tuple[bytes, ...]


class CatalogWriter(Catalog):
    """The catalog of the data set at `home`, to append to."""

    def __init__(self, home: Place, rows: int, members: Sequence[str]) -> None:
        super().__init__(f"{home.url}/{CATALOG}", rows, members, writable=True)
        self._home = home

    @classmethod
    def create(cls, home: Place, members: Sequence[str]) -> CatalogWriter:
        """A new, empty catalog in place of whatever was there."""
        with home.aside(CATALOG) as folder:
            create_columns(folder, tuple(members))
            home.put(folder, CATALOG)
        return cls(home, 0, members)

    @classmethod
    def write(cls, home: Place, members: Sequence[str], columns: dict[str, Column], words: dict[str, list[str]]) -> CatalogWriter:
        """A whole catalog in place of whatever was there. columns: every built-in one, an array (n, ...) or lists of n rows;
        words: the vocabularies of `labels` and `split`."""
        with home.aside(CATALOG) as folder:
            group = create_columns(folder, tuple(members))
            for name, values in columns.items():
                pair = {"values": values.values, "offsets": values.offsets} if isinstance(values, Ragged) else {"": values}
                for part, array in pair.items():
                    node = group[f"{name}/{part}".rstrip("/")]
                    node.resize(array.shape)
                    step = node.shards[0]
                    for at in range(0, len(array), step):
                        node[at : at + step] = array[at : at + step].astype(node.dtype, casting="same_kind", copy=False)
            for name, vocabulary in words.items():
                group[name].update_attributes({"vocabulary": vocabulary})
            home.put(folder, CATALOG)
        return cls(home, len(columns["shard"]), members)

    def append(self, shard: int | NDArray[np.int32], entries: Sequence[Entry]) -> None:
        """Write the rows of one shard, or of many (shard: int32 (n,)), after the rows that count, and count them; on disk when
        it returns."""
        began = time.time_ns() - 1_000_000_000  # file times are coarser than the clock
        at, facts = self.rows, [e.facts for e in entries]
        self._put("shard", at, np.full(len(entries), shard))
        for name in FACTS:
            self._put(name, at, np.array([getattr(f, name) for f in facts]))
        self._put("offset", at, np.array([[m.offset for m in e.members] for e in entries]))
        self._put("size", at, np.array([[m.size for m in e.members] for e in entries]))
        digests = np.frombuffer(b"".join(b"".join(e.sha256) for e in entries), dtype=np.uint8).reshape(len(entries), -1, 32)
        self._put("sha256", at, digests[:, : self._node("sha256").shape[1]])  # an earlier version left out the json member's
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
        self._home.settle(CATALOG, began)

    def grow(self) -> None:
        """Give a catalog that was made by an earlier version the columns it lacks, so that it can be appended to."""
        lacks, root = self._lacks(), self._root()
        if lacks:
            began = time.time_ns() - 1_000_000_000
            for name in lacks:
                if name in root:
                    del root[name]  # of an attempt that was killed
                create_fact(root, name, self.rows)
            self._home.settle(CATALOG, began)
            self._group = root.update_attributes({"later": list(LATER)})
            self._nodes.clear()
            self._home.settle(CATALOG, began)

    def intact(self) -> bool:
        """Whether every column holds the rows that count, as far as their last chunk tells."""
        last = slice(max(0, self.rows - 1), self.rows)
        try:
            for name in BUILT_IN:
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
