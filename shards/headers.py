"""The headers of an uncompressed tar, read strictly: whatever is not a plain file in its top folder is refused.

tarfile takes three times as long, and passes over much on which two readers of one tar would disagree.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn, Protocol

_BLOCK = tarfile.BLOCKSIZE
_EMPTY = bytes(_BLOCK)
_EXTENDED_BYTES = 1 << 16  # the most that a name and some attributes may take
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_NAME_BYTES = 255  # what a file system takes
_NUMBER = re.compile(rb" *([0-7]+)[\0 ]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_REGULAR, _PAX, _LONG_NAME, _SPARSE = (b"0", b"\0"), b"x", b"L", b"S"
_EXTENDED = (_PAX, _LONG_NAME, b"g", b"K")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_KINDS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"5": "a folder", b"6": "a pipe",
    b"g": "a global extended header", b"S": "a sparse file", b"K": "a link with a long name",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar. name is `KEY.EXTENSION`; header, offset and size are in bytes, offset being that of the data."""

    name: str
    header: int
    offset: int
    size: int

    @property
    def key(self) -> str:
        return self.name.partition(".")[0]

    @property
    def extension(self) -> str:
        return self.name.partition(".")[2]

    @property
    def end(self) -> int:
        """Where the next header begins: the data's end, rounded up to a whole tar block."""
        return self.offset + self.size + -self.size % _BLOCK


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...
    def seek(self, at: int, /) -> int: ...


def headers(file: Readable, size: int, *, strict: bool = True) -> Iterator[tuple[Member, bytes]]:
    """Every member of a tar of `size` bytes, in its order, with the blocks that describe it (a long name takes three).

    Only headers are read, from the first to the end mark; what lies between them can be read by the caller meanwhile.
    strict: refuse what is not a regular file in the top folder under a name of its own; else such a thing is passed over, but
    for a file in a folder or a name that comes again.
    Raises tarfile.ReadError, which names the member and its byte, for a tar that is damaged, cut short or hostile.
    """
    at, seen = 0, set[str]()
    file.seek(0)
    while (block := _read(file, at)) != _EMPTY:
        begin, raw = at, block
        kind, name, length = _fields(block, at)
        said: dict[bytes, bytes] = {}
        while kind in (_EXTENDED[:2] if strict else _EXTENDED) and (at == begin or not strict):
            at += _BLOCK
            if length > _EXTENDED_BYTES or at + length > size:
                _refuse(name, begin, f"has an extended header of {length} bytes, which is too long")
            blocks = file.read(length + -length % _BLOCK)
            if kind == _PAX:
                said |= _records(blocks[:length], begin)
            elif kind == _LONG_NAME:
                said[b"path"] = blocks[:length].rstrip(b"\0")
            at += len(blocks)
            block = _read(file, at)
            raw += blocks + block
            kind, name, length = _fields(block, at)
        name, length = said.get(b"path", name), _size(said.get(b"size"), length, begin)
        if kind not in _REGULAR and (strict or kind == _SPARSE):
            _refuse(name, begin, f"is {_KINDS.get(kind, 'something')}, not a regular file in the tar's top folder")
        length = 0 if kind in _WITHOUT_DATA else length
        member = Member(_name(name, begin) if strict else name.decode(errors="replace"), begin, at + _BLOCK, length)
        if member.name in seen:
            _refuse(name, begin, "has the name of an earlier member")
        if member.offset + length > size:
            _refuse(name, begin, f"should have {length} bytes, but the tar ends at byte {size}")
        if strict:
            seen.add(member.name)
        if kind in _REGULAR:
            yield member, raw
        at = member.end
        file.seek(at)
    # a tar cut between two members could pass for a whole one: the two empty blocks at its end are the proof
    if _read(file, at + _BLOCK) != _EMPTY:
        raise tarfile.ReadError(f"there is half an end mark at byte {at}, and more behind it")


def _read(file: Readable, at: int) -> bytes:
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise tarfile.ReadError(f"at byte {at} the tar ends without its end mark{_packed(block, at)}")
    return block


def _packed(block: bytes, at: int) -> str:
    return " (it is compressed, and should be a plain tar)" if at == 0 and block.startswith(_COMPRESSED) else ""


def _fields(block: bytes, at: int) -> tuple[bytes, bytes, int]:
    """Kind, name as it stands there, and size of the data that follow."""
    said = _NUMBER.fullmatch(block, 148, 156)
    # the sum is taken as if its own field were eight spaces
    if not said or int(said[1], 8) != sum(block) - sum(block[148:156]) + 256:
        raise tarfile.ReadError(f"there is no header at byte {at}{_packed(block, at)}")
    name = block[:100].partition(b"\0")[0]
    if prefix := block[345:500].partition(b"\0")[0]:
        name = prefix + b"/" + name
    size = _NUMBER.fullmatch(block, 124, 136)
    if size:
        return block[156:157], name, int(size[1], 8)
    if block[124] == 0x80:  # in base 256, for what eleven octal digits cannot hold
        return block[156:157], name, int.from_bytes(block[125:136], "big")
    return _refuse(name, at, "has a size that is no number")


def _records(data: bytes, header: int) -> dict[bytes, bytes]:
    """The records of a pax header, each `LENGTH KEY=VALUE` and a line's end."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        digits, _, _ = data[at : at + 8].partition(b" ")
        end = at + int(digits) if digits.isdigit() else 0
        key, mark, value = data[at + len(digits) + 1 : end].partition(b"=")
        if not mark or end > len(data) or value[-1:] != b"\n":
            _refuse(key, header, "has an extended header that cannot be understood")
        if key.startswith(b"GNU.sparse") or key == b"hdrcharset":
            _refuse(key, header, "is part of an extended header that other readers understand differently")
        found[key] = value[:-1]
        at = end
    return found


def _size(said: bytes | None, otherwise: int, header: int) -> int:
    if said is None:
        return otherwise
    if not said.isdigit() or len(said) > 19:
        _refuse(said, header, "is a size in an extended header, and no number")
    return int(said)


def _name(raw: bytes, header: int) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        _refuse(raw, header, "has a name that is not UTF-8")
    if not name or len(raw) > _NAME_BYTES or "/" in name or name in (".", "..") or _CONTROL.search(name):
        _refuse(raw, header, "is by its name not a regular file in the tar's top folder")
    return name


def _refuse(name: bytes, header: int, why: str) -> NoReturn:
    raise tarfile.ReadError(f"{name[:_NAME_BYTES].decode(errors='replace')!r} at byte {header} {why}")
