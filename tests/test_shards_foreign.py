"""Tars of other makers, indexed where they lie: real tars of webdataset, tarfile, tar and video2dataset's layout."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pytest
from media import audio_bytes, make_clip, tiny_profile, video_bytes
from typer.testing import CliRunner

from cmacc.shards.catalog_writer import CatalogWriter
from cmacc.shards.dataset import Dataset
from cmacc.shards.describe import describe
from cmacc.shards.errors import DatasetError
from cmacc.shards.facts import facts_to_json
from cmacc.shards.foreign.indexing import Indexed, index_shards
from cmacc.shards.foreign.rows import facts_with_captions, said_of
from cmacc.shards.foreign.said import Fields, said, source_of
from cmacc.shards.foreign.tar import ForeignTar
from cmacc.shards.lint import lint
from cmacc.shards.place import Folder
from cmacc.shards.probe import Window, probe
from cmacc.shards.prober import Prober
from cmacc.shards.query import matching
from cmacc.shards.reshard import reshard
from cmacc.shards.writer import DatasetWriter

Members = list[tuple[str, bytes]]
IN_CHILDREN = ("test_a_crash_or_a_hang_costs_one_file", "test_a_bucket", "test_command", "test_real_recordings")


@pytest.fixture(autouse=True)
def probing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, to save the time that a child takes to start; a few tests have the children."""

    def here(self: Prober, path: str, offset: int, size: int, kind: str, *, measure: bool = False) -> dict[str, Any]:
        with Window(path, offset, size) as file:
            return probe(file, kind, measure=measure)

    if request.node.name not in IN_CHILDREN:
        monkeypatch.setattr(Prober, "probe", here)


@pytest.fixture(scope="module")
def wds() -> Any:
    return pytest.importorskip("webdataset")


def muxed(seed: int = 0) -> bytes:
    """Picture and sound in one MP4, as everybody else has it."""
    out_bytes = io.BytesIO()
    with av.open(io.BytesIO(video_bytes(seed))) as video, av.open(io.BytesIO(audio_bytes(seed, codec="opus"))) as sound:
        out = av.open(out_bytes, "w", format="mp4")
        with out:
            streams = [out.add_stream_from_template(s.streams[0]) for s in (video, sound)]
            for source, stream in zip((video, sound), streams, strict=True):
                for packet in source.demux():
                    if packet.size:
                        packet.stream = stream
                        out.mux(packet)
    return out_bytes.getvalue()


def pair(key: str, seed: int = 0, **facts: object) -> Members:
    return [(f"{key}.mp4", video_bytes(seed)), (f"{key}.flac", audio_bytes(seed)), (f"{key}.json", json.dumps(facts).encode())]


def tar_bytes(members: Members, form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1700000000.25
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write(folder: Path, **tars: Members | bytes) -> Path:
    for name, members in tars.items():
        (folder / f"{name}.tar").write_bytes(members if isinstance(members, bytes) else tar_bytes(members))
    return folder


def index(folder: Path, **options: Any) -> Indexed:
    return index_shards(folder, workers=2, **options)


def report(folder: Path) -> dict[tuple[str, str], str]:
    """Reasons by shard and key."""
    with (folder / "index-report.csv").open() as file:
        return {(row["shard"], row["key"]): row["reason"] for row in csv.DictReader(file)}


def assert_rows_are_right(folder: Path, expected: dict[str, dict[str, bytes]]) -> Dataset:
    """Every row gives the bytes that were packed, and they agree with the checksums."""
    dataset = Dataset.open(folder)
    assert sorted(dataset.keys.tolist()) == sorted(expected)
    for row, key in enumerate(dataset.keys.tolist()):
        assert dataset.read(row, check=True) == expected[key]
    return dataset


# --- makers ---


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_every_format(tmp_path: Path, form: int) -> None:
    names = ["a" * 90, *(f"clip-{i}" for i in range(3))]
    members = [m for i, key in enumerate(names) for m in pair(key, i)]
    path = write(tmp_path, shard=tar_bytes(members, form)) / "shard.tar"
    before = (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
    assert index(tmp_path).clips == 4
    by_key = {key: {n.partition(".")[2]: d for n, d in members if n.startswith(f"{key}.")} for key in names}
    dataset = assert_rows_are_right(tmp_path, by_key)
    assert (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) == before
    assert dataset.meta.shards[0].sha256 == before[0]
    facts = dataset.catalog.facts()[1]
    assert (facts.n_frames, facts.fps, facts.width, facts.height, facts.duration_s) == (8, 8.0, 48, 32, 1.0)
    assert facts.keyframes == (0, 4) and np.isnan(facts.loudness_db) and np.isnan(facts.motion)


def test_webdataset_shards(wds: Any, tmp_path: Path) -> None:
    with wds.ShardWriter(f"{tmp_path}/part-%04d.tar", maxcount=2, verbose=0) as writer:
        for i in range(5):
            writer.write({"__key__": f"s{i}", "mp4": muxed(i), "cls": i % 2, "txt": f"clip {i}", "seg.PNG": b"png"})
    assert index(tmp_path).members == ("mp4", "cls", "seg.png", "txt")
    dataset = Dataset.open(tmp_path)
    theirs = [s for i in range(3) for s in wds.WebDataset(f"{tmp_path}/part-{i:04d}.tar", shardshuffle=False)]
    assert dataset.keys.tolist() == [s["__key__"] for s in theirs]
    for row, sample in enumerate(theirs):
        assert dataset.read(row, check=True) == {m: sample[m] for m in dataset.meta.members}
    assert dataset.catalog.labels() == [("0",), ("1",), ("0",), ("1",), ("0",)]
    assert facts_with_captions(dataset, 3).captions == ((0.0, 1.0, "clip 3"),)
    with pytest.raises(DatasetError, match=r"not alike; `cmacc reshard .* --transcode h264`"):
        _ = dataset.profile


@pytest.mark.parametrize("layout", ["./{}", "{}", "00000/{}", "./data/00000/{}"])
def test_folders_inside_a_tar(tmp_path: Path, layout: str) -> None:
    """As `tar cf x.tar .` and the like make them, entries for the folders included."""
    source, out = tmp_path / "source", tmp_path / "out"
    out.mkdir()
    for name, data in [*pair("one", 1), *pair("two", 2), (".hidden.mp4", b"x"), ("README", b"x")]:
        path = source / layout.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    what = sorted(p.name for p in source.iterdir()) if not layout.startswith(".") else ["."]
    subprocess.run(["tar", "--sort=name", "-cf", out / "x.tar", *what], cwd=source, check=True)
    assert index(out).left_out == {}
    expected = {key: {n.partition(".")[2]: d for n, d in pair(key, i)} for i, key in enumerate(("one", "two"), 1)}
    assert_rows_are_right(out, expected)


def test_indexes_are_those_of_their_own_tools(tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    members = [*pair("./a/one"), *pair("./b/one"), *pair("two"), ("not usable.mp4", b""), ("stub.json", b"{}")]
    write(tmp_path, x=[m for m in members if " " not in m[0]])
    with wds2idx.IndexCreator(str(tmp_path / "x.tar"), str(tmp_path / "theirs"), verbose=False) as creator:
        creator.create_index()
    assert index(tmp_path).left_out == {"duplicate": 1, "stub": 1}
    assert (tmp_path / "x.idx").read_bytes() == (tmp_path / "theirs").read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        headers = [i.offset for i in tar if i.name.endswith(("mp4", "stub.json"))]
        end = tar.offset
    assert (tmp_path / "x.tar.idx").read_bytes() == struct.pack("<5Q", *headers, end)


def test_dali_reads_a_foreign_shard_by_our_index(tmp_path: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    write(tmp_path, x=[*pair("./one", 1), *pair("./two", 2)])
    index(tmp_path)
    pipe = dali.Pipeline(batch_size=2, num_threads=1, device_id=None)
    with pipe:
        paths = {"paths": [str(tmp_path / "x.tar")], "index_paths": [str(tmp_path / "x.idx")]}
        pipe.set_outputs(*dali.fn.readers.webdataset(**paths, ext=["mp4", "flac"]))
    pipe.build()
    video, sound = pipe.run()
    assert [video.at(i).tobytes() for i in range(2)] == [video_bytes(1), video_bytes(2)]
    assert sound.at(1).tobytes() == audio_bytes(2)


def test_an_index_of_the_maker_stays(tmp_path: Path) -> None:
    write(tmp_path, a=pair("one"), b=pair("two"))
    index(tmp_path)
    agrees, differs = tmp_path / "a.idx", tmp_path / "b.idx"
    for name in ("dataset.json", "a.tar.idx"):
        (tmp_path / name).unlink()
    differs.write_bytes(b"v1.1 1\nmp4 512 10\n")
    os.utime(agrees, ns=(1, 1))
    found = index(tmp_path)
    assert agrees.stat().st_mtime_ns == 1 and (tmp_path / "a.tar.idx").exists()
    assert differs.read_bytes() == b"v1.1 1\nmp4 512 10\n"
    assert found.remarks == ["b.idx was there and does not agree with b.tar; it is left alone: delete it for a new one"]
    assert index(tmp_path).remarks == found.remarks
    differs.unlink()
    assert index(tmp_path).remarks == [] and differs.read_bytes().startswith(b"v1.2 1\n")


# --- video2dataset ---

URL = "https://www.youtube.com/watch?v=abcdefghij{}"


def v2d(number: int, clip: int | None, **meta: object) -> dict[str, object]:
    key = f"{number:09d}" + (f"_{clip:05d}" if clip is not None else "")
    found = {"url": URL.format(number % 10), "key": key, "status": "success", "error_message": None, "yt_meta_dict": {}}
    return {**found, **meta}


def video2dataset_tar(wds: Any, path: Path) -> None:
    """What its writer leaves: clips with media, text and json; failed videos with text and json alone."""
    subtitles = [{"start": "00:00:10.500", "end": "00:00:10.900", "lines": {"en": ["hello", "there"]}}]
    info = {"info": {"id": "-bcdefghij0", "categories": ["Music"]}, "subtitles": None}
    metas = [
        v2d(0, 0, clips=[["00:00:10.000", "00:00:11.000"]], clip_subtitles=subtitles, yt_meta_dict=info),
        v2d(0, 1, clips=[[12.0, 13.0]]),
        v2d(1, None, clips=[[0, 5], [7, 9]]),
        v2d(2, 0, url="https://example.org/film.mp4", clips=[[1.5, 2.5]]),
        v2d(3, 0, url=None),
        v2d(3, 1, url=None),
    ]
    with path.open("wb") as file, wds.TarWriter(file) as writer:
        for i, meta in enumerate(metas):
            text = json.dumps(meta, indent=4)
            writer.write({"__key__": meta["key"], "mp4": muxed(i), "txt": f"caption {i}", "json": text})
        for i, status in enumerate(("failed_to_download", "failed_to_subsample")):
            meta = v2d(90 + i, None, status=status, error_message="ERROR: [youtube]: Private video\nsign in", clips=[])
            writer.write({"__key__": meta["key"], "txt": "", "json": json.dumps(meta, indent=4)})


def test_video2dataset(wds: Any, tmp_path: Path) -> None:
    video2dataset_tar(wds, tmp_path / "00000.tar")
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "00000_stats.json").write_text("{}")
    found = index(tmp_path, fields=Fields(label="yt_meta_dict.info.categories"))
    assert (found.clips, found.samples, found.members, found.left_out) == (6, 8, ("mp4", "txt", "json"), {"stub": 2})
    text = (tmp_path / "index-report.csv").read_text()
    assert "00000.tar,000000090,stub,failed_to_download: ERROR: [youtube]: Private video sign in\n" in text
    dataset = Dataset.open(tmp_path)
    facts = dataset.catalog.facts()
    assert [f.source for f in facts[:3]] == ["yt_-bcdefghij0", "yt_abcdefghij0", "yt_abcdefghij1"]
    assert facts[3].source.startswith("url_") and facts[4].source == facts[5].source != facts[3].source
    assert [(f.start_s, f.end_s) for f in facts] == [(10, 11), (12, 13), (0, 1), (1.5, 2.5), (0, 1), (0, 1)]
    assert dataset.catalog.labels()[:2] == [("Music",), ()]
    captions = [facts_with_captions(dataset, row).captions for row in (0, 1)]
    assert captions == [((0.5, pytest.approx(0.9), "hello there"),), ((0.0, 1.0, "caption 1"),)]


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("https://youtu.be/-bcdefghij0?t=3", "yt_-bcdefghij0"),
        ("https://m.youtube.com/watch?list=x&v=abcdefghijk", "yt_abcdefghijk"),
        ("https://www.youtube.com/shorts/abcdefghijk", "yt_abcdefghijk"),
        ("abcdefghijk", "yt_abcdefghijk"),
        ("https://youtube.com.evil.example/watch?v=abcdefghijk", "url_"),
        ("https://[broken/watch", "file_"),
        ("a film.mkv", "file_"),
    ],
)
def test_source_videos(text: str, source: str) -> None:
    assert source_of(text).startswith(source)


def test_what_json_says() -> None:
    say = {"a": {"b.c": [{"d": ["x", 2, None, {}, "x"]}]}, "flag": True, "part": 3}
    found = said("k", {"json": json.dumps(say).encode()}, Fields(label="a.b.c.0.d", split="part"))
    assert found.labels == () and found.split == "3"
    found = said("k", {"json": json.dumps({"a": {"b": [{"d": ["x", 2, None, {}, "x"]}]}}).encode()}, Fields(label="a.b.0.d"))
    assert found.labels == ("x", "2")
    lone = said("k", {"json": b'{"label": "\\ud800", "clips": [["x", 2]], "caption": NaN}', "cls": b"7\n"}, Fields())
    assert lone.labels == ("?",) and lone.start_s == 0.0 and lone.end_s is None
    assert said("k", {"cls": b"7\n"}, Fields()).labels == ("7",)
    for wrong in (b"[1]", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(ValueError, match="the json member is not"):
            said("k", {"json": wrong}, Fields())


# --- what does not fit ---


def test_every_reason_is_told(tmp_path: Path) -> None:
    good = [m for i in range(20) for m in pair(f"good{i}", i % 4)]
    odd = [
        ("stub.json", b'{"status": "failed_to_download", "error_message": "gone"}'),
        *pair("naïve"),
        *pair("k" * 97),
        *pair("lacks")[1:],
        *pair("apart")[:1], *pair("between"), *pair("apart")[1:],
        *pair("twice"), *pair("twice")[:1],
        *pair("good3", 9),
        ("broken.mp4", b"no video"), *pair("broken")[1:],
        ("cut.mp4", video_bytes(0)[:-3000]), *pair("cut")[1:],
        ("half.mp4", video_bytes(0)), ("half.flac", audio_bytes(0)[:2000]), ("half.json", b"{}"),
        ("list.m3u8.mp4", b""),
        ("playlist.mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"), *pair("playlist")[1:],
        *pair("nojson")[:2], ("nojson.json", b"[1, 2"),
        ("../../up.mp4", b"x"), ("/abs.mp4", b"x"), ("a space.mp4", b"x"),
    ]  # fmt: skip
    write(tmp_path, first=good, second=odd)
    found = index(tmp_path)
    assert found.members == ("mp4", "flac", "json") and found.clips == 21
    told = {key: reason for (_, key), reason in report(tmp_path).items()}
    assert told == {
        "stub": "stub", "naïve": "key", "k" * 97: "key", "lacks": "member", "apart": "member", "twice": "double",
        "good3": "duplicate", "broken": "media", "cut": "media", "half": "media", "list": "stub", "playlist": "media",
        "nojson": "json", "../../up.mp4": "file", "/abs.mp4": "file", "a space.mp4": "file",
    }  # fmt: skip
    rows = (tmp_path / "index-report.csv").read_text().splitlines()[1:]
    assert Counter(r.split(",")[2] for r in rows) == found.left_out and found.left_out["member"] == 3
    assert Dataset.open(tmp_path).keys.tolist()[-1] == "between"


def test_files_of_a_mac_and_folders_do_not_part_a_sample(tmp_path: Path) -> None:
    one = pair("one")
    write(tmp_path, x=[("._one.mp4", b"x"), one[0], ("._one.flac", b"x"), one[1], ("LICENSE", b"x"), one[2], ("dot.", b"x")])
    assert (index(tmp_path).clips, index(tmp_path).left_out) == (1, {})


def test_bad_json_matters_only_where_json_is_a_member(tmp_path: Path) -> None:
    write(tmp_path, x=[*pair("one"), *pair("two")[:2], ("two.json", b"{"), ("two.cls", b"5")])
    assert index(tmp_path, members=["mp4", "flac", "json"]).left_out == {"json": 1}
    assert index(tmp_path, members=["mp4", "flac"]).clips == 2
    facts = Dataset.open(tmp_path).catalog.facts()[1]
    assert facts.labels == ("5",) and facts.source == source_of("two")


def test_a_field_that_is_no_split_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmacc.shards.foreign.rows._MOST_SPLITS", 1)
    write(tmp_path, x=[*pair("one", title="a"), *pair("two", title="b")])
    with pytest.raises(DatasetError, match="more than 1 splits; name the field"):
        index(tmp_path, fields=Fields(split="title"))


def test_links_and_devices_are_told(tmp_path: Path) -> None:
    out = io.BytesIO(tar_bytes(pair("one")))
    with tarfile.open(fileobj=out, mode="a") as tar:
        for name, kind in (("link.mp4", tarfile.SYMTYPE), ("hard.mp4", tarfile.LNKTYPE), ("null.mp4", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    write(tmp_path, x=out.getvalue())
    assert index(tmp_path).left_out == {"file": 3}


def hostile(kind: str) -> bytes:
    whole = tar_bytes([*pair("a"), *pair("b")])
    info = tarfile.TarInfo("a.mp4")
    if kind == "cut in a member":
        return whole[:3000]
    if kind == "cut between members":
        with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
            return whole[: tar.getmembers()[3].offset]
    if kind == "no end mark":
        return whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512)
    if kind == "gzip":
        return b"\x1f\x8b\x08" + bytes(2000)
    if kind == "huge size":
        info.size = 1 << 60
        return info.tobuf(tarfile.GNU_FORMAT) + bytes(10240)
    if kind == "huge header":
        info.type, info.size = tarfile.XHDTYPE, 1 << 40
        return info.tobuf(tarfile.GNU_FORMAT) + bytes(10240)
    if kind == "damaged header":
        return whole[:257] + b"\xff" * 600 + whole[857:]
    return b"" if kind == "nothing" else b"no tar at all" * 1000


@pytest.mark.parametrize(
    "kind",
    [
        "cut in a member",
        "cut between members",
        "no end mark",
        "gzip",
        "huge size",
        "huge header",
        "damaged header",
        "nothing",
        "text",
    ],
)
def test_a_bad_tar_does_not_stop_the_others(tmp_path: Path, kind: str) -> None:
    write(tmp_path, bad=hostile(kind), good=pair("one"))
    assert index(tmp_path).left_out == {"tar": 1}
    assert report(tmp_path) == {("bad.tar", ""): "tar"}
    assert [s.name for s in Dataset.open(tmp_path).meta.shards] == ["good.tar"]
    assert index(tmp_path).unchanged == 2


def test_cut_at_any_block_it_is_refused() -> None:
    small = [("a.mp4", b"x" * 700), ("a.json", b"{}"), ("b.mp4", b"y" * 512), ("b.json", b"{}")]
    whole = tar_bytes(small, tarfile.USTAR_FORMAT)
    end = 512 * (3 + 2 + 2 + 2)
    assert [s.key for s in ForeignTar(io.BytesIO(whole[: end + 1024]))] == ["a", "b"]
    for cut in range(0, end + 1024, 512):
        with pytest.raises(tarfile.TarError, match=r"(behind|at) byte \d+"):
            list(ForeignTar(io.BytesIO(whole[:cut])))


def test_no_flipped_byte_does_more_than_damage() -> None:
    """Either the tar is refused, or what it gives lies within it."""
    whole, rng, refused = tar_bytes([*pair("./a"), *pair("./b")], tarfile.GNU_FORMAT), np.random.default_rng(0), 0
    for place in rng.integers(0, 512, 300):
        data = bytearray(whole)
        data[place] ^= int(rng.integers(1, 256))
        tar = ForeignTar(io.BytesIO(bytes(data)))
        try:
            members = [m for sample in tar for m in sample.members]
        except tarfile.TarError:
            refused += 1
            continue
        assert tar.sha256 == hashlib.sha256(data).hexdigest() and all(m.end <= len(data) for m in members)
    assert refused > 250


def test_tars_that_cannot_be_named_or_read_at_random(tmp_path: Path) -> None:
    write(tmp_path, good=pair("one"), empty=tar_bytes([]))
    for name in ("with space.tar", "_x.tar", "a.b.tar", "BIG.TAR", "x.tar.gz", "y.tgz"):
        (tmp_path / name).write_bytes(tar_bytes(pair("two")))
    (tmp_path / "folder.tar").mkdir()
    found = index(tmp_path)
    assert found.left_out == {"tar": 6} and found.remarks == ["empty.tar holds no clip that can be used, and is left out"]
    text = (tmp_path / "index-report.csv").read_text()
    assert "x.tar.gz,,tar,it is compressed and cannot be read at random" in text and '_x.tar,,tar,"its name' in text


@pytest.mark.parametrize(
    ("tars", "sentence"),
    [
        ({}, "has no tar to index; give the folder"),
        ({"x": [("a.jpg", b"x"), ("a.cls", b"1")]}, "have cls, jpg, but neither video nor sound"),
        ({"x": [("a.mp4", b"x")]}, r"no clip .* can be used: x.tar: a has a broken medium .*; see index-report.csv"),
    ],
)
def test_nothing_to_index(tmp_path: Path, tars: dict[str, Members], sentence: str) -> None:
    with pytest.raises(DatasetError, match=sentence) as e:
        index(write(tmp_path, **tars))
    assert "\n" not in str(e.value) and not (tmp_path / "dataset.json").exists()


def test_our_own_data_set_is_refused(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, tiny_profile()) as w:
        w.add(make_clip(0))
    before = (tmp_path / "dataset.json").read_bytes()
    with pytest.raises(DatasetError, match="is a data set already"):
        index(tmp_path)
    assert (tmp_path / "dataset.json").read_bytes() == before
    with pytest.raises(DatasetError, match="is no folder"):
        index(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_choice_of_members(tmp_path: Path) -> None:
    some = [m for i in range(4) for m in pair(f"s{i}")[: 2 + i % 2]]
    write(tmp_path, x=[m for m in some if m[0] != "s1.flac"])
    found = index(tmp_path)
    assert (found.members, found.clips) == (("mp4",), 4)
    assert found.remarks == [
        f"{n} of 4 samples have {m}, which is too few; `--members` makes it a member all the same"
        for m, n in (("flac", 3), ("json", 2))
    ]
    assert (index(tmp_path, members=["json", "flac", "mp4"]).clips, index(tmp_path).unchanged) == (1, 1)
    for wrong in (["mp4", "wav"], ["json"], ["mp4", "mp4"]):
        with pytest.raises(DatasetError, match="cannot be had"):
            index(tmp_path, members=wrong)


# --- what it is then ---


def test_our_shards_without_dataset_json(tmp_path: Path) -> None:
    clips = [make_clip(i, labels=("dog",), split="val") for i in range(3)]
    clips[1] = replace(clips[1], facts=replace(clips[1].facts, captions=((0.0, 0.5, "woof"),)))
    with DatasetWriter(tmp_path, tiny_profile()) as w:
        for clip in clips:
            w.add(clip)
    old = Dataset.open(tmp_path)
    places, digests = old.places(slice(None)), old.catalog.column("sha256")
    (tmp_path / "dataset.json").unlink()
    shutil.rmtree(tmp_path / "catalog.zarr")
    found = index(tmp_path)
    new = Dataset.open(tmp_path)
    assert new.catalog.facts() == old_facts(clips) and new.keys.tolist() == [c.key for c in clips]
    assert np.array_equal(new.places(slice(None)), places) and np.array_equal(new.catalog.column("sha256"), digests)
    assert facts_with_captions(new, 1).captions == clips[1].facts.captions
    assert found.profile == replace(tiny_profile(), name="foreign") == new.profile


def old_facts(clips: list[Any]) -> list[Any]:
    return [replace(c.facts, captions=()) for c in clips]


def test_facts_that_do_not_fit_their_clip_are_not_believed(tmp_path: Path) -> None:
    clip = make_clip(0)
    lies = replace(clip.facts, n_frames=2**40, keyframes=(0, 2**40))
    write(tmp_path, x=[*((f"a.{m}", d) for m, d in clip.members.items()), ("a.json", facts_to_json(lies))])
    index(tmp_path)
    facts = Dataset.open(tmp_path).catalog.facts()[0]
    assert (facts.n_frames, facts.keyframes, facts.source) == (8, (0, 4), clip.facts.source)


@pytest.mark.parametrize(
    ("other", "alike"),
    [
        (pair("b", 1), True),
        ([("b.mp4", video_bytes(1, width=32)), *pair("b")[1:]], True),
        ([("b.mp4", video_bytes(1, frames=16, fps=16)), *pair("b")[1:]], False),
        ([("b.mp4", video_bytes(1, height=40)), *pair("b")[1:]], False),
        ([("b.mp4", muxed(1)), *pair("b")[1:]], False),
        ([*pair("b")[:1], ("b.flac", audio_bytes(0, rate=16_000)), *pair("b")[2:]], False),
        ([*pair("b")[:1], ("b.flac", audio_bytes(0, seconds=0.5)), *pair("b")[2:]], False),
    ],
)
def test_profile_is_inferred_where_all_are_alike(tmp_path: Path, other: Members, alike: bool) -> None:
    write(tmp_path, x=[*pair("a"), *other])
    assert (index(tmp_path).profile is not None) == alike
    if alike:
        assert Dataset.open(tmp_path).profile == replace(tiny_profile(), name="foreign")


@pytest.mark.parametrize(("rate", "nominal"), [("30000/1001", 30), ("24000/1001", 24), ("29.97", 30)])
def test_clips_of_ntsc_rates_are_alike(tmp_path: Path, rate: str, nominal: int) -> None:
    """Each has its own rate in the catalog, and the checks take it; a rate between them is none of a profile's."""
    (tmp_path / "in").mkdir()
    fps = Fraction(rate)
    sound = audio_bytes(seconds=float(30 / fps))
    members = [(f"{key}.{m}", data) for key in "ab" for m, data in (("mp4", video_bytes(fps=fps, frames=30)), ("flac", sound))]
    write(tmp_path / "in", x=[*members, *(("c.json", b"{}"), ("d.json", b"{}"))])
    index(tmp_path / "in")
    dataset = Dataset.open(tmp_path / "in")
    assert dataset.profile.fps == nominal
    assert dataset.numbers("fps", [0, 1]).tolist() == pytest.approx([float(fps)] * 2, rel=1e-6)
    assert not lint(tmp_path / "in")
    between = [("b.mp4", video_bytes(fps=Fraction(297, 10), frames=30)), ("b.flac", sound)]
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", x=[*members[:2], *between])
    assert index(tmp_path / "other").profile is None


def test_reshard_takes_them(tmp_path: Path) -> None:
    """The bytes of the chosen clips, from tars with folders, other samples and members in another order."""
    first, second = [m for i in range(3) for m in pair(f"./a/k{i}", i)], [("s.json", b"{}"), *reversed(pair("b/k7", 7))]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in", a=first, b=second)
    index(tmp_path / "in", members=["mp4", "flac", "json"])
    reshard([tmp_path / "in"], tmp_path / "out", where="key <> 'k1'", order="by:key")
    expected = {f"k{i}": {n.rpartition(".")[2]: d for n, d in pair("k", i)} for i in (0, 2, 7)}
    assert_rows_are_right(tmp_path / "out", expected)


def test_audio_alone(tmp_path: Path) -> None:
    sounds = [(f"s{i}.{m}", audio_bytes(i, codec="opus" if m == "opus" else "flac")) for i in range(3) for m in ("opus",)]
    write(tmp_path, x=sounds)
    assert index(tmp_path, measure=True).members == ("opus",)
    facts = Dataset.open(tmp_path).catalog.facts()[0]
    assert (facts.width, facts.height, facts.n_frames, facts.fps, facts.keyframes) == (0, 0, 0, 0.0, ())
    assert facts.duration_s == pytest.approx(1, abs=0.02) and facts.loudness_db == pytest.approx(-15.2, abs=0.5)


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    write(tmp_path, x=[*pair("a"), *pair("b", 1)])
    index(tmp_path)
    dataset = Dataset.open(tmp_path)
    assert matching(dataset, "loudness_db IS NULL").tolist() == [0, 1]
    assert matching(dataset, "loudness_db > -40 OR motion < 5 OR duration_s > 5").tolist() == []
    assert json.loads(json.dumps(describe(dataset), allow_nan=False))["quantiles"]["motion"] == {}
    index(tmp_path, measure=True)
    dataset = Dataset.open(tmp_path)
    assert matching(dataset, "loudness_db BETWEEN -16 AND -15 AND motion > 1").tolist() == [0, 1]


# --- again, and again ---


def test_refresh_reads_what_changed(tmp_path: Path) -> None:
    write(tmp_path, a=pair("one"), c=pair("three"))
    index(tmp_path)
    first = (tmp_path / "dataset.json").read_bytes()
    Dataset.open(tmp_path).catalog.add_column("mine", np.zeros((2, 3), np.float32))
    again = index(tmp_path)
    assert (again.read, again.unchanged, again.clips) == (0, 2, 2)
    assert (tmp_path / "dataset.json").read_bytes() == first and Dataset.open(tmp_path).catalog.added == ["mine"]
    write(tmp_path, b=pair("two"))
    found = index(tmp_path)
    assert (found.read, found.unchanged) == (1, 2)
    assert found.remarks == ["the clips are no longer the same, so columns mine are gone; compute them again"]
    assert Dataset.open(tmp_path).keys.tolist() == ["one", "two", "three"]
    (tmp_path / "a.tar").unlink()
    write(tmp_path, c=[*pair("three"), *pair("four")])
    found = index(tmp_path)
    assert (found.read, found.unchanged) == (1, 1)
    assert found.remarks == ["a.tar was indexed before and is gone, and with it 1 clips"]
    assert Dataset.open(tmp_path).keys.tolist() == ["two", "three", "four"] and not (tmp_path / "a.idx").exists()
    assert (tmp_path / "c.idx").read_text().startswith("v1.2 2\n")


def test_other_questions_are_asked_anew(tmp_path: Path) -> None:
    write(tmp_path, a=pair("one", tag="dog", fold="7"))
    index(tmp_path)
    assert Dataset.open(tmp_path).catalog.labels() == [()]
    assert index(tmp_path, fields=Fields(label="tag", split="fold", source="fold")).read == 1
    facts = Dataset.open(tmp_path).catalog.facts()[0]
    assert (facts.labels, facts.split, facts.source) == (("dog",), "7", source_of("7"))
    assert said_of(Dataset.open(tmp_path), 0).labels == ("dog",)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("fresh", [True, False])
def test_interrupted_anywhere_it_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: bool) -> None:
    """Everything that is written passes four functions: the k-th call of them is the last, for every third k."""
    tars = {name: pair(f"{name}-one", i) for i, name in enumerate("ab")}
    whole = tmp_path / "whole"
    whole.mkdir()
    index(write(whole, **tars))
    expected = (whole / "dataset.json").read_bytes()
    for last in range(fresh, 100, 3):
        folder = tmp_path / f"k{last}"
        folder.mkdir()
        if not fresh:
            index(write(folder, a=pair("old")))
        write(folder, **tars)
        left = last

        def counted(inner: Any) -> Any:
            def call(*args: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return inner(*args)

            return call

        with monkeypatch.context() as patch:
            for kind, name in ((Folder, "publish"), (Folder, "put"), (Folder, "remove"), (CatalogWriter, "append")):
                patch.setattr(kind, name, counted(getattr(kind, name)))
            try:
                index(folder)
            except Killed:
                pass
            else:
                break
        if (folder / "dataset.json").exists():
            assert not fresh and Dataset.open(folder).keys.tolist() == ["old"]
        index(folder)
        assert (folder / "dataset.json").read_bytes() == expected
        assert repr(Dataset.open(folder).catalog.facts()) == repr(Dataset.open(whole).catalog.facts())
        shutil.rmtree(folder)
    assert 8 < last < 30


SUICIDE = """
import os, sys
from pathlib import Path
from cmacc.shards.foreign import index_shards
from cmacc.shards.place import Folder
inner, written = Folder.publish, []
def publish(*args):
    inner(*args)
    written.append(args)
    if len(written) == 3:
        print(*(file.read_text() for file in Path("/proc/self/task").glob("*/children")), flush=True)
        os.kill(os.getpid(), 9)
Folder.publish = publish
index_shards(sys.argv[1], workers=1)
"""


def test_killed_it_is_continued(tmp_path: Path) -> None:
    """By SIGKILL, while it reads; its children go with it, and what was read is not read again."""
    write(tmp_path, **{f"t{i}": pair(f"clip{i}", i % 4) for i in range(5)})
    done = subprocess.run([sys.executable, "-c", SUICIDE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL and done.stdout.split()
    assert not (tmp_path / "dataset.json").exists()
    found = index(tmp_path)
    assert (found.clips, found.read, found.unchanged) == (5, 2, 3)
    assert not [pid for pid in done.stdout.split() if b"cmacc.shards.probe" in command_line(int(pid))]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    write(tmp_path, a=pair("one"))
    with Folder(tmp_path).lock(), pytest.raises(DatasetError, match="another writer is at work"):
        index(tmp_path)


def test_a_bucket() -> None:
    memory = fsspec.filesystem("memory")
    expected = {key: {n.partition(".")[2]: d for n, d in pair(key, i)} for i, key in enumerate(("one", "two"))}
    for i, key in enumerate(expected):
        memory.pipe_file(f"/foreign/{key}.tar", tar_bytes(pair(key, i)))
    try:
        steps: list[tuple[int, int, str]] = []
        url = "memory://foreign"
        found = index_shards(url, workers=2, on_progress=lambda *step: steps.append(step))
        assert (found.clips, found.read) == (2, 2) and steps[-1][:2] == (1, 1)
        dataset = Dataset.open(url)
        for row, key in enumerate(dataset.keys.tolist()):
            assert dataset.read(row, check=True) == expected[key]
        assert memory.cat_file("/foreign/one.idx").startswith(b"v1.2 1\nmp4 ")
        assert index_shards(url).unchanged == 2
    finally:
        memory.rm("/foreign", recursive=True)


# --- hostile media ---


def test_a_crash_or_a_hang_costs_one_file(tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    file.write_bytes(video_bytes(0))
    size = file.stat().st_size
    with Prober() as prober:
        good = prober.probe(str(file), 0, size, "video")
        assert prober._child is not None
        os.kill(prober._child.pid, signal.SIGSEGV)
        with pytest.raises(ValueError, match="died"):
            prober.probe(str(file), 0, size, "video")
        assert prober.probe(str(file), 0, size, "video") == good
        os.kill(prober._child.pid, signal.SIGSTOP)
        prober.limit_s = 0.2
        with pytest.raises(ValueError, match="nothing is known of it after"):
            prober.probe(str(file), 0, size, "video")
        prober.limit_s = 60
        assert prober.probe(str(file), 0, size, "video") == good
        with pytest.raises(ValueError, match="invalid data"):
            prober.probe(str(file), 0, 0, "video")


def test_real_recordings(real_data: Path, tmp_path: Path) -> None:
    """Every recording whose end a decoder sees is a clip, with as many frames as decode; nothing crashes on the awkward ones."""
    files = sorted(p for p in (real_data / "clips").glob("*.mp4"))[:12]
    with tarfile.open(tmp_path / "real.tar", "w") as tar:
        for path in files:
            tar.add(path, f"./{path.stem.replace('.', '-')}.mp4")
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for path in sorted((real_data / "odd").iterdir()):
            tar.add(path, f"odd-{path.name.replace(' ', '-')}")
    found = index(tmp_path, members=["mp4"])
    dataset = Dataset.open(tmp_path)
    assert set(found.left_out) == {"media", "member", "stub"} and len(files) < found.clips < 60
    for row in (matching(dataset, "key NOT LIKE 'odd-%'")[:6]).tolist():
        facts = dataset.catalog.facts(slice(row, row + 1))[0]
        with av.open(io.BytesIO(dataset.read(row, check=True)["mp4"])) as video:
            frames = list(video.decode(video=0))
        assert (facts.n_frames, facts.width, facts.height) == (len(frames), frames[0].width, frames[0].height)
        assert facts.keyframes == tuple(i for i, f in enumerate(frames) if f.key_frame)


def test_command(tmp_path: Path) -> None:
    from cmacc.flows.cli import app

    write(tmp_path, x=[*pair("a", tag="dog"), *pair("b", tag="cat"), ("c.json", b"{}")])
    done = CliRunner().invoke(app, ["index", str(tmp_path), "--label-field", "tag", "--workers", "1"])
    assert done.exit_code == 0, done.output
    assert "2 of 3 samples" in done.output and "stub: has neither video nor sound" in done.output
    assert Dataset.open(tmp_path).catalog.labels() == [("dog",), ("cat",)]


def test_import_is_light() -> None:
    code = "import sys, cmacc.shards.foreign.indexing; print([m for m in ('torch', 'prefect', 'webdataset') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
