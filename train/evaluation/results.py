"""What an evaluation found, as JSON: a score with all that it depends on, and the files it was not computed over."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

import cmacc

FOLDER = "evaluation"
"""In a run's folder."""


_PACKAGES = ("av", "numpy", "nvidia-dali-cuda130", "scikit-learn", "torch")


def versions() -> dict[str, str]:
    """Of what a score may depend on."""
    there = {dist.metadata["Name"]: dist.version for name in _PACKAGES for dist in distributions(name=name)}
    return {"cmacc": cmacc.__version__, "python": platform.python_version(), **there}


@dataclass(frozen=True)
class Result:
    """One score of one encoder.

    task: as `esc50`. protocol: svm, logistic, knn, finetune, retrieval, within video, within audio. encoder: trained, random, or
    what it is compared with. score, chance: shares 0..1. splits: score of each split. over: files (or clips) that were tested.
    left_out: file to reason. settings: C of each split, views, crops, k, step, ... facts: other numbers of the same protocol.
    classes, confusion: names, and how many files of each (row) were told to be of each (column), over all splits.
    """

    task: str
    protocol: str
    encoder: str
    score: float
    chance: float
    over: int
    splits: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=versions)


def summed_up(
    template: Result, labels: NDArray[np.str_], told: Sequence[tuple[str, NDArray[np.int64], NDArray[np.str_]]]
) -> Result:
    """`template` with its score from what was told: (split, rows tested, their predicted labels). The score is the mean over
    splits, as ESC-50, UCF101 and HMDB51 have it; chance is always telling the largest class."""
    classes = sorted(set(labels.tolist()) | {name for *_, names in told for name in names.tolist()})
    place = {name: i for i, name in enumerate(classes)}
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for _, rows, names in told:
        for row, name in zip(rows.tolist(), names.tolist(), strict=True):
            confusion[place[str(labels[row])], place[name]] += 1
    splits = {split: float(np.mean(labels[rows] == names)) for split, rows, names in told}
    tested = np.concatenate([rows for _, rows, _ in told])
    largest = np.unique(labels[tested], return_counts=True)[1].max()
    return replace(
        template,
        score=float(np.mean(list(splits.values()))),
        chance=float(largest / len(tested)),
        over=len(np.unique(tested)),
        splits=splits,
        classes=classes,
        confusion=confusion.tolist(),
    )


def write(folder: str | os.PathLike[str], results: Sequence[Result]) -> list[Path]:
    """Write TASK.json for each task among `results`, aside and renamed. Returns the paths.

    What the file has of the same weights on the same data by other protocols stays; the rest is replaced. folder: a run's (there
    they go into `evaluation/`), or one for results alone. Raises ValueError as `read_task` does.
    """
    place = results_folder(folder)
    place.mkdir(parents=True, exist_ok=True)
    paths = []
    for task in dict.fromkeys(result.task for result in results):
        path = place / f"{task}.json"
        new = [result for result in results if result.task == task]
        anew, of = {(r.protocol, r.encoder) for r in new}, {_of(r) for r in new}
        new = [r for r in read_task(folder, task) if (r.protocol, r.encoder) not in anew and _of(r) in of] + new
        aside = path.with_name(f".{path.name}.part")
        with aside.open("w") as file:
            json.dump([asdict(result) for result in new], file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
        paths.append(path)
    return paths


def _of(result: Result) -> tuple[Any, Any]:
    return result.settings.get("weights"), result.settings.get("data")


def read_task(folder: str | os.PathLike[str], task: str) -> list[Result]:
    """What is there of one task, perhaps nothing. Raises ValueError for a file that holds something else."""
    path = results_folder(folder) / f"{task}.json"
    return _read(path) if path.exists() else []


def read_results(folder: str | os.PathLike[str]) -> list[Result]:
    """All results of a run's folder, or of a folder of results, task by task; none when there are none. Raises ValueError for a
    file that is no such thing."""
    return [result for path in sorted(results_folder(folder).glob("*.json")) for result in _read(path)]


def _read(path: Path) -> list[Result]:
    try:
        return TypeAdapter(list[Result]).validate_json(path.read_bytes())
    except ValidationError as error:
        said = "; ".join(sorted({str(each["msg"]) for each in error.errors()})[:2])
        raise ValueError(f"{path} does not hold results ({said}); move it away, and run the evaluation again") from error


def results_folder(folder: str | os.PathLike[str]) -> Path:
    """`evaluation/` of a run's folder; any other folder is one for results itself."""
    return Path(folder, FOLDER) if Path(folder, "config.json").exists() else Path(folder)
