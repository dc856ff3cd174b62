"""Re-sharding: the right clips, in the right order, byte for byte; and a where-clause that can do no harm."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from killing import killing
from media import make_clip, tiny_profile

from cmacc.shards import writer as writer_module
from cmacc.shards.choice import Plan, parse_split, split_of
from cmacc.shards.clip import Clip, Facts
from cmacc.shards.columns import create_array
from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.shards.facts import facts_from_json
from cmacc.shards.lint import lint
from cmacc.shards.place import place
from cmacc.shards.query import matching, query_columns
from cmacc.shards.reshard import _Copying, reshard
from cmacc.shards.writer import DatasetWriter

SHARD = 102_400


def clip(i: int) -> Clip:
    """Some source videos are in two splits, as their manifest had it; lint says so."""
    names = [("dog", "bark"), (), ("cat",)]
    return make_clip(i, labels=names[i % 3], split="train" if i % 4 else "val")


def made(path: Path, numbers: Iterable[int], **options: object) -> Path:
    with DatasetWriter(path, tiny_profile(), **options) as w:
        for i in numbers:
            w.add(clip(i))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    path = tmp_path_factory.mktemp("sources")
    both = [made(path / "a", range(12), shard_bytes=SHARD), made(path / "b", range(10, 20))]
    for i, source in enumerate(both):
        catalog = Dataset.open(source).catalog
        catalog.add_column("score", 100.0 * i + np.arange(catalog.rows))
        catalog.add_column("emb", np.random.default_rng(i).standard_normal((catalog.rows, 4)).astype(np.float16), {"model": "m"})
    return both


def content(path: Path) -> dict[str, bytes]:
    """Every file of a data set but its lock."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


def keys(path: Path) -> list[str]:
    return Dataset.open(path).keys.tolist()


def test_merge_drops_later_duplicates_and_copies_bytes(sources: list[Path], tmp_path: Path) -> None:
    done = reshard(sources, tmp_path / "out")
    assert (done.selected, done.written, done.there, done.duplicates) == (20, 20, 0, 2)
    assert keys(tmp_path / "out") == [clip(i).key for i in range(20)]
    assert {f.code for f in lint(tmp_path / "out")} == {"split"}
    out, old = Dataset.open(tmp_path / "out"), Dataset.open(sources[1])
    assert done.fingerprint == out.fingerprint and len(out.meta.shards) == 1
    assert out.read(15) == old.read(5)
    made_by = out.meta.provenance
    assert [s["fingerprint"] for s in made_by["reshard"]["sources"]] == [Dataset.open(s).fingerprint for s in sources]
    assert set(made_by["versions"]) == {"cmacc", "duckdb"}
    embeddings = [Dataset.open(s).catalog.column("emb") for s in sources]
    assert np.array_equal(out.catalog.column("emb"), np.concatenate([embeddings[0], embeddings[1][2:]]))
    assert out.catalog.attrs("emb") == {"model": "m"}
    assert out.catalog.column("score")[12] == 102


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("'dog' in labels", [i for i in range(12) if i % 3 == 0]),
        ("list_contains(labels, 'cat') and split = 'train'", [i for i in range(12) if i % 3 == 2 and i % 4]),
        ("len(labels) = 0 or start_s >= 100", [i for i in range(12) if i % 3 == 1 or i >= 10]),
        ("key like 'yt_0000000000_%' and bytes > 100", list(range(12))),
        ("source = 'yt_00000000003'", [6, 7]),
        ("keyframes[2] = 4 and shard = 0 and n_frames = 8", [0, 1, 2, 3, 4]),
        ("score > 8.5", [9, 10, 11]),
        ("motion > (select avg(motion) from clips)", [4, 5, 6, 7, 8, 9]),
        ("Duration_S < 0", []),
        ("true", list(range(12))),
    ],
)
def test_where(sources: list[Path], where: str, expected: list[int]) -> None:
    assert matching(Dataset.open(sources[0]), where).tolist() == expected


@pytest.mark.parametrize(
    "where",
    [
        "1=1); DROP TABLE clips; --",
        "1=1; COPY clips TO 'out.csv'",
        "COPY clips TO 'out.csv'",
        "1=1) UNION ALL SELECT 5 WHERE (true",
        "n_frames in (select count(*) from read_csv('/etc/passwd'))",
        "exists (select * from '/etc/passwd')",
        "exists (select * from read_text('/etc/passwd'))",
        "exists (select * from glob('/*'))",
        "exists (select * from read_parquet('https://example.com/x.parquet'))",
        "exists (select * from hidden)",
        "getenv('HOME') <> ''",
        "fps > 1, fps > 2",
        "ATTACH 'x.db'",
        "SET enable_external_access = true",
        "nope > 3",
        "fps >",
        "fps",
        "key",
        "",
        "sum(fps) > 1",
    ],
)
def test_hostile_or_wrong_where(sources: list[Path], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = {"z": np.arange(3)}
    monkeypatch.chdir(tmp_path)
    if where == "fps":  # a number is taken for true, as everywhere in SQL
        assert len(matching(Dataset.open(sources[0]), where)) == 12
        return
    with pytest.raises(DatasetError, match=r"^where .* is not understood: .+; columns are key, source, .*score$") as error:
        matching(Dataset.open(sources[0]), where)
    assert "\n" not in str(error.value)
    with pytest.raises(DatasetError):
        reshard(sources, tmp_path / "out", where=where)
    assert list(tmp_path.iterdir()) == [] and hidden


def test_orders(sources: list[Path], tmp_path: Path) -> None:
    reshard(sources, tmp_path / "shuffled", order="shuffle:5")
    reshard(sources, tmp_path / "again", order="shuffle:5")
    reshard(sources, tmp_path / "other", order="shuffle:6")
    shuffled = keys(tmp_path / "shuffled")
    assert shuffled == keys(tmp_path / "again") != keys(tmp_path / "other")
    assert sorted(shuffled) == sorted(clip(i).key for i in range(20)) != shuffled
    reshard(sources, tmp_path / "motion", order="by:motion", limit=5)
    assert keys(tmp_path / "motion") == [clip(i).key for i in (0, 10, 1, 11, 2)]
    reshard(sources, tmp_path / "split", order="by:split", limit=6)
    assert keys(tmp_path / "split") == [clip(i).key for i in (1, 2, 3, 5, 6, 7)]
    assert Dataset.open(tmp_path / "motion").catalog.column("score").tolist() == [0, 10, 1, 11, 2]


def test_split_by_source_video(sources: list[Path], tmp_path: Path) -> None:
    reshard(sources, tmp_path / "out", split="train:0.5,val:0.3,test:0.2", where="start_s < 190")
    catalog = Dataset.open(tmp_path / "out").catalog
    split_of_source = dict(zip(catalog.texts("source").tolist(), catalog.texts("split").tolist(), strict=True))
    assert [split_of_source[s] for s in catalog.texts("source")] == catalog.texts("split").tolist()
    assert set(split_of_source.values()) == {"train", "val", "test"}
    assert facts_from_json(Dataset.open(tmp_path / "out").read(3, ("json",))["json"]).split == catalog.texts("split")[3]
    shares = parse_split("train:0.9,val:0.1")
    drawn = [split_of(f"yt_{i}", shares) for i in range(5000)]
    assert 0.88 < drawn.count("train") / 5000 < 0.92
    # more training videos: those that were in it stay in it
    more = [split_of(f"yt_{i}", parse_split("train:0.95,val:0.05")) for i in range(5000)]
    assert all(b == "train" for a, b in zip(drawn, more, strict=True) if a == "train")


@pytest.mark.parametrize("split", ["", "a", "a:0.9", "a:0.9,b:0.2", "a:1.1,b:-0.1", "a:0.5,a:0.5", ":1", "a:x,b:1", "a:nan"])
def test_wrong_split(split: str) -> None:
    with pytest.raises(DatasetError, match="is not understood; give names and shares"):
        parse_split(split)


def test_members_subset(sources: list[Path], tmp_path: Path) -> None:
    reshard(sources[:1], tmp_path / "sound", members=("flac",))
    out = Dataset.open(tmp_path / "sound")
    assert out.meta.members == ("flac", "json")
    assert set(out.read(0)) == {"flac", "json"} and out.read(3, ("flac",)) == {"flac": clip(3).members["flac"]}
    assert {f.code for f in lint(tmp_path / "sound")} == {"split"}
    with pytest.raises(DatasetError, match=r"members opus cannot be kept; .* has mp4, flac"):
        reshard(sources, tmp_path / "x", members=("opus",))
    for none in ((), ("json",)):
        with pytest.raises(DatasetError, match=r"make no data set; .* has mp4, flac, and json comes along"):
            reshard(sources, tmp_path / "x", members=none)
    same = reshard(sources[:1], tmp_path / "sound", members=("flac", "json"))
    assert same.there == same.selected, "json comes along, said or not"


def test_again_continues(sources: list[Path], tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done:
            raise Stop

    options = {"order": "shuffle:1", "shard_bytes": SHARD, "split": "a:0.5,b:0.5"}
    with pytest.raises(Stop):
        reshard(sources, tmp_path / "out", on_progress=stop, workers=1, **options)
    with pytest.raises(DatasetError, match=r"no dataset\.json"):
        Dataset.open(tmp_path / "out")
    with pytest.raises(DatasetError, match="another choice that was not finished"):
        reshard(sources, tmp_path / "out", where="fps > 1", **options)
    done = reshard(sources, tmp_path / "out", **options)
    assert done.there > 0 and done.there + done.written == 20
    assert reshard(sources, tmp_path / "out", **options).written == 0
    reshard(sources, tmp_path / "whole", **options)
    assert content(tmp_path / "whole") == content(tmp_path / "out")
    with pytest.raises(DatasetError, match="of another choice; write to a new folder"):
        reshard(sources, tmp_path / "out", where="fps > 1", **options)
    with pytest.raises(DatasetError, match="of another choice"):
        reshard(sources[1:], sources[0])


def test_transcoding_is_a_function_passed_in(sources: list[Path], tmp_path: Path) -> None:
    other = tiny_profile(quality=30)

    def encode(clips: Iterator[Clip]) -> Iterator[Clip]:
        for one in clips:
            if one.key != clip(3).key:  # a transcoder may leave a clip out
                yield replace(one, members={**one.members, "mp4": one.members["mp4"][::-1]})

    done = reshard(sources[:1], tmp_path / "out", transcode=encode, profile=other)
    assert (done.selected, done.written) == (12, 11)
    out = Dataset.open(tmp_path / "out")
    assert out.profile == other and out.read(0)["mp4"] == clip(0).members["mp4"][::-1] and out.catalog.added == []
    with pytest.raises(DatasetError, match="give both or none"):
        reshard(sources, tmp_path / "x", transcode=encode)


def test_what_is_refused(sources: list[Path], tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "other", tiny_profile(quality=30)) as w:
        w.add(clip(50))
    wrong = {
        "have different profiles": {"sources": [sources[0], tmp_path / "other"]},
        "there is nothing to reshard": {"sources": []},
        "order 'random' is not known": {"order": "random"},
        "order 'shuffle:x' is not known": {"order": "shuffle:x"},
        "has no column 'nope' to ask for; there are key": {"order": "by:nope"},
        "by:labels makes no sense": {"order": "by:labels"},
        "limit is 0": {"limit": 0},
        "no clip of .* fits where 'fps > 99'": {"where": "fps > 99"},
        "does not exist": {"sources": [tmp_path / "nowhere"]},
    }
    for sentence, options in wrong.items():
        with pytest.raises(DatasetError, match=sentence):
            reshard(**{"sources": sources, "out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_columns_that_can_be_asked_for(sources: list[Path]) -> None:
    columns = query_columns(Dataset.open(sources[0]))
    assert columns[-1] == "score" and "emb" not in columns and "sha256" not in columns
    assert json.dumps(columns)


KILLED = """
from test_shards_reshard import Dataset, reshard
def work(folder):
    source = folder.rpartition("/")[0] + "/source"
    reshard([source], folder, order="shuffle:2", split="train:0.7,val:0.3", shard_bytes=61_440, workers=2)
"""


def kill_at_random_moments(path: Path, times: int) -> None:
    made(path / "source", range(240), shard_bytes=SHARD)
    catalog = Dataset.open(path / "source").catalog
    catalog.add_column("emb", np.arange(240 * 4, dtype=np.float32).reshape(240, 4))
    began = time.monotonic()
    reshard([path / "source"], path / "whole", order="shuffle:2", split="train:0.7,val:0.3", shard_bytes=61_440, workers=2)
    whole_s = time.monotonic() - began
    moments, killed = random.Random(times), 0
    with killing(KILLED) as kill:
        for i in range(times):
            # each out goes through up to three kills before it is let through
            out = path / f"out{i // 3}"
            killed += kill(out, moments.uniform(0.02, 1.0) * whole_s)
            if (out / "dataset.json").exists():
                assert content(path / "whole").items() <= content(out).items(), "once there is a data set, it is whole"
    assert killed
    for out in sorted(path.glob("out*")):
        done = reshard([path / "source"], out, order="shuffle:2", split="train:0.7,val:0.3", shard_bytes=61_440)
        assert done.there + done.written == 240
        assert content(out) == content(path / "whole")
    assert lint(path / "out0") == []


def test_kill_9(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path, 3)


@pytest.mark.long
def test_kill_9_many_times(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path, 20)


def test_changed_bytes_are_not_copied(sources: list[Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources[0], source)
    dataset = Dataset.open(source)
    for member in range(3):
        offset, size = int(dataset.catalog.column("offset")[4, member]), int(dataset.catalog.column("size")[4, member])
        shard = source / dataset.meta.shards[int(dataset.shard_of_row[4])].name
        before = shard.read_bytes()
        shard.write_bytes(
            before[: offset + size // 2] + bytes([before[offset + size // 2] ^ 1]) + before[offset + size // 2 + 1 :]
        )
        with pytest.raises(DatasetError, match=rf"{clip(4).key}\.{dataset.meta.members[member]} in .* has a wrong checksum"):
            reshard([source], tmp_path / "out")
        assert not (tmp_path / "out" / "dataset.json").exists()
        shard.write_bytes(before)
    reshard([source], tmp_path / "out")
    reshard(sources[:1], tmp_path / "sound")
    tars = [p.name for p in (tmp_path / "out").glob("*.tar")]
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "sound" / n).read_bytes() for n in tars)


def test_shards_are_cut_as_the_writer_cuts_them(sources: list[Path], tmp_path: Path) -> None:
    for shard_bytes in (10_240, 61_440, 102_400, 150_000, 1 << 30):
        reshard(sources[:1], tmp_path / f"{shard_bytes}", shard_bytes=shard_bytes)
        made(tmp_path / f"written{shard_bytes}", range(12), shard_bytes=shard_bytes)
        tars = {n: b for n, b in content(tmp_path / f"{shard_bytes}").items() if n.endswith((".tar", ".idx"))}
        assert tars == {n: b for n, b in content(tmp_path / f"written{shard_bytes}").items() if n.endswith((".tar", ".idx"))}


def test_a_shard_has_clips_of_one_split(sources: list[Path], tmp_path: Path) -> None:
    reshard(sources, tmp_path / "out", split="train:0.6,val:0.4", order="shuffle:4")
    out = Dataset.open(tmp_path / "out")
    splits = out.catalog.texts("split").tolist()
    assert splits == sorted(splits) and len(out.meta.shards) == 2
    assert [{splits[i] for i in np.flatnonzero(out.shard_of_row == s)} for s in (0, 1)] == [{"train"}, {"val"}]
    assert out.meta.provenance["reshard"]["split"] == "train:0.6,val:0.4"
    assert [s["clips"] for s in out.meta.provenance["reshard"]["sources"]] == [12, 10]
    again = reshard([tmp_path / "out"], tmp_path / "one", split="everything:1")
    assert again.shards == 1 and lint(tmp_path / "one") == []
    assert {f.split for f in Dataset.open(tmp_path / "one").catalog.facts()} == {"everything"}


def test_to_and_from_a_bucket(sources: list[Path], s3: str, tmp_path: Path) -> None:
    options = {"order": "shuffle:3", "split": "train:0.5,val:0.5", "shard_bytes": SHARD}
    reshard(sources, tmp_path / "local", **options)
    there = f"{s3}/{tmp_path.name}"
    seen: list[bool] = []

    def visible(done: int, total: int) -> None:
        seen.append(place(there).size("dataset.json") is not None)
        if done > 2 and len(seen) < 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard(sources, there, on_progress=visible, **options)
    with pytest.raises(DatasetError, match=r"no dataset\.json"):
        Dataset.open(there)
    done = reshard(sources, there, **options)
    assert done.there > 0 and done.there + done.written == 20 and not any(seen)
    assert lint(there) == []
    uploaded = {name: place(there).read(name) for name in place(there).names() if "." in name and not name.endswith(".zarr")}
    assert uploaded == {n: b for n, b in content(tmp_path / "local").items() if "/" not in n}
    back = reshard([there], tmp_path / "back", where="list_contains(labels, 'cat')", members=("flac",), workers=2)
    assert 0 < back.written < 20 and lint(tmp_path / "back") == []
    assert Dataset.open(tmp_path / "back").catalog.added == ["emb", "score"]
    assert reshard(sources, there, **options).written == 0


def test_what_an_earlier_version_wrote(sources: list[Path], tmp_path: Path) -> None:
    """Json members without the later facts, and a catalog without digests of them: new splits, and the digests come along."""
    source = tmp_path / "source"
    real = writer_module.facts_to_json

    def without(facts: Facts) -> bytes:
        return json.dumps({k: v for k, v in json.loads(real(facts)).items() if k != "captions"}, sort_keys=True).encode()

    with pytest.MonkeyPatch.context() as m:
        m.setattr(writer_module, "facts_to_json", without)
        made(source, range(6))
    digests = zarr.open_group(source / "catalog.zarr", mode="r+")
    kept = digests["sha256"][:, :2]
    del digests["sha256"]
    create_array(digests, "sha256", kept.shape, "uint8")[:] = kept
    reshard([source], tmp_path / "out", split="hold\u00e9out:0.5,b:0.5")
    out = Dataset.open(tmp_path / "out")
    assert out.catalog.shape("sha256") == (6, 3, 32) and lint(tmp_path / "out") == []
    assert set(out.catalog.texts("split")) == {"hold\u00e9out", "b"}
    assert [out.read(i, check=True) for i in range(6)]
    assert "captions" not in json.loads(out.read(0)["json"])
    made(tmp_path / "new", range(6, 9))
    for turn, both in enumerate(([source, tmp_path / "new"], [tmp_path / "new", source])):
        assert reshard(both, tmp_path / f"both{turn}", split="a:0.5,b:0.5").written == 9
        assert lint(tmp_path / f"both{turn}") == []


@pytest.mark.parametrize("order", ["shuffle:1", "shuffle:2"])
def test_another_was_quicker(sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    """While one plans, another makes the whole data set: the same is taken as it is, another is left alone."""
    plan = _Copying._planned

    def slowly(self: _Copying) -> Plan:
        found = plan(self)
        monkeypatch.setattr(_Copying, "_planned", plan)
        reshard(sources, tmp_path / "out", order=order)
        return found

    monkeypatch.setattr(_Copying, "_planned", slowly)
    if order == "shuffle:1":
        assert reshard(sources, tmp_path / "out", order="shuffle:1").there == 20
    else:
        with pytest.raises(DatasetError, match="of another choice"):
            reshard(sources, tmp_path / "out", order="shuffle:1")
    assert Dataset.open(tmp_path / "out").meta.provenance["reshard"]["order"] == order
    assert [name for name in place(tmp_path / "out").names() if name.startswith(".")] == [".lock"]
