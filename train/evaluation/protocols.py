"""Probes of frozen features: linear SVM, logistic regression, k-NN. What is tested has no say in any setting."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from cmacc.train.evaluation.neighbours import knn
from cmacc.train.evaluation.splits import Split
from cmacc.train.evaluation.svm import LinearSvm

Features = NDArray[np.float32]
Progress = Callable[[int, str], None]
Say = Callable[[str], None]
Model = Callable[[NDArray[np.float64], NDArray[np.str_]], Any]
"""From standardised rows and their labels to what fits itself for a C, tells whether it converged, and predicts."""
Predicted = tuple[NDArray[np.str_], dict[str, Any]]

COSTS = {"svm": tuple(10.0**power for power in range(-6, 1)), "logistic": tuple(10.0**power for power in range(-4, 3))}
"""Candidates for C, from the strongest regularisation to the weakest."""
_ITERATIONS = 10_000
K, TEMPERATURE = 20, 0.07


@dataclass(frozen=True)
class Told:
    """What a probe said in one split. rows: that were tested, (m,); names: the label it gives each, (m,). settings: what was
    chosen on the training rows."""

    split: str
    rows: NDArray[np.int64]
    names: NDArray[np.str_]
    settings: dict[str, Any]


def probe(
    protocol: str,
    features: Features,
    labels: NDArray[np.str_],
    splits: Sequence[Split],
    folds: NDArray[np.int64],
    on_progress: Progress | None = None,
) -> list[Told]:
    """Train on each split's training rows and predict its test rows. features: (n, d), a row of NaN where a file was left out.

    All features are standardised by the training rows. C is the one with the most training rows told rightly when each of
    their folds is left out in turn; of equals, the smallest. on_progress: splits done, and what is tried. Raises ValueError when
    too few rows are left.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"there is no protocol {protocol!r}; use {', '.join(PROTOCOLS)}")
    there = np.asarray(np.isfinite(features).all(axis=1))
    x = features.astype(np.float64)
    told: list[Told] = []
    tell = on_progress or (lambda done, note: None)
    for name, train, test in splits:
        train, test = train[there[train]], test[there[test]]
        if len(set(labels[train].tolist())) < 2 or not len(test):
            raise ValueError(
                f"{name} has {len(train)} files to learn from and {len(test)} to test that decode; "
                "it takes two classes to learn from and one file to test"
            )
        done = len(told)
        names, settings = PROTOCOLS[protocol](
            x[train], labels[train], folds[train], x[test], lambda note, done=done: tell(done, note)
        )
        told.append(Told(name, test, names, settings))
        tell(done + 1, name)
    return told


def _svm(
    x: NDArray[np.float64], y: NDArray[np.str_], folds: NDArray[np.int64], queries: NDArray[np.float64], say: Say
) -> Predicted:
    return _linear(LinearSvm, COSTS["svm"], x, y, folds, queries, say)


def _logistic(
    x: NDArray[np.float64], y: NDArray[np.str_], folds: NDArray[np.int64], queries: NDArray[np.float64], say: Say
) -> Predicted:
    return _linear(_Logistic, COSTS["logistic"], x, y, folds, queries, say)


class _Logistic:
    """Each fit begins anew: from the weights of a smaller C it would stop where it is, its gradient being small already."""

    def __init__(self, x: NDArray[np.float64], y: NDArray[np.str_]) -> None:
        self._x, self._y = x, y
        self._model = LogisticRegression(max_iter=_ITERATIONS)

    def fit(self, cost: float) -> bool:
        with warnings.catch_warnings():  # what does not converge is told by its number of iterations
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._model.set_params(C=cost).fit(self._x, self._y)
        return bool(np.max(self._model.n_iter_) < _ITERATIONS)

    def predict(self, x: NDArray[np.float64]) -> NDArray[np.str_]:
        return np.asarray(self._model.predict(x))


def _knn(
    x: NDArray[np.float64], y: NDArray[np.str_], folds: NDArray[np.int64], queries: NDArray[np.float64], say: Say
) -> Predicted:
    scaler = StandardScaler().fit(x)
    names = knn(scaler.transform(x), y, scaler.transform(queries), K, TEMPERATURE)
    return np.asarray(names), {"k": K, "temperature": TEMPERATURE}


PROTOCOLS: dict[str, Callable[..., Predicted]] = {"svm": _svm, "logistic": _logistic, "knn": _knn}


class _Fold:
    """A model of the training rows outside one of their folds, which tries one C after another on that fold."""

    def __init__(self, model: Model, x: NDArray[np.float64], y: NDArray[np.str_], inside: NDArray[np.bool_]) -> None:
        scaler = StandardScaler().fit(x[~inside])
        self._model = model(scaler.transform(x[~inside]), y[~inside])
        self._x, self._y = scaler.transform(x[inside]), y[inside]

    def right(self, cost: float) -> tuple[int, bool]:
        """How many rows of the fold are told rightly by the others, and whether the fit converged."""
        converged = self._model.fit(cost)
        return int((self._model.predict(self._x) == self._y).sum()), converged


def _linear(
    model: Model,
    costs: Sequence[float],
    x: NDArray[np.float64],
    y: NDArray[np.str_],
    folds: NDArray[np.int64],
    queries: NDArray[np.float64],
    say: Say,
) -> Predicted:
    # leaving out a fold that holds all but one class would leave nothing to learn
    inner = [fold for fold in np.unique(folds) if len(set(y[folds != fold].tolist())) > 1]
    if not inner:
        raise ValueError(f"{len(y)} files to learn from are too few to choose C; give two or more of each class")
    count = sum(int((folds == fold).sum()) for fold in inner)
    best, cost = -1.0, costs[0]
    # a thread for each fold: more of them, inside, would wait for each other
    inside = max(1, joblib.cpu_count() // len(inner))
    with threadpool_limits(inside), joblib.Parallel(n_jobs=-1, prefer="threads") as parallel:
        tried = parallel(joblib.delayed(_Fold)(model, x, y, folds == fold) for fold in inner)
        for c in costs:
            right, converged = zip(*parallel(joblib.delayed(fold.right)(c) for fold in tried), strict=True)
            share = sum(right) / count
            say(f"C {c:g}: {share:.1%} of the training files")
            if not all(converged):  # nor would larger ones
                break
            if share > best:
                best, cost = share, c
    scaler = StandardScaler().fit(x)
    final = model(scaler.transform(x), y)
    converged = final.fit(cost)
    return final.predict(scaler.transform(queries)), {"C": cost, "inner_score": best, "converged": converged}
