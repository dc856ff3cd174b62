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
    with tables[0].open(newline="") as file:
        rows = list(csv.DictReader(file))
    missing = {"filename", "fold"} - set(rows[0] if rows else {})
    if missing or not ({"category", "target"} & set(rows[0])):
        raise ValueError(f"{tables[0]} lacks the columns filename, fold and category; take ESC-50's meta/esc50.csv as the model")
    files = [folder / "audio" / row["filename"] for row in rows]
    for row, path in zip(rows, files, strict=True):
        if Path(row["filename"]).name != row["filename"] or not path.is_file():
            raise ValueError(f"{tables[0]} names {row['filename']!r}, which is not in {folder / 'audio'}; copy it there")
    labels = np.array([row.get("category") or row["target"] for row in rows])
    return LabelledSounds(files, labels, np.array([int(row["fold"]) for row in rows]))


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
        each = [audio.features(graph.sounds(sounds, [s * place for s in last]).to(device)) for place in np.linspace(0, 1, views)]
        features.append(torch.stack(each).mean(0).float().cpu().numpy())
    return np.concatenate(features)


def _seconds(data: bytes, path: Path) -> float:
    try:
        with av.open(io.BytesIO(data), "r") as container:
            samples = rate = 0
            for frame in container.decode(audio=0):
                samples, rate = samples + frame.samples, frame.sample_rate
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} does not decode ({error}); take it out of the folder's CSV") from error
    return samples / max(rate, 1)


def linear_probe(features: NDArray[np.float32], labels: NDArray[np.str_], folds: NDArray[np.int64]) -> dict[str, float]:
    """Linear SVM on standardised features, leave one fold out: accuracy of each fold, their mean, and chance, shares 0..1.

    C is chosen by an inner leave-one-fold-out over the training folds, never on the test fold.
    """
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
