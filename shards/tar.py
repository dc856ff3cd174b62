"""The bytes of a tar, in pieces, as `webdataset.TarWriter` would write them: fixed owner, mode and time.

That class itself would do, but importing webdataset imports torch, which this room keeps out.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from functools import lru_cache

_BLOCK = tarfile.BLOCKSIZE


_NAME, _SIZE, _SUM = slice(0, 100), slice(124, 136), slice(148, 156)


def tar_member(name: str, size: int) -> bytes:
    """The header of a member; its data follow, then `tar_padding`. Names of more than 100 bytes get an extended header."""
    if len(name) > 100 or not name.isascii() or size >= 1 << 33:
        return _header(name, size)
    # the same bytes, twenty times sooner: all but three fields are those of every header
    blank, rest = _blank()
    header = bytearray(blank)
    octal, title = b"%011o\0" % size, name.encode()
    header[: len(title)] = title
    header[_SIZE] = octal
    header[_SUM] = b"%06o\0 " % (rest + sum(title) + sum(octal))
    return bytes(header)


@lru_cache(1)
def _blank() -> tuple[bytes, int]:
    """A header without name, size and sum, and what its bytes add to the sum: that field itself counts as spaces."""
    header = bytearray(_header("", 0))
    header[_SIZE], header[_SUM] = bytes(12), b" " * 8
    return bytes(header), sum(header)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.PAX_FORMAT)


def tar_padding(size: int) -> bytes:
    """Zeros that fill a member's last block."""
    return bytes(-size % _BLOCK)


def tar_end(size: int) -> bytes:
    """The end mark of a tar that has `size` bytes: two empty blocks, and zeros up to a whole record."""
    return bytes(2 * _BLOCK + -(size + 2 * _BLOCK) % tarfile.RECORDSIZE)


def tar_bytes(size: int, more: Iterable[bytes]) -> int:
    """Size that a tar of `size` bytes without its end mark will have once it holds some more members and is closed."""
    size += sum(_BLOCK + len(data) + -len(data) % _BLOCK for data in more)
    return size + len(tar_end(size))
