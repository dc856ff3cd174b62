"""Files that appear whole or not at all: written aside, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

_PART = ".part"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class PartFile:
    """A file being written aside as `.<name>.part`, hashed on the way. `write` is all that TarWriter asks for.

    path: where `publish` will put it. bytes: written so far. part: where it is until then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part = path.with_name(f".{path.name}{_PART}")
        self.bytes = 0
        self._sha256 = hashlib.sha256()
        self._fd = os.open(self.part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`. Raises OSError."""
        view = memoryview(data)
        while view:
            done = os.write(self._fd, view)
            self._sha256.update(view[:done])
            self.bytes += done
            view = view[done:]
        return len(data)

    @property
    def sha256(self) -> str:
        """Hex digest of what was written so far."""
        return self._sha256.hexdigest()

    def sync(self) -> None:
        """Flush to the disk and close; the file is still aside."""
        os.fsync(self._fd)
        self._close()

    def publish(self) -> None:
        """Give the file its name; it must be synced. Both the rename and the directory are on disk afterwards."""
        self.part.replace(self.path)
        sync_directory(self.path.parent)

    def discard(self) -> None:
        """Close and remove the part; harmless after `publish`."""
        self._close()
        self.part.unlink(missing_ok=True)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def publish(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`, atomically and durably. Raises OSError; the old file then stays."""
    file = PartFile(path)
    try:
        file.write(data)
        file.sync()
        file.publish()
    except BaseException:
        file.discard()
        raise


def sync_directory(path: Path) -> None:
    """Flush a directory's entries (names, renames) to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(path: Path, since_ns: int) -> None:
    """Flush every file under `path` changed at or after `since_ns` (st_mtime_ns), and the directories that hold them."""
    for folder, _, names in os.walk(path):
        changed = False
        for name in names:
            file = Path(folder, name)
            if file.stat().st_mtime_ns >= since_ns:
                changed = True
                with file.open("rb") as f:
                    os.fsync(f.fileno())
        if changed:
            sync_directory(Path(folder))


def clear_parts(path: Path) -> None:
    """Remove what a dead writer left aside in the directory `path`."""
    for part in path.glob(f".*{_PART}"):
        with contextlib.suppress(IsADirectoryError, PermissionError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def no_room_as(error: type[Exception], sentence: str) -> Iterator[None]:
    """Turn a full disk, quota or file-size limit (OSError) into `error(sentence)`; other errors pass."""
    try:
        yield
    except OSError as e:
        if e.errno not in _NO_ROOM:
            raise
        raise error(sentence) from e
