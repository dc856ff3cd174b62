"""One shard, read once from its first byte to its last: is it what dataset.json and its indexes say, and what does it hold?"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cmacc.shards.clip import KEY, Facts
from cmacc.shards.dataset import Meta, Shard
from cmacc.shards.facts import facts_from_json
from cmacc.shards.headers import Member, headers
from cmacc.shards.index import clips, dali_index, energon_index, index_names
from cmacc.shards.lint.faults import Fault, few
from cmacc.shards.tar import tar_end, tar_member

_PIECE = 1 << 20
_FACTS_BYTES = 1 << 24
_PLAIN = tarfile.BLOCKSIZE
_AGAIN = "copy it again, or leave its clips out by `cmacc reshard`"


@dataclass(slots=True)
class Row:
    """What a shard says of one catalog row. members: in the data set's order; sha256: 32 bytes of each, where they were read."""

    key: str
    facts: Facts | None
    members: list[Member]
    sha256: list[bytes]


@dataclass
class Found:
    """rows: one per clip that dataset.json names, None where the shard does not tell; members: of foreign shards, by offset,
    with their sha256."""

    faults: list[Fault] = field(default_factory=list)
    rows: list[Row | None] = field(default_factory=list)
    members: dict[int, tuple[Member, bytes]] = field(default_factory=dict)
    whole: bool = False


def read_shard(files: Any, path: str, meta: Meta, shard: Shard, checksums: bool, tell: Callable[[int], None]) -> Found:
    """Everything that can be said of a shard without the catalog. tell: called with bytes that were read, or passed over."""
    found = Found()
    found.faults = list(few(_faults(found, files, path, meta, shard, checksums, tell), shard.name))
    found.whole = not found.faults
    if len(found.rows) != shard.clips:
        found.rows = [None] * shard.clips
    return found


def _faults(
    found: Found, files: Any, path: str, meta: Meta, shard: Shard, checksums: bool, tell: Callable[[int], None]
) -> Iterator[Fault]:
    name = shard.name
    try:
        with files.open(f"{path}/{name}", "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            if size != shard.bytes:
                said = f"{name} has {size} bytes, dataset.json says {shard.bytes}"
                yield Fault("size", name, f"{said}: it is truncated or changed; {_AGAIN}")
            stream = _Stream(file, size, checksums, tell)
            walk = _Walk(meta, name)
            try:
                yield from walk.members(stream)
            except tarfile.TarError as e:
                yield Fault("tar", name, f"{name} is damaged: {e}; {_AGAIN}")
            if stream.sha256() != shard.sha256 and checksums and size == shard.bytes:
                yield Fault("checksum", name, f"{name} has a wrong sha256: its content changed; {_AGAIN}")
    except FileNotFoundError:
        yield Fault("missing", name, f"{name} is missing; {_AGAIN}")
        return
    except OSError as e:
        yield Fault("missing", name, f"{name} cannot be read ({e}); {_AGAIN}")
        return
    if not walk.ended:
        return
    yield from _indexes(meta, name, list(walk.found), files, path)
    if meta.foreign:
        found.members = {member.offset: (member, digest) for member, digest in walk.found.items()}
    else:
        yield from walk.clips(shard, found)


class _Stream:
    """A file read forward once, in large pieces, all of which go into its sha256; without checksums it is passed over."""

    def __init__(self, file: Any, size: int, checksums: bool, tell: Callable[[int], None]) -> None:
        self.size, self.checksums = size, checksums
        self._file, self._tell, self._whole = file, tell, hashlib.sha256()
        self._left, self._at = memoryview(b""), 0

    def pieces(self, size: int) -> Iterator[memoryview]:
        """The next bytes, as they come; fewer where the file ends."""
        while size > 0:
            if not self._left:
                block = self._file.read(_PIECE if self.checksums else min(size, _PIECE))
                if not block:
                    return
                self._whole.update(block)
                self._left = memoryview(block)
                self._tell(len(block))
            piece, self._left = self._left[:size], self._left[size:]
            size -= len(piece)
            self._at += len(piece)
            yield piece

    def read(self, size: int, /) -> bytes:
        return b"".join(self.pieces(size))

    def seek(self, at: int, /) -> int:
        """Forward alone."""
        if self.checksums:
            for _ in self.pieces(at - self._at):
                pass
        elif at != self._at:
            self._file.seek(at)
            self._tell(at - self._at)
            self._left, self._at = memoryview(b""), at
        return at

    def sha256(self) -> str:
        """Of the whole file, which is read to its end."""
        self.seek(self.size)
        return self._whole.hexdigest()


class _Walk:
    """The members of one tar. found: each with its sha256; ended: the tar was read to its end mark."""

    def __init__(self, meta: Meta, name: str) -> None:
        self.found: dict[Member, bytes] = {}
        self.ended = False
        self._meta, self._name = meta, name
        self._facts: dict[str, bytes] = {}

    def members(self, stream: _Stream) -> Iterator[Fault]:
        """Read all members; faults are what our own writer would not have written."""
        ours, name, end = not self._meta.foreign, self._name, 0
        for member, raw in headers(stream, stream.size, strict=ours):
            if ours and not _as_written(member, raw):
                said = f"the header of {member.name} at byte {member.header} of {name} is not as this version writes it"
                yield Fault("tar", name, f"{said}; `cmacc reshard` writes it anew")
            kept: list[bytes] | None = [] if ours and member.extension == "json" and member.size <= _FACTS_BYTES else None
            self.found[member] = b""
            if stream.checksums or kept is not None:
                digest = hashlib.sha256()
                for piece in stream.pieces(member.size):
                    digest.update(piece)
                    if kept is not None:
                        kept.append(bytes(piece))
                self.found[member] = digest.digest() if stream.checksums else b""
                if stream.read(member.end - member.offset - member.size).strip(b"\0") and ours:
                    yield Fault("tar", name, f"{name} has more than zeros behind {member.name}; `cmacc reshard` writes it anew")
            if kept is not None:
                self._facts[member.key] = b"".join(kept)
            end = member.end
        if ours and stream.size != end + len(tar_end(end)):
            said = f"{name} ends at byte {stream.size}, its end mark at byte {end + len(tar_end(end))}"
            yield Fault("tar", name, f"{said}; `cmacc reshard` writes it anew")
        if ours and stream.checksums and any(any(piece) for piece in stream.pieces(stream.size)):
            yield Fault("tar", name, f"{name} has something behind its end mark; `cmacc reshard` writes it anew")
        self.ended = True

    def clips(self, shard: Shard, found: Found) -> Iterator[Fault]:
        """Are the members clips as the data set has them? Fills found.rows."""
        name, groups, seen = self._name, clips(self.found), set[str]()
        if len(groups) != shard.clips:
            yield Fault("count", name, f"{name} holds {len(groups)} clips, dataset.json says {shard.clips}; {_AGAIN}")
        for key, group in groups:
            where, by_extension = f"{name}: {key}", {m.extension: m for m in group}
            if not KEY.fullmatch(key):
                mend = "letters, digits, '_' and '-' only, 96 at most: write it again"
                yield Fault("key", where, f"{name} has a clip with the key {key!r}; {mend}")
            there, wanted = [m.extension for m in group], self._meta.members
            if key in seen:
                yield Fault("members", where, f"the members of clip {key} of {name} are not adjacent; {_AGAIN}")
            elif sorted(there) != sorted(wanted):
                said = f"has {', '.join(there)}, not {', '.join(wanted)}"
                yield Fault("members", where, f"clip {key} of {name} {said}; {_AGAIN}")
            seen.add(key)
            if set(by_extension) != set(wanted):
                found.rows.append(None)
                continue
            facts = None
            try:
                facts = facts_from_json(self._facts.pop(key, b""))
            except ValueError as e:
                mend = f"leave it out by `cmacc reshard` --where \"key <> '{key}'\""
                yield Fault("members", f"{key}.json", f"the facts of clip {key} in {name} are not usable ({e}); {mend}")
            ordered = [by_extension[m] for m in wanted]
            found.rows.append(Row(key, facts, ordered, [self.found[m] for m in ordered]))


def _as_written(member: Member, raw: bytes) -> bool:
    """Whether `tar_member` writes just these blocks; by parts where there is one block, which is five times faster."""
    if len(raw) > _PLAIN:
        return raw == tar_member(member.name, member.size)
    size = b"%011o\0" % member.size if member.size < 8**11 else raw[124:136]
    return (
        raw[100:124] + raw[136:148] + raw[156:] == _TEMPLATE
        and raw[124:136] == size
        and raw[:100] == member.name.encode().ljust(100, b"\0")
        and raw[148:154].isdigit()
        and raw[154:156] == b"\0 "
    )


_TEMPLATE = (lambda raw: raw[100:124] + raw[136:148] + raw[156:])(tar_member("a", 0))


def _indexes(meta: Meta, name: str, members: list[Member], files: Any, path: str) -> Iterator[Fault]:
    mend = "`cmacc reshard` writes both indexes anew, as does shards.index.publish_indexes"
    if meta.foreign:
        mend = "`cmacc index` writes it again"
    for index, make in zip(index_names(name), (dali_index, energon_index), strict=True):
        try:
            # which members of foreign shards are named in an index is for its maker to say
            if files.cat_file(f"{path}/{index}") != make(members) and not meta.foreign:
                yield Fault("index", index, f"{index} does not agree with {name}; {mend}")
        except FileNotFoundError:
            yield Fault("index", index, f"{index} is missing; {mend}")
