"""Tars that others wrote, made a data set where they lie: a catalog, indexes and `dataset.json` beside them; no tar is touched.

Every clip of a data set has the same members: those that nearly all samples have. What does not fit is left out of the catalog
and told, sample by sample, in `index-report.csv`.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np

import cmacc
from cmacc.shards.catalog_writer import CATALOG, CatalogWriter, Entry
from cmacc.shards.dataset import META, Meta, Shard
from cmacc.shards.errors import DatasetError
from cmacc.shards.foreign.notes import Asked, Notes, Tar, note_name, notes_from_bytes
from cmacc.shards.foreign.profile import Alike
from cmacc.shards.foreign.read import list_tars, read_tars
from cmacc.shards.foreign.rows import REASONS, Book, choose_members
from cmacc.shards.foreign.said import Fields
from cmacc.shards.index import dali_index, energon_index, index_names
from cmacc.shards.place import Place, place
from cmacc.shards.profile import Profile
from cmacc.shards.publish import no_room_as

log = logging.getLogger(__name__)
REPORT = "index-report.csv"
_ROWS_AT_ONCE = 20_000  # an append costs as much for a few as for many


@dataclass
class Indexed:
    """What indexing gave. clips of `samples` samples are in the catalog; left_out: by reason (see REASONS), told in the report.

    read, unchanged: tars read now, and those known from before. remarks: sentences on what else deserves to be known.
    """

    clips: int = 0
    samples: int = 0
    shards: int = 0
    members: tuple[str, ...] = ()
    profile: Profile | None = None
    read: int = 0
    unchanged: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def index_shards(
    url: str | os.PathLike[str],
    *,
    fields: Fields | None = None,
    members: Sequence[str] | None = None,
    measure: bool = False,
    workers: int = 0,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Indexed:
    """Index all plain tars of a folder, or of any fsspec URL; again, it reads what is new or changed, and continues what a kill
    interrupted. No `dataset.json` is there while the index is half made.

    fields: where the json member (or a text member) has label, source video, split and caption. members: extensions of every
    clip (default: those that nine in ten samples have, at least one of them a medium). measure: decode everything for loudness_db
    and motion, which are NaN otherwise. workers: tars read at once, each with a process that opens the media (default: one a
    core, at most 8). on_progress: called with MiB read, MiB to read, and a name, from any thread but never twice at once.

    Raises DatasetError: nothing to index, a data set of our own, another writer at work, no room on the disk.
    """
    try:
        return _index(os.fspath(url).rstrip("/"), Asked(fields or Fields(), measure), members, workers, on_progress)
    except (FileNotFoundError, PermissionError) as e:
        raise DatasetError(f"{url} cannot be indexed ({e}); mend that and run the command again") from e


def _index(
    url: str, asked: Asked, members: Sequence[str] | None, workers: int, on_progress: Callable[[int, int, str], None] | None
) -> Indexed:
    files, path = _locate(url)
    home = place(url)
    with no_room_as(DatasetError, f"no room on the disk of {url}; free some and start again"), home.lock():
        home.clear()
        old = _earlier(home)
        found = Indexed()
        tars, strange = list_tars(home, files, path)
        found.read = read_tars(home, files, path, tars, asked, workers or min(os.cpu_count() or 1, 8), on_progress)
        found.unchanged = len(tars) - found.read
        _publish(home, tars, strange, asked, members, old, found)
    return found


def _locate(url: str) -> tuple[Any, str]:
    try:
        files, path = fsspec.core.url_to_fs(url)
        there = files.isdir(path)
    except Exception as e:  # each kind of bucket has errors of its own
        raise DatasetError(f"{url} cannot be read ({e}); check the address and the right to read it") from e
    if not there:
        raise DatasetError(f"{url} is no folder; give the folder that holds the tars")
    return files, path


def _earlier(home: Place) -> Meta | None:
    """`dataset.json` of an earlier index. Raises DatasetError when there is one that indexing did not write."""
    if home.size(META) is None:
        return None
    meta = Meta.from_bytes(home.read(META), f"{home.url}/{META}")
    if not meta.foreign or "index" not in meta.provenance:
        raise DatasetError(f"{home.url} is a data set already, not made by `cmacc index`; read it as it is")
    return meta


def _publish(
    home: Place, tars: list[Tar], strange: list[tuple[str, str]], asked: Asked, members: Sequence[str] | None,
    old: Meta | None, found: Indexed,
) -> None:  # fmt: skip
    def notes() -> Iterator[Notes]:
        for tar in tars:
            yield notes_from_bytes(home.read(note_name(tar.name)))

    kinds: Counter[tuple[str, ...]] = Counter()
    for each in notes():
        kinds.update(each.kinds)
    chosen, remarks = choose_members(kinds, members, home.url)
    found.members, found.remarks = chosen, remarks
    book, alike, shards = Book(chosen), Alike(chosen), []
    indexes = _Indexes(home, old, remarks)
    report = home.create(REPORT)
    try:
        lines = _Lines(report)
        for name, why in strange:
            lines.add(name, "", "tar", why)
        for each in notes():
            entries, left = book.clips(each)
            for key, reason, detail in left:
                lines.add(each.tar.name, key, reason, detail)
            if entries:
                shards.append(Shard(name=each.tar.name, clips=len(entries), bytes=each.tar.bytes, sha256=each.sha256))
                alike.add(each, {e.key for e in entries})
                indexes.publish(each)
            elif not each.error:
                remarks.append(f"{each.tar.name} holds no clip that can be used, and is left out")
        found.left_out = dict(sorted(lines.counts.items(), key=lambda p: -p[1]))
        found.samples = sum(kinds.values())
        found.clips, found.shards = sum(s.clips for s in shards), len(shards)
        report.sync()
        report.publish()
    finally:
        report.discard()
    if not shards:
        why = lines.first or "they are empty"
        raise DatasetError(f"no clip in the tars of {home.url} can be used: {why}; see {REPORT} there")
    found.profile = alike.profile()
    meta = Meta(
        profile=found.profile.to_json() if found.profile else None, foreign=True, members=chosen, shards=shards,
        provenance={"index": {**asked.to_json(), "samples": found.samples, "left_out": found.left_out, "kept": indexes.left}},
    )  # fmt: skip
    _tell_gone(home, old, {tar.name for tar in tars}, found)
    if alike.rotated:
        found.remarks.append(f"{alike.rotated} clips ask to be shown rotated; width and height are those before that")
    if old is not None and _same(old, meta) and CatalogWriter(home, old.clips, old.members).intact():
        return
    meta.provenance["versions"] = {"cmacc": cmacc.__version__}
    if old is not None:
        _tell_lost(home, old, found)
    _write_catalog(home, chosen, {s.name: i for i, s in enumerate(shards)}, notes())
    home.publish(META, meta.to_bytes())
    log.info("%s: %d clips in %d shards", home.url, found.clips, found.shards)


def _same(old: Meta, new: Meta) -> bool:
    return {**old.model_dump(), "provenance": old.provenance["index"]} == {
        **new.model_dump(), "provenance": new.provenance["index"]
    }  # fmt: skip


def _tell_gone(home: Place, old: Meta | None, names: set[str], found: Indexed) -> None:
    for shard in old.shards if old else ():
        if shard.name not in names:
            for name in set(index_names(shard.name)) - set(_kept(old)):
                home.remove(name)
            found.remarks.append(f"{shard.name} was indexed before and is gone, and with it {shard.clips} clips")


def _kept(old: Meta | None) -> list[str]:
    """Indexes that are not ours."""
    return list(old.provenance["index"].get("kept", ())) if old else []


def _tell_lost(home: Place, old: Meta, found: Indexed) -> None:
    with suppress(DatasetError):
        added = CatalogWriter(home, old.clips, old.members).added
        if added:
            found.remarks.append(f"the clips are no longer the same, so columns {', '.join(added)} are gone; compute them again")


class _Lines:
    """The report being written."""

    def __init__(self, part: Any) -> None:
        self._part = part
        self.counts: Counter[str] = Counter()
        self.first = ""
        self._write(("shard", "key", "reason", "detail"))

    def add(self, shard: str, key: str, reason: str, detail: str) -> None:
        plain = [" ".join("".join(c if c.isprintable() else " " for c in text).split()) for text in (shard, key, reason, detail)]
        self.first = self.first or f"{plain[0]}{': ' + plain[1] if key else ''} {REASONS[reason]} ({plain[3]})"
        self.counts[reason] += 1
        self._write(plain)

    def _write(self, row: Sequence[str]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(row)
        self._part.write(line.getvalue().encode(errors="replace"))


class _Indexes:
    """The two indexes of each tar. left: names of those that are not ours and say something else than the tar."""

    def __init__(self, home: Place, old: Meta | None, remarks: list[str]) -> None:
        self.left: list[str] = []
        self._home, self._remarks = home, remarks
        self._before, self._kept = {s.name for s in old.shards} if old else set(), _kept(old)

    def publish(self, notes: Notes) -> None:
        """Write what is not there, or not true any more and ours; an index of somebody else's is left alone, and told."""
        tar = notes.tar.name
        members = [m for sample in notes.samples() for m in sample.members]
        for name, data in zip(index_names(tar), (dali_index(members), energon_index(members)), strict=True):
            there = self._home.read(name) if self._home.size(name) is not None else None
            if there is None or (there != data and tar in self._before and name not in self._kept):
                self._home.publish(name, data)
            elif there != data:
                self.left.append(name)
                self._remarks.append(f"{name} was there and does not agree with {tar}; it is left alone: delete it for a new one")


def _write_catalog(home: Place, members: tuple[str, ...], numbers: dict[str, int], notes: Iterator[Notes]) -> None:
    book = Book(members)
    with home.aside("index") as folder:
        catalog = CatalogWriter.create(place(folder), members)
        rows: list[tuple[int, Entry]] = []
        for each in notes:
            entries, _ = book.clips(each)
            rows += [(numbers[each.tar.name], entry) for entry in entries]
            if len(rows) >= _ROWS_AT_ONCE:
                _append(catalog, rows)
                rows = []
        if rows:
            _append(catalog, rows)
        home.remove(META)  # from here until the new one is there, this is no data set
        home.put(folder / CATALOG, CATALOG)


def _append(catalog: CatalogWriter, rows: list[tuple[int, Entry]]) -> None:
    catalog.append(np.array([number for number, _ in rows], dtype=np.int32), [entry for _, entry in rows])
