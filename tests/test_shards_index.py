"""Tars and their indexes, as other readers see them: webdataset, DALI's own tools and reader, Energon."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from pathlib import Path

import pytest
from media import make_clip, tiny_profile

from cmacc.shards.clip import Clip
from cmacc.shards.index import Member, clips, dali_index, energon_index, scan
from cmacc.shards.tar import tar_bytes, tar_end, tar_member, tar_padding
from cmacc.shards.writer import DatasetWriter


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Clip]]:
    made = [make_clip(i, source="yt_-dashed_id0") for i in range(7)]
    path = tmp_path_factory.mktemp("index")
    with DatasetWriter(path, tiny_profile()) as writer:
        for clip in made:
            writer.add(clip)
    return path / "clips-000000.tar", made


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


def test_dali_reads_a_shard_by_our_index(shard: tuple[Path, list[Clip]]) -> None:
    dali = pytest.importorskip("nvidia.dali")
    path, made = shard
    pipe = dali.Pipeline(batch_size=len(made), num_threads=1, device_id=None)
    index = str(path.with_suffix(".idx"))
    with pipe:
        pipe.set_outputs(*dali.fn.readers.webdataset(paths=[str(path)], index_paths=[index], ext=["mp4", "flac", "json"]))
    pipe.build()
    video, audio, facts = pipe.run()
    for i, clip in enumerate(made):
        assert video.at(i).tobytes() == clip.members["mp4"]
        assert audio.at(i).tobytes() == clip.members["flac"]
        assert json.loads(facts.at(i).tobytes())["start_s"] == clip.facts.start_s


def test_webdataset_reads_a_shard(shard: tuple[Path, list[Clip]]) -> None:
    wds = pytest.importorskip("webdataset")
    samples = list(wds.WebDataset(str(shard[0]), shardshuffle=False))
    assert [s["__key__"] for s in samples] == [c.key for c in shard[1]]
    assert all(s["mp4"] == c.members["mp4"] and s["flac"] == c.members["flac"] for s, c in zip(samples, shard[1], strict=True))


def test_clips_are_members_that_are_adjacent() -> None:
    names = ["a.mp4", "a.json", "b.mp4", "a.flac"]
    groups = clips(Member(name, 0, 0, 0) for name in names)
    found = [(key, [m.extension for m in group]) for key, group in groups]
    assert found == [("a", ["mp4", "json"]), ("b", ["mp4"]), ("a", ["flac"])]
    assert dali_index([Member("a.tar.gz", 0, 512, 3)]) == b"v1.2 1\ntar.gz 512 3 a.tar.gz\n"


@pytest.mark.parametrize("cut", [2561, 3584, 3585, 4096, 4608, 9000, 10000])
def test_truncated_tar_is_seen(cut: int) -> None:
    """2560 bytes of the whole fill its last record, behind the end mark; they can go."""
    whole = tar_of(("a.mp4", b"x" * 5000), ("a.json", b"{}")).getvalue()
    assert len(scan(io.BytesIO(whole))) == 2
    with pytest.raises(tarfile.TarError):
        scan(io.BytesIO(whole[:-cut]))


@pytest.mark.parametrize("kind", ["symlink", "directory", "outside", "folder", "device"])
def test_hostile_member_is_refused(kind: str) -> None:
    info = tarfile.TarInfo({"outside": "../../etc/passwd", "folder": "a/b.mp4"}.get(kind, "a.mp4"))
    info.type = {"symlink": tarfile.SYMTYPE, "directory": tarfile.DIRTYPE, "device": tarfile.CHRTYPE}.get(kind, tarfile.REGTYPE)
    info.linkname = "/etc/passwd" if kind == "symlink" else ""
    with pytest.raises(tarfile.TarError, match="not a regular file"):
        scan(io.BytesIO(info.tobuf() + bytes(10240)))


def test_hostile_size_is_refused() -> None:
    info = tarfile.TarInfo("a.mp4")
    info.size = 1 << 60
    with pytest.raises(tarfile.TarError):
        scan(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240)))
    info.size = -512
    with pytest.raises((tarfile.TarError, ValueError)):
        scan(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240)))
