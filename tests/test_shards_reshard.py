"""Re-sharding: the right clips, in the right order, byte for byte; and a where-clause that can do no harm."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from media import make_clip, tiny_profile

from cmacc.shards.choice import parse_split, split_of
from cmacc.shards.clip import Clip
from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.shards.facts import facts_from_json
from cmacc.shards.lint import lint
from cmacc.shards.query import matching, query_columns
from cmacc.shards.reshard import reshard
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
