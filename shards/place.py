"""Where a data set is written: a local folder, or any fsspec URL. What is written there appears whole or not at all.

In a folder files are written aside, synced and renamed; in a bucket an object appears when its upload is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cmacc.shards.errors import DatasetError
from cmacc.shards.publish import PartFile, clear_parts, publish, sync_directory, sync_tree

Data = bytes | memoryview  # under another name, for classes below have a property `bytes`
_BATCH_BYTES = 64 << 20
_UPLOAD_BYTES = 16 << 20  # of a part of a multipart upload; each open upload holds one or two in memory


class Part(Protocol):
    """A file on its way: `write`, then `sync`, then `publish` gives it its name, or `discard` leaves nothing."""

    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...
    def write(self, data: Data) -> int: ...
    def sync(self) -> None: ...
    def publish(self) -> None: ...
    def discard(self) -> None: ...


class Place(Protocol):
    """A folder or a prefix. Names are relative to it and may have `/` in them; errors of the file system pass as OSError."""

    url: str

    def create(self, name: str) -> Part: ...
    def publish(self, name: str, data: bytes) -> None: ...
    def read(self, name: str) -> bytes: ...
    def open(self, name: str) -> BinaryIO:
        """A file to read from, anywhere in it."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file, None when there is none."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """Plain names of what lies in a folder of it, sorted; none when there is no such folder."""
        ...

    def adopt(self, file: Path, name: str) -> None:
        """A file of this machine appears as `name`, in place of what was there."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; harmless when there is none."""
        ...

    def put(self, folder: Path, name: str) -> None:
        """A folder that was made on this machine appears as `name`, in place of what was there; `folder` may be gone then."""
        ...

    def aside(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """An empty local folder to make `name` in, for `put`."""
        ...

    def settle(self, name: str, since_ns: int) -> None:
        """Make sure that all files under `name` changed since then (st_mtime_ns) survive a power cut."""
        ...

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Keep other writers out, where the place knows how to. Raises DatasetError when one is at work."""
        ...

    def clear(self) -> None:
        """Remove what a dead writer left aside."""
        ...


def place(url: str | os.PathLike[str]) -> Place:
    """The place at a path or URL. Raises DatasetError for an address that fsspec does not know."""
    url = os.fspath(url).rstrip("/")
    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as e:
        raise DatasetError(f"{url} cannot be written ({e}); check the address") from e
    return Folder(Path(path)) if isinstance(files, LocalFileSystem) else Bucket(url, files, path)


def public_address(url: str) -> str:
    """An address without what would give access to it: user, password, query."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl() if parts.scheme else url


class Folder:
    """A place on a local disk; made with the first thing that is put there."""

    def __init__(self, path: Path) -> None:
        self.path, self.url = path, str(path)

    def create(self, name: str) -> PartFile:
        return PartFile(self._parent(name))

    def publish(self, name: str, data: bytes) -> None:
        publish(self._parent(name), data)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        return (self.path / name).open("rb")

    def size(self, name: str) -> int | None:
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> list[str]:
        try:
            return sorted(path.name for path in (self.path / folder).iterdir())
        except FileNotFoundError:
            return []

    def adopt(self, file: Path, name: str) -> None:
        """By a hard link, or a copy where the disks differ."""
        path = self._parent(name)
        part = path.with_name(f".{path.name}.part")
        part.unlink(missing_ok=True)
        try:
            part.hardlink_to(file)
        except OSError:  # another disk, or one without hard links
            shutil.copyfile(file, part)
            with part.open("rb") as copied:
                os.fsync(copied.fileno())
        part.replace(path)
        sync_directory(path.parent)

    def remove(self, name: str) -> None:
        path = self.path / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def put(self, folder: Path, name: str) -> None:
        sync_tree(folder, 0)
        path = self._parent(name)
        self.remove(name)
        folder.rename(path)
        sync_directory(path.parent)

    @contextlib.contextmanager
    def aside(self, name: str) -> Iterator[Path]:
        path = self._parent(name)
        part = path.with_name(f".{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def settle(self, name: str, since_ns: int) -> None:
        sync_tree(self.path / name, since_ns)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held by flock: it goes with the process, however that ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise DatasetError(f"another writer is at work on {self.path}; wait for it to end, or stop it") from e
            except OSError as e:
                said = f"{self.path} cannot be locked ({e})"
                raise DatasetError(f"{said}; write to a disk that knows flock, and copy from there") from e
            yield
        finally:
            os.close(fd)

    def clear(self) -> None:
        clear_parts(self.path)
        for part in self.path.glob(".*.part"):
            shutil.rmtree(part, ignore_errors=True)
        for part in self.path.glob("*.zarr/**/*.partial"):  # zarr's own way of writing aside
            part.unlink(missing_ok=True)

    def _parent(self, name: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class Bucket:
    """A place behind an fsspec URL: S3, GCS, Azure, memory. It knows no locks: see to it that one writer is at work."""

    def __init__(self, url: str, files: Any, path: str) -> None:
        self.url, self._files, self._path = url, files, path

    def create(self, name: str) -> Upload:
        return Upload(self._files, f"{self._path}/{name}")

    def publish(self, name: str, data: bytes) -> None:
        self._files.pipe_file(f"{self._path}/{name}", data)

    def read(self, name: str) -> bytes:
        return bytes(self._files.cat_file(f"{self._path}/{name}"))

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, self._files.open(f"{self._path}/{name}", "rb"))

    def size(self, name: str) -> int | None:
        self._files.invalidate_cache()
        try:
            return int(self._files.size(f"{self._path}/{name}"))
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> list[str]:
        self._files.invalidate_cache()
        try:
            found = self._files.ls(f"{self._path}/{folder}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        except Exception as e:  # each kind of bucket has errors of its own
            raise DatasetError(
                f"{self.url} cannot be listed ({e}); check the address, the credentials and the right to write"
            ) from e
        return sorted({f.rstrip("/").rpartition("/")[2] for f in found} - {""})

    def adopt(self, file: Path, name: str) -> None:
        part = self.create(name)
        with file.open("rb") as data:
            while block := data.read(_UPLOAD_BYTES):
                part.write(block)
        part.sync()
        part.publish()

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm(f"{self._path}/{name}", recursive=True)

    def put(self, folder: Path, name: str) -> None:
        """What says that there is something, `zarr.json`, goes first when it is removed and comes last when it is written."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{self._path}/{name}/zarr.json")
        self.remove(name)
        files = [f for f in folder.rglob("*") if f.is_file()]
        root = folder / "zarr.json"
        for some in (
            *_batches([f for f in files if f.name != root.name]),
            [f for f in files if f.name == root.name and f != root],
        ):
            self._files.pipe({f"{self._path}/{name}/{f.relative_to(folder).as_posix()}": f.read_bytes() for f in some})
        self._files.pipe_file(f"{self._path}/{name}/{root.name}", root.read_bytes())
        self._files.invalidate_cache()

    @contextlib.contextmanager
    def aside(self, name: str) -> Iterator[Path]:
        with TemporaryDirectory(prefix="cmacc-") as folder:
            yield Path(folder, "made")

    def settle(self, name: str, since_ns: int) -> None:
        """An object that is there is safe."""

    def lock(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def clear(self) -> None:
        """An upload that was not completed is no object; the bucket's own rules for such uploads remove its parts."""


def _batches(files: Iterable[Path]) -> Iterator[list[Path]]:
    """Files to upload at once, as many as fit into `_BATCH_BYTES`."""
    some: list[Path] = []
    size = 0
    for file in files:
        more = file.stat().st_size
        if some and size + more > _BATCH_BYTES:
            yield some
            some, size = [], 0
        some.append(file)
        size += more
    if some:
        yield some


class Upload:
    """An object being uploaded, hashed on the way; it appears with `publish`."""

    def __init__(self, files: Any, path: str) -> None:
        self.bytes = 0
        self._sha256 = hashlib.sha256()
        self._file = files.open(path, "wb", autocommit=False, block_size=_UPLOAD_BYTES)
        self._files = files

    def write(self, data: Data) -> int:
        """Write all of `data`. Raises OSError."""
        self._file.write(data)
        self._sha256.update(data)
        self.bytes += len(data)
        return len(data)

    @property
    def sha256(self) -> str:
        """Hex digest of what was written so far."""
        return self._sha256.hexdigest()

    def sync(self) -> None:
        """Send what is left; the object is not there yet."""
        self._file.close()

    def publish(self) -> None:
        """Complete the upload: the object is there."""
        self._file.commit()
        self._files.invalidate_cache()

    def discard(self) -> None:
        """Abort the upload; harmless after `publish`."""
        with contextlib.suppress(Exception):  # what was never begun cannot be aborted either
            self._file.discard()
        with contextlib.suppress(AttributeError):
            self._file.closed = True  # or it would be flushed when it is collected, and say that it cannot
