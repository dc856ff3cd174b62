"""Notes on a foreign tar: all that reading it once has told, kept beside it, so that an index that is interrupted, refreshed or
asked for other members need not read it again.

A gzipped file of JSON lines: first what the tar is, then a line for each sample in it, usable or not.
"""

from __future__ import annotations

import gzip
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from cmacc.shards.clip import AUDIO, VIDEO
from cmacc.shards.facts import facts_to_json
from cmacc.shards.foreign.said import Fields, Said, said
from cmacc.shards.foreign.tar import ForeignMember, ForeignTar, Sample, Sink
from cmacc.shards.prober import Prober

NOTES = ".index-notes"
FORMAT = 1
_TEXT_BYTES = 16 << 20


@dataclass(frozen=True)
class Tar:
    """A tar as it was found. stamp: what changes when its content does (entity tag, or time of change)."""

    name: str
    bytes: int
    stamp: str


@dataclass(frozen=True)
class Asked:
    """What was asked of each sample; notes are good for this alone."""

    fields: Fields = field(default_factory=Fields)
    measure: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "fields": self.fields.to_json(), "measure": self.measure}


@dataclass(frozen=True)
class Notes:
    """What one tar holds. sha256: hex, of all of it. error: why it cannot be used, "" when it can. kinds: how many samples have
    which extensions. odd: members that are no files."""

    tar: Tar
    sha256: str
    error: str
    kinds: Counter[tuple[str, ...]]
    odd: list[tuple[str, str]]
    _lines: list[bytes]

    def samples(self) -> Iterator[Noted]:
        for line in self._lines:
            yield Noted(json.loads(line))


class Noted:
    """A sample from its line. media: traits of each medium by extension, or `{"error": sentence}`."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.path: str = data["path"]
        self.key = self.path.rpartition("/")[2]
        self.members = [ForeignMember(*m[:4]) for m in data["members"]]
        self.digests = [bytes.fromhex(m[4]) for m in data["members"]]
        self.media: dict[str, dict[str, Any]] = data["media"]
        self.said: dict[str, Any] = data["said"]

    @property
    def extensions(self) -> list[str]:
        """In lower case, as webdataset hands them out."""
        return [m.extension.lower() for m in self.members]


def note_name(tar: str) -> str:
    return f"{NOTES}/{tar}.json.gz"


def notes_from_bytes(data: bytes) -> Notes:
    """Raises ValueError, KeyError, TypeError, OSError or EOFError for what are no notes."""
    first, *lines = gzip.decompress(data).splitlines()
    head = json.loads(first)
    kinds = Counter({tuple(names): n for names, n in head["kinds"]})
    return Notes(Tar(**head["tar"]), head["sha256"], head["error"], kinds, [(a, b) for a, b in head["odd"]], lines)


def asked_of(data: bytes) -> tuple[Tar, dict[str, Any]]:
    """For which tar notes were made, and what was asked. Raises like `notes_from_bytes`."""
    head = json.loads(gzip.decompress(data).partition(b"\n")[0])
    return Tar(**head["tar"]), head["asked"]


def take_notes(
    tar: Tar, file: BinaryIO, local: str | None, asked: Asked, prober: Prober, scratch: Path, tell: Callable[[int], None]
) -> bytes:
    """Read a tar to its end. local: its path, where it has one; the media of others go through files in `scratch`.

    tell: called with the bytes read so far, for each sample. Raises OSError; a tar that cannot be used is notes that say why.
    """
    reader = _Reader(asked.fields, None if local else scratch)
    whole = ForeignTar(file, reader.keep)
    lines, kinds, error = [], Counter[tuple[str, ...]](), ""
    try:
        for sample in whole:
            line = _line(sample, reader, local, asked, prober)
            kinds[tuple(sorted({m.extension.lower() for m in sample.members}))] += 1
            lines.append(json.dumps(line).encode())
            tell(whole.size)
    except tarfile.TarError as e:
        lines, error = [], str(e)
    head = {
        "tar": vars(tar), "asked": asked.to_json(), "sha256": whole.sha256, "error": error,
        "kinds": [[list(names), n] for names, n in kinds.items()], "odd": whole.odd if not error else [],
    }  # fmt: skip
    return gzip.compress(b"\n".join([json.dumps(head).encode(), *lines]), compresslevel=3, mtime=0)


class _Reader:
    """Keeps of a sample what must be looked into: texts in memory, media in files where the tar itself is out of reach."""

    def __init__(self, fields: Fields, scratch: Path | None) -> None:
        self.wanted = {"json", "txt", "cls", *(v for v in vars(fields).values() if v)}
        self.scratch = scratch
        self.sample: Sample | None = None
        self.texts: dict[str, list[bytes]] = {}
        self.files: dict[str, Path] = {}

    def keep(self, sample: Sample, member: ForeignMember) -> Sink | None:
        if sample is not self.sample:
            self.sample, self.texts = sample, {}
            for path in self.files.values():
                path.unlink()
            self.files = {}
        extension = member.extension.lower()
        if extension in self.wanted and member.size <= _TEXT_BYTES:
            return self.texts.setdefault(extension, []).append
        if self.scratch and extension in (*VIDEO, *AUDIO):
            path = self.files[extension] = self.scratch / extension
            path.write_bytes(b"")
            return lambda block: _append(path, block)
        return None


def _append(path: Path, block: bytes) -> None:
    with path.open("ab") as file:
        file.write(block)


def _line(sample: Sample, reader: _Reader, local: str | None, asked: Asked, prober: Prober) -> dict[str, Any]:
    media: dict[str, Any] = {}
    for m in sample.members:
        extension = m.extension.lower()
        kind = "video" if extension in VIDEO else "audio" if extension in AUDIO else None
        if kind is None:
            continue
        place = (local, m.offset) if local else (str(reader.files[extension]), 0)
        try:
            media[extension] = prober.probe(*place, m.size, kind, measure=asked.measure)
        except ValueError as e:
            media[extension] = {"error": str(e)}
    texts = {extension: b"".join(blocks) for extension, blocks in reader.texts.items()}
    try:
        known: dict[str, Any] = _said_json(said(sample.key, texts, asked.fields))
    except ValueError as e:
        rest = {extension: data for extension, data in texts.items() if extension != "json"}
        known = {**_said_json(said(sample.key, rest, asked.fields)), "error": str(e)}
    members = [[m.name, m.header, m.offset, m.size, d.hex()] for m, d in zip(sample.members, sample.digests, strict=True)]
    return {"path": sample.path, "members": members, "media": media, "said": known}


def _said_json(found: Said) -> dict[str, Any]:
    """Captions are in no catalog: they stay where they are."""
    try:
        ours = facts_to_json(replace(found.ours, captions=())).decode() if found.ours else ""
    except ValueError:
        ours = ""
    return {**{k: v for k, v in vars(found).items() if k not in ("ours", "captions")}, "ours": ours}
