"""Data sets in, another data set out: filter, subset, merge, order, split, resize; bytes are copied, nothing is decoded.

A plan says which clips come in which order, a layout where each byte of theirs will lie; then every shard is a piece of work
by itself. What is done is noted in `OUT/.reshard/`, so that the same command goes on after a kill; the catalog and
`dataset.json` come last, and until then there is no data set.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

import duckdb
import numpy as np

import cmacc
from cmacc.shards.carried import carry_columns, catalog_columns
from cmacc.shards.catalog_writer import CatalogWriter
from cmacc.shards.choice import Choice, Pick, Plan, make_plan
from cmacc.shards.clip import Clip
from cmacc.shards.copying import Copied, copy_shard, read_clips, written_anew
from cmacc.shards.dataset import META, Dataset, Meta, Shard
from cmacc.shards.errors import DatasetError
from cmacc.shards.layout import Layout, lay_out
from cmacc.shards.place import Folder, Place, place, public_address
from cmacc.shards.profile import Profile
from cmacc.shards.publish import no_room_as
from cmacc.shards.writer import DatasetWriter

log = logging.getLogger(__name__)

_NOTES = ".reshard"
_REMOTE_WORKERS = 8
_NO_PLAN = Plan(np.zeros(0, np.int32), np.zeros(0, np.int64))


@dataclass(frozen=True)
class Resharded:
    """What a reshard did, in clips. selected = written + there already (+ left out by the transcoder).

    duplicates: left out because their key came before; near: because their like did (dedup). fingerprint: of dataset.json.
    """

    selected: int
    written: int
    there: int
    duplicates: int
    near: int
    shards: int
    bytes: int
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
    balance: str | None = None,
    dedup: float | None = None,
    diverse: int | None = None,
    embedding: str | None = None,
    members: Sequence[str] | None = None,
    pick: Pick | None = None,
    transcode: Callable[[Iterator[Clip]], Iterable[Clip]] | None = None,
    profile: Profile | None = None,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Resharded:
    """Copy chosen clips of `sources` into the data set `out`, folders or fsspec URLs; the same call continues where it stopped.

    where, order, limit, split, balance, dedup, diverse, embedding: see `Choice`. pick: how diverse clips are picked.
    members: media extensions to keep (default: all). workers: shards at work at once (default: one a core and one more).
    transcode, profile: a function from clips to clips of that profile, for data sets that shall be encoded anew.
    Columns added to all the sources (embeddings) come along, unless clips are transcoded.
    on_progress: called with clips done and clips in all. Raises DatasetError.
    """
    choice = Choice(where, order, dedup, balance, diverse, limit, split, embedding)
    opened = [Dataset.open(s) for s in sources]
    if (transcode is None) != (profile is None):
        raise DatasetError("a transcoder needs the profile it encodes to, and a profile needs a transcoder: give both or none")
    kept = _common(opened, members, transcode is not None)
    provenance = _provenance(opened, choice, kept, profile, shard_bytes)
    home = place(out)
    tell = on_progress or (lambda done, total: None)
    with no_room_as(DatasetError, f"no room at {home.url}; free some, and the same command continues: what was copied stays"):
        if transcode is not None and profile is not None:
            return _transcoded(opened, home, choice, pick, provenance, transcode, profile, shard_bytes, tell)
        return _Copying(opened, home, choice, pick, kept, shard_bytes, provenance, workers, tell).run()


class _Copying:
    """One reshard that copies. `run` is all of it, step by step; each step finds what an earlier attempt left."""

    def __init__(
        self,
        datasets: list[Dataset],
        home: Place,
        choice: Choice,
        pick: Pick | None,
        members: tuple[str, ...],
        shard_bytes: int,
        provenance: dict[str, Any],
        workers: int | None,
        tell: Callable[[int, int], None],
    ) -> None:
        self.datasets, self.home, self.choice, self.pick = datasets, home, choice, pick
        self.members, self.shard_bytes, self.provenance, self.tell = members, shard_bytes, provenance, tell
        local = isinstance(home, Folder) and all("://" not in d.url for d in datasets)
        # one waits for the disk while the others work: a third more speed on two cores
        self.workers = workers or ((os.cpu_count() or 1) + 1 if local else _REMOTE_WORKERS)

    def run(self) -> Resharded:
        """Raises DatasetError. Planning needs no lock; whoever held it until then may have finished the very same."""
        question = _question(self.provenance)
        if (done := self._finished(question)) is not None:
            return done
        plan = self._noted(question) or self._planned()
        with self.home.lock():
            if (done := self._finished(question)) is not None:
                return done
            self.home.clear()
            plan = self._noted(question) or self._note(plan, question)
            layout = lay_out(self.datasets, plan, self.members, self.shard_bytes)
            with ThreadPoolExecutor(1) as aside:
                # all that the catalog says is known before a byte is copied, but for digests of what is written anew
                early = None if written_anew(layout, self.members) else aside.submit(self._write_catalog, plan, layout, [])
                there, copied = self._copy(plan, layout)
                if early is None:
                    self._write_catalog(plan, layout, copied)
                else:
                    early.result()
            meta = self._publish(copied)
            self.home.remove(_NOTES)
        log.info("%s: %d clips in %d shards", self.home.url, len(plan.row), layout.count)
        if plan.duplicates:
            log.warning("%d clips were left out: a data set named earlier has their keys", plan.duplicates)
        return _result(meta, Dataset.open(self.home.url).fingerprint, len(plan.row), there, plan)

    def _finished(self, question: dict[str, Any]) -> Resharded | None:
        """The data set that is there already, if it is this one."""
        if self.home.size(META) is None:
            return None
        dataset = Dataset.open(self.home.url)
        if _question(dataset.meta.provenance) != question:
            raise DatasetError(f"{self.home.url} holds clips from elsewhere or of another choice; write to a new folder")
        self.home.remove(_NOTES)
        return _result(dataset.meta, dataset.fingerprint, len(dataset), len(dataset), _NO_PLAN)

    def _noted(self, question: dict[str, Any]) -> Plan | None:
        """The plan of an earlier attempt at the same."""
        if "question.json" not in self.home.names(_NOTES):
            return None
        if json.loads(self.home.read(f"{_NOTES}/question.json")) != question:
            said = f"{self.home.url} holds a reshard of another choice that was not finished"
            raise DatasetError(f"{said}; finish it by its own command, or write to a new folder")
        with np.load(BytesIO(self.home.read(f"{_NOTES}/plan.npz")), allow_pickle=False) as kept:
            split = kept.get("split")
            return Plan(kept["source"], kept["row"], split, tuple(kept["splits"].tolist()), *kept["left"].tolist())

    def _planned(self) -> Plan:
        if tars := [name for name in self.home.names() if name.endswith(".tar")]:
            raise DatasetError(f"{self.home.url} has shards ({tars[0]}, …) but no dataset.json; write to another folder")
        plan = make_plan(self.datasets, self.choice, self.pick)
        if not len(plan.row):
            raise _nothing(self.datasets, self.choice)
        return plan

    def _note(self, plan: Plan, question: dict[str, Any]) -> Plan:
        arrays: dict[str, Any] = plan._asdict()
        arrays = {k: arrays[k] for k in ("source", "row", "split") if arrays[k] is not None}
        arrays |= {"splits": np.array(plan.splits, dtype="U"), "left": np.array([plan.duplicates, plan.near])}
        buffer = BytesIO()
        np.savez(buffer, **arrays)
        self.home.publish(f"{_NOTES}/plan.npz", buffer.getvalue())
        self.home.publish(f"{_NOTES}/question.json", json.dumps(question, sort_keys=True).encode())
        return plan

    def _copy(self, plan: Plan, layout: Layout) -> tuple[int, list[Copied]]:
        """Copy all shards that are not there; returns how many clips were, and all the shards."""
        copied: dict[int, Copied] = {}
        noted = set(self.home.names(_NOTES))
        for number in range(layout.count):
            note = f"{layout.name(number)}.json"
            if note in noted:
                done = _from_note(json.loads(self.home.read(f"{_NOTES}/{note}")))
                if self.home.size(done.shard.name) == done.shard.bytes:
                    copied[number] = done
        there = done_clips = sum(c.shard.clips for c in copied.values())
        total = len(plan.row)
        self.tell(done_clips, total)

        def work(number: int) -> tuple[int, Copied]:
            done = copy_shard(self.datasets, layout.piece(plan, number), self.members, self.home)
            self.home.publish(f"{_NOTES}/{done.shard.name}.json", json.dumps(_note(done)).encode())
            return number, done

        with ThreadPoolExecutor(self.workers) as pool:
            tasks = [pool.submit(work, number) for number in range(layout.count) if number not in copied]
            try:
                for task in as_completed(tasks):
                    number, done = task.result()
                    copied[number] = done
                    done_clips += done.shard.clips
                    self.tell(done_clips, total)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return there, [copied[number] for number in range(layout.count)]

    def _write_catalog(self, plan: Plan, layout: Layout, copied: Sequence[Copied]) -> None:
        columns, words = catalog_columns(self.datasets, plan, layout, self.members, [c.json_sha256 for c in copied])
        carry_columns(self.datasets, plan, CatalogWriter.write(self.home, self.members, columns, words))

    def _publish(self, copied: list[Copied]) -> Meta:
        """Name what was copied: from here on there is a data set."""
        first = self.datasets[0].meta
        meta = Meta(
            profile=first.profile, foreign=first.foreign, members=self.members, provenance=self.provenance,
            shards=[c.shard for c in copied],
        )  # fmt: skip
        self.home.publish(META, meta.to_bytes())
        return meta


def _transcoded(
    datasets: list[Dataset],
    home: Place,
    choice: Choice,
    pick: Pick | None,
    provenance: dict[str, Any],
    transcode: Callable[[Iterator[Clip]], Iterable[Clip]],
    profile: Profile,
    shard_bytes: int,
    tell: Callable[[int, int], None],
) -> Resharded:
    """The one way that decodes: clip by clip through `DatasetWriter`, which keeps what was committed."""
    if home.size(META) is not None:
        there = Meta.from_bytes(home.read(META), f"{home.url}/{META}")
        if _question(there.provenance) != _question(provenance):
            raise DatasetError(f"{home.url} holds clips from elsewhere or of another choice; write to a new folder")
    plan = make_plan(datasets, choice, pick)
    if not len(plan.row):
        raise _nothing(datasets, choice)
    with DatasetWriter(home.url, profile, shard_bytes=shard_bytes, provenance=provenance) as writer:
        before = len(writer.keys)
        for clip in transcode(read_clips(datasets, plan, frozenset(writer.keys))):
            writer.add(clip)
            tell(len(writer.keys), len(plan.row))
        written = len(writer.keys) - before
    done = Dataset.open(home.url)
    return _result(done.meta, done.fingerprint, len(plan.row), before, plan, written)


def _result(meta: Meta, fingerprint: str, selected: int, there: int, plan: Plan, written: int | None = None) -> Resharded:
    return Resharded(
        selected=selected, written=selected - there if written is None else written, there=there, duplicates=plan.duplicates,
        near=plan.near, shards=len(meta.shards), bytes=sum(s.bytes for s in meta.shards), fingerprint=fingerprint,
    )  # fmt: skip


def _common(datasets: Sequence[Dataset], members: Sequence[str] | None, decoded: bool) -> tuple[str, ...]:
    """The members to keep, json with them; all sources must be alike unless they are decoded."""
    if not datasets:
        raise DatasetError("there is nothing to reshard; name one data set or more")
    first = datasets[0]
    if decoded:
        if members is not None:
            raise DatasetError("members cannot be chosen where clips are transcoded; reshard the result once more")
        return first.meta.members
    for other in datasets[1:]:
        if (other.meta.profile, other.meta.members, other.meta.foreign) != (
            first.meta.profile, first.meta.members, first.meta.foreign,
        ):  # fmt: skip
            raise DatasetError(f"{first.url} and {other.url} have different profiles; transcode one before merging them")
    media = [m for m in first.meta.members if m != "json"]
    unknown = [m for m in members or () if m not in first.meta.members]
    if unknown or (members is not None and not set(members) & set(media)):
        named = f"{', '.join(unknown)} cannot be kept" if unknown else "without sound or pictures make no data set"
        raise DatasetError(f"members {named}; {first.url} has {', '.join(media)}, and json comes along")
    return tuple(m for m in first.meta.members if members is None or m in members or m == "json")


def _provenance(
    datasets: Sequence[Dataset], choice: Choice, kept: tuple[str, ...], profile: Profile | None, shard_bytes: int
) -> dict[str, Any]:
    made_by: dict[str, Any] = {
        "sources": [{"url": public_address(d.url), "fingerprint": d.fingerprint, "clips": len(d)} for d in datasets],
        **asdict(choice),
        "members": [m for m in kept if m != "json"],
        "profile": profile.to_json() if profile else None,
        "shard_bytes": shard_bytes,
    }
    # foreign clips go on saying their captions and labels where they said them
    told = {"index": index} if (index := datasets[0].meta.provenance.get("index")) and not profile else {}
    return {**told, "reshard": made_by, "versions": {"cmacc": cmacc.__version__, "duckdb": duckdb.__version__}}


def _question(provenance: dict[str, Any]) -> dict[str, Any]:
    """What was asked of which data sets, wherever these lay."""
    asked = dict(provenance.get("reshard", {}))
    asked["sources"] = [{k: v for k, v in source.items() if k != "url"} for source in asked.get("sources", ())]
    return asked


def _nothing(datasets: Sequence[Dataset], choice: Choice) -> DatasetError:
    which = f"fits where {choice.where!r}" if choice.where else "is left to choose from"
    return DatasetError(f"no clip of {', '.join(d.url for d in datasets)} {which}; nothing was written")


def _note(done: Copied) -> dict[str, Any]:
    fresh = None if done.json_sha256 is None else done.json_sha256.tobytes().hex()
    return {"shard": done.shard.model_dump(), "json_sha256": fresh}


def _from_note(note: dict[str, Any]) -> Copied:
    fresh = note["json_sha256"]
    digests = None if fresh is None else np.frombuffer(bytes.fromhex(fresh), dtype=np.uint8).reshape(-1, 32)
    return Copied(Shard.model_validate(note["shard"]), digests)
