"""A data set as its readers see it: `dataset.json`, the catalog's columns, and a clip's bytes by row number."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cmacc.shards.catalog import Catalog
from cmacc.shards.catalog_writer import CATALOG
from cmacc.shards.errors import DatasetError
from cmacc.shards.profile import Profile

FORMAT = 1
META = "dataset.json"
_OPEN_FILES = 128
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.tar")


class Shard(BaseModel):
    """One tar of the data set. clips: how many; bytes: its size; sha256: hex digest of the whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    clips: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not _SHARD.fullmatch(name):
            raise ValueError("a shard is a .tar in the data set's own folder")
        return name

    @model_validator(mode="after")
    def _possible(self) -> Shard:
        if self.clips * tarfile.BLOCKSIZE > self.bytes:
            raise ValueError("the shard has more clips than its bytes can hold")
        return self


class Meta(BaseModel):
    """`dataset.json`. members: extensions every clip has; provenance: whatever its maker wants kept (JSON).

    foreign: the shards were made elsewhere and indexed where they lie: their json member, if there is one, is not ours, they
    may hold other things besides, and the profile is None unless all clips are alike and as one of ours could be.
    """

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    profile: dict[str, Any] | None
    foreign: bool = False
    members: tuple[str, ...]
    provenance: dict[str, Any] = Field(default_factory=dict)
    shards: list[Shard] = Field(default_factory=list)

    @field_validator("profile")
    @classmethod
    def _known(cls, profile: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if profile is None else Profile.from_json(profile).to_json()

    @field_validator("shards")
    @classmethod
    def _distinct(cls, shards: list[Shard]) -> list[Shard]:
        if len({s.name for s in shards}) < len(shards):
            raise ValueError("a shard is named twice")
        return shards

    @model_validator(mode="after")
    def _complete(self) -> Meta:
        media = [m for m in self.members if m != "json"]
        if not media or len(set(self.members)) < len(self.members) or not (self.foreign or self.members == (*media, "json")):
            raise ValueError("members are one or two media extensions, and json last")
        if self.profile is None and not self.foreign:
            raise ValueError("there is no profile")
        return self

    @property
    def clips(self) -> int:
        """How many, in all shards."""
        return sum(s.clips for s in self.shards)

    def to_bytes(self) -> bytes:
        """The file's content; the same data set always gives the same bytes."""
        return (json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Meta:
        """Raises DatasetError; `where` names the file in it."""
        try:
            found = json.loads(data)
            if isinstance(found, dict) and isinstance(found.get("format"), int) and found["format"] > FORMAT:
                raise DatasetError(f"{where} has format {found['format']}, this cmacc reads {FORMAT}: upgrade cmacc")
            return cls.model_validate(found)
        except ValidationError as e:
            first = e.errors()[0]
            place = ".".join(map(str, first["loc"])) or "top"
            raise DatasetError(f"{where} is not usable at {place}: {first['msg']}; restore it from a copy") from e
        except (ValueError, RecursionError) as e:
            raise DatasetError(f"{where} is not JSON ({e}); restore it from a copy") from e


class Dataset:
    """An opened data set; it shows what was committed when it was opened, whatever is appended later.

    Safe to use from many threads, after a fork, and pickled to another process. Row numbers run from 0 to len - 1
    in the order of the shards and of the clips in them.
    """

    def __init__(self, url: str, raw: bytes) -> None:
        self.url = str(url).rstrip("/")
        self._raw = raw
        self._files, self._path = fsspec.core.url_to_fs(self.url)
        self.meta = Meta.from_bytes(raw, f"{self.url}/{META}")
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        self.catalog = Catalog(f"{self.url}/{CATALOG}", len(self), self.meta.members)
        # the C cache needs no lock of its own, so a fork cannot leave one held; a file it drops closes with its last reader
        self._open = lru_cache(_OPEN_FILES)(self._open_shard)

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> Dataset:
        """Open a folder or any fsspec URL. Raises DatasetError when there is no data set there that this version can read."""
        url = os.fspath(url).rstrip("/")
        try:
            files, path = fsspec.core.url_to_fs(url)
            raw = files.cat_file(f"{path}/{META}")
        except FileNotFoundError as e:
            missing = "is no data set: it has no dataset.json" if files.exists(path) else "does not exist"
            raise DatasetError(f"{url} {missing}; give the folder that `cmacc ingest` wrote") from e
        except Exception as e:  # each kind of bucket has errors of its own
            raise DatasetError(f"{url} cannot be read ({e}); check the address and the right to read it") from e
        return cls(url, raw)

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset, (self.url, self._raw)

    def __len__(self) -> int:
        """Number of clips."""
        return self.meta.clips

    @cached_property
    def profile(self) -> Profile:
        """How the clips are encoded. Raises DatasetError where every clip of foreign shards is different."""
        if self.meta.profile is None:
            said = f"the clips of {self.url} were made elsewhere and are not alike"
            raise DatasetError(f"{said}; `cmacc reshard {self.url} --out DST --transcode h264` makes a data set to train from")
        return Profile.from_json(self.meta.profile)

    @cached_property
    def keys(self) -> NDArray[Any]:
        """Key of each row, numpy strings (n,)."""
        return self.catalog.texts("key")

    @cached_property
    def shard_of_row(self) -> NDArray[np.int32]:
        """Shard number of each row, int32 (n,); a position in `meta.shards`."""
        return np.repeat(np.arange(len(self.meta.shards), dtype=np.int32), [s.clips for s in self.meta.shards])

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

    def read(self, row: int, members: Sequence[str] | None = None, *, check: bool = False) -> dict[str, bytes]:
        """Bytes of some members of a clip (default: all of them), read in one go straight from its tar.

        check: compare the media members with their sha256 in the catalog. Raises DatasetError, IndexError.
        """
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
        data = self.ranges([(int(self.shard_of_row[row]), begin, end)])[0]
        found = {m: data[o - begin : o - begin + s] for m, (o, s) in zip(wanted, spans, strict=True)}
        if check:
            self._check(row, found)
        return found

    def places(self, rows: slice | NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the members of some clips lie in their shards: offsets and sizes, bytes, int64 (n, members) each."""
        offsets, sizes = self._places
        return offsets[rows], sizes[rows]

    @cached_property
    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self.catalog.column("offset"), self.catalog.column("size")

    def _check(self, row: int, found: dict[str, bytes]) -> None:
        digests = self.catalog.column("sha256", slice(row, row + 1))[0]
        # an earlier version kept no digest of the json member
        for digest, member in zip(digests, self.meta.members, strict=False):
            if member in found and hashlib.sha256(found[member]).digest() != digest.tobytes():
                raise self.damaged(row, member)

    def damaged(self, row: int, member: str) -> DatasetError:
        """What to say of a member whose bytes are not those that were written."""
        shard = self.meta.shards[self.shard_of_row[row]].name
        where = f"{self.catalog.texts('key', slice(row, row + 1))[0]}.{member} in {self.url}/{shard}"
        return DatasetError(f"{where} has a wrong checksum; copy the shard again, or ingest it again")

    def ranges(self, spans: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """Bytes `begin` to `end` of a shard, for each (shard number, begin, end). Raises DatasetError for what is not there."""
        return [self._range(*span) for span in spans]

    def _range(self, shard: int, begin: int, end: int) -> bytes:
        if not 0 <= begin <= end <= self.meta.shards[shard].bytes:
            name = self.meta.shards[shard].name
            raise DatasetError(f"the catalog of {self.url} points outside {name} (bytes {begin} to {end}); run `cmacc lint`")
        file = self._open(shard)
        data = file.read(begin, end) if isinstance(file, _LocalFile) else self._files.cat_file(file, start=begin, end=end)
        if len(data) < end - begin:
            entry = self.meta.shards[shard]
            raise DatasetError(f"{self.url}/{entry.name} is truncated: it should have bytes {begin} to {end}; copy it again")
        return data

    def _open_shard(self, shard: int) -> _LocalFile | str:
        entry = self.meta.shards[shard]
        path = f"{self._path}/{entry.name}"
        try:
            file = _LocalFile(path) if isinstance(self._files, LocalFileSystem) else path
            size = file.size if isinstance(file, _LocalFile) else self._files.size(path)
        except FileNotFoundError as e:
            raise DatasetError(f"shard {entry.name} is missing from {self.url}; copy it there again") from e
        if size != entry.bytes:
            raise DatasetError(f"{self.url}/{entry.name} is truncated or changed: {size} bytes, not {entry.bytes}; copy it again")
        return file


class _LocalFile:
    """An open file read by position alone, so that threads and forked processes share it without a lock."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._fd).st_size

    def read(self, begin: int, end: int) -> bytes:
        data = os.pread(self._fd, end - begin, begin)
        while data and len(data) < end - begin:
            more = os.pread(self._fd, end - begin - len(data), begin + len(data))
            if not more:
                break
            data += more
        return data

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)
