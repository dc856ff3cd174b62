"""Finished clips of one source video, at rest until they are put into shards: one plain tar a source video."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from cmacc.ingest.outcome import Outcome, SourceVideo
from cmacc.shards.clip import Clip
from cmacc.shards.facts import facts_from_json, facts_to_json


class StagedWriter:
    """Writes `<source>.tar` in the scratch folder; it appears complete, by rename, on `commit`, and not at all otherwise.

    A tar that is there already is not lost: its clips go into the new one first, but for those that are written anew.
    """

    def __init__(self, staging: Path, source: str, scratch: Path) -> None:
        self.path = staged_path(staging, source)
        self.aside = scratch / "staged.tar"
        self.file = self.aside.open("wb")
        self.tar = tarfile.TarFile(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)
        self.keys: set[str] = set()

    def add(self, clip: Clip) -> int:
        """Returns the clip's bytes."""
        members = {**clip.members, "json": facts_to_json(clip.facts)}
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{clip.key}.{extension}")
            info.size = len(data)
            self.tar.addfile(info, io.BytesIO(data))
        self.keys.add(clip.key)
        return sum(map(len, members.values()))

    def commit(self) -> None:
        """Make the tar appear. Without a clip there is none."""
        if not self.keys:
            return
        for clip in read_staged(self.path) if staged_keys(self.path) else ():
            if clip.key not in self.keys:
                self.add(clip)
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.aside.replace(self.path)

    def __enter__(self) -> StagedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()


@contextmanager
def scratch_folder(staging: Path, source: str) -> Iterator[Path]:
    """A folder for what is made on the way to one source video's clips; what a killed process left there goes first."""
    clear_scratch(staging, source)
    folder = staging / f"{source}.work"
    folder.mkdir()
    try:
        yield folder
    finally:
        clear_scratch(staging, source)


def clear_scratch(staging: Path, source: str) -> None:
    shutil.rmtree(staging / f"{source}.work", ignore_errors=True)


def clear_leftovers(staging: Path, there: Collection[str]) -> None:
    """Remove what a killed run left: scratch folders, and staged tars of which every clip is `there` already."""
    for folder in staging.glob("*.work"):
        shutil.rmtree(folder, ignore_errors=True)
    for path in staging.glob("*.tar"):
        if all(key in there for key in staged_keys(path)):
            path.unlink(missing_ok=True)


def staged_path(staging: Path, source: str) -> Path:
    return staging / f"{source}.tar"


def staged_keys(path: Path) -> set[str]:
    """Keys of the clips in a staged tar; empty when there is none, or when it is not readable."""
    try:
        with tarfile.open(path, "r:") as tar:
            return {name.removesuffix(".json") for name in tar.getnames() if name.endswith(".json")}
    except (OSError, tarfile.TarError):
        return set()


def staged_outcomes(staging: Path, video: SourceVideo) -> list[Outcome]:
    """Outcomes of those clips of this source video that lie staged already, made by a run that died before it could say so."""
    path = staged_path(staging, video.source)
    if not path.exists():
        return []
    wanted = {request.key for request in video.requests}
    try:
        return [
            Outcome(
                clip.key, video.source, detail="staged before", bytes=sum(map(len, clip.members.values())),
                fingerprint=clip.facts.fingerprint,
            )
            for clip in read_staged(path) if clip.key in wanted
        ]  # fmt: skip
    except (OSError, ValueError, tarfile.TarError):
        return []


def read_staged(path: Path) -> Iterator[Clip]:
    """The clips of a staged tar, one at a time. Raises OSError, ValueError or tarfile.TarError if it is damaged."""
    members: dict[str, bytes] = {}
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            key, _, extension = info.name.rpartition(".")
            file = tar.extractfile(info)
            assert file is not None
            if extension != "json":
                members[extension] = file.read()
                continue
            yield Clip(key, facts_from_json(file.read()), members)
            members = {}
