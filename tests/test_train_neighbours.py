"""The k-NN classifier against a loop, ties as they are stated, and what leave-one-out leaves out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from train_data import unit

from cmacc.train.evaluation import neighbours
from cmacc.train.evaluation.neighbours import knn, leave_one_out


def plain(gallery: torch.Tensor, labels: list[str], query: torch.Tensor, k: int, temperature: float) -> str:
    """One query in float64: the first k by cosine, rows that come first before others that are level."""
    cosines = (torch.nn.functional.normalize(gallery, dim=1) @ torch.nn.functional.normalize(query, dim=0)).tolist()
    nearest = sorted(range(len(cosines)), key=lambda row: (-cosines[row], row))[:k]
    votes: dict[str, float] = {}
    for row in nearest:
        votes[labels[row]] = votes.get(labels[row], 0.0) + math.exp(cosines[row] / temperature)
    return min(votes, key=lambda name: (-votes[name], name))


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (5, 10.0), (99, 0.5)])
@pytest.mark.parametrize("at_once", [1 << 24, 70])
def test_against_a_loop(monkeypatch: pytest.MonkeyPatch, k: int, temperature: float, at_once: int) -> None:
    """In blocks of rows too. With k above the gallery's size all of it votes."""
    monkeypatch.setattr(neighbours, "_AT_ONCE", at_once)
    gallery, queries = 3 * unit(30, 6, seed=1), unit(20, 6, seed=2)
    labels = [f"class {i % 4}" for i in range(30)]
    expected = [plain(gallery, labels, query, k, temperature) for query in queries]
    assert knn(gallery, labels, queries, k, temperature).tolist() == expected
    assert knn(gallery.numpy(), np.array(labels), queries.numpy(), k, temperature).tolist() == expected
    alone = leave_one_out(gallery, labels, None, k, temperature).tolist()
    rest = [[j for j in range(30) if j != i] for i in range(30)]
    assert alone == [plain(gallery[r], [labels[j] for j in r], gallery[i], k, temperature) for i, r in enumerate(rest)]


def test_votes_are_weighed_by_cosine() -> None:
    """Two far ones are outvoted by a near one at a low temperature, and win at a high one."""
    gallery = torch.tensor([[1.0, 0.1], [0.3, 1.0], [0.3, 1.0]])
    query = torch.tensor([[1.0, 0.0]])
    assert knn(gallery, ["near", "far", "far"], query, 3, 0.07).tolist() == ["near"]
    assert knn(gallery, ["near", "far", "far"], query, 3, 100.0).tolist() == ["far"]


def test_ties() -> None:
    """Rows that come first; then the label that sorts first."""
    gallery, query = torch.eye(3)[[0, 0, 0, 0, 1]], torch.eye(3)[:1]
    assert knn(gallery, [5, 5, 3, 3, 3], query, 3).tolist() == [5]
    assert knn(gallery, [5, 3, 3, 5, 3], query, 3).tolist() == [3]
    assert knn(gallery, ["b", "a", "b", "a", "b"], query, 4).tolist() == ["a"]
    mixed = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.6, 0.8], [0.8, 0.6], [1.0, 0.0]])
    assert knn(mixed, [2, 2, 2, 1, 1, 1], torch.tensor([[1.0, 0.0]]), 6).tolist() == [1]


def test_groups_do_not_vote_for_their_own() -> None:
    """Clips of one video are near, and would tell its label."""
    features = torch.eye(4)[[0, 0, 1, 1]] + 0.1
    assert leave_one_out(features, [0, 0, 1, 1], k=1).tolist() == [0, 0, 1, 1]
    assert leave_one_out(features, [0, 0, 1, 1], ["x", "x", "y", "y"], k=3).tolist() == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="all rows are of one group"):
        leave_one_out(features, [0, 0, 1, 1], [7, 7, 7, 7])
    with pytest.raises(ValueError, match="all rows are of one group"):
        leave_one_out(features[:1], [0])


def test_a_collapse_is_no_better_than_the_first_rows() -> None:
    """All alike, or not a number: nothing fails, and nobody is told from another."""
    labels = [0, 1, 2, 0, 1, 2]
    for collapse in (torch.ones(6, 4), torch.full((6, 4), math.nan)):
        assert len(set(knn(collapse, labels, collapse, 1).tolist())) == 1
        assert leave_one_out(collapse, labels, k=1).tolist() == [1, 0, 0, 0, 0, 0]
    some = torch.eye(3)[[0, 0, 1, 1]]
    some[1] = math.nan
    assert knn(some, [7, 8, 9, 9], torch.eye(3)[1:2], 3).tolist() == [9]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"k": 0}, "k is 0; give 1 neighbour or more"),
        ({"temperature": 0.0}, "the temperature of the votes is 0.0; give a number above 0"),
        ({"gallery": torch.zeros(0, 2), "labels": []}, "the gallery is empty; give labelled rows"),
    ],
)
def test_bad_input(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        knn(**{"gallery": torch.eye(2), "labels": [0, 1], "queries": torch.eye(2), **changes})  # type: ignore[arg-type]


def test_no_query() -> None:
    assert knn(torch.eye(2), ["a", "b"], torch.zeros(0, 2)).tolist() == []
