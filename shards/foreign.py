"""Tars that others wrote, made a data set where they lie: a catalog, indexes and `dataset.json` beside them; no tar is touched.

Every clip of a data set has the same members: those that nearly all samples have. What does not fit is left out of the catalog
and told, sample by sample, in `index-report.csv`.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

import cmacc
from cmacc.shards.catalog_writer import CATALOG, CatalogWriter, Entry
from cmacc.shards.clip import KEY, Facts
from cmacc.shards.dataset import META, Dataset, Meta, Shard
from cmacc.shards.errors import DatasetError
from cmacc.shards.facts import facts_from_json
from cmacc.shards.foreign_notes import NOTES, Asked, Noted, Notes, Tar, asked_of, note_name, notes_from_bytes, take_notes
from cmacc.shards.index import dali_index, energon_index, index_names
from cmacc.shards.place import Place, place
from cmacc.shards.probe import AUDIO, VIDEO
from cmacc.shards.prober import Prober
from cmacc.shards.profile import AUDIO_CODECS, VIDEO_CODECS, Profile
from cmacc.shards.publish import no_room_as
from cmacc.shards.said import Fields, Said, said

log = logging.getLogger(__name__)

REPORT = "index-report.csv"
REASONS = {
    "stub": "has neither video nor sound, as where a download failed",
    "member": "lacks a member that the others have",
    "double": "has a member twice",
    "key": "has a key that is not usable: letters, digits, _ and - only, at most 96",
    "duplicate": "has the key of an earlier clip",
    "media": "has a broken medium",
    "json": "has a json member that is not a JSON object",
    "file": "is no file that a reader of WebDataset takes",
    "tar": "is a tar that cannot be used",
}  # fmt: skip
_NEARLY_ALL = 0.9
_MOST_SPLITS = 1000
_ROWS_AT_ONCE = 20_000  # an append costs as much for a few as for many
_SOUND_TOLERANCE_S = 0.1
_PACKED = re.compile(r".*\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2|txz)", re.IGNORECASE)
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.tar")  # as dataset.json has them


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


class Left(Exception):
    """Why a sample is left out: one of REASONS, and what more is known."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def index_foreign(
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
        tars, strange = _tars(home, files, path)
        _read(home, files, path, tars, asked, workers or min(os.cpu_count() or 1, 8), found, on_progress)
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


def _tars(home: Place, files: Any, path: str) -> tuple[list[Tar], list[tuple[str, str]]]:
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


# --- reading ---


def _read(
    home: Place, files: Any, path: str, tars: list[Tar], asked: Asked, workers: int, found: Indexed,
    on_progress: Callable[[int, int, str], None] | None,
) -> None:  # fmt: skip
    """Have notes of every tar."""
    new = [tar for tar in tars if not _known(home, tar, asked)]
    found.read, found.unchanged = len(new), len(tars) - len(new)
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
            before = self._sum >> 20
            self._sum += done - self._done.get(name, 0)
            self._done[name] = done
            if self._on_progress and (self._sum >> 20 > before or self._sum == self._total):
                self._on_progress(self._sum >> 20, self._total >> 20, name)


# --- putting together ---


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
    chosen, remarks = _choose(kinds, members, home.url)
    found.members, found.remarks = chosen, remarks
    book, alike, shards = _Book(chosen), _Alike(chosen), []
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
        home.remove(META)
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


def _choose(kinds: Counter[tuple[str, ...]], wanted: Sequence[str] | None, where: str) -> tuple[tuple[str, ...], list[str]]:
    """The members that every clip shall have, media first and json last; and remarks on what nearly was one."""
    usable = ", ".join((*VIDEO, *AUDIO))
    with_media = Counter({names: n for names, n in kinds.items() if set(names) & {*VIDEO, *AUDIO}})
    media = Counter[str]()
    for names, n in with_media.items():
        media.update({m: n for m in names if m in VIDEO or m in AUDIO})
    if not media:
        have = ", ".join(sorted({m for names in kinds for m in names})) or "nothing"
        raise DatasetError(f"the samples of {where} have {have[:200]}, but neither video nor sound; one of {usable} is needed")
    if wanted is not None:
        asked = [m.lower() for m in wanted]
        lacking = [m for m in asked if not any(m in kind for kind in with_media)]
        if lacking or not any(m in media for m in asked) or len(set(asked)) < len(asked):
            why = f"no sample has {lacking[0]}" if lacking else "there must be a medium among them, and none twice"
            raise DatasetError(
                f"members {', '.join(asked)} cannot be had from {where}: {why}; leave the choice out to see it made"
            )
        return _sorted(asked), []
    # a picture matters more than sound, and what more samples have matters more than the rest
    main = max(media, key=lambda m: (media[m], m in VIDEO, -(*VIDEO, *AUDIO).index(m)))
    total = media[main]
    share = Counter[str]()
    for kind, n in with_media.items():
        if main in kind:
            share.update(dict.fromkeys(kind, n))
    chosen = [m for m, n in share.items() if n >= _NEARLY_ALL * total]
    rest = {m: n for m, n in (share | media).items() if m not in chosen and n >= 0.1 * total}
    remarks = [
        f"{n} of {sum(with_media.values())} samples have {m}, which is too few; `--members` makes it a member all the same"
        for m, n in sorted(rest.items())
    ]
    return _sorted(chosen), remarks


def _sorted(names: Sequence[str]) -> tuple[str, ...]:
    order = (*VIDEO, *AUDIO)
    rank = {m: i for i, m in enumerate(order)}
    return tuple(sorted(names, key=lambda m: (m == "json", rank.get(m, len(order)), m)))


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


class _Book:
    """Which samples become clips; what it has seen of keys and splits goes from one tar to the next."""

    def __init__(self, members: tuple[str, ...]) -> None:
        self.members = members
        self._seen: set[int] = set()
        self._splits: set[str] = set()

    def clips(self, notes: Notes) -> tuple[list[Entry], list[tuple[str, str, str]]]:
        """Entries of the catalog, and (key, reason, detail) of what is left out."""
        if notes.error:
            return [], [("", "tar", notes.error)]
        entries: list[Entry] = []
        left = [(name, "file", why) for name, why in notes.odd]
        for sample in notes.samples():
            try:
                entries.append(self._entry(sample))
            except Left as e:
                left.append((sample.path, e.reason, e.detail))
        return entries, left

    def _entry(self, sample: Noted) -> Entry:
        there = sample.extensions
        if not sample.media:
            raise Left("stub", sample.said.get("failed") or f"it has {', '.join(there)}")
        if not KEY.fullmatch(sample.key):
            raise Left("key", repr(sample.key))
        if len(set(there)) < len(there):
            raise Left("double", f"it has {', '.join(there)}")
        lacking = [m for m in self.members if m not in there]
        if lacking:
            raise Left("member", f"it has {', '.join(there)}, and lacks {', '.join(lacking)}")
        if "error" in sample.said and "json" in self.members:
            raise Left("json", sample.said["error"])
        for m in self.members:
            if "error" in sample.media.get(m, {}):
                raise Left("media", f"{m}: {sample.media[m]['error']}")
        if (seen := hash(sample.key)) in self._seen:
            raise Left("duplicate", "the first one is taken")
        self._seen.add(seen)
        facts = facts_of(sample, self.members)
        self._splits.add(facts.split)
        if len(self._splits) > _MOST_SPLITS:
            raise DatasetError(
                f"there are more than {_MOST_SPLITS} splits; name the field that holds train or test by --split-field"
            )
        places = [there.index(m) for m in self.members]
        members = tuple(sample.members[i] for i in places)
        return Entry(sample.key, facts, members, tuple(sample.digests[i] for i in places))


def facts_of(sample: Noted, members: tuple[str, ...]) -> Facts:
    """Facts of a clip: of its video and sound as they are, of its source as its maker says. Our own stand where they agree."""
    nan, known = float("nan"), sample.said
    video = next((sample.media[m] for m in members if m in VIDEO), None)
    sound = next((sample.media[m] for m in members if m in AUDIO), video)
    assert sound is not None
    seconds = float((video or sound)["seconds"])
    start_s = float(known.get("start_s", 0.0))
    end_s = known.get("end_s")
    facts = Facts(
        source=known.get("source") or f"file_{sample.key}", start_s=start_s, end_s=start_s + seconds if end_s is None else end_s,
        duration_s=seconds, n_frames=video["frames"] if video else 0, fps=video["fps"] if video else 0.0,
        width=video["width"] if video else 0, height=video["height"] if video else 0,
        keyframes=tuple(video["keyframes"]) if video else (), loudness_db=sound.get("loudness_db", nan),
        motion=(video or {}).get("motion", nan), labels=tuple(known.get("labels", ())), split=known.get("split", ""),
    )  # fmt: skip
    if known.get("ours"):
        ours = facts_from_json(known["ours"].encode())
        seen = ("n_frames", "width", "height", "keyframes")
        if all(getattr(ours, name) == getattr(facts, name) for name in seen) and abs(ours.duration_s - seconds) < 0.1:
            return replace(ours, source=facts.source, labels=facts.labels, split=facts.split)
    return facts


class _Alike:
    """Whether all clips are as one of our profiles could have made them."""

    def __init__(self, members: tuple[str, ...]) -> None:
        media = [m for m in members if m in VIDEO or m in AUDIO]
        self._pair = (media[0], media[1]) if len(media) == 2 and media[0] == "mp4" and media[1] in AUDIO_CODECS else None
        self._video = next((m for m in media if m in VIDEO), None)
        self._looks: set[tuple[Any, ...]] = set()
        self._fits = self._pair is not None
        self._gop, self._reordered = 1, False
        self.rotated = 0

    def add(self, notes: Notes, keys: set[str]) -> None:
        for sample in notes.samples():
            if sample.key in keys and not (self._video and "error" in sample.media.get(self._video, {"error": ""})):
                if self._video and sample.media[self._video]["rotation"]:
                    self.rotated += 1
                if self._pair and self._fits and not set(self._pair) - set(sample.media):
                    self._fits = self._compare(sample.media[self._pair[0]], sample.media[self._pair[1]])

    def _compare(self, video: dict[str, Any], sound: dict[str, Any]) -> bool:
        assert self._pair is not None
        if "error" in sound:
            return True  # a sample that was left out
        fps, short = video["fps"], min(video["width"], video["height"])
        self._looks.add((video["codec"], round(fps), short, sound["rate"]))
        marks = [*video["keyframes"], video["frames"]]
        self._gop = max(self._gop, *(b - a for a, b in pairwise(marks)))
        self._reordered |= video["reordered"]
        return (
            len(self._looks) == 1 and video["codec"] in VIDEO_CODECS and sound["codec"] == self._pair[1]
            and fps == round(fps) > 0 and video["constant"] and marks[0] == 0 and not video["sound"] and not video["rotation"]
            and video["frames"] == round(video["seconds"] * fps) and short >= 16 and short % 2 == 0
            and abs(video["seconds"] - sound["seconds"]) <= _SOUND_TOLERANCE_S
        )  # fmt: skip

    def profile(self) -> Profile | None:
        """None when they are not alike. quality cannot be seen, and is the default."""
        if not self._fits or self._pair is None or not self._looks:
            return None
        codec, fps, short, rate = next(iter(self._looks))
        b_frames = min(2, self._gop - 1) if self._reordered else 0
        return Profile(
            name="foreign", codec=codec, short_side=short, fps=fps, gop=self._gop, b_frames=b_frames,
            audio_codec=self._pair[1], audio_rate=rate,  # type: ignore[arg-type]
        )  # fmt: skip


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
    book = _Book(members)
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
        home.put(folder / CATALOG, CATALOG)


def _append(catalog: CatalogWriter, rows: list[tuple[int, Entry]]) -> None:
    catalog.append(np.array([number for number, _ in rows], dtype=np.int32), [entry for _, entry in rows])


def said_of(dataset: Dataset, row: int) -> Said:
    """What the text members of a foreign clip say, read by the fields it was indexed with. Raises DatasetError, ValueError."""
    there = [m for m in dataset.meta.members if m not in VIDEO and m not in AUDIO]
    asked = dataset.meta.provenance.get("index", {}).get("fields", {})
    return said(str(dataset.keys[row]), dataset.read(row, there), Fields(**asked))


def facts_with_captions(dataset: Dataset, row: int) -> Facts:
    """The catalog's facts of a foreign clip, and its captions, which are in no catalog. Raises like `said_of`."""
    facts = dataset.catalog.facts(slice(row, row + 1))[0]
    end_s = facts.duration_s
    spoken = [(a, end_s if b is None else min(b, end_s), text) for a, b, text in said_of(dataset, row).captions if a < end_s]
    return replace(facts, captions=tuple(spoken))


__all__ = ["REASONS", "REPORT", "Fields", "Indexed", "facts_of", "facts_with_captions", "index_foreign", "said_of"]
