"""Writing a data set: clips in, shards committed one by one; whatever happens, what was committed stays."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cmacc.shards.catalog import Catalog, Entry
from cmacc.shards.clip import Clip, Facts
from cmacc.shards.dataset import CATALOG, META, Meta, Shard
from cmacc.shards.errors import DatasetError
from cmacc.shards.facts import facts_from_json, facts_to_json
from cmacc.shards.index import Member, clips, index_paths, scan, write_indexes
from cmacc.shards.profile import Profile
from cmacc.shards.publish import PartFile, clear_parts, no_room_as, publish, sync_directory
from cmacc.shards.tar import tar_bytes, tar_end, tar_member, tar_padding

log = logging.getLogger(__name__)

_OURS = re.compile(r"(clips-\d{6})\.(tar|idx|tar\.idx)")


class DatasetWriter:
    """Creates the data set at `path`, or continues it; one writer at a time, used from one thread, as a context manager.

    A clean exit commits the open shard. An exception discards it and leaves all that was committed.

    profile: how the clips are encoded; a data set has one.
    shard_bytes: a shard is closed before it would grow past this; a single larger clip has a shard to itself.
    shard_clips: nor has it more clips than this (default: any number); what is held in memory grows with them.
    provenance: JSON kept in dataset.json; on continuing, new entries join those there.
    members: extensions of each clip, `json` last (default: the profile's).
    on_commit: called with a shard's name and keys once dataset.json names it; should a kill come between, `keys` has them.

    Raises DatasetError: a different profile, another writer at work, a damaged data set, no room on the disk.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        profile: Profile,
        *,
        shard_bytes: int = 256 * 2**20,
        shard_clips: int | None = None,
        provenance: dict[str, Any] | None = None,
        members: Sequence[str] | None = None,
        on_commit: Callable[[str, list[str]], None] | None = None,
    ) -> None:
        if "://" in os.fspath(path):
            raise DatasetError(f"{path} is not a local folder; write to one and copy it there when it is done")
        if shard_bytes < 1:
            raise DatasetError(f"shard_bytes is {shard_bytes}; give 1 or more")
        self.path = Path(path)
        self.shard_bytes, self.shard_clips = shard_bytes, shard_clips
        self.members = tuple(members or profile.members)
        self._on_commit = on_commit
        self._shard: _OpenShard | None = None
        with no_room_as(DatasetError, f"no room on the disk of {self.path}; free some and start again"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path)
            try:
                self._meta = self._recover(profile, provenance or {})
                self._catalog = _catalog(self.path, self._meta)
            except BaseException:
                os.close(self._lock)
                raise
        self.keys: set[str] = set(self._catalog.texts("key"))

    def add(self, clip: Clip) -> None:
        """Append a clip, closing the open shard first if it would grow too large.

        Raises DatasetError when the key is there already, a member is missing, or the disk is full: then the clips
        of the open shard are lost, all others stay.
        """
        if clip.key in self.keys:
            raise DatasetError(f"clip {clip.key} is in {self.path} already; a key is written once: leave out those in `keys`")
        if set(clip.members) != set(self.members[:-1]) or not all(clip.members.values()):
            found = ", ".join(sorted(m for m, data in clip.members.items() if data)) or "nothing"
            raise DatasetError(f"clip {clip.key} has {found}; {self.path} wants {', '.join(self.members[:-1])} of every clip")
        try:
            sample = {**{m: clip.members[m] for m in self.members[:-1]}, "json": facts_to_json(clip.facts)}
        except ValueError as e:
            raise DatasetError(f"the facts of clip {clip.key} cannot be written ({e}); every number must be finite") from e
        if self._shard and (
            tar_bytes(self._shard.offset, sample.values()) > self.shard_bytes or len(self._shard.facts) == self.shard_clips
        ):
            self.cut()
        with self._or_discard():
            if self._shard is None:
                self._shard = _OpenShard(self.path / f"clips-{len(self._meta.shards):06d}.tar")
            self._shard.add(clip.key, clip.facts, sample)
        self.keys.add(clip.key)

    def cut(self) -> None:
        """Commit the open shard, if there is one, so that the next clip begins a new shard. Raises DatasetError."""
        shard = self._shard
        if shard is None:
            return
        with self._or_discard():
            entry, rows = shard.finish(self.members)
            self._catalog.append(len(self._meta.shards), rows)
            meta = self._meta.model_copy(update={"shards": [*self._meta.shards, entry]})
            publish(self.path / META, meta.to_bytes())
        self._meta, self._shard = meta, None
        log.info("committed %s: %d clips, %d bytes", entry.name, entry.clips, entry.bytes)
        if self._on_commit:
            self._on_commit(entry.name, [e.key for e in rows])

    def adopt(self, tar: Path) -> str:
        """Take over a shard of another data set with this profile and these members, with its indexes; returns its new name.

        Its bytes are verified, not copied, where both lie on one disk (a hard link); the other data set may be deleted then.
        Closes the open shard first. Raises DatasetError: a damaged shard, or a clip that is here already.
        """
        self.cut()
        rows = _rows_of(tar, self.members)
        if twice := next((row.key for row in rows if row.key in self.keys), None):
            raise DatasetError(f"clip {twice} of {tar} is in {self.path} already; a key is written once")
        path = self.path / f"clips-{len(self._meta.shards):06d}.tar"
        with no_room_as(DatasetError, f"no room on the disk of {self.path}; free some and start again"):
            with tar.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            entry = Shard(name=path.name, clips=len(rows), bytes=tar.stat().st_size, sha256=digest)
            for source, target in zip((*index_paths(tar), tar), (*index_paths(path), path), strict=True):
                _link(source, target)
            sync_directory(self.path)
            self._catalog.append(len(self._meta.shards), rows)
            meta = self._meta.model_copy(update={"shards": [*self._meta.shards, entry]})
            publish(self.path / META, meta.to_bytes())
        self._meta = meta
        self.keys.update(row.key for row in rows)
        if self._on_commit:
            self._on_commit(entry.name, [row.key for row in rows])
        return entry.name

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.cut()
            else:
                self._discard()
        finally:
            os.close(self._lock)

    @contextlib.contextmanager
    def _or_discard(self) -> Any:
        room = f"no room on the disk of {self.path} for more clips; what was committed stays: free some and run again"
        try:
            with no_room_as(DatasetError, room):
                yield
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        shard, self._shard = self._shard, None
        if shard is None:
            return
        there = self._read_meta()
        if len(there.shards) > len(self._meta.shards):
            self._meta = there  # interrupted after dataset.json had its name: the shard is committed
            return
        self.keys.difference_update(shard.facts)
        self._catalog.rows = self._meta.clips
        shard.discard()

    def _read_meta(self) -> Meta:
        file = self.path / META
        return Meta.from_bytes(file.read_bytes(), str(file))

    def _recover(self, profile: Profile, provenance: dict[str, Any]) -> Meta:
        """Read or make dataset.json, and remove what a dead writer left."""
        clear_parts(self.path)
        if not (self.path / META).exists():
            if any(self.path.glob("*.tar")):
                raise DatasetError(f"{self.path} has shards but no dataset.json; restore it, or write to another folder")
            Catalog.create(self.path / CATALOG, self.members)
            meta = Meta(profile=profile.to_json(), members=self.members, provenance=provenance)
            publish(self.path / META, meta.to_bytes())
            return meta
        meta = self._read_meta()
        if Profile.from_json(meta.profile) != profile or meta.members != self.members:
            changed = ", ".join(k for k, v in profile.to_json().items() if meta.profile[k] != v) or "members"
            raise DatasetError(f"{self.path} was written with another profile ({changed} differ); use it, or another folder")
        names = {s.name for s in meta.shards}
        for found in self.path.iterdir():
            ours = _OURS.fullmatch(found.name)
            if ours and f"{ours[1]}.tar" not in names:
                log.warning("removing %s, left by a writer that died", found)
                found.unlink()
        if provenance:
            meta.provenance = {**meta.provenance, **provenance}
        return meta


class _OpenShard:
    """The shard being written, aside. offset: bytes of the tar so far; facts: by key, in the tar's order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Facts] = {}
        self._sha256: dict[str, bytes] = {}
        self._file = PartFile(path)

    @property
    def offset(self) -> int:
        return self._file.bytes

    def add(self, key: str, facts: Facts, sample: dict[str, bytes]) -> None:
        for extension, data in sample.items():
            name = f"{key}.{extension}"
            self._file.write(tar_member(name, len(data)))
            self._file.write(data)
            self._file.write(tar_padding(len(data)))
            self._sha256[name] = hashlib.sha256(data).digest()
        self.facts[key] = facts

    def finish(self, members: tuple[str, ...]) -> tuple[Shard, list[Entry]]:
        """Write the tar's end and both indexes, give them their names, the tar last; returns its entry and catalog rows."""
        self._file.write(tar_end(self._file.bytes))
        self._file.sync()
        found = scan(self._file.part)
        write_indexes(self.path, found)
        rows = [
            Entry(key, self.facts[key], _in_order(group, members), tuple(self._sha256[f"{key}.{m}"] for m in members[:-1]))
            for key, group in clips(found)
        ]
        self._file.publish()
        return Shard(name=self.path.name, clips=len(rows), bytes=self._file.bytes, sha256=self._file.sha256), rows

    def discard(self) -> None:
        self._file.discard()
        for path in (self.path, *index_paths(self.path)):
            path.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(source, part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(target)


def _lock(path: Path) -> int:
    """Hold the data set for this writer; the lock goes with the process, however that ends."""
    fd = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(fd)
        raise DatasetError(f"another writer is at work on {path}; wait for it to end, or stop it") from e
    except OSError as e:
        os.close(fd)
        raise DatasetError(f"{path} cannot be locked ({e}); write to a disk that knows flock, and copy from there") from e
    return fd


def _in_order(group: list[Member], members: tuple[str, ...]) -> tuple[Member, ...]:
    by_extension = {m.extension: m for m in group}
    if len(by_extension) != len(group) or set(by_extension) != set(members):
        found = ", ".join(m.extension for m in group)
        raise DatasetError(f"clip {group[0].key} has members {found} in its tar, not {', '.join(members)}; write it again")
    return tuple(by_extension[m] for m in members)


def _catalog(path: Path, meta: Meta) -> Catalog:
    """The catalog, ready to append to; made again from the tars when it lost rows that count."""
    url = path / CATALOG
    for left in (*url.rglob("*.partial"), *url.glob(".*.part")):  # zarr's own, and a dense column's, of a dead writer
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    catalog = Catalog(str(url), meta.clips, meta.members, writable=True)
    if catalog.intact():
        catalog.grow()
        return catalog
    log.warning("%s lost rows; making it again from the shards", url)
    catalog = Catalog.create(url, meta.members)
    for number, shard in enumerate(meta.shards):
        catalog.append(number, _rows_of(path / shard.name, meta.members))
    if catalog.rows != meta.clips:
        raise DatasetError(f"the shards of {path} hold {catalog.rows} clips, dataset.json says {meta.clips}; run `cmacc lint`")
    return catalog


def _rows_of(tar: Path, members: tuple[str, ...]) -> list[Entry]:
    """Catalog rows of a shard, from the shard itself. Raises DatasetError when it is damaged."""

    def read(m: Member) -> bytes:
        file.seek(m.offset)
        return file.read(m.size)

    try:
        with tar.open("rb") as file:
            groups = [(key, _in_order(group, members)) for key, group in clips(scan(tar))]
            return [
                Entry(key, facts_from_json(read(group[-1])), group, tuple(hashlib.sha256(read(m)).digest() for m in group[:-1]))
                for key, group in groups
            ]
    except (OSError, ValueError, tarfile.TarError) as e:
        raise DatasetError(f"shard {tar} cannot be read ({e}); copy it again") from e
