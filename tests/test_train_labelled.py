"""Published layouts: who is trained and tested on what, and a name and a reason for all that does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cmacc.train.evaluation.labelled import Labelled, read_labelled
from cmacc.train.evaluation.splits import dealt, task_name


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def names(found: Labelled, rows: np.ndarray) -> set[str]:
    return {found.files[row].name for row in rows.tolist()}


@pytest.fixture
def esc(tmp_path: Path) -> Path:
    lines = ["filename,fold,target,category,esc10"]
    for i in range(6):
        touch(tmp_path / "audio" / f"{i}.wav")
        lines.append(f"{i}.wav,{i // 2 + 1},{i % 2},{('dog', 'rain')[i % 2]},True")
    touch(tmp_path / "meta" / "esc50.csv")
    (tmp_path / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def write_lines(path: Path, *lines: str) -> None:
    with path.open("a") as file:
        file.write("\n".join(lines) + "\n")


def test_esc50(esc: Path) -> None:
    found = read_labelled(f"esc50:{esc}")
    assert found.kind == "audio" and [path.name for path in found.files] == [f"{i}.wav" for i in range(6)]
    assert found.labels.tolist() == ["dog", "rain"] * 3 and found.codes().tolist() == [0, 1] * 3
    assert [split.name for split in found.splits] == ["fold 1", "fold 2", "fold 3"]
    for fold, (_, train, test) in enumerate(found.splits, start=1):
        assert found.folds[test].tolist() == [fold] * 2
        assert sorted([*train.tolist(), *test.tolist()]) == list(range(6))
    assert not found.left_out and not found.notes


def test_what_does_not_fit_esc50_is_named(esc: Path) -> None:
    """One way each: a file that is not there, one elsewhere, rows that lack something, a file that no row names."""
    touch(esc / "audio" / "stray.ogg", esc / "secret.wav")
    (esc / "audio" / "5.wav").unlink()
    write_lines(esc / "meta" / "esc50.csv", "../secret.wav,1,0,dog,True", "1.wav", ",,,,", "2.wav,one,0,dog,True", "")
    found = read_labelled(f"esc50:{esc}")
    assert [path.name for path in found.files] == [f"{i}.wav" for i in range(5)]
    assert found.left_out == {
        "audio/5.wav": "not there",
        "../secret.wav": "a file outside the folder audio/",
        "esc50.csv, line 9": "it lacks a file name, a fold's number or a label",
        "esc50.csv, line 10": "it lacks a file name, a fold's number or a label",
        "esc50.csv, line 11": "it lacks a file name, a fold's number or a label",
        "audio/stray.ogg": "not in esc50.csv",
    }


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no table": (lambda f: (f / "meta" / "esc50.csv").unlink(), "has 0 CSV files in meta/; in ESC-50's layout"),
    "two tables": (lambda f: touch(f / "meta" / "b.csv"), "has 2 CSV files in meta/; in ESC-50's layout"),
    "empty table": (lambda f: (f / "meta" / "esc50.csv").write_text(""), "lacks the columns filename, fold and category; take"),
    "no label": (lambda f: (f / "meta" / "esc50.csv").write_text("filename,fold\n1.wav,2\n"), "lacks the columns"),
    "not text": (lambda f: (f / "meta" / "esc50.csv").write_bytes(b"filename,fold,category\n\xff,1,a\n"), "is not a CSV file"),
    "no sounds": (lambda f: [p.unlink() for p in (f / "audio").iterdir()], "no file of .* can be used; 6 are left out"),
    "two folds": (
        lambda f: (f / "meta" / "esc50.csv").write_text("filename,fold,category\n1.wav,1,a\n2.wav,2,b\n"),
        "in 2 folds; it takes 3"),
    "one class": (
        lambda f: (f / "meta" / "esc50.csv").write_text("filename,fold,category\n1.wav,1,a\n2.wav,2,a\n3.wav,3,a\n"),
        "has files of 1 class; a probe needs 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_when_nothing_is_left_one_sentence_says_so(esc: Path, case: str) -> None:
    act, sentence = REFUSED[case]
    act(esc)
    with pytest.raises(ValueError, match=sentence) as raised:
        read_labelled(f"esc50:{esc}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [("esc51:x", "names no labelled data set"), ("esc50:", "names no"), ("esc50:nowhere", "nowhere is no folder"),
     ("ucf101:EMPTY", "has no split files of UCF101: trainlist01"), ("hmdb51:EMPTY", "has no split files of HMDB51: CLASS_test"),
     ("folder:EMPTY", "has no class folders with sounds or videos")],
)  # fmt: skip
def test_other_refusals(tmp_path: Path, spec: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_labelled(spec.replace("EMPTY", str(tmp_path)))


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    """Two classes of two groups of two clips; split 1 tests group 1, split 2 group 2."""
    root = tmp_path / "UCF-101"
    entries = [f"{c}/v_{c}_g0{g}_c0{n}.avi" for c in ("Bowl", "Dive") for g in (1, 2) for n in (1, 2)]
    touch(*(root / entry for entry in entries))
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    for split in (1, 2):
        test = [entry for entry in entries if f"_g0{split}_" in entry]
        write_lines(lists / f"testlist0{split}.txt", *test)
        write_lines(lists / f"trainlist0{split}.txt", *(f"{e} {1 + (e[0] == 'D')}" for e in entries if e not in test))
    return root


def test_ucf101(ucf: Path) -> None:
    found = read_labelled(f"ucf101:{ucf}")
    assert (found.name, found.kind, len(found.files), found.classes) == ("ucf101", "video", 8, ["Bowl", "Dive"])
    for number, (name, train, test) in enumerate(found.splits, start=1):
        assert name == f"split {number}"
        assert names(found, test) == {f"v_{c}_g0{number}_c0{n}.avi" for c in ("Bowl", "Dive") for n in (1, 2)}
        assert names(found, train) == {p.name for p in found.files} - names(found, test)
    assert found.notes == [f"split 3 is not tested: {ucf / 'ucfTrainTestlist'} has no trainlist03.txt and no testlist03.txt"]
    groups = {path.stem[:-4]: set() for path in found.files}
    for path, fold in zip(found.files, found.folds.tolist(), strict=True):
        groups[path.stem[:-4]].add(fold)
    assert all(len(folds) == 1 for folds in groups.values()), "clips of one video are in one fold"


def test_what_does_not_fit_ucf101_is_named(ucf: Path) -> None:
    lists = ucf / "ucfTrainTestlist"
    write_lines(lists / "trainlist01.txt", "Bowl/gone.avi 1", "../../etc/passwd 1", "Bowl/../../x.avi 1", "lonely.avi 1")
    write_lines(lists / "trainlist01.txt", "Bowl/v_Bowl_g01_c01.avi 1")  # it is tested, too
    touch(ucf / "Dive" / "stray.avi", ucf / "Ski" / "v_Ski_g01_c01.avi")
    found = read_labelled(f"ucf101:{ucf}")
    assert len(found.files) == 8
    assert found.left_out == {
        "Bowl/gone.avi": "not there", "../../etc/passwd": "not CLASS/FILE", "Bowl/../../x.avi": "not CLASS/FILE",
        "lonely.avi": "not CLASS/FILE", "Dive/stray.avi": "in no split",
        "Ski/v_Ski_g01_c01.avi": "in a class that no split names",
    }  # fmt: skip
    said = " ".join(found.notes)
    assert "folders that no split names are left out: Ski" in said and "split 1 has 1 files on both sides" in said
    assert not set(found.splits[0].train.tolist()) & set(found.splits[0].test.tolist())
    (lists / "testlist02.txt").unlink(), (lists / "testlist01.txt").unlink()
    with pytest.raises(ValueError, match=r"has no whole split to test on; split 1 is not tested: .* has no testlist01.txt"):
        read_labelled(f"ucf101:{ucf}")


def test_hmdb51(tmp_path: Path) -> None:
    """Lists in a folder beside; 0 is unused; groups are source videos."""
    root, lists = tmp_path / "hmdb51", tmp_path / "testTrainMulti_7030_splits"
    lists.mkdir()
    for name in ("catch", "ride_bike"):
        files = [f"Film {film}_{name}_f_cm_np1_ba_med_{n}.avi" for film in "AB" for n in (0, 1)] + [f"x_{name}_u_0.avi"]
        touch(*(root / name / file for file in files))
        for split in (1, 2, 3):
            sides = (1, 1, 2, 2, 0) if split < 3 else (2, 2, 1, 1, 0)
            write_lines(lists / f"{name}_test_split{split}.txt", *(f"{f} {s} " for f, s in zip(files, sides, strict=True)))
    write_lines(lists / "catch_test_split1.txt", "gone.avi 1", "../ride_bike/x.avi 2", "bad.avi 7")
    (lists / "ride_bike_test_split2.txt").unlink()
    touch(root / "wave" / "a.avi")
    found = read_labelled(f"hmdb51:{root}")
    assert (found.name, len(found.files), found.classes) == ("hmdb51", 8, ["catch", "ride_bike"])
    first, second, third = found.splits
    assert {name[:6] for name in names(found, first.train)} == {"Film A"} == {name[:6] for name in names(found, third.test)}
    assert {found.labels[row] for row in second.test.tolist()} == {"catch"}
    assert "split 2 is tested without ride_bike" in found.notes[0] and "are left out: wave" in found.notes[1]
    assert found.left_out == {
        "catch/gone.avi": "not there", "catch: ../ride_bike/x.avi 2": "not FILE and 0, 1 or 2",
        "catch: bad.avi 7": "not FILE and 0, 1 or 2", "catch/x_catch_u_0.avi": "in no split",
        "ride_bike/x_ride_bike_u_0.avi": "in no split", "wave/a.avi": "in a class that no split names",
    }  # fmt: skip
    of = {path.name: fold for path, fold in zip(found.files, found.folds.tolist(), strict=True)}
    assert len({fold for name, fold in of.items() if name.startswith("Film A")}) == 1, "of both classes"


def test_folders(tmp_path: Path) -> None:
    touch(*(tmp_path / name / f"{i}.mp4" for name in ("cat", "dog") for i in range(10)), tmp_path / "cat" / "note.txt")
    found = read_labelled(f"folder:{tmp_path}")
    assert found.kind == "video" and len(found.files) == 20
    assert [len(test) for *_, test in found.splits] == [4] * 5
    assert all(found.labels[test].tolist() == ["cat", "cat", "dog", "dog"] for *_, test in found.splits)
    assert read_labelled(f"sounds:{tmp_path}").kind == "audio"
    touch(tmp_path / "dog" / "bark.wav")
    with pytest.raises(ValueError, match="has 1 sounds and 20 videos in its class folders; give them as two folders"):
        read_labelled(f"folder:{tmp_path}")


def test_folders_of_two_halves(tmp_path: Path) -> None:
    touch(*(tmp_path / "train" / name / f"{i}.wav" for name in ("cat", "dog") for i in range(4)))
    with pytest.raises(ValueError, match="has only one of train/ and test/; give both"):
        read_labelled(f"folder:{tmp_path}")
    touch(tmp_path / "test" / "cat" / "9.wav", tmp_path / "test" / "cow" / "9.wav")
    found = read_labelled(f"folder:{tmp_path}")
    ((_, train, test),) = found.splits
    assert {found.file_name(row) for row in test} == {"test/cat/9.wav", "test/cow/9.wav"} and len(train) == 8
    assert found.notes == ["test/ has classes that train/ has not: cow; their files count as wrong"]


def test_dealing_depends_on_names_alone() -> None:
    """Evenly within each class, and a file's fold does not depend on the order of files."""
    labels, groups = ["a"] * 11 + ["b"] * 7, [f"f{i}" for i in range(18)]
    folds = dealt(labels, groups)
    assert sorted(np.bincount(folds[:11])) == [2, 2, 2, 2, 3] and sorted(np.bincount(folds[11:])) == [1, 1, 1, 2, 2]
    order = np.random.default_rng(0).permutation(18)
    assert dealt([labels[i] for i in order], [groups[i] for i in order]).tolist() == folds[order].tolist()
    assert folds[:11].tolist() != sorted(folds[:11].tolist())


def test_a_video_of_several_classes_is_in_one_fold() -> None:
    """HMDB51 cuts fights, kisses and rides out of the same films."""
    labels = [label for label in ("fight", "kiss", "ride") for _ in range(10)]
    groups = [f"film {(i * 7) % 12}" for i in range(30)]
    of: dict[str, set[int]] = {}
    folds = dealt(labels, groups)
    for group, fold in zip(groups, folds.tolist(), strict=True):
        of.setdefault(group, set()).add(fold)
    assert all(len(each) == 1 for each in of.values())
    assert all(len(set(folds[first : first + 10].tolist())) == 5 for first in (0, 10, 20))


def test_names_of_tasks() -> None:
    assert [task_name("esc50", f"/data/{name}") for name in ("ESC-50", "esc10")] == ["esc50", "esc50-esc10"]
    assert task_name("retrieval", "s3://bucket/My set") == "retrieval-myset"
