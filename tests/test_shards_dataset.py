"""Reading: by row number, from threads, forks and other file systems; and what a reader says of a damaged or hostile data set."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr
from media import make_clip, tiny_profile

from cmacc.flows.cli import app
from cmacc.shards.catalog import Catalog
from cmacc.shards.catalog_writer import CatalogWriter
from cmacc.shards.clip import Clip
from cmacc.shards.dataset import Dataset, Meta
from cmacc.shards.errors import DatasetError
from cmacc.shards.extract import extract
from cmacc.shards.facts import facts_from_json, facts_to_json
from cmacc.shards.place import place
from cmacc.shards.writer import DatasetWriter

N = 12


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    names = [("dog", "bark"), (), ("café ☕",)]
    return [make_clip(i, labels=names[i % 3], split=("train", "train", "val", "")[i % 4]) for i in range(N)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, clips: list[Clip]) -> Path:
    path = tmp_path_factory.mktemp("read") / "set"
    with DatasetWriter(path, tiny_profile(), shard_bytes=100_000) as w:
        for clip in clips:
            w.add(clip)
    return path


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "set"))


def test_what_a_reader_sees(whole: Path, clips: list[Clip]) -> None:
    dataset = Dataset.open(whole)
    assert len(dataset) == N and len(dataset.meta.shards) > 1
    assert dataset.profile == tiny_profile()
    assert dataset.fingerprint == hashlib.sha256((whole / "dataset.json").read_bytes()).hexdigest()
    assert dataset.keys.tolist() == [c.key for c in clips] and isinstance(dataset.keys[0], str)
    assert np.array_equal(dataset.shard_of_row, dataset.catalog.column("shard"))
    assert dataset.rows().tolist() == list(range(N)) and dataset.rows().dtype == np.int64
    assert dataset.rows("val").tolist() == [2, 6, 10] and dataset.rows("").tolist() == [3, 7, 11]
    with pytest.raises(DatasetError, match="in split 'test'; its splits are '', 'train', 'val'"):
        dataset.rows("test")


def test_columns(whole: Path, clips: list[Clip]) -> None:
    catalog = Dataset.open(whole).catalog
    assert catalog.facts() == [c.facts for c in clips]
    assert catalog.facts(slice(3, 7)) == [c.facts for c in clips[3:7]] and catalog.facts(slice(4, 4)) == []
    assert catalog.labels() == [c.facts.labels for c in clips]
    assert catalog.vocabulary("labels") == ["dog", "bark", "café ☕"]
    assert catalog.ragged("keyframes").row(5).tolist() == list(clips[5].facts.keyframes)
    assert catalog.column("motion", np.array([5, 2])).tolist() == [clips[5].facts.motion, clips[2].facts.motion]
    digests = [[hashlib.sha256(m).digest() for m in (*c.members.values(), facts_to_json(c.facts))] for c in clips]
    assert [[bytes(d) for d in row] for row in catalog.column("sha256")] == digests
    wrong = {"nope": "no column 'nope' in .* it has key, shard", "labels": "read it by texts", "../x": "no column"}
    for name, sentence in wrong.items():
        with pytest.raises(DatasetError, match=sentence):
            catalog.column(name)
    with pytest.raises(DatasetError, match="read it by column"):
        catalog.ragged("fps")
    with pytest.raises(IndexError):
        catalog.column("fps", np.array([N]))


def test_a_column_is_read_alone(damaged: Path, clips: list[Clip]) -> None:
    for column in ("motion", "offset", "key", "labels"):
        shutil.rmtree(damaged / "catalog.zarr" / column)
    assert Dataset.open(damaged).catalog.column("n_frames").tolist() == [c.facts.n_frames for c in clips]


def test_zarr_gives_no_warnings(whole: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CatalogWriter.create(place(tmp_path), ("mp4", "flac", "json"))
        assert len(Dataset.open(whole).catalog.facts()) == N


def test_reading_members(whole: Path, clips: list[Clip]) -> None:
    dataset = Dataset.open(whole)
    for row, clip in enumerate(clips):
        found = dataset.read(row, check=True)
        assert facts_from_json(found.pop("json")) == clip.facts
        assert found == clip.members
    assert dataset.read(4, ("flac",)) == {"flac": clips[4].members["flac"]}
    assert dataset.read(np.int64(4), ()) == {}
    with pytest.raises(DatasetError, match="no member 'opus'; they have mp4, flac, json"):
        dataset.read(0, ("opus",))
    for row in (-1, N):
        with pytest.raises(IndexError):
            dataset.read(row)


def test_threads_forks_and_pickles(whole: Path, clips: list[Clip]) -> None:
    dataset = Dataset.open(whole)
    rows = np.random.default_rng(0).integers(0, N, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda r: dataset.read(r, ("mp4", "flac")), rows))
    assert found == [clips[r].members for r in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of any fork beside threads
        child = os.fork()
    if child == 0:
        fine = all(dataset.read(r, ("mp4", "flac")) == clips[r].members for r in range(N))
        os._exit(0 if fine and dataset.catalog.column("fps")[0] == 8 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    again = pickle.loads(pickle.dumps(dataset))
    assert again.fingerprint == dataset.fingerprint and again.read(3) == dataset.read(3)


def test_keys_in_blocks(damaged: Path, clips: list[Clip], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmacc.shards.dataset._KEYS_AT_ONCE", 5)
    assert Dataset.open(damaged).keys.tolist() == [c.key for c in clips]
    zarr.open_group(damaged / "catalog.zarr", mode="r+")["key/offsets"].resize((N,))
    with pytest.raises(DatasetError, match="lost rows; opening it for writing"):
        _ = Dataset.open(damaged).keys


def test_rows_of_keys(whole: Path, clips: list[Clip]) -> None:
    dataset = Dataset.open(whole)
    rows = [7, 0, 11, 7]
    found = dataset.rows_of([clips[r].key for r in rows])
    assert found.tolist() == rows and found.dtype == np.int64 and dataset.rows_of([]).tolist() == []
    assert dataset.read(clips[5].key, ("flac",), check=True) == {"flac": clips[5].members["flac"]}
    for missing in ("", "yt_nowhere", clips[0].key[:-1], "café"):
        with pytest.raises(DatasetError, match=f"has the key {missing!r}"):
            dataset.rows_of([clips[0].key, missing])
    with DatasetWriter(whole.parent / "empty", tiny_profile()):
        pass
    with pytest.raises(DatasetError, match="has the key"):
        Dataset.open(whole.parent / "empty").rows_of(["x"])


def test_places(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked, and however many rows a chunk has: what the columns have."""
    catalog = Dataset.open(whole).catalog
    offset, size = catalog.column("offset"), catalog.column("size")
    for chunk, at_once in ((5, 2), (1, 99), (4, 99), (1 << 20, 99)):
        monkeypatch.setattr(Catalog, "chunk_rows", lambda *_, chunk=chunk: chunk)
        monkeypatch.setattr("cmacc.shards.rows._AT_ONCE", at_once)
        dataset = Dataset.open(whole)
        asked = [slice(a, b) for a in range(N + 2) for b in range(a, N + 2)]
        asked += [slice(None), slice(None, None, 2), slice(8, 2, -1), np.array([7]), np.array([11, 0, 5, 5]), np.array([], int)]
        for rows in asked:
            found = dataset.places(rows)
            assert np.array_equal(found[0], offset[rows]) and np.array_equal(found[1], size[rows])
            assert found[0].dtype == np.int64
        for wrong in (np.array([-1]), np.array([3, N])):
            with pytest.raises(IndexError):
                dataset.places(wrong)
        assert [dataset.shard_of(row) for row in range(N)] == dataset.shard_of_row.tolist()


def test_only_the_chunks_asked_for_are_read(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Catalog, "chunk_rows", lambda *_: 4)
    dataset, asked = Dataset.open(whole), []
    real = dataset.catalog.column
    monkeypatch.setattr(dataset.catalog, "column", lambda name, rows=None: (asked.append((name, rows)), real(name, rows))[1])
    for row in (5, 6, 4, 7, 5):
        dataset.read(row)
    assert asked == [("offset", slice(4, 8)), ("size", slice(4, 8))]


def test_extract(whole: Path, damaged: Path, tmp_path: Path, clips: list[Clip]) -> None:
    files = extract(Dataset.open(whole), [3, 0], tmp_path / "out" / "new", ("flac",))
    assert {f.name: f.read_bytes() for f in files} == {f"{clips[r].key}.flac": clips[r].members["flac"] for r in (3, 0)}
    assert sorted(files) == sorted((tmp_path / "out" / "new").iterdir())
    with pytest.raises(DatasetError, match="row 12 is not in"):
        extract(Dataset.open(whole), [N], tmp_path / "out")
    for wrong in ("../mp4", "a/b", "/mp4", "", ".mp4"):
        with pytest.raises(DatasetError, match="is no extension for a file"):
            extract(Dataset.open(whole), [0], tmp_path / "out", (wrong,))
    values = zarr.open_group(damaged / "catalog.zarr", mode="r+")["key/values"]
    values[:6] = np.frombuffer(b"../../", np.uint8)
    with pytest.raises(DatasetError, match=r"row 0 of .* cannot be a file \(clip key '\.\./\.\./"):
        extract(Dataset.open(damaged), [0], tmp_path / "out" / "bad")
    values[:6] = np.frombuffer(clips[0].key[:6].encode(), np.uint8)
    with (damaged / "clips-000000.tar").open("r+b") as file:
        file.seek(600)
        file.write(b"\xff\x00\xff")
    with pytest.raises(DatasetError, match="wrong checksum"):
        extract(Dataset.open(damaged), [0], tmp_path / "out" / "bad")
    assert list((tmp_path / "out" / "bad").iterdir()) == []


def test_the_command_extract(whole: Path, tmp_path: Path, clips: list[Clip], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["extract", str(whole), clips[4].key, "--rows", "1,2", "--members", "mp4", "--out", str(tmp_path)]
    app(arguments, standalone_mode=False)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == {
        f"{clips[r].key}.mp4": clips[r].members["mp4"] for r in (4, 1, 2)
    }
    assert capsys.readouterr().out.split() == [str(tmp_path / f"{clips[r].key}.mp4") for r in (4, 1, 2)]
    for wrong, sentence in ((["--rows", "1,x"], "are not understood; give numbers"), ([], "give keys, or --rows 0,5")):
        with pytest.raises(DatasetError, match=sentence):
            app(["extract", str(whole), *wrong], standalone_mode=False)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_open_files_are_few(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, tiny_profile(), shard_bytes=1) as w:
        for i in range(5):
            w.add(make_clip(i))
    dataset = Dataset.open(tmp_path)
    dataset.read(0)  # reads the catalog, too
    dataset._open = lru_cache(2)(dataset._open_shard)
    before = open_files()
    for row in [0, 1, 2, 3, 4] * 3:
        dataset.read(row)
    assert open_files() == before + 2


def test_any_fsspec_url(whole: Path, clips: list[Clip]) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{whole}/", "/remote/set/", recursive=True)
    try:
        dataset = Dataset.open("memory://remote/set")
        assert dataset.keys.tolist() == [c.key for c in clips]
        assert dataset.read(7, check=True)["mp4"] == clips[7].members["mp4"]
        assert dataset.fingerprint == Dataset.open(whole).fingerprint == Dataset.open(f"file://{whole}/").fingerprint
        assert Dataset.open(f"file://{whole}").read(7) == dataset.read(7)
    finally:
        memory.rm("/remote", recursive=True)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist; give the folder"):
        Dataset.open(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"is no data set: it has no dataset\.json"):
        Dataset.open(tmp_path)
    with pytest.raises(DatasetError, match="cannot be read"):
        Dataset.open("nosuchscheme://x")


def test_shards_gone_or_cut(damaged: Path) -> None:
    shards = Dataset.open(damaged).meta.shards
    (damaged / shards[0].name).unlink()
    os.truncate(damaged / shards[1].name, shards[1].bytes // 2)
    dataset = Dataset.open(damaged)
    with pytest.raises(DatasetError, match=f"shard {shards[0].name} is missing from .*copy it there again"):
        dataset.read(0)
    with pytest.raises(DatasetError, match=f"{shards[1].name} is truncated or changed"):
        dataset.read(shards[0].clips)


def test_truncated_while_open(damaged: Path) -> None:
    dataset = Dataset.open(damaged)
    dataset.read(0)
    os.truncate(damaged / dataset.meta.shards[0].name, 1000)
    with pytest.raises(DatasetError, match="is truncated: it should have bytes"):
        dataset.read(0)


def test_changed_bytes_are_seen_when_asked_for(damaged: Path) -> None:
    dataset = Dataset.open(damaged)
    with (damaged / dataset.meta.shards[0].name).open("r+b") as f:
        f.seek(int(dataset.catalog.column("offset")[0, 0]) + 5)
        f.write(b"\xff\x00")
    dataset.read(0)
    with pytest.raises(DatasetError, match=r"\.mp4 in .* has a wrong checksum"):
        dataset.read(0, check=True)


def one_shard(name: str = "x.tar", clips: int = 1, bytes: int = 10240, times: int = 1) -> dict[str, object]:
    return {"shards": [{"name": name, "clips": clips, "bytes": bytes, "sha256": "0" * 64}] * times}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": 2}, "has format 2, this cmacc reads 1: upgrade cmacc"),
        ({"extra": 1}, "not usable at extra"),
        ({"profile": {"codec": "av2"}}, "not usable at profile: .*codec 'av2' is not known"),
        ({"profile": {"bits": 10}}, "unknown fields bits; it was written by a newer cmacc"),
        ({"members": ["mp4"]}, "not usable at top.* json last"),
        (one_shard("../../etc/passwd"), r"not usable at shards\.0\.name"),
        (one_shard("/etc/x.tar"), "in the data set's own folder"),
        (one_shard("../x.tar"), "in the data set's own folder"),
        (one_shard(clips=-1), r"not usable at shards\.0\.clips"),
        (one_shard(clips=10**15), "more clips than its bytes can hold"),
        (one_shard(times=2), "named twice"),
    ],
)
def test_hostile_dataset_json(damaged: Path, change: dict[str, object], sentence: str) -> None:
    file = damaged / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(DatasetError, match=sentence):
        Dataset.open(damaged)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"x"', "\xff", "[" * 100_000])
def test_not_even_json(damaged: Path, text: str) -> None:
    (damaged / "dataset.json").write_text(text, encoding="latin-1")
    with pytest.raises(DatasetError, match=r"dataset\.json is not"):
        Dataset.open(damaged)


def test_hostile_catalog(damaged: Path) -> None:
    """Offsets that point outside the tar, as a forged catalog would have them."""
    dataset = Dataset.open(damaged)
    entries = dataset.catalog.column("offset")
    for wrong in (-5000, 1 << 60):
        zarr.open_group(damaged / "catalog.zarr", mode="r+")["offset"][:] = entries + wrong
        with pytest.raises(DatasetError, match=r"points outside clips-000000\.tar"):
            Dataset.open(damaged).read(0)
    shutil.rmtree(damaged / "catalog.zarr")
    with pytest.raises(DatasetError, match="no catalog can be read at"):
        Dataset.open(damaged).read(0)


def test_added_columns(damaged: Path) -> None:
    dataset = Dataset.open(damaged)
    embeddings = np.random.default_rng(0).standard_normal((N, 33)).astype(np.float16)
    dataset.catalog.add_column("emb-small.v1", embeddings, {"model": "small"})
    dataset.catalog.add_column("score", np.arange(N) / 2)
    again = Dataset.open(damaged).catalog
    assert again.added == ["emb-small.v1", "score"] and again.columns[-1] == "score"
    assert np.array_equal(again.column("emb-small.v1"), embeddings) and again.column("emb-small.v1").dtype == np.float16
    assert np.array_equal(again.column("emb-small.v1", np.array([7, 0])), embeddings[[7, 0]])
    assert again.attrs("emb-small.v1") == {"model": "small"}
    with pytest.raises(DatasetError, match="is there already"):
        again.add_column("score", np.arange(N))
    again.add_column("score", np.arange(N), replace=True)
    assert Dataset.open(damaged).catalog.column("score").tolist() == list(range(N))
    for name in ("fps", "key", "../x", "", ".x", "a/b"):
        with pytest.raises(DatasetError, match="is taken or not usable"):
            again.add_column(name, np.arange(N))
    with pytest.raises(DatasetError, match="give one row to each"):
        again.add_column("short", np.arange(N - 1))
    with DatasetWriter(damaged, tiny_profile()) as w:
        w.add(make_clip(99))
    grown = Dataset.open(damaged).catalog
    assert grown.column("fps").shape == (N + 1,)
    with pytest.raises(DatasetError, match=f"covers {N} of {N + 1} clips, which came later"):
        grown.column("score")


def test_large_added_column_is_chunked(damaged: Path) -> None:
    class Blocks:
        """Never whole in memory: only its slices are."""

        shape, dtype = (N, 1 << 16), np.dtype(np.float32)

        def __getitem__(self, rows: slice) -> np.ndarray:
            return np.repeat(np.arange(N, dtype=np.float32)[rows, None], 1 << 16, axis=1)

    catalog = Dataset.open(damaged).catalog
    catalog.add_column("wide", Blocks())
    assert catalog.column("wide", slice(10, 12))[:, 9].tolist() == [10, 11]


def test_facts_are_strict(clips: list[Clip]) -> None:
    good = json.loads(facts_to_json(clips[0].facts))
    assert facts_from_json(json.dumps({**good, "fps": 8}).encode()) == clips[0].facts
    wrong = [b"", b"\xff", b"[]", b"{}", json.dumps({**good, "more": 1}).encode()]
    mistyped = {"fps": "8", "n_frames": 1.5, "width": True, "labels": "x", "keyframes": [0.5]}
    mistyped |= {"av_trust": "1", "duplicate_of": 3, "fingerprint": "abc", "captions": [[0.0, 1.0]]}
    wrong += [b"[" * 100_000, *(json.dumps({**good, k: v}).encode() for k, v in mistyped.items())]
    for data in wrong:
        with pytest.raises(ValueError, match=r"json member|should be"):
            facts_from_json(data)
    for said in (3, [[0.0, 1.0, 2]], [["0", 1.0, "a"]], [[0.0, 1.0, "a", "b"]], ["abc"]):
        with pytest.raises(ValueError, match="fact captions"):
            facts_from_json(json.dumps({**good, "captions": said}).encode())


def test_later_facts_have_defaults(clips: list[Clip]) -> None:
    later = ("av_offset_s", "av_trust", "fingerprint", "duplicate_of", "captions")
    good = json.loads(facts_to_json(clips[0].facts))
    assert facts_from_json(json.dumps({k: v for k, v in good.items() if k not in later}).encode()) == clips[0].facts
    full = replace(
        clips[0].facts, av_offset_s=-0.12, av_trust=0.5, fingerprint="0123456789abcdef" * 4, duplicate_of="k",
        captions=((0.0, 1.5, "hello"), (1, 2.0, "café")),
    )  # fmt: skip
    assert facts_from_json(facts_to_json(full)) == full


def test_meta_bytes_do_not_depend_on_order() -> None:
    first = Meta(profile=tiny_profile().to_json(), members=("mp4", "json"), provenance={"b": 1, "a": 2})
    second = Meta(profile=dict(reversed(tiny_profile().to_json().items())), members=("mp4", "json"), provenance={"a": 2, "b": 1})
    assert first.to_bytes() == second.to_bytes()
