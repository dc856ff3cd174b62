"""Linear probe on a folder of labelled sounds in ESC-50's layout: `audio/` and `meta/NAME.csv`."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from cmacc.train.graph import Graph
from cmacc.train.loader import LoaderConfig
from cmacc.train.trained import Trained
from cmacc.train.views import View

COSTS = (1e-4, 1e-3, 1e-2, 1e-1)
"""Candidates for the SVM's C, chosen on the training folds alone."""
_FPS = 100.0


@dataclass(frozen=True)
class LabelledSounds:
    """files: paths (n,). labels: names (n,). folds: ints (n,)."""

    files: list[Path]
    labels: NDArray[np.str_]
    folds: NDArray[np.int64]


def read_labelled_sounds(folder: Path) -> LabelledSounds:
    """Raises ValueError with a sentence when the layout is not ESC-50's (columns filename, fold, category or target)."""
    tables = sorted((folder / "meta").glob("*.csv"))
    if len(tables) != 1:
        raise ValueError(
            f"{folder} has {len(tables)} CSV files in meta/; a folder in ESC-50's layout has one, and audio/ beside it"
        )
    try:
        with tables[0].open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{tables[0]} is not a CSV file in UTF-8 ({error}); save it as one") from error
    missing = {"filename", "fold"} - set(rows[0] if rows else {})
    if missing or not ({"category", "target"} & set(rows[0])):
        raise ValueError(f"{tables[0]} lacks the columns filename, fold and category; take ESC-50's meta/esc50.csv as the model")
    files, labels, folds = [], [], []
    for number, row in enumerate(rows, start=1):
        name, fold, label = row["filename"], row["fold"] or "", row.get("category") or row.get("target")
        if not name or not label or not fold.isdecimal():
            raise ValueError(f"{tables[0]} lacks a file name, a fold's number or a label in row {number}; fill it in")
        path = folder / "audio" / name
        if Path(name).name != name or not path.is_file():
            raise ValueError(f"{tables[0]} names {name!r}, which is not in {folder / 'audio'}; copy it there")
        files.append(path)
        labels.append(label)
        folds.append(int(fold))
    return LabelledSounds(files, np.array(labels), np.array(folds))


@torch.no_grad()
def sound_features(trained: Trained, files: list[Path], loader: LoaderConfig, views: int = 4) -> NDArray[np.float32]:
    """Mean over `views` evenly spaced views of the audio encoder's features, float32 (n, feature_width).

    Raises ValueError for a file that does not decode.
    """
    device = torch.device("cuda" if loader.dali_device == "gpu" else "cpu")
    audio = trained.audio.to(device)
    graph = Graph(trained.view, _FPS, loader.batch, loader.dali_device, loader.workers, pictures=False)
    span = trained.view.span_s(_FPS)
    features = []
    for begin in range(0, len(files), loader.batch):
        chunk = [path.read_bytes() for path in files[begin : begin + loader.batch]]
        last = [max(0.0, _seconds(data, path) - span) for data, path in zip(chunk, files[begin:], strict=False)]
        sounds = [np.frombuffer(data, np.uint8) for data in chunk]
        try:
            each = [audio.features(graph.sounds(sounds, [s * at for s in last]).to(device)) for at in np.linspace(0, 1, views)]
        except RuntimeError as error:
            found = graph.culprit([], sounds, [View(0, (0.0, 0.0, 1.0, 1.0))] * len(sounds))
            if found is None:
                raise
            raise ValueError(_undecodable(files[begin + found[0]], found[1])) from error
        features.append(torch.stack(each).mean(0).float().cpu().numpy())
    return np.concatenate(features)


def _seconds(data: bytes, path: Path) -> float:
    try:
        with av.open(io.BytesIO(data), "r") as container:
            samples = rate = 0
            for frame in container.decode(audio=0):
                samples, rate = samples + frame.samples, frame.sample_rate
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(_undecodable(path, error)) from error
    return samples / max(rate, 1)


def _undecodable(path: Path, reason: object) -> str:
    return f"{path} does not decode ({reason}); take it out of the folder's CSV"


def linear_probe(features: NDArray[np.float32], labels: NDArray[np.str_], folds: NDArray[np.int64]) -> dict[str, float]:
    """Linear SVM on standardised features, leave one fold out: accuracy of each fold, their mean, and chance, shares 0..1.

    C is chosen by an inner leave-one-fold-out over the training folds, never on the test fold. Raises ValueError when
    there are fewer than three folds.
    """
    if len(np.unique(folds)) < 3:
        raise ValueError(
            f"the sounds are in {len(np.unique(folds))} folds; a probe needs 3 or more: two to choose C, one to test"
        )
    facts: dict[str, float] = {}
    for fold in np.unique(folds):
        test = folds == fold
        inner = LeaveOneGroupOut().split(features[~test], labels[~test], folds[~test])
        search = GridSearchCV(
            make_pipeline(StandardScaler(), LinearSVC(dual="auto", random_state=0)), {"linearsvc__C": COSTS}, cv=list(inner)
        )
        search.fit(features[~test], labels[~test])
        facts[f"fold_{fold}"] = float(search.score(features[test], labels[test]))
    counts = np.unique(labels, return_counts=True)[1]
    return {"accuracy": float(np.mean(list(facts.values()))), "chance": float(counts.max() / len(labels)), **facts}
