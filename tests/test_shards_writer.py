"""Writing: the same bytes every time, one writer, and nothing committed is ever lost."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from killing import killing
from media import make_clip, tiny_profile

from cmacc.shards import catalog_writer as catalog_module
from cmacc.shards import writer as writer_module
from cmacc.shards.catalog_writer import CatalogWriter
from cmacc.shards.clip import Clip, Facts
from cmacc.shards.dataset import Dataset
from cmacc.shards.describe import describe
from cmacc.shards.errors import DatasetError
from cmacc.shards.facts import facts_from_json
from cmacc.shards.lint import lint
from cmacc.shards.place import Folder, place
from cmacc.shards.publish import PartFile
from cmacc.shards.query import matching
from cmacc.shards.reshard import reshard
from cmacc.shards.writer import DatasetWriter

SHARD = 30_720


def plain_clip(i: int) -> Clip:
    """A clip that no decoder would take; the writer does not mind, and it is quicker."""
    random = np.random.default_rng(i)
    clip = make_clip(0)
    labels, keyframes = (f"l{i % 5}", f"m{i % 3}"), (0, *range(4, 4 + i % 3))
    facts = replace(clip.facts, start_s=float(i), end_s=i + 1.0, labels=labels, keyframes=keyframes)
    return Clip(f"yt_abc_{i * 1000}_{i * 1000 + 1000}", facts, {"mp4": random.bytes(2500 + i % 900), "flac": random.bytes(1800)})


def write(path: Path, clips: list[Clip], **options: object) -> None:
    with DatasetWriter(path, tiny_profile(), shard_bytes=SHARD, **options) as w:
        for clip in clips:
            if clip.key not in w.keys:
                w.add(clip)


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.is_file()}


def assert_holds(path: Path, clips: list[Clip]) -> None:
    """The data set at `path` is sound, holds the first so many clips, and each reads back as it was."""
    dataset = Dataset.open(path)
    assert [f for f in lint(path, samples=0) if f.code != "stray"] == []
    assert dataset.keys.tolist() == [c.key for c in clips[: len(dataset)]]
    facts = dataset.catalog.facts()
    for row, clip in enumerate(clips[: len(dataset)]):
        assert dataset.read(row, ("mp4", "flac"), check=True) == clip.members
        assert facts[row] == clip.facts


def test_same_clips_same_bytes(tmp_path: Path) -> None:
    clips = [plain_clip(i) for i in range(8)]
    write(tmp_path / "a", clips, provenance={"made": "by a test"})
    write(tmp_path / "b", clips[:5], provenance={"made": "by a test"})
    one = files(tmp_path / "a")
    assert any(name.endswith(".tar") for name in one)
    write(tmp_path / "c", clips, provenance={"made": "by a test"})
    assert files(tmp_path / "c") == one
    first = Dataset.open(tmp_path / "b").meta.shards[0]
    assert one[first.name] == (tmp_path / "b" / first.name).read_bytes()
    assert Dataset.open(tmp_path / "a").fingerprint == Dataset.open(tmp_path / "c").fingerprint


def test_shards_are_cut_by_bytes(tmp_path: Path) -> None:
    committed: list[tuple[str, list[str]]] = []
    clips = [plain_clip(i) for i in range(10)]
    big = Clip("big", clips[0].facts, {"mp4": bytes(3 * SHARD), "flac": b"x"})
    with DatasetWriter(tmp_path, tiny_profile(), shard_bytes=SHARD, on_commit=lambda n, k: committed.append((n, k))) as w:
        for clip in [*clips[:5], big, *clips[5:]]:
            w.add(clip)
        w.cut()
        w.cut()
        assert sum(len(keys) for _, keys in committed) == 11
        w.add(plain_clip(99))
    shards = Dataset.open(tmp_path).meta.shards
    assert [s.name for s in shards] == [name for name, _ in committed] == [f"clips-{i:06d}.tar" for i in range(len(shards))]
    assert [len(keys) for _, keys in committed] == [s.clips for s in shards]
    assert all(s.bytes <= SHARD or s.clips == 1 for s in shards)
    assert committed[-1][1] == [plain_clip(99).key]
    assert ["big"] in [keys for _, keys in committed]


def test_an_exception_discards_only_the_open_shard(tmp_path: Path) -> None:
    clips = [plain_clip(i) for i in range(8)]
    with pytest.raises(RuntimeError), DatasetWriter(tmp_path, tiny_profile()) as w:
        for clip in clips[:3]:
            w.add(clip)
        w.cut()
        w.add(clips[3])
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.glob("*clips*")) == ["clips-000000.idx", "clips-000000.tar", "clips-000000.tar.idx"]
    assert_holds(tmp_path, clips[:3])
    write(tmp_path, clips)
    assert len(Dataset.open(tmp_path)) == 8
    assert_holds(tmp_path, clips)


def test_what_add_refuses(tmp_path: Path) -> None:
    clip = plain_clip(0)
    with DatasetWriter(tmp_path, tiny_profile()) as w:
        w.add(clip)
        refused = {
            "is in .* already": clip,
            "has mp4; .* wants mp4, flac": Clip("k1", clip.facts, {"mp4": b"x"}),
            "has flac, mp4, opus": Clip("k2", clip.facts, {**clip.members, "opus": b"x"}),
            "has flac;": Clip("k3", clip.facts, {"mp4": b"", "flac": b"x"}),
            "must be finite": Clip("k4", replace(clip.facts, loudness_db=float("-inf")), clip.members),
        }
        for sentence, wrong in refused.items():
            with pytest.raises(DatasetError, match=sentence):
                w.add(wrong)
        w.cut()
        with pytest.raises(DatasetError, match="already"):
            w.add(clip)
        w.add(plain_clip(1))
    assert_holds(tmp_path, [clip, plain_clip(1)])


def test_what_opening_refuses(tmp_path: Path) -> None:
    write(tmp_path / "a", [plain_clip(0)])
    with pytest.raises(DatasetError, match=r"another profile \(fps differ\)"):
        DatasetWriter(tmp_path / "a", tiny_profile(fps=9))
    with pytest.raises(DatasetError, match="members differ"):
        DatasetWriter(tmp_path / "a", tiny_profile(), members=("flac", "json"))
    with pytest.raises(DatasetError, match="cannot be written"):
        DatasetWriter("nowhere://bucket/set", tiny_profile())
    with DatasetWriter(tmp_path / "a", tiny_profile()), pytest.raises(DatasetError, match="another writer is at work"):
        DatasetWriter(tmp_path / "a", tiny_profile())
    (tmp_path / "a" / "dataset.json").unlink()
    with pytest.raises(DatasetError, match=r"has shards but no dataset\.json"):
        DatasetWriter(tmp_path / "a", tiny_profile())


def test_provenance_is_kept_and_joined(tmp_path: Path) -> None:
    write(tmp_path, [plain_clip(0)], provenance={"manifest": "x.csv", "day": 1})
    write(tmp_path, [plain_clip(1)], provenance={"day": 2})
    assert Dataset.open(tmp_path).meta.provenance == {"manifest": "x.csv", "day": 2}


def test_readers_see_what_was_committed_when_they_opened(tmp_path: Path) -> None:
    clips = [plain_clip(i) for i in range(6)]
    with DatasetWriter(tmp_path, tiny_profile()) as w:
        assert len(Dataset.open(tmp_path)) == 0
        assert Dataset.open(tmp_path).keys.tolist() == []
        for clip in clips[:3]:
            w.add(clip)
        w.cut()
        before = Dataset.open(tmp_path)
        for clip in clips[3:]:
            w.add(clip)
    assert before.keys.tolist() == [c.key for c in clips[:3]]
    assert len(before.catalog.labels()) == len(before.catalog.column("fps")) == 3
    assert len(Dataset.open(tmp_path)) == 6


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs, no clean-up either."""


POINTS: dict[str, tuple[object, str, bool]] = {
    "before the indexes": (writer_module, "publish_indexes", False),
    "after the indexes": (writer_module, "publish_indexes", True),
    "before dataset.json": (Folder, "publish", False),
    "before the tar has its name": (PartFile, "publish", False),
    "before the catalog": (CatalogWriter, "append", False),
    "after the catalog": (CatalogWriter, "append", True),
    "within the catalog": (CatalogWriter, "_put_lists", False),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_each_step_of_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    clips = [plain_clip(i) for i in range(7)]
    w = DatasetWriter(tmp_path / "set", tiny_profile(), shard_bytes=SHARD)
    for clip in clips[:3]:
        w.add(clip)
    w.cut()
    owner, name, after = POINTS[point]
    real: Callable[..., object] = getattr(owner, name)

    def killed(*args: object, **options: object) -> None:
        early = owner is Folder and args[1] != "dataset.json"
        if after or early:
            real(*args, **options)
        if not early:
            raise Killed

    with monkeypatch.context() as m:
        m.setattr(owner, name, killed)
        m.setattr(DatasetWriter, "_discard", lambda self: None)
        for clip in clips[3:5]:
            w.add(clip)
        with pytest.raises(Killed):
            w.cut()
    w._held.close()
    assert len(Dataset.open(tmp_path / "set")) == 3
    assert_holds(tmp_path / "set", clips)
    with DatasetWriter(tmp_path / "set", tiny_profile(), shard_bytes=SHARD) as w:
        assert lint(tmp_path / "set", samples=0) == []
        assert w.keys == {c.key for c in clips[:3]}
        for clip in clips[3:]:
            w.add(clip)
    assert_holds(tmp_path / "set", clips)
    assert len(Dataset.open(tmp_path / "set")) == 7
    assert [p for p in (tmp_path / "set").rglob("*") if p.name.endswith((".part", ".partial"))] == []


def test_interrupted_after_dataset_json_had_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shard is committed then: to discard it would take away what readers already see."""
    real = Folder.publish

    def interrupted(home: Folder, name: str, data: bytes) -> None:
        real(home, name, data)
        if name == "dataset.json":
            raise KeyboardInterrupt

    clips = [plain_clip(i) for i in range(4)]
    with pytest.raises(KeyboardInterrupt), DatasetWriter(tmp_path, tiny_profile()) as w:
        w.add(clips[0])
        w.cut()
        w.add(clips[1])
        monkeypatch.setattr(Folder, "publish", interrupted)
        try:
            w.cut()
        finally:
            assert w.keys == {c.key for c in clips[:2]}
    monkeypatch.undo()
    assert len(Dataset.open(tmp_path)) == 2
    write(tmp_path, clips)
    assert_holds(tmp_path, clips)


WORK = """
from test_shards_writer import SHARD, plain_clip, tiny_profile, DatasetWriter
def work(folder):
    with DatasetWriter(folder, tiny_profile(), shard_bytes=SHARD) as w:
        for i in range(10_000):
            clip = plain_clip(i)
            if clip.key not in w.keys:
                w.add(clip)
"""


def kill_at_random_moments(path: Path, times: int) -> None:
    clips = [plain_clip(i) for i in range(400)]
    moments = random.Random(times)
    with killing(WORK) as kill:
        for _ in range(times):
            assert kill(path / "set", moments.uniform(0.05, 1.2))
            if (path / "set" / "dataset.json").exists():
                assert_holds(path / "set", clips)
    done = len(Dataset.open(path / "set"))
    write(path / "set", clips[: done + 5])
    write(path / "whole", clips[: done + 5])
    assert lint(path / "set", samples=0) == []
    assert_holds(path / "set", clips)
    whole, found = files(path / "whole"), files(path / "set")
    assert found == whole


def test_kill_9(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path, 4)


@pytest.mark.long
def test_kill_9_many_times(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path, 20)


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """The kernel refuses longer files: the nearest thing to a full disk that needs no disk of its own."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_full_disk_while_adding(tmp_path: Path) -> None:
    clips = [plain_clip(i) for i in range(12)]
    with DatasetWriter(tmp_path, tiny_profile(), shard_bytes=10**9) as w:
        for clip in clips[:3]:
            w.add(clip)
        w.cut()
        with file_size_limit(25_000), pytest.raises(DatasetError, match=r"no room on the disk of .*what was committed stays"):
            for clip in clips[3:]:
                w.add(clip)
        assert w.keys == {c.key for c in clips[:3]}
        for clip in clips[3:]:
            w.add(clip)
    assert_holds(tmp_path, clips)
    assert len(Dataset.open(tmp_path)) == 12


@pytest.mark.parametrize(("step", "code"), [("catalog", errno.ENOSPC), ("dataset.json", errno.EDQUOT)])
def test_full_disk_while_committing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int) -> None:
    clips = [plain_clip(i) for i in range(6)]
    write(tmp_path, clips[:2])
    before = files(tmp_path)

    def full(*args: object, **options: object) -> None:
        if step == "catalog" or args[1] == "dataset.json":
            raise OSError(code, os.strerror(code))

    with pytest.raises(DatasetError, match="no room"), DatasetWriter(tmp_path, tiny_profile(), shard_bytes=SHARD) as w:
        w.add(clips[2])
        monkeypatch.setattr(*((CatalogWriter, "append") if step == "catalog" else (Folder, "publish")), full)
        w.cut()
    monkeypatch.undo()
    assert files(tmp_path) == before
    write(tmp_path, clips)
    assert_holds(tmp_path, clips)
    assert len(Dataset.open(tmp_path)) == 6


@pytest.mark.parametrize("damage", ["gone", "no column", "rows lost", "garbage", "empty"])
def test_catalog_is_made_again_from_the_shards(tmp_path: Path, damage: str) -> None:
    clips = [plain_clip(i) for i in range(6)]
    write(tmp_path, clips[:5])
    Dataset.open(tmp_path).catalog.add_column("mine", np.arange(5.0), {"by": "me"})
    catalog = tmp_path / "catalog.zarr"
    if damage == "gone":
        shutil.rmtree(catalog)
    elif damage == "no column":
        shutil.rmtree(catalog / "motion")
    elif damage == "rows lost":
        meta = json.loads((catalog / "size" / "zarr.json").read_text())
        meta["shape"][0] = 3
        (catalog / "size" / "zarr.json").write_text(json.dumps(meta))
    else:
        (catalog / "duration_s" / "c" / "0").write_bytes(b"garbage" if damage == "garbage" else b"")
    write(tmp_path, clips[:5])
    found = Dataset.open(tmp_path).catalog
    assert found.added == ([] if damage == "gone" else ["mine"])
    assert damage == "gone" or (found.column("mine").tolist() == [0, 1, 2, 3, 4] and found.attrs("mine") == {"by": "me"})
    assert lint(tmp_path, samples=0) == []
    write(tmp_path, clips)
    stale = [] if damage == "gone" else ["catalog.zarr/mine"]
    assert [f.where for f in lint(tmp_path, samples=0)] == stale, "what was added covers the clips of then"
    shutil.rmtree(catalog / "mine", ignore_errors=True)
    assert_holds(tmp_path, clips)
    assert len(Dataset.open(tmp_path)) == 6


LATER = ("av_offset_s", "av_trust", "fingerprint", "duplicate_of")


def measured(i: int) -> Clip:
    """A clip with every fact that came later."""
    clip = plain_clip(i)
    facts = replace(
        clip.facts, av_offset_s=i / 25, av_trust=0.5, fingerprint=f"{i + 1:064x}", captions=((0.0, 0.5, f"word {i}"),),
        duplicate_of=plain_clip(i - 1).key if i % 2 else "",
    )  # fmt: skip
    return replace(clip, facts=facts)


def older(path: Path, clips: list[Clip], monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set as it was written before those facts were there."""
    real = writer_module.facts_to_json

    def without(facts: Facts) -> bytes:
        kept = {k: v for k, v in json.loads(real(facts)).items() if k not in (*LATER, "captions")}
        return json.dumps(kept, sort_keys=True, ensure_ascii=False).encode()

    with monkeypatch.context() as m:
        m.setattr(writer_module, "facts_to_json", without)
        write(path, clips)
    root = path / "catalog.zarr"
    for name in LATER:
        shutil.rmtree(root / name)
    meta = json.loads((root / "zarr.json").read_text())
    del meta["attributes"]["later"]
    (root / "zarr.json").write_text(json.dumps(meta, indent=2))


def test_later_facts_are_columns(tmp_path: Path) -> None:
    clips = [measured(i) for i in range(6)]
    write(tmp_path, clips)
    catalog = Dataset.open(tmp_path).catalog
    assert catalog.facts() == [replace(c.facts, captions=()) for c in clips]
    assert catalog.column("av_offset_s").tolist() == [c.facts.av_offset_s for c in clips]
    assert catalog.column("fingerprint").dtype == np.uint64 and catalog.column("fingerprint").shape == (6, 4)
    assert catalog.column("fingerprint")[4].tolist() == [0, 0, 0, 5]
    assert catalog.texts("duplicate_of").tolist() == [c.facts.duplicate_of for c in clips]
    assert facts_from_json(Dataset.open(tmp_path).read(2, ("json",))["json"]) == clips[2].facts
    assert lint(tmp_path, samples=0) == []
    assert matching(Dataset.open(tmp_path), "duplicate_of <> '' and av_offset_s > 0.1 and av_trust = 0.5").tolist() == [3, 5]
    assert describe(Dataset.open(tmp_path))["duplicates"] == 3
    reshard([tmp_path], tmp_path / "again", order="shuffle:1", where="duplicate_of = ''")
    again = Dataset.open(tmp_path / "again")
    found = {str(k): (again.read(i), f) for i, (k, f) in enumerate(zip(again.keys, again.catalog.facts(), strict=True))}
    old = Dataset.open(tmp_path)
    assert found == {str(old.keys[i]): (old.read(i), old.catalog.facts(slice(i, i + 1))[0]) for i in (0, 2, 4)}


def test_an_older_data_set_is_read_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, later = [plain_clip(i) for i in range(4)], [measured(i) for i in range(4, 7)]
    path = tmp_path / "old"
    older(path, plain, monkeypatch)
    before = {p.name: p.read_bytes() for p in path.glob("*.tar")}
    dataset = Dataset.open(path)
    assert dataset.catalog.facts() == [c.facts for c in plain]
    assert dataset.catalog.column("fingerprint").tolist() == [[0] * 4] * 4
    assert dataset.catalog.column("av_trust", slice(1, 3)).tolist() == [0, 0]
    assert dataset.catalog.shape("fingerprint") == (4, 4) and dataset.catalog.texts("duplicate_of").tolist() == [""] * 4
    assert matching(dataset, "duplicate_of = '' and av_trust = 0").tolist() == [0, 1, 2, 3]
    assert describe(dataset)["duplicates"] == 0 and lint(path, samples=0) == []
    reshard([path], tmp_path / "new")
    assert Dataset.open(tmp_path / "new").catalog.facts() == [c.facts for c in plain]
    write(path, [*plain, *later])
    assert Dataset.open(path).catalog.facts() == [replace(c.facts, captions=()) for c in (*plain, *later)]
    assert lint(path, samples=0) == [] and before.items() <= {p.name: p.read_bytes() for p in path.glob("*.tar")}.items()
    assert dataset.catalog.facts() == [c.facts for c in plain], "what was opened before goes on as it was"
    # now that it has the columns, one that is lost is damage, and mended
    shutil.rmtree(path / "catalog.zarr" / "fingerprint")
    assert [f.code for f in lint(path, samples=0)] != []
    write(path, later)
    assert Dataset.open(path).catalog.facts() == [replace(c.facts, captions=()) for c in (*plain, *later)]


def test_killed_while_an_older_catalog_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = [plain_clip(i) for i in range(3)]
    older(tmp_path, clips, monkeypatch)
    catalog = CatalogWriter(place(tmp_path), 3, ("mp4", "flac", "json"))
    real = catalog_module.create_fact

    def killed(group: object, name: str, rows: int = 0) -> None:
        if name == "fingerprint" and rows:
            raise Killed
        real(group, name, rows)

    with monkeypatch.context() as m:
        m.setattr(catalog_module, "create_fact", killed)
        with pytest.raises(Killed):
            catalog.grow()
    assert Dataset.open(tmp_path).catalog.facts() == [c.facts for c in clips]
    write(tmp_path, [*clips, measured(3)])
    assert lint(tmp_path, samples=0) == []
    assert Dataset.open(tmp_path).catalog.facts()[3] == replace(measured(3).facts, captions=())
