"""A data set as its readers see it: `dataset.json`, the catalog's columns, and a clip's bytes by row number."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import ArrayLike, NDArray

from cmacc.shards.blocks import Blocks
from cmacc.shards.cache import Cache
from cmacc.shards.catalog import Catalog
from cmacc.shards.catalog_writer import CATALOG
from cmacc.shards.errors import DatasetError
from cmacc.shards.local import LocalFile, Member
from cmacc.shards.meta import META, Meta, Shard
from cmacc.shards.profile import Profile
from cmacc.shards.remote import PATIENCE_S, File, Span, Unreadable, fetch, sizes, whole
from cmacc.shards.rows import RowCache

__all__ = ["META", "Dataset", "Meta", "Shard"]

log = logging.getLogger(__name__)

_OPEN_FILES = 128
_KEYS_AT_ONCE = 1 << 18  # that are Python strings, ten times the size, for a moment


class Dataset:
    """An opened data set; it shows what was committed when it was opened, whatever is appended later.

    Safe to use from many threads, after a fork, and pickled to another process. Row numbers run from 0 to len - 1
    in the order of the shards and of the clips in them.

    A store that is not local is asked for many ranges at once, and again where the network failed or an answer took longer than
    `patience` seconds; `cache` keeps its blocks on a local disk.
    """

    def __init__(self, url: str, raw: bytes, cache: Cache | None = None, patience: float = PATIENCE_S) -> None:
        self.url = str(url).rstrip("/")
        self._raw = raw
        self._store = lru_cache(1)(lambda pid: fsspec.core.url_to_fs(self.url))
        self._path = self._store(os.getpid())[1]
        self.local = isinstance(self._files, LocalFileSystem)
        self.cache = None if self.local else cache
        self.patience = patience
        self.meta = Meta.from_bytes(raw, f"{self.url}/{META}")
        self._clips = self.meta.clips
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        self.catalog = Catalog(f"{self.url}/{CATALOG}", len(self), self.meta.members, patience=patience)
        # the C cache needs no lock of its own, so a fork cannot leave one held; a file it drops closes with its last reader
        self._open = lru_cache(_OPEN_FILES)(self._open_shard)
        # what threads wait for is of no use to a child that was forked
        self._blocks = lru_cache(1)(lambda pid, cache: Blocks(cache, self.meta.shards, self._fetch))
        self._rows = RowCache(self.catalog)
        self._told = False
        self._sized: set[int] = set()  # shards elsewhere that were seen to be as long as they should be
        self._begins = [0, *accumulate(s.clips for s in self.meta.shards)][:-1]

    @classmethod
    def open(cls, url: str | os.PathLike[str], cache: Cache | None = None, patience: float | None = None) -> Dataset:
        """Open a folder or any fsspec URL; a web server must answer ranges.

        cache: where blocks of shards that are not local are kept. Without one, the environment's CMACC_CACHE names a folder
        for it, and CMACC_CACHE_GB its limit in GB of 10^9 bytes (default: 16). patience: seconds that a store may leave a
        request without its whole answer, besides the time its bytes need at 1 MiB/s; then it is cancelled and asked again.
        Without one, the environment's CMACC_PATIENCE_S (default: 30). Raises DatasetError when there is no data set there that
        this version can read, or the environment asks for what cannot be.
        """
        url = os.fspath(url).rstrip("/")
        patience = _patience_of_environment() if patience is None else patience
        try:
            files, path = fsspec.core.url_to_fs(url)
            raw = whole(files, f"{path}/{META}", patience)
        except FileNotFoundError as e:
            gone = isinstance(files, LocalFileSystem) and not files.exists(path)
            missing = "does not exist" if gone else "is no data set: it has no dataset.json"
            raise DatasetError(f"{url} {missing}; give the folder that `cmacc ingest` wrote") from e
        except Exception as e:  # each kind of bucket has errors of its own
            raise DatasetError(f"{url} cannot be read ({e}); check the address and the right to read it") from e
        if cache is None and not isinstance(files, LocalFileSystem):
            cache = _cache_of_environment()
        return cls(url, raw, cache, patience)

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset, (self.url, self._raw, self.cache, self.patience)

    @property
    def _files(self) -> Any:
        """The file system; an asynchronous one is of no use to a child that was forked, which makes its own."""
        return self._store(os.getpid())[0]

    def __len__(self) -> int:
        """Number of clips."""
        return self._clips

    @cached_property
    def profile(self) -> Profile:
        """How the clips are encoded. Raises DatasetError where every clip of foreign shards is different."""
        if self.meta.profile is None:
            said = f"the clips of {self.url} were made elsewhere and are not alike"
            raise DatasetError(f"{said}; `cmacc reshard {self.url} --out DST --transcode h264` makes a data set to train from")
        return Profile.from_json(self.meta.profile)

    @cached_property
    def keys(self) -> NDArray[Any]:
        """Key of each row, numpy strings (n,). For the rows of a few keys among millions, ask `rows_of`."""
        found = np.empty(len(self), dtype=np.dtypes.StringDType())
        for at in range(0, len(self), _KEYS_AT_ONCE):
            rows = slice(at, min(at + _KEYS_AT_ONCE, len(self)))
            some = self.catalog.texts("key", rows)
            if len(some) < rows.stop - at:
                raise DatasetError(f"{self.catalog.url} lost rows; opening it for writing mends it")
            found[rows] = some
        return found

    @cached_property
    def _key_column(self) -> pa.Array:
        return self.catalog.arrow("key")

    def rows_of(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Row number of each key, int64 (n,). Raises DatasetError for one that is not there.

        Each call goes through the whole column, which stays in memory: ask for many keys at once.
        """
        asked = pa.array(keys, pa.large_string()).dictionary_encode()
        place = pc.index_in(self._key_column, value_set=asked.dictionary)
        there = np.flatnonzero(place.is_valid())
        rows = np.full(len(asked.dictionary), -1, dtype=np.int64)
        rows[place.drop_null().to_numpy()[::-1]] = there[::-1]  # of a key that is there twice, the first
        found = rows[asked.indices.to_numpy(zero_copy_only=False)] if len(asked) else rows
        if len(found) and found.min() < 0:
            missing = keys[int(np.argmin(found))]
            raise DatasetError(f"no clip of {self.url} has the key {missing!r}; `cmacc inspect` shows what is there")
        return found

    @cached_property
    def shard_of_row(self) -> NDArray[np.int32]:
        """Shard number of each row, int32 (n,); a position in `meta.shards`."""
        return np.repeat(np.arange(len(self.meta.shards), dtype=np.int32), [s.clips for s in self.meta.shards])

    def shard_of(self, row: int) -> int:
        """Shard number of one row; without `shard_of_row`, which is as long as the data set."""
        return bisect_right(self._begins, row) - 1

    def keys_of_shard(self, name: str) -> list[str]:
        """Keys of the clips of one shard, in its order. Raises DatasetError when there is no such shard."""
        at = 0
        for shard in self.meta.shards:
            if shard.name == name:
                return [str(key) for key in self.catalog.texts("key", slice(at, at + shard.clips))]
            at += shard.clips
        raise DatasetError(f"{self.url} has no shard {name}")

    def rows(self, split: str | None = None) -> NDArray[np.int64]:
        """Row numbers of all clips, or of one split, ascending, int64. Raises DatasetError for a split nobody is in."""
        if split is None:
            return np.arange(len(self), dtype=np.int64)
        names = self.catalog.vocabulary("split")
        found = np.flatnonzero(self.catalog.column("split") == names.index(split)) if split in names else np.zeros(0, np.int64)
        if not len(found):
            there = ", ".join(repr(n) for n in sorted(set(self.catalog.texts("split"))))
            raise DatasetError(f"no clip of {self.url} is in split {split!r}; its splits are {there or 'none'}")
        return found.astype(np.int64, copy=False)

    def read(self, row: int | str, members: Sequence[str] | None = None, *, check: bool = False) -> dict[str, bytes]:
        """Bytes of some members of a clip (default: all of them), by its row number or its key, in one go straight from its tar.

        check: compare the members with their sha256 in the catalog. Raises DatasetError, IndexError.
        """
        row = int(self.rows_of([row])[0]) if isinstance(row, str) else row
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in {self.url}, which has {len(self)} clips")
        wanted = self.meta.members if members is None else tuple(members)
        unknown = [m for m in wanted if m not in self.meta.members]
        if unknown:
            raise DatasetError(f"clips of {self.url} have no member {unknown[0]!r}; they have {', '.join(self.meta.members)}")
        if not wanted:
            return {}
        columns = [self.meta.members.index(m) for m in wanted]
        offsets, sizes = self.places(slice(row, row + 1))
        spans = [(int(offsets[0, c]), int(sizes[0, c])) for c in columns]
        begin, end = min(o for o, _ in spans), max(o + s for o, s in spans)
        shard = self.shard_of(row)

        def members_now() -> dict[str, bytes]:
            data = self.ranges([(shard, begin, end)])[0]
            return {m: data[o - begin : o - begin + s] for m, (o, s) in zip(wanted, spans, strict=True)}

        found = members_now()
        wrong = self._wrong(row, found) if check else None
        if wrong and self.cache:
            # what the cache has may have been wrong when it was fetched, which its own checksums cannot tell
            for number in range(begin // self.cache.block_bytes, -(-end // self.cache.block_bytes)):
                self.cache.drop(self.meta.shards[shard].sha256, number)
            found = members_now()
            wrong = self._wrong(row, found)
        if wrong:
            raise self.damaged(row, wrong)
        return found

    def read_rows(self, rows: ArrayLike, members: Sequence[str]) -> list[tuple[bytes, ...]]:
        """Bytes of some members of some clips, in any order; elsewhere than on a local disk all are asked for at once.

        Raises DatasetError, IndexError.
        """
        rows = np.asarray(rows, dtype=np.int64)
        columns = [self.meta.members.index(m) for m in members]
        offsets, sizes = self.places(rows)
        begins, ends = offsets[:, columns], (offsets + sizes)[:, columns]
        first, last = begins.min(1), ends.max(1)
        spans = [(self.shard_of(r), b, e) for r, b, e in zip(rows.tolist(), first.tolist(), last.tolist(), strict=True)]
        inner = zip((begins - first[:, None]).tolist(), (ends - first[:, None]).tolist(), strict=True)
        return [
            tuple(data[b:e] for b, e in zip(*places, strict=True)) for data, places in zip(self.ranges(spans), inner, strict=True)
        ]

    def file(self, row: int, member: str) -> io.RawIOBase:
        """A member of a clip as a file that is read as it is wanted, from a local tar; elsewhere all of it is read now.

        Opening it, and reading from it, raises DatasetError where the shard is gone or cut short.
        """
        column = self.meta.members.index(member)
        offsets, sizes = self.places(slice(row, row + 1))
        begin, size = int(offsets[0, column]), int(sizes[0, column])
        shard = self.shard_of(row)
        if not self.local:
            return io.BytesIO(self.ranges([(shard, begin, begin + size)])[0])  # type: ignore[return-value]
        self._open(shard)
        return Member(self.ranges, shard, begin, size)

    def places(self, rows: slice | NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the members of some clips lie in their shards: offsets and sizes, bytes, int64 (n, members) each.

        Only the catalog's chunks that hold these rows are read, and those used last are kept. The arrays may be read-only.
        """
        return self._rows.rows("offset", rows), self._rows.rows("size", rows)

    def numbers(self, name: str, rows: ArrayLike) -> NDArray[Any]:
        """A column of numbers for a few rows, (n, ...), perhaps not to be written to.

        rows: row numbers in any order, (n,). As for `texts` and `first_labels`, only the catalog's chunks that hold them are
        read, and those used last are kept, whatever the size of the data set. Raises DatasetError, IndexError.
        """
        return self._rows.rows(name, rows)

    def texts(self, name: str, rows: ArrayLike) -> list[str]:
        """`key`, `source`, `split` or `duplicate_of` of a few rows. Raises DatasetError, IndexError."""
        return self._rows.texts(name, rows)

    def first_labels(self, rows: ArrayLike) -> NDArray[np.int64]:
        """Code of the first label of a few rows, int64 (n,), -1 for a clip without any. Raises DatasetError, IndexError."""
        return self._rows.first("labels", rows)

    def _wrong(self, row: int, found: dict[str, bytes]) -> str | None:
        """The first member that does not have its sha256."""
        digests = self._rows.rows("sha256", slice(row, row + 1))[0]
        # an earlier version kept no digest of the json member
        for digest, member in zip(digests, self.meta.members, strict=False):
            if member in found and hashlib.sha256(found[member]).digest() != digest.tobytes():
                return member
        return None

    def damaged(self, row: int, member: str) -> DatasetError:
        """What to say of a member whose bytes are not those that were written."""
        shard = self.meta.shards[self.shard_of(row)].name
        where = f"{self.catalog.texts('key', slice(row, row + 1))[0]}.{member} in {self.url}/{shard}"
        return DatasetError(f"{where} has a wrong checksum; copy the shard again, or ingest it again")

    def ranges(self, spans: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """Bytes `begin` to `end` of a shard, for each (shard number, begin, end). Raises DatasetError for what is not there.

        A local file is read span by span; elsewhere all of them are asked for at once, near ones together.
        """
        wanted = [self._inside(*span) for span in spans]
        if self.local:
            return [self._pread(*span) for span in wanted]
        return self._fetch(wanted) if self.cache is None else self._blocks(os.getpid(), self.cache).read(wanted)

    def prefetch(self, spans: Sequence[tuple[int, int, int]]) -> None:
        """Bytes that will be wanted soon, of (shard number, begin, end) each: the system reads ahead in a local file, and a cache
        gets the blocks it lacks, as long as they fit. Without a cache nothing is done.

        What fails is said once and left to who reads it.
        """
        try:
            wanted = [self._inside(*span) for span in spans]
            if self.local:
                for shard, begin, end in wanted:
                    self._open(shard).read_ahead(begin, end)
            elif self.cache is not None:
                self._blocks(os.getpid(), self.cache).prefetch(wanted)
        except (DatasetError, OSError) as e:
            if not self._told:
                self._told = True
                log.warning("nothing is read ahead: %s", e)

    def read_into(self, spans: Sequence[tuple[int, int, memoryview]]) -> None:
        """Fill each buffer with bytes of a shard from `begin` on, for each (shard number, begin, buffer); raises like `ranges`.

        From a local file nothing is copied on the way.
        """
        if not self.local:
            found = self.ranges([(shard, begin, begin + len(buffer)) for shard, begin, buffer in spans])
            for (_, _, buffer), data in zip(spans, found, strict=True):
                buffer[:] = data
            return
        for shard, begin, buffer in spans:
            if self._open(shard).read_into(buffer, begin) < len(buffer):
                self.ranges([(shard, begin, begin + len(buffer))])  # says what is wrong

    def _inside(self, shard: int, begin: int, end: int) -> Span:
        if not 0 <= shard < len(self.meta.shards):
            raise DatasetError(f"there is no shard number {shard} in {self.url}; it has {len(self.meta.shards)}, the first is 0")
        if not 0 <= begin <= end <= self.meta.shards[shard].bytes:
            name = self.meta.shards[shard].name
            raise DatasetError(f"the catalog of {self.url} points outside {name} (bytes {begin} to {end}); run `cmacc lint`")
        return Span(shard, begin, end)

    def _pread(self, shard: int, begin: int, end: int) -> bytes:
        data = self._open(shard).read(begin, end)
        if len(data) < end - begin:
            raise self._cut(Span(shard, begin, end))
        return data

    def _cut(self, span: Span) -> DatasetError:
        entry = self.meta.shards[span.file]
        said = f"{self.url}/{entry.name} is truncated: it should have bytes {span.begin} to {span.end}"
        return DatasetError(f"{said}; copy it again")

    def _fetch(self, spans: list[Span]) -> list[bytes]:
        """Straight from the store."""
        numbers = sorted({s.file for s in spans if s.begin < s.end})
        files = {n: File(f"{self._path}/{self.meta.shards[n].name}", self.meta.shards[n].bytes) for n in numbers}
        try:
            fresh = [n for n in numbers if n not in self._sized]
            for number, size in zip(fresh, sizes(self._files, {n: files[n] for n in fresh}, self.patience), strict=True):
                if size not in (None, files[number].bytes):
                    raise self._changed(number, size)
            self._sized.update(fresh)
            got = iter(fetch(self._files, files, [s for s in spans if s.begin < s.end], self.patience))
        except Unreadable as e:
            entry, why = self.meta.shards[e.span.file], e.__cause__
            if isinstance(why, FileNotFoundError):
                raise DatasetError(f"shard {entry.name} is missing from {self.url}; copy it there again") from e
            if isinstance(why, EOFError):
                raise self._cut(e.span) from e
            said = f"bytes {e.span.begin} to {e.span.end} of {self.url}/{entry.name} cannot be read ({why})"
            raise DatasetError(f"{said}; check the network and the right to read it, and try again") from e
        return [next(got) if s.begin < s.end else b"" for s in spans]

    def _open_shard(self, shard: int) -> LocalFile:
        entry = self.meta.shards[shard]
        try:
            file = LocalFile(f"{self._path}/{entry.name}")
        except FileNotFoundError as e:
            raise DatasetError(f"shard {entry.name} is missing from {self.url}; copy it there again") from e
        if file.size != entry.bytes:
            raise self._changed(shard, file.size)
        return file

    def _changed(self, shard: int, size: int | None) -> DatasetError:
        entry = self.meta.shards[shard]
        said = f"{self.url}/{entry.name} is truncated or changed: {size} bytes, not {entry.bytes}"
        return DatasetError(f"{said}; copy it again")


def _cache_of_environment() -> Cache | None:
    folder, limit = os.environ.get("CMACC_CACHE"), os.environ.get("CMACC_CACHE_GB", "16")
    if not folder:
        return None
    try:
        return Cache(folder, int(float(limit) * 1e9))
    except (ValueError, OverflowError) as e:
        raise DatasetError(f"CMACC_CACHE_GB is {limit!r}; give a number of gigabytes") from e


def _patience_of_environment() -> float:
    said = os.environ.get("CMACC_PATIENCE_S") or PATIENCE_S
    try:
        patience = float(said)
    except ValueError:
        patience = 0.0
    if not 0 < patience < math.inf:
        raise DatasetError(f"CMACC_PATIENCE_S is {said!r}; give a number of seconds")
    return patience
