"""The bytes of a tar, in pieces, as `webdataset.TarWriter` would write them: fixed owner, mode and time.

That class itself would do, but importing webdataset imports torch, which this room keeps out.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable

_BLOCK = tarfile.BLOCKSIZE


def tar_member(name: str, size: int) -> bytes:
    """The header of a member; its data follow, then `tar_padding`. Names of more than 100 bytes get an extended header."""
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
