"""Having notes of every tar of a folder: each is read once, many at a time, and again only when it changed."""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from cmacc.shards.errors import DatasetError
from cmacc.shards.foreign.notes import NOTES, Asked, Tar, asked_of, note_name, take_notes
from cmacc.shards.place import Place
from cmacc.shards.prober import Prober

_PACKED = re.compile(r".*\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2|txz)", re.IGNORECASE)
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.tar")  # as dataset.json has them


def list_tars(home: Place, files: Any, path: str) -> tuple[list[Tar], list[tuple[str, str]]]:
    """The tars to index, by name, and those that cannot be, with the reason."""
    tars, strange = [], []
    files.invalidate_cache()
    for info in files.ls(path, detail=True):
        name = info["name"].rstrip("/").rpartition("/")[2]
        if info["type"] == "directory" or name.startswith("."):
            continue
        if _PACKED.fullmatch(name):
            strange.append((name, "it is compressed and cannot be read at random; unpack it to a plain .tar"))
        elif name.lower().endswith(".tar") and not _SHARD.fullmatch(name):
            strange.append((name, "its name is not usable: letters, digits, _ and - before .tar, at most 64; rename it"))
        elif name.endswith(".tar"):
            tars.append(Tar(name, int(info["size"]), _stamp(info)))
    if not tars:
        why = f" ({strange[0][0]}: {strange[0][1]})" if strange else ""
        raise DatasetError(f"{home.url} has no tar to index{why}; give the folder that the .tar files themselves lie in")
    return sorted(tars, key=lambda t: t.name), sorted(strange)


def _stamp(info: dict[str, Any]) -> str:
    for name in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created"):
        if value := info.get(name):
            return f"{name} {value.timestamp() if isinstance(value, datetime) else value}"
    return ""


def read_tars(
    home: Place, files: Any, path: str, tars: list[Tar], asked: Asked, workers: int,
    on_progress: Callable[[int, int, str], None] | None,
) -> int:  # fmt: skip
    """Have notes of every tar; returns how many had to be read. Raises DatasetError, OSError."""
    new = [tar for tar in tars if not _known(home, tar, asked)]
    names = {tar.name for tar in tars}
    for name in home.names(NOTES):
        if name.removesuffix(".json.gz") not in names:
            home.remove(f"{NOTES}/{name}")
    meter = _Meter(sum(tar.bytes for tar in new), on_progress)
    stop, own = threading.Event(), threading.local()
    probers: list[Prober] = []
    local = isinstance(files, LocalFileSystem)

    def one(tar: Tar) -> None:
        if stop.is_set():
            return
        if not hasattr(own, "prober"):
            own.prober = Prober()
            probers.append(own.prober)

        def tell(done: int) -> None:
            if stop.is_set():
                raise InterruptedError("stopped")
            meter.tell(tar.name, done)

        with files.open(f"{path}/{tar.name}", "rb") as file, tempfile.TemporaryDirectory(prefix="cmacc-") as scratch:
            notes = take_notes(tar, file, f"{path}/{tar.name}" if local else None, asked, own.prober, Path(scratch), tell)
        files.invalidate_cache()
        now = files.info(f"{path}/{tar.name}")
        if (int(now["size"]), _stamp(now)) != (tar.bytes, tar.stamp):
            raise DatasetError(f"{home.url}/{tar.name} changed while it was read; wait for its writer to end, and start again")
        home.publish(note_name(tar.name), notes)
        meter.tell(tar.name, tar.bytes)

    with ThreadPoolExecutor(max(1, min(workers, len(new))), thread_name_prefix="index") as pool:
        try:
            for done in as_completed([pool.submit(one, tar) for tar in new]):
                done.result()
        except BaseException:
            stop.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for prober in probers:
                prober.__exit__()
    return len(new)


def _known(home: Place, tar: Tar, asked: Asked) -> bool:
    """Whether there are notes of this very tar. One without a stamp is read again each time."""
    if not tar.stamp or home.size(note_name(tar.name)) is None:
        return False
    with suppress(ValueError, KeyError, TypeError, OSError, EOFError):
        return asked_of(home.read(note_name(tar.name))) == (tar, asked.to_json())
    return False


class _Meter:
    """Adds up what all threads have read."""

    def __init__(self, total: int, on_progress: Callable[[int, int, str], None] | None) -> None:
        self._total, self._on_progress = total, on_progress
        self._done: dict[str, int] = {}
        self._sum = 0
        self._guard = threading.Lock()

    def tell(self, name: str, done: int) -> None:
        with self._guard:
            before = self._sum
            self._sum += done - self._done.get(name, 0)
            self._done[name] = done
            whole = -(-self._total >> 20)
            if self._on_progress and (self._sum >> 20 > before >> 20 or before < self._sum == self._total):
                self._on_progress(whole if self._sum == self._total else self._sum >> 20, whole, name)
