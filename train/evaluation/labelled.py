"""Labelled data sets in the layouts in which they are published: files, labels, and who is tested on what.

What is named but not there, or there but not named, is left out with the reason; nothing is decoded here.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from cmacc.train.evaluation.splits import Gathered, Labelled, dealt, first_of, split

SOUNDS = frozenset([".wav", ".ogg", ".oga", ".opus", ".flac", ".mp3", ".m4a", ".aac"])
VIDEOS = frozenset([".avi", ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".flv", ".3gp"])


def read_labelled(spec: str) -> Labelled:
    """Read `esc50:DIR`, `ucf101:DIR`, `hmdb51:DIR`, `folder:DIR` or `sounds:DIR` (as `folder`, of videos the sound).

    Raises ValueError with a sentence that names the fix.
    """
    layout, _, folder = spec.partition(":")
    if layout not in LAYOUTS or not folder:
        raise ValueError(f"{spec!r} names no labelled data set; write {', '.join(f'{name}:DIR' for name in LAYOUTS)}")
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{folder} is no folder; give the one that holds the data set in {layout}'s layout")
    found = LAYOUTS[layout](root)
    for name, train, test in found.splits:
        if not len(train) or not len(test):
            what = "test on" if len(train) else "learn from"
            raise ValueError(f"{name} of {folder} has no file to {what}; {first_of(found.left_out)}")
    if len(found.classes) < 2:
        raise ValueError(f"{folder} has files of {len(found.classes)} class; a probe needs 2 or more")
    return found


# --- the layouts ---


def _esc50(root: Path) -> Labelled:
    """`audio/NAME` and one CSV in `meta/` with the columns filename, fold, and category or target."""
    tables = sorted((root / "meta").glob("*.csv"))
    if len(tables) != 1:
        raise ValueError(f"{root} has {len(tables)} CSV files in meta/; in ESC-50's layout there is one, and audio/ beside it")
    try:
        with tables[0].open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{tables[0]} is not a CSV file in UTF-8 ({error}); save it as one") from error
    if {"filename", "fold"} - set(rows[0] if rows else {}) or not ({"category", "target"} & set(rows[0])):
        raise ValueError(f"{tables[0]} lacks the columns filename, fold and category; take ESC-50's meta/esc50.csv as the model")
    bag = Gathered(root)
    official: dict[Path, int] = {}
    for number, row in enumerate(rows, start=2):
        name, fold, label = row["filename"], row["fold"] or "", row.get("category") or row.get("target")
        if not name or not label or not fold.isdecimal():
            bag.left_out[f"{tables[0].name}, line {number}"] = "it lacks a file name, a fold's number or a label"
        elif Path(name).name != name:
            bag.left_out[name] = "a file outside the folder audio/"
        elif (path := bag.add(root / "audio" / name, label)) is not None:
            official[path] = int(fold)
    bag.rest(_media(root / "audio", SOUNDS), f"not in {tables[0].name}")
    files, labels = bag.sorted()
    folds = np.array([official[path] for path in files], dtype=np.int64)
    names = np.unique(folds).tolist()
    if len(names) < 3:
        raise ValueError(f"the sounds of {root} are in {len(names)} folds; it takes 3 or more: two to choose C, one to test")
    splits = [split(f"fold {n}", folds != n, folds == n) for n in names]
    return bag.labelled("esc50", "audio", files, labels, splits, folds)


def _ucf101(root: Path) -> Labelled:
    """Class folders, and `trainlistNN.txt` and `testlistNN.txt` in the folder or in `ucfTrainTestlist/`."""
    lists = _lists(root, "*list0[123].txt", ("", "ucfTrainTestlist"), "UCF101: trainlist01.txt and testlist01.txt to 03")
    videos = next((root / name for name in ("UCF-101", "UCF101", "videos") if (root / name).is_dir()), root)
    bag = Gathered(root)
    sides: dict[str, tuple[set[Path], set[Path]]] = {}
    for number in "123":
        pair = lists / f"trainlist0{number}.txt", lists / f"testlist0{number}.txt"
        if missing := [path.name for path in pair if not path.is_file()]:
            bag.notes.append(f"split {number} is not tested: {lists} has no {' and no '.join(missing)}")
            continue
        sides[f"split {number}"] = tuple(  # type: ignore[assignment]
            {path for line in _lines(each) if (path := _ucf101_entry(bag, videos, line.split()[0])) is not None} for each in pair
        )
    bag.rest(_media(videos, VIDEOS, deep=True), "in no split")
    _odd_classes(bag, videos, set(bag.labels.values()))
    return _by_lists(bag, "ucf101", sides, lambda path: re.sub(r"_c\d+$", "", path.stem))


def _ucf101_entry(bag: Gathered, videos: Path, entry: str) -> Path | None:
    label, _, name = entry.replace("\\", "/").partition("/")
    if not name or "/" in name or label in ("", ".", ".."):
        bag.left_out[entry] = "not CLASS/FILE"
        return None
    return bag.add(videos / label / name, label)


def _hmdb51(root: Path) -> Labelled:
    """Class folders, and CLASS_test_splitN.txt (0: unused, 1: train, 2: test) in the folder, inside it or beside it."""
    where = ("", *_names(root), *(f"../{name}" for name in _names(root.parent)))
    lists = _lists(root, "*_test_split[123].txt", where, "HMDB51: CLASS_test_split1.txt to 3, of each class")
    bag = Gathered(root)
    sides: dict[str, tuple[set[Path], set[Path]]] = {}
    listed = {path.name.rpartition("_test_split")[0] for path in lists.glob("*_test_split[123].txt")}
    for number in "123":
        train: set[Path] = set()
        test: set[Path] = set()
        there = {path.name.rpartition("_test_split")[0] for path in lists.glob(f"*_test_split{number}.txt")}
        if missing := sorted(listed - there):
            bag.notes.append(f"split {number} is tested without {', '.join(missing)}: {lists} has no list of theirs")
        for label in sorted(there):
            for line in _lines(lists / f"{label}_test_split{number}.txt"):
                name, _, side = line.rpartition(" ")
                if Path(name.strip()).name != name.strip() or side not in "012":
                    bag.left_out[f"{label}: {line}"] = "not FILE and 0, 1 or 2"
                elif side in "12" and (path := bag.add(root / label / name.strip(), label)) is not None:
                    (train if side == "1" else test).add(path)
        if train and test:
            sides[f"split {number}"] = train, test
    bag.rest((path for label in sorted(listed) for path in _media(root / label, VIDEOS)), "in no split")
    _odd_classes(bag, root, listed)
    return _by_lists(bag, "hmdb51", sides, lambda path: path.stem.partition(f"_{path.parent.name}_")[0])


def _folder(root: Path, layout: str = "folder") -> Labelled:
    """`train/CLASS/FILE` and `test/CLASS/FILE`; or CLASS/FILE, dealt into folds by the names alone. As `sounds`, of videos too
    only the sound is taken."""
    halves = [root / "train", root / "test"]
    divided = all(half.is_dir() for half in halves)
    if not divided and any(half.is_dir() for half in halves):
        raise ValueError(f"{root} has only one of train/ and test/; give both, or class folders alone")
    found = [path for half in (halves if divided else [root]) for path in _media(half, SOUNDS | VIDEOS, deep=True)]
    counts = Counter("audio" if layout == "sounds" or path.suffix.lower() in SOUNDS else "video" for path in found)
    if not counts:
        raise ValueError(f"{root} has no class folders with sounds or videos in them; lay it out as CLASS/FILE")
    if len(counts) > 1:
        said = f"{counts['audio']} sounds and {counts['video']} videos"
        raise ValueError(f"{root} has {said} in its class folders; give them as two folders, each of one kind")
    bag = Gathered(root)
    for path in found:
        bag.add(path, path.parent.name)
    (kind,) = counts
    files, labels = bag.sorted()
    folds = dealt(labels.tolist(), [path.relative_to(root).as_posix() for path in files])
    if divided:
        test = np.array([path.is_relative_to(halves[1]) for path in files])
        unseen = sorted(set(labels[test].tolist()) - set(labels[~test].tolist()))
        if unseen:
            bag.notes.append(f"test/ has classes that train/ has not: {', '.join(unseen)}; their files count as wrong")
        splits = [split("test", ~test, test)]
    else:
        splits = [split(f"fold {n + 1}", folds != n, folds == n) for n in sorted(set(folds.tolist()))]
    return bag.labelled(layout, kind, files, labels, splits, folds)  # type: ignore[arg-type]


LAYOUTS: dict[str, Callable[[Path], Labelled]] = {
    "esc50": _esc50, "ucf101": _ucf101, "hmdb51": _hmdb51, "folder": _folder, "sounds": partial(_folder, layout="sounds"),
}  # fmt: skip


# --- what they share ---


def _by_lists(
    bag: Gathered, layout: str, sides: Mapping[str, tuple[set[Path], set[Path]]], source: Callable[[Path], str]
) -> Labelled:
    """source: the video that a file was cut from, of several classes perhaps; no two folds share one."""
    if not sides:
        raise ValueError(f"{bag.root} has no whole split to test on; {'; '.join(bag.notes) or first_of(bag.left_out)}")
    files, labels = bag.sorted()
    splits = []
    for name, (train, test) in sides.items():
        if both := sorted(path.name for path in train & test):
            bag.notes.append(f"{name} has {len(both)} files on both sides, as {both[0]}: they are tested, not learned from")
        splits.append(split(name, *(np.array([path in side for path in files]) for side in (train - test, test))))
    folds = dealt(labels.tolist(), [source(path) for path in files])
    return bag.labelled(layout, "video", files, labels, splits, folds)


def _media(folder: Path, endings: frozenset[str], *, deep: bool = False) -> list[Path]:
    """Files with such an ending in a folder, or in the folders in it."""
    return sorted(p for p in folder.glob("*/*" if deep else "*") if p.suffix.lower() in endings and p.is_file())


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8; take the split file as it was published") from error


def _lists(root: Path, pattern: str, where: Iterable[str], what: str) -> Path:
    """The first folder that has some of the split files."""
    for name in where:
        if any((root / name).glob(pattern)):
            return root / name
    raise ValueError(f"{root} has no split files of {what}; they are published beside the videos: put them into it")


def _odd_classes(bag: Gathered, videos: Path, known: set[str]) -> None:
    odd = [name for name in _names(videos) if name not in known and _media(videos / name, VIDEOS)]
    if odd:
        bag.notes.append(f"folders that no split names are left out: {', '.join(odd)}")
        for name in odd:
            bag.rest(_media(videos / name, VIDEOS), "in a class that no split names")
