"""Tars and their indexes, as other readers see them: webdataset, DALI's own tools and reader, Energon."""

from __future__ import annotations

import io
import struct
import tarfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from media import make_clip, tiny_profile

from cmacc.shards.clip import Clip
from cmacc.shards.dataset import Dataset
from cmacc.shards.index import Member, clips, dali_index, energon_index, scan
from cmacc.shards.reshard import reshard
from cmacc.shards.tar import tar_bytes, tar_end, tar_member, tar_padding
from cmacc.shards.writer import DatasetWriter


@pytest.fixture(scope="module", params=["written", "re-sharded"])
def shard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Clip]]:
    """A shard and its clips, with a key so long that names need an extended header."""
    made = [make_clip(i, source="yt_-dashed_id0") for i in range(6)]
    made.append(replace(make_clip(6), key="k" * 96))
    path = tmp_path_factory.mktemp("index")
    with DatasetWriter(path / "written", tiny_profile()) as writer:
        for clip in made:
            writer.add(clip)
    if request.param == "re-sharded":
        reshard([path / "written"], path / "re-sharded", order="by:motion")
    return path / request.param / "clips-000000.tar", made


@pytest.fixture(scope="module")
def inside(shard: tuple[Path, list[Clip]]) -> dict[str, bytes]:
    """Every member by name, as the data set itself reads it."""
    dataset = Dataset.open(shard[0].parent)
    found = {f"{key}.{m}": d for row, key in enumerate(dataset.keys) for m, d in dataset.read(row, check=True).items()}
    assert all(found[f"{c.key}.{m}"] == c.members[m] for c in shard[1] for m in ("mp4", "flac")) and len(found) == 21
    return found


def tar_of(*members: tuple[str, bytes]) -> io.BytesIO:
    data = b"".join(tar_member(name, len(body)) + body + tar_padding(len(body)) for name, body in members)
    return io.BytesIO(data + tar_end(len(data)))


def test_tar_is_what_tarfile_writes() -> None:
    for name in ("a.json", "b" * 96 + ".flac"):
        ours, theirs = tar_of((name, b"x" * 700), ("c.mp4", b"")), io.BytesIO()
        with tarfile.open(fileobj=theirs, mode="w") as tar:
            for member, size in ((name, 700), ("c.mp4", 0)):
                info = tarfile.TarInfo(member)
                info.size, info.mode = size, 0o444
                tar.addfile(info, io.BytesIO(b"x" * size))
        assert ours.getvalue() == theirs.getvalue()
    assert tar_bytes(0, [b"x" * 700, b""]) == len(tar_of(("a", b"x" * 700), ("b", b"")).getvalue())


def test_energon_index_by_hand() -> None:
    tar = tar_of(("a.mp4", b"x" * 513), ("a.json", b"{}"), ("b.mp4", b"y"), ("b.json", b""))
    # a: header, two blocks of data, header, one block; b: header, one block, header, nothing
    assert energon_index(scan(tar)) == struct.pack("<3Q", 0, 5 * 512, 8 * 512)
    assert energon_index([]) == struct.pack("<Q", 0)


def test_energon_index_ends_where_tarfile_stops(shard: tuple[Path, list[Clip]]) -> None:
    path, made = shard
    with tarfile.open(path) as tar:
        headers = {info.name.partition(".")[0]: info.offset for info in reversed(tar.getmembers())}
        expected = [headers[c.key] for c in made] + [tar.offset]
    assert path.with_suffix(".tar.idx").read_bytes() == struct.pack(f"<{len(expected)}Q", *expected)


def test_dali_index_is_what_wds2idx_writes(shard: tuple[Path, list[Clip]], tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    with wds2idx.IndexCreator(str(shard[0]), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    assert shard[0].with_suffix(".idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


@pytest.mark.parametrize("indexed", [True, False])
def test_dali_reads_a_shard(shard: tuple[Path, list[Clip]], inside: dict[str, bytes], indexed: bool) -> None:
    dali = pytest.importorskip("nvidia.dali")
    path, made = shard
    pipe = dali.Pipeline(batch_size=len(made), num_threads=1, device_id=None)
    index = {"index_paths": [str(path.with_suffix(".idx"))]} if indexed else {}
    with pipe:
        pipe.set_outputs(*dali.fn.readers.webdataset(paths=[str(path)], ext=["mp4", "flac", "json"], **index))
    pipe.build()
    video, audio, facts = pipe.run()
    # without an index DALI takes the name from the header alone, which holds 100 bytes of it
    for i, clip in enumerate(c for c in made if indexed or len(c.key) < 95):
        found = [part.at(i).tobytes() for part in (video, audio, facts)]
        assert found == [inside[f"{clip.key}.{m}"] for m in ("mp4", "flac", "json")]


def test_webdataset_reads_a_shard(shard: tuple[Path, list[Clip]], inside: dict[str, bytes]) -> None:
    wds = pytest.importorskip("webdataset")
    samples = list(wds.WebDataset(str(shard[0]), shardshuffle=False))
    assert [s["__key__"] for s in samples] == [c.key for c in shard[1]]
    assert {f"{s['__key__']}.{m}": s[m] for s in samples for m in ("mp4", "flac", "json")} == inside


def test_tarfile_reads_a_shard(shard: tuple[Path, list[Clip]], inside: dict[str, bytes]) -> None:
    with tarfile.open(shard[0]) as tar:
        assert {info.name: tar.extractfile(info).read() for info in tar} == inside


def test_a_clip_by_energons_index(shard: tuple[Path, list[Clip]], inside: dict[str, bytes]) -> None:
    """As Energon reads: from one offset to the next lie the members of a clip, a tar without its end mark."""
    data, index = shard[0].read_bytes(), shard[0].with_suffix(".tar.idx").read_bytes()
    offsets = struct.unpack(f"<{len(index) // 8}Q", index)
    found = []
    for begin, end in pairwise(offsets):
        with tarfile.open(fileobj=io.BytesIO(data[begin:end])) as tar:
            found.append({info.name: tar.extractfile(info).read() for info in tar})
    assert [set(f) for f in found] == [{f"{c.key}.{m}" for m in ("mp4", "flac", "json")} for c in shard[1]]
    assert {name: data for clip in found for name, data in clip.items()} == inside


def test_clips_are_members_that_are_adjacent() -> None:
    names = ["a.mp4", "a.json", "b.mp4", "a.flac"]
    groups = clips(Member(name, 0, 0, 0) for name in names)
    found = [(key, [m.extension for m in group]) for key, group in groups]
    assert found == [("a", ["mp4", "json"]), ("b", ["mp4"]), ("a", ["flac"])]
    assert dali_index([Member("a.tar.gz", 0, 512, 3)]) == b"v1.2 1\ntar.gz 512 3 a.tar.gz\n"
