"""Every fault that lint knows, provoked on a sound data set; and the data set at a glance."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr
from conftest import Cmacc
from fsspec.implementations.local import LocalFileSystem
from media import audio_bytes, make_clip, tiny_profile, video_bytes
from PIL import Image

from cmacc.shards.catalog_writer import CatalogWriter, Entry
from cmacc.shards.clip import Clip
from cmacc.shards.dataset import Dataset, Meta, Shard
from cmacc.shards.describe import describe
from cmacc.shards.headers import headers
from cmacc.shards.index import Member, publish_indexes, scan
from cmacc.shards.lint import Fault, lint
from cmacc.shards.page import contact_sheet
from cmacc.shards.place import place
from cmacc.shards.tar import tar_end, tar_member, tar_padding
from cmacc.shards.writer import DatasetWriter

TAR = "clips-000000.tar"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lint") / "set"
    with DatasetWriter(path, tiny_profile()) as w:
        for i in range(8):
            w.add(make_clip(i, labels=(f"label {i % 2}",), split="train"))
            if i == 4:
                w.cut()
    return path


@pytest.fixture
def broken(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "set"))


def members(path: Path) -> list[tuple[str, bytes]]:
    data = path.read_bytes()
    return [(m.name, data[m.offset : m.offset + m.size]) for m in scan(path)]


def forge(folder: Path, new: list[tuple[str, bytes]], *, honest: bool = True) -> None:
    """Write the first shard anew with other members, and (honest) indexes, size and checksum to match."""
    path = folder / TAR
    body = b"".join(tar_member(name, len(data)) + data + tar_padding(len(data)) for name, data in new)
    path.write_bytes(body + tar_end(len(body)))
    meta = json.loads((folder / "dataset.json").read_text())
    if honest:
        found = [] if len(dict(new)) < len(new) else scan(path)
        meta["shards"][0].update(bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        publish_indexes(place(path.parent), path.name, found)
    (folder / "dataset.json").write_text(json.dumps(meta))


def codes(faults: list[Fault]) -> set[str]:
    return {f.code for f in faults}


def test_sound_data_set_has_no_faults(sound: Path) -> None:
    assert lint(sound) == []
    assert lint(sound, samples=3, seed=5) == []
    assert lint(sound, samples=0, checksums=False) == []
    memory = fsspec.filesystem("memory")
    memory.put(f"{sound}/", "/lint/set/", recursive=True)
    try:
        assert lint("memory://lint/set") == []
    finally:
        memory.rm("/lint", recursive=True)


def change_meta(**shard: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        meta = json.loads((folder / "dataset.json").read_text())
        meta["shards"][0].update(shard)
        (folder / "dataset.json").write_text(json.dumps(meta))

    return change


def change_catalog(name: str, row: int, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        zarr.open_group(folder / "catalog.zarr", mode="r+")[name][row] = value

    return change


def change_byte(folder: Path) -> None:
    place = int(Dataset.open(folder).catalog.column("offset")[2, 0]) + 600
    with (folder / TAR).open("r+b") as f:
        f.seek(place)
        old = f.read(1)
        f.seek(place)
        f.write(bytes([old[0] ^ 0xFF]))


def of_first(change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> Callable[[Path], None]:
    """A first shard whose members were changed, with everything that describes it made to match."""
    return lambda folder: forge(folder, change(members(folder / TAR)))


def from_second(folder: Path) -> None:
    forge(folder, members(folder / TAR)[:-3] + members(folder / "clips-000001.tar")[:3])


def with_header(folder: Path, **change: object) -> None:
    """The first header otherwise than we write it, with its size and checksum told."""
    data = (folder / TAR).read_bytes()
    info = tarfile.TarInfo.frombuf(data[:512], "utf-8", "strict")
    for field, value in change.items():
        setattr(info, field, value)
    (folder / TAR).write_bytes(info.tobuf() + data[512:])
    change_meta(sha256=hashlib.sha256(info.tobuf() + data[512:]).hexdigest())(folder)


def with_byte(folder: Path, where: Callable[[list[Member]], int]) -> None:
    data = bytearray((folder / TAR).read_bytes())
    data[where(scan(folder / TAR))] = 1
    (folder / TAR).write_bytes(data)


def longer(folder: Path) -> None:
    """A whole record too much, and not empty, with everything that describes the tar made to match."""
    data = (folder / TAR).read_bytes() + bytes(10_000) + b"x" * 240
    (folder / TAR).write_bytes(data)
    change_meta(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())(folder)


def attributes(folder: Path, **change: object) -> None:
    zarr.open_group(folder / "catalog.zarr", mode="r+").update_attributes(change)


def added(folder: Path, shape: int | None = None, value: float | None = None) -> None:
    """A column of which some rows are lost, or one number is another."""
    catalog = Dataset.open(folder).catalog
    catalog.add_column("emb", np.ones((8, 3), np.float32), {"model": "m"})
    assert catalog.attrs("emb") == {"model": "m"} and lint(folder, samples=0) == []
    array = zarr.open_array(folder / "catalog.zarr/emb", mode="r+")
    if shape is not None:
        array.resize((shape, 3))
    if value is not None:
        array[2, 1] = value


BREAKS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no dataset.json": (lambda p: (p / "dataset.json").unlink(), "dataset", "has no dataset.json"),
    "path from outside": (change_meta(name="../x.tar"), "dataset", "own folder"),
    "shard missing": (lambda p: (p / TAR).unlink(), "missing", f"{TAR} is missing; copy it again"),
    "shard truncated": (lambda p: os.truncate(p / TAR, 30_000), "size tar", "truncated or changed"),
    "shard truncated at a member": (lambda p: os.truncate(p / TAR, scan(p / TAR)[6].header), "size tar", "without its end mark"),
    "shard longer": (lambda p: os.truncate(p / TAR, (p / TAR).stat().st_size + 512), "size", "bytes, dataset.json says"),
    "a byte changed": (change_byte, "checksum", "wrong sha256: its content changed"),
    "no index": (lambda p: (p / "clips-000000.idx").unlink(), "index", r"clips-000000\.idx is missing"),
    "wrong index": (lambda p: (p / "clips-000000.tar.idx").write_bytes(b"x"), "index", f"idx does not agree with {TAR}"),
    "too few clips": (change_meta(clips=4), "count", "holds 5 clips, dataset.json says 4"),
    "member gone": (of_first(lambda m: m[:-2] + m[-1:]), "members", "has mp4, json, not mp4, flac, json"),
    "members apart": (of_first(lambda m: [m[0], m[3], *m[1:3], *m[4:]]), "members", "not adjacent"),
    "twice in a shard": (of_first(lambda m: m + m[:3]), "tar", "has the name of an earlier member"),
    "in two shards": (from_second, "duplicate", f"in {TAR} too"),
    "bad key": (of_first(lambda m: [(n.replace("yt_", "yt "), d) for n, d in m]), "key", "has a clip with the key 'yt 0"),
    "not a tar": (lambda p: (p / TAR).write_bytes(b"no" * 5000), "size tar", "is damaged"),
    "bad facts": (of_first(lambda m: [(n, d[:-1] if "json" in n else d) for n, d in m]), "members", "not JSON"),
    "catalog gone": (lambda p: shutil.rmtree(p / "catalog.zarr"), "catalog", "made again from the shards"),
    "catalog garbage": (lambda p: (p / "catalog.zarr/size/c/0/0").write_bytes(b"x"), "catalog", "cannot be read"),
    "catalog offset": (change_catalog("offset", 1, 7), "catalog", "does not agree with"),
    "catalog facts": (change_catalog("motion", 1, 77.0), "catalog", r"has other facts than .* \(motion\)"),
    "catalog sha256": (change_catalog("sha256", 6, 0), "catalog", "has other checksums than the members"),
    "other headers": (lambda p: with_header(p, mtime=1), "tar", "not as this version writes it"),
    "padding": (lambda p: with_byte(p, lambda m: m[0].offset + m[0].size), "tar checksum", "more than zeros behind yt_"),
    "half an end mark": (lambda p: with_byte(p, lambda m: m[-1].end + 512), "tar checksum", "half an end mark at byte"),
    "behind the end": (longer, "tar", "something behind its end mark"),
    "longer than its record": (longer, "tar", "ends at byte .*, its end mark at byte"),
    "catalog shard": (change_catalog("shard", 1, 1), "catalog", "names shard 1, not 0"),
    "catalog size": (change_catalog("size", 1, 7), "catalog", "does not agree with"),
    "catalog members": (lambda p: attributes(p, members=["mp4", "json"]), "catalog", "another attributes than such a column"),
    "unknown later": (lambda p: attributes(p, later=["x"]), "catalog", "another attributes than such a column"),
    "added column stale": (lambda p: added(p, shape=5), "catalog", "column emb covers 5 of 8 clips"),
    "added column changed": (lambda p: added(p, value=7), "catalog", "column emb has other numbers than were written"),
    "dataset.json spaced": (
        lambda p: (p / "dataset.json").open("a").write(" "),
        "dataset",
        "changed",
    ),
    "part": (lambda p: (p / ".clips-000003.tar.part").touch(), "stray", "left by a writer or a `cmacc reshard`"),
    "reshard's notes": (lambda p: (p / ".reshard").mkdir(), "stray", r"run the same command again .* or delete \.reshard"),
    "part of a column": (lambda p: (p / "catalog.zarr/.emb.part").mkdir(), "stray", "left by a writer"),
    "orphan": (lambda p: (p / "clips-000007.tar.idx").write_bytes(b""), "stray", "not named in dataset.json"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_each_fault_is_found(broken: Path, case: str) -> None:
    breaks, expected, sentence = BREAKS[case]
    breaks(broken)
    faults = lint(broken)
    assert set(expected.split()) <= codes(faults)
    assert any(re.search(sentence, f.sentence) for f in faults), faults
    assert all("\n" not in f.sentence and f.where for f in faults)


def with_media(**change: object) -> Clip:
    clip = make_clip(1)
    media = {k: change.pop(k) for k in ("mp4", "flac") if k in change}
    return replace(clip, facts=replace(clip.facts, **change), members={**clip.members, **media})


@pytest.mark.parametrize(
    ("clip", "code", "sentence"),
    [
        (with_media(mp4=b"not a video"), "decode", r"\.mp4 in .* cannot be decoded"),
        (with_media(mp4=video_bytes(1)[:-2000]), "decode", r"\.mp4 in .* cannot be decoded"),
        (with_media(mp4=audio_bytes()), "decode", "one video stream and nothing else"),
        (with_media(flac=video_bytes()), "decode", "one audio stream and nothing else"),
        (with_media(flac=b"fLaC" + bytes(100)), "decode", r"\.flac in .* cannot be decoded"),
        (with_media(width=64), "decode", "frames of 48 x 32, its facts say 64 x 32"),
        (with_media(n_frames=9), "duration", "has 8 frames and lasts 1.000 s"),
        (with_media(duration_s=1.3, flac=audio_bytes(seconds=1.3)), "duration", "its facts say 8 and 1.300 s"),
        (with_media(flac=audio_bytes(seconds=1.5)), "duration", "lasts 1.500 s, the video 1.000 s"),
        (with_media(keyframes=(0,)), "decode", "has keyframes 0, 4, its facts say 0;"),
        (
            with_media(mp4=video_bytes(1, gop=8), keyframes=(0,)),
            "decode",
            "8 frames from one keyframe to the next",
        ),
        (with_media(mp4=video_bytes(1, frames=10, fps=10), n_frames=10, fps=10.0), "decode", "10 frames a second by its facts"),
        (with_media(mp4=video_bytes(1, frames=9, fps=9), n_frames=9, keyframes=(0, 4, 8)), "decode", "not 1/8 s apart"),
        (with_media(mp4=video_bytes(1, width=64, height=48), width=64, height=48), "decode", "the profile's short side is 32"),
        (with_media(flac=audio_bytes(rate=16_000)), "decode", "1 channels at 16000 Hz, the profile says 1 at 8000"),
        (with_media(flac=audio_bytes(codec="opus")), "decode", "is opus, the profile says flac"),
    ],
)
def test_media_faults_are_found(tmp_path: Path, clip: Clip, code: str, sentence: str) -> None:
    with DatasetWriter(tmp_path, tiny_profile()) as w:
        w.add(clip)
    faults = lint(tmp_path)
    assert [f.code for f in faults] == [code]
    assert re.search(sentence, faults[0].sentence) and f"key <> '{clip.key}'" in faults[0].sentence
    assert lint(tmp_path, samples=0) == []


def test_other_codecs_pass(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, tiny_profile(audio_codec="opus")) as w:
        w.add(make_clip(0, audio="opus"))
    assert lint(tmp_path) == []
    with DatasetWriter(tmp_path / "vp9", tiny_profile(codec="vp9")) as w:
        w.add(make_clip(0))
    assert [f.sentence for f in lint(tmp_path / "vp9") if "is h264, the profile says vp9" in f.sentence]


def test_a_source_in_two_splits(tmp_path: Path) -> None:
    """Clips without a split are in none."""
    with DatasetWriter(tmp_path, tiny_profile()) as w:
        for i, split in enumerate(("train", "val", "train", "", "val", "val")):
            w.add(make_clip(i, split=split))
            w.cut()
    faults = lint(tmp_path)
    assert [f.code for f in faults] == ["split"] and "yt_00000000000 is in two splits" in faults[0].sentence
    assert "_0_1000 in train" in faults[0].sentence and "_10000_11000 in val" in faults[0].sentence


def test_of_many_alike_some_are_told(broken: Path) -> None:
    folder = broken.with_name("many")
    with DatasetWriter(folder, tiny_profile()) as w:
        for i in range(24):
            w.add(make_clip(i))
    change_catalog("motion", slice(None), 77.0)(folder)
    faults = lint(folder, samples=0)
    assert len(faults) == 11 and "has 14 more faults of the kind 'catalog'" in faults[-1].sentence


def test_progress_ends_with_all_bytes(sound: Path) -> None:
    size = sum(p.stat().st_size for p in sound.glob("*.tar"))
    for checksums in (True, False):
        told: list[int] = []
        lint(sound, samples=0, checksums=checksums, on_progress=told.append)
        assert told == sorted(told) and told[-1] == size


def test_each_shard_is_read_once(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = LocalFileSystem.open
    monkeypatch.setattr(LocalFileSystem, "open", lambda self, path, *a, **k: opened.append(path) or real(self, path, *a, **k))
    assert lint(sound, samples=0) == []
    assert sorted(Path(p).name for p in opened if p.endswith(".tar")) == [TAR, "clips-000001.tar"]


def test_lint_on_the_command_line(broken: Path, cmacc: Cmacc) -> None:
    assert "no fault" in cmacc("lint", broken).stdout
    assert json.loads(cmacc("lint", broken, "--json").stdout) == []
    (broken / "clips-000000.idx").unlink()
    found = json.loads(cmacc("lint", broken, "--json", code=1).stdout)
    assert [(f["code"], f["where"]) for f in found] == [("index", "clips-000000.idx")] and "is missing" in found[0]["sentence"]


# --- shards made elsewhere ---


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A tar by another hand: members in a folder, times, a link, a member and a sample that the catalog leaves out."""
    clips, path = [make_clip(i) for i in range(3)], tmp_path / "foreign" / "00000.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, data in [(f"d/{c.key}.{m}", c.members[m]) for c in clips for m in ("flac", "mp4")] + [("d/other.txt", b"x")]:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 12.5
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("d/link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with path.open("rb") as file:
        there = {m.name: m for m, _ in headers(file, path.stat().st_size, strict=False)}
    entries = []
    for clip in clips:
        own = tuple(there[f"d/{clip.key}.{m}"] for m in ("mp4", "flac"))
        digests = tuple(hashlib.sha256(clip.members[m]).digest() for m in ("mp4", "flac"))
        entries.append(Entry(clip.key, replace(clip.facts, loudness_db=float("nan")), own, digests))
    CatalogWriter.create(place(path.parent), ("mp4", "flac")).append(0, entries)
    publish_indexes(place(path.parent), path.name, list(there.values()))
    shard = Shard(name=path.name, clips=3, bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    meta = Meta(profile=None, foreign=True, members=("mp4", "flac"), shards=[shard])
    (path.parent / "dataset.json").write_bytes(meta.to_bytes())
    return path.parent


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "row elsewhere": (change_catalog("offset", 1, 7), "where there is no member of"),
    "row of another": (lambda p: swap(p, "offset", "size", "sha256"), r"where there is 'd/yt_.*\.mp4'"),
    "checksum": (change_catalog("sha256", 1, 7), "has another checksum than 'd/yt_"),
    "byte": (lambda p: foreign_byte(p), "wrong sha256"),
    "cut": (lambda p: os.truncate(p / "00000.tar", 9000), "truncated or changed"),
    "no index": (lambda p: (p / "00000.idx").unlink(), "00000.idx is missing; `cmacc index`"),
    "no catalog": (lambda p: shutil.rmtree(p / "catalog.zarr"), "make the catalog again by `cmacc index"),
}


def swap(folder: Path, *names: str) -> None:
    group = zarr.open_group(folder / "catalog.zarr", mode="r+")
    for name in names:
        group[name][:2] = group[name][:2][::-1]


def foreign_byte(folder: Path) -> None:
    data = bytearray((folder / "00000.tar").read_bytes())
    data[int(Dataset.open(folder).catalog.column("offset")[1, 0]) + 40] ^= 1
    (folder / "00000.tar").write_bytes(data)


def test_foreign_shards_pass(foreign: Path) -> None:
    assert lint(foreign) == [] and lint(foreign, checksums=False) == []


@pytest.mark.parametrize("case", FOREIGN)
def test_faults_of_foreign_shards(foreign: Path, case: str) -> None:
    breaks, sentence = FOREIGN[case]
    breaks(foreign)
    assert any(re.search(sentence, f.sentence) for f in lint(foreign))


def test_describe(sound: Path) -> None:
    facts = describe(Dataset.open(sound))
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["clips"], facts["shards"], facts["sources"], facts["splits"]) == (8, 2, 4, {"train": 8})
    assert facts["hours"] == 8 / 3600 and facts["labels"] == {"label 0": 4, "label 1": 4}
    assert facts["quantiles"]["motion"] == pytest.approx(
        {"0%": 0, "5%": 0.35, "25%": 1.75, "50%": 3.5, "75%": 5.25, "95%": 6.65, "100%": 7}
    )
    assert facts["bytes"] == sum(p.stat().st_size for p in sound.glob("*.tar"))


def test_describe_nothing(tmp_path: Path) -> None:
    DatasetWriter(tmp_path, tiny_profile()).__exit__(None, None, None)
    facts = describe(Dataset.open(tmp_path))
    assert (facts["clips"], facts["labels"], facts["quantiles"]["motion"]) == (0, {}, {})
    assert lint(tmp_path) == []
    with Image.open(contact_sheet(Dataset.open(tmp_path), tmp_path / "sheet.png")) as sheet:
        assert sheet.height == 1


def test_contact_sheet(sound: Path, tmp_path: Path) -> None:
    path = contact_sheet(Dataset.open(sound), tmp_path / "sheet.png", 3)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG" and sheet.height == 3 * 114
        assert np.asarray(sheet).std() > 20
