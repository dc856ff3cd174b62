"""The catalog against the shards: every column is read whole, and every row compared with what its shard says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from cmacc.shards.catalog_writer import CATALOG
from cmacc.shards.clip import KEY, Facts
from cmacc.shards.columns import BUILT_IN, LISTS
from cmacc.shards.dataset import Dataset
from cmacc.shards.lint.columns import mend
from cmacc.shards.lint.faults import Fault, few
from cmacc.shards.lint.shard import Found

_BATCH = 1 << 14  # rows that are compared at once
_Row = tuple[str, Facts, list[int], list[int], list[bytes], int]


class CatalogLint:
    """Shards come in their order, `take` compares; `twice` and `split` are asked at the end, when all have come."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset, self._catalog = dataset, dataset.catalog
        self._mend = mend(dataset)
        self._begins = np.cumsum([0, *(s.clips for s in dataset.meta.shards)])
        self._waiting: list[tuple[int, Found]] = []
        self._rows: list[NDArray[np.int64]] = []
        self._keys: list[NDArray[np.uint64]] = []
        self._sources: list[NDArray[np.uint64]] = []
        self._splits: list[NDArray[np.int32]] = []
        self._split_codes = {"": 0}

    def take(self, number: int, found: Found, last: bool) -> Iterator[Fault]:
        """Compare the rows of a shard, together with those that came before and wait."""
        self._waiting.append((number, found))
        if not last and sum(len(f.rows) for _, f in self._waiting) < _BATCH:
            return
        waiting, self._waiting = self._waiting, []
        rows = slice(int(self._begins[waiting[0][0]]), int(self._begins[waiting[-1][0] + 1]))
        at = 0
        try:
            catalog: Sequence[_Row | None] = self._read(rows)
        except Exception as e:  # whatever zarr or a codec makes of a damaged file
            yield from self._unreadable(rows, e)
            catalog = [None] * (rows.stop - rows.start)
        for number, found in waiting:
            there = catalog[at : at + len(found.rows)]
            yield from few(self._compare(number, found, there), f"the catalog of {self._dataset.meta.shards[number].name}")
            self._remember(int(self._begins[number]), found, there)
            at += len(found.rows)

    def _read(self, rows: slice) -> list[_Row]:
        catalog = self._catalog
        digests = catalog.column("sha256", rows)
        width = digests.shape[1] * 32
        raw = digests.tobytes()
        cut = [[raw[at + i : at + i + 32] for i in range(0, width, 32)] for at in range(0, len(raw), width)]
        return list(
            zip(
                catalog.texts("key", rows).tolist(), catalog.facts(rows), catalog.column("offset", rows).tolist(),
                catalog.column("size", rows).tolist(), cut, catalog.column("shard", rows).tolist(), strict=True,
            )
        )  # fmt: skip

    def _unreadable(self, rows: slice, error: Exception) -> Iterator[Fault]:
        """Which columns it is."""
        bad = 0
        for name in BUILT_IN:
            try:
                self._catalog.ragged(name, rows) if name in LISTS else self._catalog.column(name, rows)
            except Exception as e:
                bad += 1
                said = f"column {name} of the catalog cannot be read ({type(e).__name__}: {e})"
                yield Fault("catalog", f"{CATALOG}/{name}", f"{' '.join(said.split())}; {self._mend}")
        if not bad:
            said = f"the catalog's rows {rows.start} to {rows.stop} cannot be understood ({type(error).__name__}: {error})"
            yield Fault("catalog", CATALOG, f"{' '.join(said.split())}; {self._mend}")

    def _compare(self, number: int, found: Found, there: Sequence[_Row | None]) -> Iterator[Fault]:
        name, foreign = self._dataset.meta.shards[number].name, self._dataset.meta.foreign
        for row, said in zip(found.rows, there, strict=True):
            if said is None or (row is None and not foreign):
                continue
            key, facts, offsets, sizes, digests, shard = said
            where, wrong = f"{name}: {row.key if row else key}", ""
            if shard != number:
                wrong = f"names shard {shard}, not {number}"
            elif row is None:
                wrong = self._foreign(key, offsets, sizes, digests, found) if found.members else ""
            elif key != row.key or offsets != [m.offset for m in row.members] or sizes != [m.size for m in row.members]:
                wrong = f"does not agree with {name}"
            # an earlier version kept no digest of the json member
            elif any(row.sha256) and digests != row.sha256[: len(digests)]:
                wrong = f"has other checksums than the members in {name}"
            elif row.facts is not None and facts != replace(row.facts, captions=()):
                different = [
                    f for f in facts.__dataclass_fields__ if f != "captions" and getattr(facts, f) != getattr(row.facts, f)
                ]
                wrong = f"has other facts than {name} ({', '.join(different)})"
            if wrong:
                yield Fault("catalog", where, f"the catalog row of clip {row.key if row else key} {wrong}; {self._mend}")

    def _foreign(self, key: str, offsets: list[int], sizes: list[int], digests: list[bytes], found: Found) -> str:
        """What is wrong with a row that points into a tar made elsewhere; folders before a name are no part of its key."""
        for extension, offset, size, digest in zip(self._dataset.meta.members, offsets, sizes, digests, strict=True):
            member, sha = found.members.get(offset, (None, b""))
            if member is None or member.size != size:
                return f"has its {extension} at byte {offset}, where there is no member of {size} bytes"
            if member.name.rpartition("/")[2].casefold() != f"{key}.{extension}".casefold():
                return f"has its {extension} at byte {offset}, where there is {member.name!r}"
            if sha and sha != digest:
                return f"has another checksum than {member.name!r}"
        return "" if KEY.fullmatch(key) else "has a key that is not usable"

    def _remember(self, begin: int, found: Found, there: Sequence[_Row | None]) -> None:
        """Hashes of keys and sources: ten million names would take a gigabyte."""
        named: list[tuple[int, str, Facts | None]] = []
        for at, (row, said) in enumerate(zip(found.rows, there, strict=True), begin):
            if row is not None:
                named.append((at, row.key, row.facts))
            elif said is not None and self._dataset.meta.foreign:
                named.append((at, said[0], said[1]))
        if not named:
            return
        self._rows.append(np.array([at for at, _, _ in named], dtype=np.int64))
        self._keys.append(np.array([_hash(key) for _, key, _ in named], dtype=np.uint64))
        self._sources.append(np.array([_hash(f.source) if f else 0 for _, _, f in named], dtype=np.uint64))
        splits = [self._split_codes.setdefault(f.split if f else "", len(self._split_codes)) for _, _, f in named]
        self._splits.append(np.array(splits, dtype=np.int32))

    def twice(self) -> list[tuple[int, int]]:
        """Pairs of rows whose keys have one hash."""
        if not self._rows:
            return []
        keys, rows = np.concatenate(self._keys), np.concatenate(self._rows)
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(np.diff(keys[order]) == 0)
        return list(zip(rows[order[same]].tolist(), rows[order[same + 1]].tolist(), strict=True))

    def apart(self) -> list[tuple[int, int]]:
        """Pairs of rows of one source video that are in different splits, by name; one pair a source."""
        if not self._rows:
            return []
        sources, splits, rows = np.concatenate(self._sources), np.concatenate(self._splits), np.concatenate(self._rows)
        named = np.flatnonzero(splits > 0)
        order = named[np.lexsort((splits[named], sources[named]))]
        differ = np.flatnonzero((np.diff(sources[order]) == 0) & (np.diff(splits[order]) != 0))
        _, first = np.unique(sources[order[differ]], return_index=True)
        return [(int(rows[order[i]]), int(rows[order[i + 1]])) for i in differ[first]]


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")
