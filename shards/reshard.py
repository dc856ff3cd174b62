"""Data sets in, another data set out: filter, subset, merge, order, split, resize; bytes are copied, nothing is decoded."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
from numpy.typing import NDArray

import cmacc
from cmacc.shards.clip import Clip
from cmacc.shards.dataset import META, Dataset, Meta
from cmacc.shards.errors import DatasetError
from cmacc.shards.facts import facts_from_json
from cmacc.shards.profile import Profile
from cmacc.shards.query import column_values, matching
from cmacc.shards.writer import DatasetWriter

log = logging.getLogger(__name__)


class Plan(NamedTuple):
    """Which clips, in which order: numbers of source and row, (n,). duplicates: clips left out, their key came before."""

    source: NDArray[np.int32]
    row: NDArray[np.int64]
    duplicates: int


@dataclass(frozen=True)
class Resharded:
    """What a reshard did. selected = written + there already (+ left out by the transcoder)."""

    selected: int
    written: int
    there: int
    duplicates: int
    fingerprint: str


def reshard(
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    where: str | None = None,
    order: str = "source",
    shard_bytes: int = 256 * 2**20,
    limit: int | None = None,
    split: str | None = None,
    members: Sequence[str] | None = None,
    transcode: Callable[[Iterator[Clip]], Iterable[Clip]] | None = None,
    profile: Profile | None = None,
    on_commit: Callable[[str, list[str]], None] | None = None,
) -> Resharded:
    """Copy chosen clips of `sources` into the data set `out`; running it again continues where it stopped.

    where: an SQL expression over the catalog's columns. order: `source`, `shuffle:SEED` or `by:COLUMN` (ascending).
    limit: take the first so many after ordering. split: e.g. `train:0.9,val:0.1`, decided by a hash of the source video,
    so that no video is in two splits; without it clips keep theirs. members: media extensions to keep (default: all).
    transcode, profile: a function from clips to clips of that profile, for data sets that shall be encoded anew.
    Columns added to all the sources (embeddings) come along, unless clips are transcoded. Raises DatasetError.
    """
    opened = [Dataset.open(s) for s in sources]
    kind, kept = _common(opened, members)
    if (transcode is None) != (profile is None):
        raise DatasetError("a transcoder needs the profile it encodes to, and a profile needs a transcoder: give both or none")
    shares = parse_split(split) if split else None
    made_by: dict[str, Any] = {
        "sources": [{"fingerprint": d.fingerprint, "clips": len(d)} for d in opened],
        "where": where, "order": order, "limit": limit, "split": split, "members": list(kept),
    }  # fmt: skip
    _refuse_another(Path(out), made_by)
    plan = make_plan(opened, where=where, order=order, limit=limit)
    if not len(plan.row):
        raise DatasetError(f"no clip of {', '.join(d.url for d in opened)} fits where {where!r}; nothing was written")
    provenance = {"reshard": made_by, "versions": {"cmacc": cmacc.__version__, "duckdb": duckdb.__version__}}
    out_members = profile.members if profile else (*kept, "json")
    with DatasetWriter(
        out, profile or kind, shard_bytes=shard_bytes, provenance=provenance, members=out_members, on_commit=on_commit
    ) as writer:
        there = len(writer.keys)
        clips = _clips(opened, plan, kept, shares, frozenset(writer.keys))
        for clip in clips if transcode is None else transcode(clips):
            writer.add(clip)
        written = len(writer.keys) - there
    done = Dataset.open(out)
    if transcode is None:
        _carry_columns(opened, plan, done)
    log.info("%s: %d clips written, %d there already, %d duplicate keys left out", done.url, written, there, plan.duplicates)
    return Resharded(len(plan.row), written, there, plan.duplicates, done.fingerprint)


def make_plan(datasets: Sequence[Dataset], *, where: str | None = None, order: str = "source", limit: int | None = None) -> Plan:
    """Choose and order clips. Of clips with the same key the first source's is taken. Raises DatasetError."""
    if limit is not None and limit < 1:
        raise DatasetError(f"limit is {limit}; give 1 or more")
    rows, seen, duplicates = [], set[str](), 0
    for dataset in datasets:
        found = matching(dataset, where)
        keys = dataset.keys[found].tolist()
        new = np.array([key not in seen for key in keys], dtype=bool)
        seen.update(keys)
        duplicates += len(found) - int(new.sum())
        rows.append(found[new])
    source = np.repeat(np.arange(len(rows), dtype=np.int32), [len(r) for r in rows])
    row = np.concatenate(rows)
    kind, _, value = order.partition(":")
    if order == "source":
        turn = np.arange(len(row))
    elif kind == "shuffle" and value.isdecimal():
        draws = np.random.Philox(key=np.array([int(value), 0], dtype=np.uint64)).random_raw(len(row))
        turn = np.argsort(draws, kind="stable")
    elif kind == "by" and value:
        turn = np.argsort(np.concatenate([_sortable(d, value)[r] for d, r in zip(datasets, rows, strict=True)]), kind="stable")
    else:
        raise DatasetError(f"order {order!r} is not known; give source, shuffle:SEED or by:COLUMN")
    return Plan(source[turn][:limit], row[turn][:limit], duplicates)


def parse_split(text: str) -> list[tuple[str, float]]:
    """`train:0.9,val:0.1` as names and the share at which each ends: [("train", 0.9), ("val", 1.0)]. Raises DatasetError."""
    shares, end = [], 0.0
    for part in text.split(","):
        name, _, share = part.strip().partition(":")
        try:
            end += float(share)
        except ValueError:
            end = float("nan")
        shares.append((name, end))
    names = [name for name, _ in shares]
    rising = all(b > a for (_, a), (_, b) in pairwise([("", 0.0), *shares]))
    if not all(names) or len(set(names)) < len(names) or not rising or abs(end - 1) > 1e-6:
        raise DatasetError(f"split {text!r} is not understood; give names and shares that make 1, as in train:0.9,val:0.1")
    return [*shares[:-1], (names[-1], 1.0)]


def split_of(source: str, shares: Sequence[tuple[str, float]]) -> str:
    """The split of a source video: the same for all its clips, in any data set and at any time."""
    place = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") / 2**64
    return next((name for name, end in shares if place < end), shares[-1][0])


def _common(datasets: Sequence[Dataset], members: Sequence[str] | None) -> tuple[Profile, tuple[str, ...]]:
    """The profile all sources have, and the media members to keep."""
    if not datasets:
        raise DatasetError("there is nothing to reshard; name one data set or more")
    first = datasets[0]
    for other in datasets[1:]:
        if other.profile != first.profile or other.meta.members != first.meta.members:
            raise DatasetError(f"{first.url} and {other.url} have different profiles; transcode one before merging them")
    media = first.meta.members[:-1]
    unknown = [m for m in members or () if m not in media]
    if unknown or (members is not None and not members):
        raise DatasetError(f"members {', '.join(unknown) or 'none'} cannot be kept; {first.url} has {', '.join(media)}")
    return first.profile, tuple(m for m in media if members is None or m in members)


def _refuse_another(out: Path, made_by: dict[str, Any]) -> None:
    """What is there must come from the same question to the same sources: only then is it continued."""
    file = out / META
    if file.exists() and Meta.from_bytes(file.read_bytes(), str(file)).provenance.get("reshard") != made_by:
        raise DatasetError(f"{out} holds clips that came from elsewhere or by another choice; write to a new folder")


def _sortable(dataset: Dataset, name: str) -> NDArray[Any]:
    values = column_values(dataset, name)
    if values.dtype == object:
        raise DatasetError(f"order by:{name} makes no sense: {name} holds lists; take a column of numbers or names")
    return values


def _clips(
    datasets: Sequence[Dataset],
    plan: Plan,
    kept: tuple[str, ...],
    shares: Sequence[tuple[str, float]] | None,
    there: frozenset[str],
) -> Iterator[Clip]:
    for source, row in zip(plan.source.tolist(), plan.row.tolist(), strict=True):
        dataset = datasets[source]
        key = str(dataset.keys[row])
        if key in there:
            continue
        found = dataset.read(row, (*kept, "json"))
        try:
            facts = facts_from_json(found.pop("json"))
        except ValueError as e:
            raise DatasetError(f"clip {key} of {dataset.url} cannot be copied: {e}; leave it out by key <> '{key}'") from e
        yield Clip(key, replace(facts, split=split_of(facts.source, shares)) if shares else facts, found)


def _carry_columns(datasets: Sequence[Dataset], plan: Plan, out: Dataset) -> None:
    """Add to `out` the columns that all sources had added, rows in its order."""
    added = set.intersection(*(set(d.catalog.added) for d in datasets))
    begin = np.cumsum([0, *map(len, datasets)])
    for name in sorted(added):
        parts = [d.catalog.column(name) for d in datasets]
        if len({(p.shape[1:], p.dtype) for p in parts}) > 1:
            log.warning("column %s is left out: its shape or type differs between the sources", name)
            continue
        chosen = np.concatenate(parts)[begin[plan.source] + plan.row]
        out.catalog.add_column(name, chosen, datasets[0].catalog.attrs(name), replace=True)
