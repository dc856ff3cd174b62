"""Probes: right on what can be told apart, at chance on noise, stable, and the test rows have no say in any setting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from cmacc.train.evaluation import protocols
from cmacc.train.evaluation.protocols import COSTS, PROTOCOLS, Told, probe
from cmacc.train.evaluation.results import Result, summed_up
from cmacc.train.evaluation.splits import Split
from cmacc.train.evaluation.svm import LinearSvm

CLASSES, FOLDS = ("cat", "dog", "rain"), (1, 2, 3, 4)


def labelled(each: int = 5) -> tuple[np.ndarray, np.ndarray, list[Split]]:
    """Labels, folds and leave-one-fold-out: `each` of every class in every fold."""
    labels = np.array([name for _ in FOLDS for name in CLASSES for _ in range(each)])
    folds = np.repeat(FOLDS, each * len(CLASSES))
    return labels, folds, [Split(f"fold {f}", np.flatnonzero(folds != f), np.flatnonzero(folds == f)) for f in FOLDS]


def scored(labels: np.ndarray, told: list[Told]) -> Result:
    return summed_up(Result("t", "svm", "trained", 0, 0, 0), labels, [(one.split, one.rows, one.names) for one in told])


def blobs(labels: np.ndarray, width: int = 20, spread: float = 1.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = {name: rng.normal(size=width) for name in CLASSES}
    return (np.stack([centres[name] for name in labels]) + spread * rng.normal(size=(len(labels), width))).astype(np.float32)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_separable_features_are_told_apart(protocol: str) -> None:
    """By features a billionth of others' size: they are standardised."""
    labels, folds, splits = labelled()
    features = np.random.default_rng(0).normal(0, 1, (len(labels), 5))
    for i, name in enumerate(CLASSES):
        features[:, i] = 1e-6 * (labels == name)
    features[:, 3:] *= 1e3 if protocol != "knn" else 1e-9
    found = scored(labels, probe(protocol, features.astype(np.float32), labels, splits, folds))
    assert found.score == 1 and found.chance == pytest.approx(1 / 3) and found.over == len(labels)
    assert found.splits == {f"fold {i}": 1.0 for i in FOLDS}
    assert found.confusion == [[20, 0, 0], [0, 20, 0], [0, 0, 20]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_noise_stays_near_chance(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COSTS, protocol, COSTS.get(protocol, ())[::3])
    labels, folds, splits = labelled(each=12)
    noise = [np.random.default_rng(seed).normal(size=(len(labels), 6)).astype(np.float32) for seed in range(3)]
    scores = [scored(labels, probe(protocol, each, labels, splits, folds)).score for each in noise]
    assert 0.2 < np.mean(scores) < 0.47


def test_the_score_is_the_mean_over_splits_of_any_size() -> None:
    """Fold 1 has one file, of a class told wrongly; the others are told rightly."""
    labels = np.array(["b", *["a", "b"] * 9])
    folds = np.array([1, *np.repeat([2, 3, 4], 6)])
    splits = [Split(f"{f}", np.flatnonzero(folds != f), np.flatnonzero(folds == f)) for f in FOLDS]
    found = scored(labels, probe("svm", np.array([[0.0], *[[0.0], [1.0]] * 9], np.float32), labels, splits, folds))
    assert list(found.splits.values()) == [0, 1, 1, 1] and found.score == 0.75 and found.chance == pytest.approx(10 / 19)
    assert found.confusion == [[9, 0], [1, 9]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_stable_to_the_second_decimal(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlapping classes, more numbers than rows: the same twice, and as good with rows in another order and scaled features."""
    monkeypatch.setitem(COSTS, protocol, COSTS.get(protocol, ())[::2])
    labels, folds, splits = labelled(each=8)
    features = blobs(labels, width=120, spread=4.0)
    first = probe(protocol, features, labels, splits, folds)
    assert 0.4 < scored(labels, first).score < 0.95
    for one, other in zip(first, probe(protocol, features, labels, splits, folds), strict=True):
        assert np.array_equal(one.names, other.names) and one.settings == other.settings
    order = np.random.default_rng(0).permutation(len(labels))
    place = np.argsort(order)
    moved = [Split(name, place[train], place[test]) for name, train, test in splits]
    other = probe(protocol, features[order] * 3 + 7, labels[order], moved, folds[order])
    assert round(scored(labels[order], other).score, 2) == round(scored(labels, first).score, 2)
    for one, two in zip(first, other, strict=True):
        assert np.mean(one.names == two.names) > 0.99


def test_nothing_is_fitted_on_what_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spies on the scaler and the SVM see, for each split, no row that it tests: neither in the search for C nor after."""
    labels, folds, splits = labelled(each=2)
    features = np.random.default_rng(0).normal(size=(len(labels), 3)).astype(np.float32)
    features[:, 0] = np.arange(len(labels))  # a row's name
    fits: list[set[int]] = []

    class Scaler(protocols.StandardScaler):  # type: ignore[misc]
        def fit(self, x: np.ndarray, y: Any = None, sample_weight: Any = None) -> Any:
            fits.append(set(x[:, 0].astype(int).tolist()))
            return super().fit(x, y)

    class Svm(LinearSvm):
        def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
            seen.append(len(x))
            super().__init__(x, y)

    seen: list[int] = []
    monkeypatch.setattr(protocols, "StandardScaler", Scaler)
    monkeypatch.setattr(protocols, "LinearSvm", Svm)
    for name, train, test in splits:
        fits.clear(), seen.clear()
        probe("svm", features, labels, [Split(name, train, test)], folds)
        assert len(fits) == 3 + 1
        assert not set().union(*fits) & set(test.tolist())
        assert sorted(map(len, fits)) == sorted(seen)
        assert fits[-1] == set(train.tolist())
        held = {frozenset(set(train.tolist()) - rows) for rows in fits[:-1]}
        assert held == {frozenset(set(np.flatnonzero(folds == f).tolist())) for f in FOLDS if f != folds[test[0]]}


def test_c_is_the_best_of_the_training_folds() -> None:
    """Of equally good ones the smallest; and far apart classes need but little."""
    labels, folds, splits = labelled()
    told = probe("svm", blobs(labels, spread=0.01), labels, splits, folds)
    assert {one.settings["C"] for one in told} == {COSTS["svm"][0]} and {one.settings["inner_score"] for one in told} == {1.0}
    noisy = blobs(labels, width=60, spread=3.0)
    (one,) = probe("svm", noisy, labels, splits[:1], folds)
    rows = splits[0].train
    shares = {}
    for c in COSTS["svm"]:
        right = []
        for fold in (2, 3, 4):
            inside, outside = rows[folds[rows] != fold], rows[folds[rows] == fold]
            model = make_pipeline(StandardScaler(), LinearSVC(C=c, dual=False, max_iter=10_000)).fit(
                noisy[inside], labels[inside]
            )
            right += (model.predict(noisy[outside]) == labels[outside]).tolist()
        shares[c] = float(np.mean(right))
    best = max(shares.values())
    assert one.settings == {"C": min(c for c in shares if shares[c] == best), "inner_score": best, "converged": True}
    assert COSTS["svm"][0] < one.settings["C"] < COSTS["svm"][-1]


def test_files_that_are_left_out_are_in_neither_half() -> None:
    labels, folds, splits = labelled()
    features = blobs(labels)
    gone = [0, 7, 31]
    features[gone, 3] = np.nan
    found = scored(labels, told := probe("svm", features, labels, splits, folds))
    assert found.over == len(labels) - 3 == sum(len(one.rows) for one in told)
    assert not set(gone) & {row for one in told for row in one.rows.tolist()}


def test_too_few_rows() -> None:
    labels, folds, splits = labelled()
    features = blobs(labels)
    features[splits[0].test] = np.nan
    with pytest.raises(ValueError, match="fold 1 has 45 files to learn from and 0 to test that decode; it takes two classes"):
        probe("svm", features, labels, splits, folds)
    few = np.array(["a", "b", "a"]), np.array([0, 0, 1]), [Split("test", np.array([0, 1]), np.array([2]))]
    with pytest.raises(ValueError, match="2 files to learn from are too few to choose C; give two or more of each class"):
        probe("svm", blobs(labels)[:3], few[0], few[2], few[1])
    with pytest.raises(ValueError, match="there is no protocol 'svn'; use svm, logistic, knn"):
        probe("svn", features, labels, splits, folds)


def test_progress_tells_what_is_tried() -> None:
    labels, folds, splits = labelled()
    told: list[tuple[int, str]] = []
    probe("svm", blobs(labels), labels, splits, folds, lambda done, note: told.append((done, note)))
    assert [done for done, note in told if note.startswith("fold")] == [1, 2, 3, 4]
    assert told[0][0] == 0 and told[0][1].startswith("C 1e-06: ")


@pytest.mark.parametrize(("rows", "width", "classes"), [(400, 30, 5), (60, 150, 4), (200, 10, 2), (90, 200, 2)])
def test_the_svm_is_that_of_scikit_learn(rows: int, width: int, classes: int) -> None:
    """LinearSVC's weights: of more rows than numbers and fewer, two classes and more, begun at those of a smaller C or at 0."""
    rng = np.random.default_rng(rows)
    codes = rng.integers(0, classes, rows)
    x = rng.normal(size=(classes, width))[codes] + 3 * rng.normal(size=(rows, width))
    x[:, -1] = x[:, 0]  # one says what another says
    y, found = np.array(list("abcde"))[codes], LinearSvm(x, np.array(list("abcde"))[codes])
    for c in COSTS["svm"]:
        assert found.fit(c)
        theirs = LinearSVC(C=c, dual=False, tol=1e-9, max_iter=100_000).fit(x, y)
        ours = found._axes @ found._weights
        expected = np.concatenate([theirs.coef_, theirs.intercept_[:, None]], axis=1).T
        assert np.abs(ours - expected).max() < 1e-3 * np.abs(expected).max()
        far = np.abs(np.diff(np.sort(np.atleast_2d(theirs.decision_function(x).T), axis=0)[-2:], axis=0)).ravel() > 1e-6
        assert (found.predict(x) == theirs.predict(x))[far if classes > 2 else slice(None)].all()
    cold = LinearSvm(x, y)
    assert cold.fit(1.0) and np.abs(cold._weights - found._weights).max() < 1e-3 * np.abs(found._weights).max()
