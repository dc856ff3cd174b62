"""The audio probe on ESC-10: frozen features of a run's sound encoder, leave one fold out."""

from __future__ import annotations

import numpy as np
import torch
from clips import VIEW
from data import recordings
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cmacc.train.evaluation.examples import Examples
from cmacc.train.evaluation.labelled import read_labelled
from cmacc.train.loading.loader import LoaderConfig
from cmacc.train.model import CrossModal

VIEWS = 4


@torch.no_grad()
def score_sounds(model: CrossModal) -> dict[str, float]:
    """Accuracy of a ridge classifier over the folds of `esc10/`, its strength chosen inside the training folds; `over` files.

    Raises FileNotFoundError where the recordings are absent.
    """
    sounds = read_labelled(f"esc50:{recordings('esc10')}")
    examples = Examples(sounds, VIEW, LoaderConfig(batch=32, device="cpu", threads=1))
    features = np.full((len(sounds.files), model.audio.feature_width), np.nan, np.float32)
    model.eval()
    for rows, x in examples.central(range(len(sounds.files)), views=VIEWS):
        features[rows] = model.audio.features(x.flatten(0, 1)).unflatten(0, (len(rows), -1)).mean(1).numpy()
    model.train()
    there, labels = np.isfinite(features).all(1), np.array(sounds.labels)
    accuracies = []
    for _, train, test in sounds.splits:
        train, test = train[there[train]], test[there[test]]
        classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(-1, 4, 6)))
        accuracies.append(float(classifier.fit(features[train], labels[train]).score(features[test], labels[test])))
    return {"accuracy": float(np.mean(accuracies)), "over": float(there.sum())}
