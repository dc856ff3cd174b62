"""Writing a data set: clips in, shards committed one by one; whatever happens, what was committed stays."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from numpy.typing import NDArray

from cmacc.shards.catalog_writer import CATALOG, CatalogWriter, Entry
from cmacc.shards.clip import Clip, Facts
from cmacc.shards.dataset import META, Meta, Shard
from cmacc.shards.errors import DatasetError
from cmacc.shards.facts import facts_from_json, facts_to_json
from cmacc.shards.index import Member, clips, index_names, publish_indexes, scan
from cmacc.shards.place import Place, place
from cmacc.shards.profile import Profile
from cmacc.shards.publish import no_room_as
from cmacc.shards.tar import tar_bytes, tar_end, tar_member, tar_padding

log = logging.getLogger(__name__)

_OURS = re.compile(r"(clips-\d{6})\.(tar|idx|tar\.idx)")


class DatasetWriter:
    """Creates the data set at `path` (a folder or any fsspec URL), or continues it; one writer at a time, used from one thread,
    as a context manager.

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
        if shard_bytes < 1:
            raise DatasetError(f"shard_bytes is {shard_bytes}; give 1 or more")
        self.home = place(path)
        self.shard_bytes, self.shard_clips = shard_bytes, shard_clips
        self.members = tuple(members or profile.members)
        self._on_commit = on_commit
        self._shard: _OpenShard | None = None
        self._held = contextlib.ExitStack()
        with self._room(), self._held as held:
            held.enter_context(self.home.lock())
            self._meta = self._recover(profile, provenance or {})
            self._catalog = _catalog(self.home, self._meta)
            self._held = held.pop_all()
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
                self._shard = _OpenShard(self.home, f"clips-{len(self._meta.shards):06d}.tar")
            self._shard.add(clip.key, clip.facts, sample)
        self.keys.add(clip.key)

    def cut(self) -> None:
        """Commit the open shard, if there is one, so that the next clip begins a new shard. Raises DatasetError."""
        shard = self._shard
        if shard is None:
            return
        with self._or_discard():
            entry, rows = shard.finish()
            self._catalog.append(len(self._meta.shards), rows)
            meta = self._meta.model_copy(update={"shards": [*self._meta.shards, entry]})
            self.home.publish(META, meta.to_bytes())
        self._meta, self._shard = meta, None
        log.info("committed %s: %d clips, %d bytes", entry.name, entry.clips, entry.bytes)
        if self._on_commit:
            self._on_commit(entry.name, [e.key for e in rows])

    def adopt(self, tar: Path) -> str:
        """Take over a shard of another data set with this profile and these members, with its indexes; returns its new name.

        Its bytes are verified, and not copied where both lie on one disk (a hard link); the other data set may be deleted then.
        Closes the open shard first. Raises DatasetError: a damaged shard, or a clip that is here already.
        """
        self.cut()
        rows = _rows_of(tar.open("rb"), str(tar), self.members)
        if twice := next((row.key for row in rows if row.key in self.keys), None):
            raise DatasetError(f"clip {twice} of {tar} is in {self.path} already; a key is written once")
        name = f"clips-{len(self._meta.shards):06d}.tar"
        with self._room():
            with tar.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            entry = Shard(name=name, clips=len(rows), bytes=tar.stat().st_size, sha256=digest)
            for index in index_names(name):
                self.home.adopt(tar.with_name(tar.stem + index.removeprefix(Path(name).stem)), index)
            self.home.adopt(tar, name)
            self._catalog.append(len(self._meta.shards), rows)
            meta = self._meta.model_copy(update={"shards": [*self._meta.shards, entry]})
            self.home.publish(META, meta.to_bytes())
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
            self._held.close()

    @property
    def path(self) -> str:
        """Folder or URL of the data set."""
        return self.home.url

    def _room(self) -> contextlib.AbstractContextManager[None]:
        room = f"no room on the disk of {self.path} for more clips; what was committed stays: free some and run again"
        return no_room_as(DatasetError, room)

    @contextlib.contextmanager
    def _or_discard(self) -> Iterator[None]:
        try:
            with self._room():
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
        return Meta.from_bytes(self.home.read(META), f"{self.path}/{META}")

    def _recover(self, profile: Profile, provenance: dict[str, Any]) -> Meta:
        """Read or make dataset.json, and remove what a dead writer left."""
        self.home.clear()
        found = self.home.names()
        if META not in found:
            if any(name.endswith(".tar") for name in found):
                raise DatasetError(f"{self.path} has shards but no dataset.json; restore it, or write to another folder")
            CatalogWriter.create(self.home, self.members)
            meta = Meta(profile=profile.to_json(), members=self.members, provenance=provenance)
            self.home.publish(META, meta.to_bytes())
            return meta
        meta = self._read_meta()
        if meta.foreign:
            raise DatasetError(f"{self.path} has shards that were made elsewhere, and is read only; write to another folder")
        if meta.profile != profile.to_json() or meta.members != self.members:
            changed = ", ".join(k for k, v in profile.to_json().items() if (meta.profile or {}).get(k) != v) or "members"
            raise DatasetError(f"{self.path} was written with another profile ({changed} differ); use it, or another folder")
        names = {s.name for s in meta.shards}
        for name in found:
            ours = _OURS.fullmatch(name)
            if ours and f"{ours[1]}.tar" not in names:
                log.warning("removing %s/%s, left by a writer that died", self.path, name)
                self.home.remove(name)
        if provenance:
            meta.provenance = {**meta.provenance, **provenance}
        return meta


class _OpenShard:
    """The shard being written, aside. offset: bytes of the tar so far; facts: by key, in the tar's order."""

    def __init__(self, home: Place, name: str) -> None:
        self.name = name
        self.facts: dict[str, Facts] = {}
        self._rows: list[Entry] = []
        self._home = home
        self._file = home.create(name)

    @property
    def offset(self) -> int:
        return self._file.bytes

    def add(self, key: str, facts: Facts, sample: dict[str, bytes]) -> None:
        members = []
        for extension, data in sample.items():
            name, begin = f"{key}.{extension}", self._file.bytes
            header = tar_member(name, len(data))
            for part in (header, data, tar_padding(len(data))):
                self._file.write(part)
            members.append(Member(name, begin, begin + len(header), len(data)))
        self.facts[key] = facts
        self._rows.append(Entry(key, facts, tuple(members), tuple(hashlib.sha256(data).digest() for data in sample.values())))

    def finish(self) -> tuple[Shard, list[Entry]]:
        """Write the tar's end and both indexes, give them their names, the tar last; returns its entry and catalog rows."""
        self._file.write(tar_end(self._file.bytes))
        self._file.sync()
        publish_indexes(self._home, self.name, [m for row in self._rows for m in row.members])
        self._file.publish()
        return Shard(name=self.name, clips=len(self._rows), bytes=self._file.bytes, sha256=self._file.sha256), self._rows

    def discard(self) -> None:
        self._file.discard()
        for name in (self.name, *index_names(self.name)):
            self._home.remove(name)


def _in_order(group: list[Member], members: tuple[str, ...]) -> tuple[Member, ...]:
    by_extension = {m.extension: m for m in group}
    if len(by_extension) != len(group) or set(by_extension) != set(members):
        found = ", ".join(m.extension for m in group)
        raise DatasetError(f"clip {group[0].key} has members {found} in its tar, not {', '.join(members)}; write it again")
    return tuple(by_extension[m] for m in members)


def _catalog(home: Place, meta: Meta) -> CatalogWriter:
    """The catalog, ready to append to; made again from the tars when it lost rows that count."""
    for left in home.names(CATALOG):
        if left.startswith("."):  # a dense column's part, of a dead writer
            home.remove(f"{CATALOG}/{left}")
    catalog = CatalogWriter(home, meta.clips, meta.members)
    if catalog.intact():
        catalog.grow()
        return catalog
    log.warning("%s/%s lost rows; making it again from the shards", home.url, CATALOG)
    added = _added(catalog)
    catalog = CatalogWriter.create(home, meta.members)
    for number, shard in enumerate(meta.shards):
        catalog.append(number, _rows_of(home.open(shard.name), f"{home.url}/{shard.name}", meta.members))
    if catalog.rows != meta.clips:
        raise DatasetError(
            f"the shards of {home.url} hold {catalog.rows} clips, dataset.json says {meta.clips}; run `cmacc lint`"
        )
    for name, (values, attrs) in added.items():
        catalog.add_column(name, values, attrs)
    return catalog


def _added(catalog: CatalogWriter) -> dict[str, tuple[NDArray[Any], dict[str, Any]]]:
    """Columns added later that can still be read: no shard has them."""
    found = {}
    try:
        for name in catalog.added:
            with contextlib.suppress(Exception):  # whatever zarr or a codec makes of a damaged file
                found[name] = catalog.column(name), catalog.attrs(name)
    except DatasetError:
        log.warning("columns that were added to %s are lost; compute them again", catalog.url)
    return found


def _rows_of(tar: BinaryIO, where: str, members: tuple[str, ...]) -> list[Entry]:
    """Catalog rows of a shard, from the shard itself. Raises DatasetError when it is damaged."""

    def read(m: Member) -> bytes:
        tar.seek(m.offset)
        return tar.read(m.size)

    try:
        with tar:
            groups = [(key, _in_order(group, members)) for key, group in clips(scan(tar))]
            return [
                Entry(key, facts_from_json(read(group[-1])), group, tuple(hashlib.sha256(read(m)).digest() for m in group))
                for key, group in groups
            ]
    except (OSError, ValueError, tarfile.TarError) as e:
        raise DatasetError(f"shard {where} cannot be read ({e}); copy it again") from e
