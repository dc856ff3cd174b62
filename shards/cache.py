"""Blocks of remote shards kept on a local disk, in a folder that many processes share and that never outgrows its limit.

A block is named by its shard's sha256 and its number, so it can never be stale. Its file is the block's bytes, then a CRC-32 of
each 64 KiB of them (uint32, little-endian): what was altered or cut is dropped and fetched again. Blocks are not synced to the
disk: one that a power cut spoils is such a block, too.

The file `used` counts the bytes in the folder; who changes it, or gives or takes a name, holds `lock` by flock. Room is counted
before a part is made, and a part has its full size from the start, so that a kill leaves nothing but too high a count and a part
that nobody holds: the next eviction, which counts what is there, mends both.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cmacc.shards.errors import DatasetError

log = logging.getLogger(__name__)

_PAGE = 64 << 10
_KEPT = re.compile(r"[0-9a-f]{64}\.\d{1,12}\.\d{1,12}")
_PART = re.compile(r"\.[0-9a-f]{16}\.part")
_DISK_BLOCK, _NAME = 4096, 256  # bytes: what a file's size is rounded up to, and a generous price of its name in the folder
_FIXED = 5 * _DISK_BLOCK  # of the folders, `used` and `lock`
_AFTER = 0.9  # of the limit, that eviction leaves
_TOUCH_S = 60.0
_LOCK_S = 30.0
_ATTEMPTS = 3


class Cache:
    """At most `max_bytes` of blocks in `folder`, those used last; every process of the machine may use the folder at once.

    It can be pickled, and used from threads and after a fork. A folder that is deleted is made again. Where it cannot be used
    (not ours, read-only, full, locked by a process that does not go on) there is one warning, nothing more is kept in it, and
    reading goes on without it. Raises DatasetError for a limit that does not hold one block.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int, block_bytes: int = 4 << 20) -> None:
        self.folder, self.max_bytes, self.block_bytes = Path(folder).absolute(), int(max_bytes), int(block_bytes)
        if self.block_bytes < 1 or self.max_bytes < (least := _FIXED + _cost(_file_bytes(self.block_bytes))):
            said = f"a cache of {max_bytes} bytes at {folder} does not hold one block of {block_bytes} bytes"
            raise DatasetError(f"{said}; give it {least} bytes or more" if self.block_bytes > 0 else f"{said}; give 1 or more")
        self._blocks = self.folder / "blocks"
        self._pid = 0  # of the process that has looked at the folder
        self._off = False

    def holds(self, size: int) -> bool:
        """Whether `size` bytes, of blocks that are there as a whole, would all stay: what is read in turns and does not, is
        fetched anew each turn. Never, where the folder cannot be used."""
        blocks = -(-size // self.block_bytes)
        return not self._off and _FIXED + blocks * _cost(_file_bytes(self.block_bytes)) <= self.max_bytes * _AFTER

    def has(self, sha256: str, number: int, size: int) -> bool:
        """Whether a block of `size` bytes is there, whatever is in it."""
        try:
            return self._path(sha256, number).stat().st_size == _file_bytes(size)
        except OSError:
            return False

    def get(self, sha256: str, number: int, size: int, begin: int, end: int) -> bytes | None:
        """Bytes `begin` to `end` of a block of `size` bytes, None when it is not there."""
        path = self._path(sha256, number)
        try:
            self._enter()
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as e:
            self._give_up(e)
            return None
        try:
            status = os.fstat(fd)
            found = _read(fd, status.st_size, size, begin, end)
            if found is None:
                log.warning("dropping %s, which was altered or cut", path)
                self._drop(path, status.st_ino)
            elif time.time() - status.st_mtime > _TOUCH_S:
                with contextlib.suppress(OSError):  # of another user; it then goes earlier
                    os.utime(fd)
        except FileNotFoundError:  # the folder was deleted meanwhile
            return None
        except OSError as e:
            self._give_up(e)
            return None
        finally:
            os.close(fd)
        return found

    def put(self, sha256: str, number: int, data: bytes) -> None:
        """Keep a block, whole, unless it is there; room is made for it where there is none left."""
        path = self._path(sha256, number)
        try:
            for attempt in range(_ATTEMPTS):
                try:
                    if not self._off and not path.exists():
                        self._put(path, data)
                    break
                except FileNotFoundError:  # the folder was deleted meanwhile
                    self._pid = 0
                    if attempt == _ATTEMPTS - 1:
                        raise
        except OSError as e:
            self._give_up(e)

    def drop(self, sha256: str, number: int) -> None:
        """Forget a block that turned out to be wrong."""
        path = self._path(sha256, number)
        with contextlib.suppress(OSError):
            self._drop(path, path.stat().st_ino)

    def _put(self, path: Path, data: bytes) -> None:
        size = _file_bytes(len(data))
        self._enter()
        part = self._reserve(path, size)
        if part is None:
            return
        fd, name = part
        try:
            for piece in (data, _checksums(data)):
                view = memoryview(piece)
                while view:
                    view = view[os.write(fd, view) :]
            self._publish(name, path, size)
        except BaseException:
            with contextlib.suppress(OSError):
                self._discard(name, size)
            raise
        finally:
            os.close(fd)

    # --- inside: what holds the lock ---

    @contextlib.contextmanager
    def _locked(self) -> Iterator[_Count]:
        """Opened anew each time: so it also keeps threads apart, and a fork inherits nothing that counts."""
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(fd)
            with contextlib.closing(_Count(self.folder / "used")) as count:
                yield count
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing alone would leave it to a child that was forked meanwhile
            os.close(fd)

    def _enter(self) -> None:
        """Once in each process: make the folder, and see that what is in it keeps to this limit."""
        if self._pid == os.getpid() or self._off:
            return
        self._blocks.mkdir(parents=True, exist_ok=True)
        with self._locked() as count:
            if not count.known or count.bytes > self.max_bytes:
                self._evict(count, 0)
        self._pid = os.getpid()

    def _reserve(self, path: Path, size: int) -> tuple[int, Path] | None:
        """Count `size` bytes and make an empty part of that size, held by flock; None where it is there, or has no room."""
        with self._locked() as count:
            if path.exists():
                return None
            if not count.known or count.bytes + _cost(size) > self.max_bytes:
                self._evict(count, _cost(size))
                if count.bytes + _cost(size) > self.max_bytes:
                    return None  # parts that others write take all of it
            count.set(count.bytes + _cost(size))
            name = self._blocks / f".{secrets.token_hex(8)}.part"
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(fd, size)
            except OSError:
                os.close(fd)
                name.unlink()
                count.set(count.bytes - _cost(size))
                raise
            return fd, name

    def _publish(self, part: Path, path: Path, size: int) -> None:
        with self._locked() as count:
            if path.exists():  # another process was quicker
                part.unlink()
                count.set(count.bytes - _cost(size))
            else:
                part.rename(path)

    def _discard(self, part: Path, size: int) -> None:
        with self._locked() as count:
            part.unlink()
            count.set(count.bytes - _cost(size))

    def _drop(self, path: Path, inode: int) -> None:
        with self._locked() as count, contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if status.st_ino == inode:
                path.unlink()
                count.set(count.bytes - _cost(status.st_size))

    def _evict(self, count: _Count, room: int) -> None:
        """Count what is there, remove dead parts, and then the oldest blocks until `room` bytes and a tenth are free."""
        used, blocks = _FIXED, []
        with os.scandir(self._blocks) as entries:
            for entry in entries:
                if not entry.is_file(follow_symlinks=False):
                    continue
                status = entry.stat(follow_symlinks=False)
                if _KEPT.fullmatch(entry.name):
                    blocks.append((status.st_mtime_ns, entry.name, _cost(status.st_size)))
                elif not _PART.fullmatch(entry.name) or _dead(Path(entry.path)):
                    continue
                used += _cost(status.st_size)
        target = min(self.max_bytes * _AFTER, self.max_bytes - room) if used + room > self.max_bytes else used
        count.set(used)
        for _, name, cost in sorted(blocks):
            if used <= target:
                break
            with contextlib.suppress(OSError):  # another user's, in a folder where only owners may remove
                (self._blocks / name).unlink()
                used -= cost
        count.set(used)

    def _path(self, sha256: str, number: int) -> Path:
        return self._blocks / f"{sha256}.{self.block_bytes}.{number}"

    def _give_up(self, error: OSError) -> None:
        if not self._off:
            self._off = True
            log.warning("the cache at %s is not used any more (%s); reading goes on without it", self.folder, error)


class _Count:
    """The bytes in the folder as the file `used` has them: 20 digits, written by one call. known: whether it can be believed."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        found = os.pread(self._fd, 32, 0)
        self.known = len(found) == 20 and found.isdigit()
        self.bytes = int(found) if self.known else 0

    def set(self, value: int) -> None:
        self.bytes, self.known = max(value, 0), True
        os.pwrite(self._fd, b"%020d" % self.bytes, 0)

    def close(self) -> None:
        os.close(self._fd)


def _lock(fd: int) -> None:
    """Wait for the lock, which is held for moments; TimeoutError where its holder was stopped, or is on another machine."""
    began, pause = time.monotonic(), 0.0005
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - began > _LOCK_S:
                raise TimeoutError(errno.ETIMEDOUT, f"another process has held its lock for {_LOCK_S:.3g} s") from None
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def _file_bytes(size: int) -> int:
    return size + 4 * -(-size // _PAGE)


def _cost(size: int) -> int:
    """Bytes of the disk that a file of `size` bytes takes."""
    return -(-size // _DISK_BLOCK) * _DISK_BLOCK + _NAME


def _checksums(data: bytes | memoryview) -> bytes:
    view = memoryview(data)
    return np.array([zlib.crc32(view[at : at + _PAGE]) for at in range(0, len(view), _PAGE)], dtype="<u4").tobytes()


def _read(fd: int, file_bytes: int, size: int, begin: int, end: int) -> bytes | None:
    """Bytes of an opened block, None when its length or the checksum of a page they touch is not right."""
    if file_bytes != _file_bytes(size):
        return None
    first, last = begin // _PAGE, -(-end // _PAGE)
    data = os.pread(fd, min(last * _PAGE, size) - first * _PAGE, first * _PAGE)
    if _checksums(data) != os.pread(fd, 4 * (last - first), size + 4 * first):
        return None
    return data[begin - first * _PAGE : end - first * _PAGE]


def _dead(part: Path) -> bool:
    """Remove a part whose writer is gone: nobody holds it. The caller holds the lock, under which parts are made."""
    try:
        with part.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
    except OSError:  # held, or another user's
        return False
    return True
