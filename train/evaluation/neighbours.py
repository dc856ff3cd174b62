"""Classes of the nearest: a k-NN classifier whose neighbours vote by their cosine, as DINO's (arXiv 2104.14294)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import normalize

K = 20
TEMPERATURE = 0.07
_AT_ONCE = 1 << 24
"""Similarities held in memory at once."""
_BELOW_ALL = -2.0


def knn(
    gallery: Tensor | NDArray[Any],
    labels: ArrayLike,
    queries: Tensor | NDArray[Any],
    k: int = K,
    temperature: float = TEMPERATURE,
) -> NDArray[Any]:
    """The predicted label of each query: of the class for which its `k` nearest of the gallery have the most votes.

    gallery: features (n, d), labels: of them (n,), numbers or names; queries: features (m, d). A neighbour of cosine c votes with
    exp(c / temperature). Where several rows are equally near, those that come first are taken; of classes with equal votes
    the one that sorts first wins. What is not finite is farther than anything else. With fewer than k rows all of them vote.
    Returns (m,), of the labels' type. Raises ValueError for an empty gallery, or a k or a temperature that is not above 0.
    """
    _check(len(gallery), k, temperature)
    classes, codes = _coded(labels)
    near, far = _unit(gallery), _unit(queries)
    found = [_vote(_cosines(far[rows], near), codes, len(classes), k, temperature) for rows in blocks(len(far), len(near))]
    return classes[torch.cat(found).numpy()] if found else classes[:0]


def leave_one_out(
    features: Tensor | NDArray[Any],
    labels: ArrayLike,
    groups: ArrayLike | None = None,
    k: int = K,
    temperature: float = TEMPERATURE,
) -> NDArray[Any]:
    """As `knn`, each row by all the others. groups: (n,), e.g. source videos: no row of a query's own group votes.

    Raises ValueError when there are fewer than two groups (of rows, where none are given).
    """
    own = np.unique(np.arange(len(features)) if groups is None else np.asarray(groups), return_inverse=True)[1]
    if len(own) == 0 or own.max() < 1:
        raise ValueError("all rows are of one group, so that nothing is left to vote; give rows of two groups or more")
    _check(len(features), k, temperature)
    classes, codes = _coded(labels)
    near, group = _unit(features), torch.as_tensor(own, device=torch.as_tensor(features).device)
    found = []
    for rows in blocks(len(near), len(near)):
        scores = _cosines(near[rows], near).masked_fill(group[rows, None] == group, -torch.inf)
        found.append(_vote(scores, codes, len(classes), k, temperature))
    return classes[torch.cat(found).numpy()]


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows, so that a matrix of so many columns is never in memory as a whole."""
    step = max(1, _AT_ONCE // max(columns, 1))
    return (slice(at, min(at + step, rows)) for at in range(0, rows, step))


# --- inside ---


def _check(n: int, k: int, temperature: float) -> None:
    if n < 1:
        raise ValueError("the gallery is empty; give labelled rows to look among")
    if k < 1:
        raise ValueError(f"k is {k}; give 1 neighbour or more")
    if not temperature > 0:
        raise ValueError(f"the temperature of the votes is {temperature}; give a number above 0")


def _coded(labels: ArrayLike) -> tuple[NDArray[Any], Tensor]:
    classes, codes = np.unique(np.asarray(labels), return_inverse=True)
    return classes, torch.from_numpy(codes.astype(np.int64))


def _unit(features: Tensor | NDArray[Any]) -> Tensor:
    return normalize(torch.as_tensor(features).float(), dim=1)


def _cosines(queries: Tensor, gallery: Tensor) -> Tensor:
    return (queries @ gallery.T).nan_to_num(_BELOW_ALL)


def _vote(scores: Tensor, codes: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Codes of the classes that win, on the host. scores: (b, n), -inf for who must not vote."""
    k = min(k, scores.shape[1])
    least = scores.topk(k, dim=1).values[:, -1:]
    above, level = scores > least, scores == least  # topk takes any of those that are level
    taken = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdim=True)))
    nearest = taken.nonzero()[:, 1].view(len(scores), k)
    cosines = scores.gather(1, nearest).double()
    weights = ((cosines - cosines.amax(1, keepdim=True)) / temperature).exp()
    votes = weights.new_zeros(len(scores), classes).scatter_add_(1, codes.to(scores.device)[nearest], weights)
    # the largest weight is 1: rounding makes equal what only the order of the sums tells apart
    return votes.round(decimals=12).argmax(1).cpu()
