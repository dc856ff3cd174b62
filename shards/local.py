"""Shards on a local disk, read by position alone."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

Ranges = Callable[[list[tuple[int, int, int]]], list[bytes]]


class LocalFile:
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

    def read_into(self, buffer: memoryview, begin: int) -> int:
        """Fill `buffer` from byte `begin` on; how much of it there was."""
        done = 0
        while done < len(buffer) and (more := os.preadv(self._fd, [buffer[done:]], begin + done)):
            done += more
        return done

    def read_ahead(self, begin: int, end: int) -> None:
        """Ask the system for bytes that will be read soon, where it can be asked; does not wait for them."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


class Member(io.RawIOBase):
    """Bytes of a local shard as a file of their own, read by `Dataset.ranges`.

    It does not hold the shard open: thousands may wait to be read.
    """

    def __init__(self, ranges: Ranges, shard: int, begin: int, size: int) -> None:
        self._ranges, self._shard, self._begin, self._size, self._at = ranges, shard, begin, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._at + size, self._size)
        if end <= self._at:
            return b""
        data = self._ranges([(self._shard, self._begin + self._at, self._begin + end)])[0]
        self._at = end
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
