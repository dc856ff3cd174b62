"""Tars that mean harm, bytes that changed: what is wrong is refused or found, and nothing is written elsewhere."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from media import make_clip, tiny_profile

from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.shards.headers import headers
from cmacc.shards.index import scan
from cmacc.shards.lint import lint
from cmacc.shards.reshard import reshard
from cmacc.shards.tar import tar_end, tar_member, tar_padding
from cmacc.shards.writer import DatasetWriter

NAMES = ("a.mp4", "a.json", "b" * 96 + ".flac", "c.mp4")
SIZES = (700, 2, 0, 512)


def header(name: str = "b.mp4", size: int = 0, kind: bytes = b"0", form: int = tarfile.PAX_FORMAT, **change: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.mode = size, kind, 0o444
    for field, value in change.items():
        setattr(info, field, value)
    return info.tobuf(form)


def summed(block: bytes) -> bytes:
    """A header whose checksum is made to fit again."""
    body = block[:148] + b" " * 8 + block[156:]
    return body[:148] + b"%06o\0 " % sum(body) + body[156:]


def put(block: bytes, at: int, data: bytes) -> bytes:
    return summed(block[:at] + data + block[at + len(data) :])


def pax(**records: str) -> bytes:
    """An extended header with these records, then an empty `b.mp4`."""
    return header(pax_headers={name.replace("_", "."): value for name, value in records.items()})


def raw_pax(data: bytes, kind: bytes = b"x") -> bytes:
    return header("x", len(data), kind) + data + tar_padding(len(data)) + header()


FIRST = tar_member("a.mp4", 700) + b"x" * 700 + tar_padding(700)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "parent": (header("../../etc/passwd"), "by its name not a regular file"),
    "absolute": (header("/etc/passwd"), "by its name not a regular file"),
    "folder": (header("c/b.mp4"), "by its name not a regular file"),
    "prefix": (put(header(), 345, b"../.."), "by its name not a regular file"),
    "dots": (header(".."), "by its name not a regular file"),
    "no name": (put(header("b"), 0, b"\0"), "by its name not a regular file"),
    "not UTF-8": (put(header(), 0, b"\xff\xfe"), "not UTF-8"),
    "newline": (header("b\n.mp4"), "by its name not a regular file"),
    "NUL": (raw_pax(b"18 path=b\0.mp4xyz\n"), "by its name not a regular file"),
    "same name": (header("a.mp4"), "name of an earlier member"),
    "hard link": (header(kind=tarfile.LNKTYPE, linkname="/etc/passwd"), "a hard link"),
    "symbolic link": (header(kind=tarfile.SYMTYPE, linkname="/etc/passwd"), "a symbolic link"),
    "character device": (header(kind=tarfile.CHRTYPE), "a device"),
    "block device": (header(kind=tarfile.BLKTYPE), "a device"),
    "directory": (header(kind=tarfile.DIRTYPE), "a folder"),
    "pipe": (header(kind=tarfile.FIFOTYPE), "a pipe"),
    "sparse": (header(kind=tarfile.GNUTYPE_SPARSE), "a sparse file"),
    "sparse by pax": (raw_pax(b"22 GNU.sparse.major=1\n"), "other readers understand differently"),
    "no such kind": (header(kind=b"Z"), "is something"),
    "huge octal size": (put(header(), 124, b"77777777777\0"), "8589934591 bytes, but the tar ends"),
    "huge size": (header(size=1 << 70, form=tarfile.GNU_FORMAT), "bytes, but the tar ends"),
    "negative size": (header(size=-512, form=tarfile.GNU_FORMAT), "a size that is no number"),
    "signed size": (put(header(), 124, b"-0000001000\0"), "a size that is no number"),
    "size beyond": (header(size=20_000), "20000 bytes, but the tar ends at byte"),
    "pax size": (pax(size="99999999999999"), "bytes, but the tar ends"),
    "pax size below zero": (pax(size="-512"), "a size in an extended header"),
    "pax size that goes on": (pax(size="9" * 5000), "a size in an extended header"),
    "pax path": (pax(path="../../etc/passwd"), "by its name not a regular file"),
    "long path": (pax(path="b" * 300), "by its name not a regular file"),
    "pax charset": (raw_pax(b"21 hdrcharset=BINARY\n"), "other readers understand differently"),
    "pax that claims more": (raw_pax(b"99 path=b\n"), "cannot be understood"),
    "pax that claims nothing": (raw_pax(b"0 path=b\n"), "cannot be understood"),
    "pax without end": (raw_pax(b"path"), "cannot be understood"),
    "huge pax": (header("x", 1 << 33, b"x", tarfile.GNU_FORMAT) + header(), "which is too long"),
    "long pax": (raw_pax(b"99999 comment=" + b"x" * 99_984 + b"\n"), "which is too long"),
    "huge long name": (header("x", 1 << 60, b"L", tarfile.GNU_FORMAT) + header(), "which is too long"),
    "GNU long name": (raw_pax(b"../../etc/passwd\0", b"L"), "by its name not a regular file"),
    "two extended headers": (raw_pax(b"9 path=b\n")[:1024] + raw_pax(b"9 path=c\n"), "not a regular file"),
    "global header": (raw_pax(b"13 path=b.mp4\n", b"g"), "a global extended header"),
    "wrong checksum": (header()[:150] + b"7" + header()[151:], "no header at byte"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("before", [b"", FIRST], ids=["first", "second"])
def test_hostile_tar_is_refused(case: str, before: bytes) -> None:
    member, reason = HOSTILE[case]
    before = FIRST if case == "same name" else before
    with pytest.raises(tarfile.ReadError, match=reason) as refused:
        scan(io.BytesIO(before + member + bytes(10240)))
    assert re.search(rf"at byte {len(before)}\b", str(refused.value)) and len(str(refused.value)) < 500


def small() -> bytes:
    parts = zip(NAMES, SIZES, strict=True)
    body = b"".join(tar_member(name, size) + bytes([i]) * size + tar_padding(size) for i, (name, size) in enumerate(parts, 1))
    return body + tar_end(len(body))


def test_a_tar_cut_anywhere_is_refused() -> None:
    """At every block, and at every byte of one; what fills the last record behind the end mark can go, and nothing is lost."""
    whole = small()
    end = scan(io.BytesIO(whole))[-1].end + 1024
    for cut in chain(range(0, end, 512), range(512, 1024)):
        with pytest.raises(tarfile.ReadError, match=r"byte \d+"):
            scan(io.BytesIO(whole[:cut]))
    assert [m.name for m in scan(io.BytesIO(whole[:end]))] == list(NAMES)


def test_packed_tar_is_refused() -> None:
    with pytest.raises(tarfile.ReadError, match=r"at byte 0.*it is compressed, and should be a plain tar"):
        scan(io.BytesIO(gzip.compress(small())))


def test_headers_agree_with_tarfile_on_what_others_write() -> None:
    """GNU's long names and pax's times; with folders, links and a name that comes again where that is asked for."""
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w", format=form) as tar:
            for name, kind in (
                ("d", b"5"),
                ("d/a.mp4", b"0"),
                ("l", b"2"),
                ("d/a.mp4", b"0"),
                ("n" * 99, b"0"),
                ("e" * 180, b"0"),
            ):
                info = tarfile.TarInfo(name)
                if len(name) > 100 and form == tarfile.USTAR_FORMAT:
                    continue
                info.size, info.type, info.mtime = (600 if kind == b"0" else 0), kind, 1.5
                tar.addfile(info, io.BytesIO(bytes(600)))
        made.seek(0)
        with tarfile.open(fileobj=made) as tar:
            theirs = [(i.name, i.offset, i.offset_data, i.size) for i in tar if i.isreg()]
        found = [m for m, _ in headers(made, len(made.getvalue()), strict=False)]
        assert [(m.name, m.header, m.offset, m.size) for m in found] == theirs
        with pytest.raises(tarfile.ReadError, match=r"'d/?' at byte 0 is a folder"):
            scan(made)


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """A few bytes of headers changed, moved or cut; the checksum often fits, so that more than it is tried."""
    data = bytearray(whole)
    for _ in range(rng.randint(1, 3)):
        at = 512 * rng.randrange(len(data) // 512)
        field, width = rng.choice([(0, 100), (124, 12), (124, 12), (148, 8), (156, 1), (156, 1), (257, 8), (345, 155), (0, 512)])
        where = at + field + rng.randrange(width)
        kind = rng.randrange(5)
        if kind == 0:
            data[where] = rng.randrange(256)
        elif kind == 1:
            data[where] = rng.choice(b"0123456789xgLKS\0\x80\xff -/=\n")
        elif kind == 2:
            data[at : at + 512] = whole[(other := 512 * rng.randrange(len(whole) // 512)) : other + 512]
        elif kind == 3:
            data[where : where + 8] = rng.randbytes(8)
        else:
            del data[where : where + rng.choice([1, 512])]
        if rng.random() < 0.8 and len(data) >= at + 512 and any(data[at : at + 512]):
            data[at : at + 512] = summed(bytes(data[at : at + 512]))
    return bytes(data)


@pytest.mark.parametrize("trials", [500, pytest.param(20_000, marks=pytest.mark.long)])
def test_mutated_headers(trials: int) -> None:
    """Either refused, or every member lies inside the file, behind the one before, under a name of its own."""
    rng, whole, passed = random.Random(4), small(), 0
    for _ in range(trials):
        tar = mutated(whole, rng)
        for strict in (True, False):
            try:
                found = [m for m, _ in headers(io.BytesIO(tar), len(tar), strict=strict)]
            except tarfile.TarError:
                continue
            passed += strict
            assert all(m.header < m.offset <= m.offset + m.size <= len(tar) for m in found)
            assert all(a.end <= b.header for a, b in pairwise(found))
            assert not strict or len({m.name for m in found}) == len(found)
    assert 0.01 * trials < passed < 0.9 * trials


# --- changed bytes in a data set ---


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "set"
    with DatasetWriter(path, tiny_profile()) as w:
        for i in range(4):
            w.add(make_clip(i, labels=(f"label {i % 2}",), split="train"))
            if i == 2:
                w.cut()
    rows = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    Dataset.open(path).catalog.add_column("emb", rows, {"model": "m"})
    return path


@contextmanager
def flipped(file: Path, at: int, bit: int) -> Iterator[bytes]:
    before = file.read_bytes()
    after = bytearray(before)
    after[at] ^= 1 << bit
    file.write_bytes(after)
    try:
        yield bytes(after)
    finally:
        file.write_bytes(before)


def means_nothing(folder: Path, file: Path, after: bytes) -> bool:
    """Changes by which nothing is lost that a data set promises."""
    name = file.relative_to(folder).as_posix()
    if name == "dataset.json":
        # what its maker noted, and what of a profile cannot be seen in a clip
        try:
            old, new = json.loads(file_before[name]), json.loads(after)
            for meta in (old, new):
                meta["provenance"] = None
                for field in ("name", "quality", "short_side", "b_frames", "gop"):
                    meta["profile"].pop(field)
        except (ValueError, KeyError, TypeError):
            return False
        return old == new
    if name.endswith("zarr.json"):
        try:
            old, new = json.loads(file_before[name]), json.loads(after)
        except ValueError:
            return False
        # more rows than count are left by an append that was never committed, and read by nobody
        if "shape" in old and isinstance(rows := new.get("shape", [None])[0], int) and rows > old["shape"][0]:
            return name.split("/")[1] != "emb" and {**old, "shape": new["shape"]} == new
    return False


file_before: dict[str, bytes] = {}


def flip_and_lint(folder: Path, every: int, seed: int, wanted: Callable[[str], bool] = lambda name: True) -> int:
    rng, count = random.Random(seed), 0
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"):
        name = file.relative_to(folder).as_posix()
        file_before[name] = file.read_bytes()
        if not wanted(name):
            continue
        for at in range(rng.randrange(every), len(file_before[name]), every):
            with flipped(file, at, bit := rng.randrange(8)) as after:
                assert means_nothing(folder, file, after) or lint(folder, samples=0), f"bit {bit} of byte {at} of {name}"
            count += 1
    return count


def test_a_flipped_byte_is_found(sound: Path) -> None:
    assert flip_and_lint(sound, 1500, 1) > 60


@pytest.mark.long
def test_flipped_bytes_are_found(sound: Path) -> None:
    assert flip_and_lint(sound, 29, 2, lambda name: not name.endswith(".tar")) > 800
    assert flip_and_lint(sound, 401, 3, lambda name: name.endswith(".tar")) > 200


@pytest.mark.parametrize("every", [1009, pytest.param(53, marks=pytest.mark.long)])
def test_flipped_bytes_are_found_by_reading(sound: Path, every: int) -> None:
    """Of members' data, and of the columns that say where they lie and what they are."""
    rng, places = random.Random(5), []
    for shard in (sound / s.name for s in Dataset.open(sound).meta.shards):
        data = [m.offset + i for m in scan(shard) for i in range(m.size)]
        places += [(shard, at) for at in data[rng.randrange(every) :: every]]
    for column in ("offset", "size", "sha256"):
        for file in (p for p in (sound / "catalog.zarr" / column / "c").rglob("*") if p.is_file()):
            places += [(file, at) for at in range(0, file.stat().st_size, max(1, every // 25))]
    for file, at in places:
        with flipped(file, at, rng.randrange(8)), pytest.raises((DatasetError, ValueError, RuntimeError)):
            dataset = Dataset.open(sound)
            for row in range(len(dataset)):
                dataset.read(row, check=True)


def test_lost_chunks_are_found(sound: Path, tmp_path: Path) -> None:
    """To zarr a chunk that is not there is one of zeros."""
    for column in ("motion", "emb", "offset", "sha256", "keyframes/values", "key/offsets"):
        folder = Path(shutil.copytree(sound, tmp_path / column.replace("/", "-")))
        chunks = [p for p in (folder / "catalog.zarr" / column / "c").rglob("*") if p.is_file()]
        assert len(chunks) == 1
        chunks[0].unlink()
        assert {f.code for f in lint(folder, samples=0)} == {"catalog"}


# --- nothing is written elsewhere ---


@pytest.mark.parametrize("name", ["../../outside.mp4", "/tmp/cmacc-outside.mp4", "link.mp4"])
def test_nothing_is_written_outside_the_destination(sound: Path, tmp_path: Path, name: str) -> None:
    """A data set whose tar holds what would lead out of it, with everything that describes it made to match."""
    folder = Path(shutil.copytree(sound, tmp_path / "in/side/set"))
    tar = folder / "clips-000000.tar"
    kind = tarfile.SYMTYPE if name == "link.mp4" else b"0"
    bad = header(name, 700 if kind == b"0" else 0, kind, linkname="/etc/passwd" if kind != b"0" else "")
    first = scan(tar)[0]
    raw = tar.read_bytes()
    data = (raw[: first.header] + bad + raw[first.offset :])[: len(raw)]
    tar.write_bytes(data)
    meta = json.loads((folder / "dataset.json").read_text())
    meta["shards"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "dataset.json").write_text(json.dumps(meta, sort_keys=True, indent=1) + "\n")
    assert any(f.code == "tar" and tar.name in f.sentence and "at byte 0 " in f.sentence for f in lint(folder))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    out = tmp_path / "in/side/out"
    try:
        reshard([folder], out)
    except DatasetError as e:
        assert "clips-000000.tar" in str(e) or "yt_" in str(e)
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and out not in p.parents}
    assert after == before and not Path("/tmp/cmacc-outside.mp4").exists()
    assert not any(p.is_symlink() for p in tmp_path.rglob("*"))
    for made in out.glob("*.tar"):
        assert all(m.name.startswith("yt_") for m in scan(made))
