"""What a labelled data set comes to, whatever its layout: files, labels, folds, and who is tested on what."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Kind = Literal["audio", "video"]
FOLDS = 5
"""Into how many parts files are dealt where a data set brings no folds of its own."""


class Split(NamedTuple):
    """Rows to learn from and rows to be tested on, int64, ascending."""

    name: str
    train: NDArray[np.int64]
    test: NDArray[np.int64]


@dataclass(frozen=True)
class Labelled:
    """name: of the task, as `esc50`. root: the folder. kind: what its files are looked at as. files: paths (n,), in an order of
    their own. labels: names (n,). splits: what is trained and tested on. folds: ints (n,): settings are chosen by leaving one of
    them out of the training rows. left_out: file to reason, for what is not in `files`. notes: sentences on what is unusual.
    """

    name: str
    root: Path
    kind: Kind
    files: list[Path]
    labels: NDArray[np.str_]
    splits: list[Split]
    folds: NDArray[np.int64]
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        return sorted(set(self.labels.tolist()))

    def codes(self) -> NDArray[np.int64]:
        """Place of each label in `classes`, (n,)."""
        return np.searchsorted(np.array(self.classes), self.labels)

    def file_name(self, row: int) -> str:
        """Relative to the folder, as it is named in reports."""
        return self.files[row].relative_to(self.root).as_posix()


def task_name(layout: str, folder: str) -> str:
    """`esc50` for a folder called ESC-50, `esc50-esc10` for one called esc10: file names of different data sets differ."""
    own = re.sub(r"[^a-z0-9]+", "", Path(folder).resolve().name.lower())
    return layout if own == layout else f"{layout}-{own or 'root'}"


class Gathered:
    """Files that were asked for and are there, and what else was met."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.labels: dict[Path, str] = {}
        self.left_out: dict[str, str] = {}
        self.notes: list[str] = []

    def add(self, path: Path, label: str) -> Path | None:
        """The path, if it is a file; a link may lead out of the folder, a name may not."""
        if path not in self.labels:
            if not path.is_file():
                self.left_out[path.relative_to(self.root).as_posix()] = "not there"
                return None
            self.labels[path] = label
        return path

    def rest(self, there: Iterable[Path], why: str) -> None:
        for path in there:
            if path not in self.labels:
                self.left_out[path.relative_to(self.root).as_posix()] = why

    def sorted(self) -> tuple[list[Path], NDArray[np.str_]]:
        if not self.labels:
            raise ValueError(f"no file of {self.root} can be used; {first_of(self.left_out)}")
        files = sorted(self.labels)
        return files, np.array([self.labels[path] for path in files])

    def labelled(
        self, layout: str, kind: Kind, files: list[Path], labels: NDArray[np.str_], splits: list[Split], folds: NDArray[np.int64]
    ) -> Labelled:
        name = task_name(layout, str(self.root))
        return Labelled(name, self.root, kind, files, labels, splits, folds, self.left_out, self.notes)


def dealt(labels: list[str], groups: list[str], folds: int = FOLDS) -> NDArray[np.int64]:
    """A fold for each file, 0 to `folds` - 1, by the names alone: files of a group together, also those of several classes, and
    the groups of each class as evenly as that leaves room for."""
    members: dict[str, set[str]] = {}
    for label, group in zip(labels, groups, strict=True):
        members.setdefault(label, set()).add(group)
    place: dict[str, int] = {}
    for i, label in enumerate(sorted(members)):  # each class begins with another fold, so that small ones do not fill the first
        filled = Counter(place[group] for group in members[label] if group in place)
        for group in sorted(members[label] - place.keys(), key=lambda group: hashlib.blake2b(group.encode()).digest()):
            place[group] = min(range(folds), key=lambda fold: (filled[fold], (fold - i) % folds))
            filled[place[group]] += 1
    return np.array([place[group] for group in groups], dtype=np.int64)


def split(name: str, train: NDArray[np.bool_], test: NDArray[np.bool_]) -> Split:
    return Split(name, np.flatnonzero(train), np.flatnonzero(test))


def first_of(left_out: Mapping[str, str]) -> str:
    if not left_out:
        return "look whether the folder is the right one"
    name, why = next(iter(left_out.items()))
    return f"{len(left_out)} are left out, the first, {name}, because it is {why}"
