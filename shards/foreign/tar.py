"""A tar that someone else wrote, read once from end to end: what is in it, where it lies, and the checksum of everything.

Nothing is extracted by its name: a member is bytes at a place in the tar.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from cmacc.shards.index import Member

_BLOCK = 1 << 20
_HEADER_BYTES = 1 << 20  # of an extended header; what wants more is no tar
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


@dataclass(frozen=True, slots=True)
class ForeignMember(Member):
    """A member whose name may begin with folders: `key` is then the path up to the first dot behind the last slash, which is
    what webdataset and DALI take for the key of a sample."""

    @property
    def key(self) -> str:
        return self.name[: self._dot]

    @property
    def extension(self) -> str:
        return self.name[self._dot + 1 :]

    @property
    def _dot(self) -> int:
        return self.name.index(".", self.name.rfind("/") + 1)


@dataclass(slots=True)
class Sample:
    """Adjacent members of one key. path: the key with its folders; digests: sha256 of each member, 32 bytes."""

    path: str
    members: list[ForeignMember] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)

    @property
    def key(self) -> str:
        """The key alone: folders are no part of it."""
        return self.path.rpartition("/")[2]


Sink = Callable[[bytes], Any]


class ForeignTar:
    """One pass over a tar: iterate over its samples, then read `size` and `sha256` of the whole file.

    keep: asked for each member, with its sample, whether somebody wants its data; what it returns is called with them, block by
    block. odd: (name, what is wrong) of each member that no reader of WebDataset could use; members without an extension and
    hidden ones are passed over in silence, as webdataset does.
    """

    def __init__(self, file: BinaryIO, keep: Callable[[Sample, ForeignMember], Sink | None] = lambda s, m: None) -> None:
        self._file, self._keep = _Hashed(file), keep
        self.odd: list[tuple[str, str]] = []

    @property
    def size(self) -> int:
        """Bytes read so far."""
        return self._file.size

    @property
    def sha256(self) -> str:
        """Hex digest of the whole file, once all samples were taken."""
        return self._file.digest.hexdigest()

    def __iter__(self) -> Iterator[Sample]:
        """Raises tarfile.TarError when the tar is damaged, compressed, or cut short."""
        sample: Sample | None = None
        self._refuse_packed()
        end = 0
        try:
            with tarfile.open(fileobj=self._file, mode="r|", bufsize=_BLOCK, tarinfo=_Info) as tar:  # type: ignore[call-overload]
                while (info := tar.next()) is not None:
                    tar.members.clear()
                    if info.size < 0:
                        raise tarfile.ReadError(f"{info.name!r} has a negative size")
                    end = tar.offset
                    member = self._member(info)
                    if member is None:
                        continue
                    if sample is None or sample.path != member.key:
                        if sample is not None:
                            yield sample
                        sample = Sample(member.key)
                    sample.members.append(member)
                    sample.digests.append(self._read(tar, info, self._keep(sample, member)))
        except (tarfile.TarError, RecursionError, ValueError, OverflowError) as e:
            raise tarfile.ReadError(f"it is damaged or cut short behind byte {end} ({e})") from e
        self._file.drain()
        self._check_end(end)
        if sample is not None:
            yield sample

    def _member(self, info: tarfile.TarInfo) -> ForeignMember | None:
        base = info.name.rpartition("/")[2]
        if info.isdir():
            return None
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.sparse is not None:
            self.odd.append((info.name, "it is not a regular file"))
            return None
        if base.startswith(".") or not base.partition(".")[2]:
            return None
        if info.name.startswith("/") or ".." in info.name.split("/"):
            self.odd.append((info.name, "its path leads out of the tar"))
            return None
        if any(c.isspace() or not c.isprintable() for c in info.name):
            self.odd.append((info.name, "its name has spaces or control characters, which no index can hold"))
            return None
        return ForeignMember(info.name, info.offset, info.offset_data, info.size)

    def _read(self, tar: tarfile.TarFile, info: tarfile.TarInfo, sink: Sink | None) -> bytes:
        digest, left = hashlib.sha256(), info.size
        data = tar.extractfile(info)
        assert data is not None
        while block := data.read(min(_BLOCK, left)) if left else b"":
            digest.update(block)
            if sink is not None:
                sink(block)
            left -= len(block)
        if left:
            raise tarfile.ReadError(f"it ends inside {info.name!r}")
        return digest.digest()

    def _refuse_packed(self) -> None:
        head = self._file.peek(8)
        for magic, kind in _PACKED.items():
            if head.startswith(magic):
                raise tarfile.ReadError(f"it is compressed by {kind} and cannot be read at random; unpack it to a plain .tar")

    def _check_end(self, end: int) -> None:
        # tarfile takes a tar cut between two members for a whole one: the two empty blocks at the end are the proof
        mark = self._file.at(end, 2 * tarfile.BLOCKSIZE)
        if len(mark) < 2 * tarfile.BLOCKSIZE or any(mark):
            raise tarfile.ReadError(f"it is damaged at byte {end}, or cut short: there is neither a member nor the end mark")


class _Info(tarfile.TarInfo):
    """As tarfile has it, but an extended header is not believed whatever size it claims: tarfile would read that much."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in EXTENDED and not 0 <= self.size <= _HEADER_BYTES:
            raise tarfile.ReadError(f"the extended header at byte {self.offset} claims {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


class _Hashed:
    """A file read forward, hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._ahead = b""
        self.size = 0
        self.digest = hashlib.sha256()

    def peek(self, n: int) -> bytes:
        self._ahead = self._ahead or self._file.read(n)
        return self._ahead

    def read(self, n: int) -> bytes:
        data, self._ahead = self._ahead + self._file.read(max(0, n - len(self._ahead))), b""
        self.digest.update(data)
        self.size += len(data)
        return data

    def drain(self) -> None:
        while self.read(_BLOCK):
            pass

    def at(self, offset: int, n: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(n)
