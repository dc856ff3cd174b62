"""Is a data set what it says it is? Every fault is one sentence: what, where, how to mend."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np

from cmacc.shards.clip import KEY, Facts
from cmacc.shards.dataset import Dataset, Shard
from cmacc.shards.errors import DatasetError
from cmacc.shards.facts import facts_from_json
from cmacc.shards.index import Member, clips, dali_index, energon_index, index_names, scan

_BLOCK = 1 << 20
_SOUND_TOLERANCE_S = 0.1
_OURS = re.compile(r"clips-\d{6}\.(tar|idx|tar\.idx)")


@dataclass(frozen=True)
class Fault:
    """code: `dataset`, `missing`, `size`, `checksum`, `tar`, `index`, `members`, `key`, `duplicate`, `count`, `catalog`,
    `stray`, `decode` or `duration`. where: a file, or KEY.MEMBER. sentence: for people, with the mend."""

    code: str
    where: str
    sentence: str


def lint(url: str | os.PathLike[str], *, samples: int = 64, seed: int = 0, checksums: bool = True) -> list[Fault]:
    """All faults found in a data set (local or any fsspec URL); an empty list means none.

    samples: how many clips are decoded, their first frame and first sound (all of them when there are no more than that).
    checksums: also read every shard whole and compare its sha256.
    """
    try:
        dataset = Dataset.open(url)
    except DatasetError as e:
        return [Fault("dataset", str(url), str(e))]
    files, path = fsspec.core.url_to_fs(dataset.url)
    faults = list(_strays(dataset, files, path))
    whole = [True] * len(dataset.meta.shards)
    seen: dict[str, str] = {}
    begins = [0, *accumulate(s.clips for s in dataset.meta.shards)]
    for number, shard in enumerate(dataset.meta.shards):
        found = list(_shard(dataset, shard, begins[number], files, path, seen, checksums))
        whole[number] = not found
        faults += found
    rows = np.flatnonzero(np.repeat(whole, [s.clips for s in dataset.meta.shards]))
    if len(rows) > samples:
        draws = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)).random_raw(len(rows))
        rows = np.sort(rows[np.argsort(draws, kind="stable")[:samples]])
    for row in rows.tolist():
        faults += _media(dataset, row)
    return faults


def _strays(dataset: Dataset, files: Any, path: str) -> Iterator[Fault]:
    names = {s.name for s in dataset.meta.shards}
    for found in sorted(Path(f).name for f in files.ls(path, detail=False)):
        if _OURS.fullmatch(found) and f"{found.partition('.')[0]}.tar" not in names:
            yield Fault("stray", found, f"{found} is not named in dataset.json; a writer that opens the data set removes it")


def _shard(
    dataset: Dataset, shard: Shard, begin: int, files: Any, path: str, seen: dict[str, str], checksums: bool
) -> Iterator[Fault]:
    """Faults of one shard, from its size down to its catalog rows; begin: row number of its first clip."""
    name, again = shard.name, "copy it again, or reshard without it"
    try:
        with files.open(f"{path}/{name}", "rb") as file:
            size = file.seek(0, 2)
            if size != shard.bytes:
                said = f"{name} has {size} bytes, dataset.json says {shard.bytes}"
                yield Fault("size", name, f"{said}: it is truncated or changed; {again}")
            elif checksums and _sha256(file) != shard.sha256:
                yield Fault("checksum", name, f"{name} has a wrong sha256: its content changed; {again}")
            try:
                file.seek(0)
                members = scan(file)
            except tarfile.TarError as e:
                yield Fault("tar", name, f"{name} is damaged ({e}); {again}")
                return
            yield from _indexes(name, members, files, path)
            groups = clips(members)
            if len(groups) != shard.clips:
                yield Fault("count", name, f"{name} holds {len(groups)} clips, dataset.json says {shard.clips}; {again}")
            for key, group in groups:
                yield from _members(dataset, name, key, group, seen)
            if len(groups) == shard.clips:
                yield from _rows(dataset, name, begin, groups, file)
    except FileNotFoundError:
        yield Fault("missing", name, f"{name} is missing; {again}")


def _sha256(file: Any) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _indexes(name: str, members: list[Member], files: Any, path: str) -> Iterator[Fault]:
    for index, data in zip(index_names(name), (dali_index(members), energon_index(members)), strict=True):
        mend = "write it again by shards.index.publish_indexes"
        try:
            if files.cat_file(f"{path}/{index}") != data:
                yield Fault("index", index, f"{index} does not agree with {name}; {mend}")
        except FileNotFoundError:
            yield Fault("index", index, f"{index} is missing; {mend}")


def _members(dataset: Dataset, name: str, key: str, group: list[Member], seen: dict[str, str]) -> Iterator[Fault]:
    where = f"{name}: {key}"
    if not KEY.fullmatch(key):
        yield Fault("key", where, f"{name} has a clip with the key {key!r}; letters, digits, '_' and '-' only: write it again")
    there, wanted = [m.extension for m in group], dataset.meta.members
    if key in seen:
        apart = seen[key] == name
        say = "in two places: its members are not adjacent or double" if apart else f"in {seen[key]} too"
        yield Fault("members" if apart else "duplicate", where, f"clip {key} of {name} is {say}; reshard the data set")
    elif sorted(there) != sorted(wanted):
        said = f"has {', '.join(there)}, not {', '.join(wanted)}"
        yield Fault("members", where, f"clip {key} of {name} {said}; write the shard again")
    seen[key] = name


def _rows(dataset: Dataset, name: str, begin: int, groups: list[tuple[str, list[Member]]], file: Any) -> Iterator[Fault]:
    """The catalog's rows of a shard against its members."""
    rows, catalog = slice(begin, begin + len(groups)), dataset.catalog
    mend = "delete catalog.zarr and open the data set for writing: it is made again from the shards"
    try:
        keys, facts = catalog.texts("key", rows), catalog.facts(rows)
        places = np.stack([catalog.column("offset", rows), catalog.column("size", rows)], axis=-1)
    except Exception as e:  # whatever zarr or a codec makes of a damaged file
        yield Fault("catalog", "catalog.zarr", f"the catalog rows of {name} cannot be read ({type(e).__name__}: {e}); {mend}")
        return
    for (key, group), row_key, row_facts, place in zip(groups, keys, facts, places, strict=True):
        by_extension = {m.extension: m for m in group}
        if set(by_extension) != set(dataset.meta.members):
            continue
        try:
            file.seek(by_extension["json"].offset)
            said = facts_from_json(file.read(by_extension["json"].size))
        except ValueError as e:
            yield Fault("members", f"{key}.json", f"the facts of clip {key} in {name} are not usable ({e}); reshard without it")
            continue
        tar_place = [(by_extension[m].offset, by_extension[m].size) for m in dataset.meta.members]
        if row_key != key or tar_place != [tuple(p) for p in place.tolist()]:
            yield Fault("catalog", f"{name}: {key}", f"the catalog row of clip {key} does not agree with {name}; {mend}")
        elif replace(said, captions=()) != row_facts:
            yield Fault("catalog", f"{name}: {key}", f"the catalog has other facts of clip {key} than {name}; {mend}")


def _media(dataset: Dataset, row: int) -> Iterator[Fault]:
    """Checksums of one clip's media members, then what a decoder makes of their beginning."""
    key = str(dataset.keys[row])
    name = dataset.meta.shards[int(dataset.shard_of_row[row])].name
    mend = f"reshard without it (where key <> '{key}')"
    try:
        found = dataset.read(row, check=True)
    except DatasetError as e:
        yield Fault("checksum", f"{name}: {key}", str(e))
        return
    facts = facts_from_json(found.pop("json"))
    for member, data in found.items():
        where = f"{key}.{member}"
        try:
            wrong = _video(dataset, facts, data) if member == dataset.profile.video_member else _sound(facts, data)
        except (av.FFmpegError, EOFError, ValueError, IndexError) as e:
            yield Fault("decode", where, f"{where} in {name} cannot be decoded ({type(e).__name__}: {e}); {mend}")
            continue
        if wrong:
            yield Fault(wrong[0], where, f"{where} in {name} {wrong[1]}; {mend}")


def _video(dataset: Dataset, facts: Facts, data: bytes) -> tuple[str, str] | None:
    with av.open(io.BytesIO(data), "r") as file:
        if len(file.streams) != 1 or not file.streams.video:
            return "decode", "should hold one video stream and nothing else"
        stream = file.streams.video[0]
        if stream.codec.canonical_name != dataset.profile.codec:
            return "decode", f"is {stream.codec.canonical_name}, the profile says {dataset.profile.codec}"
        frame = next(file.decode(video=0))
        if (frame.width, frame.height) != (facts.width, facts.height):
            return "decode", f"has frames of {frame.width} x {frame.height}, its facts say {facts.width} x {facts.height}"
        seconds = float((stream.duration or 0) * (stream.time_base or 0))
        if stream.frames != facts.n_frames or abs(seconds - facts.duration_s) > 1 / facts.fps:
            said = f"{facts.n_frames} and {facts.duration_s:.3f} s"
            return "duration", f"has {stream.frames} frames and lasts {seconds:.3f} s, its facts say {said}"
    return None


def _sound(facts: Facts, data: bytes) -> tuple[str, str] | None:
    with av.open(io.BytesIO(data), "r") as file:
        if len(file.streams) != 1 or not file.streams.audio:
            return "decode", "should hold one audio stream and nothing else"
        stream = file.streams.audio[0]
        next(file.decode(audio=0))
        seconds = float((stream.duration or 0) * (stream.time_base or 0))
        if abs(seconds - facts.duration_s) > _SOUND_TOLERANCE_S:
            return "duration", f"lasts {seconds:.3f} s, the video {facts.duration_s:.3f} s"
    return None
